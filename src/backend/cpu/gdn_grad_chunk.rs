//! [`crate::kernel::gdn_grad::GRAD_CHUNK`] and [`crate::kernel::gdn_grad::GRAD_GATES`]: the gradients inside a chunk.

use pulp::Simd;

use super::bind::{Bind, Read, Stored, StoredMut, Write};
use super::engine::{Local, Row};
use super::gdn_grad_scan::check_chunk;
use super::gdn_prepare::{check_heads, chunk_length, ws_size};
use super::gdn_scan::saved_size;
use super::memory::cut;
use super::product::{Left, WIDTH, pack, product};
use super::simd::{dot, narrow, store, widen, zip};
use super::table::{Entry, runs};
use crate::error::Result;
use crate::kernel::gdn_grad::{
    GRAD_CHUNK, GRAD_GATES, GradChunkConsts, GradChunkParams, GradGatesConsts, GradGatesParams,
};

pub(super) struct GradChunk<'p> {
    consts: GradChunkConsts,
    params: GradChunkParams,
    /// v, d_o `[window, *]`
    v: Stored<'p>,
    d_o: Stored<'p>,
    /// `[chunks, Hv, 5 C C + 9 C]`
    ws: Write<'p, f32>,
    /// `[chunks, Hv, K V + 2 C V]`
    saved: Read<'p, f32>,
    dsaved: Read<'p, f32>,
    table: Read<'p, Entry>,
    chunks: usize,
    /// `[window, *]`
    dv: StoredMut<'p>,
    /// Tokens that v, d_o and dv all hold.
    tokens: usize,
}

impl<'p> GradChunk<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (GradChunkConsts, GradChunkParams) = (b.consts()?, b.params()?);
        check_heads(b, 1, p.hv, c.dk, None)?;
        b.expect("dv", c.dv, c.dv > 0 && c.dv <= 256 && c.dv % 16 == 0, "a multiple of 16 to 256")?;
        check_chunk(b, c.chunk)?;
        let chunks = b.grid()[0];
        b.expect_grid([chunks, p.hv as usize, 1])?;
        let ty = b.dtype("v_type", c.v_type)?;
        let (v, d_o, dv) = (b.stored(0, ty, 0)?, b.stored(1, ty, 0)?, b.stored_mut(6, ty, 0)?);
        let width = (p.hv * c.dv) as usize;
        let tokens = [
            b.rows(0, v.len, p.v_off, p.v_stride, width)?,
            b.rows(1, d_o.len, p.do_off, p.do_stride, width)?,
            b.rows(6, dv.len, p.dv_off, p.dv_stride, width)?,
        ];
        let chunk_heads = chunks as u64 * p.hv as u64;
        Ok(GradChunk {
            v,
            d_o,
            ws: b.write(2, chunk_heads * ws_size(c.chunk, true) as u64)?,
            saved: b.read(3, chunk_heads * saved_size(c.chunk, c.dk, c.dv) as u64)?,
            dsaved: b.read(4, chunk_heads * saved_size(c.chunk, c.dk, c.dv) as u64)?,
            table: b.read(5, chunks as u64)?,
            chunks,
            dv,
            tokens: tokens.into_iter().min().unwrap_or(0),
            consts: c,
            params: p,
        })
    }
}

/// Checks chunks of which no two may cover the same tokens: their rows are written.
pub(super) fn check_table(kernel: &str, table: &[Entry], most: u32, tokens: usize) -> Result<()> {
    table.iter().enumerate().try_for_each(|(i, e)| chunk_length(i, e, most))?;
    runs(kernel, "chunks", table, tokens)
}

