//! [`crate::kernel::model::MATVEC`]: products with few rows of x. Everything is about reading w once, in one stream.

use pulp::Simd;

use super::bind::{Bind, Read, Stored, Write, reach};
use super::engine::{Local, Row};
use super::gated_norm::rms_norm;
use super::memory::cut;
use super::weights::{Bf16, F16, F32, Weight, dots, permute};
use crate::error::Result;
use crate::kernel::model::{MatvecConsts, MatvecParams};
use crate::shape::Dtype;

/// Bytes of w in a cell: some microseconds of reading.
const CELL_BYTES: usize = 32 << 10;

pub(super) struct Matvec<'p> {
    consts: MatvecConsts,
    params: MatvecParams,
    /// `[m, x_stride]`
    x: Read<'p, f32>,
    /// `[k]`
    norm: Read<'p, f32>,
    /// `[n, k]`
    w: Stored<'p>,
    up: Stored<'p>,
    /// `[m, y_stride]`
    y: Write<'p, f32>,
    /// Rows of w in a cell.
    rows: usize,
}

impl<'p> Matvec<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (MatvecConsts, MatvecParams) = (b.consts()?, b.params()?);
        b.expect("rows", c.rows, c.rows > 0, "at least 1")?;
        b.expect("m", p.m, (1..=8).contains(&p.m), "1 to 8")?;
        b.expect("k", p.k, p.k > 0, "at least 1")?;
        b.expect("y_stride", p.y_stride, p.m == 1 || p.y_stride >= p.n, "at least n")?;
        b.expect_grid([p.n.div_ceil(c.rows) as usize, 1, 1])?;
        let dtype = b.dtype("w_type", c.w_type)?;
        let all = p.n as u64 * p.k as u64;
        Ok(Matvec {
            x: b.read(0, reach(p.x_off, p.x_stride, p.m, p.k))?,
            norm: b.read(1, if c.norm == 1 { p.k as u64 } else { 0 })?,
            w: b.stored(2, dtype, all)?,
            up: b.stored(3, dtype, if c.glu == 1 { all } else { 0 })?,
            y: b.write(4, reach(p.y_off, p.y_stride, p.m, p.n))?,
            rows: (CELL_BYTES / (p.k as usize * dtype.size() as usize)).clamp(1, 256),
            consts: c,
            params: p,
        })
    }

    /// Puts row `r` of x, normalised if asked, into the order of w.
    #[inline(always)]
    fn order<S: Simd, W: Weight>(&self, s: S, r: usize, local: &mut Local) {
        let (p, k) = (&self.params, self.params.k as usize);
        let x = &self.x.all()[p.x_off as usize + r * p.x_stride as usize..][..k];
        // SAFETY: this row of the shared memory belongs to this cell alone.
        let to = unsafe { local.shared.part(r * k, k) };
        if self.consts.norm == 1 {
            let normed = local.scratch.floats(k);
            rms_norm(s, x, &self.norm.all()[..k], p.eps, normed);
            permute::<S, W>(s, normed, to);
        } else {
            permute::<S, W>(s, x, to);
        }
    }

    #[inline(always)]
    fn rows<S: Simd, W: Weight>(&self, s: S, cell: usize, local: &mut Local) {
        let k = self.params.k as usize;
        // SAFETY: this phase only reads the shared memory.
        let x = unsafe { &*local.shared.part(0, self.params.m as usize * k) };
        let from = cell * self.rows;
        let to = (from + self.rows).min(self.params.n as usize);
        let mut r = 0;
        while r < self.params.m as usize {
            let left = self.params.m as usize - r;
            let x = &x[r * k..];
            r += match left {
                1 => self.some::<S, W, 1>(s, r, from..to, x, local),
                2 | 3 => self.some::<S, W, 2>(s, r, from..to, x, local),
                _ => self.some::<S, W, 4>(s, r, from..to, x, local),
            };
        }
    }

    /// `M` rows of x from row `r`; returns M.
    #[inline(always)]
    fn some<S: Simd, W: Weight, const M: usize>(
        &self,
        s: S,
        r: usize,
        rows: std::ops::Range<usize>,
        x: &[f32],
        local: &mut Local,
    ) -> usize {
        let (p, k) = (&self.params, self.params.k as usize);
        let n = rows.len();
        let rest = &mut local.scratch.floats(M * n);
        let sums = cut(rest, M * n);
        for (j, row) in rows.clone().enumerate() {
            let mut y = dots::<S, W, M>(s, &self.w, row * k, x, k);
            if self.consts.glu == 1 {
                let up = dots::<S, W, M>(s, &self.up, row * k, x, k);
                for (y, up) in y.iter_mut().zip(up) {
                    *y *= up / (1.0 + (-*y).exp());
                }
            }
            for i in 0..M {
                sums[i * n + j] = y[i];
            }
        }
        for (i, sums) in sums.chunks_exact(n).enumerate() {
            let at = p.y_off as usize + (r + i) * p.y_stride as usize + rows.start;
            // SAFETY: these columns of y belong to this cell alone.
            let y = unsafe { self.y.part(at, n) };
            for (y, &sum) in y.iter_mut().zip(sums) {
                *y = if self.consts.add == 1 { *y + sum } else { sum };
            }
        }
        M
    }
}

impl Row for Matvec<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.params.m as usize, (self.params.n as usize).div_ceil(self.rows)]
    }

    fn shared(&self) -> usize {
        self.params.m as usize * self.params.k as usize
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, phase: usize, cell: usize, local: &mut Local) -> Result<()> {
        match (phase, self.w.dtype) {
            (0, Dtype::F32) => self.order::<S, F32>(s, cell, local),
            // Both 16-bit types have the same order.
            (0, _) => self.order::<S, Bf16>(s, cell, local),
            (_, Dtype::F32) => self.rows::<S, F32>(s, cell, local),
            (_, Dtype::F16) => self.rows::<S, F16>(s, cell, local),
            (_, Dtype::Bf16) => self.rows::<S, Bf16>(s, cell, local),
        }
        Ok(())
    }
}
