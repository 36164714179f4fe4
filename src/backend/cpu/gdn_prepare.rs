//! [`crate::kernel::gdn::PREPARE`]: what a chunk needs that does not depend on the state.

use pulp::Simd;

use super::bind::{Bind, Read, Stored, Write};
use super::engine::{Local, Row};
use super::memory::cut;
use super::product::{Left, WIDTH, pack, product};
use super::simd::{dot, exp, map, store, widen};
use super::table::{Entry, runs};
use crate::error::Result;
use crate::kernel::gdn::{PREPARE, PrepareConsts, PrepareParams};
use crate::plan::{grad_scratch_per_chunk_head, scratch_per_chunk_head};

pub(super) struct Prepare<'p> {
    consts: PrepareConsts,
    params: PrepareParams,
    /// q, k `[window, *]`
    q: Stored<'p>,
    k: Stored<'p>,
    /// g, beta `[window, Hv]`
    g: Read<'p, f32>,
    beta: Read<'p, f32>,
    /// `[chunks]` of (first token, tokens, ..)
    table: Read<'p, Entry>,
    chunks: usize,
    /// Tokens that q, k, g and beta all hold.
    tokens: usize,
    /// `[chunks, Hv, 2 C C + 4 C]`, with grad `[chunks, Hv, 5 C C + 9 C]`
    ws: Write<'p, f32>,
}

/// The largest `beta |rk k|^2` of a token that counts as one that makes no state longer.
const LONGEST_STEP: f32 = 2.0 + 1e-5;

/// Numbers of scratch per chunk and value head.
pub(super) fn ws_size(chunk: u32, grad: bool) -> usize {
    let bytes = if grad { grad_scratch_per_chunk_head(chunk) } else { scratch_per_chunk_head(chunk) };
    bytes as usize / 4
}

impl<'p> Prepare<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (PrepareConsts, PrepareParams) = (b.consts()?, b.params()?);
        check_heads(b, p.hk, p.hv, c.dk, Some(c.group))?;
        b.expect("chunk", c.chunk, c.chunk > 0 && c.chunk <= 256 && c.chunk % 16 == 0, "a multiple of 16 to 256")?;
        let [chunks, hk, one] = b.grid();
        b.expect_grid([chunks, p.hk as usize, 1])?;
        debug_assert!(hk == p.hk as usize && one == 1);
        let dtype = b.dtype("qk_type", c.qk_type)?;
        let (q, k) = (b.stored(0, dtype, 0)?, b.stored(1, dtype, 0)?);
        let (g, beta) = (b.read::<f32>(2, 0)?, b.read::<f32>(3, 0)?);
        let width = (p.hk * c.dk) as usize;
        let tokens = [
            b.rows(0, q.len, p.q_off, p.q_stride, width)?,
            b.rows(1, k.len, p.k_off, p.k_stride, width)?,
            b.rows(2, g.all().len(), p.g_off, p.hv, p.hv as usize)?,
            b.rows(3, beta.all().len(), p.g_off, p.hv, p.hv as usize)?,
        ];
        b.expect("grad", c.grad, c.grad <= 1, "0 or 1")?;
        let ws = b.write(5, chunks as u64 * p.hv as u64 * ws_size(c.chunk, c.grad == 1) as u64)?;
        Ok(Prepare {
            q,
            k,
            g,
            beta,
            table: b.read(4, chunks as u64)?,
            chunks,
            tokens: tokens.into_iter().min().unwrap_or(0),
            ws,
            consts: c,
            params: p,
        })
    }
}

/// Checks what every row of the operator says about heads.
pub(super) fn check_heads(b: &Bind, hk: u32, hv: u32, dk: u32, group: Option<u32>) -> Result<()> {
    b.expect("hk", hk, hk > 0 && hk <= 1 << 16, "1 to 65536")?;
    b.expect("hv", hv, hv > 0 && hv <= 1 << 16 && hv % hk == 0, "a multiple of hk, at most 65536")?;
    b.expect("dk", dk, dk > 0 && dk <= 256 && dk % 16 == 0, "a multiple of 16 to 256")?;
    b.expect("group", group.unwrap_or(hv / hk), group.is_none_or(|g| g == hv / hk), "hv / hk")
}

/// Value head `j` of the group that reads key head `head`, of `hk` key heads and `hv` value heads.
pub(super) fn value_head(head_map: u32, hk: u32, hv: usize, head: usize, j: usize) -> usize {
    if head_map == 0 { head * (hv / hk as usize) + j } else { j * hk as usize + head }
}

