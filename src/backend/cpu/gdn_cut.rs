//! [`crate::kernel::gdn_cut::CUT`] and [`crate::kernel::gdn_cut::CARRY`]: what is done where a sequence is cut.

use pulp::Simd;

use super::bind::{Bind, Read, Write};
use super::engine::{Local, Row};
use super::gdn_grad_scan::check_chunk;
use super::gdn_prepare::{check_heads, ws_size};
use super::gdn_scan::{Columns, check_columns};
use super::memory::cut;
use super::product::{Left, WIDTH, product};
use super::simd::{load, store};
use super::table::{Entry, distinct_slots, runs};
use crate::error::{Error, Result};
use crate::kernel::gdn_cut::{CARRY, CUT, CarryConsts, CarryParams, CutConsts, CutParams};

pub(super) struct Cut<'p> {
    consts: CutConsts,
    params: CutParams,
    /// `[chunks, Hv, ..]`
    ws: Read<'p, f32>,
    /// `[segments]` of (first chunk, chunks, slot, slot backward)
    segments: Read<'p, Entry>,
    /// Two tables `[segments, Hv]`
    walks: Write<'p, Entry>,
}

impl<'p> Cut<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (CutConsts, CutParams) = (b.consts()?, b.params()?);
        check_heads(b, 1, p.hv, 16, None)?;
        check_chunk(b, c.chunk)?;
        b.expect("grad", c.grad, c.grad <= 1, "0 or 1")?;
        b.expect("back", c.back, c.back <= 1, "0 or 1")?;
        b.expect("exact", c.exact, c.exact <= 2, "0, 1 or 2")?;
        b.expect_grid([p.hv as usize, 1, 1])?;
        let rows = p.segments as u64 * p.hv as u64;
        b.expect("half", p.half, p.half as u64 >= rows, "at least segments x hv")?;
        Ok(Cut {
            ws: b.read(0, 0)?,
            segments: b.read(1, p.segments as u64)?,
            walks: b.write(2, p.half as u64 + rows)?,
            consts: c,
            params: p,
        })
    }

    /// The segments in the order that they are walked in, as (index, entry, slot).
    fn ordered(&self) -> impl Iterator<Item = (usize, Entry, u32)> + '_ {
        let count = self.params.segments as usize;
        let back = self.consts.back == 1;
        (0..count).map(move |i| {
            let s = if back { count - 1 - i } else { i };
            let entry = self.segments.all()[s];
            (s, entry, if back { entry[3] } else { entry[2] })
        })
    }

    /// How many chunks of a segment before the cut it takes to forget, counted from the cut; none if there are not enough.
    fn chunks_to_forget(&self, [first, chunks, ..]: Entry, h: usize) -> Option<u32> {
        let (c, hv) = (self.consts.chunk as usize, self.params.hv as usize);
        let size = ws_size(self.consts.chunk, self.consts.grad == 1);
        let mut kept = 1.0;
        for n in 1..=chunks {
            let chunk = if self.consts.back == 1 { first + n - 1 } else { first + chunks - n };
            let at = (chunk as usize * hv + h) * size + 2 * c * c + 3 * c;
            let [gamma, contracts] = [self.ws.all()[at], self.ws.all()[at + 1]];
            if contracts != 1.0 {
                return None;
            }
            kept *= gamma;
            // NaN is never forgotten.
            if kept < self.params.forgotten {
                return Some(n);
            }
        }
        None
    }
}

