//! Products with weights: `y = x w^T`.

use super::small::{rms_norm, swiglu};
use super::weight::Weight;
use super::{need, need_rows, small, some};
use crate::backend::View;
use crate::error::{Error, Result};
use crate::kernel::model::{MATMUL, MATVEC, MatmulConsts, MatmulParams, MatvecConsts};
use crate::pass::{Pass, Rows};
use crate::tune::{self, Caps};

/// The RMS norm in front of a product.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// `[k]` f32.
    pub weight: &'a View,
    /// Added to the mean square.
    pub eps: f32,
    /// Scratch of `[m, k]` f32 for the normed rows.
    pub scratch: &'a View,
}

/// `y[i, j] = sum_k x[i, k] w[j, k]`, or added to y with `add`.
/// - x `m` rows of `w.k`, y `m` rows of `w.n`, f32, not in the same memory
///
/// # Errors
/// [`Error::Argument`] naming the argument that is too small or unaligned; [`Error::Unsupported`] for one that is too large.
pub fn linear(caps: &Caps, pass: &mut Pass, x: &Rows, w: &Weight, y: &Rows, m: u64, add: bool) -> Result<()> {
    w.check("w")?;
    let x_view = need_rows(caps, "x", x, m, w.k)?;
    // All of y, so that a wrong size is named as such and not as that of a part.
    need_rows(caps, "y", y, m, w.n)?;
    let size = w.dtype.size();
    for part in &w.parts {
        let w_view = need(caps, "w", &part.view, size, &[part.rows, w.k])?;
        let y = y.at(part.row0);
        let y_view = need_rows(caps, "y", &y, m, part.rows)?;
        let params = MatmulParams {
            m: small("m (rows of x)", m)?,
            n: small("n (rows of w)", part.rows)?,
            k: some("k (numbers in a row of w)", w.k)?,
            x_stride: small("x: stride", x.stride)?,
            x_off: small("x: offset", x.off)?,
            y_stride: small("y: stride", y.stride)?,
            y_off: small("y: offset", y.off)?,
        };
        let wide = w.k * size % 16 == 0 && x.off % 4 == 0 && (x.stride % 4 == 0 || m <= 1) && w.k % 4 == 0;
        let (w_type, add, wide) = (w.dtype.code(), add as u32, wide as u32);
        let work = w_view.bytes.saturating_add((2 * m * part.rows).saturating_mul(w.k)).saturating_add(x_view.bytes);
        let args = [&x_view, &w_view, &y_view];
        if m <= tune::matvec_most(caps) {
            let t = tune::matvec(caps, part.rows, w.k, w.dtype);
            let consts = MatvecConsts { w_type, add, rows: t.rows, lanes: t.lanes, wide };
            pass.launch(&MATVEC, consts, params, &args, [params.n.div_ceil(t.rows), 1, (m > 0) as u32], work);
        } else {
            let t = tune::matmul(caps, m, part.rows, w.k, w.dtype);
            let (tile_m, tile_n, tile_k) = (t.tile_m, t.tile_n, t.tile_k);
            let consts = MatmulConsts { w_type, add, tile_m, tile_n, tile_k, reg_m: t.reg_m, reg_n: t.reg_n, wide };
            pass.launch(
                &MATMUL,
                consts,
                params,
                &args,
                [params.n.div_ceil(tile_n), params.m.div_ceil(tile_m), 1],
                work,
            );
        }
    }
    Ok(())
}

/// `y = norm(x) w^T`: RMS norm, then product.
/// - x `[m, w.k]` f32 packed, y `m` rows of `w.n` f32
///
/// # Errors
/// As [`linear`].
pub fn norm_linear(caps: &Caps, pass: &mut Pass, x: &View, norm: Norm, w: &Weight, y: &Rows, m: u64) -> Result<()> {
    rms_norm(caps, pass, x, 0, norm.weight, norm.scratch, m, w.k, norm.eps)?;
    linear(caps, pass, &Rows::packed(norm.scratch.clone(), w.k), w, y, m, false)
}

/// The first half of a SwiGLU network: `y = silu(n gate^T) * (n up^T)` with `n = norm(x)`.
/// - x `[m, k]` f32 packed; gate, up `[dim, k]`; gate_up `[m, 2 dim]` f32 scratch; y `[m, dim]` f32
///
/// # Errors
/// As [`linear`].
#[allow(clippy::too_many_arguments)]
pub fn swiglu_up(
    caps: &Caps,
    pass: &mut Pass,
    x: &View,
    norm: Norm,
    gate: &Weight,
    up: &Weight,
    gate_up: &View,
    y: &View,
    m: u64,
) -> Result<()> {
    if (gate.n, gate.k) != (up.n, up.k) {
        let expected = format!("[{}, {}] as gate", gate.n, gate.k);
        return Err(Error::argument("up", format!("[{}, {}]", up.n, up.k), expected));
    }
    let both = Rows::packed(gate_up.clone(), 2 * gate.n);
    norm_linear(caps, pass, x, norm, gate, &both, m)?;
    let normed = Rows::packed(norm.scratch.clone(), up.k);
    linear(caps, pass, &normed, up, &both.at(gate.n), m, false)?;
    swiglu(caps, pass, gate_up, y, m, gate.n)
}
