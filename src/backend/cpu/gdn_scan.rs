//! [`crate::kernel::gdn::SCAN`]: carries the state over the chunks of a segment.
//!
//! The columns of the state are independent of each other, so a cell walks its segment 16 columns at a time within a chunk:
//! a panel of the state is `[K, 16]`, and the panels of W, N and O that it needs are `[C, 16]`. All of that stays in the
//! first-level cache, and K and Q, once converted, in the second.

use pulp::Simd;

use super::bind::{Bind, Read, Stored, StoredMut, Write};
use super::engine::{Local, Row};
use super::gdn_prepare::{check_heads, chunk_length, ws_size};
use super::memory::cut;
use super::product::{Left, WIDTH, product};
use super::simd::{fma, load, narrow, prefetch, store, widen};
use super::table::{Entry, distinct_slots, runs};
use crate::error::Result;
use crate::kernel::gdn::{SCAN, ScanConsts, ScanParams};
use crate::plan::saved_per_chunk_head;

pub(super) struct Scan<'p> {
    consts: ScanConsts,
    params: ScanParams,
    /// q, k, v, o `[window, *]`
    q: Stored<'p>,
    k: Stored<'p>,
    v: Stored<'p>,
    /// `[chunks, Hv, 2 C C + 4 C]`
    ws: Read<'p, f32>,
    chunks: Read<'p, Entry>,
    /// `[segments]` or `[segments, Hv]`
    segments: Read<'p, Entry>,
    /// Segments in the launch.
    count: usize,
    /// `[slots, Hv, K, V]`
    state: Write<'p, f32>,
    slots: usize,
    out: Out<'p>,
    /// Tokens that q, k, v and o all hold.
    tokens: usize,
}

/// `tile` columns of a state `[K, V]`, the first number of which is `first`.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub first: usize,
    pub dk: usize,
    pub dv: usize,
    pub tile: usize,
}

impl Columns {
    /// As panels `[tile / 16][K, 16]`.
    ///
    /// # Safety
    /// Nothing writes these columns meanwhile.
    #[inline(always)]
    pub unsafe fn read(self, state: &Write<f32>, panels: &mut [f32]) {
        for i in 0..self.dk {
            // SAFETY: as the caller promises.
            let row = unsafe { state.peek(self.first + i * self.dv, self.tile) };
            for (j, x) in row.chunks_exact(WIDTH).enumerate() {
                panels[(j * self.dk + i) * WIDTH..][..WIDTH].copy_from_slice(x);
            }
        }
    }

    /// Back from panels.
    ///
    /// # Safety
    /// No other reference into these columns is alive.
    #[inline(always)]
    pub unsafe fn write(self, panels: &[f32], state: &Write<f32>) {
        for i in 0..self.dk {
            // SAFETY: as the caller promises.
            let row = unsafe { state.part(self.first + i * self.dv, self.tile) };
            for (j, x) in row.chunks_exact_mut(WIDTH).enumerate() {
                x.copy_from_slice(&panels[(j * self.dk + i) * WIDTH..][..WIDTH]);
            }
        }
    }
}

/// Panels of the state that a walk starts from; they begin at column `column` of it.
///
/// # Safety
/// Nothing writes these columns meanwhile.
#[inline(always)]
pub(super) unsafe fn begin(
    start: Start,
    columns: impl Fn(usize) -> Columns,
    column: usize,
    state: &Write<f32>,
    panels: &mut [f32],
) {
    match start {
        // SAFETY: as the caller promises.
        Start::Slot(slot) => unsafe { columns(slot).read(state, panels) },
        Start::Zero => panels.fill(0.0),
        Start::Identity => {
            let Columns { dk, tile, .. } = columns(0);
            panels.fill(0.0);
            for j in 0..tile {
                panels[(j / WIDTH * dk + column + j) * WIDTH + j % WIDTH] = 1.0;
            }
        }
    }
}

