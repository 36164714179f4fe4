//! [`crate::kernel::grad::CONV_GRAD`] and [`crate::kernel::grad::CONV_TAIL_GRAD`]: gradients of the convolution.

use pulp::Simd;

use super::bind::{Bind, Read, Write};
use super::conv::WIDE;
use super::engine::{Local, Row};
use super::simd::{silu_slope, zip};
use super::table::{Entry, sequences};
use crate::error::Result;
use crate::kernel::grad::{CONV_GRAD, CONV_TAIL_GRAD, ConvGradConsts, ConvGradParams, ConvTailGradConsts};

/// What both rows read: the forward's inputs, and dy.
struct Given<'p> {
    taps: usize,
    silu: bool,
    params: ConvGradParams,
    /// `[T, x_stride]`
    x: Read<'p, f32>,
    /// `[channels, taps]`
    w: Read<'p, f32>,
    /// `[count]` of (first token, tokens, slot, 0)
    seqs: Read<'p, Entry>,
    /// `[slots, taps - 1, channels]`
    tail: Read<'p, f32>,
    slots: usize,
    /// `[T, dy_stride]`
    dy: Read<'p, f32>,
    /// Tokens that x and dy have.
    tokens: usize,
}

impl<'p> Given<'p> {
    fn bind(b: &Bind<'p>, taps: u32, silu: u32) -> Result<Self> {
        let p: ConvGradParams = b.params()?;
        b.expect("taps", taps, (2..=8).contains(&taps), "2 to 8")?;
        b.expect("channels", p.channels, p.channels > 0, "at least 1")?;
        let (x, dy, tail) = (b.read::<f32>(0, 0)?, b.read::<f32>(4, 0)?, b.read::<f32>(3, 0)?);
        let (taps, width) = (taps as usize, p.channels as usize);
        let x_rows = b.rows(0, x.all().len(), p.x_off, p.x_stride, width)?;
        Ok(Given {
            tokens: x_rows.min(b.rows(4, dy.all().len(), p.dy_off, p.dy_stride, width)?),
            x,
            w: b.read(1, p.channels as u64 * taps as u64)?,
            seqs: b.read(2, p.count as u64)?,
            slots: tail.all().len() / ((taps - 1) * width),
            tail,
            dy,
            taps,
            silu: silu == 1,
            params: p,
        })
    }

    fn table(&self) -> &[Entry] {
        &self.seqs.all()[..self.params.count as usize]
    }

    /// Groups of channels.
    fn groups(&self) -> usize {
        (self.params.channels as usize).div_ceil(WIDE)
    }

    /// Channels of group `group`: the first, and how many.
    fn channels(&self, group: usize) -> (usize, usize) {
        (group * WIDE, (self.params.channels as usize - group * WIDE).min(WIDE))
    }

    /// w of `wide` channels from `c0`, tap by tap: `[taps, 64]`.
    #[inline(always)]
    fn weights(&self, c0: usize, wide: usize) -> [[f32; WIDE]; 8] {
        let mut w = [[0f32; WIDE]; 8];
        for i in 0..wide {
            for (j, w) in w[..self.taps].iter_mut().enumerate() {
                w[i] = self.w.all()[(c0 + i) * self.taps + j];
            }
        }
        w
    }

    /// Row i of a tail in the slot of `seq`.
    #[inline(always)]
    fn tail_at(&self, seq: &Entry, i: usize, c0: usize) -> usize {
        (seq[2] as usize * (self.taps - 1) + i) * self.params.channels as usize + c0
    }

    /// Row `t - (taps - 1) + j` of a sequence, or of its tail before it.
    #[inline(always)]
    fn row(&self, seq: &Entry, t: usize, j: usize, c0: usize, wide: usize) -> &[f32] {
        let p = &self.params;
        match (t + j).checked_sub(self.taps - 1) {
            Some(t) => &self.x.all()[p.x_off as usize + (seq[0] as usize + t) * p.x_stride as usize + c0..][..wide],
            None => &self.tail.all()[self.tail_at(seq, t + j, c0)..][..wide],
        }
    }

