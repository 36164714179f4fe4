//! [`crate::kernel::gdn_grad::GRAD_SCAN`]: carries the gradient of the state over the chunks of a segment, last to first.
//!
//! As in the forward scan a cell takes 16 columns at a time within a chunk, all of whose panels stay in the first-level cache.

use pulp::Simd;

use super::bind::{Bind, Read, Stored, Write};
use super::engine::{Local, Row};
use super::gdn_prepare::{check_heads, ws_size};
use super::gdn_scan::{
    Bounds, Columns, FROM_ZERO, Walk, begin, check_columns, check_walks, key_head, saved_size, table_rows,
};
use super::memory::cut;
use super::product::{Left, WIDTH, product, product_upper};
use super::simd::{fma, load, store, widen};
use super::table::Entry;
use crate::error::Result;
use crate::kernel::gdn_grad::{GRAD_SCAN, GradScanConsts, GradScanParams};

pub(super) struct GradScan<'p> {
    consts: GradScanConsts,
    params: GradScanParams,
    /// q, k, d_o `[window, *]`
    q: Stored<'p>,
    k: Stored<'p>,
    d_o: Stored<'p>,
    /// `[chunks, Hv, 5 C C + 9 C]`
    ws: Read<'p, f32>,
    chunks: Read<'p, Entry>,
    /// `[segments]` or `[segments, Hv]`
    segments: Read<'p, Entry>,
    /// Segments in the launch.
    count: usize,
    /// `[slots, Hv, K, V]`
    dstate: Write<'p, f32>,
    /// `[chunks, Hv, K V + 2 C V]`
    dsaved: Write<'p, f32>,
    /// Tokens that q, k and d_o all hold.
    tokens: usize,
}

impl<'p> GradScan<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (GradScanConsts, GradScanParams) = (b.consts()?, b.params()?);
        check_heads(b, p.hk, p.hv, c.dk, None)?;
        check_columns(b, p.dv, c.dv_tile)?;
        check_chunk(b, c.chunk)?;
        b.expect("walk", c.walk, c.walk <= FROM_ZERO, "0, 1 or 2")?;
        let count = b.grid()[0];
        b.expect_grid([count, p.hv as usize, (p.dv / c.dv_tile) as usize])?;
        let (qk, vo) = (b.dtype("qk_type", c.qk_type)?, b.dtype("v_type", c.v_type)?);
        let (q, k, d_o) = (b.stored(0, qk, 0)?, b.stored(1, qk, 0)?, b.stored(2, vo, 0)?);
        let tokens = [
            b.rows(0, q.len, p.q_off, p.q_stride, (p.hk * c.dk) as usize)?,
            b.rows(1, k.len, p.k_off, p.k_stride, (p.hk * c.dk) as usize)?,
            b.rows(2, d_o.len, p.do_off, p.do_stride, (p.hv * p.dv) as usize)?,
        ];
        Ok(GradScan {
            q,
            k,
            d_o,
            ws: b.read(3, 0)?,
            chunks: b.read(4, 0)?,
            segments: b.read(5, table_rows(c.walk, count, p.hv))?,
            count,
            dstate: b.write(6, 0)?,
            dsaved: b.write(7, 0)?,
            tokens: tokens.into_iter().min().unwrap_or(0),
            consts: c,
            params: p,
        })
    }
}

/// Checks the length of a chunk.
pub(super) fn check_chunk(b: &Bind, chunk: u32) -> Result<()> {
    b.expect("chunk", chunk, chunk > 0 && chunk <= 256 && chunk % 16 == 0, "a multiple of 16 to 256")
}

