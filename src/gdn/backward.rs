//! The gradients of a prefill.

use super::cut::{CutBuffers, Scan};
use super::prefill::{ChunkRows, Save, Tables, Walks, slots, upload};
use super::{Options, Window, check_rows, need, window};
use crate::backend::{Backend, Buffer, View};
use crate::error::{Error, Result};
use crate::kernel::gdn_grad::{
    GRAD_CHUNK, GRAD_GATES, GRAD_QK, GRAD_SCAN, GradChunkConsts, GradChunkParams, GradGatesConsts, GradGatesParams,
    GradQkConsts, GradQkParams, GradScanConsts, GradScanParams,
};
use crate::ops;
use crate::pass::{Pass, Rows};
use crate::plan::{Limits, Piece, Plan, grad_scratch_per_chunk_head, saved_per_chunk_head};
use crate::shape::Shape;
use crate::tune::{self, Caps, Tile};

/// Device memory that one backward pass reads and writes. Gradients are stored as their tensors are.
#[derive(Debug, Clone)]
pub struct GradIo {
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
    /// `[N, Hv, K, V]` f32, the state before the first token; zero if none.
    pub h0: Option<View>,
    /// `[T, Hv V]`, the gradient of o.
    pub d_o: Rows,
    /// `[T, Hk K]`, written.
    pub dq: Rows,
    /// `[T, Hk K]`, written.
    pub dk: Rows,
    /// `[T, Hv V]`, written.
    pub dv: Rows,
    /// `[T, Hv]` f32, written.
    pub dg: View,
    /// `[T, Hv]` f32, written.
    pub dbeta: View,
    /// `[N, Hv, K, V]` f32: the gradient of the state after the last token, replaced by that of the state before the first.
    pub dstate: View,
}

/// The backward pass of one shape: tables and scratch on the device, made once and used by any number of recordings that run
/// one after the other.
///
/// Nothing of the forward pass is needed but its inputs. The pieces of the plan form blocks whose states fit a budget. All
/// blocks but the last are walked forward once, to leave the state before each; then, last to first, each block is walked
/// forward with its states saved, and backward piece by piece. So memory is one block's worth of states, one piece's worth of
/// gradients, and one state per block.
#[derive(Debug)]
pub struct Backward {
    shape: Shape,
    options: Options,
    tile: Tile,
    plan: Plan,
    /// Runs of pieces.
    blocks: Vec<std::ops::Range<usize>>,
    caps: Caps,
    tables: Buffer,
    /// `[chunks of a block, Hv, 5 C C + 9 C]`
    ws: Buffer,
    /// `[chunks of a block, Hv, K V + 2 C V]`
    saved: Buffer,
    /// `[chunks of a piece, Hv, K V + 2 C V]`
    dsaved: Buffer,
    /// `[N, Hv, K, V]`
    state: Buffer,
    /// `[blocks, Hv, K, V]`
    checkpoints: Buffer,
    cut: Option<CutBuffers>,
    stride: u64,
}

impl Backward {
    /// Plans for the shape and allocates tables and scratch. `stride` is the largest row stride that [`GradIo`] will have, in
    /// numbers of the stored type.
    ///
    /// # Errors
    /// What the plan refuses, and what [`Backend::alloc`] and [`Backend::write`] report.
    pub fn new(backend: &dyn Backend, shape: &Shape, options: &Options, stride: u64) -> Result<Self> {
        let tile = tune::grad_tile(backend.caps(), &shape.heads, shape.tokens());
        Self::with_tile(backend, shape, options, stride, tile)
    }