impl Row for Prepare<'_> {
    fn begin(&self) -> Result<()> {
        let table = &self.table.all()[..self.chunks];
        for (i, e) in table.iter().enumerate() {
            chunk_length(i, e, self.consts.chunk)?;
        }
        // Several chunks may cover the same tokens: each writes scratch of its own.
        table.iter().try_for_each(|e| runs(PREPARE.name, "chunks", std::slice::from_ref(e), self.tokens))
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.chunks * self.params.hk as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, local: &mut Local) -> Result<()> {
        let (p, c, dk) = (&self.params, self.consts.chunk as usize, self.consts.dk as usize);
        let (chunk, hk) = (cell / p.hk as usize, cell % p.hk as usize);
        let [first, len, ..] = self.table.all()[chunk].map(|n| n as usize);
        let panels = len.div_ceil(WIDTH);

        let rest = &mut local.scratch.floats(2 * len * dk + panels * WIDTH * dk + 2 * c * c + 5 * c);
        let rows = cut(rest, 2 * len * dk);
        let packed = cut(rest, panels * WIDTH * dk);
        let kk = cut(rest, c * c);
        let qk = cut(rest, c * c);
        let (rk, rq) = (cut(rest, c), cut(rest, c));

        // K, then Q, as f32: [2 len, K]
        let (k_rows, q_rows) = rows.split_at_mut(len * dk);
        for t in 0..len {
            let at = |off: u32, stride: u32| off as usize + (first + t) * stride as usize + hk * dk;
            widen(&self.k, at(p.k_off, p.k_stride), &mut k_rows[t * dk..][..dk]);
            widen(&self.q, at(p.q_off, p.q_stride), &mut q_rows[t * dk..][..dk]);
            (rk[t], rq[t]) = (1.0, 1.0);
            if self.consts.l2norm == 1 {
                rk[t] = inverse_norm(s, &k_rows[t * dk..][..dk]);
                rq[t] = inverse_norm(s, &q_rows[t * dk..][..dk]);
            }
        }

        // [K; Q] K^T: [2 len, len], of which the lower triangles are used
        for j in 0..panels {
            let from = j * WIDTH;
            let panel = &mut packed[j * WIDTH * dk..][..WIDTH * dk];
            pack(&k_rows[from * dk..], dk, (len - from).min(WIDTH), dk, panel);
            let rows_below = len - from;
            for (x, to) in [(&*k_rows, &mut *kk), (&*q_rows, &mut *qk)] {
                let a = Left { ptr: x[from * dk..].as_ptr(), row: dk, col: 1 };
                let to = to[from * c + from..].as_mut_ptr();
                // SAFETY: A has rows_below rows of dk numbers, the panel dk rows of 16, and row i of the result has 16
                // numbers from column `from` on, as c is a multiple of 16.
                unsafe {
                    product(
                        s,
                        rows_below,
                        |_| dk,
                        a,
                        panel.as_ptr(),
                        WIDTH,
                        #[inline(always)]
                        |i, j, v| store(s, to.add(i * c + j), v),
                    )
                }
            }
        }

        let size = ws_size(self.consts.chunk, self.consts.grad == 1);
        for j in 0..(p.hv / p.hk) as usize {
            let h = value_head(p.head_map, p.hk, p.hv as usize, hk, j);
            // SAFETY: this part belongs to (chunk, h), and h to this key head alone.
            let ws = unsafe { self.ws.part((chunk * p.hv as usize + h) * size, size) };
            self.head(s, first, len, h, Products { kk, qk, rk, rq }, ws, rest);
        }
        Ok(())
    }
}

/// `1 / sqrt(sum of squares + 1e-6)`.
#[inline(always)]
pub(super) fn inverse_norm<S: Simd>(s: S, x: &[f32]) -> f32 {
    1.0 / (dot(s, x, x) + 1e-6).sqrt()
}

/// What the heads of a group share.
#[derive(Clone, Copy)]
struct Products<'a> {
    /// K K^T and Q K^T, `[C, C]`, lower triangles
    kk: &'a [f32],
    qk: &'a [f32],
    /// inverse norms, `[C]`
    rk: &'a [f32],
    rq: &'a [f32],
}

