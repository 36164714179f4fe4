//! What surrounds the recurrence in a Gated DeltaNet layer: convolution, gates, gated norm, and the fused decoded token.

use super::{count, need_rows, small, some, words};
use crate::backend::View;
use crate::error::{Error, Result};
use crate::kernel::gdn::{
    CONV, CONV_TAIL, ConvConsts, ConvParams, ConvTailConsts, GATE, GATED_NORM, GateConsts, GateParams, GatedNormConsts,
    GatedNormParams, MIX_STEP, MixStepConsts, MixStepParams,
};
use crate::pass::{Pass, Rows};
use crate::shape::Heads;
use crate::tune::{self, Caps};

/// The sequences of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Seqs<'a> {
    /// `[count]` of (first token, tokens, slot, 0), u32.
    pub table: &'a View,
    /// Sequences.
    pub count: u64,
    /// Tokens over all sequences.
    pub tokens: u64,
    /// Tokens of the longest sequence.
    pub longest: u64,
    /// Slots that the per-sequence state has room for.
    pub slots: u64,
}

impl Seqs<'_> {
    pub(super) fn view(&self, caps: &Caps) -> Result<View> {
        words(caps, "seqs", self.table, &[self.count, 4])
    }
}

/// Causal depthwise convolution over time, then SiLU, with a carried tail that is updated.
///
/// `y[t, c] = silu(sum_j w[c, j] x[t - (taps - 1) + j, c])`, rows before a sequence from `tail[slot]`.
/// - x, y rows of `channels` f32, not in the same memory; w `[channels, taps]` f32
/// - tail `[slots, taps - 1, channels]` f32, oldest first
///
/// # Errors
/// [`Error::Argument`] naming the argument that is too small, unaligned or out of range; [`Error::Unsupported`] for one that
/// is too large.
#[allow(clippy::too_many_arguments)]
pub fn conv(
    caps: &Caps,
    pass: &mut Pass,
    x: &Rows,
    w: &View,
    seqs: Seqs,
    tail: &View,
    y: &Rows,
    channels: u64,
    taps: u32,
    silu: bool,
) -> Result<()> {
    if !(2..=8).contains(&taps) {
        return Err(Error::argument("taps", taps, "2 to 8"));
    }
    let x_view = need_rows(caps, "x", x, seqs.tokens, channels)?;
    let y_view = need_rows(caps, "y", y, seqs.tokens, channels)?;
    let w_view = words(caps, "w", w, &[channels, taps as u64])?;
    let tail = words(caps, "tail", tail, &[some("slots", seqs.slots)? as u64, taps as u64 - 1, channels])?;
    let table = seqs.view(caps)?;
    let block = tune::conv_block(caps);
    // A cell that sees its whole sequence can store the tail itself: no other cell still reads the old one.
    let whole = seqs.longest <= block as u64;
    let params = ConvParams {
        channels: some("channels", channels)?,
        x_stride: small("x: stride", x.stride)?,
        x_off: small("x: offset", x.off)?,
        y_stride: small("y: stride", y.stride)?,
        y_off: small("y: offset", y.off)?,
        block,
    };
    let columns = small("channels", channels.div_ceil(64))?;
    let sequences = small("sequences", seqs.count)?;
    let grid = [columns, sequences, small("tokens", seqs.longest.div_ceil(block as u64))?];
    let consts = ConvConsts { taps, silu: silu as u32, store_tail: whole as u32 };
    let work = seqs.tokens * channels * (2 * taps as u64 + 16);
    pass.launch(&CONV, consts, params, &[&x_view, &w_view, &table, &tail, &y_view], grid, work);
    if !whole {
        let work = seqs.count * channels * 8 * taps as u64;
        pass.launch(
            &CONV_TAIL,
            ConvTailConsts { taps },
            params,
            &[&x_view, &table, &tail],
            [columns, sequences, 1],
            work,
        );
    }
    Ok(())
}

/// `g = -exp(A_log) softplus(a + dt_bias)`, `beta = sigmoid(b)`.
/// - a and b rows of `hv` f32 in one view with one stride; a_log, dt_bias `[hv]` f32; g, beta `[tokens, hv]` f32
///
/// # Errors
/// As [`conv`]; [`Error::Argument`] if a and b do not share a view and a stride.
#[allow(clippy::too_many_arguments)]
pub fn gate(
    caps: &Caps,
    pass: &mut Pass,
    a: &Rows,
    b: &Rows,
    a_log: &View,
    dt_bias: &View,
    g: &View,
    beta: &View,
    tokens: u64,
    hv: u64,
) -> Result<()> {
    let ab = together(caps, "b", a, b, tokens, hv, hv)?;
    let (a_log, dt_bias) = (words(caps, "a_log", a_log, &[hv])?, words(caps, "dt_bias", dt_bias, &[hv])?);
    let (g, beta) = (words(caps, "g", g, &[tokens, hv])?, words(caps, "beta", beta, &[tokens, hv])?);
    let params = GateParams {
        tokens: small("tokens", tokens)?,
        hv: some("hv (value heads)", hv)?,
        stride: small("a: stride", a.stride)?,
        a_off: small("a: offset", a.off)?,
        b_off: small("b: offset", b.off)?,
    };
    let block = tune::block(caps);
    let grid = [small("cells", (tokens * hv).div_ceil(block as u64))?, 1, 1];
    pass.launch(&GATE, GateConsts { block }, params, &[&ab, &a_log, &dt_bias, &g, &beta], grid, tokens * hv * 40);
    Ok(())
}

