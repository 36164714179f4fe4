//! Products with weights: `y = x w^T`.

use super::small::{rms_norm, swiglu};
use super::weight::Weight;
use super::{need, need_rows, small, some, words};
use crate::backend::View;
use crate::error::{Error, Result};
use crate::kernel::model::{MATMUL, MATVEC, MatmulConsts, MatmulParams, MatvecConsts, MatvecParams};
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
    if m <= tune::matvec_most(caps) {
        return matvec(caps, pass, x, None, w, None, y, m, add);
    }
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
        let t = tune::matmul(caps, m, part.rows, w.k, w.dtype);
        let consts = MatmulConsts {
            w_type: w.dtype.code(),
            add: add as u32,
            tile_m: t.tile_m,
            tile_n: t.tile_n,
            tile_k: t.tile_k,
            reg_m: t.reg_m,
            reg_n: t.reg_n,
            lanes: t.lanes(),
            wide: wide(x, w, m) as u32,
        };
        let grid = [params.n.div_ceil(t.tile_n), params.m.div_ceil(t.tile_m), 1];
        pass.launch(
            &MATMUL,
            consts,
            params,
            &[&x_view, &w_view, &y_view],
            grid,
            work(&w_view, &x_view, m, w.k, part.rows),
        );
    }
    Ok(())
}

/// [`MATVEC`] over the parts of w: `y (+)= n w^T`, or `silu(n w^T) * (n up^T)`, with n the normed x.
#[allow(clippy::too_many_arguments)]
fn matvec(
    caps: &Caps,
    pass: &mut Pass,
    x: &Rows,
    norm: Option<Norm>,
    w: &Weight,
    up: Option<&Weight>,
    y: &Rows,
    m: u64,
    add: bool,
) -> Result<()> {
    let x_view = need_rows(caps, "x", x, m, w.k)?;
    let norm_view = match norm {
        Some(norm) => words(caps, "norm", norm.weight, &[w.k])?,
        None => x_view.clone(),
    };
    let size = w.dtype.size();
    for (i, part) in w.parts.iter().enumerate() {
        let w_view = need(caps, "w", &part.view, size, &[part.rows, w.k])?;
        let up_view = match up {
            Some(up) => need(caps, "up", &up.parts[i].view, size, &[part.rows, w.k])?,
            None => w_view.clone(),
        };
        let y = y.at(part.row0);
        let y_view = need_rows(caps, "y", &y, m, part.rows)?;
        let params = MatvecParams {
            m: small("m (rows of x)", m)?,
            n: small("n (rows of w)", part.rows)?,
            k: some("k (numbers in a row of w)", w.k)?,
            x_stride: small("x: stride", x.stride)?,
            x_off: small("x: offset", x.off)?,
            y_stride: small("y: stride", y.stride)?,
            y_off: small("y: offset", y.off)?,
            eps: norm.map_or(0.0, |n| n.eps),
        };
        let t = tune::matvec(caps, part.rows, w.k, w.dtype);
        let consts = MatvecConsts {
            w_type: w.dtype.code(),
            add: add as u32,
            norm: norm.is_some() as u32,
            glu: up.is_some() as u32,
            rows: t.rows,
            batch: (m as u32).next_power_of_two(),
            lanes: t.lanes,
            wide: wide(x, w, m) as u32,
        };
        let args = [&x_view, &norm_view, &w_view, &up_view, &y_view];
        let grid = [params.n.div_ceil(t.rows), 1, (m > 0) as u32];
        let both = 1 + up.is_some() as u64;
        pass.launch(&MATVEC, consts, params, &args, grid, work(&w_view, &x_view, m, w.k, part.rows * both));
    }
    Ok(())
}

/// Whether rows of x and w start at multiples of 16 bytes and k fills them.
fn wide(x: &Rows, w: &Weight, m: u64) -> bool {
    let aligned = |n: u64| n.is_multiple_of(4);
    aligned(w.k) && (w.k * w.dtype.size()).is_multiple_of(16) && aligned(x.off) && (m <= 1 || aligned(x.stride))
}

/// Operations and bytes of a product `[m, k] x [n, k]^T`.
fn work(w: &View, x: &View, m: u64, k: u64, n: u64) -> u64 {
    (2 * m * n).saturating_mul(k).saturating_add(w.bytes + x.bytes)
}

/// `y = norm(x) w^T`: RMS norm, then product.
/// - x `[m, w.k]` f32 packed, y `m` rows of `w.n` f32
///
/// # Errors
/// As [`linear`].
pub fn norm_linear(caps: &Caps, pass: &mut Pass, x: &View, norm: Norm, w: &Weight, y: &Rows, m: u64) -> Result<()> {
    if tune::fuse(caps) && m <= tune::matvec_most(caps) {
        w.check("w")?;
        need_rows(caps, "y", y, m, w.n)?;
        return matvec(caps, pass, &Rows::packed(x.clone(), w.k), Some(norm), w, None, y, m, false);
    }
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
    let alike = gate.dtype == up.dtype && gate.parts.iter().map(|p| p.rows).eq(up.parts.iter().map(|p| p.rows));
    if tune::fuse(caps) && m <= tune::matvec_most(caps) && alike {
        gate.check("gate")?;
        up.check("up")?;
        let (x, y) = (Rows::packed(x.clone(), gate.k), Rows::packed(y.clone(), gate.n));
        need_rows(caps, "y", &y, m, gate.n)?;
        return matvec(caps, pass, &x, Some(norm), gate, Some(up), &y, m, false);
    }
    let both = Rows::packed(gate_up.clone(), 2 * gate.n);
    norm_linear(caps, pass, x, norm, gate, &both, m)?;
    if m <= tune::matvec_most(caps) && tune::fuse(caps) {
        norm_linear(caps, pass, x, norm, up, &both.at(gate.n), m)?;
    } else {
        let normed = Rows::packed(norm.scratch.clone(), up.k);
        linear(caps, pass, &normed, up, &both.at(gate.n), m, false)?;
    }
    swiglu(caps, pass, gate_up, y, m, gate.n)
}