    /// The same with a tile of the caller's choice.
    ///
    /// # Errors
    /// As [`Backward::new`].
    pub fn with_tile(backend: &dyn Backend, shape: &Shape, options: &Options, stride: u64, tile: Tile) -> Result<Self> {
        let (caps, heads) = (backend.caps().clone(), &shape.heads);
        options.scale_for(heads)?;
        let tile = options.tile(tile);
        let tile = Tile { scratch: tile.grad_scratch, ..tile };
        let limits = Limits {
            max_binding: caps.max_binding,
            align: caps.align,
            token_bytes: (stride * options.store.size()).max(heads.hv as u64 * 4),
            state_bytes: heads.state_len() * 4,
            chunk_bytes: saved_per_chunk_head(tile.chunk, heads.k, heads.v)
                .max(grad_scratch_per_chunk_head(tile.chunk)),
        };
        let plan = Plan::new(shape, &tile, &limits)?;
        let ws_bytes = grad_scratch_per_chunk_head(tile.chunk) * heads.hv as u64;
        let saved_bytes = saved_per_chunk_head(tile.chunk, heads.k, heads.v) * heads.hv as u64;
        let blocks = blocks(&plan, (tile.grad_states.min(caps.max_buffer) / saved_bytes).max(1) as usize);
        let chunks = |block: &std::ops::Range<usize>| plan.pieces[block.clone()].iter().map(|p| p.chunks.len()).sum();
        let most: usize = blocks.iter().map(chunks).max().unwrap_or(0);
        // Every piece's part starts aligned.
        let padding = blocks.iter().map(|b| b.len()).max().unwrap_or(0) as u64 * caps.align;
        let checkpoints = if blocks.len() > 1 { blocks.len() as u64 * limits.state_bytes } else { 0 };
        let alloc = |what: &str, bytes: u64| backend.alloc(what, bytes.max(16));
        Ok(Backward {
            cut: CutBuffers::new(backend, &plan, shape, options, &tile)?,
            tables: upload(backend, &plan)?,
            ws: alloc("scratch of a backward pass", most as u64 * ws_bytes + padding)?,
            saved: alloc("states of a backward pass", most as u64 * saved_bytes + padding)?,
            dsaved: alloc("gradients of states of a backward pass", plan.most_chunks * saved_bytes)?,
            state: alloc("state of a backward pass", shape.sequences() as u64 * limits.state_bytes)?,
            checkpoints: alloc("states before the blocks of a backward pass", checkpoints)?,
            shape: shape.clone(),
            options: *options,
            tile,
            plan,
            blocks,
            caps,
            stride,
        })
    }