impl Row for GradChunk<'_> {
    fn begin(&self) -> Result<()> {
        check_table(GRAD_CHUNK.name, &self.table.all()[..self.chunks], self.consts.chunk, self.tokens)
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.chunks * self.params.hv as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, local: &mut Local) -> Result<()> {
        let (p, c, dv) = (&self.params, self.consts.chunk as usize, self.consts.dv as usize);
        let (chunk, h) = (cell / p.hv as usize, cell % p.hv as usize);
        let [first, len, ..] = self.table.all()[chunk].map(|n| n as usize);
        let at = cell * saved_size(self.consts.chunk, self.consts.dk, self.consts.dv) + self.consts.dk as usize * dv;
        // U, N, X: [C, V]
        let (u, n) = self.saved.all()[at..][..2 * c * dv].split_at(c * dv);
        let x = &self.dsaved.all()[at..][..c * dv];
        // SAFETY: the scratch of this chunk and head belongs to this cell alone.
        let ws = unsafe { self.ws.part(cell * ws_size(self.consts.chunk, true), ws_size(self.consts.chunk, true)) };

        let rest = &mut local.scratch.floats(len * dv + WIDTH * dv + 2 * c * c + 2 * c + dv);
        let d_o = cut(rest, len * dv);
        let panel = cut(rest, WIDTH * dv);
        let (dp, dl) = (cut(rest, c * c), cut(rest, c * c));
        let (e, ones) = (cut(rest, c), cut(rest, c));
        ones.fill(1.0);
        for t in 0..len {
            let at = p.do_off as usize + (first + t) * p.do_stride as usize + h * dv;
            widen(&self.d_o, at, &mut d_o[t * dv..][..dv]);
        }

        // dO N^T and X N^T: [len, len], of which the lower triangles are used
        for from in (0..len).step_by(WIDTH) {
            pack(&n[from * dv..], dv, (len - from).min(WIDTH), dv, panel);
            for (left, to) in [(&*d_o, &mut *dp), (x, &mut *dl)] {
                let left = Left { ptr: left[from * dv..].as_ptr(), row: dv, col: 1 };
                let to = to[from * c + from..].as_mut_ptr();
                // SAFETY: A has len - from rows of dv numbers, the panel dv rows of 16, and row i of the result has 16
                // numbers from column `from` on, as c is a multiple of 16.
                unsafe {
                    product(
                        s,
                        len - from,
                        |_| dv,
                        left,
                        panel.as_ptr(),
                        WIDTH,
                        #[inline(always)]
                        |i, j, v| store(s, to.add(i * c + j), v),
                    )
                }
            }
        }

        let (pp, ws) = ws[c * c..].split_at_mut(c * c);
        let (gates, ws) = ws[4 * c + c * c..].split_at_mut(c * c);
        let (r, vectors) = ws.split_at_mut(c * c);
        let (factors, sums) = vectors.split_at_mut(3 * c);
        let (rk, rq, beta) = (&factors[..c], &factors[c..2 * c], &factors[2 * c..]);
        let (dc, dbeta) = sums.split_at_mut(c);
        let dbeta = &mut dbeta[..c];
        dc.fill(0.0);
        dbeta.fill(0.0);
        for i in 0..len {
            // dL = -strictlower(X N^T)      E = dP o P + diag(beta) R o dL
            let (dp, dl) = (&mut dp[i * c..][..i + 1], &mut dl[i * c..][..i + 1]);
            dl[i] = 0.0;
            let (p_row, r_row, g_row) = (&mut pp[i * c..][..i + 1], &mut r[i * c..][..i + 1], &gates[i * c..][..i + 1]);
            let e = &mut e[..i + 1];
            for j in 0..i + 1 {
                dl[j] = -dl[j];
                e[j] = dp[j] * p_row[j] + beta[i] * r_row[j] * dl[j];
            }
            dbeta[i] = dot(s, dl, r_row);
            let sum = dot(s, e, ones);
            zip(
                s,
                dc,
                e,
                #[inline(always)]
                |dc, e| s.sub_f32s(dc, e),
            );
            dc[i] += sum;
            // P <- s rq_i rk_j G_ij dP_ij      D = beta_i rk_i rk_j G_ij dL_ij
            let (scale_p, scale_d) = (p.scale * rq[i], beta[i] * rk[i]);
            for j in 0..i + 1 {
                let g = g_row[j] * rk[j];
                p_row[j] = scale_p * g * dp[j];
                r_row[j] = scale_d * g * dl[j];
            }
        }
        // R <- D + D^T
        for i in 0..len {
            for j in 0..i {
                r[j * c + i] = r[i * c + j];
            }
        }

        let row = cut(rest, dv);
        for t in 0..len {
            let (x, u) = (&x[t * dv..][..dv], &u[t * dv..][..dv]);
            // dbeta += X . (V - U)      dc -= beta X . U
            widen(&self.v, p.v_off as usize + (first + t) * p.v_stride as usize + h * dv, row);
            zip(
                s,
                row,
                u,
                #[inline(always)]
                |v, u| s.sub_f32s(v, u),
            );
            dbeta[t] += dot(s, x, row);
            dc[t] -= beta[t] * dot(s, x, u);
            // dv = beta o X
            for (out, x) in row.iter_mut().zip(x) {
                *out = beta[t] * x;
            }
            // SAFETY: this head of this token belongs to this cell alone.
            unsafe { narrow(&self.dv, p.dv_off as usize + (first + t) * p.dv_stride as usize + h * dv, row) }
        }
        Ok(())
    }
}

