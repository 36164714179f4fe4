//! [`crate::kernel::gdn::GATE`]: decay and write strength of each head.

use pulp::Simd;

use super::bind::{Bind, Read, Write};
use super::engine::{Local, Row};
use crate::error::Result;
use crate::kernel::gdn::{GateConsts, GateParams};

/// `g = -exp(A_log) softplus(a + dt_bias)`, `beta = sigmoid(b)`.
#[inline(always)]
pub(super) fn gate(a: f32, b: f32, a_log: f32, dt_bias: f32) -> (f32, f32) {
    let x = a + dt_bias;
    let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
    (-a_log.exp() * softplus, 1.0 / (1.0 + (-b).exp()))
}

/// Tokens that a cell covers.
const BLOCK: usize = 16;

pub(super) struct Gate<'p> {
    params: GateParams,
    /// `[T, stride]`
    ab: Read<'p, f32>,
    /// `[Hv]`
    a_log: Read<'p, f32>,
    dt_bias: Read<'p, f32>,
    /// `[T, Hv]`
    g: Write<'p, f32>,
    beta: Write<'p, f32>,
}

impl<'p> Gate<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (GateConsts, GateParams) = (b.consts()?, b.params()?);
        b.expect("hv", p.hv, p.hv > 0, "at least 1")?;
        b.expect("block", c.block, c.block > 0, "at least 1")?;
        let all = p.tokens as u64 * p.hv as u64;
        b.expect_grid([all.div_ceil(c.block as u64) as usize, 1, 1])?;
        let reach = |off| super::bind::reach(off, p.stride, p.tokens, p.hv);
        Ok(Gate {
            ab: b.read(0, reach(p.a_off).max(reach(p.b_off)))?,
            a_log: b.read(1, p.hv as u64)?,
            dt_bias: b.read(2, p.hv as u64)?,
            g: b.write(3, all)?,
            beta: b.write(4, all)?,
            params: p,
        })
    }
}

impl Row for Gate<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![(self.params.tokens as usize).div_ceil(BLOCK)]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, _: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let (p, hv) = (&self.params, self.params.hv as usize);
        let (a_log, dt_bias) = (self.a_log.all(), self.dt_bias.all());
        for t in cell * BLOCK..((cell + 1) * BLOCK).min(p.tokens as usize) {
            let row = &self.ab.all()[t * p.stride as usize..];
            let (a, b) = (&row[p.a_off as usize..][..hv], &row[p.b_off as usize..][..hv]);
            // SAFETY: these tokens belong to this cell alone.
            let (g, beta) = unsafe { (self.g.part(t * hv, hv), self.beta.part(t * hv, hv)) };
            for h in 0..hv {
                (g[h], beta[h]) = gate(a[h], b[h], a_log[h], dt_bias[h]);
            }
        }
        Ok(())
    }
}