    /// Bytes of device memory that tables and scratch take.
    pub fn device_bytes(&self) -> u64 {
        [&self.tables, &self.ws, &self.saved, &self.dsaved, &self.state, &self.checkpoints]
            .iter()
            .map(|b| b.bytes())
            .sum::<u64>()
            + self.cut.as_ref().map_or(0, CutBuffers::device_bytes)
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Appends the launches of one backward pass over `io`. Without tokens there are none, and dstate stays as it is.
    ///
    /// # Errors
    /// [`Error::Argument`] naming a view that is too small or a stride that the plan was not made for.
    pub fn record(&self, pass: &mut Pass, io: &GradIo) -> Result<()> {
        self.check(io)?;
        let Some((last, before)) = self.blocks.split_last() else { return Ok(()) };
        pass.exact |= self.options.exact;
        pass.longest = pass.longest.max(self.shape.longest());
        for (i, block) in before.iter().enumerate() {
            self.checkpoint(pass, i)?;
            for piece in &self.plan.pieces[block.clone()] {
                self.begin(pass, io, piece)?;
                self.piece(io, block, piece)?.forward(pass, Save::Nothing)?;
            }
        }
        // The walk has left the state before the last block where it belongs.
        self.walk(pass, io, last)?;
        for (i, block) in before.iter().enumerate().rev() {
            self.restore(pass, i)?;
            self.walk(pass, io, block)?;
        }
        Ok(())
    }

    /// A block forward, keeping its states, and back.
    fn walk(&self, pass: &mut Pass, io: &GradIo, block: &std::ops::Range<usize>) -> Result<()> {
        let pieces = &self.plan.pieces[block.clone()];
        for piece in pieces {
            self.begin(pass, io, piece)?;
            self.piece(io, block, piece)?.forward(pass, Save::Saved)?;
        }
        pieces.iter().rev().try_for_each(|piece| self.piece(io, block, piece)?.backward(pass))
    }

    fn check(&self, io: &GradIo) -> Result<()> {
        let (t, h, store) = (self.shape.tokens(), &self.shape.heads, self.options.store);
        let (qk, vo) = (h.hk as u64 * h.k as u64, h.hv as u64 * h.v as u64);
        let rows = [("q", &io.q, qk), ("k", &io.k, qk), ("v", &io.v, vo), ("d_o", &io.d_o, vo)];
        for (what, rows, width) in rows.into_iter().chain([("dq", &io.dq, qk), ("dk", &io.dk, qk), ("dv", &io.dv, vo)])
        {
            check_rows(what, rows, t, width, store)?;
            if rows.stride > self.stride {
                let expected = format!("at most the {} that the backward pass was planned for", self.stride);
                return Err(Error::argument(format!("stride of {what}"), rows.stride, expected));
            }
        }
        for (what, view) in [("g", &io.g), ("beta", &io.beta), ("dg", &io.dg), ("dbeta", &io.dbeta)] {
            need(what, view, t * h.hv as u64 * 4)?;
        }
        let states = self.shape.sequences() as u64 * h.state_len() * 4;
        io.h0.as_ref().map_or(Ok(()), |h0| need("h0", h0, states))?;
        need("dstate", &io.dstate, states)
    }

    /// Whether a piece begins inside a sequence.
    fn continues(&self, piece: &Piece) -> bool {
        let first = &self.plan.chunks[piece.chunks.start];
        first.start > self.shape.cu_seqlens()[first.seq as usize]
    }

    /// Keeps the state before block `i`, if it begins inside a sequence.
    fn checkpoint(&self, pass: &mut Pass, i: usize) -> Result<()> {
        let piece = &self.plan.pieces[self.blocks[i].start];
        let (slot, at) = (piece.slots.start..piece.slots.start + 1, i as u32..i as u32 + 1);
        if !self.continues(piece) {
            return Ok(());
        }
        self.copy(pass, &self.state.view(), &slot, &self.checkpoints.view(), &at)
    }

    /// Brings the state before block `i` back.
    fn restore(&self, pass: &mut Pass, i: usize) -> Result<()> {
        let piece = &self.plan.pieces[self.blocks[i].start];
        let (slot, at) = (piece.slots.start..piece.slots.start + 1, i as u32..i as u32 + 1);
        if !self.continues(piece) {
            return Ok(());
        }
        self.copy(pass, &self.checkpoints.view(), &at, &self.state.view(), &slot)
    }

    /// Puts the initial states of the sequences that begin in the piece into their slots.
    fn begin(&self, pass: &mut Pass, io: &GradIo, piece: &Piece) -> Result<()> {
        let fresh = piece.slots.start + self.continues(piece) as u32..piece.slots.end;
        match &io.h0 {
            _ if fresh.is_empty() => Ok(()),
            Some(h0) => self.copy(pass, h0, &fresh, &self.state.view(), &fresh),
            None => {
                let to = slots(&self.state.view(), &fresh, &self.shape.heads)?;
                ops::fill(&self.caps, pass, &to, 0, to.bytes / 4, 0)
            }
        }
    }

    /// Copies the states of some slots.
    fn copy(
        &self,
        pass: &mut Pass,
        from: &View,
        range: &std::ops::Range<u32>,
        to: &View,
        to_range: &std::ops::Range<u32>,
    ) -> Result<()> {
        let (from, to) = (slots(from, range, &self.shape.heads)?, slots(to, to_range, &self.shape.heads)?);
        ops::copy(&self.caps, pass, &from, 0, &to, 0, to.bytes / 4)
    }

    fn piece<'a>(&'a self, io: &GradIo, block: &std::ops::Range<usize>, piece: &'a Piece) -> Result<GradPiece<'a>> {
        let (h, size) = (&self.shape.heads, self.options.store.size());
        let (qk, vo) = (h.hk as u64 * h.k as u64, h.hv as u64 * h.v as u64);
        let rows = |what: &str, rows: &Rows, width: u64| window(&self.caps, what, rows, &piece.tokens, width, size);
        let gates = |what: &str, view: &View| {
            let rows = Rows::packed(view.clone(), h.hv as u64);
            window(&self.caps, what, &rows, &piece.tokens, h.hv as u64, 4)
        };
        let (ws, saved) =
            (grad_scratch_per_chunk_head(self.tile.chunk), saved_per_chunk_head(self.tile.chunk, h.k, h.v));
        let regions = |piece: &Piece| [ws, saved].map(|bytes| piece.chunks.len() as u64 * h.hv as u64 * bytes);
        let mut at = [0, 0];
        for earlier in self.plan.pieces[block.clone()].iter().take_while(|p| p.chunks.start < piece.chunks.start) {
            for (at, bytes) in at.iter_mut().zip(regions(earlier)) {
                *at += bytes.next_multiple_of(self.caps.align.max(4));
            }
        }
        let own = regions(piece);
        Ok(GradPiece {
            all: self,
            piece,
            cut: self.cut.as_ref().filter(|_| piece.is_cut()),
            tables: Tables::new(&self.tables, piece)?,
            q: rows("q", &io.q, qk)?,
            k: rows("k", &io.k, qk)?,
            v: rows("v", &io.v, vo)?,
            g: gates("g", &io.g)?,
            beta: gates("beta", &io.beta)?,
            d_o: rows("d_o", &io.d_o, vo)?,
            dq: rows("dq", &io.dq, qk)?,
            dk: rows("dk", &io.dk, qk)?,
            dv: rows("dv", &io.dv, vo)?,
            dg: gates("dg", &io.dg)?,
            dbeta: gates("dbeta", &io.dbeta)?,
            ws: self.ws.slice(at[0], own[0])?,
            saved: self.saved.slice(at[1], own[1])?,
            dsaved: self.dsaved.slice(0, own[1])?,
            state: slots(&self.state.view(), &piece.slots, h)?,
            dstate: slots(&io.dstate, &piece.slots, h)?,
        })
    }
}

/// Runs of pieces of at most `most` chunks, or of one piece.
fn blocks(plan: &Plan, most: usize) -> Vec<std::ops::Range<usize>> {
    let mut blocks: Vec<std::ops::Range<usize>> = Vec::new();
    for (i, piece) in plan.pieces.iter().enumerate() {
        match blocks.last_mut() {
            Some(b) if piece.chunks.end - plan.pieces[b.start].chunks.start <= most => b.end = i + 1,
            _ => blocks.push(i..i + 1),
        }
    }
    blocks
}

/// One piece and the windows that its launches see.
struct GradPiece<'a> {
    all: &'a Backward,
    piece: &'a Piece,
    /// Where the piece is cut.
    cut: Option<&'a CutBuffers>,
    tables: Tables,
    q: Window,
    k: Window,
    v: Window,
    g: Window,
    beta: Window,
    d_o: Window,
    dq: Window,
    dk: Window,
    dv: Window,
    dg: Window,
    dbeta: Window,
    ws: View,
    saved: View,
    dsaved: View,
    state: View,
    dstate: View,
}

