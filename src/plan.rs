//! The plan of one prefill: chunks, segments, pieces and scratch, computed from shape, tile and limits before anything
//! touches a device. Every backend uses it; kernels only read its tables.
//!
//! - A *chunk* is up to C consecutive tokens of one sequence.
//! - A *segment* is a run of chunks of one sequence that one scan cell walks in order, from the state in its slot and back
//!   into it. Today a sequence has one segment per piece and slot n belongs to sequence n; further slots are room for cutting
//!   a sequence into segments that run in parallel.
//! - A *piece* is a run of segments that is launched together. Its windows of q, k, v and o fit the device's bindings and
//!   its scratch fits the tile's budget, so memory does not grow with T.

use crate::error::{Error, Result};
use crate::shape::Shape;
use crate::tune::Tile;

/// Up to C consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// First token, counted over the whole batch.
    pub start: u64,
    /// Tokens, 1 to C.
    pub len: u32,
    /// The sequence.
    pub seq: u32,
}

/// A run of chunks of one sequence, walked in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First chunk, counted from the piece's first.
    pub first_chunk: u32,
    /// Number of chunks.
    pub chunks: u32,
    /// Where its state is taken from and left, counted from the piece's first slot.
    pub slot: u32,
}

/// What is launched together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its chunks, as indices into [`Plan::chunks`].
    pub chunks: std::ops::Range<usize>,
    /// Its segments.
    pub segments: Vec<Segment>,
    /// Its tokens: the window of q, k, v, g, beta and o that its launches see.
    pub tokens: std::ops::Range<u64>,
    /// Its state slots: the window of the states that its launches see.
    pub slots: std::ops::Range<u32>,
    /// Byte offset of its chunk table in [`Plan::tables`].
    pub chunk_table: u64,
    /// Byte offset of its segment table in [`Plan::tables`].
    pub segment_table: u64,
}

/// Limits that a plan keeps to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest window of one argument, in bytes.
    pub max_binding: u64,
    /// Windows start at multiples of this.
    pub align: u64,
    /// Bytes between consecutive tokens in the widest of q, k, v, g and o.
    pub token_bytes: u64,
    /// Bytes of the state of one sequence.
    pub state_bytes: u64,
    /// Bytes of scratch per chunk and value head: its largest region, for which the tile's budget is.
    pub chunk_bytes: u64,
}

/// Chunks, segments, pieces and scratch of one prefill.
#[derive(Debug, Clone)]
pub struct Plan {
    /// All chunks in order of tokens.
    pub chunks: Vec<Chunk>,
    /// All pieces in order; they run one after the other.
    pub pieces: Vec<Piece>,
    /// Chunks of the longest piece.
    pub most_chunks: u64,
    /// Bytes of the largest region of scratch: one piece's worth, used again by each.
    pub scratch: u64,
    /// The chunk and segment tables of all pieces as the kernels read them, rows of four u32.
    pub tables: Vec<u32>,
}

/// Bytes of scratch per chunk and value head: A and P `[C, C]`, three vectors `[C]`, one `[C]` with gamma_C.
pub const fn scratch_per_chunk_head(chunk: u32) -> u64 {
    4 * (2 * chunk as u64 * chunk as u64 + 4 * chunk as u64)
}

/// The same with what the backward pass needs: B, G, R `[C, C]` and five vectors `[C]` more.
pub const fn grad_scratch_per_chunk_head(chunk: u32) -> u64 {
    scratch_per_chunk_head(chunk) + 4 * (3 * chunk as u64 * chunk as u64 + 5 * chunk as u64)
}

/// Bytes that either scan of the backward pass saves per chunk and value head: a state `[K, V]` and two `[C, V]`.
pub const fn saved_per_chunk_head(chunk: u32, dk: u32, dv: u32) -> u64 {
    4 * dv as u64 * (dk as u64 + 2 * chunk as u64)
}