impl Row for Cut<'_> {
    fn begin(&self) -> Result<()> {
        let p = &self.params;
        let segments = &self.segments.all()[..p.segments as usize];
        let chunks = self.ws.all().len() / (ws_size(self.consts.chunk, self.consts.grad == 1) * p.hv as usize);
        runs(CUT.name, "segments", segments, chunks)?;
        match self.ordered().last() {
            Some((s, _, slot)) if slot >= p.sequences => {
                let what = format!("{}: segments[{s}] slot", CUT.name);
                Err(Error::argument(what, slot, format!("below {} for the last of a sequence", p.sequences)))
            }
            _ => Ok(()),
        }
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.params.hv as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, _: S, _: usize, h: usize, _: &mut Local) -> Result<()> {
        let (p, back) = (&self.params, self.consts.back == 1);
        let put = |table: usize, segment: usize, walk: Entry| {
            let at = table + segment * p.hv as usize + h;
            // SAFETY: the walks of this head belong to this cell alone.
            unsafe { self.walks.part(at, 1) }.copy_from_slice(&[walk]);
        };
        let (first_table, second_table) = (0, p.half as usize);
        // The walk under way, and the segment it began with.
        let mut open: Option<(usize, Entry)> = None;
        let mut next = self.ordered().skip(1);
        for (s, entry, slot) in self.ordered() {
            let [first, chunks, ..] = entry;
            let ends = slot < p.sequences;
            put(second_table, s, [0; 4]);
            open = Some(match open {
                None => (s, [first, chunks, slot, slot]),
                // Over the cut, and into the sequence's slot if that is its end.
                Some((begun, [from, n, start, to])) => {
                    (begun, [from.min(first), n + chunks, start, if ends { slot } else { to }])
                }
            });
            let after = next.next().map_or(0, |(_, _, slot)| slot);
            let warm = if self.consts.exact == 2 || ends { None } else { self.chunks_to_forget(entry, h) };
            let walk = match warm {
                _ if ends => [0; 4],
                Some(n) => [if back { first } else { first + chunks - n }, n, 0, after],
                None if self.consts.exact > 0 => [first, chunks, 1, after],
                None => [0; 4],
            };
            put(first_table, s, walk);
            if let Some((begun, all)) = open.filter(|_| ends || walk[1] > 0) {
                put(second_table, begun, all);
                open = None;
            }
        }
        Ok(())
    }
}

pub(super) struct Carry<'p> {
    consts: CarryConsts,
    params: CarryParams,
    /// `[segments, Hv]`
    walks: Read<'p, Entry>,
    /// `[slots, Hv, K, K]`
    m: Read<'p, f32>,
    sequences: Read<'p, Entry>,
    /// Sequences in the launch.
    count: usize,
    segments: Read<'p, Entry>,
    /// `[sequences, Hv, K, V]`
    state: Read<'p, f32>,
    /// `[slots, Hv, K, V]`
    carried: Write<'p, f32>,
    slots: usize,
}

impl<'p> Carry<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (CarryConsts, CarryParams) = (b.consts()?, b.params()?);
        check_heads(b, 1, p.hv, c.dk, None)?;
        check_columns(b, p.dv, c.dv_tile)?;
        b.expect("back", c.back, c.back <= 1, "0 or 1")?;
        let count = b.grid()[0];
        b.expect_grid([count, p.hv as usize, (p.dv / c.dv_tile) as usize])?;
        let state = p.hv as u64 * c.dk as u64 * p.dv as u64;
        let carried = b.write::<f32>(5, count as u64 * state)?;
        Ok(Carry {
            walks: b.read(0, 0)?,
            m: b.read(1, 0)?,
            sequences: b.read(2, count as u64)?,
            count,
            segments: b.read(3, 0)?,
            state: b.read(4, count as u64 * state)?,
            slots: carried.len() / state as usize,
            carried,
            consts: c,
            params: p,
        })
    }
}