impl Row for GradScan<'_> {
    fn begin(&self) -> Result<()> {
        let (c, p) = (&self.consts, &self.params);
        let hv = p.hv as usize;
        let chunks = self.chunks.all();
        let mut limit = chunks.len().min(self.ws.all().len() / (ws_size(c.chunk, true) * hv));
        if c.walk != FROM_ZERO {
            limit = limit.min(self.dsaved.len() / (saved_size(c.chunk, c.dk, p.dv) * hv));
        }
        let slots = self.dstate.len() / (hv * c.dk as usize * p.dv as usize);
        let segments = &self.segments.all()[..table_rows(c.walk, self.count, p.hv) as usize];
        let bounds = Bounds { slots, most: c.chunk, tokens: self.tokens };
        check_walks(GRAD_SCAN.name, segments, c.walk, hv, &chunks[..limit], bounds)
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.count * self.params.hv as usize * (self.params.dv / self.consts.dv_tile) as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, local: &mut Local) -> Result<()> {
        let (p, c, dk) = (&self.params, self.consts.chunk as usize, self.consts.dk as usize);
        let (dv, tile, hv) = (p.dv as usize, self.consts.dv_tile as usize, p.hv as usize);
        // Tiles of a head run one after the other, so that its k and q are still in the cache.
        let (column, rest) = (cell % (dv / tile) * tile, cell / (dv / tile));
        let (h, segment) = (rest % hv, rest / hv);
        let hk = key_head(p.head_map, p.hk, p.hv, h);
        let Some(walk) = Walk::of(self.segments.all(), self.consts.walk, hv, segment, h) else { return Ok(()) };
        let Walk { first_chunk, chunks, start, to } = walk;

        let rest = &mut local.scratch.floats(dk * tile + 2 * c * dk + c * tile + 5 * c * WIDTH);
        let panels = cut(rest, dk * tile); // dS: [tile / 16][K, 16]
        let rows = cut(rest, 2 * c * dk); // K, then Q: [2 len, K]
        let d_o = cut(rest, c * tile); // dO: [len, tile]
        let (d_n, yz) = (cut(rest, c * WIDTH), cut(rest, 2 * c * WIDTH));
        let dropped = cut(rest, 2 * c * WIDTH); // X and Z where they are not saved

        let columns = |slot: usize| Columns { first: (slot * hv + h) * dk * dv + column, dk, dv, tile };
        // SAFETY: these columns of this head of the slots of this walk belong to this cell alone.
        unsafe { begin(start, columns, column, &self.dstate, panels) };

        let size = ws_size(self.consts.chunk, true);
        for chunk in (first_chunk..first_chunk + chunks).rev() {
            let [first, len, ..] = self.chunks.all()[chunk].map(|n| n as usize);
            for t in 0..len {
                let at = |off: u32, stride: u32, i: usize| off as usize + (first + t) * stride as usize + i;
                widen(&self.k, at(p.k_off, p.k_stride, hk * dk), &mut rows[t * dk..][..dk]);
                widen(&self.q, at(p.q_off, p.q_stride, hk * dk), &mut rows[(len + t) * dk..][..dk]);
                widen(&self.d_o, at(p.do_off, p.do_stride, h * dv + column), &mut d_o[t * tile..][..tile]);
            }
            let ws = &self.ws.all()[(chunk * hv + h) * size..][..size];
            let dsaved = (chunk * hv + h) * saved_size(self.consts.chunk, self.consts.dk, p.dv) + column;
            for j in 0..tile / WIDTH {
                let panel = &mut panels[j * dk * WIDTH..][..dk * WIDTH];
                let chunk = Chunk { s, c, len, dk, tile, rows, ws };
                if self.consts.walk == FROM_ZERO {
                    let xz = dropped.as_mut_ptr();
                    // SAFETY: 2 C rows of 16 numbers of this thread.
                    unsafe { chunk.panel(panel, &d_o[j * WIDTH..], d_n, yz, xz, WIDTH) }
                    continue;
                }
                let at = dsaved + j * WIDTH;
                for (i, row) in panel.chunks_exact(WIDTH).enumerate() {
                    // SAFETY: these columns of this chunk and head belong to this cell alone.
                    unsafe { self.dsaved.part(at + i * dv, WIDTH) }.copy_from_slice(row);
                }
                let xz = at + dk * dv;
                for row in (len..c).flat_map(|t| [xz + t * dv, xz + (c + t) * dv]) {
                    // SAFETY: as above.
                    unsafe { self.dsaved.part(row, WIDTH) }.fill(0.0);
                }
                let xz = self.dsaved.at(xz, (2 * c - 1) * dv + WIDTH);
                // SAFETY: rows of X and Z are V apart, C of each.
                unsafe { chunk.panel(panel, &d_o[j * WIDTH..], d_n, yz, xz, dv) }
            }
        }

        // SAFETY: as above.
        unsafe { columns(to).write(panels, &self.dstate) };
        Ok(())
    }
}

