//! The Gated DeltaNet operator: [`Prefill`] (chunked) and [`Step`] (token by token) record launches over device memory;
//! [`prefill`], [`decode`] and [`verify`] do the same from and to host slices.
//!
//! Per value head with state `S [K, V]`, key head by [`HeadMap`](crate::shape::HeadMap), `s` the scale (default `K^-1/2`):
//!
//! ```text
//! S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
//! ```
//!
//! The decay comes first, the error is taken against the decayed state, and the output is read after the write (Yang et al.,
//! "Gated Delta Networks", 2024). Prefill computes the same in chunks; see [`crate::kernel::gdn`] for its two kernels.
//!
//! # Inputs out of the ordinary
//! - `g` is a log decay: at most 0. Minus infinity is legal and forgets everything. Host slices are checked, and NaN or a
//!   positive value is an error; a kernel given device memory with such values computes something, and ends.
//! - NaN or infinity in q, k, v, beta or the initial state spreads to the outputs of the same sequence and head from that
//!   token's chunk on, and to nothing else.
//! - Keys need not have unit length; with `beta |k|^2 > 2` the recurrence itself grows without bound.
//! - A sequence of no tokens leaves its state as it is.

mod host;

pub use host::{Inputs, Outputs, decode, prefill, verify};

use crate::backend::{Backend, Buffer, View};
use crate::error::{Error, Result};
use crate::kernel::gdn::{
    PREPARE, PrepareConsts, PrepareParams, SCAN, STEP, ScanConsts, ScanParams, StepConsts, StepParams,
};
use crate::pass::{Pass, Rows};
use crate::plan::{Limits, Plan};
use crate::shape::{Dtype, Heads, Shape};
use crate::tune::{self, Caps, Tile};

/// Most tokens of one sequence in a [`Step`]: beyond it [`Prefill`] is faster everywhere.
pub const MAX_STEP_TOKENS: u32 = 16;

/// How the operator is asked to compute.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Options {
    /// s, the factor of q; `K^-1/2` if none.
    pub scale: Option<f32>,
    /// Divide q and k by `sqrt(sum of squares + 1e-6)` over K.
    pub qk_l2norm: bool,
    /// How q, k, v and o are stored on the device.
    pub store: Dtype,
}

impl Options {
    pub(crate) fn scale_for(&self, heads: &Heads) -> Result<f32> {
        match self.scale {
            None => Ok((heads.k as f32).powf(-0.5)),
            Some(s) if s.is_finite() => Ok(s),
            Some(s) => Err(Error::argument("scale", s, "a finite number")),
        }
    }
}

/// Device memory that one call reads and writes.
#[derive(Debug, Clone)]
pub struct Io {
    /// `[T, Hk K]`.
    pub q: Rows,
    /// `[T, Hk K]`.
    pub k: Rows,
    /// `[T, Hv V]`.
    pub v: Rows,
    /// `[T, Hv]` f32, log decay.
    pub g: View,
    /// `[T, Hv]` f32.
    pub beta: View,
    /// `[N, Hv, K, V]` f32: the state before the first token, replaced by the state after the last.
    pub state: View,
    /// `[T, Hv V]`.
    pub o: Rows,
}

impl Io {
    /// Checks that every view holds the shape.
    fn check(&self, shape: &Shape, store: Dtype) -> Result<()> {
        let (t, h) = (shape.tokens(), &shape.heads);
        let (qk, vo) = (h.hk as u64 * h.k as u64, h.hv as u64 * h.v as u64);
        for (what, rows, width) in [("q", &self.q, qk), ("k", &self.k, qk), ("v", &self.v, vo), ("o", &self.o, vo)] {
            if rows.stride < width || rows.stride > u32::MAX as u64 {
                return Err(Error::argument(format!("stride of {what}"), rows.stride, format!("{width} to 2^32 - 1")));
            }
            // Kernels read and write 16-bit numbers in pairs, as 32-bit words.
            if store.size() == 2 && (rows.off % 2 != 0 || rows.stride % 2 != 0) {
                let found = format!("number {} with stride {}", rows.off, rows.stride);
                return Err(Error::argument(format!("rows of {what}"), found, format!("even numbers for {store}")));
            }
            need(what, &rows.view, rows.reach(t, width) * store.size())?;
        }
        need("g", &self.g, t * h.hv as u64 * 4)?;
        need("beta", &self.beta, t * h.hv as u64 * 4)?;
        need("state", &self.state, shape.sequences() as u64 * h.state_len() * 4)
    }
}

