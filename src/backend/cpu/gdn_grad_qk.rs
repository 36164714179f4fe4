//! [`crate::kernel::gdn_grad::GRAD_QK`]: the gradients of q and k of a chunk.
//!
//! Everything is kept transposed, 16 tokens a vector panel: then the states, which are the large operands, are read row by row
//! as they lie, and all that has to be packed is `[C, V]`.

use pulp::Simd;

use super::bind::{Bind, Read, Stored, StoredMut, Write};
use super::engine::{Local, Row};
use super::gdn_grad_chunk::check_table;
use super::gdn_grad_scan::check_chunk;
use super::gdn_prepare::{check_heads, value_head, ws_size};
use super::gdn_scan::saved_size;
use super::memory::cut;
use super::product::{Left, WIDTH, pack, product};
use super::simd::{dot, fma, load, narrow, store, widen};
use super::table::Entry;
use crate::error::Result;
use crate::kernel::gdn_grad::{GRAD_QK, GradQkConsts, GradQkParams};

pub(super) struct GradQk<'p> {
    consts: GradQkConsts,
    params: GradQkParams,
    /// q, k `[window, *]`
    q: Stored<'p>,
    k: Stored<'p>,
    /// `[chunks, Hv, 5 C C + 9 C]`
    ws: Write<'p, f32>,
    /// `[chunks, Hv, K V + 2 C V]`
    saved: Read<'p, f32>,
    dsaved: Read<'p, f32>,
    table: Read<'p, Entry>,
    chunks: usize,
    /// dq, dk `[window, *]`
    dq: StoredMut<'p>,
    dk: StoredMut<'p>,
    /// Tokens that q, k, dq and dk all hold.
    tokens: usize,
}

impl<'p> GradQk<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (GradQkConsts, GradQkParams) = (b.consts()?, b.params()?);
        check_heads(b, p.hk, p.hv, c.dk, Some(c.group))?;
        b.expect("dv", c.dv, c.dv > 0 && c.dv <= 256 && c.dv % 16 == 0, "a multiple of 16 to 256")?;
        check_chunk(b, c.chunk)?;
        let chunks = b.grid()[0];
        b.expect_grid([chunks, p.hk as usize, 1])?;
        let ty = b.dtype("qk_type", c.qk_type)?;
        let (q, k) = (b.stored(0, ty, 0)?, b.stored(1, ty, 0)?);
        let (dq, dk) = (b.stored_mut(6, ty, 0)?, b.stored_mut(7, ty, 0)?);
        let width = (p.hk * c.dk) as usize;
        let tokens = [
            b.rows(0, q.len, p.q_off, p.q_stride, width)?,
            b.rows(1, k.len, p.k_off, p.k_stride, width)?,
            b.rows(6, dq.len, p.dq_off, p.dq_stride, width)?,
            b.rows(7, dk.len, p.dk_off, p.dk_stride, width)?,
        ];
        let chunk_heads = chunks as u64 * p.hv as u64;
        Ok(GradQk {
            q,
            k,
            ws: b.write(2, chunk_heads * ws_size(c.chunk, true) as u64)?,
            saved: b.read(3, chunk_heads * saved_size(c.chunk, c.dk, c.dv) as u64)?,
            dsaved: b.read(4, chunk_heads * saved_size(c.chunk, c.dk, c.dv) as u64)?,
            table: b.read(5, chunks as u64)?,
            chunks,
            dq,
            dk,
            tokens: tokens.into_iter().min().unwrap_or(0),
            consts: c,
            params: p,
        })
    }
}