/// What a scan leaves behind besides the state.
enum Out<'p> {
    /// o `[window, *]`
    Output(StoredMut<'p>),
    /// `[chunks, Hv, K V + 2 C V]`: S, U, N
    Saved(Write<'p, f32>),
    Nothing,
}

impl<'p> Scan<'p> {
    pub fn bind(b: &Bind<'p>) -> Result<Self> {
        let (c, p): (ScanConsts, ScanParams) = (b.consts()?, b.params()?);
        check_heads(b, p.hk, p.hv, c.dk, None)?;
        check_columns(b, p.dv, c.dv_tile)?;
        b.expect("chunk", c.chunk, c.chunk > 0 && c.chunk <= 256 && c.chunk % 16 == 0, "a multiple of 16 to 256")?;
        let count = b.grid()[0];
        b.expect_grid([count, p.hv as usize, (p.dv / c.dv_tile) as usize])?;
        let (qk, vo) = (b.dtype("qk_type", c.qk_type)?, b.dtype("v_type", c.v_type)?);
        b.expect("save", c.save, c.save <= 2, "0, 1 or 2")?;
        b.expect("grad", c.grad, c.grad <= 1 && (c.save != 1 || c.grad == 1), "0 or 1, with save 1 only 1")?;
        b.expect("walk", c.walk, c.walk <= 1 || (c.walk <= 3 && c.save == 2), "0 or 1, with save 2 also 2 or 3")?;
        b.expect("dv", p.dv, c.walk != TRANSITION || p.dv == c.dk, "dk for a transition")?;
        let (q, k, v) = (b.stored(0, qk, 0)?, b.stored(1, qk, 0)?, b.stored(2, vo, 0)?);
        let (wide_k, wide_v) = ((p.hk * c.dk) as usize, (p.hv * p.dv) as usize);
        let mut tokens = b.rows(1, k.len, p.k_off, p.k_stride, wide_k)?;
        if c.walk != TRANSITION {
            tokens = tokens.min(b.rows(2, v.len, p.v_off, p.v_stride, wide_v)?);
        }
        let out = match c.save {
            0 => {
                let o = b.stored_mut(7, vo, 0)?;
                tokens = tokens.min(b.rows(0, q.len, p.q_off, p.q_stride, wide_k)?);
                tokens = tokens.min(b.rows(7, o.len, p.o_off, p.o_stride, wide_v)?);
                Out::Output(o)
            }
            1 => Out::Saved(b.write(7, 0)?),
            _ => Out::Nothing,
        };
        let state = b.write::<f32>(6, 0)?;
        Ok(Scan {
            slots: state.len() / (p.hv as usize * c.dk as usize * p.dv as usize),
            q,
            k,
            v,
            ws: b.read(3, 0)?,
            chunks: b.read(4, 0)?,
            segments: b.read(5, table_rows(c.walk, count, p.hv))?,
            count,
            state,
            out,
            tokens,
            consts: c,
            params: p,
        })
    }
}

/// Checks the columns that a cell carries.
pub(super) fn check_columns(b: &Bind, dv: u32, tile: u32) -> Result<()> {
    b.expect("dv", dv, dv > 0 && dv <= 256 && dv % 16 == 0, "a multiple of 16 to 256")?;
    b.expect("dv_tile", tile, tile > 0 && tile % 16 == 0 && dv % tile == 0, "a multiple of 16 that divides dv")
}

/// `walk` of a row: walks from zero, and those of transitions from the identity.
pub(super) const FROM_ZERO: u32 = 2;
pub(super) const TRANSITION: u32 = 3;

/// Rows of the table of segments or of walks.
pub(super) fn table_rows(walk: u32, segments: usize, hv: u32) -> u64 {
    segments as u64 * if walk == 0 { 1 } else { hv as u64 }
}

/// What a cell walks.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    pub first_chunk: usize,
    pub chunks: usize,
    pub start: Start,
    /// The slot that the state is left in.
    pub to: usize,
}

/// The state that a walk starts from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Slot(usize),
    Zero,
    Identity,
}

impl Walk {
    /// That of head `h` of a segment, if it has one.
    pub fn of(table: &[Entry], walk: u32, hv: usize, segment: usize, h: usize) -> Option<Walk> {
        let [first_chunk, chunks, third, fourth] = match walk {
            0 => table[segment],
            _ => table[segment * hv + h],
        }
        .map(|n| n as usize);
        let (start, to) = match walk {
            0 => (Start::Slot(third), third),
            1 => (Start::Slot(third), fourth),
            FROM_ZERO => (Start::Zero, fourth),
            _ => (Start::Identity, fourth),
        };
        let taken = chunks > 0 && (walk != TRANSITION || third == 1);
        taken.then_some(Walk { first_chunk, chunks, start, to })
    }
}

