//! The plan: every token in exactly one chunk, nothing crosses a sequence, everything fits its limits.

use gatedelta::plan::{Limits, Plan, Segment, scratch_per_chunk_head};
use gatedelta::shape::{HeadMap, Heads, Shape};
use gatedelta::tune::{Cut, Tile};
use proptest::prelude::*;

fn tile(chunk: u32, scratch: u64) -> Tile {
    let heads = Heads::new(1, 1, 16, 16, HeadMap::Div).unwrap();
    let caps = gatedelta::backend::cpu::Cpu::new(Some(1)).unwrap();
    let base = gatedelta::tune::tile(gatedelta::backend::Backend::caps(&caps), &heads);
    Tile { chunk, scratch, ..base }
}

/// Everything that must hold of any plan.
fn check(shape: &Shape, tile: &Tile, limits: &Limits) -> Plan {
    let plan = Plan::new(shape, tile, limits).unwrap();
    let cu = shape.cu_seqlens();

    let mut next = 0;
    for c in &plan.chunks {
        let (begin, end) = (cu[c.seq as usize], cu[c.seq as usize + 1]);
        assert_eq!(c.start, next, "chunks follow each other without gap or overlap");
        assert!(c.len >= 1 && c.len <= tile.chunk);
        assert!(c.start >= begin && c.start + c.len as u64 <= end, "a chunk stays in its sequence");
        assert!(c.len == tile.chunk || c.start + c.len as u64 == end, "only a last chunk is short");
        next = c.start + c.len as u64;
    }
    assert_eq!(next, shape.tokens(), "every token is in a chunk");

    let mut first = 0;
    let mut regions: Vec<(u64, u64)> = Vec::new();
    for piece in &plan.pieces {
        assert_eq!(piece.chunks.start, first, "pieces follow each other");
        assert!(!piece.chunks.is_empty());
        first = piece.chunks.end;
        let own = &plan.chunks[piece.chunks.clone()];
        assert_eq!(piece.tokens, own[0].start..own[own.len() - 1].start + own[own.len() - 1].len as u64);
        let window = (piece.tokens.end - piece.tokens.start) * limits.token_bytes + limits.align;
        assert!(window <= limits.max_binding, "window of {window} bytes");
        assert!(piece.slots.len() as u64 * limits.state_bytes <= limits.max_binding);
        assert!(own.len() as u64 <= plan.most_chunks);
        let scratch = own.len() as u64 * shape.heads.hv as u64 * limits.chunk_bytes;
        assert!(scratch <= plan.scratch && scratch <= limits.max_binding);

        // The tables say what the plan says.
        let rows = |offset: u64, n: usize| plan.tables[offset as usize / 4..][..4 * n].chunks(4);
        for (row, c) in rows(piece.chunk_table, own.len()).zip(own) {
            assert_eq!(row, [(c.start - piece.tokens.start) as u32, c.len, c.seq, 0]);
        }
        let walked = own.chunk_by(|a, b| a.seq == b.seq).map(|run| run.len() as u64).max().unwrap();
        assert!(walked <= tile.walk, "{walked} chunks of a sequence in a piece");

        let mut covered = 0;
        for (row, s) in rows(piece.segment_table, piece.segments.len()).zip(&piece.segments) {
            assert_eq!(row, [s.first_chunk, s.chunks, s.slot, s.back]);
            assert_eq!(s.first_chunk, covered, "segments cover the piece's chunks in order");
            covered += s.chunks;
            assert!(own[s.first_chunk as usize..covered as usize].windows(2).all(|c| c[0].seq == c[1].seq));
        }
        let sequences = piece.slots.len() as u32;
        let mut segments = 0;
        for (i, row) in rows(piece.sequence_table, piece.slots.len()).enumerate() {
            let seq = piece.slots.start + i as u32;
            let run: Vec<_> = piece.segments.iter().filter(|s| own[s.first_chunk as usize].seq == seq).collect();
            assert_eq!(row[1] as usize, run.len());
            assert!(run.is_empty() || row[0] == segments, "segments of a sequence follow each other");
            segments += row[1];
            // The last one leaves its state in the sequence's slot, backward the first one does; no others.
            for (at, s) in run.iter().enumerate() {
                assert_eq!(s.slot == i as u32, at + 1 == run.len());
                assert_eq!(s.back == i as u32, at == 0);
                assert!(s.slot == i as u32 || s.slot >= sequences);
                assert!(s.back == i as u32 || s.back >= sequences);
            }
        }
        assert_eq!(segments as usize, piece.segments.len());
        for slot in [|s: &Segment| s.slot, |s: &Segment| s.back] {
            let mut used: Vec<u32> = piece.segments.iter().map(slot).collect();
            used.sort_unstable();
            assert!(used.windows(2).all(|w| w[0] < w[1]), "each slot once");
            assert!(used.iter().all(|&s| (s as u64) < piece.all_slots()));
        }
        if piece.is_cut() {
            let bytes = limits.state_bytes.max(shape.heads.hv as u64 * (shape.heads.k as u64).pow(2) * 4);
            assert!(piece.all_slots() * bytes <= limits.max_binding && piece.all_slots() <= plan.cut_slots);
            assert!(piece.segments.len() as u64 <= plan.cut_slots);
        }
        assert_eq!(covered as usize, own.len());
        let tables = [
            (piece.chunk_table, own.len()),
            (piece.segment_table, piece.segments.len()),
            (piece.sequence_table, piece.slots.len()),
        ];
        for (offset, n) in tables {
            assert_eq!(offset % limits.align, 0);
            regions.push((offset, offset + n as u64 * 16));
        }
    }
    assert_eq!(first, plan.chunks.len());
    assert!(regions.windows(2).all(|w| w[0].1 <= w[1].0), "tables are disjoint");
    assert!(regions.last().is_none_or(|r| r.1 <= plan.tables.len() as u64 * 4));
    plan
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_batch(
        lens in prop::collection::vec(prop_oneof![Just(0u64), 1..4u64, 1..500u64], 0..40),
        chunk in prop::sample::select(vec![16u32, 32, 64]),
        hv in 1u32..5,
        extra in 0u64..200_000,
        scratch in 1u64..1_000_000,
        align in prop::sample::select(vec![16u64, 64, 256]),
        cut in prop::option::of((1u32..8, prop_oneof![Just(u32::MAX), 1..200u32])),
    ) {
        let heads = Heads::new(1, hv, 32, 48, HeadMap::Div).unwrap();
        let cu = std::iter::once(0).chain(lens.iter().scan(0, |t, &n| { *t += n; Some(*t) })).collect();
        let shape = Shape::new(heads, cu).unwrap();
        let token_bytes = hv as u64 * 48 * 4;
        let state_bytes = heads.state_len() * 4;
        let least = (chunk as u64 * token_bytes + align)
            .max(state_bytes)
            .max(scratch_per_chunk_head(chunk) * hv as u64);
        let cut = cut.map(|(least, cells)| Cut { cells, least, exact: true });
        let tile = Tile { cut, dv_tile: 16, ..tile(chunk, scratch) };
        check(&shape, &tile, &Limits { max_binding: least + extra, align, token_bytes, state_bytes, chunk_bytes: scratch_per_chunk_head(chunk) });
    }
}

