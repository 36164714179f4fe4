//! Launches over pieces whose sequences are cut, see [`crate::kernel::gdn_cut`].

use super::prefill::{ChunkRows, Save, Tables, Walks};
use super::{Options, Window};
use crate::backend::{Backend, Buffer, View};
use crate::error::Result;
use crate::kernel::gdn_cut::{CARRY, CUT, CarryConsts, CarryParams, CutConsts, CutParams};
use crate::ops;
use crate::pass::Pass;
use crate::plan::{Piece, Plan};
use crate::shape::{Dtype, Shape};
use crate::tune::{self, Caps, Tile};

/// What a scan forward reads and writes besides the state.
#[derive(Clone, Copy)]
pub(super) struct Scan<'a> {
    pub tables: &'a Tables,
    pub save: Save,
    /// ws is the longer one of the backward pass.
    pub grad: bool,
    pub qkv: [&'a Window; 3],
    pub ws: &'a View,
    /// o, or what `save` says.
    pub o: &'a Window,
}

/// Where a head has not forgotten what lies before a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exact {
    /// It is walked on.
    Never = 0,
    /// It has a transition.
    Needed = 1,
    /// Every head has a transition at every cut.
    Always = 2,
}

/// Memory of the cut pieces of a plan, used again by each.
#[derive(Debug)]
pub(super) struct CutBuffers {
    exact: Exact,
    forgotten: f32,
    caps: Caps,
    /// Two tables `[segments, Hv]`, rows of four u32.
    walks: Buffer,
    /// `[slots, Hv, K, V]`
    carried: Buffer,
    /// `[slots, Hv, K, K]`
    transitions: Buffer,
}

/// The tables of walks of a piece.
struct Both {
    /// To the states at the cuts.
    between: View,
    /// Of the segments.
    own: View,
}

impl CutBuffers {
    /// Memory for a plan, if it cuts anything.
    pub fn new(
        backend: &dyn Backend,
        plan: &Plan,
        shape: &Shape,
        options: &Options,
        tile: &Tile,
    ) -> Result<Option<Self>> {
        let heads = &shape.heads;
        let Some(cut) = tile.cut.filter(|_| plan.cut_slots > 0) else { return Ok(None) };
        let exact = match (options.exact, cut.exact) {
            (true, _) => Exact::Always,
            (false, true) => Exact::Needed,
            (false, false) => Exact::Never,
        };
        let caps = backend.caps().clone();
        let [walks, carried, mut transitions] = plan.cut_bytes(heads, caps.align);
        if exact == Exact::Never {
            transitions = 16;
        }
        Ok(Some(CutBuffers {
            exact,
            forgotten: forgotten(options.store),
            walks: backend.alloc("walks of a cut sequence", walks)?,
            carried: backend.alloc("states of a cut sequence", carried)?,
            transitions: backend.alloc("transitions of a cut sequence", transitions)?,
            caps,
        }))
    }

    /// Bytes of device memory.
    pub fn device_bytes(&self) -> u64 {
        self.walks.bytes() + self.carried.bytes() + self.transitions.bytes()
    }

    /// A scan of a cut piece from the states of its sequences, which it moves on.
    pub fn forward(&self, pass: &mut Pass, rows: &ChunkRows, scan: &Scan, piece: &Piece, state: &View) -> Result<()> {
        let walks = self.cut(pass, rows, scan, piece, false)?;
        let carried = self.carried.slice(0, piece.all_slots() * rows.heads.state_len() * 4)?;
        let between = Scan { save: Save::Nothing, ..*scan };
        rows.scan(pass, &between, &Walks::FromZero(&walks.between), &carried);
        self.transitions(pass, rows, scan, &walks);
        self.carry(pass, rows, scan.tables, &walks, state, &carried, false);
        rows.scan(pass, scan, &Walks::Own(&walks.own), &carried);
        ops::copy(&self.caps, pass, &carried, 0, state, 0, state.bytes / 4)
    }

    /// The same backward, with `grad_scan` for the row that walks; `scan` is for the transitions.
    pub fn backward(
        &self,
        pass: &mut Pass,
        rows: &ChunkRows,
        scan: &Scan,
        piece: &Piece,
        dstate: &View,
        grad_scan: &dyn Fn(&mut Pass, &Walks, &View),
    ) -> Result<()> {
        let walks = self.cut(pass, rows, scan, piece, true)?;
        let carried = self.carried.slice(0, piece.all_slots() * rows.heads.state_len() * 4)?;
        grad_scan(pass, &Walks::FromZero(&walks.between), &carried);
        self.transitions(pass, rows, scan, &walks);
        self.carry(pass, rows, scan.tables, &walks, dstate, &carried, true);
        grad_scan(pass, &Walks::Own(&walks.own), &carried);
        ops::copy(&self.caps, pass, &carried, 0, dstate, 0, dstate.bytes / 4)
    }

    /// [`CUT`].
    fn cut(&self, pass: &mut Pass, rows: &ChunkRows, scan: &Scan, piece: &Piece, back: bool) -> Result<Both> {
        let (tables, hv) = (scan.tables, rows.heads.hv);
        let table = tables.n_segments as u64 * hv as u64 * 16;
        let half = table.next_multiple_of(self.caps.align.max(16));
        pass.launch(
            &CUT,
            CutConsts { chunk: rows.tile.chunk, grad: scan.grad as u32, back: back as u32, exact: self.exact as u32 },
            CutParams {
                hv,
                segments: tables.n_segments,
                sequences: piece.slots.len() as u32,
                half: (half / 16) as u32,
                forgotten: self.forgotten,
            },
            &[scan.ws, &tables.segments, &self.walks.slice(0, half + table)?],
            [hv, 1, 1],
            tables.n_chunks as u64 * hv as u64 * 16,
        );
        Ok(Both { between: self.walks.slice(0, table)?, own: self.walks.slice(half, table)? })
    }

    /// The transitions of the segments that have one.
    fn transitions(&self, pass: &mut Pass, rows: &ChunkRows, scan: &Scan, walks: &Both) {
        if self.exact != Exact::Never {
            let scan = Scan { save: Save::Nothing, ..*scan };
            rows.scan(pass, &scan, &Walks::Transition(&walks.between), &self.transitions.view());
        }
    }

    /// [`CARRY`].
    #[allow(clippy::too_many_arguments)]
    fn carry(
        &self,
        pass: &mut Pass,
        rows: &ChunkRows,
        tables: &Tables,
        walks: &Both,
        state: &View,
        carried: &View,
        back: bool,
    ) {
        let heads = &rows.heads;
        let (k, cells) = (heads.k as u64, heads.hv as u64 * tables.n_segments as u64);
        let sequences = (tables.sequences.bytes / 16) as u32;
        pass.launch(
            &CARRY,
            CarryConsts {
                dk: heads.k,
                dv_tile: rows.tile.dv_tile,
                back: back as u32,
                lanes: tune::carry_lanes(&self.caps, heads, rows.tile.dv_tile),
            },
            CarryParams { hv: heads.hv, dv: heads.v },
            &[&walks.between, &self.transitions.view(), &tables.sequences, &tables.segments, state, carried],
            [sequences, heads.hv, heads.v / rows.tile.dv_tile],
            cells * 2 * k * k * heads.v as u64,
        );
    }
}

/// What the gates have shrunk to less than this counts as forgotten: well below what numbers of the stored type hold.
fn forgotten(store: Dtype) -> f32 {
    match store {
        Dtype::F32 => (-17f32).exp(),
        Dtype::F16 | Dtype::Bf16 => (-12f32).exp(),
    }
}