impl GradPiece<'_> {
    /// The states again: all that backward needs, or only the one after the piece.
    fn forward(&self, pass: &mut Pass, save: Save) -> Result<()> {
        let Backward { shape, options, tile, .. } = self.all;
        let rows = ChunkRows::new(shape, options, tile, &self.all.caps)?;
        let saved = Window { view: self.saved.clone(), off: 0, stride: 0 };
        let grad = save == Save::Saved;
        rows.prepare(pass, &self.tables, grad, [&self.q, &self.k, &self.g, &self.beta], &self.ws);
        let scan = self.scan(save, grad, &saved);
        match self.cut {
            Some(cut) => cut.forward(pass, &rows, &scan, self.piece, &self.state),
            None => {
                rows.scan(pass, &scan, &Walks::All(&self.tables.segments), &self.state);
                Ok(())
            }
        }
    }

    fn scan<'a>(&'a self, save: Save, grad: bool, o: &'a Window) -> Scan<'a> {
        Scan { tables: &self.tables, save, grad, qkv: [&self.k, &self.k, &self.v], ws: &self.ws, o }
    }

    /// The gradients of the states.
    fn scan_back(&self, pass: &mut Pass) -> Result<()> {
        let Some(cut) = self.cut else {
            self.grad_scan(pass, &Walks::All(&self.tables.segments), &self.dstate);
            return Ok(());
        };
        let Backward { shape, options, tile, caps, .. } = self.all;
        let rows = ChunkRows::new(shape, options, tile, caps)?;
        let nothing = Window { view: self.dsaved.clone(), off: 0, stride: 0 };
        let scan = self.scan(Save::Nothing, true, &nothing);
        let grad_scan = |pass: &mut Pass, walks: &Walks, dstate: &View| self.grad_scan(pass, walks, dstate);
        cut.backward(pass, &rows, &scan, self.piece, &self.dstate, &grad_scan)
    }

    fn grad_scan(&self, pass: &mut Pass, walks: &Walks, dstate: &View) {
        let Backward { shape, options, tile, .. } = self.all;
        let (h, store, tables) = (&shape.heads, options.store.code(), &self.tables);
        let (c, dk, dv) = (tile.chunk as u64, h.k as u64, h.v as u64);
        let (walk, segments) = walks.parts();
        pass.launch(
            &GRAD_SCAN,
            GradScanConsts {
                chunk: tile.chunk,
                dk: h.k,
                dv_tile: tile.dv_grad,
                qk_type: store,
                v_type: store,
                walk,
                lanes: tile.grad_lanes,
            },
            GradScanParams {
                hk: h.hk,
                hv: h.hv,
                head_map: h.map as u32,
                dv: h.v,
                q_stride: self.q.stride,
                q_off: self.q.off,
                k_stride: self.k.stride,
                k_off: self.k.off,
                do_stride: self.d_o.stride,
                do_off: self.d_o.off,
            },
            &[&self.q.view, &self.k.view, &self.d_o.view, &self.ws, &tables.chunks, segments, dstate, &self.dsaved],
            [tables.n_segments, h.hv, h.v / tile.dv_grad],
            tables.n_chunks as u64 * h.hv as u64 * (6 * c * dk * dv + 4 * c * c * dv),
        );
    }

    fn backward(&self, pass: &mut Pass) -> Result<()> {
        let Backward { shape, options, tile, .. } = self.all;
        let (h, store, tables) = (&shape.heads, options.store.code(), &self.tables);
        let (c, dk, dv) = (tile.chunk as u64, h.k as u64, h.v as u64);
        let chunk_heads = tables.n_chunks as u64 * h.hv as u64;
        self.scan_back(pass)?;
        pass.launch(
            &GRAD_CHUNK,
            GradChunkConsts {
                chunk: tile.chunk,
                dk: h.k,
                dv: h.v,
                v_type: store,
                lanes: tune::grad_chunk_lanes(&self.all.caps),
            },
            GradChunkParams {
                hv: h.hv,
                v_stride: self.v.stride,
                v_off: self.v.off,
                do_stride: self.d_o.stride,
                do_off: self.d_o.off,
                dv_stride: self.dv.stride,
                dv_off: self.dv.off,
                scale: options.scale_for(h)?,
            },
            &[&self.v.view, &self.d_o.view, &self.ws, &self.saved, &self.dsaved, &tables.chunks, &self.dv.view],
            [tables.n_chunks, h.hv, 1],
            chunk_heads * (4 * c * c * dv + 8 * c * dv),
        );
        pass.launch(
            &GRAD_QK,
            GradQkConsts {
                chunk: tile.chunk,
                dk: h.k,
                dv: h.v,
                group: h.group(),
                qk_type: store,
                l2norm: options.qk_l2norm as u32,
                lanes: tune::grad_qk_lanes(&self.all.caps, h.k, tile.chunk),
            },
            GradQkParams {
                hk: h.hk,
                hv: h.hv,
                head_map: h.map as u32,
                q_stride: self.q.stride,
                q_off: self.q.off,
                k_stride: self.k.stride,
                k_off: self.k.off,
                dq_stride: self.dq.stride,
                dq_off: self.dq.off,
                dk_stride: self.dk.stride,
                dk_off: self.dk.off,
            },
            &[
                &self.q.view,
                &self.k.view,
                &self.ws,
                &self.saved,
                &self.dsaved,
                &tables.chunks,
                &self.dq.view,
                &self.dk.view,
            ],
            [tables.n_chunks, h.hk, 1],
            chunk_heads * (6 * c * dk * dv + 6 * c * c * dk),
        );
        pass.launch(
            &GRAD_GATES,
            GradGatesConsts { chunk: tile.chunk },
            GradGatesParams { hv: h.hv, g_off: self.dg.off },
            &[&self.ws, &tables.chunks, &self.dg.view, &self.dbeta.view],
            [tables.n_chunks, h.hv.div_ceil(tune::CELL_THREADS), 1],
            chunk_heads * 16 * c,
        );
        Ok(())
    }
}