#[test]
fn beyond_two_to_the_32_elements() {
    let heads = Heads::new(16, 64, 128, 128, HeadMap::Div).unwrap();
    // 64 value heads x 128 x 2^20 tokens = 2^33 numbers of v.
    let shape = Shape::new(heads, vec![0, 1 << 19, 1 << 19, 1 << 20]).unwrap();
    let limits = Limits {
        max_binding: 128 << 20,
        align: 256,
        token_bytes: 64 * 128 * 4,
        state_bytes: heads.state_len() * 4,
        chunk_bytes: scratch_per_chunk_head(64),
    };
    let plan = check(&shape, &tile(64, 64 << 20), &limits);
    assert!(plan.pieces.len() >= 256);
}

#[test]
fn scratch_does_not_grow_with_tokens() {
    let heads = Heads::new(16, 16, 128, 128, HeadMap::Div).unwrap();
    let limits = Limits {
        max_binding: 1 << 30,
        align: 256,
        token_bytes: 16 * 128 * 4,
        state_bytes: heads.state_len() * 4,
        chunk_bytes: scratch_per_chunk_head(32),
    };
    let scratch = |t| check(&Shape::one(heads, t), &tile(32, 8 << 20), &limits).scratch;
    assert_eq!(scratch(1 << 12), scratch(1 << 17));
}

