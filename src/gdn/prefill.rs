//! Chunked prefill, and the launches that it shares with the backward pass.

use super::{Io, Options, Window, window};
use crate::backend::{Backend, Buffer, View};
use crate::error::{Error, Result};
use crate::kernel::gdn::{PREPARE, PrepareConsts, PrepareParams, SCAN, ScanConsts, ScanParams};
use crate::pass::{Pass, Rows};
use crate::plan::{Limits, Piece, Plan, scratch_per_chunk_head};
use crate::shape::{Heads, Shape};
use crate::tune::{self, Caps, Tile};

/// A chunked prefill of one shape: tables and scratch on the device, made once and used by any number of recordings (the
/// layers of a model) that run one after the other.
#[derive(Debug)]
pub struct Prefill {
    shape: Shape,
    options: Options,
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
        options.scale_for(&shape.heads)?;
        let limits = Limits {
            max_binding: caps.max_binding,
            align: caps.align,
            token_bytes: (stride * options.store.size()).max(shape.heads.hv as u64 * 4),
            state_bytes: shape.heads.state_len() * 4,
            chunk_bytes: scratch_per_chunk_head(tile.chunk),
        };
        let plan = Plan::new(shape, &tile, &limits)?;
        let tables = upload(backend, &plan)?;
        let scratch = backend.alloc("scratch of a prefill", plan.scratch.max(16))?;
        Ok(Prefill { shape: shape.clone(), options: *options, tile, plan, caps, tables, scratch, stride })
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
        let size = self.options.store.size();
        let (qk, vo) = (heads.hk as u64 * heads.k as u64, heads.hv as u64 * heads.v as u64);
        let gates = |view: &View| Rows::packed(view.clone(), heads.hv as u64);
        let rows = ChunkRows::new(&self.shape, &self.options, &self.tile)?;
        for piece in &self.plan.pieces {
            let caps = &self.caps;
            let q = window(caps, "q", &io.q, &piece.tokens, qk, size)?;
            let k = window(caps, "k", &io.k, &piece.tokens, qk, size)?;
            let v = window(caps, "v", &io.v, &piece.tokens, vo, size)?;
            let o = window(caps, "o", &io.o, &piece.tokens, vo, size)?;
            let g = window(caps, "g", &gates(&io.g), &piece.tokens, heads.hv as u64, 4)?;
            let beta = window(caps, "beta", &gates(&io.beta), &piece.tokens, heads.hv as u64, 4)?;
            let tables = Tables::new(&self.tables, piece)?;
            let per_chunk = scratch_per_chunk_head(self.tile.chunk) * heads.hv as u64;
            let ws = self.scratch.slice(0, tables.n_chunks as u64 * per_chunk)?;
            let state = slots(&io.state, &piece.slots, &heads)?;
            rows.prepare(pass, &tables, false, [&q, &k, &g, &beta], &ws);
            rows.scan(pass, &tables, Save::Output, [&q, &k, &v], &ws, &state, &o);
        }
        Ok(())
    }
}

/// The tables of a piece, as its kernels see them.
pub(super) struct Tables {
    pub chunks: View,
    pub segments: View,
    pub n_chunks: u32,
    pub n_segments: u32,
}

impl Tables {
    /// Those of `piece` in the plan's tables.
    pub fn new(tables: &Buffer, piece: &Piece) -> Result<Self> {
        let (n_chunks, n_segments) = (piece.chunks.len() as u32, piece.segments.len() as u32);
        Ok(Tables {
            chunks: tables.slice(piece.chunk_table, n_chunks as u64 * 16)?,
            segments: tables.slice(piece.segment_table, n_segments as u64 * 16)?,
            n_chunks,
            n_segments,
        })
    }
}

