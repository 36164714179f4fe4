//! The plan of one prefill: chunks, segments, pieces and scratch, computed from shape, tile and limits before anything
//! touches a device. Every backend uses it; kernels only read its tables.
//!
//! - A *chunk* is up to C consecutive tokens of one sequence.
//! - A *segment* is a run of chunks of one sequence that one scan cell walks in order, from the state in its slot and back
//!   into it.
//! - A *piece* is a run of segments that is launched together. Its windows of q, k, v and o fit the device's bindings and
//!   its scratch fits the tile's budget, so memory does not grow with T; it has at most [`Tile::walk`] chunks of a sequence, so
//!   the time of a launch does not either.
//!
//! A sequence has one segment per piece, and slot n belongs to sequence n, unless the piece is *cut*: where its sequences are
//! too few to occupy the device (the tile's [`Cut`]), the longer ones have several segments that run at the
//! same time, each from a slot of its own. How their states come about is told in [`crate::kernel::gdn_cut`]. Lengths alone
//! decide where sequences are cut; what is done at a cut is decided by the device, head by head.

use crate::error::{Error, Result};
use crate::shape::{Heads, Shape};
use crate::tune::{Cut, Tile};

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
    /// Where its state is taken from and left, counted from the piece's first slot: the slot of its sequence for the last
    /// segment of one, else a slot after those of all sequences.
    pub slot: u32,
    /// The same for the gradient of its state, which is walked from the last segment to the first: the slot of its sequence
    /// for the first segment of one.
    pub back: u32,
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
    /// Byte offset of its sequence table in [`Plan::tables`]: first segment and segments of each of `slots`.
    pub sequence_table: u64,
}

impl Piece {
    /// Whether a sequence of it has several segments.
    pub fn is_cut(&self) -> bool {
        self.all_slots() > self.slots.len() as u64
    }

    /// Slots of its sequences and of its further segments.
    pub fn all_slots(&self) -> u64 {
        let further = self.segments.iter().map(|s| s.slot + 1).max().unwrap_or(0);
        (self.slots.len() as u64).max(further as u64)
    }
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
    /// Slots and segments of the piece that has most of them among those that are cut, else 0.
    pub cut_slots: u64,
    /// The chunk, segment and sequence tables of all pieces as the kernels read them, rows of four u32.
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
    /// Bytes that cut pieces need beside, used again by each: walks, states and transitions, see [`crate::kernel::gdn_cut`].
    pub fn cut_bytes(&self, heads: &Heads, align: u64) -> [u64; 3] {
        let (slots, hv, k) = (self.cut_slots, heads.hv as u64, heads.k as u64);
        let walks = 2 * (slots * hv * 16).next_multiple_of(align.max(16));
        [walks, slots * heads.state_len() * 4, slots * hv * k * k * 4]
    }

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
        // Slots of a cut piece hold states [K, V] and transitions [K, K].
        let transition_bytes = shape.heads.hv as u64 * (shape.heads.k as u64).pow(2) * 4;
        let cut_slots = limits.max_binding / limits.state_bytes.max(transition_bytes).max(1);
        let cut = tile.cut.filter(|_| cut_slots >= 2);

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
            let fits = |i: usize| {
                let (c, sequences) = (&chunks[i], (chunks[i].seq - s0) as u64);
                // Of n chunks of a sequence there are at most n / least segments beside the last.
                let index = (c.start - shape.cu_seqlens()[c.seq as usize]) / tile.chunk as u64;
                let walked = index.min((i - first) as u64) + 1;
                let room = cut.is_none_or(|cut| sequences + (i + 1 - first) as u64 / cut.least() < cut_slots);
                let short = walked <= tile.walk.max(1);
                c.start + c.len as u64 - t0 <= window_tokens && sequences < window_slots && room && short
            };
            let end = (first + 1..most).find(|&i| !fits(i)).unwrap_or(most);
            let span = cut.map_or(usize::MAX, |cut| span(&cut, &chunks[first..end], shape, tile));
            pieces.push(piece(&chunks, first..end, span, limits.align, &mut tables));
            first = end;
        }
        let most = pieces.iter().map(|p| p.chunks.len()).max().unwrap_or(0) as u64;
        let slots_of = |p: &Piece| p.all_slots().max(p.segments.len() as u64);
        let cut_slots = pieces.iter().filter(|p| p.is_cut()).map(slots_of).max().unwrap_or(0);
        Ok(Plan { chunks, pieces, most_chunks: most, scratch: most * chunk_scratch, cut_slots, tables })
    }
}

/// Chunks of a segment of these chunks at most.
fn span(cut: &Cut, chunks: &[Chunk], shape: &Shape, tile: &Tile) -> usize {
    let longest = chunks.chunk_by(|a, b| a.seq == b.seq).map(<[Chunk]>::len).max().unwrap_or(0) as u64;
    let cells = shape.heads.hv as u64 * (shape.heads.v / tile.dv_tile.max(1)) as u64;
    usize::try_from(cut.span(chunks.len() as u64, longest, cells)).unwrap_or(usize::MAX)
}

/// One piece, with segments of at most `span` chunks, and its rows in the tables.
fn piece(chunks: &[Chunk], range: std::ops::Range<usize>, span: usize, align: u64, tables: &mut Vec<u32>) -> Piece {
    let own = &chunks[range.clone()];
    let t0 = own[0].start;
    let last = own[own.len() - 1];
    let slots = own[0].seq..last.seq + 1;
    let mut segments: Vec<Segment> = Vec::new();
    let mut sequences = vec![[0; 4]; slots.len()];
    let (mut first_chunk, mut further) = (0, slots.len() as u32);
    for run in own.chunk_by(|a, b| a.seq == b.seq) {
        let seq = run[0].seq - slots.start;
        // Segments of a sequence are equally long, but for the last.
        let each = run.len().div_ceil(run.len().div_ceil(span));
        let count = run.len().div_ceil(each) as u32;
        sequences[seq as usize] = [segments.len() as u32, count, 0, 0];
        for (i, part) in (0..count).zip(run.chunks(each)) {
            let slot = if i + 1 == count { seq } else { further + i };
            let back = if i == 0 { seq } else { further + i - 1 };
            segments.push(Segment { first_chunk, chunks: part.len() as u32, slot, back });
            first_chunk += part.len() as u32;
        }
        further += count - 1;
    }
    let chunk_table = begin_table(tables, align);
    tables.extend(own.iter().flat_map(|c| [(c.start - t0) as u32, c.len, c.seq, 0]));
    let segment_table = begin_table(tables, align);
    tables.extend(segments.iter().flat_map(|s| [s.first_chunk, s.chunks, s.slot, s.back]));
    let sequence_table = begin_table(tables, align);
    tables.extend(sequences.iter().flatten());
    let tokens = t0..last.start + last.len as u64;
    Piece { chunks: range, segments, tokens, slots, chunk_table, segment_table, sequence_table }
}

/// Pads the tables so that the next one starts aligned; its byte offset.
fn begin_table(tables: &mut Vec<u32>, align: u64) -> u64 {
    let align_words = (align.max(16) / 4) as usize;
    tables.resize(tables.len().next_multiple_of(align_words), 0);
    tables.len() as u64 * 4
}