impl Row for Carry<'_> {
    fn begin(&self) -> Result<()> {
        let (hv, dk) = (self.params.hv as usize, self.consts.dk as usize);
        let segments = self.segments.all();
        let known = segments.len().min(self.walks.all().len() / hv);
        runs(CARRY.name, "sequences", &self.sequences.all()[..self.count], known)?;
        let slots: Vec<Entry> = segments.iter().map(|e| [0, 0, e[2 + self.consts.back as usize], 0]).collect();
        distinct_slots(CARRY.name, "segments", &slots, self.slots)?;
        let transitions = self.m.all().len() / (hv * dk * dk);
        match self.walks.all()[..known * hv].iter().find(|w| w[1] > 0 && w[2] == 1 && w[3] as usize >= transitions) {
            Some(w) => {
                Err(Error::argument(format!("{}: slot of a walk", CARRY.name), w[3], format!("below {transitions}")))
            }
            None => Ok(()),
        }
    }

    fn phases(&self) -> Vec<usize> {
        vec![self.count * self.params.hv as usize * (self.params.dv / self.consts.dv_tile) as usize]
    }

    #[inline(always)]
    fn cell<S: Simd>(&self, s: S, _: usize, cell: usize, local: &mut Local) -> Result<()> {
        let (dk, dv, hv) = (self.consts.dk as usize, self.params.dv as usize, self.params.hv as usize);
        let (tile, back) = (self.consts.dv_tile as usize, self.consts.back == 1);
        let (column, rest) = (cell % (dv / tile) * tile, cell / (dv / tile));
        let (h, sequence) = (rest % hv, rest / hv);
        let [first, count, ..] = self.sequences.all()[sequence].map(|n| n as usize);
        let columns = |slot: usize| Columns { first: (slot * hv + h) * dk * dv + column, dk, dv, tile };

        let rest = &mut local.scratch.floats(2 * dk * tile);
        let (mut panels, mut after) = (cut(rest, dk * tile), cut(rest, dk * tile));
        let begin = columns(sequence);
        for i in 0..dk {
            let row = &self.state.all()[begin.first + i * dv..][..tile];
            for (j, x) in row.chunks_exact(WIDTH).enumerate() {
                panels[(j * dk + i) * WIDTH..][..WIDTH].copy_from_slice(x);
            }
        }
        // The first state goes where the walk of the first segment starts from; a sequence without keeps it.
        let mut at = if back { first + count } else { first };
        let slot = |i: usize| self.segments.all()[i][2 + self.consts.back as usize] as usize;
        let begins = match count {
            0 => sequence,
            _ if back => slot(at - 1),
            _ => slot(at),
        };
        // SAFETY: these columns of this head of the slots of this sequence belong to this cell alone.
        unsafe { columns(begins).write(panels, &self.carried) };
        for _ in 1..count {
            let segment = if back { at - 1 } else { at };
            at = if back { at - 1 } else { at + 1 };
            let [_, chunks, transition, to] = self.walks.all()[segment * hv + h].map(|n| n as usize);
            let next = slot(if back { at - 1 } else { at });
            if chunks == 0 {
                continue;
            }
            // SAFETY: as above.
            unsafe { columns(next).read(&self.carried, after) };
            if transition == 1 {
                let m = self.m.all()[(to * hv + h) * dk * dk..][..dk * dk].as_ptr();
                let left = if back { Left { ptr: m, row: 1, col: dk } } else { Left { ptr: m, row: dk, col: 1 } };
                for (before, after) in panels.chunks_exact(dk * WIDTH).zip(after.chunks_exact_mut(dk * WIDTH)) {
                    let after = after.as_mut_ptr();
                    // SAFETY: M has dk rows of dk numbers, both panels dk rows of 16.
                    unsafe {
                        product(
                            s,
                            dk,
                            |_| dk,
                            left,
                            before.as_ptr(),
                            WIDTH,
                            #[inline(always)]
                            |i, j, v| {
                                let to = after.add(i * WIDTH + j);
                                store(s, to, s.add_f32s(load(s, to), v));
                            },
                        );
                    }
                }
                // SAFETY: as above.
                unsafe { columns(next).write(after, &self.carried) };
            }
            std::mem::swap(&mut panels, &mut after);
        }
        Ok(())
    }
}
