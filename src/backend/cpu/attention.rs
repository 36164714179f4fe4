//! [`crate::kernel::model::ATTN_PREPARE`] and [`crate::kernel::model::ATTEND_MERGE`]: what stands around attention.

use pulp::Simd;

use super::bind::{Bind, Read, StoredMut, Write};
use super::engine::{Local, Row};
use super::gated_norm::rms_norm;
use super::simd::{fma, narrow, sigmoid, zip};
use crate::error::{Error, Result};
use crate::kernel::model::{ATTN_PREPARE, AttendMergeConsts, AttendMergeParams, AttnPrepareConsts, AttnPrepareParams};

pub(super) struct AttnPrepare<'p> {
    consts: AttnPrepareConsts,
    params: AttnPrepareParams,
    tokens: usize,
    /// `[T, 2 heads D + 2 kv D]`
    qkv: Read<'p, f32>,
    /// `[D]`
    q_norm: Read<'p, f32>,
    k_norm: Read<'p, f32>,
    /// `[T, rot]`
    rope: Read<'p, f32>,
    /// `[T]`
    pos: Read<'p, u32>,
    /// `[T, heads, D]`
    q: Write<'p, f32>,
    /// `[page_len, kv, D]`
    k_cache: StoredMut<'p>,
    v_cache: StoredMut<'p>,
}

impl<'p> AttnPrepare<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (AttnPrepareConsts, AttnPrepareParams) = (b.consts()?, b.params()?);
        let (heads, kv, dim) = (p.heads as u64, p.kv_heads as u64, c.dim as u64);
        b.expect("dim", c.dim, c.dim > 0 && c.dim <= 1 << 12, "1 to 4096")?;
        b.expect("rot", c.rot, c.rot <= c.dim && c.rot % 2 == 0, "an even number, at most dim")?;
        let tokens = b.grid()[1];
        b.expect_grid([(heads + 2 * kv) as usize, tokens, 1])?;
        let t = tokens as u64;
        let dtype = b.dtype("kv_type", c.kv_type)?;
        let page = (p.page_len as u64).saturating_mul(kv).saturating_mul(dim);
        Ok(AttnPrepare {
            tokens,
            qkv: b.read(0, t.saturating_mul((2 * heads + 2 * kv) * dim))?,
            q_norm: b.read(1, dim)?,
            k_norm: b.read(2, dim)?,
            rope: b.read(3, t * c.rot as u64)?,
            pos: b.read(4, t)?,
            q: b.write(5, t.saturating_mul(heads * dim))?,
            k_cache: b.stored_mut(6, dtype, page)?,
            v_cache: b.stored_mut(7, dtype, page)?,
            consts: c,
            params: p,
        })
    }

    /// Rotates the pairs (i, i + rot / 2): `(a, b) -> (a cos - b sin, b cos + a sin)`.
    #[inline(always)]
    fn rotate(&self, t: usize, x: &mut [f32]) {
        let rot = self.consts.rot as usize;
        let (cos, sin) = self.rope.all()[t * rot..][..rot].split_at(rot / 2);
        let (a, b) = x[..rot].split_at_mut(rot / 2);
        for i in 0..rot / 2 {
            (a[i], b[i]) = (a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]);
        }
    }
}

