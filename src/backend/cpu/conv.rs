//! [`crate::kernel::gdn::CONV`] and [`crate::kernel::gdn::CONV_TAIL`]: causal depthwise convolution with a carried tail.

use pulp::Simd;

use super::bind::{Bind, Read, Write};
use super::engine::{Local, Row};
use super::simd::{map, sigmoid};
use super::table::{Entry, sequences};
use crate::error::Result;
use crate::kernel::gdn::{CONV, CONV_TAIL, ConvConsts, ConvParams, ConvTailConsts};

/// Channels of a cell.
pub(super) const WIDE: usize = 64;

pub(super) struct Conv<'p> {
    consts: ConvConsts,
    params: ConvParams,
    /// `[T, x_stride]`
    x: Read<'p, f32>,
    /// `[channels, taps]`
    w: Read<'p, f32>,
    /// `[N]` of (first token, tokens, slot, 0)
    seqs: Read<'p, Entry>,
    count: usize,
    /// `[slots, taps - 1, channels]`
    tail: Write<'p, f32>,
    /// `[T, y_stride]`
    y: Write<'p, f32>,
    tokens: usize,
    /// Blocks of tokens.
    blocks: usize,
}

impl<'p> Conv<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (ConvConsts, ConvParams) = (b.consts()?, b.params()?);
        b.expect("taps", c.taps, (2..=8).contains(&c.taps), "2 to 8")?;
        b.expect("channels", p.channels, p.channels > 0, "at least 1")?;
        b.expect("block", p.block, p.block > 0, "at least 1")?;
        let [_, count, blocks] = b.grid();
        b.expect_grid([(p.channels as usize).div_ceil(WIDE), count, blocks])?;
        b.expect("store_tail", c.store_tail, c.store_tail == 0 || blocks == 1, "0 where a sequence spans cells")?;
        let (x, y) = (b.read::<f32>(0, 0)?, b.write::<f32>(4, 0)?);
        let width = p.channels as usize;
        let x_rows = b.rows(0, x.all().len(), p.x_off, p.x_stride, width)?;
        Ok(Conv {
            tokens: x_rows.min(b.rows(4, y.len(), p.y_off, p.y_stride, width)?),
            x,
            w: b.read(1, p.channels as u64 * c.taps as u64)?,
            seqs: b.read(2, count as u64)?,
            count,
            tail: b.write(3, 0)?,
            y,
            blocks,
            consts: c,
            params: p,
        })
    }
}

impl Row for Conv<'_> {
    fn begin(&self) -> Result<()> {
        let seqs = &self.seqs.all()[..self.count];
        let slots = self.tail.len() / ((self.consts.taps as usize - 1) * self.params.channels as usize);
        sequences(CONV.name, seqs, self.tokens, slots)?;
        let covered = self.blocks as u64 * self.params.block as u64;
        match seqs.iter().position(|e| e[1] as u64 > covered) {
            Some(i) => {
                let what = format!("{}: seqs[{i}] tokens", CONV.name);
                Err(crate::Error::argument(what, seqs[i][1], format!("at most the {covered} that the grid covers")))
            }
            None => Ok(()),
        }
    }

    fn phases(&self) -> Vec<usize> {
        vec![(self.params.channels as usize).div_ceil(WIDE) * self.count * self.blocks]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let (p, taps, channels) = (&self.params, self.consts.taps as usize, self.params.channels as usize);
        let groups = channels.div_ceil(WIDE);
        let (group, rest) = (cell % groups, cell / groups);
        let (seq, block) = (rest % self.count, rest / self.count);
        let (c0, wide) = (group * WIDE, (channels - group * WIDE).min(WIDE));
        let [first, len, slot, _] = self.seqs.all()[seq].map(|n| n as usize);
        let (from, to) = (block * p.block as usize, ((block + 1) * p.block as usize).min(len));
        if from >= to {
            return Ok(());
        }

        // w of these channels, tap by tap: [taps, 64]
        let mut w = [[0f32; WIDE]; 8];
        for i in 0..wide {
            for (j, w) in w[..taps].iter_mut().enumerate() {
                w[i] = self.w.all()[(c0 + i) * taps + j];
            }
        }
        let tail_at = |i: usize| (slot * (taps - 1) + i) * channels + c0;
        // The row `back` rows before the sequence's row t.
        let row = |t: usize, back: usize| match t.checked_sub(back) {
            Some(t) => &self.x.all()[p.x_off as usize + (first + t) * p.x_stride as usize + c0..][..wide],
            // SAFETY: nothing writes the tail before this cell does, below.
            None => unsafe { self.tail.peek(tail_at(taps - 1 + t - back), wide) },
        };
        for t in from..to {
            let mut sum = [0f32; WIDE];
            for (j, w) in w[..taps].iter().enumerate() {
                let x = row(t, taps - 1 - j);
                if let Ok(x) = <&[f32; WIDE]>::try_from(x) {
                    for i in 0..WIDE {
                        sum[i] += w[i] * x[i];
                    }
                } else {
                    for i in 0..wide {
                        sum[i] += w[i] * x[i];
                    }
                }
            }
            if self.consts.silu == 1 {
                map(
                    s,
                    &mut sum,
                    #[inline(always)]
                    |x| s.mul_f32s(x, sigmoid(s, x)),
                );
            }
            let at = p.y_off as usize + (first + t) * p.y_stride as usize + c0;
            // SAFETY: these channels of this token belong to this cell alone.
            unsafe { self.y.part(at, wide) }.copy_from_slice(&sum[..wide]);
        }
        if self.consts.store_tail == 1 {
            let x = |t: usize| &self.x.all()[p.x_off as usize + (first + t) * p.x_stride as usize + c0..][..wide];
            // SAFETY: this cell alone touches these channels of the slot.
            unsafe { shift(&self.tail, tail_at, taps - 1, wide, len, x) }
        }
        Ok(())
    }
}