impl Prepare<'_> {
    /// A, P and the vectors of one value head.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn head<S: Simd>(&self, s: S, first: usize, len: usize, h: usize, x: Products, ws: &mut [f32], row: &mut [f32]) {
        let (p, c) = (&self.params, self.consts.chunk as usize);
        let vectors_at = 5 * c * c + 4 * c;
        if self.consts.grad == 1 {
            let vectors = &mut ws[vectors_at..];
            vectors.fill(0.0);
            vectors[..len].copy_from_slice(&x.rk[..len]);
            vectors[c..][..len].copy_from_slice(&x.rq[..len]);
            for t in 0..len {
                vectors[2 * c + t] = self.beta.all()[p.g_off as usize + (first + t) * p.hv as usize + h];
            }
        }
        let (mut sums, mut beta) = ([0f64; 256], [0f32; 256]);
        let mut sum = 0.0;
        for t in 0..len {
            let at = p.g_off as usize + (first + t) * p.hv as usize + h;
            let g = self.g.all()[at];
            // Comparing this way keeps a NaN.
            sum += if g < -1e4 { -1e4 } else { g as f64 };
            (sums[t], beta[t]) = (sum, self.beta.all()[at]);
        }

        let (ws, mut grad) = ws.split_at_mut(2 * c * c + 4 * c);
        let (a, rest) = ws.split_at_mut(c * c);
        let (pp, vectors) = rest.split_at_mut(c * c);
        let mut grad = match self.consts.grad {
            1 => Some([(); 3].map(|()| cut(&mut grad, c * c))),
            _ => None,
        };
        a[len * c..].fill(0.0);
        pp[len * c..].fill(0.0);
        vectors.fill(0.0);
        let decay = &mut row[..c];
        for i in 0..len {
            // G_ij = exp(c_i - c_j), masked before exp: above the diagonal exp gives 0
            let wide = (i + 1).next_multiple_of(WIDTH).min(c);
            for (j, d) in decay[..wide].iter_mut().enumerate() {
                *d = if j <= i { (sums[i] - sums[j]) as f32 } else { -1000.0 };
            }
            map(
                s,
                &mut decay[..wide],
                #[inline(always)]
                |v| exp(s, v),
            );
            let (kk, qk) = (&x.kk[i * c..][..wide], &x.qk[i * c..][..wide]);
            let (scale_a, scale_p) = (beta[i] * x.rk[i], p.scale * x.rq[i]);
            let (a, pp) = (&mut a[i * c..][..c], &mut pp[i * c..][..c]);
            for j in 0..i + 1 {
                let g = decay[j] * x.rk[j];
                a[j] = scale_a * g * kk[j];
                pp[j] = scale_p * g * qk[j];
            }
            if let Some([_, gates, r]) = &mut grad {
                gates[i * c..][..wide].copy_from_slice(&decay[..wide]);
                gates[i * c + wide..][..c - wide].fill(0.0);
                let r = &mut r[i * c..][..c];
                for j in 0..i {
                    r[j] = x.rk[i] * decay[j] * x.rk[j] * kk[j];
                }
                r[i..].fill(0.0);
            }
            a[i..].fill(0.0);
            pp[i + 1..].fill(0.0);
        }
        invert(s, a, len, c);
        if let Some([b, gates, r]) = grad {
            b.copy_from_slice(a);
            gates[len * c..].fill(0.0);
            r[len * c..].fill(0.0);
        }
        for i in 0..len {
            for (a, b) in a[i * c..][..i + 1].iter_mut().zip(&beta) {
                *a *= b;
            }
        }

        // No token makes a state longer; a little over 2 is what rounding makes of 2. NaN fails.
        let step = |t: usize| beta[t] * x.rk[t] * x.rk[t] * x.kk[t * c + t];
        let contracts = (0..len).all(|t| (0.0..=LONGEST_STEP).contains(&step(t)));
        let last = if len == 0 { 0.0 } else { sums[len - 1] };
        for t in 0..len {
            let gamma = sums[t] as f32;
            (vectors[t], vectors[c + t]) = (gamma, gamma);
            vectors[2 * c + t] = (last - sums[t]) as f32;
        }
        vectors[3 * c] = last as f32;
        for part in vectors.chunks_mut(c).take(3) {
            map(
                s,
                &mut part[..len],
                #[inline(always)]
                |v| exp(s, v),
            );
        }
        map(
            s,
            &mut vectors[3 * c..3 * c + 1],
            #[inline(always)]
            |v| exp(s, v),
        );
        vectors[3 * c + 1] = if contracts { 1.0 } else { 0.0 };
        for t in 0..len {
            vectors[t] *= x.rk[t];
            vectors[c + t] *= p.scale * x.rq[t];
            vectors[2 * c + t] *= x.rk[t];
        }
    }
}

/// `L <- (I + L)^-1` for a strictly lower triangular L of `n` rows, `c` numbers apart, by forward substitution:
/// `X_i = e_i - sum_{j < i} L_ij X_j`.
#[inline(always)]
fn invert<S: Simd>(s: S, l: &mut [f32], n: usize, c: usize) {
    let mut row = [0f32; 256];
    for i in 0..n {
        let (above, own) = l.split_at_mut(i * c);
        let own = &mut own[..c];
        row[..i].copy_from_slice(&own[..i]);
        own[..i].fill(0.0);
        for j in 0..i {
            let factor = s.splat_f32s(-row[j]);
            super::simd::zip(
                s,
                &mut own[..j + 1],
                &above[j * c..][..j + 1],
                #[inline(always)]
                |o, x| super::simd::fma(s, factor, x, o),
            );
        }
        own[i] = 1.0;
    }
}

/// Refuses a chunk of no tokens or of more than C.
pub(super) fn chunk_length(i: usize, e: &Entry, chunk: u32) -> Result<()> {
    if e[1] > 0 && e[1] <= chunk {
        return Ok(());
    }
    Err(crate::Error::argument(format!("chunks[{i}] tokens"), e[1], format!("1 to {chunk}")))
}