    /// `dp[t] = dy[t] silu'(p[t])` of these channels; 0 past the sequence's end.
    #[inline(always)]
    fn dp<S: Simd>(&self, s: S, seq: &Entry, t: usize, w: &[[f32; WIDE]; 8], c0: usize, wide: usize) -> [f32; WIDE] {
        let (p, mut dp) = (&self.params, [0f32; WIDE]);
        if t >= seq[1] as usize {
            return dp;
        }
        let dy = &self.dy.all()[p.dy_off as usize + (seq[0] as usize + t) * p.dy_stride as usize + c0..][..wide];
        if !self.silu {
            dp[..wide].copy_from_slice(dy);
            return dp;
        }
        for (j, w) in w[..self.taps].iter().enumerate() {
            add_product(&mut dp, w, self.row(seq, t, j, c0, wide));
        }
        zip(
            s,
            &mut dp[..wide],
            dy,
            #[inline(always)]
            |p, dy| s.mul_f32s(dy, silu_slope(s, p)),
        );
        dp
    }
}

/// `sum += a b`, with as many numbers as b has.
#[inline(always)]
fn add_product(sum: &mut [f32; WIDE], a: &[f32; WIDE], b: &[f32]) {
    if let Ok(b) = <&[f32; WIDE]>::try_from(b) {
        for i in 0..WIDE {
            sum[i] += a[i] * b[i];
        }
    } else {
        for (i, b) in b.iter().enumerate() {
            sum[i] += a[i] * b;
        }
    }
}

pub(super) struct ConvGrad<'p> {
    given: Given<'p>,
    /// `[T, dx_stride]`
    dx: Write<'p, f32>,
    dx_rows: usize,
    /// `[cells, channels, taps]`
    part: Write<'p, f32>,
}

impl<'p> ConvGrad<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let c: ConvGradConsts = b.consts()?;
        let given = Given::bind(b, c.taps, c.silu)?;
        let p = &given.params;
        b.expect("block", p.block, p.block > 0, "at least 1")?;
        b.expect("cells", p.cells, p.cells > 0, "at least 1")?;
        b.expect_grid([given.groups(), p.cells as usize, 1])?;
        let dx = b.write(5, 0)?;
        Ok(ConvGrad {
            dx_rows: b.rows(5, dx.len(), p.dx_off, p.dx_stride, p.channels as usize)?,
            dx,
            part: b.write(6, (p.cells as u64).saturating_mul(p.channels as u64 * c.taps as u64))?,
            given,
        })
    }
}

impl Row for ConvGrad<'_> {
    fn begin(&self) -> Result<()> {
        sequences(CONV_GRAD.name, self.given.table(), self.given.tokens.min(self.dx_rows), self.given.slots)
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.given.groups() * self.given.params.cells as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let (g, p, taps) = (&self.given, &self.given.params, self.given.taps);
        let (block, cells) = (p.block as usize, p.cells as usize);
        let (group, cell) = (cell % g.groups(), cell / g.groups());
        let (c0, wide) = g.channels(group);
        let w = g.weights(c0, wide);
        let mut dw = [[0f32; WIDE]; 8];
        // The next block of this cell, counted from the first block of the sequence.
        let mut next = cell;
        for seq in g.table() {
            let len = seq[1] as usize;
            let blocks = len.div_ceil(block);
            while next < blocks {
                let (begin, end) = (next * block, ((next + 1) * block).min(len));
                // dp of token t, at t mod 8.
                let mut dp = [[0f32; WIDE]; 8];
                for t in begin..end + taps - 1 {
                    let d = g.dp(s, seq, t, &w, c0, wide);
                    if t < end {
                        for (j, dw) in dw[..taps].iter_mut().enumerate() {
                            add_product(dw, &d, g.row(seq, t, j, c0, wide));
                        }
                    }
                    dp[t % 8] = d;
                    // dx[i] = sum_k w[taps - 1 - k] dp[i + k]
                    if let Some(i) = t.checked_sub(taps - 1).filter(|&i| i >= begin) {
                        let mut sum = [0f32; WIDE];
                        for k in 0..taps {
                            add_product(&mut sum, &w[taps - 1 - k], &dp[(i + k) % 8]);
                        }
                        let at = p.dx_off as usize + (seq[0] as usize + i) * p.dx_stride as usize + c0;
                        // SAFETY: these channels of this token belong to this cell alone.
                        unsafe { self.dx.part(at, wide) }.copy_from_slice(&sum[..wide]);
                    }
                }
                next += cells;
            }
            next -= blocks;
        }
        // SAFETY: these channels of this row belong to this cell alone.
        let part = unsafe { self.part.part((cell * p.channels as usize + c0) * taps, wide * taps) };
        for (i, part) in part.chunks_exact_mut(taps).enumerate() {
            for (part, dw) in part.iter_mut().zip(&dw) {
                *part = dw[i];
            }
        }
        Ok(())
    }
}

