//! Rows that let segments of one sequence run at the same time.
//!
//! Over a run of chunks the recurrence is affine in the state before it, column by column of V:
//! ```text
//! S_after = M S_before + E        M = product of (I - beta_t k_t k_t^T) exp(g_t), last token first
//! ```
//! E is what the run leaves when it starts from zero, and M what it makes of the identity when every v is 0. So the state
//! before each segment follows from either of two:
//!
//! - *Warm-up.* If `0 <= beta |k|^2 <= 2`, no `I - beta k k^T` makes a vector longer, and `|M| <= exp(sum of g)`. Where the
//!   gates of the last w chunks before a cut add up to less than `-x`, starting from zero w chunks early is wrong by at most
//!   `exp(-x) |S|`, with S the state that is left out. Backward the same holds of the first w chunks after a cut, because the
//!   gradient of `S_before` is `M^T` times that of `S_after` and what those chunks add.
//! - *Transition.* Exact, for heads that don't forget within a segment and for keys that are too long: E and M over the whole
//!   segment, then `S_after = M S_before + E` from one segment to the next, in f32. It costs the arithmetic of a scan over V
//!   and over K columns more.
//!
//! A head whose gates do not reach the bound and that has no transition is walked on over the cut instead. Each head decides
//! at each cut, on the device.
//!
//! Gates as the criterion are an idea of FlashQLA (Qwen team, 2026), which cuts at `exp(-10)` and on the host; that products
//! of `I - beta k k^T` do not grow is from Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence
//! Length" (2024). The bound here is `exp(-17) = 4e-8` where numbers are f32 and `exp(-12) = 6e-6` where they have 16 bits.
//!
//! # Walks
//! [`CUT`] writes two tables of walks `[segments, Hv]`, rows of four u32; a walk of no chunks is not taken.
//! - The first, for the state between a segment and the next (backward: the one before), by index of the former:
//!   (first chunk, chunks, 1 with a transition and 0 without, slot that E goes to). `walk = 2` of [`super::gdn::SCAN`] and
//!   [`super::gdn_grad::GRAD_SCAN`] walks all of them from zero, `walk = 3` of the former those with a transition from the
//!   identity over `v = 0`: its state is M `[slots, Hv, K, K]`.
//! - The second, for the segments themselves, `walk = 1`: (first chunk, chunks, slot to start from, slot to leave the
//!   state in).
//!
//! Between the two, [`CARRY`] completes the states.

use super::{Fields, Kernel, fields, read, update, write};

fields! {
    /// Consts of [`CUT`].
    CutConsts {
        /// C: tokens per chunk.
        chunk: u32,
        /// 1: ws is the longer one of the backward pass.
        grad: u32,
        /// 1: segments are walked last to first.
        back: u32,
        /// Where a head has not forgotten 0: it is walked on over the cut, 1: it has a transition. 2: a transition everywhere.
        exact: u32,
    }
}

fields! {
    /// Params of [`CUT`].
    CutParams {
        /// Value heads.
        hv: u32,
        /// Segments.
        segments: u32,
        /// Sequences: slots from here on are not theirs.
        sequences: u32,
        /// Row of walks where the second table starts.
        half: u32,
        /// A factor of less than this is forgotten.
        forgotten: f32,
    }
}

/// What is done at each cut for each head: the number of chunks whose gamma_C multiply to less than `forgotten`, counted from
/// the cut, if there are as many in the segment and none of them can make a state longer.
/// - ws, with gamma_C, as [`super::gdn::PREPARE`] wrote it
/// - segments `[segments]` of (first chunk, chunks, slot, slot backward), in order of chunks: the last one of a sequence has the
///   sequence's slot, backward the first one has
/// - walks: both tables `[segments, Hv]`, the second from row `half` on
/// - grid: `[Hv, 1, 1]`
pub static CUT: Kernel = Kernel {
    name: "gdn_cut",
    args: &[read("ws"), read("segments"), write("walks")],
    consts: CutConsts::FIELDS,
    params: CutParams::FIELDS,
};

fields! {
    /// Consts of [`CARRY`].
    CarryConsts {
        /// K.
        dk: u32,
        /// Columns of the state that one cell carries; divides V.
        dv_tile: u32,
        /// 1: segments are walked last to first, through transposed transitions.
        back: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`CARRY`].
    CarryParams {
        /// Value heads.
        hv: u32,
        /// V.
        dv: u32,
    }
}

/// The states before all segments, one segment after the other: `S <- M S + E` where there is a transition.
/// - walks, the first table, and segments as [`CUT`] wrote and read them
/// - sequences `[sequences]` of (first segment, segments, 0, 0)
/// - m `[slots, Hv, K, K]` f32, by the slot of E
/// - state `[sequences, Hv, K, V]` f32, before the first segment
/// - carried `[slots, Hv, K, V]` f32: E on entry, the state before each segment on return; for a sequence without segments its
///   state
/// - grid: `[sequences, Hv, V / dv_tile]`
pub static CARRY: Kernel = Kernel {
    name: "gdn_carry",
    args: &[read("walks"), read("m"), read("sequences"), read("segments"), read("state"), update("carried")],
    consts: CarryConsts::FIELDS,
    params: CarryParams::FIELDS,
};