#[test]
fn a_walk_does_not_grow_with_tokens_or_with_few_heads() {
    for hv in [1, 16] {
        let heads = Heads::new(1, hv, 16, 16, HeadMap::Div).unwrap();
        let tile = Tile { walk: 100, ..tile(32, 64 << 20) };
        let limits = Limits {
            max_binding: 1 << 31,
            align: 256,
            token_bytes: 64,
            state_bytes: 1024,
            chunk_bytes: scratch_per_chunk_head(32),
        };
        // One long sequence, a short one, many that share pieces, another long one.
        let lengths = [100_000, 5].into_iter().chain([64; 300]).chain([40_000]);
        let cu: Vec<u64> = std::iter::once(0)
            .chain(lengths.scan(0, |at, n| {
                *at += n;
                Some(*at)
            }))
            .collect();
        let shape = Shape::new(heads, cu).unwrap();
        let plan = check(&shape, &tile, &limits);
        // 3125, 1, 600 and 1250 chunks: 31 full walks, then the rest of the long one with the others and the begin of the last.
        assert!(plan.pieces[..31].iter().all(|piece| piece.chunks.len() == 100));
        assert!(plan.pieces[31].chunks.len() > 400, "short sequences share a piece: {:?}", plan.pieces[31].chunks);
        let whole = Plan::new(&shape, &Tile { walk: u64::MAX, ..tile }, &limits).unwrap();
        assert!(whole.pieces.len() < plan.pieces.len() && whole.chunks == plan.chunks);
    }
}

#[test]
fn a_chunk_that_does_not_fit_is_refused_with_the_numbers() {
    let heads = Heads::new(1, 1, 16, 16, HeadMap::Div).unwrap();
    let limits = Limits {
        max_binding: 4096,
        align: 256,
        token_bytes: 1 << 20,
        state_bytes: 1024,
        chunk_bytes: scratch_per_chunk_head(64),
    };
    let error = Plan::new(&Shape::one(heads, 100), &tile(64, 1 << 20), &limits).unwrap_err().to_string();
    assert!(error.contains("67108864") && error.contains("4096"), "{error}");
}

#[test]
fn sequences_are_cut_while_the_device_is_not_occupied() {
    let heads = Heads::new(2, 2, 32, 32, HeadMap::Div).unwrap();
    let limits = Limits {
        max_binding: 1 << 30,
        align: 256,
        token_bytes: 2 * 32 * 4,
        state_bytes: heads.state_len() * 4,
        chunk_bytes: scratch_per_chunk_head(32),
    };
    let segments = |cells: u32, least: u32, lens: &[u64]| {
        let cut = Some(Cut { cells, least, exact: true });
        let cu = std::iter::once(0)
            .chain(lens.iter().scan(0, |t, &n| {
                *t += n;
                Some(*t)
            }))
            .collect();
        let shape = Shape::new(heads, cu).unwrap();
        let tile = Tile { cut, dv_tile: 16, ..tile(32, 1 << 30) };
        let plan = check(&shape, &tile, &limits);
        let of = |n: usize| {
            plan.pieces[0].segments.iter().filter(|s| plan.chunks[s.first_chunk as usize].seq as usize == n).count()
        };
        (0..lens.len()).map(of).collect::<Vec<_>>()
    };
    // 64 chunks, 2 heads in 2 tiles: 4 cells a segment.
    assert_eq!(segments(32, 1, &[2048]), [8]);
    assert_eq!(segments(32, 16, &[2048]), [4]);
    assert_eq!(segments(4, 1, &[2048]), [1]);
    // Two alike are 8 cells; a short one beside a long one is hardly any.
    assert_eq!(segments(8, 1, &[2048, 2048]), [1, 1]);
    assert_eq!(segments(32, 1, &[2048, 2048]), [4, 4]);
    assert_eq!(segments(16, 1, &[2048, 32, 0]), [4, 1, 0]);
}
