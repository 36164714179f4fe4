//! [`crate::kernel::model::MATMUL`]: products with many rows of x.
//!
//! Computed as `y^T = w x^T`: rows of w are the broadcast operand of [`product`], so they are converted to f32 where they
//! lie and never transposed, and 16 rows of x make a panel.
//!
//! ```text
//! for each block of up to 512 rows of x:
//!     phase 1: pack x into panels [k, 16], in the order of the converted weights
//!     phase 2: for each block of rows of w, a cell:
//!         for each slice of k:
//!             convert the block's slice to f32                (second-level cache)
//!             for each panel of x: sums[panel] += w x         (slice of the panel in the first-level cache)
//!         write the sums to y
//! ```

use pulp::Simd;

use super::bind::{Bind, Read, Stored, Write, reach};
use super::engine::{Local, Row};
use super::memory::cut;
use super::product::{Left, WIDTH, pack, product};
use super::simd::{load, store};
use super::weights::{Bf16, F16, F32, Weight, expand, permute};
use crate::error::Result;
use crate::kernel::model::{MatmulConsts, MatmulParams};
use crate::shape::Dtype;

/// Rows of x in a block: the packed block is `512 k` numbers.
const ROWS_X: usize = 512;
/// Rows of w in a cell, a multiple of 6 and of 12. With a slice of 256 numbers: 96 KB of weights, and 192 KB of sums.
const ROWS_W: usize = 96;
/// Numbers between the rows of a slice of weights: a power of two would put all rows of a block into the same few sets of the
/// first-level cache, which costs 5 % of the whole.
const ROW: usize = SLICE + WIDTH;
/// Numbers of k in a slice: 16 KB of a panel, half of a first-level cache. A multiple of every pair of vectors.
const SLICE: usize = 256;

pub(super) struct Matmul<'p> {
    add: bool,
    params: MatmulParams,
    /// `[m, x_stride]`
    x: Read<'p, f32>,
    /// `[n, k]`
    w: Stored<'p>,
    /// `[m, y_stride]`
    y: Write<'p, f32>,
}

