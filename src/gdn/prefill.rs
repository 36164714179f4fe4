//! Chunked prefill, and the launches that it shares with the backward pass.

use super::cut::{CutBuffers, Scan};
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
    cut: Option<CutBuffers>,
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
        let tile = tune::prefill_tile(&caps, &shape.heads, options.store);
        Self::with_tile(backend, shape, options, stride, tile)
    }

    /// The same with a tile of the caller's choice.
    ///
    /// # Errors
    /// As [`Prefill::new`].
    pub fn with_tile(backend: &dyn Backend, shape: &Shape, options: &Options, stride: u64, tile: Tile) -> Result<Self> {
        let (caps, tile) = (backend.caps().clone(), options.tile(tile));
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
        let cut = CutBuffers::new(backend, &plan, shape, options, &tile)?;
        Ok(Prefill { shape: shape.clone(), options: *options, tile, plan, caps, tables, scratch, cut, stride })
    }

    /// Bytes of device memory that tables and scratch take.
    pub fn device_bytes(&self) -> u64 {
        self.tables.bytes() + self.scratch.bytes() + self.cut.as_ref().map_or(0, CutBuffers::device_bytes)
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
        let rows = ChunkRows::new(&self.shape, &self.options, &self.tile, &self.caps)?;
        pass.exact |= self.options.exact;
        pass.longest = pass.longest.max(self.shape.longest());
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
            let scan = Scan { tables: &tables, save: Save::Output, grad: false, qkv: [&q, &k, &v], ws: &ws, o: &o };
            match self.cut.as_ref().filter(|_| piece.is_cut()) {
                Some(cut) => cut.forward(pass, &rows, &scan, piece, &state)?,
                None => rows.scan(pass, &scan, &Walks::All(&tables.segments), &state),
            }
        }
        Ok(())
    }
}

/// The tables of a piece, as its kernels see them.
pub(super) struct Tables {
    pub chunks: View,
    pub segments: View,
    pub sequences: View,
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
            sequences: tables.slice(piece.sequence_table, piece.slots.len() as u64 * 16)?,
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

/// Which walks a scan takes, see [`crate::kernel::gdn_cut`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Walks<'a> {
    /// All heads the same: these segments.
    All(&'a View),
    /// Each head its own of these.
    Own(&'a View),
    /// Each head its own of these, from zero.
    FromZero(&'a View),
    /// Each head its own of these that have a transition, which becomes the state.
    Transition(&'a View),
}

impl Walks<'_> {
    /// The const of the row and the table.
    pub fn parts(&self) -> (u32, &View) {
        match self {
            Walks::All(view) => (0, view),
            Walks::Own(view) => (1, view),
            Walks::FromZero(view) => (2, view),
            Walks::Transition(view) => (3, view),
        }
    }
}

/// Launches of the two rows that walk chunks forward.
pub(super) struct ChunkRows<'a> {
    pub heads: Heads,
    options: &'a Options,
    scale: f32,
    pub tile: &'a Tile,
    caps: &'a Caps,
}

impl<'a> ChunkRows<'a> {
    /// For this shape, under these options, with this tile.
    pub fn new(shape: &Shape, options: &'a Options, tile: &'a Tile, caps: &'a Caps) -> Result<Self> {
        Ok(ChunkRows { heads: shape.heads, options, scale: options.scale_for(&shape.heads)?, tile, caps })
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

    /// [`SCAN`] over the segments of a piece, or over what each head walks of them.
    pub fn scan(&self, pass: &mut Pass, scan: &Scan, walks: &Walks, state: &View) {
        let ([q, k, v], tables, save) = (scan.qkv, scan.tables, scan.save);
        let (heads, store) = (&self.heads, self.options.store.code());
        let (walk, segments) = walks.parts();
        // The state of a transition has K columns.
        let (dv, dv_tile, lanes) = match walks {
            Walks::Transition(_) => {
                let square = tune::tile(self.caps, &Heads { v: heads.k, ..*heads });
                (heads.k, square.dv_tile, square.scan_lanes)
            }
            _ => (heads.v, self.tile.dv_tile, self.tile.scan_lanes),
        };
        let (c, k_len, v_len) = (self.tile.chunk as u64, heads.k as u64, dv as u64);
        let products = match save {
            Save::Output => 6 * c * k_len * v_len + 4 * c * c * v_len,
            _ => 4 * c * k_len * v_len + 2 * c * c * v_len,
        };
        pass.launch(
            &SCAN,
            ScanConsts {
                chunk: self.tile.chunk,
                dk: heads.k,
                dv_tile,
                qk_type: store,
                v_type: store,
                save: save as u32,
                walk,
                grad: scan.grad as u32,
                lanes,
            },
            ScanParams {
                hk: heads.hk,
                hv: heads.hv,
                head_map: heads.map as u32,
                dv,
                q_stride: q.stride,
                q_off: q.off,
                k_stride: k.stride,
                k_off: k.off,
                v_stride: v.stride,
                v_off: v.off,
                o_stride: scan.o.stride,
                o_off: scan.o.off,
            },
            &[&q.view, &k.view, &v.view, scan.ws, &tables.chunks, segments, state, &scan.o.view],
            [tables.n_segments, heads.hv, dv / dv_tile],
            tables.n_chunks as u64 * heads.hv as u64 * products,
        );
    }
}
