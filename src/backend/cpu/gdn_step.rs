//! [`crate::kernel::gdn::STEP`]: the recurrence, token by token.

use pulp::Simd;

use super::bind::{Bind, Read, Stored, StoredMut, Write};
use super::engine::{Local, Row};
use super::gdn_prepare::{check_heads, inverse_norm};
use super::gdn_scan::{check_columns, key_head};
use super::memory::cut;
use super::simd::{dot, fma, load, map, narrow, store, widen, zip};
use super::table::{Entry, sequences};
use crate::error::Result;
use crate::kernel::gdn::{STEP, StepConsts, StepParams};

pub(super) struct Step<'p> {
    consts: StepConsts,
    params: StepParams,
    /// q, k, v, o `[T, *]`
    q: Stored<'p>,
    k: Stored<'p>,
    v: Stored<'p>,
    /// g, beta `[T, Hv]`
    g: Read<'p, f32>,
    beta: Read<'p, f32>,
    /// `[N]` of (first token, tokens, state slot, 0)
    seqs: Read<'p, Entry>,
    count: usize,
    /// `[slots, Hv, K, V]`
    state: Write<'p, f32>,
    slots: usize,
    o: StoredMut<'p>,
    tokens: usize,
}

impl<'p> Step<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (StepConsts, StepParams) = (b.consts()?, b.params()?);
        check_heads(b, p.hk, p.hv, c.dk, None)?;
        check_columns(b, p.dv, c.dv_tile)?;
        let count = b.grid()[0];
        b.expect_grid([count, p.hv as usize, (p.dv / c.dv_tile) as usize])?;
        let (qk, vo) = (b.dtype("qk_type", c.qk_type)?, b.dtype("v_type", c.v_type)?);
        let (q, k) = (b.stored(0, qk, 0)?, b.stored(1, qk, 0)?);
        let (v, o) = (b.stored(2, vo, 0)?, b.stored_mut(7, vo, 0)?);
        let (g, beta) = (b.read::<f32>(3, 0)?, b.read::<f32>(4, 0)?);
        let (wide_k, wide_v) = ((p.hk * c.dk) as usize, (p.hv * p.dv) as usize);
        let tokens = [
            b.rows(0, q.len, p.q_off, p.q_stride, wide_k)?,
            b.rows(1, k.len, p.k_off, p.k_stride, wide_k)?,
            b.rows(2, v.len, p.v_off, p.v_stride, wide_v)?,
            b.rows(7, o.len, p.o_off, p.o_stride, wide_v)?,
            b.rows(3, g.all().len(), p.g_off, p.hv, p.hv as usize)?,
            b.rows(4, beta.all().len(), p.g_off, p.hv, p.hv as usize)?,
        ];
        let state = b.write::<f32>(6, 0)?;
        Ok(Step {
            slots: state.len() / (p.hv as usize * c.dk as usize * p.dv as usize),
            q,
            k,
            v,
            g,
            beta,
            seqs: b.read(5, count as u64)?,
            count,
            state,
            o,
            tokens: tokens.into_iter().min().unwrap_or(0),
            consts: c,
            params: p,
        })
    }
}

impl Row for Step<'_> {
    fn begin(&self) -> Result<()> {
        sequences(STEP.name, &self.seqs.all()[..self.count], self.tokens, self.slots)
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.count * self.params.hv as usize * (self.params.dv / self.consts.dv_tile) as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, local: &mut Local) -> Result<()> {
        let (p, dk) = (&self.params, self.consts.dk as usize);
        let (dv, tile, hv) = (p.dv as usize, self.consts.dv_tile as usize, p.hv as usize);
        let (column, rest) = (cell % (dv / tile) * tile, cell / (dv / tile));
        let (h, seq) = (rest % hv, rest / hv);
        let hk = key_head(p.head_map, p.hk, p.hv, h);
        let [first, len, slot, _] = self.seqs.all()[seq].map(|n| n as usize);

        let rest = &mut local.scratch.floats(2 * dk + 3 * tile + dk * tile);
        let (k, q) = (cut(rest, dk), cut(rest, dk));
        let (v, o, read) = (cut(rest, tile), cut(rest, tile), cut(rest, tile));
        let copy = cut(rest, dk * tile);

        let start = (slot * hv + h) * dk * dv + column;
        let mut state = State { at: self.state.at(start, (dk - 1) * dv + tile), row: dv, dk, columns: tile };
        if self.consts.store == 0 {
            for i in 0..dk {
                // SAFETY: without `store` nothing writes the state.
                copy[i * tile..][..tile].copy_from_slice(unsafe { self.state.peek(start + i * dv, tile) });
            }
            state = State { at: copy.as_mut_ptr(), row: tile, ..state };
        }
        for t in first..first + len {
            let at = |off: u32, stride: u32, i: usize| off as usize + t * stride as usize + i;
            widen(&self.k, at(p.k_off, p.k_stride, hk * dk), k);
            widen(&self.q, at(p.q_off, p.q_stride, hk * dk), q);
            widen(&self.v, at(p.v_off, p.v_stride, h * dv + column), v);
            if self.consts.l2norm == 1 {
                normalise(s, k);
                normalise(s, q);
            }
            let g = self.g.all()[at(p.g_off, p.hv, h)];
            let beta = self.beta.all()[at(p.g_off, p.hv, h)];
            // SAFETY: only this cell touches these columns of this head of this slot, or its copy of them.
            unsafe { state.step(s, Token { k, q, v, decay: g.exp(), beta, scale: p.scale }, o, read) }
            // SAFETY: these columns of this token belong to this cell alone.
            unsafe { narrow(&self.o, at(p.o_off, p.o_stride, h * dv + column), o) }
        }
        Ok(())
    }
}

