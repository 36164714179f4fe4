//! Gradients of what surrounds the recurrence: convolution, gates, gated norm.
//!
//! `dx` is the gradient of a loss by x. Results replace what their memory held: where a tensor is used twice, the caller
//! adds. They lie in other buffers than what is read, and scratch in one of its own. NaN and infinity reach the results that
//! depend on them.

use super::mixer::together;
use super::{Seqs, need_rows, small, some, words};
use crate::backend::View;
use crate::error::{Error, Result};
use crate::kernel::grad::{
    CONV_GRAD, CONV_TAIL_GRAD, ConvGradConsts, ConvGradParams, ConvTailGradConsts, GATE_GRAD, GATED_NORM_GRAD,
    GateGradConsts, GateGradParams, GatedNormGradConsts, GatedNormGradParams, SUM_ROWS, SumRowsConsts, SumRowsParams,
};
use crate::pass::{Pass, Rows};
use crate::shape::Heads;
use crate::tune::{self, Caps};

/// One call of [`conv_grad`].
#[derive(Debug, Clone, Copy)]
pub struct ConvGrad<'a> {
    /// Channels.
    pub channels: u64,
    /// Taps, 2 to 8.
    pub taps: u32,
    /// SiLU on the result.
    pub silu: bool,
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// Rows of `channels` f32: the input.
    pub x: &'a Rows,
    /// `[channels, taps]` f32.
    pub w: &'a View,
    /// `[slots, taps - 1, channels]` f32: the tails as they were before [`super::conv`], which updates its own.
    pub tail: &'a View,
    /// Rows of `channels` f32.
    pub dy: &'a Rows,
    /// `[slots, taps - 1, channels]` f32: the gradient of the new tails, where they are used further.
    pub dtail_out: Option<&'a View>,
    /// Rows of `channels` f32: a result.
    pub dx: &'a Rows,
    /// `[channels, taps]` f32: a result.
    pub dw: &'a View,
    /// `[slots, taps - 1, channels]` f32: a result, the gradient of the old tails; slots of no sequence stay as they are.
    pub dtail: Option<&'a View>,
    /// Scratch of [`conv_grad_scratch`] bytes.
    pub scratch: &'a View,
}

/// Bytes of scratch that [`conv_grad`] needs.
pub fn conv_grad_scratch(caps: &Caps, seqs: &Seqs, channels: u64, taps: u32) -> u64 {
    let row = channels.saturating_mul(taps as u64);
    conv_cells(caps, seqs, row).saturating_mul(row).saturating_mul(4)
}

/// Cells that share out the blocks of all sequences: no more than there can be blocks.
fn conv_cells(caps: &Caps, seqs: &Seqs, row: u64) -> u64 {
    let block = tune::conv_block(caps) as u64;
    let each = seqs.count.saturating_mul(seqs.longest.div_ceil(block));
    tune::grad_cells(caps, each.min((seqs.tokens / block).saturating_add(seqs.count)), row)
}