/// `y = o * rsqrt(mean(o^2) + eps) * w * silu(z)` over the numbers of each value head.
/// - o, y `[tokens, hv, V]` f32; z rows of `hv V` f32; w `[V]` f32
///
/// # Errors
/// As [`conv`].
#[allow(clippy::too_many_arguments)]
pub fn gated_norm(
    caps: &Caps,
    pass: &mut Pass,
    heads: &Heads,
    o: &View,
    z: &Rows,
    w: &View,
    y: &View,
    tokens: u64,
    eps: f32,
) -> Result<()> {
    let row = heads.hv as u64 * heads.v as u64;
    let (o, y) = (words(caps, "o", o, &[tokens, row])?, words(caps, "y", y, &[tokens, row])?);
    let z_view = need_rows(caps, "z", z, tokens, row)?;
    let w = words(caps, "w", w, &[heads.v as u64])?;
    let params = GatedNormParams {
        hv: heads.hv,
        tokens: small("tokens", tokens)?,
        z_stride: small("z: stride", z.stride)?,
        z_off: small("z: offset", z.off)?,
        eps,
    };
    let consts = GatedNormConsts { dv: heads.v, lanes: tune::head_lanes(caps, heads.v) };
    let grid = [heads.hv, small("tokens", tokens)?, 1];
    pass.launch(&GATED_NORM, consts, params, &[&o, &z_view, &w, &y], grid, tokens * row * 30);
    Ok(())
}

/// A Gated DeltaNet layer after its convolution, for a few tokens of each sequence, in one launch: L2 norm of q and k,
/// gates, recurrence, gated norm.
/// - qkv `[tokens, 2 Hk K + Hv V]` f32: q, k, v; z rows of `Hv V` f32, a and b rows of `Hv` f32, all three in one view with
///   one stride; small `[2 Hv + V]` f32: A_log, dt_bias, weight of the norm
/// - state `[slots, Hv, K, V]` f32, updated in place; y `[tokens, Hv V]` f32
///
/// # Errors
/// As [`conv`]; [`Error::Argument`] if z, a and b do not share a view and a stride.
#[allow(clippy::too_many_arguments)]
pub fn mix_step(
    caps: &Caps,
    pass: &mut Pass,
    heads: &Heads,
    qkv: &View,
    [z, a, b]: [&Rows; 3],
    small_weights: &View,
    seqs: Seqs,
    state: &View,
    y: &View,
    scale: f32,
    eps: f32,
) -> Result<()> {
    let (hv, dv) = (heads.hv as u64, heads.v as u64);
    let width = 2 * heads.hk as u64 * heads.k as u64 + hv * dv;
    let qkv = words(caps, "qkv", qkv, &[seqs.tokens, width])?;
    let za = together(caps, "a", z, a, seqs.tokens, hv * dv, hv)?;
    let zb = together(caps, "b", z, b, seqs.tokens, hv * dv, hv)?;
    let proj = if za.bytes > zb.bytes { za } else { zb };
    let weights = words(caps, "small", small_weights, &[2 * hv + dv])?;
    let state = words(caps, "state", state, &[some("slots", seqs.slots)? as u64, heads.state_len()])?;
    let y = words(caps, "y", y, &[seqs.tokens, hv, dv])?;
    let params = MixStepParams {
        hk: heads.hk,
        hv: heads.hv,
        head_map: heads.map as u32,
        qkv_stride: small("qkv: stride", width)?,
        p_stride: small("z: stride", z.stride)?,
        z_off: small("z: offset", z.off)?,
        a_off: small("a: offset", a.off)?,
        b_off: small("b: offset", b.off)?,
        scale,
        eps,
    };
    let consts = MixStepConsts { dk: heads.k, dv: heads.v, lanes: tune::mix_lanes(caps, heads) };
    let grid = [small("sequences", seqs.count)?, heads.hv, 1];
    let work = count("state: numbers of all tokens", &[seqs.tokens, heads.state_len() / hv])? * hv * 16;
    let args = [&qkv, &proj, &weights, &seqs.view(caps)?, &state, &y];
    pass.launch(&MIX_STEP, consts, params, &args, grid, work);
    Ok(())
}

/// The view that holds both tensors, which must share it and its rows.
pub(super) fn together(caps: &Caps, what: &str, a: &Rows, b: &Rows, rows: u64, wa: u64, wb: u64) -> Result<View> {
    let place = |r: &Rows| (r.view.buffer.id(), r.view.offset, r.stride);
    if place(a) != place(b) {
        return Err(Error::argument(what, "other rows", "rows of the same view and stride as its neighbours"));
    }
    let (va, vb) = (need_rows(caps, what, a, rows, wa)?, need_rows(caps, what, b, rows, wb)?);
    Ok(if va.bytes > vb.bytes { va } else { vb })
}