pub(super) struct ConvTailGrad<'p> {
    given: Given<'p>,
    /// `[slots, taps - 1, channels]`
    dtail_out: Option<Read<'p, f32>>,
    /// `[T, dx_stride]`
    dx: Write<'p, f32>,
    dx_rows: usize,
    /// `[slots, taps - 1, channels]`
    dtail: Option<Write<'p, f32>>,
}

impl<'p> ConvTailGrad<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let c: ConvTailGradConsts = b.consts()?;
        let mut given = Given::bind(b, c.taps, c.silu)?;
        let p = &given.params;
        b.expect_grid([given.groups(), p.count as usize, 1])?;
        let dx = b.write(6, 0)?;
        let dtail_out = if c.add == 1 { Some(b.read::<f32>(5, 0)?) } else { None };
        let dtail = if c.store == 1 { Some(b.write::<f32>(7, 0)?) } else { None };
        let slot = (given.taps - 1) * p.channels as usize;
        let slots = |len: Option<usize>| len.map_or(usize::MAX, |len| len / slot);
        given.slots = given.slots.min(slots(dtail_out.as_ref().map(|d| d.all().len())));
        given.slots = given.slots.min(slots(dtail.as_ref().map(|d| d.len())));
        let p = &given.params;
        let dx_rows = b.rows(6, dx.len(), p.dx_off, p.dx_stride, p.channels as usize)?;
        Ok(ConvTailGrad { given, dtail_out, dx, dx_rows, dtail })
    }
}

impl Row for ConvTailGrad<'_> {
    fn begin(&self) -> Result<()> {
        sequences(CONV_TAIL_GRAD.name, self.given.table(), self.given.tokens.min(self.dx_rows), self.given.slots)
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.given.groups() * self.given.params.count as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let (g, p, keep) = (&self.given, &self.given.params, self.given.taps - 1);
        let (c0, wide) = g.channels(cell % g.groups());
        let seq = &g.table()[cell / g.groups()];
        let len = seq[1] as usize;
        // Row i of the gradient of the new tail.
        let handed = |i: usize| self.dtail_out.as_ref().map(|d| &d.all()[g.tail_at(seq, i, c0)..][..wide]);

        if let Some(dtail) = &self.dtail {
            let w = g.weights(c0, wide);
            let mut sums = [[0f32; WIDE]; 8];
            for t in 0..keep.min(len) {
                let d = g.dp(s, seq, t, &w, c0, wide);
                for i in t..keep {
                    add_product(&mut sums[i], &w[i - t], &d);
                }
            }
            for (i, sum) in sums[..keep].iter_mut().enumerate() {
                // Row i of the old tail is row i - len of the new one.
                if let Some(handed) = i.checked_sub(len).and_then(handed) {
                    for (sum, handed) in sum.iter_mut().zip(handed) {
                        *sum += handed;
                    }
                }
                // SAFETY: these channels of the slot belong to this cell alone.
                unsafe { dtail.part(g.tail_at(seq, i, c0), wide) }.copy_from_slice(&sum[..wide]);
            }
        }
        // Row i of the new tail is row len + i of (old tail, x).
        for i in keep.saturating_sub(len)..keep {
            let Some(handed) = handed(i) else { break };
            let at = p.dx_off as usize + (seq[0] as usize + len + i - keep) * p.dx_stride as usize + c0;
            // SAFETY: these channels of this token belong to this cell alone.
            let dx = unsafe { self.dx.part(at, wide) };
            zip(
                s,
                dx,
                handed,
                #[inline(always)]
                |dx, handed| s.add_f32s(dx, handed),
            );
        }
        Ok(())
    }
}