/// Gradients of [`super::conv`] by its input, its weights and its tail.
///
/// With `X` the rows of (tail, x) and `p[t, c] = sum_j w[c, j] X[t - (taps - 1) + j, c]`, which is computed anew:
/// ```text
/// dp[t, c] = dy[t, c] silu'(p[t, c])        dw[c, j] = sum_t dp[t, c] X[t - (taps - 1) + j, c]
/// dX[i, c] = sum_j w[c, j] dp[i + (taps - 1) - j, c]
/// ```
/// dx and dtail are the rows of `dX`; the last `taps - 1` rows of (tail, x) are the new tail and get dtail_out too.
///
/// # Errors
/// As [`super::conv`].
pub fn conv_grad(caps: &Caps, pass: &mut Pass, of: &ConvGrad) -> Result<()> {
    let ConvGrad { channels, taps, seqs, .. } = *of;
    if !(2..=8).contains(&taps) {
        return Err(Error::argument("taps", taps, "2 to 8"));
    }
    let rows = |what, rows| need_rows(caps, what, rows, seqs.tokens, channels);
    let (x, dy, dx) = (rows("x", of.x)?, rows("dy", of.dy)?, rows("dx", of.dx)?);
    let w = words(caps, "w", of.w, &[channels, taps as u64])?;
    let slots = some("slots", seqs.slots)? as u64;
    let tails = |what, view| words(caps, what, view, &[slots, taps as u64 - 1, channels]);
    let tail = tails("tail", of.tail)?;
    let table = seqs.view(caps)?;
    let row = channels * taps as u64;
    let cells = conv_cells(caps, &seqs, row);
    let part = words(caps, "scratch", of.scratch, &[cells, row])?;
    let dw = words(caps, "dw", of.dw, &[row])?;
    let params = ConvGradParams {
        channels: some("channels", channels)?,
        count: small("sequences", seqs.count)?,
        x_stride: small("x: stride", of.x.stride)?,
        x_off: small("x: offset", of.x.off)?,
        dy_stride: small("dy: stride", of.dy.stride)?,
        dy_off: small("dy: offset", of.dy.off)?,
        dx_stride: small("dx: stride", of.dx.stride)?,
        dx_off: small("dx: offset", of.dx.off)?,
        block: tune::conv_block(caps),
        cells: small("cells", cells)?,
    };
    let groups = small("channels", channels.div_ceil(64))?;
    let silu = of.silu as u32;
    let work = (seqs.tokens * channels).saturating_mul(6 * taps as u64 + 40).saturating_add(cells * channels);
    let args = [&x, &w, &table, &tail, &dy, &dx, &part];
    pass.launch(&CONV_GRAD, ConvGradConsts { taps, silu }, params, &args, [groups, params.cells, 1], work);
    sum_rows(caps, pass, &part, [cells, row], 0, &dw, row)?;
    if of.dtail_out.is_none() && of.dtail.is_none() {
        return Ok(());
    }
    let none = of.scratch.slice(0, 0)?;
    let dtail_out = of.dtail_out.map_or(Ok(none.clone()), |view| tails("dtail_out", view))?;
    let dtail = of.dtail.map_or(Ok(none), |view| tails("dtail", view))?;
    let consts =
        ConvTailGradConsts { taps, silu, add: of.dtail_out.is_some() as u32, store: of.dtail.is_some() as u32 };
    let work = seqs.count.saturating_mul(channels).saturating_mul(taps as u64 * (2 * taps as u64 + 40));
    let args = [&x, &w, &table, &tail, &dy, &dtail_out, &dx, &dtail];
    pass.launch(&CONV_TAIL_GRAD, consts, params, &args, [groups, params.count, 1], work);
    Ok(())
}

/// One call of [`gate_grad`].
#[derive(Debug, Clone, Copy)]
pub struct GateGrad<'a> {
    /// Tokens.
    pub tokens: u64,
    /// Value heads.
    pub hv: u64,
    /// Rows of `hv` f32, in one view with one stride with `b`.
    pub a: &'a Rows,
    /// Rows of `hv` f32.
    pub b: &'a Rows,
    /// `[hv]` f32.
    pub a_log: &'a View,
    /// `[hv]` f32.
    pub dt_bias: &'a View,
    /// `[tokens, hv]` f32.
    pub dg: &'a View,
    /// `[tokens, hv]` f32.
    pub dbeta: &'a View,
    /// Rows of `hv` f32: a result, in one view with one stride with `db`, beside it.
    pub da: &'a Rows,
    /// Rows of `hv` f32: a result.
    pub db: &'a Rows,
    /// `[hv]` f32: a result.
    pub da_log: &'a View,
    /// `[hv]` f32: a result.
    pub ddt_bias: &'a View,
    /// Scratch of [`gate_grad_scratch`] bytes.
    pub scratch: &'a View,
}

/// Bytes of scratch that [`gate_grad`] needs.
pub fn gate_grad_scratch(caps: &Caps, tokens: u64, hv: u64) -> u64 {
    let block = gate_block(caps, tokens, hv);
    tokens.div_ceil(block).max(1).saturating_mul(hv).saturating_mul(8)
}