pub(super) struct GradGates<'p> {
    consts: GradGatesConsts,
    params: GradGatesParams,
    /// `[chunks, Hv, 5 C C + 9 C]`
    ws: Read<'p, f32>,
    table: Read<'p, Entry>,
    chunks: usize,
    /// `[window, Hv]`
    dg: Write<'p, f32>,
    dbeta: Write<'p, f32>,
    tokens: usize,
}

impl<'p> GradGates<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (GradGatesConsts, GradGatesParams) = (b.consts()?, b.params()?);
        check_heads(b, 1, p.hv, 16, None)?;
        check_chunk(b, c.chunk)?;
        let chunks = b.grid()[0];
        b.expect_grid([chunks, p.hv.div_ceil(crate::tune::CELL_THREADS) as usize, 1])?;
        let (dg, dbeta) = (b.write::<f32>(2, 0)?, b.write::<f32>(3, 0)?);
        let hv = p.hv as usize;
        let tokens = b.rows(2, dg.len(), p.g_off, p.hv, hv)?.min(b.rows(3, dbeta.len(), p.g_off, p.hv, hv)?);
        Ok(GradGates {
            ws: b.read(0, chunks as u64 * p.hv as u64 * ws_size(c.chunk, true) as u64)?,
            table: b.read(1, chunks as u64)?,
            chunks,
            dg,
            dbeta,
            tokens,
            consts: c,
            params: p,
        })
    }
}

impl Row for GradGates<'_> {
    fn begin(&self) -> Result<()> {
        check_table(GRAD_GATES.name, &self.table.all()[..self.chunks], self.consts.chunk, self.tokens)
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.chunks]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, _: S, _: usize, chunk: usize, _: &mut Local) -> Result<()> {
        let (c, hv) = (self.consts.chunk as usize, self.params.hv as usize);
        let [first, len, ..] = self.table.all()[chunk].map(|n| n as usize);
        let size = ws_size(self.consts.chunk, true);
        let at = self.params.g_off as usize + first * hv;
        // SAFETY: the tokens of a chunk belong to its cell alone.
        let (dg, dbeta) = unsafe { (self.dg.part(at, len * hv), self.dbeta.part(at, len * hv)) };
        for h in 0..hv {
            // .., dc [C], dbeta [C]
            let sums = &self.ws.all()[(chunk * hv + h) * size + size - 2 * c..][..2 * c];
            let mut sum = 0.0;
            for t in (0..len).rev() {
                sum += sums[t];
                dg[t * hv + h] = sum;
                dbeta[t * hv + h] = sums[c + t];
            }
        }
        Ok(())
    }
}