/// An error unless the view holds `bytes` bytes.
fn need(what: &str, view: &View, bytes: u64) -> Result<()> {
    if view.bytes < bytes {
        return Err(Error::argument(what, format!("{} bytes", view.bytes), format!("at least {bytes} bytes")));
    }
    Ok(())
}

/// A part of some rows as a kernel sees it: an aligned view, and the number in it where the first row starts.
struct Window {
    view: View,
    off: u32,
}

/// The rows `range` of `rows`, each `width` numbers of `size` bytes.
fn window(caps: &Caps, what: &str, rows: &Rows, range: &std::ops::Range<u64>, width: u64, size: u64) -> Result<Window> {
    let begin = (rows.off + range.start * rows.stride) * size;
    let end = (rows.off + (range.end - 1) * rows.stride + width) * size;
    // 16-bit numbers are read as 32-bit words, so a window must not begin inside one.
    let aligned = begin - begin % caps.align.max(4);
    // Kernels read whole words; the last one may reach past an odd end.
    let end = end.next_multiple_of(4).min(rows.view.bytes);
    if end - aligned > caps.max_binding {
        return Err(Error::Unsupported {
            what: format!("{what}: {} bytes for tokens {range:?}", end - aligned),
            by: caps.name.clone(),
            why: format!("a binding holds {} bytes", caps.max_binding),
        });
    }
    let off = ((begin - aligned) / size) as u32;
    Ok(Window { view: rows.view.slice(aligned, end - aligned)?, off })
}

/// A chunked prefill of one shape: tables and scratch on the device, made once and used by any number of recordings (the
/// layers of a model) that run one after the other.
#[derive(Debug)]
pub struct Prefill {
    shape: Shape,
    options: Options,
    scale: f32,
    tile: Tile,
    plan: Plan,
    caps: Caps,
    tables: Buffer,
    scratch: Buffer,
    stride: u64,
}

impl Prefill {
    /// Plans for the shape and allocates tables and scratch. `stride` is the largest row stride that [`Io`] will have, in
    /// numbers of the stored type.
    ///
    /// # Errors
    /// What the plan refuses, and what [`Backend::alloc`] and [`Backend::write`] report.
    pub fn new(backend: &dyn Backend, shape: &Shape, options: &Options, stride: u64) -> Result<Self> {
        let caps = backend.caps().clone();
        let tile = tune::tile(&caps, &shape.heads);
        Self::with_tile(backend, shape, options, stride, tile)
    }

    /// The same with a tile of the caller's choice.
    ///
    /// # Errors
    /// As [`Prefill::new`].
    pub fn with_tile(backend: &dyn Backend, shape: &Shape, options: &Options, stride: u64, tile: Tile) -> Result<Self> {
        let caps = backend.caps().clone();
        let scale = options.scale_for(&shape.heads)?;
        let limits = Limits {
            max_binding: caps.max_binding,
            align: caps.align,
            token_bytes: (stride * options.store.size()).max(shape.heads.hv as u64 * 4),
            state_bytes: shape.heads.state_len() * 4,
        };
        let plan = Plan::new(shape, &tile, &limits)?;
        let tables = backend.alloc("tables of a prefill", (plan.tables.len() as u64 * 4).max(16))?;
        if !plan.tables.is_empty() {
            let bytes = bytemuck::cast_slice(&plan.tables);
            backend.write(&tables.slice(0, bytes.len() as u64)?, bytes)?;
        }
        let scratch = backend.alloc("scratch of a prefill", plan.scratch.max(16))?;
        Ok(Prefill { shape: shape.clone(), options: *options, scale, tile, plan, caps, tables, scratch, stride })
    }