impl Row for GradQk<'_> {
    fn begin(&self) -> Result<()> {
        check_table(GRAD_QK.name, &self.table.all()[..self.chunks], self.consts.chunk, self.tokens)
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.chunks * self.params.hk as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, local: &mut Local) -> Result<()> {
        let (p, c) = (&self.params, self.consts.chunk as usize);
        let (dk, dv, hv) = (self.consts.dk as usize, self.consts.dv as usize, p.hv as usize);
        let (chunk, hk) = (cell / p.hk as usize, cell % p.hk as usize);
        let [first, len, ..] = self.table.all()[chunk].map(|n| n as usize);
        let panels = len.div_ceil(WIDTH);

        let room = 2 * len * dk + 4 * panels * WIDTH * dk + 3 * WIDTH * dv + WIDTH * c;
        let rest = &mut local.scratch.floats(room);
        let (k_rows, q_rows) = (cut(rest, len * dk), cut(rest, len * dk)); // [len, K]
        let k_panels = cut(rest, panels * WIDTH * dk); // K^T: [panels][K, 16]
        let q_panels = cut(rest, panels * WIDTH * dk);
        let a = cut(rest, panels * WIDTH * dk); // dK^T, dQ^T: [panels][K, 16]
        let b = cut(rest, panels * WIDTH * dk);
        let work = (cut(rest, 3 * WIDTH * dv), cut(rest, WIDTH * c));
        a.fill(0.0);
        b.fill(0.0);
        for t in 0..len {
            let at = |off: u32, stride: u32| off as usize + (first + t) * stride as usize + hk * dk;
            widen(&self.k, at(p.k_off, p.k_stride), &mut k_rows[t * dk..][..dk]);
            widen(&self.q, at(p.q_off, p.q_stride), &mut q_rows[t * dk..][..dk]);
        }
        for j in 0..panels {
            let (from, n, part) = (j * WIDTH, (len - j * WIDTH).min(WIDTH), j * WIDTH * dk..(j + 1) * WIDTH * dk);
            pack(&k_rows[from * dk..], dk, n, dk, &mut k_panels[part.clone()]);
            pack(&q_rows[from * dk..], dk, n, dk, &mut q_panels[part]);
        }

        let size = ws_size(self.consts.chunk, true);
        for member in 0..hv / p.hk as usize {
            let h = value_head(p.head_map, p.hk, hv, hk, member);
            // SAFETY: the scratch of this chunk and head, and head to this key head, belongs to this cell alone.
            let ws = unsafe { self.ws.part((chunk * hv + h) * size, size) };
            let saved = saved_size(self.consts.chunk, self.consts.dk, self.consts.dv);
            let saved = (chunk * hv + h) * saved..(chunk * hv + h + 1) * saved;
            let (saved, dsaved) = (&self.saved.all()[saved.clone()], &self.dsaved.all()[saved]);
            let head = Head { s, c, len, dk, dv, k_rows, q_rows, k_panels, q_panels, saved, dsaved };
            head.add(ws, a, b, &mut *work.0, &mut *work.1);
        }

        // The norms are those of the key head: every value head has the same.
        let h = value_head(p.head_map, p.hk, hv, hk, 0);
        let at = (chunk * hv + h) * size + 5 * c * c + 4 * c;
        // SAFETY: as above.
        let norms = unsafe { self.ws.peek(at, 2 * c) };
        for j in 0..panels {
            let part = j * WIDTH * dk..(j + 1) * WIDTH * dk;
            let ins = [(&k_panels[part.clone()], &mut a[part.clone()]), (&q_panels[part.clone()], &mut b[part])];
            for (which, (x, grad)) in ins.into_iter().enumerate() {
                if self.consts.l2norm == 1 {
                    project(s, x, grad, &norms[which * c + j * WIDTH..][..WIDTH]);
                }
                let (to, off, stride) =
                    if which == 0 { (&self.dk, p.dk_off, p.dk_stride) } else { (&self.dq, p.dq_off, p.dq_stride) };
                let row = &mut work.0[..dk];
                for t in 0..(len - j * WIDTH).min(WIDTH) {
                    for (i, x) in row.iter_mut().enumerate() {
                        *x = grad[i * WIDTH + t];
                    }
                    let token = first + j * WIDTH + t;
                    // SAFETY: this head of this token belongs to this cell alone.
                    unsafe { narrow(to, off as usize + token * stride as usize + hk * dk, row) }
                }
            }
        }
        Ok(())
    }
}

/// `grad <- grad - r^2 x (x . grad)` for 16 tokens: x, grad `[K, 16]`, r `[16]`.
#[inline(always)]
fn project<S: Simd>(s: S, x: &[f32], grad: &mut [f32], r: &[f32]) {
    for lane in (0..WIDTH).step_by(S::F32_LANES) {
        let rows = x.len() / WIDTH;
        let mut sum = s.splat_f32s(0.0);
        // SAFETY: every row of x and grad has 16 numbers, and so has r.
        unsafe {
            for i in 0..rows {
                let at = i * WIDTH + lane;
                sum = fma(s, load(s, x.as_ptr().add(at)), load(s, grad.as_ptr().add(at)), sum);
            }
            let r = load(s, r.as_ptr().add(lane));
            let factor = s.neg_f32s(s.mul_f32s(s.mul_f32s(r, r), sum));
            for i in 0..rows {
                let at = grad.as_mut_ptr().add(i * WIDTH + lane);
                store(s, at, fma(s, factor, load(s, x.as_ptr().add(i * WIDTH + lane)), load(s, at)));
            }
        }
    }
}

/// One value head of a chunk.
struct Head<'a, S> {
    s: S,
    c: usize,
    len: usize,
    dk: usize,
    dv: usize,
    /// `[len, K]`
    k_rows: &'a [f32],
    q_rows: &'a [f32],
    /// `[panels][K, 16]`
    k_panels: &'a [f32],
    q_panels: &'a [f32],
    /// S `[K, V]`, U, N `[C, V]`
    saved: &'a [f32],
    /// dS' `[K, V]`, X, Z `[C, V]`
    dsaved: &'a [f32],
}