impl Row for AttnPrepare<'_> {
    fn begin(&self) -> Result<()> {
        // Two tokens of one position would write the same place.
        let mut pos = self.pos.all()[..self.tokens].to_vec();
        pos.sort_unstable();
        match pos.windows(2).find(|w| w[0] == w[1]) {
            Some(w) => Err(Error::argument(
                format!("{}: pos", ATTN_PREPARE.name),
                format!("{} twice", w[0]),
                "each position once",
            )),
            None => Ok(()),
        }
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.tokens]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, t: usize, local: &mut Local) -> Result<()> {
        let (p, dim) = (&self.params, self.consts.dim as usize);
        let (heads, kv) = (p.heads as usize, p.kv_heads as usize);
        let row = &self.qkv.all()[t * (2 * heads + 2 * kv) * dim..][..(2 * heads + 2 * kv) * dim];
        // SAFETY: this token belongs to this cell alone.
        let q = unsafe { self.q.part(t * heads * dim, heads * dim) };
        for (h, q) in q.chunks_exact_mut(dim).enumerate() {
            rms_norm(s, &row[2 * h * dim..][..dim], &self.q_norm.all()[..dim], p.eps, q);
            self.rotate(t, q);
        }
        let in_page =
            (self.pos.all()[t] as usize).checked_sub(p.page_start as usize).filter(|&i| i < p.page_len as usize);
        let Some(at) = in_page else { return Ok(()) };
        let k = local.scratch.floats(dim);
        for h in 0..kv {
            rms_norm(s, &row[(2 * heads + h) * dim..][..dim], &self.k_norm.all()[..dim], p.eps, k);
            self.rotate(t, k);
            let v = &row[(2 * heads + kv + h) * dim..][..dim];
            // SAFETY: no other token has this position, as `begin` has checked.
            unsafe {
                narrow(&self.k_cache, (at * kv + h) * dim, k);
                narrow(&self.v_cache, (at * kv + h) * dim, v);
            }
        }
        Ok(())
    }
}

pub(super) struct AttendMerge<'p> {
    dim: usize,
    params: AttendMergeParams,
    tokens: usize,
    /// `[T, heads, slots, D + 2]`
    part: Read<'p, f32>,
    /// `[T, qkv_stride]`
    qkv: Read<'p, f32>,
    /// `[T, heads D]`
    y: Write<'p, f32>,
}

impl<'p> AttendMerge<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (AttendMergeConsts, AttendMergeParams) = (b.consts()?, b.params()?);
        let (heads, dim) = (p.heads as u64, c.dim as u64);
        b.expect("dim", c.dim, c.dim > 0 && c.dim <= 1 << 12, "1 to 4096")?;
        let tokens = b.grid()[1];
        b.expect_grid([p.heads as usize, tokens, 1])?;
        let t = tokens as u64;
        let row = (2 * heads * dim).min(u32::MAX as u64) as u32;
        Ok(AttendMerge {
            dim: c.dim as usize,
            tokens,
            part: b.read(0, (t * heads).saturating_mul(p.slots as u64 * (dim + 2)))?,
            qkv: b.read(1, super::bind::reach(0, p.qkv_stride, tokens as u32, row))?,
            y: b.write(2, t.saturating_mul(heads * dim))?,
            params: p,
        })
    }
}

impl Row for AttendMerge<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.tokens * self.params.heads as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let (p, dim, heads) = (&self.params, self.dim, self.params.heads as usize);
        let (t, h) = (cell / heads, cell % heads);
        let slots = &self.part.all()[cell * p.slots as usize * (dim + 2)..][..p.slots as usize * (dim + 2)];
        let slots = slots.chunks_exact(dim + 2);
        let most = slots.clone().map(|x| x[0]).fold(-3e38, f32::max);
        // SAFETY: this head of this token belongs to this cell alone.
        let y = unsafe { self.y.part(cell * dim, dim) };
        y.fill(0.0);
        let mut sum = 0.0;
        for x in slots {
            let factor = (x[0] - most).exp();
            sum += factor * x[1];
            zip(
                s,
                y,
                &x[2..],
                #[inline(always)]
                |y, x| fma(s, s.splat_f32s(factor), x, y),
            );
        }
        let gate = &self.qkv.all()[t * p.qkv_stride as usize + (2 * h + 1) * dim..][..dim];
        zip(
            s,
            y,
            gate,
            #[inline(always)]
            |y, gate| s.mul_f32s(s.mul_f32s(y, s.splat_f32s(1.0 / sum)), sigmoid(s, gate)),
        );
        Ok(())
    }
}
