//! [`crate::kernel::gdn::GATED_NORM`] and [`crate::kernel::model::RMS_NORM`].

use pulp::Simd;

use super::bind::{Bind, Read, Write, reach};
use super::engine::{Local, Row};
use super::simd::{dot, sigmoid, zip};
use crate::error::Result;
use crate::kernel::gdn::{GatedNormConsts, GatedNormParams};
use crate::kernel::model::{RmsNormConsts, RmsNormParams};

/// `y = o * rsqrt(mean(o^2) + eps) * w * silu(z)`.
#[inline(always)]
pub(super) fn gated_norm<S: Simd>(s: S, o: &[f32], z: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    rms_norm(s, o, w, eps, y);
    zip(
        s,
        y,
        z,
        #[inline(always)]
        |y, z| s.mul_f32s(y, s.mul_f32s(z, sigmoid(s, z))),
    );
}

/// `y = x * rsqrt(mean(x^2) + eps) * w`.
#[inline(always)]
pub(super) fn rms_norm<S: Simd>(s: S, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let r = s.splat_f32s(1.0 / (dot(s, x, x) / x.len() as f32 + eps).sqrt());
    y.copy_from_slice(x);
    zip(
        s,
        y,
        w,
        #[inline(always)]
        |y, w| s.mul_f32s(s.mul_f32s(y, r), w),
    );
}

pub(super) struct GatedNorm<'p> {
    dv: usize,
    params: GatedNormParams,
    /// `[T, Hv, V]`
    o: Read<'p, f32>,
    /// `[T, z_stride]`
    z: Read<'p, f32>,
    /// `[V]`
    w: Read<'p, f32>,
    /// `[T, Hv, V]`
    y: Write<'p, f32>,
}

impl<'p> GatedNorm<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (GatedNormConsts, GatedNormParams) = (b.consts()?, b.params()?);
        b.expect("dv", c.dv, c.dv > 0 && c.dv as u64 * p.hv as u64 <= u32::MAX as u64, "1 to 2^32 / hv")?;
        b.expect_grid([p.hv as usize, p.tokens as usize, 1])?;
        let all = p.tokens as u64 * p.hv as u64 * c.dv as u64;
        Ok(GatedNorm {
            dv: c.dv as usize,
            o: b.read(0, all)?,
            z: b.read(1, reach(p.z_off, p.z_stride, p.tokens, p.hv * c.dv))?,
            w: b.read(2, c.dv as u64)?,
            y: b.write(3, all)?,
            params: p,
        })
    }
}

impl Row for GatedNorm<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.params.tokens as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, t: usize, _: &mut Local) -> Result<()> {
        let (p, dv) = (&self.params, self.dv);
        for h in 0..p.hv as usize {
            let at = (t * p.hv as usize + h) * dv;
            let z = p.z_off as usize + t * p.z_stride as usize + h * dv;
            // SAFETY: this token belongs to this cell alone.
            let y = unsafe { self.y.part(at, dv) };
            gated_norm(s, &self.o.all()[at..][..dv], &self.z.all()[z..][..dv], &self.w.all()[..dv], p.eps, y);
        }
        Ok(())
    }
}

pub(super) struct RmsNorm<'p> {
    params: RmsNormParams,
    rows: usize,
    /// `[*, dim]`
    x: Read<'p, f32>,
    /// `[dim]`
    w: Read<'p, f32>,
    /// `[rows, dim]`
    y: Write<'p, f32>,
}

impl<'p> RmsNorm<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (_, p): (RmsNormConsts, RmsNormParams) = (b.consts()?, b.params()?);
        let rows = b.grid()[0];
        b.expect("dim", p.dim, p.dim > 0, "at least 1")?;
        b.expect_grid([rows, 1, 1])?;
        Ok(RmsNorm {
            rows,
            x: b.read(0, (p.row0 as u64 + rows as u64) * p.dim as u64)?,
            w: b.read(1, p.dim as u64)?,
            y: b.write(2, rows as u64 * p.dim as u64)?,
            params: p,
        })
    }
}

impl Row for RmsNorm<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.rows]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, row: usize, _: &mut Local) -> Result<()> {
        let dim = self.params.dim as usize;
        let x = &self.x.all()[(self.params.row0 as usize + row) * dim..][..dim];
        // SAFETY: this row belongs to this cell alone.
        let y = unsafe { self.y.part(row * dim, dim) };
        rms_norm(s, x, &self.w.all()[..dim], self.params.eps, y);
        Ok(())
    }
}
