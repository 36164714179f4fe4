//! [`crate::kernel::gdn::MIX_STEP`]: one decoded token of a mixer, fused.

use pulp::Simd;

use super::bind::{Bind, Read, Write};
use super::engine::{Local, Row};
use super::gate::gate;
use super::gated_norm::gated_norm;
use super::gdn_prepare::check_heads;
use super::gdn_scan::key_head;
use super::gdn_step::{State, Token, normalise};
use super::memory::cut;
use super::table::{Entry, sequences};
use crate::error::Result;
use crate::kernel::gdn::{MIX_STEP, MixStepConsts, MixStepParams};

pub(super) struct MixStep<'p> {
    consts: MixStepConsts,
    params: MixStepParams,
    /// `[T, qkv_stride]`: q, k, v
    qkv: Read<'p, f32>,
    /// `[T, p_stride]`: z, a, b
    proj: Read<'p, f32>,
    /// `[2 Hv + V]`: A_log, dt_bias, norm weight
    small: Read<'p, f32>,
    seqs: Read<'p, Entry>,
    count: usize,
    /// `[slots, Hv, K, V]`
    state: Write<'p, f32>,
    /// `[T, Hv V]`
    y: Write<'p, f32>,
    tokens: usize,
}

impl<'p> MixStep<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (MixStepConsts, MixStepParams) = (b.consts()?, b.params()?);
        check_heads(b, p.hk, p.hv, c.dk, None)?;
        b.expect("dv", c.dv, c.dv > 0 && c.dv <= 256 && c.dv % 16 == 0, "a multiple of 16 to 256")?;
        let count = b.grid()[0];
        b.expect_grid([count, p.hv as usize, 1])?;
        let (qkv, proj, y) = (b.read::<f32>(0, 0)?, b.read::<f32>(1, 0)?, b.write::<f32>(5, 0)?);
        let (wide_v, hv) = ((p.hv * c.dv) as usize, p.hv as usize);
        let tokens = [
            b.rows(0, qkv.all().len(), 0, p.qkv_stride, 2 * (p.hk * c.dk) as usize + wide_v)?,
            b.rows(1, proj.all().len(), p.z_off, p.p_stride, wide_v)?,
            b.rows(1, proj.all().len(), p.a_off, p.p_stride, hv)?,
            b.rows(1, proj.all().len(), p.b_off, p.p_stride, hv)?,
            b.rows(5, y.len(), 0, p.hv * c.dv, wide_v)?,
        ];
        Ok(MixStep {
            qkv,
            proj,
            small: b.read(2, 2 * p.hv as u64 + c.dv as u64)?,
            seqs: b.read(3, count as u64)?,
            count,
            state: b.write(4, 0)?,
            y,
            tokens: tokens.into_iter().min().unwrap_or(0),
            consts: c,
            params: p,
        })
    }
}

impl Row for MixStep<'_> {
    fn begin(&self) -> Result<()> {
        let slots = self.state.len() / (self.params.hv * self.consts.dk * self.consts.dv) as usize;
        sequences(MIX_STEP.name, &self.seqs.all()[..self.count], self.tokens, slots)
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.count * self.params.hv as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, local: &mut Local) -> Result<()> {
        let (p, dk, dv, hv) = (&self.params, self.consts.dk as usize, self.consts.dv as usize, self.params.hv as usize);
        let (h, seq) = (cell % hv, cell / hv);
        let hk = key_head(p.head_map, p.hk, p.hv, h);
        let [first, len, slot, _] = self.seqs.all()[seq].map(|n| n as usize);
        let small = self.small.all();
        let (a_log, dt_bias, weight) = (small[h], small[hv + h], &small[2 * hv..][..dv]);

        let rest = &mut local.scratch.floats(2 * dk + 2 * dv);
        let (k, q) = (cut(rest, dk), cut(rest, dk));
        let (o, read) = (cut(rest, dv), cut(rest, dv));
        // SAFETY: this head of this slot belongs to this cell alone.
        let own = unsafe { self.state.part((slot * hv + h) * dk * dv, dk * dv) };
        let state = State { at: own.as_mut_ptr(), row: dv, dk, columns: dv };
        for t in first..first + len {
            let qkv = &self.qkv.all()[t * p.qkv_stride as usize..];
            let proj = &self.proj.all()[t * p.p_stride as usize..];
            let keys = p.hk as usize * dk;
            q.copy_from_slice(&qkv[hk * dk..][..dk]);
            k.copy_from_slice(&qkv[keys + hk * dk..][..dk]);
            normalise(s, k);
            normalise(s, q);
            let (g, beta) = gate(proj[p.a_off as usize + h], proj[p.b_off as usize + h], a_log, dt_bias);
            let v = &qkv[2 * keys + h * dv..][..dv];
            // SAFETY: the state is this cell's own, as said above.
            unsafe { state.step(s, Token { k, q, v, decay: g.exp(), beta, scale: p.scale }, o, read) }
            // SAFETY: this head of this token belongs to this cell alone.
            let y = unsafe { self.y.part((t * hv + h) * dv, dv) };
            gated_norm(s, o, &proj[p.z_off as usize + h * dv..][..dv], weight, p.eps, y);
        }
        Ok(())
    }
}