    /// Bytes of device memory that tables and scratch take.
    pub fn device_bytes(&self) -> u64 {
        self.tables.bytes() + self.scratch.bytes()
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Appends the launches of one prefill over `io`.
    ///
    /// # Errors
    /// [`Error::Argument`] naming a view that is too small or a stride that the plan was not made for.
    pub fn record(&self, pass: &mut Pass, io: &Io) -> Result<()> {
        io.check(&self.shape, self.options.store)?;
        for (what, rows) in [("q", &io.q), ("k", &io.k), ("v", &io.v), ("o", &io.o)] {
            if rows.stride > self.stride {
                let expected = format!("at most the {} that the prefill was planned for", self.stride);
                return Err(Error::argument(format!("stride of {what}"), rows.stride, expected));
            }
        }
        let heads = self.shape.heads;
        let (size, store) = (self.options.store.size(), self.options.store.code());
        let (qk, vo) = (heads.hk as u64 * heads.k as u64, heads.hv as u64 * heads.v as u64);
        let gates = |view: &View| Rows::packed(view.clone(), heads.hv as u64);
        for piece in &self.plan.pieces {
            let caps = &self.caps;
            let q = window(caps, "q", &io.q, &piece.tokens, qk, size)?;
            let k = window(caps, "k", &io.k, &piece.tokens, qk, size)?;
            let v = window(caps, "v", &io.v, &piece.tokens, vo, size)?;
            let o = window(caps, "o", &io.o, &piece.tokens, vo, size)?;
            let g = window(caps, "g", &gates(&io.g), &piece.tokens, heads.hv as u64, 4)?;
            let beta = window(caps, "beta", &gates(&io.beta), &piece.tokens, heads.hv as u64, 4)?;
            let (n_chunks, n_segments) = (piece.chunks.len() as u64, piece.segments.len() as u64);
            let chunks = self.tables.slice(piece.chunk_table, n_chunks * 16)?;
            let segments = self.tables.slice(piece.segment_table, n_segments * 16)?;
            let per_chunk = crate::plan::scratch_per_chunk_head(self.tile.chunk) * heads.hv as u64;
            let ws = self.scratch.slice(0, n_chunks * per_chunk)?;
            let slot = heads.state_len() * 4;
            let state = io.state.slice(piece.slots.start as u64 * slot, piece.slots.len() as u64 * slot)?;

            let (c, dk, dv) = (self.tile.chunk as u64, heads.k as u64, heads.v as u64);
            let chunk_flops = heads.hk as u64 * 4 * c * c * dk + heads.hv as u64 * 2 * c * c * c / 3;
            pass.launch(
                &PREPARE,
                PrepareConsts {
                    chunk: self.tile.chunk,
                    dk: heads.k,
                    group: heads.group(),
                    qk_type: store,
                    l2norm: self.options.qk_l2norm as u32,
                    lanes: self.tile.prepare_lanes,
                },
                PrepareParams {
                    hk: heads.hk,
                    hv: heads.hv,
                    head_map: heads.map as u32,
                    q_stride: io.q.stride as u32,
                    q_off: q.off,
                    k_stride: io.k.stride as u32,
                    k_off: k.off,
                    g_off: g.off,
                    scale: self.scale,
                },
                &[&q.view, &k.view, &g.view, &beta.view, &chunks, &ws],
                [n_chunks as u32, heads.hk, 1],
                n_chunks * chunk_flops,
            );
            pass.launch(
                &SCAN,
                ScanConsts {
                    chunk: self.tile.chunk,
                    dk: heads.k,
                    dv_tile: self.tile.dv_tile,
                    qk_type: store,
                    v_type: store,
                    lanes: self.tile.scan_lanes,
                },
                ScanParams {
                    hk: heads.hk,
                    hv: heads.hv,
                    head_map: heads.map as u32,
                    dv: heads.v,
                    q_stride: io.q.stride as u32,
                    q_off: q.off,
                    k_stride: io.k.stride as u32,
                    k_off: k.off,
                    v_stride: io.v.stride as u32,
                    v_off: v.off,
                    o_stride: io.o.stride as u32,
                    o_off: o.off,
                },
                &[&q.view, &k.view, &v.view, &ws, &chunks, &segments, &state, &o.view],
                [n_segments as u32, heads.hv, heads.v / self.tile.dv_tile],
                n_chunks * heads.hv as u64 * (6 * c * dk * dv + 4 * c * c * dv),
            );
        }
        Ok(())
    }
}

/// What a [`Step`] does with the state after the last token of each sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commit {
    /// It replaces the state in place.
    Store,
    /// It is dropped: only o is written, and the state stays what it was.
    Discard,
}

