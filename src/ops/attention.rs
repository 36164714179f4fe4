//! Causal attention with a cache of keys and values in pages.

use std::ops::Range;

use super::{need, small, some, words};
use crate::backend::View;
use crate::error::{Error, Result};
use crate::kernel::model::{
    ATTEND, ATTEND_MERGE, ATTN_PREPARE, AttendConsts, AttendMergeConsts, AttendMergeParams, AttendParams,
    AttnPrepareConsts, AttnPrepareParams,
};
use crate::pass::Pass;
use crate::shape::Dtype;
use crate::tune::{self, AttendTile, Caps};

/// What stays the same from call to call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// D: size of a head, a multiple of 16 from 16 to 256.
    pub dim: u32,
    /// Rotated numbers of a head: even, from 2 to `dim`.
    pub rot: u32,
    /// How keys and values are stored.
    pub kv_dtype: Dtype,
    /// eps of the norms of q and k.
    pub eps: f32,
    /// Factor of the scores.
    pub scale: f32,
}

impl AttentionShape {
    /// Bytes of the keys, or of the values, of one position.
    pub fn kv_row(&self) -> u64 {
        self.kv_heads as u64 * self.dim as u64 * self.kv_dtype.size()
    }

    /// Numbers in a row of qkv: per query head its query and its gate, then key heads, then value heads.
    pub fn qkv_width(&self) -> u64 {
        2 * (self.heads as u64 + self.kv_heads as u64) * self.dim as u64
    }

    fn check(&self) -> Result<()> {
        if self.kv_heads == 0 || self.heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a multiple of the {} key heads, both at least 1", self.kv_heads);
            return Err(Error::argument("heads", self.heads, expected));
        }
        if self.heads > 1 << 16 {
            return Err(Error::argument("heads", self.heads, "at most 65536"));
        }
        if self.dim < 16 || self.dim > 256 || !self.dim.is_multiple_of(16) {
            return Err(Error::argument("dim (head size)", self.dim, "a multiple of 16 from 16 to 256"));
        }
        if self.rot == 0 || self.rot > self.dim || !self.rot.is_multiple_of(2) {
            return Err(Error::argument("rot (rotated numbers)", self.rot, format!("even, from 2 to {}", self.dim)));
        }
        Ok(())
    }
}

/// Keys and values of the positions `start .. start + len`.
#[derive(Debug, Clone)]
pub struct KvPage {
    /// First position.
    pub start: u64,
    /// Positions.
    pub len: u64,
    /// `[len, kv, D]` in the type of the cache.
    pub k: View,
    /// `[len, kv, D]` in the type of the cache.
    pub v: View,
}

/// One call of [`attention`].
#[derive(Debug, Clone)]
pub struct Attention<'a> {
    /// Heads and sizes.
    pub shape: AttentionShape,
    /// Query tokens, T.
    pub tokens: u64,
    /// What `pos` may hold when the pass runs. A pass that is run again with later positions names all of them.
    pub positions: Range<u64>,
    /// `[T, 2 heads D + 2 kv D]` f32: per query head `[query D | gate D]`, then key heads, then value heads.
    pub qkv: &'a View,
    /// `[D]` f32.
    pub q_norm: &'a View,
    /// `[D]` f32.
    pub k_norm: &'a View,
    /// `[T, rot]` f32: `rot / 2` cosines, then `rot / 2` sines.
    pub rope: &'a View,
    /// `[T]` u32: the position of each token.
    pub pos: &'a View,
    /// The cache, from position 0 without gaps up to the end of `positions` or further.
    pub pages: &'a [KvPage],
    /// Scratch: `[T, heads, D]` f32.
    pub q: &'a View,
    /// Scratch of [`attention_scratch`] bytes.
    pub part: &'a View,
    /// `[T, heads D]` f32: the output, gated.
    pub y: &'a View,
}

/// Bytes of `part` that [`attention`] needs for these pages, given as (start, len), when `positions` ends at `end` or before.
pub fn attention_scratch(
    caps: &Caps,
    shape: &AttentionShape,
    tokens: u64,
    pages: impl IntoIterator<Item = (u64, u64)>,
    end: u64,
) -> u64 {
    let slots: u64 = pages.into_iter().map(|(start, len)| cut(caps, shape, tokens, start, len, end).most as u64).sum();
    tokens * slots * slot(shape)
}

/// Bytes of the partial results of one token in one split.
fn slot(shape: &AttentionShape) -> u64 {
    shape.heads as u64 * (shape.dim as u64 + 2) * 4
}

/// The tile for a page.
fn cut(caps: &Caps, s: &AttentionShape, tokens: u64, start: u64, len: u64, end: u64) -> AttendTile {
    let keys = end.saturating_sub(start).min(len);
    let rows = tokens * (s.heads / s.kv_heads.max(1)) as u64;
    tune::attend(caps, rows, s.kv_heads, keys, tokens * slot(s))
}