/// Uploads the tables of a plan.
pub(super) fn upload(backend: &dyn Backend, plan: &Plan) -> Result<Buffer> {
    let tables = backend.alloc("tables of a prefill", (plan.tables.len() as u64 * 4).max(16))?;
    if !plan.tables.is_empty() {
        let bytes = bytemuck::cast_slice(&plan.tables);
        backend.write(&tables.slice(0, bytes.len() as u64)?, bytes)?;
    }
    Ok(tables)
}

/// The states of the slots that a piece uses.
pub(super) fn slots(state: &View, range: &std::ops::Range<u32>, heads: &Heads) -> Result<View> {
    let slot = heads.state_len() * 4;
    state.slice(range.start as u64 * slot, range.len() as u64 * slot)
}

/// What a scan leaves behind besides the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Save {
    /// o.
    Output = 0,
    /// What the backward pass needs.
    Saved = 1,
    /// Nothing.
    Nothing = 2,
}

/// Launches of the two rows that walk chunks forward.
pub(super) struct ChunkRows<'a> {
    heads: Heads,
    options: &'a Options,
    scale: f32,
    tile: &'a Tile,
}

impl<'a> ChunkRows<'a> {
    /// For this shape, under these options, with this tile.
    pub fn new(shape: &Shape, options: &'a Options, tile: &'a Tile) -> Result<Self> {
        Ok(ChunkRows { heads: shape.heads, options, scale: options.scale_for(&shape.heads)?, tile })
    }

    /// [`PREPARE`] over the chunks of a piece.
    pub fn prepare(&self, pass: &mut Pass, tables: &Tables, grad: bool, qkgb: [&Window; 4], ws: &View) {
        let ([q, k, g, beta], heads) = (qkgb, &self.heads);
        let (c, dk) = (self.tile.chunk as u64, heads.k as u64);
        let chunk_flops = heads.hk as u64 * 4 * c * c * dk + heads.hv as u64 * 2 * c * c * c / 3;
        pass.launch(
            &PREPARE,
            PrepareConsts {
                chunk: self.tile.chunk,
                dk: heads.k,
                group: heads.group(),
                qk_type: self.options.store.code(),
                l2norm: self.options.qk_l2norm as u32,
                grad: grad as u32,
                lanes: self.tile.prepare_lanes,
            },
            PrepareParams {
                hk: heads.hk,
                hv: heads.hv,
                head_map: heads.map as u32,
                q_stride: q.stride,
                q_off: q.off,
                k_stride: k.stride,
                k_off: k.off,
                g_off: g.off,
                scale: self.scale,
            },
            &[&q.view, &k.view, &g.view, &beta.view, &tables.chunks, ws],
            [tables.n_chunks, heads.hk, 1],
            tables.n_chunks as u64 * chunk_flops,
        );
    }

    /// [`SCAN`] over the segments of a piece; `o` is what `save` says.
    #[allow(clippy::too_many_arguments)]
    pub fn scan(
        &self,
        pass: &mut Pass,
        tables: &Tables,
        save: Save,
        qkv: [&Window; 3],
        ws: &View,
        state: &View,
        o: &Window,
    ) {
        let ([q, k, v], heads, store) = (qkv, &self.heads, self.options.store.code());
        let (c, dk, dv) = (self.tile.chunk as u64, heads.k as u64, heads.v as u64);
        let products =
            if save == Save::Output { 6 * c * dk * dv + 4 * c * c * dv } else { 4 * c * dk * dv + 2 * c * c * dv };
        pass.launch(
            &SCAN,
            ScanConsts {
                chunk: self.tile.chunk,
                dk: heads.k,
                dv_tile: self.tile.dv_tile,
                qk_type: store,
                v_type: store,
                save: save as u32,
                lanes: self.tile.scan_lanes,
            },
            ScanParams {
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
            },
            &[&q.view, &k.view, &v.view, ws, &tables.chunks, &tables.segments, state, &o.view],
            [tables.n_segments, heads.hv, heads.v / self.tile.dv_tile],
            tables.n_chunks as u64 * heads.hv as u64 * products,
        );
    }
}
