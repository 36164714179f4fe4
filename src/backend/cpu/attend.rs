//! [`crate::kernel::model::ATTEND`]: softmax attention over one page, keys in slices, with running maxima.

use pulp::Simd;

use super::bind::{Bind, Read, Stored, Write};
use super::engine::{Local, Row};
use super::memory::cut;
use super::product::{Left, WIDTH, pack, product};
use super::simd::{dot, exp, load, map, store, widen};
use crate::error::Result;
use crate::kernel::model::{AttendConsts, AttendParams};

/// Keys of a slice.
const KEYS: usize = 64;
/// From this many query rows on, keys are packed for [`product`]; below, packing costs more than it saves.
const FEW: usize = 6;

pub(super) struct Attend<'p> {
    consts: AttendConsts,
    params: AttendParams,
    /// Splits of the page, query tiles.
    splits: usize,
    tiles: usize,
    /// `[T, heads, D]`
    q: Read<'p, f32>,
    /// `[page_len, kv, D]`
    k: Stored<'p>,
    v: Stored<'p>,
    /// `[T]`
    pos: Read<'p, u32>,
    /// `[T, heads, slots, D + 2]`
    part: Write<'p, f32>,
}

impl<'p> Attend<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (AttendConsts, AttendParams) = (b.consts()?, b.params()?);
        let (t, heads, kv, dim) = (p.tokens as u64, p.heads as u64, p.kv_heads as u64, c.dim as u64);
        b.expect("dim", c.dim, c.dim > 0 && c.dim <= 1 << 12 && c.dim % 16 == 0, "a multiple of 16 to 4096")?;
        b.expect("tile_q", c.tile_q, c.tile_q > 0 && c.tile_q <= 1 << 12, "1 to 4096")?;
        b.expect("kv_heads", p.kv_heads, kv > 0 && heads % kv == 0, "a divisor of heads")?;
        b.expect("span", p.span, p.span > 0, "at least 1")?;
        let splits = b.grid()[2];
        let tiles = (t * (heads / kv)).div_ceil(c.tile_q as u64) as usize;
        b.expect_grid([tiles, kv as usize, splits])?;
        let most = p.page_len.div_ceil(p.span);
        b.expect("splits", splits as u32, splits as u64 <= most as u64, &format!("at most {most}"))?;
        let last = p.slot0 as u64 + splits as u64;
        b.expect("slots", p.slots, last <= p.slots as u64, &format!("at least {last}"))?;
        let dtype = b.dtype("kv_type", c.kv_type)?;
        let page = (p.page_len as u64).saturating_mul(kv * dim);
        Ok(Attend {
            splits,
            tiles,
            q: b.read(0, (t * heads).saturating_mul(dim))?,
            k: b.stored(1, dtype, page)?,
            v: b.stored(2, dtype, page)?,
            pos: b.read(3, t)?,
            part: b.write(4, (t * heads).saturating_mul(p.slots as u64 * (dim + 2)))?,
            consts: c,
            params: p,
        })
    }
}

impl Row for Attend<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.tiles * self.params.kv_heads as usize * self.splits]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, local: &mut Local) -> Result<()> {
        let (p, dim, tile) = (&self.params, self.consts.dim as usize, self.consts.tile_q as usize);
        let (kv, group) = (p.kv_heads as usize, (p.heads / p.kv_heads) as usize);
        let (x, rest) = (cell % self.tiles, cell / self.tiles);
        let (c, split) = (rest % kv, rest / kv);
        let first_row = x * tile;
        let rows = (p.tokens as usize * group - first_row).min(tile);
        // Query row r is head `c * group + r % group` of token `r / group`.
        let of_row = |r: usize| ((first_row + r) / group, c * group + (first_row + r) % group);

        let from = split * p.span as usize;
        let page = p.page_len as usize;
        // Keys of the split that row r sees.
        let seen = |r: usize| {
            let end = (self.pos.all()[of_row(r).0] as usize + 1).saturating_sub(p.page_start as usize);
            end.min(page).min(from + p.span as usize).saturating_sub(from)
        };
        let longest = (0..rows).map(seen).max().unwrap_or(0);