impl<S: Simd> Head<'_, S> {
    /// Adds this head's share to `a` and `b` `[panels][K, 16]` and completes its dc; `vs` holds three `[V, 16]`, `cs` one
    /// `[C, 16]`.
    #[inline(always)]
    fn add(&self, ws: &mut [f32], a: &mut [f32], b: &mut [f32], vs: &mut [f32], cs: &mut [f32]) {
        let Head { s, c, len, dk, dv, k_rows, q_rows, k_panels, q_panels, saved, dsaved } = *self;
        let (state, un) = saved.split_at(dk * dv);
        let (d_state, xz) = dsaved.split_at(dk * dv);
        let (n, (x, z)) = (&un[c * dv..], xz.split_at(c * dv));
        let (p, rest) = ws[c * c..].split_at_mut(c * c);
        let (vectors, rest) = rest.split_at_mut(4 * c);
        let (u, decay, gamma) = (&vectors[..c], &vectors[2 * c..3 * c], vectors[3 * c]);
        let (r, rest) = rest[2 * c * c..].split_at_mut(c * c);
        let (factors, dc) = rest.split_at_mut(3 * c);
        let (beta, dc) = (&factors[2 * c..], &mut dc[..c]);
        let (n_panel, rest) = vs.split_at_mut(WIDTH * dv);
        let (x_panel, z_panel) = rest.split_at_mut(WIDTH * dv);

        // gamma_C <dS', S>
        let mut last = gamma * dot(s, d_state, state);
        for from in (0..len).step_by(WIDTH) {
            let count = (len - from).min(WIDTH);
            pack(&z[from * dv..], dv, count, dv, z_panel);
            pack(&n[from * dv..], dv, count, dv, n_panel);
            pack(&x[from * dv..], dv, count, dv, x_panel);
            let (mut by_n, mut by_x) = ([0f32; WIDTH], [0f32; WIDTH]);
            by_n[..count].copy_from_slice(&decay[from..from + count]);
            for t in 0..count {
                by_x[t] = -u[from + t] * beta[from + t];
            }
            let part = from * dk..(from + WIDTH) * dk;
            let (a, b) = (a[part.clone()].as_mut_ptr(), b[part.clone()].as_mut_ptr());
            let (k_panel, q_panel) = (k_panels[part.clone()].as_ptr(), q_panels[part].as_ptr());
            let (mut q_dot, mut k_dot) = ([0f32; WIDTH], [0f32; WIDTH]);
            let (q_sum, k_sum) = (q_dot.as_mut_ptr(), k_dot.as_mut_ptr());
            // SAFETY: states have dk rows of dv numbers, panels of v dv rows of 16, panels of k and the sums dk rows of 16.
            unsafe {
                // b += S Z^T        q . b
                let left = Left { ptr: state.as_ptr(), row: dv, col: 1 };
                product(
                    s,
                    dk,
                    |_| dv,
                    left,
                    z_panel.as_ptr(),
                    WIDTH,
                    #[inline(always)]
                    |i, j, v| {
                        let to = b.add(i * WIDTH + j);
                        store(s, to, s.add_f32s(load(s, to), v));
                        let sum = q_sum.add(j);
                        store(s, sum, fma(s, load(s, q_panel.add(i * WIDTH + j)), v, load(s, sum)));
                    },
                );
                // a -= S (u o beta o X)^T
                product(
                    s,
                    dk,
                    |_| dv,
                    left,
                    x_panel.as_ptr(),
                    WIDTH,
                    #[inline(always)]
                    |i, j, v| {
                        let to = a.add(i * WIDTH + j);
                        store(s, to, fma(s, load(s, by_x.as_ptr().add(j)), v, load(s, to)));
                    },
                );
                // a += dS' (n o N)^T       k . that
                let left = Left { ptr: d_state.as_ptr(), row: dv, col: 1 };
                product(
                    s,
                    dk,
                    |_| dv,
                    left,
                    n_panel.as_ptr(),
                    WIDTH,
                    #[inline(always)]
                    |i, j, v| {
                        let v = s.mul_f32s(load(s, by_n.as_ptr().add(j)), v);
                        let to = a.add(i * WIDTH + j);
                        store(s, to, s.add_f32s(load(s, to), v));
                        let sum = k_sum.add(j);
                        store(s, sum, fma(s, load(s, k_panel.add(i * WIDTH + j)), v, load(s, sum)));
                    },
                );
            }
            for t in 0..count {
                dc[from + t] += q_dot[t] - k_dot[t];
                last += k_dot[t];
            }

            let add = |to: *mut f32| {
                #[inline(always)]
                move |i: usize, j: usize, v: S::f32s| {
                    // SAFETY: the sums have dk rows of 16.
                    unsafe {
                        let to = to.add(i * WIDTH + j);
                        store(s, to, s.add_f32s(load(s, to), v));
                    }
                }
            };
            let depth = len.min(from + WIDTH);
            pack(&p[from * c..], c, count, depth, cs);
            // SAFETY: K and Q have len rows of dk numbers; P and R len rows with 16 numbers from column `from` on.
            unsafe {
                let keys = Left { ptr: k_rows.as_ptr(), row: 1, col: dk };
                // b += K^T P^T, P lower triangular
                product(s, dk, |_| depth, keys, cs.as_ptr(), WIDTH, add(b));
                // a += Q^T P
                let queries = Left { ptr: q_rows[from * dk..].as_ptr(), row: 1, col: dk };
                product(s, dk, |_| len - from, queries, p[from * c + from..].as_ptr(), c, add(a));
                // a += K^T R, R symmetric
                product(s, dk, |_| len, keys, r[from..].as_ptr(), c, add(a));
            }
        }
        dc[len - 1] += last;
    }
}