/// `x / sqrt(sum of squares + 1e-6)`.
#[inline(always)]
pub(super) fn normalise<S: Simd>(s: S, x: &mut [f32]) {
    let r = s.splat_f32s(inverse_norm(s, x));
    map(
        s,
        x,
        #[inline(always)]
        |x| s.mul_f32s(x, r),
    );
}

/// Some columns of the state of one head: `[K, columns]`, rows `row` numbers apart.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub at: *mut f32,
    pub row: usize,
    pub dk: usize,
    pub columns: usize,
}

/// What one token brings to one head.
#[derive(Clone, Copy)]
pub(super) struct Token<'a> {
    /// [K]
    pub k: &'a [f32],
    pub q: &'a [f32],
    /// [columns]
    pub v: &'a [f32],
    /// exp(g)
    pub decay: f32,
    pub beta: f32,
    pub scale: f32,
}

impl State {
    /// One step of the recurrence; the state is read once, then read and written once.
    ///
    /// ```text
    /// d = beta (v - a S^T k)     o = s (a S^T q + (k q) d)     S <- a S + k d^T     with a = exp(g)
    /// ```
    ///
    /// # Safety
    /// `at` points to `dk` rows of `columns` numbers that nothing else refers to; `columns` is a multiple of 16 and `dk`
    /// of 4.
    #[inline(always)]
    pub unsafe fn step<S: Simd>(self, s: S, x: Token, o: &mut [f32], read: &mut [f32]) {
        let (decay, kq) = (s.splat_f32s(x.decay), dot(s, x.k, x.q));
        // read = S^T k        o = S^T q
        let (o, read) = (&mut o[..self.columns], &mut read[..self.columns]);
        o.fill(0.0);
        read.fill(0.0);
        for i in (0..self.dk).step_by(4) {
            let (mut k, mut q) = ([decay; 4], [decay; 4]);
            for r in 0..4 {
                (k[r], q[r]) = (s.splat_f32s(x.k[i + r]), s.splat_f32s(x.q[i + r]));
            }
            for j in (0..self.columns).step_by(S::F32_LANES) {
                // SAFETY: rows i to i + 3 are among dk, and j and the lanes after it are columns.
                unsafe {
                    let (to_k, to_q) = (read.as_mut_ptr().add(j), o.as_mut_ptr().add(j));
                    let (mut sum_k, mut sum_q) = (load(s, to_k), load(s, to_q));
                    for r in 0..4 {
                        let state = load(s, self.at.add((i + r) * self.row + j));
                        sum_k = fma(s, k[r], state, sum_k);
                        sum_q = fma(s, q[r], state, sum_q);
                    }
                    store(s, to_k, sum_k);
                    store(s, to_q, sum_q);
                }
            }
        }
        // d (in `read`)
        zip(
            s,
            read,
            x.v,
            #[inline(always)]
            |r, v| s.mul_f32s(s.splat_f32s(x.beta), s.sub_f32s(v, s.mul_f32s(decay, r))),
        );
        // o
        let (scale, kq) = (s.splat_f32s(x.scale), s.splat_f32s(kq));
        zip(
            s,
            o,
            read,
            #[inline(always)]
            |o, d| s.mul_f32s(scale, fma(s, kq, d, s.mul_f32s(decay, o))),
        );
        // S
        for i in 0..self.dk {
            // SAFETY: row i is among dk.
            let row = unsafe { std::slice::from_raw_parts_mut(self.at.add(i * self.row), self.columns) };
            let k = s.splat_f32s(x.k[i]);
            zip(
                s,
                row,
                read,
                #[inline(always)]
                |state, d| fma(s, k, d, s.mul_f32s(decay, state)),
            );
        }
    }
}