        let scores_row = KEYS;
        let rest = &mut local.scratch.floats(2 * rows * dim + rows * scores_row + 2 * rows + 2 * KEYS * dim);
        let q = cut(rest, rows * dim);
        let acc = cut(rest, rows * dim);
        let scores = cut(rest, rows * scores_row);
        let keys = cut(rest, KEYS * dim);
        let packed = cut(rest, KEYS * dim);
        let (most, sum) = (cut(rest, rows), cut(rest, rows));
        most.fill(-3e38);
        sum.fill(0.0);
        acc.fill(0.0);
        for (r, q) in q.chunks_exact_mut(dim).enumerate() {
            let (t, h) = of_row(r);
            q.copy_from_slice(&self.q.all()[(t * p.heads as usize + h) * dim..][..dim]);
            let scale = s.splat_f32s(p.scale);
            map(
                s,
                q,
                #[inline(always)]
                |q| s.mul_f32s(q, scale),
            );
        }

        for k0 in (0..longest).step_by(KEYS) {
            let n = (longest - k0).min(KEYS);
            let cached = |i: usize| ((from + k0 + i) * kv + c) * dim;
            for i in 0..n {
                widen(&self.k, cached(i), &mut keys[i * dim..][..dim]);
            }
            // scores = s Q K^T
            if rows < FEW {
                for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_exact_mut(scores_row)) {
                    for (key, score) in keys.chunks_exact(dim).zip(&mut scores[..n]) {
                        *score = dot(s, q, key);
                    }
                }
            } else {
                for j in 0..n.div_ceil(WIDTH) {
                    let panel = &mut packed[j * WIDTH * dim..][..WIDTH * dim];
                    pack(&keys[j * WIDTH * dim..], dim, (n - j * WIDTH).min(WIDTH), dim, panel);
                    let to = scores[j * WIDTH..].as_mut_ptr();
                    let a = Left { ptr: q.as_ptr(), row: dim, col: 1 };
                    // SAFETY: q has `rows` rows of dim numbers, the panel dim rows of 16, and a row of scores has room for
                    // 16 from column 16 j on.
                    unsafe {
                        product(
                            s,
                            rows,
                            |_| dim,
                            a,
                            panel.as_ptr(),
                            WIDTH,
                            #[inline(always)]
                            |i, c, v| store(s, to.add(i * scores_row + c), v),
                        );
                    }
                }
            }
            for r in 0..rows {
                let own = seen(r).saturating_sub(k0).min(n);
                let scores = &mut scores[r * scores_row..][..scores_row];
                // What the row does not see gets no weight.
                scores[own..n].fill(f32::NEG_INFINITY);
                if own == 0 {
                    scores[..n].fill(0.0);
                    continue;
                }
                let m = scores[..own].iter().copied().fold(most[r], f32::max);
                let shift = s.splat_f32s(m);
                map(
                    s,
                    &mut scores[..n],
                    #[inline(always)]
                    |x| exp(s, s.sub_f32s(x, shift)),
                );
                let factor = (most[r] - m).exp();
                most[r] = m;
                sum[r] = sum[r] * factor + scores[..n].iter().sum::<f32>();
                if factor != 1.0 {
                    let factor = s.splat_f32s(factor);
                    map(
                        s,
                        &mut acc[r * dim..][..dim],
                        #[inline(always)]
                        |x| s.mul_f32s(x, factor),
                    );
                }
            }
            // acc += P V
            for i in 0..n {
                widen(&self.v, cached(i), &mut keys[i * dim..][..dim]);
            }
            for j in (0..dim).step_by(WIDTH) {
                let a = Left { ptr: scores.as_ptr(), row: scores_row, col: 1 };
                let to = acc[j..].as_mut_ptr();
                // SAFETY: scores has `rows` rows of n numbers, the values n rows of dim, of which these are 16 columns, and
                // so has acc.
                unsafe {
                    product(
                        s,
                        rows,
                        |_| n,
                        a,
                        keys[j..].as_ptr(),
                        dim,
                        #[inline(always)]
                        |i, c, v| {
                            let to = to.add(i * dim + c);
                            store(s, to, s.add_f32s(load(s, to), v));
                        },
                    );
                }
            }
        }

        for r in 0..rows {
            let (t, h) = of_row(r);
            let at = ((t * p.heads as usize + h) * p.slots as usize + p.slot0 as usize + split) * (dim + 2);
            // SAFETY: this slot of this head of this token belongs to this cell alone.
            let part = unsafe { self.part.part(at, dim + 2) };
            (part[0], part[1]) = (most[r], sum[r]);
            part[2..].copy_from_slice(&acc[r * dim..][..dim]);
        }
        Ok(())
    }
}