impl Plan {
    /// Plans a prefill or a backward pass.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a single chunk does not fit the limits.
    pub fn new(shape: &Shape, tile: &Tile, limits: &Limits) -> Result<Plan> {
        let c = tile.chunk as u64;
        let chunk_scratch = limits.chunk_bytes.max(1) * shape.heads.hv as u64;
        // A window may begin up to `align` bytes early, at the last aligned address before its first token.
        let window_tokens = limits.max_binding.saturating_sub(limits.align) / limits.token_bytes.max(1);
        let window_slots = limits.max_binding / limits.state_bytes.max(1);
        if window_tokens < c || chunk_scratch > limits.max_binding || window_slots < 1 {
            return Err(Error::Unsupported {
                what: format!("a chunk of {c} tokens with {} value heads", shape.heads.hv),
                by: "the device".into(),
                why: format!(
                    "it needs {} bytes of one tensor, {chunk_scratch} of scratch and {} of state, and a binding holds {}",
                    c * limits.token_bytes,
                    limits.state_bytes,
                    limits.max_binding
                ),
            });
        }
        let most_chunks = (tile.scratch.min(limits.max_binding) / chunk_scratch).clamp(1, 1 << 20) as usize;

        let chunks: Vec<Chunk> = shape
            .cu_seqlens()
            .windows(2)
            .enumerate()
            .flat_map(|(seq, w)| {
                let (begin, end) = (w[0], w[1]);
                (begin..end).step_by(c as usize).map(move |start| Chunk {
                    start,
                    len: (end - start).min(c) as u32,
                    seq: seq as u32,
                })
            })
            .collect();

        let mut pieces = Vec::new();
        let mut tables = Vec::new();
        let mut first = 0;
        while first < chunks.len() {
            let Chunk { start: t0, seq: s0, .. } = chunks[first];
            let most = chunks.len().min(first + most_chunks);
            let fits = |c: &Chunk| c.start + c.len as u64 - t0 <= window_tokens && ((c.seq - s0) as u64) < window_slots;
            let end = (first + 1..most).find(|&i| !fits(&chunks[i])).unwrap_or(most);
            pieces.push(piece(&chunks, first..end, limits.align, &mut tables));
            first = end;
        }
        let most = pieces.iter().map(|p| p.chunks.len()).max().unwrap_or(0) as u64;
        Ok(Plan { chunks, pieces, most_chunks: most, scratch: most * chunk_scratch, tables })
    }
}

/// One piece and its rows in the tables.
fn piece(chunks: &[Chunk], range: std::ops::Range<usize>, align: u64, tables: &mut Vec<u32>) -> Piece {
    let own = &chunks[range.clone()];
    let t0 = own[0].start;
    let last = own[own.len() - 1];
    let slots = own[0].seq..last.seq + 1;
    let mut segments: Vec<Segment> = Vec::new();
    for (i, chunk) in own.iter().enumerate() {
        let slot = chunk.seq - slots.start;
        match segments.last_mut() {
            Some(s) if s.slot == slot => s.chunks += 1,
            _ => segments.push(Segment { first_chunk: i as u32, chunks: 1, slot }),
        }
    }
    let chunk_table = begin_table(tables, align);
    tables.extend(own.iter().flat_map(|c| [(c.start - t0) as u32, c.len, c.seq, 0]));
    let segment_table = begin_table(tables, align);
    tables.extend(segments.iter().flat_map(|s| [s.first_chunk, s.chunks, s.slot, 0]));
    Piece { chunks: range, segments, tokens: t0..last.start + last.len as u64, slots, chunk_table, segment_table }
}

/// Pads the tables so that the next one starts aligned; its byte offset.
fn begin_table(tables: &mut Vec<u32>, align: u64) -> u64 {
    let align_words = (align.max(16) / 4) as usize;
    tables.resize(tables.len().next_multiple_of(align_words), 0);
    tables.len() as u64 * 4
}
