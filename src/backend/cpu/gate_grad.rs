//! [`crate::kernel::grad::GATE_GRAD`]: gradients of decay and write strength.

use pulp::Simd;

use super::bind::{Bind, Read, Write, reach};
use super::engine::{Local, Row};
use super::gate::gate;
use crate::error::Result;
use crate::kernel::grad::{GateGradConsts, GateGradParams};

pub(super) struct GateGrad<'p> {
    params: GateGradParams,
    /// Rows of part.
    cells: usize,
    /// `[T, stride]`
    ab: Read<'p, f32>,
    /// `[Hv]`
    a_log: Read<'p, f32>,
    dt_bias: Read<'p, f32>,
    /// `[T, Hv]`
    dg: Read<'p, f32>,
    dbeta: Read<'p, f32>,
    /// `[T, d_stride]`
    dab: Write<'p, f32>,
    /// `[cells, 2 Hv]`
    part: Write<'p, f32>,
}

impl<'p> GateGrad<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (GateGradConsts, GateGradParams) = (b.consts()?, b.params()?);
        b.expect("hv", p.hv, p.hv > 0, "at least 1")?;
        b.expect("lanes", c.lanes, c.lanes > 0, "at least 1")?;
        b.expect("block", p.block, p.block > 0, "at least 1")?;
        let cells = p.tokens.div_ceil(p.block).max(1) as usize;
        b.expect_grid([p.hv.div_ceil(c.lanes) as usize, cells, 1])?;
        // Rows of da and db lie apart: cells write them at the same time.
        let end = p.da_off.max(p.db_off) as u64 + p.hv as u64;
        let apart = p.da_off.abs_diff(p.db_off) >= p.hv && end <= p.da_off.min(p.db_off) as u64 + p.d_stride as u64;
        b.expect("d_stride", p.d_stride, apart || p.tokens < 2, "room for da and db side by side")?;
        let all = p.tokens as u64 * p.hv as u64;
        let ab = |off| reach(off, p.stride, p.tokens, p.hv);
        let dab = |off| reach(off, p.d_stride, p.tokens, p.hv);
        Ok(GateGrad {
            cells,
            ab: b.read(0, ab(p.a_off).max(ab(p.b_off)))?,
            a_log: b.read(1, p.hv as u64)?,
            dt_bias: b.read(2, p.hv as u64)?,
            dg: b.read(3, all)?,
            dbeta: b.read(4, all)?,
            dab: b.write(5, dab(p.da_off).max(dab(p.db_off)))?,
            part: b.write(6, cells as u64 * 2 * p.hv as u64)?,
            params: p,
        })
    }
}

impl Row for GateGrad<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.cells]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, _: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let (p, hv) = (&self.params, self.params.hv as usize);
        let (a_log, dt_bias) = (&self.a_log.all()[..hv], &self.dt_bias.all()[..hv]);
        // SAFETY: this row belongs to this cell alone.
        let part = unsafe { self.part.part(cell * 2 * hv, 2 * hv) };
        part.fill(0.0);
        let (da_log, ddt_bias) = part.split_at_mut(hv);
        let block = p.block as usize;
        for t in cell * block..(cell * block + block).min(p.tokens as usize) {
            let row = &self.ab.all()[t * p.stride as usize..];
            let (a, b) = (&row[p.a_off as usize..][..hv], &row[p.b_off as usize..][..hv]);
            let (dg, dbeta) = (&self.dg.all()[t * hv..][..hv], &self.dbeta.all()[t * hv..][..hv]);
            for h in 0..hv {
                let (g, beta) = gate(a[h], b[h], a_log[h], dt_bias[h]);
                // Above 20, where softplus is the identity, sigmoid is 1.
                let da = -a_log[h].exp() * sigmoid(a[h] + dt_bias[h]) * dg[h];
                da_log[h] += dg[h] * g;
                ddt_bias[h] += da;
                let at = |off: u32| off as usize + t * p.d_stride as usize + h;
                // SAFETY: this token belongs to this cell alone.
                unsafe {
                    self.dab.part(at(p.da_off), 1)[0] = da;
                    // 1 - beta would lose the digits of a small difference.
                    self.dab.part(at(p.db_off), 1)[0] = beta * sigmoid(-b[h]) * dbeta[h];
                }
            }
        }
        Ok(())
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