/// Replaces the tail, whose row `i` of `wide` numbers is at `at(i)`, by the last `keep` rows of (tail, x), where x has `len`
/// rows.
///
/// # Safety
/// No other reference into these rows is alive.
unsafe fn shift<'a>(
    tail: &Write<f32>,
    at: impl Fn(usize) -> usize,
    keep: usize,
    wide: usize,
    len: usize,
    x: impl Fn(usize) -> &'a [f32],
) {
    for i in 0..keep {
        // SAFETY: as the caller promises; where the source is a row of the tail, it is another one.
        unsafe {
            match (len + i).checked_sub(keep) {
                Some(t) => tail.part(at(i), wide).copy_from_slice(x(t)),
                None if len > 0 => tail.part(at(i), wide).copy_from_slice(tail.peek(at(i + len), wide)),
                None => {}
            }
        }
    }
}

pub(super) struct ConvTail<'p> {
    taps: usize,
    params: ConvParams,
    x: Read<'p, f32>,
    seqs: Read<'p, Entry>,
    count: usize,
    tail: Write<'p, f32>,
    tokens: usize,
}

impl<'p> ConvTail<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (ConvTailConsts, ConvParams) = (b.consts()?, b.params()?);
        b.expect("taps", c.taps, (2..=8).contains(&c.taps), "2 to 8")?;
        b.expect("channels", p.channels, p.channels > 0, "at least 1")?;
        let count = b.grid()[1];
        b.expect_grid([(p.channels as usize).div_ceil(WIDE), count, 1])?;
        let x = b.read::<f32>(0, 0)?;
        Ok(ConvTail {
            taps: c.taps as usize,
            tokens: b.rows(0, x.all().len(), p.x_off, p.x_stride, p.channels as usize)?,
            x,
            seqs: b.read(1, count as u64)?,
            count,
            tail: b.write(2, 0)?,
            params: p,
        })
    }
}

impl Row for ConvTail<'_> {
    fn begin(&self) -> Result<()> {
        let slots = self.tail.len() / ((self.taps - 1) * self.params.channels as usize);
        sequences(CONV_TAIL.name, &self.seqs.all()[..self.count], self.tokens, slots)
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.count]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, _: S, _: usize, cell: usize, _: &mut Local) -> Result<()> {
        let (p, channels, keep) = (&self.params, self.params.channels as usize, self.taps - 1);
        let [first, len, slot, _] = self.seqs.all()[cell].map(|n| n as usize);
        let x = |t: usize| &self.x.all()[p.x_off as usize + (first + t) * p.x_stride as usize..][..channels];
        let at = |i: usize| (slot * keep + i) * channels;
        // SAFETY: this slot belongs to this cell alone.
        unsafe { shift(&self.tail, at, keep, channels, len, x) }
        Ok(())
    }
}