/// A few tokens of each sequence, one after the other: decode (one token each) and verify (up to [`MAX_STEP_TOKENS`]).
///
/// To verify drafted tokens, record with [`Commit::Discard`] over all of them; once it is known how many of each sequence
/// are accepted, record a `Step` of those counts over the same inputs with [`Commit::Store`]. The same kernel in the same
/// order gives bit for bit the state that decoding only the accepted tokens would have left.
#[derive(Debug)]
pub struct Step {
    shape: Shape,
    options: Options,
    scale: f32,
    tile: Tile,
    caps: Caps,
    tables: Buffer,
    groups: Vec<StepGroup>,
}

/// Sequences that one launch takes: their windows fit the device's bindings.
#[derive(Debug)]
struct StepGroup {
    sequences: std::ops::Range<usize>,
    tokens: std::ops::Range<u64>,
    table: u64,
    /// Rows of the table: sequences with tokens to step.
    rows: u32,
    /// Tokens that are stepped, over all its sequences.
    steps: u64,
}

impl Step {
    /// A step over the first `counts[n]` tokens of each sequence of the shape. `stride` is the largest row stride that [`Io`]
    /// will have, in numbers of the stored type.
    ///
    /// # Errors
    /// [`Error::Argument`] for a count above the sequence's tokens or above [`MAX_STEP_TOKENS`].
    pub fn new(backend: &dyn Backend, shape: &Shape, counts: &[u32], options: &Options, stride: u64) -> Result<Self> {
        let caps = backend.caps().clone();
        let tile = tune::tile(&caps, &shape.heads);
        let scale = options.scale_for(&shape.heads)?;
        let cu = shape.cu_seqlens();
        if counts.len() != shape.sequences() {
            return Err(Error::argument("counts", format!("{} entries", counts.len()), shape.sequences()));
        }
        for (n, &count) in counts.iter().enumerate() {
            let most = (cu[n + 1] - cu[n]).min(MAX_STEP_TOKENS as u64);
            if count as u64 > most {
                return Err(Error::argument(format!("counts[{n}]"), count, format!("at most {most}")));
            }
        }
        let token_bytes = (stride * options.store.size()).max(shape.heads.hv as u64 * 4);
        let window_tokens = caps.max_binding.saturating_sub(caps.align) / token_bytes.max(1);
        let window_slots = (caps.max_binding / (shape.heads.state_len() * 4)) as usize;
        let mut groups: Vec<StepGroup> = Vec::new();
        let mut table: Vec<u32> = Vec::new();
        for n in (0..counts.len()).filter(|&n| counts[n] > 0) {
            let end = cu[n] + counts[n] as u64;
            match groups.last_mut() {
                Some(g) if end - g.tokens.start <= window_tokens && n - g.sequences.start < window_slots => {
                    g.sequences.end = n + 1;
                    g.tokens.end = end;
                    g.rows += 1;
                    g.steps += counts[n] as u64;
                }
                _ => {
                    table.resize(table.len().next_multiple_of((caps.align.max(16) / 4) as usize), 0);
                    let table = table.len() as u64 * 4;
                    let steps = counts[n] as u64;
                    groups.push(StepGroup { sequences: n..n + 1, tokens: cu[n]..end, table, rows: 1, steps });
                }
            }
            let Some(group) = groups.last() else { continue };
            let (t0, s0) = (group.tokens.start, group.sequences.start);
            table.extend([(cu[n] - t0) as u32, counts[n], (n - s0) as u32, 0]);
        }
        let tables = backend.alloc("table of a step", (table.len() as u64 * 4).max(16))?;
        if !table.is_empty() {
            backend.write(&tables.slice(0, table.len() as u64 * 4)?, bytemuck::cast_slice(&table))?;
        }
        Ok(Step { shape: shape.clone(), options: *options, scale, tile, caps, tables, groups })
    }