/// What the walks of a launch must keep to.
pub(super) struct Bounds {
    pub slots: usize,
    /// Tokens of a chunk.
    pub most: u32,
    /// Tokens of the window.
    pub tokens: usize,
}

/// Checks segments, or the walks of each head, over chunks of (first token, tokens, ..): walks share no chunk, and no slot that
/// either leaves a state in.
pub(super) fn check_walks(
    kernel: &str,
    table: &[Entry],
    walk: u32,
    hv: usize,
    chunks: &[Entry],
    bounds: Bounds,
) -> Result<()> {
    if walk == 0 {
        return check_chunks(kernel, table, chunks, bounds);
    }
    for h in 0..hv {
        let own: Vec<Walk> = (0..table.len() / hv).filter_map(|s| Walk::of(table, walk, hv, s, h)).collect();
        let entry = |w: &Walk| [w.first_chunk as u32, w.chunks as u32, w.to as u32, 0];
        let mut entries: Vec<Entry> = own.iter().map(entry).collect();
        let Bounds { slots, most, tokens } = bounds;
        check_chunks(kernel, &entries, chunks, Bounds { slots, most, tokens })?;
        entries.extend(own.iter().filter_map(|w| match w.start {
            Start::Slot(from) if from != w.to => Some([0, 0, from as u32, 0]),
            _ => None,
        }));
        distinct_slots(kernel, "segments", &entries, slots)?;
    }
    Ok(())
}

/// Checks segments of (first chunk, chunks, slot, ..) over chunks of (first token, tokens, ..).
fn check_chunks(kernel: &str, segments: &[Entry], chunks: &[Entry], bounds: Bounds) -> Result<()> {
    runs(kernel, "segments", segments, chunks.len())?;
    distinct_slots(kernel, "segments", segments, bounds.slots)?;
    let mut used: Vec<Entry> = Vec::new();
    for &[first, count, ..] in segments {
        let own = first as usize..(first + count) as usize;
        for (i, chunk) in own.clone().zip(&chunks[own]) {
            chunk_length(i, chunk, bounds.most)?;
            used.push(*chunk);
        }
    }
    runs(kernel, "chunks", &used, bounds.tokens)
}

/// The key head that value head `h` reads.
pub(super) fn key_head(head_map: u32, hk: u32, hv: u32, h: usize) -> usize {
    if head_map == 0 { h / (hv / hk) as usize } else { h % hk as usize }
}

