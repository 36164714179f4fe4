//! [`crate::kernel::grad::SUM_ROWS`]: what the cells of a gradient have left, added up.

use pulp::Simd;

use super::bind::{Bind, Read, Write, reach};
use super::engine::{Local, Row};
use super::simd::zip;
use crate::error::Result;
use crate::kernel::grad::{SumRowsConsts, SumRowsParams};

/// Columns of a cell.
const WIDE: usize = 256;

pub(super) struct SumRows<'p> {
    params: SumRowsParams,
    /// `[rows, x_stride]`
    x: Read<'p, f32>,
    /// `[n]`
    y: Write<'p, f32>,
}

impl<'p> SumRows<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (SumRowsConsts, SumRowsParams) = (b.consts()?, b.params()?);
        b.expect("columns", c.columns, c.columns > 0, "at least 1")?;
        b.expect_grid([p.n.div_ceil(c.columns) as usize, 1, 1])?;
        Ok(SumRows { x: b.read(0, reach(p.x_off, p.x_stride, p.rows, p.n))?, y: b.write(1, p.n as u64)?, params: p })
    }
}

impl Row for SumRows<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![(self.params.n as usize).div_ceil(WIDE)]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let (p, from) = (&self.params, cell * WIDE);
        let n = (p.n as usize - from).min(WIDE);
        // SAFETY: these columns belong to this cell alone.
        let y = unsafe { self.y.part(from, n) };
        y.fill(0.0);
        for r in 0..p.rows as usize {
            let x = &self.x.all()[p.x_off as usize + r * p.x_stride as usize + from..][..n];
            zip(
                s,
                y,
                x,
                #[inline(always)]
                |y, x| s.add_f32s(y, x),
            );
        }
        Ok(())
    }
}