impl<'p> Matmul<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (MatmulConsts, MatmulParams) = (b.consts()?, b.params()?);
        b.expect("tile_m", c.tile_m, c.tile_m > 0, "at least 1")?;
        b.expect("tile_n", c.tile_n, c.tile_n > 0, "at least 1")?;
        b.expect("y_stride", p.y_stride, p.m <= 1 || p.y_stride >= p.n, "at least n")?;
        b.expect_grid([p.n.div_ceil(c.tile_n) as usize, p.m.div_ceil(c.tile_m) as usize, 1])?;
        let dtype = b.dtype("w_type", c.w_type)?;
        Ok(Matmul {
            add: c.add == 1,
            x: b.read(0, reach(p.x_off, p.x_stride, p.m, p.k))?,
            w: b.stored(1, dtype, p.n as u64 * p.k as u64)?,
            y: b.write(2, reach(p.y_off, p.y_stride, p.m, p.n))?,
            params: p,
        })
    }

    /// First row and number of rows of block `i` of x.
    fn block(&self, i: usize) -> (usize, usize) {
        (i * ROWS_X, (self.params.m as usize - i * ROWS_X).min(ROWS_X))
    }

    /// Packs 16 rows of x.
    #[inline(always)]
    fn pack<S: Simd, W: Weight>(&self, s: S, block: usize, panel: usize, local: &mut Local) {
        let (p, k) = (&self.params, self.params.k as usize);
        let (first, rows) = self.block(block);
        let (from, n) = (first + panel * WIDTH, (rows - panel * WIDTH).min(WIDTH));
        // SAFETY: this panel of the shared memory belongs to this cell alone.
        let to = unsafe { local.shared.part(panel * k * WIDTH, k * WIDTH) };
        let ordered = local.scratch.floats(WIDTH * k);
        for (j, row) in ordered.chunks_exact_mut(k).take(n).enumerate() {
            let x = p.x_off as usize + (from + j) * p.x_stride as usize;
            permute::<S, W>(s, &self.x.all()[x..][..k], row);
        }
        pack(ordered, k, n, k, to);
    }

    /// Multiplies a block of x by a block of rows of w.
    #[inline(always)]
    fn multiply<S: Simd, W: Weight>(&self, s: S, block: usize, cell: usize, local: &mut Local) {
        let (p, k) = (&self.params, self.params.k as usize);
        let (first_x, rows_x) = self.block(block);
        let (first_w, panels) = (cell * ROWS_W, rows_x.div_ceil(WIDTH));
        let rows_w = (p.n as usize - first_w).min(ROWS_W);
        // SAFETY: this phase only reads the shared memory.
        let x = unsafe { &*local.shared.part(0, panels * k * WIDTH) };
        let rest = &mut local.scratch.floats(ROWS_W * ROW + panels * ROWS_W * WIDTH);
        let slice = cut(rest, ROWS_W * ROW);
        let sums = cut(rest, panels * ROWS_W * WIDTH); // [panels][ROWS_W, 16]

        for k0 in (0..k).step_by(SLICE) {
            let depth = (k - k0).min(SLICE);
            for i in 0..rows_w {
                expand::<S, W>(s, &self.w, (first_w + i) * k + k0, &mut slice[i * ROW..][..depth]);
            }
            for j in 0..panels {
                let a = Left { ptr: slice.as_ptr(), row: ROW, col: 1 };
                let b = x[(j * k + k0) * WIDTH..][..depth * WIDTH].as_ptr();
                let sums = sums[j * ROWS_W * WIDTH..][..ROWS_W * WIDTH].as_mut_ptr();
                // SAFETY: the slice has rows_w rows of `depth` numbers, the panel `depth` rows of 16, the sums ROWS_W.
                unsafe {
                    product(
                        s,
                        rows_w,
                        |_| depth,
                        a,
                        b,
                        WIDTH,
                        #[inline(always)]
                        |i, c, v| {
                            let to = sums.add(i * WIDTH + c);
                            store(s, to, if k0 == 0 { v } else { s.add_f32s(load(s, to), v) });
                        },
                    );
                }
            }
        }

        for (j, sums) in sums.chunks_exact(ROWS_W * WIDTH).enumerate() {
            for t in 0..(rows_x - j * WIDTH).min(WIDTH) {
                let at = p.y_off as usize + (first_x + j * WIDTH + t) * p.y_stride as usize + first_w;
                // SAFETY: these columns of y belong to this cell alone.
                let y = unsafe { self.y.part(at, rows_w) };
                for (y, sums) in y.iter_mut().zip(sums.chunks_exact(WIDTH)) {
                    *y = if self.add { *y + sums[t] } else { sums[t] };
                }
            }
        }
    }
}

impl Row for Matmul<'_> {
    fn phases(&self) -> Vec<usize> {
        (0..(self.params.m as usize).div_ceil(ROWS_X))
            .flat_map(|i| [self.block(i).1.div_ceil(WIDTH), (self.params.n as usize).div_ceil(ROWS_W)])
            .collect()
    }

    fn shared(&self) -> usize {
        (self.params.m as usize).min(ROWS_X).next_multiple_of(WIDTH) * self.params.k as usize
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, phase: usize, cell: usize, local: &mut Local) -> Result<()> {
        let block = phase / 2;
        match (phase % 2, self.w.dtype) {
            (0, Dtype::F32) => self.pack::<S, F32>(s, block, cell, local),
            // Both 16-bit types have the same order.
            (0, _) => self.pack::<S, Bf16>(s, block, cell, local),
            (_, Dtype::F32) => self.multiply::<S, F32>(s, block, cell, local),
            (_, Dtype::F16) => self.multiply::<S, F16>(s, block, cell, local),
            (_, Dtype::Bf16) => self.multiply::<S, Bf16>(s, block, cell, local),
        }
        Ok(())
    }
}