    /// Appends the launches of one step over `io`.
    ///
    /// # Errors
    /// [`Error::Argument`] naming a view that is too small, [`Error::Unsupported`] if one sequence exceeds a binding.
    pub fn record(&self, pass: &mut Pass, io: &Io, commit: Commit) -> Result<()> {
        io.check(&self.shape, self.options.store)?;
        let heads = self.shape.heads;
        let (size, store) = (self.options.store.size(), self.options.store.code());
        let (qk, vo) = (heads.hk as u64 * heads.k as u64, heads.hv as u64 * heads.v as u64);
        let gates = |view: &View| Rows::packed(view.clone(), heads.hv as u64);
        for group in &self.groups {
            let caps = &self.caps;
            let q = window(caps, "q", &io.q, &group.tokens, qk, size)?;
            let k = window(caps, "k", &io.k, &group.tokens, qk, size)?;
            let v = window(caps, "v", &io.v, &group.tokens, vo, size)?;
            let o = window(caps, "o", &io.o, &group.tokens, vo, size)?;
            let g = window(caps, "g", &gates(&io.g), &group.tokens, heads.hv as u64, 4)?;
            let beta = window(caps, "beta", &gates(&io.beta), &group.tokens, heads.hv as u64, 4)?;
            let rows = group.rows as u64;
            let seqs = self.tables.slice(group.table, rows * 16)?;
            let slot = heads.state_len() * 4;
            let state = io.state.slice(group.sequences.start as u64 * slot, group.sequences.len() as u64 * slot)?;
            pass.launch(
                &STEP,
                StepConsts {
                    dk: heads.k,
                    dv_tile: self.tile.dv_step,
                    qk_type: store,
                    v_type: store,
                    l2norm: self.options.qk_l2norm as u32,
                    store: (commit == Commit::Store) as u32,
                    lanes: self.tile.step_lanes,
                },
                StepParams {
                    hk: heads.hk,
                    hv: heads.hv,
                    head_map: heads.map as u32,
                    dv: heads.v,
                    q_stride: io.q.stride as u32,
                    q_off: q.off,
                    k_stride: io.k.stride as u32,
                    k_off: k.off,
                    v_stride: io.v.stride as u32,
                    v_off: v.off,
                    o_stride: io.o.stride as u32,
                    o_off: o.off,
                    g_off: g.off,
                    scale: self.scale,
                },
                &[&q.view, &k.view, &v.view, &g.view, &beta.view, &seqs, &state, &o.view],
                [group.rows, heads.hv, heads.v / self.tile.dv_step],
                group.steps * 7 * heads.state_len() + rows * 8 * heads.state_len(),
            );
        }
        Ok(())
    }
}
