//! [`crate::kernel::gdn::CONV`] and [`crate::kernel::gdn::CONV_TAIL`]: causal depthwise convolution with a carried tail.

use pulp::Simd;

use super::bind::{Bind, Read, Write};
use super::engine::{Local, Row};
use super::simd::{map, sigmoid};
use super::table::{Entry, sequences};
use crate::error::Result;
use crate::kernel::gdn::{CONV, CONV_TAIL, ConvConsts, ConvParams, ConvTailConsts};

/// Channels of a cell.
const WIDE: usize = 64;

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
        // SAFETY: with store_tail, this cell alone touches these channels of the slot; without, all cells only read them.
        let tail = unsafe { self.tail.part(slot * (taps - 1) * channels, (taps - 1) * channels) };
        // The row `back` rows before the sequence's row t.
        let row = |t: usize, back: usize| match t.checked_sub(back) {
            Some(t) => &self.x.all()[p.x_off as usize + (first + t) * p.x_stride as usize + c0..][..wide],
            None => &tail[(taps - 1 + t - back) * channels + c0..][..wide],
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
                map(s, &mut sum, |x| s.mul_f32s(x, sigmoid(s, x)));
            }
            let at = p.y_off as usize + (first + t) * p.y_stride as usize + c0;
            // SAFETY: these channels of this token belong to this cell alone.
            unsafe { self.y.part(at, wide) }.copy_from_slice(&sum[..wide]);
        }
        if self.consts.store_tail == 1 {
            let x = |t: usize| &self.x.all()[p.x_off as usize + (first + t) * p.x_stride as usize + c0..][..wide];
            shift(tail, channels, taps - 1, c0, wide, len, x);
        }
        Ok(())
    }
}

/// Replaces the tail by the last `keep` rows of (tail, x), where x has `len` rows.
fn shift<'a>(
    tail: &mut [f32],
    channels: usize,
    keep: usize,
    c0: usize,
    wide: usize,
    len: usize,
    x: impl Fn(usize) -> &'a [f32],
) {
    for i in 0..keep {
        let at = i * channels + c0;
        if len + i < keep {
            tail.copy_within(at + len * channels..at + len * channels + wide, at);
        } else {
            tail[at..at + wide].copy_from_slice(x(len + i - keep));
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
        // SAFETY: this slot belongs to this cell alone.
        let tail = unsafe { self.tail.part(slot * keep * channels, keep * channels) };
        let x = |t: usize| &self.x.all()[p.x_off as usize + (first + t) * p.x_stride as usize..][..channels];
        shift(tail, channels, keep, 0, channels, len, x);
        Ok(())
    }
}
