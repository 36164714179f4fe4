//! [`crate::kernel::grad::GATED_NORM_GRAD`]: gradients of the gated norm.

use pulp::Simd;

use super::bind::{Bind, Read, Write, reach};
use super::engine::{Local, Row};
use super::memory::cut;
use super::simd::{dot, map, sigmoid, silu_slope};
use crate::error::Result;
use crate::kernel::grad::{GatedNormGradConsts, GatedNormGradParams};

pub(super) struct GatedNormGrad<'p> {
    dv: usize,
    params: GatedNormGradParams,
    /// Rows of part.
    cells: usize,
    /// `[T, Hv, V]`
    o: Read<'p, f32>,
    /// `[T, z_stride]`
    z: Read<'p, f32>,
    /// `[V]`
    w: Read<'p, f32>,
    /// `[T, Hv, V]`
    dy: Read<'p, f32>,
    d_o: Write<'p, f32>,
    /// `[T, dz_stride]`
    dz: Write<'p, f32>,
    /// `[cells, V]`
    part: Write<'p, f32>,
}

impl<'p> GatedNormGrad<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (GatedNormGradConsts, GatedNormGradParams) = (b.consts()?, b.params()?);
        b.expect("dv", c.dv, c.dv > 0 && c.dv as u64 * p.hv as u64 <= u32::MAX as u64, "1 to 2^32 / hv")?;
        b.expect("block", p.block, p.block > 0, "at least 1")?;
        let heads = p.tokens as u64 * p.hv as u64;
        let cells = heads.div_ceil(p.block as u64).max(1) as usize;
        b.expect_grid([cells, 1, 1])?;
        let row = p.hv * c.dv;
        b.expect("dz_stride", p.dz_stride, p.dz_stride >= row || p.tokens < 2, "at least hv dv")?;
        let all = heads * c.dv as u64;
        Ok(GatedNormGrad {
            dv: c.dv as usize,
            cells,
            o: b.read(0, all)?,
            z: b.read(1, reach(p.z_off, p.z_stride, p.tokens, row))?,
            w: b.read(2, c.dv as u64)?,
            dy: b.read(3, all)?,
            d_o: b.write(4, all)?,
            dz: b.write(5, reach(p.dz_off, p.dz_stride, p.tokens, row))?,
            part: b.write(6, cells as u64 * c.dv as u64)?,
            params: p,
        })
    }
}

impl Row for GatedNormGrad<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.cells]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, local: &mut Local) -> Result<()> {
        let (p, dv, hv) = (&self.params, self.dv, self.params.hv as usize);
        let w = &self.w.all()[..dv];
        let mut rest = local.scratch.floats(2 * dv);
        let (gate, u) = (cut(&mut rest, dv), cut(&mut rest, dv));
        // SAFETY: this row belongs to this cell alone.
        let dw = unsafe { self.part.part(cell * dv, dv) };
        dw.fill(0.0);
        let block = p.block as usize;
        for row in cell * block..(cell * block + block).min(p.tokens as usize * hv) {
            let (t, h) = (row / hv, row % hv);
            let (o, dy) = (&self.o.all()[row * dv..][..dv], &self.dy.all()[row * dv..][..dv]);
            let z = &self.z.all()[p.z_off as usize + t * p.z_stride as usize + h * dv..][..dv];
            // SAFETY: this head belongs to this cell alone.
            let (d_o, dz) = unsafe {
                let dz = p.dz_off as usize + t * p.dz_stride as usize + h * dv;
                (self.d_o.part(row * dv, dv), self.dz.part(dz, dv))
            };
            // gate = silu(z), dz = silu'(z)
            gate.copy_from_slice(z);
            map(
                s,
                gate,
                #[inline(always)]
                |z| s.mul_f32s(z, sigmoid(s, z)),
            );
            dz.copy_from_slice(z);
            map(
                s,
                dz,
                #[inline(always)]
                |z| silu_slope(s, z),
            );
            // u = dy w silu(z)
            for i in 0..dv {
                u[i] = dy[i] * w[i] * gate[i];
            }
            let r = 1.0 / (dot(s, o, o) / dv as f32 + p.eps).sqrt();
            let pull = r * r * dot(s, o, u) / dv as f32;
            for i in 0..dv {
                let x = o[i] * r;
                d_o[i] = r * (u[i] - pull * o[i]);
                dz[i] *= dy[i] * w[i] * x;
                dw[i] += dy[i] * gate[i] * x;
            }
        }
        Ok(())
    }
}