impl Row for Scan<'_> {
    fn begin(&self) -> Result<()> {
        let hv = self.params.hv as usize;
        let chunks = self.chunks.all();
        let mut limit =
            chunks.len().min(self.ws.all().len() / (ws_size(self.consts.chunk, self.consts.grad == 1) * hv));
        if let Out::Saved(saved) = &self.out {
            limit = limit.min(saved.len() / (saved_size(self.consts.chunk, self.consts.dk, self.params.dv) * hv));
        }
        let segments = &self.segments.all()[..table_rows(self.consts.walk, self.count, self.params.hv) as usize];
        let bounds = Bounds { slots: self.slots, most: self.consts.chunk, tokens: self.tokens };
        check_walks(SCAN.name, segments, self.consts.walk, hv, &chunks[..limit], bounds)
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

        let rest = &mut local.scratch.floats(dk * tile + 2 * c * dk + c * tile + 3 * c * WIDTH);
        let panels = cut(rest, dk * tile); // S: [tile / 16][K, 16]
        let rows = cut(rest, 2 * c * dk); // K, then Q: [2 len, K]
        let values = cut(rest, c * tile); // V: [len, tile], then O
        let (w, n, n_decayed) = (cut(rest, c * WIDTH), cut(rest, c * WIDTH), cut(rest, c * WIDTH));

        let columns = |slot: usize| Columns { first: (slot * hv + h) * dk * dv + column, dk, dv, tile };
        // SAFETY: these columns of this head of the slots of this walk belong to this cell alone.
        unsafe { begin(start, columns, column, &self.state, panels) };

        let output = matches!(self.out, Out::Output(_));
        let size = ws_size(self.consts.chunk, self.consts.grad == 1);
        for chunk in first_chunk..first_chunk + chunks {
            let [first, len, ..] = self.chunks.all()[chunk].map(|n| n as usize);
            for t in 0..len {
                let at = |off: u32, stride: u32, i: usize| off as usize + (first + t) * stride as usize + i;
                widen(&self.k, at(p.k_off, p.k_stride, hk * dk), &mut rows[t * dk..][..dk]);
                if output {
                    widen(&self.q, at(p.q_off, p.q_stride, hk * dk), &mut rows[(len + t) * dk..][..dk]);
                }
                if start == Start::Identity {
                    values[t * tile..][..tile].fill(0.0);
                } else {
                    widen(&self.v, at(p.v_off, p.v_stride, h * dv + column), &mut values[t * tile..][..tile]);
                }
            }
            let ws = &self.ws.all()[(chunk * hv + h) * size..][..size];
            let next = if chunk + 1 < first_chunk + chunks { self.chunks.all()[chunk + 1][1] as usize } else { 0 };
            for j in 0..tile / WIDTH {
                // Rows of the next chunk lie far apart, where the processor does not foresee them.
                for t in (j..next).step_by(tile / WIDTH) {
                    let at = |off: u32, stride: u32, i: usize| off as usize + (first + len + t) * stride as usize + i;
                    let (wide_k, wide_v) = (dk * self.k.dtype.size() as usize, tile * self.v.dtype.size() as usize);
                    prefetch(self.k.place(at(p.k_off, p.k_stride, hk * dk)), wide_k);
                    if output {
                        prefetch(self.q.place(at(p.q_off, p.q_stride, hk * dk)), wide_k);
                    }
                    prefetch(self.v.place(at(p.v_off, p.v_stride, h * dv + column)), wide_v);
                }
                let panel = &mut panels[j * dk * WIDTH..][..dk * WIDTH];
                let save = match &self.out {
                    Out::Saved(saved) => {
                        let at = (chunk * hv + h) * saved_size(self.consts.chunk, self.consts.dk, p.dv) + column;
                        Some(self.save_state(saved, at + j * WIDTH, panel, len))
                    }
                    _ => None,
                };
                let chunk = Chunk { s, c, len, dk, tile, rows, ws, output, save };
                chunk.panel(panel, &mut values[j * WIDTH..], w, n, n_decayed);
            }
            let Out::Output(o) = &self.out else { continue };
            for t in 0..len {
                let at = p.o_off as usize + (first + t) * p.o_stride as usize + h * dv + column;
                // SAFETY: these columns of this token belong to this cell alone.
                unsafe { narrow(o, at, &values[t * tile..][..tile]) }
            }
        }

        // SAFETY: as above.
        unsafe { columns(to).write(panels, &self.state) };
        Ok(())
    }
}

/// Numbers saved per chunk and value head.
pub(super) fn saved_size(chunk: u32, dk: u32, dv: u32) -> usize {
    saved_per_chunk_head(chunk, dk, dv) as usize / 4
}

impl Scan<'_> {
    /// Saves 16 columns of S from number `at` on; where the same columns of U and N go.
    #[inline(always)]
    fn save_state(&self, saved: &Write<f32>, at: usize, panel: &[f32], len: usize) -> Save {
        let (c, dk, dv) = (self.consts.chunk as usize, self.consts.dk as usize, self.params.dv as usize);
        for (i, row) in panel.chunks_exact(WIDTH).enumerate() {
            // SAFETY: these columns of this chunk and head belong to this cell alone.
            unsafe { saved.part(at + i * dv, WIDTH) }.copy_from_slice(row);
        }
        let u = at + dk * dv;
        for row in (len..c).flat_map(|t| [u + t * dv, u + (c + t) * dv]) {
            // SAFETY: as above.
            unsafe { saved.part(row, WIDTH) }.fill(0.0);
        }
        let reach = (c - 1) * dv + WIDTH;
        Save { u: saved.at(u, reach), n: saved.at(u + c * dv, reach), row: dv }
    }
}