/// Norms and rotary on q and k, k and v into the cache, causal softmax attention, output gate.
///
/// # Errors
/// [`Error::Argument`] naming the argument that is too small, unaligned or out of range; [`Error::Unsupported`] for one that
/// is too large.
pub fn attention(caps: &Caps, pass: &mut Pass, a: &Attention) -> Result<()> {
    let s = &a.shape;
    s.check()?;
    let (heads, kv, dim, t) = (s.heads as u64, s.kv_heads as u64, s.dim as u64, a.tokens);
    let end = a.positions.end;
    small("positions", end)?;
    if a.positions.is_empty() && t > 0 {
        return Err(Error::argument("positions", format!("{:?}", a.positions), "those of the tokens"));
    }
    let qkv = words(caps, "qkv", a.qkv, &[t, s.qkv_width()])?;
    let q_norm = words(caps, "q_norm", a.q_norm, &[dim])?;
    let k_norm = words(caps, "k_norm", a.k_norm, &[dim])?;
    let rope = words(caps, "rope", a.rope, &[t, s.rot as u64])?;
    let pos = words(caps, "pos", a.pos, &[t])?;
    let q = words(caps, "q", a.q, &[t, heads, dim])?;
    let y = words(caps, "y", a.y, &[t, heads, dim])?;

    let mut pages = Vec::new();
    let mut next = 0;
    let mut slots = 0;
    for (i, p) in a.pages.iter().enumerate() {
        if p.start != next {
            return Err(Error::argument(format!("pages[{i}].start"), p.start, next));
        }
        next += some(format!("pages[{i}].len"), p.len)? as u64;
        if p.start >= end {
            break;
        }
        let k = need(caps, &format!("pages[{i}].k"), &p.k, s.kv_dtype.size(), &[p.len, kv, dim])?;
        let v = need(caps, &format!("pages[{i}].v"), &p.v, s.kv_dtype.size(), &[p.len, kv, dim])?;
        let tile = cut(caps, s, t, p.start, p.len, end);
        let splits = (end.min(next) - p.start).div_ceil(tile.span as u64);
        pages.push((KvPage { k, v, ..*p }, tile, slots, splits as u32));
        slots += splits;
    }
    if next < end {
        return Err(Error::argument("pages", format!("{next} positions"), format!("at least {end}")));
    }
    let part = words(caps, "part", a.part, &[t, heads, slots, dim + 2])?;

    let tokens = small("tokens", t)?;
    let (page_pos, lanes) = (|p: &KvPage| (p.start as u32, p.len as u32), tune::head_lanes(caps, s.dim));
    for (p, ..) in pages.iter().filter(|(p, ..)| p.start + p.len > a.positions.start) {
        let consts = AttnPrepareConsts { dim: s.dim, rot: s.rot, kv_type: s.kv_dtype.code(), lanes };
        let (page_start, page_len) = page_pos(p);
        let params = AttnPrepareParams { heads: s.heads, kv_heads: s.kv_heads, page_start, page_len, eps: s.eps };
        let args = [&qkv, &q_norm, &k_norm, &rope, &pos, &q, &p.k, &p.v];
        pass.launch(
            &ATTN_PREPARE,
            consts,
            params,
            &args,
            [s.heads + 2 * s.kv_heads, tokens, 1],
            t * s.qkv_width() * 12,
        );
    }
    let (rows, slots) = (t * heads / kv, small("slots", slots)?);
    for (p, tile, slot0, splits) in &pages {
        let consts = AttendConsts {
            dim: s.dim,
            kv_type: s.kv_dtype.code(),
            tile_q: tile.tile_q,
            tile_k: tile.tile_k,
            lanes: tile.lanes,
        };
        let (page_start, page_len) = page_pos(p);
        let params = AttendParams {
            tokens,
            heads: s.heads,
            kv_heads: s.kv_heads,
            page_start,
            page_len,
            span: tile.span,
            slot0: *slot0 as u32,
            slots,
            scale: s.scale,
        };
        let grid = [small("query cells", rows.div_ceil(tile.tile_q as u64))?, s.kv_heads, *splits];
        let keys = end.min(p.start + p.len) - p.start;
        let work = 4 * t * heads * dim * keys + grid[0] as u64 * keys * s.kv_row() * 2;
        pass.launch(&ATTEND, consts, params, &[&q, &p.k, &p.v, &pos, &part], grid, work);
    }
    let consts = AttendMergeConsts { dim: s.dim, lanes };
    let params = AttendMergeParams { heads: some("heads", heads)?, slots, qkv_stride: s.qkv_width() as u32 };
    pass.launch(&ATTEND_MERGE, consts, params, &[&part, &qkv, &y], [s.heads, tokens, 1], part.bytes * 2);
    Ok(())
}