/// One chunk of one head.
struct Chunk<'a, S> {
    s: S,
    c: usize,
    len: usize,
    dk: usize,
    /// Numbers between rows of dO.
    tile: usize,
    /// K, then Q: [2 len, K]
    rows: &'a [f32],
    /// A, P [C, C], u, o, n [C], gamma_C in a [C], B, G, R [C, C], rk, rq, beta [C], ..
    ws: &'a [f32],
}

impl<S: Simd> Chunk<'_, S> {
    /// 16 columns: `state` [K, 16] holds dS' on entry and dS on return; `d_o` [len, 16], rows `tile` apart; `d_n` [len, 16] and
    /// `yz` [2 len, 16] are work space; X and Z, [C, 16] each, go to `xz`.
    ///
    /// # Safety
    /// `xz` has 2 C rows of 16 numbers, `xz_row` apart, that nothing else refers to.
    #[inline(always)]
    unsafe fn panel(
        &self,
        state: &mut [f32],
        d_o: &[f32],
        d_n: &mut [f32],
        yz: &mut [f32],
        xz: *mut f32,
        xz_row: usize,
    ) {
        let Chunk { s, c, len, dk, tile, rows, ws } = *self;
        let (p, vectors) = (&ws[c * c..2 * c * c], &ws[2 * c * c..]);
        let (u, o, decay, gamma) = (&vectors[..c], &vectors[c..][..c], &vectors[2 * c..][..c], vectors[3 * c]);
        let (b, beta) = (&vectors[4 * c..][..c * c], &vectors[4 * c + 3 * c * c + 2 * c..][..c]);
        let (state, d_n, yz, d_o) = (state.as_mut_ptr(), d_n.as_mut_ptr(), yz.as_mut_ptr(), d_o.as_ptr());
        // SAFETY: every pointer below is to a row of 16 numbers inside the slices above or of `xz`: rows of `state` are below
        // dk, rows of yz below 2 len, rows of the others below len, and rows of `d_o` are `tile` apart.
        unsafe {
            // dN = n o (K dS')
            let left = Left { ptr: rows.as_ptr(), row: dk, col: 1 };
            product(
                s,
                len,
                |_| dk,
                left,
                state,
                WIDTH,
                #[inline(always)]
                |i, j, v| store(s, d_n.add(i * WIDTH + j), s.mul_f32s(s.splat_f32s(decay[i]), v)),
            );
            // dN += P^T dO, P^T upper triangular
            let left = Left { ptr: p.as_ptr(), row: 1, col: c };
            product_upper(
                s,
                len,
                left,
                d_o,
                tile,
                #[inline(always)]
                |i, j, v| {
                    let to = d_n.add(i * WIDTH + j);
                    store(s, to, s.add_f32s(load(s, to), v));
                },
            );
            // X = B^T dN, B^T upper triangular        Y = -u o beta o X        Z = o o dO
            let left = Left { ptr: b.as_ptr(), row: 1, col: c };
            product_upper(
                s,
                len,
                left,
                d_n,
                WIDTH,
                #[inline(always)]
                |i, j, v| {
                    store(s, xz.add(i * xz_row + j), v);
                    store(s, yz.add(i * WIDTH + j), s.mul_f32s(s.splat_f32s(-u[i] * beta[i]), v));
                    let z = s.mul_f32s(s.splat_f32s(o[i]), load(s, d_o.add(i * tile + j)));
                    store(s, yz.add((len + i) * WIDTH + j), z);
                    store(s, xz.add((c + i) * xz_row + j), z);
                },
            );
            // dS = gamma_C dS' + K^T Y + Q^T Z
            let left = Left { ptr: rows.as_ptr(), row: 1, col: dk };
            let gamma = s.splat_f32s(gamma);
            product(
                s,
                dk,
                |_| 2 * len,
                left,
                yz,
                WIDTH,
                #[inline(always)]
                |i, j, v| {
                    let to = state.add(i * WIDTH + j);
                    store(s, to, fma(s, gamma, load(s, to), v));
                },
            );
        }
    }
}