/// Tokens of a cell.
fn gate_block(caps: &Caps, tokens: u64, hv: u64) -> u64 {
    block(caps, tokens, tune::gate_grad_block(caps), hv.saturating_mul(2))
}

/// Gradients of [`super::gate`].
///
/// ```text
/// da = -exp(A_log) sigmoid(a + dt_bias) dg        dA_log = sum_t dg g
/// db = beta (1 - beta) dbeta                      ddt_bias = sum_t da
/// ```
///
/// # Errors
/// As [`super::gate`]; [`Error::Argument`] if da and db share numbers.
pub fn gate_grad(caps: &Caps, pass: &mut Pass, of: &GateGrad) -> Result<()> {
    let GateGrad { tokens, hv, .. } = *of;
    let ab = together(caps, "b", of.a, of.b, tokens, hv, hv)?;
    let dab = together(caps, "db", of.da, of.db, tokens, hv, hv)?;
    let (least, most) = (of.da.off.min(of.db.off), of.da.off.max(of.db.off));
    if tokens > 0 && (most - least < hv || tokens > 1 && most + hv > least + of.da.stride) {
        let found = format!("rows from {} of stride {}", of.db.off, of.db.stride);
        return Err(Error::argument("db", found, format!("rows beside the {hv} numbers of da from {}", of.da.off)));
    }
    let heads = |what, view| words(caps, what, view, &[hv]);
    let (a_log, dt_bias) = (heads("a_log", of.a_log)?, heads("dt_bias", of.dt_bias)?);
    let (da_log, ddt_bias) = (heads("da_log", of.da_log)?, heads("ddt_bias", of.ddt_bias)?);
    let (dg, dbeta) = (words(caps, "dg", of.dg, &[tokens, hv])?, words(caps, "dbeta", of.dbeta, &[tokens, hv])?);
    let block = gate_block(caps, tokens, hv);
    let cells = tokens.div_ceil(block).max(1);
    let part = words(caps, "scratch", of.scratch, &[cells, 2, hv])?;
    let params = GateGradParams {
        tokens: small("tokens", tokens)?,
        hv: some("hv (value heads)", hv)?,
        stride: small("a: stride", of.a.stride)?,
        a_off: small("a: offset", of.a.off)?,
        b_off: small("b: offset", of.b.off)?,
        d_stride: small("da: stride", of.da.stride)?,
        da_off: small("da: offset", of.da.off)?,
        db_off: small("db: offset", of.db.off)?,
        block: small("block", block)?,
    };
    let lanes = tune::gate_grad_lanes(caps, params.hv);
    let args = [&ab, &a_log, &dt_bias, &dg, &dbeta, &dab, &part];
    let grid = [params.hv.div_ceil(lanes), small("cells", cells)?, 1];
    pass.launch(&GATE_GRAD, GateGradConsts { lanes }, params, &args, grid, tokens * hv * 100);
    sum_rows(caps, pass, &part, [cells, 2 * hv], 0, &da_log, hv)?;
    sum_rows(caps, pass, &part, [cells, 2 * hv], hv, &ddt_bias, hv)
}

/// One call of [`gated_norm_grad`].
#[derive(Debug, Clone, Copy)]
pub struct GatedNormGrad<'a> {
    /// Heads and sizes.
    pub heads: Heads,
    /// Tokens.
    pub tokens: u64,
    /// Added to the mean square.
    pub eps: f32,
    /// `[tokens, hv, V]` f32.
    pub o: &'a View,
    /// Rows of `hv V` f32.
    pub z: &'a Rows,
    /// `[V]` f32.
    pub w: &'a View,
    /// `[tokens, hv, V]` f32.
    pub dy: &'a View,
    /// `[tokens, hv, V]` f32: a result.
    pub d_o: &'a View,
    /// Rows of `hv V` f32: a result.
    pub dz: &'a Rows,
    /// `[V]` f32: a result.
    pub dw: &'a View,
    /// Scratch of [`gated_norm_grad_scratch`] bytes.
    pub scratch: &'a View,
}

