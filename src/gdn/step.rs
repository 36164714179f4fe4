//! The recurrence token by token: decode and verify.

use super::{Io, Options, window};
use crate::backend::{Backend, Buffer, View};
use crate::error::{Error, Result};
use crate::kernel::gdn::{STEP, StepConsts, StepParams};
use crate::pass::{Pass, Rows};
use crate::shape::Shape;
use crate::tune::{self, Caps, Tile};

/// Most tokens of one sequence in a [`Step`]: beyond it a prefill is faster everywhere.
pub const MAX_STEP_TOKENS: u32 = 16;

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
                    q_stride: q.stride,
                    q_off: q.off,
                    k_stride: k.stride,
                    k_off: k.off,
                    v_stride: v.stride,
                    v_off: v.off,
                    o_stride: o.stride,
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
