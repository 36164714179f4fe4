//! Rows that mostly move numbers: `embed`, `swiglu`, `argmax`, `copy`, `fill`.

use pulp::Simd;

use super::bind::{Bind, Read, Stored, Write};
use super::engine::{Local, Row};
use super::simd::{sigmoid, widen, zip};
use crate::error::Result;
use crate::kernel::model::{
    ArgmaxConsts, ArgmaxParams, EmbedConsts, EmbedParams, SwigluConsts, SwigluParams, WordsConsts, WordsParams,
};

/// Words or numbers of a cell.
const BLOCK: usize = 4096;

pub(super) struct Embed<'p> {
    params: EmbedParams,
    tokens: usize,
    /// `[T]`
    ids: Read<'p, u32>,
    /// `[rows, dim]`
    table: Stored<'p>,
    /// `[T, dim]`
    x: Write<'p, f32>,
}

impl<'p> Embed<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (EmbedConsts, EmbedParams) = (b.consts()?, b.params()?);
        let tokens = b.grid()[0];
        b.expect_grid([tokens, 1, 1])?;
        let dtype = b.dtype("w_type", c.w_type)?;
        Ok(Embed {
            tokens,
            ids: b.read(0, tokens as u64)?,
            table: b.stored(1, dtype, p.rows as u64 * p.dim as u64)?,
            x: b.write(2, tokens as u64 * p.dim as u64)?,
            params: p,
        })
    }
}

impl Row for Embed<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.tokens]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, _: S, _: usize, t: usize, _: &mut Local) -> Result<()> {
        let (p, dim) = (&self.params, self.params.dim as usize);
        if let Some(row) = self.ids.all()[t].checked_sub(p.row0).filter(|&row| row < p.rows) {
            // SAFETY: this token belongs to this cell alone.
            widen(&self.table, row as usize * dim, unsafe { self.x.part(t * dim, dim) });
        }
        Ok(())
    }
}

pub(super) struct Swiglu<'p> {
    params: SwigluParams,
    /// `[rows, 2 dim]`
    gate_up: Read<'p, f32>,
    /// `[rows, dim]`
    y: Write<'p, f32>,
}

impl<'p> Swiglu<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (SwigluConsts, SwigluParams) = (b.consts()?, b.params()?);
        b.expect("block", c.block, c.block > 0, "at least 1")?;
        let all = p.rows as u64 * p.dim as u64;
        b.expect_grid([all.div_ceil(c.block as u64) as usize, 1, 1])?;
        Ok(Swiglu { gate_up: b.read(0, all.saturating_mul(2))?, y: b.write(1, all)?, params: p })
    }

    fn blocks(&self) -> usize {
        (self.params.dim as usize).div_ceil(BLOCK)
    }
}

impl Row for Swiglu<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.params.rows as usize * self.blocks()]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let dim = self.params.dim as usize;
        let (row, from) = (cell / self.blocks(), cell % self.blocks() * BLOCK);
        let n = (dim - from).min(BLOCK);
        let gate_up = &self.gate_up.all()[row * 2 * dim..][..2 * dim];
        // SAFETY: these numbers belong to this cell alone.
        let y = unsafe { self.y.part(row * dim + from, n) };
        y.copy_from_slice(&gate_up[dim + from..][..n]);
        zip(
            s,
            y,
            &gate_up[from..][..n],
            #[inline(always)]
            |up, gate| s.mul_f32s(up, s.mul_f32s(gate, sigmoid(s, gate))),
        );
        Ok(())
    }
}

pub(super) struct Argmax<'p> {
    n: usize,
    rows: usize,
    /// `[rows, n]`
    x: Read<'p, f32>,
    /// `[rows]`
    ids: Write<'p, u32>,
}

impl<'p> Argmax<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (_, p): (ArgmaxConsts, ArgmaxParams) = (b.consts()?, b.params()?);
        let rows = b.grid()[0];
        b.expect_grid([rows, 1, 1])?;
        let all = rows as u64 * p.n as u64;
        Ok(Argmax { n: p.n as usize, rows, x: b.read(0, all)?, ids: b.write(1, rows as u64)? })
    }
}

impl Row for Argmax<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![self.rows]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, _: S, _: usize, row: usize, _: &mut Local) -> Result<()> {
        let x = &self.x.all()[row * self.n..][..self.n];
        // Sixteen running maxima, which a NaN never enters; then the first place of the largest.
        let mut most = [f32::NEG_INFINITY; 16];
        let (body, tail) = x.as_chunks::<16>();
        for x in body {
            for (m, &x) in most.iter_mut().zip(x) {
                *m = if x > *m { x } else { *m };
            }
        }
        let most = most.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        let at = x.iter().position(|&x| x == most).map_or(u32::MAX, |at| at as u32);
        // SAFETY: this row belongs to this cell alone.
        let id = unsafe { self.ids.part(row, 1) };
        id[0] = at;
        Ok(())
    }
}

pub(super) struct Words<'p> {
    params: WordsParams,
    /// None: fill.
    src: Option<Read<'p, u32>>,
    dst: Write<'p, u32>,
}

impl<'p> Words<'p> {
    pub fn bind(b: &Bind<'p>, copy: bool) -> Result<Self> {
        let (c, p): (WordsConsts, WordsParams) = (b.consts()?, b.params()?);
        b.expect("block", c.block, c.block > 0, "at least 1")?;
        b.expect_grid([p.n.div_ceil(c.block) as usize, 1, 1])?;
        let src = if copy { Some(b.read(0, p.src_off as u64 + p.n as u64)?) } else { None };
        Ok(Words { src, dst: b.write(copy as usize, p.dst_off as u64 + p.n as u64)?, params: p })
    }
}

impl Row for Words<'_> {
    fn phases(&self) -> Vec<usize> {
        vec![(self.params.n as usize).div_ceil(BLOCK)]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, _: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let (p, from) = (&self.params, cell * BLOCK);
        let n = (p.n as usize - from).min(BLOCK);
        // SAFETY: these words belong to this cell alone.
        let dst = unsafe { self.dst.part(p.dst_off as usize + from, n) };
        match &self.src {
            Some(src) => dst.copy_from_slice(&src.all()[p.src_off as usize + from..][..n]),
            None => dst.fill(p.word),
        }
        Ok(())
    }
}