/// Bytes of scratch that [`gated_norm_grad`] needs.
pub fn gated_norm_grad_scratch(caps: &Caps, heads: &Heads, tokens: u64) -> u64 {
    let rows = tokens.saturating_mul(heads.hv as u64);
    rows.div_ceil(norm_block(caps, heads, rows)).max(1) * heads.v as u64 * 4
}

/// Tokens x heads of a cell.
fn norm_block(caps: &Caps, heads: &Heads, rows: u64) -> u64 {
    block(caps, rows, tune::norm_grad_block(caps), heads.v as u64)
}

/// Gradients of [`super::gated_norm`], with `r = rsqrt(mean(o^2) + eps)` and `u = dy w silu(z)`.
///
/// ```text
/// do = r u - r^3 mean(o u) o      dz = dy w o r silu'(z)      dw = sum over tokens and heads of dy o r silu(z)
/// ```
///
/// # Errors
/// As [`super::gated_norm`].
pub fn gated_norm_grad(caps: &Caps, pass: &mut Pass, of: &GatedNormGrad) -> Result<()> {
    let GatedNormGrad { heads, tokens, .. } = *of;
    let (hv, dv) = (heads.hv as u64, heads.v as u64);
    let all = |what, view| words(caps, what, view, &[tokens, hv * dv]);
    let (o, dy, d_o) = (all("o", of.o)?, all("dy", of.dy)?, all("d_o", of.d_o)?);
    let z = need_rows(caps, "z", of.z, tokens, hv * dv)?;
    let dz = need_rows(caps, "dz", of.dz, tokens, hv * dv)?;
    let (w, dw) = (words(caps, "w", of.w, &[dv])?, words(caps, "dw", of.dw, &[dv])?);
    let block = norm_block(caps, &heads, tokens * hv);
    let cells = (tokens * hv).div_ceil(block).max(1);
    let part = words(caps, "scratch", of.scratch, &[cells, dv])?;
    let params = GatedNormGradParams {
        hv: heads.hv,
        tokens: small("tokens", tokens)?,
        z_stride: small("z: stride", of.z.stride)?,
        z_off: small("z: offset", of.z.off)?,
        dz_stride: small("dz: stride", of.dz.stride)?,
        dz_off: small("dz: offset", of.dz.off)?,
        block: small("block", block)?,
        eps: of.eps,
    };
    let consts = GatedNormGradConsts { dv: heads.v, lanes: tune::norm_grad_lanes(caps, heads.v) };
    let args = [&o, &z, &w, &dy, &d_o, &dz, &part];
    pass.launch(&GATED_NORM_GRAD, consts, params, &args, [small("cells", cells)?, 1, 1], tokens * hv * dv * 60);
    sum_rows(caps, pass, &part, [cells, dv], 0, &dw, dv)
}

/// Tokens or heads of a cell, `least` or more, where `all` of them leave rows of `row` numbers to be added up.
fn block(caps: &Caps, all: u64, least: u64, row: u64) -> u64 {
    all.div_ceil(tune::grad_cells(caps, all.div_ceil(least), row)).max(least)
}

/// `y[c] = sum_r x[r, off + c]` for `n` columns of `rows` rows of `stride` numbers.
fn sum_rows(
    caps: &Caps,
    pass: &mut Pass,
    x: &View,
    [rows, stride]: [u64; 2],
    off: u64,
    y: &View,
    n: u64,
) -> Result<()> {
    let (columns, lanes) = tune::sum_rows(caps);
    let params = SumRowsParams {
        rows: small("scratch: rows", rows)?,
        n: small("scratch: columns", n)?,
        x_stride: small("scratch: stride", stride)?,
        x_off: small("scratch: offset", off)?,
    };
    let grid = [params.n.div_ceil(columns), 1, 1];
    pass.launch(&SUM_ROWS, SumRowsConsts { columns, lanes }, params, &[x, y], grid, rows * n * 5);
    Ok(())
}