/// 16 columns of U and N `[C, V]`, rows `row` numbers apart.
#[derive(Clone, Copy)]
struct Save {
    u: *mut f32,
    n: *mut f32,
    row: usize,
}

/// One chunk of one head.
struct Chunk<'a, S> {
    s: S,
    c: usize,
    len: usize,
    dk: usize,
    /// Numbers between rows of `values`.
    tile: usize,
    /// K, then Q where there is an output: [2 len, K]
    rows: &'a [f32],
    /// A [C, C], P [C, C], u, o, n [C], gamma_C
    ws: &'a [f32],
    /// O is wanted.
    output: bool,
    /// U and N are.
    save: Option<Save>,
}

impl<S: Simd> Chunk<'_, S> {
    /// 16 columns: `state` [K, 16]; `values` holds V on entry and O on return; the others are [len, 16].
    #[inline(always)]
    fn panel(&self, state: &mut [f32], values: &mut [f32], w: &mut [f32], n: &mut [f32], n_decayed: &mut [f32]) {
        let Chunk { s, c, len, dk, tile, rows, ws, output, save } = *self;
        let (a, rest) = ws.split_at(c * c);
        let (p, rest) = rest.split_at(c * c);
        let (u, o, decay, gamma) = (&rest[..c], &rest[c..][..c], &rest[2 * c..][..c], rest[3 * c]);
        let (state, values) = (state.as_mut_ptr(), values.as_mut_ptr());
        let (w, n, n_decayed) = (w.as_mut_ptr(), n.as_mut_ptr(), n_decayed.as_mut_ptr());
        // SAFETY: every pointer below is to a row of 16 numbers inside the slices above or of `save`: rows of `state` are below
        // dk, rows of the others below len, and rows of `values` are `tile` apart.
        unsafe {
            // W = V - u o (K S)        O = o o (Q S)
            let left = Left { ptr: rows.as_ptr(), row: dk, col: 1 };
            product(
                s,
                if output { 2 * len } else { len },
                |_| dk,
                left,
                state,
                WIDTH,
                #[inline(always)]
                |i, j, x| {
                    if i < len {
                        let v = load(s, values.add(i * tile + j));
                        store(s, w.add(i * WIDTH + j), fma(s, s.splat_f32s(-u[i]), x, v));
                        if let Some(save) = save {
                            store(s, save.u.add(i * save.row + j), s.mul_f32s(s.splat_f32s(u[i]), x));
                        }
                    } else {
                        let i = i - len;
                        store(s, values.add(i * tile + j), s.mul_f32s(s.splat_f32s(o[i]), x));
                    }
                },
            );
            // N = A W, A lower triangular
            let left = Left { ptr: a.as_ptr(), row: c, col: 1 };
            product(
                s,
                len,
                |rows| rows,
                left,
                w,
                WIDTH,
                #[inline(always)]
                |i, j, x| {
                    store(s, n.add(i * WIDTH + j), x);
                    if let Some(save) = save {
                        store(s, save.n.add(i * save.row + j), x);
                    }
                    store(s, n_decayed.add(i * WIDTH + j), s.mul_f32s(s.splat_f32s(decay[i]), x));
                },
            );
            // O += P N, P lower triangular
            let left = Left { ptr: p.as_ptr(), row: c, col: 1 };
            product(
                s,
                if output { len } else { 0 },
                |rows| rows,
                left,
                n,
                WIDTH,
                #[inline(always)]
                |i, j, x| {
                    let to = values.add(i * tile + j);
                    store(s, to, s.add_f32s(load(s, to), x));
                },
            );
            // S = gamma_C S + K^T (n o N)
            let left = Left { ptr: rows.as_ptr(), row: 1, col: dk };
            let gamma = s.splat_f32s(gamma);
            product(
                s,
                dk,
                |_| len,
                left,
                n_decayed,
                WIDTH,
                #[inline(always)]
                |i, j, x| {
                    let to = state.add(i * WIDTH + j);
                    store(s, to, fma(s, gamma, load(s, to), x));
                },
            );
        }
    }
}
