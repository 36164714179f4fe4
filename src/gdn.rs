//! The Gated DeltaNet operator: [`Prefill`] (chunked), [`Step`] (token by token) and [`Backward`] (the gradients of a
//! prefill) record launches over device memory; [`prefill`], [`decode`], [`verify`] and [`backward`](fn@backward) do the
//! same from and to host slices.
//!
//! Per value head with state `S [K, V]`, key head by [`HeadMap`](crate::shape::HeadMap), `s` the scale (default `K^-1/2`):
//!
//! ```text
//! S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
//! ```
//!
//! The decay comes first, the error is taken against the decayed state, and the output is read after the write (Yang et al.,
//! "Gated Delta Networks", 2024). Prefill computes the same in chunks; see [`crate::kernel::gdn`] for its two kernels. On a
//! wide device that few heads do not occupy, long sequences are cut into segments that run at the same time; see
//! [`crate::kernel::gdn_cut`] for how, [`crate::tune::Cut`] for when.
//!
//! # Inputs out of the ordinary
//! - `g` is a log decay: at most 0. Minus infinity is legal and forgets everything. Host slices are checked, and NaN or a
//!   positive value is an error; a kernel given device memory with such values computes something, and ends.
//! - NaN or infinity in q, k, v, beta or the initial state spreads to the outputs of the same sequence and head from that
//!   token's chunk on, and to nothing else; not beyond a cut that the head has forgotten it before, unless [`Options::exact`].
//! - Keys need not have unit length; with `beta |k|^2 > 2` the recurrence itself grows without bound.
//! - A sequence of no tokens leaves its state as it is.

mod backward;
mod cut;
mod host;
mod prefill;
mod step;

pub use backward::{Backward, GradIo};
pub use host::{Cotangents, Gradients, Inputs, Outputs, backward, decode, prefill, verify};
pub use prefill::Prefill;
pub use step::{Commit, MAX_STEP_TOKENS, Step};

use crate::backend::View;
use crate::error::{Error, Result};
use crate::pass::Rows;
use crate::shape::{Dtype, Heads, Shape};
use crate::tune::{Caps, Cut, Tile};

/// How the operator is asked to compute.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Options {
    /// s, the factor of q; `K^-1/2` if none.
    pub scale: Option<f32>,
    /// Divide q and k by `sqrt(sum of squares + 1e-6)` over K.
    pub qk_l2norm: bool,
    /// How q, k, v and o are stored on the device.
    pub store: Dtype,
    /// Where a sequence is cut into segments that run at the same time, carry the whole state over every cut. Without, a head
    /// leaves out there what its gates have shrunk to less than `exp(-17)`, or `exp(-12)` where numbers have 16 bits; see
    /// [`crate::kernel::gdn_cut`].
    pub exact: bool,
    /// Chunks of a segment at most, 0 for sequences that are never cut; the device's own choice ([`crate::tune::Cut`]) if none.
    pub cut: Option<u32>,
    /// Bytes of scratch that a call may take, about, and at least what a chunk needs; the device's own choice ([`crate::tune`]) if
    /// none. What does not fit goes through in pieces, one after the other; a backward pass of several blocks of pieces walks forward twice. To
    /// do all at once, a backward pass with K = V = 128 takes 6.8 KB a token and value head.
    pub scratch: Option<u64>,
}

impl Options {
    /// The tile with the cut and the scratch that are asked for.
    fn tile(&self, tile: Tile) -> Tile {
        let mut tile = tile;
        if let Some(chunks) = self.cut {
            tile.cut = (chunks > 0).then_some(Cut::every(chunks));
        }
        if let Some(bytes) = self.scratch {
            // Of a backward pass: what a block saves, as much again for its gradients, and less than a quarter of that beside.
            (tile.scratch, tile.grad_scratch, tile.grad_states) = (bytes, bytes / 9 * 4, bytes / 9 * 4);
        }
        tile
    }

    fn scale_for(&self, heads: &Heads) -> Result<f32> {
        match self.scale {
            None => Ok((heads.k as f32).powf(-0.5)),
            Some(s) if s.is_finite() => Ok(s),
            Some(s) => Err(Error::argument("scale", s, "a finite number")),
        }
    }
}

/// Device memory that one call reads and writes.
#[derive(Debug, Clone)]
pub struct Io {
    /// `[T, Hk K]`.
    pub q: Rows,
    /// `[T, Hk K]`.
    pub k: Rows,
    /// `[T, Hv V]`.
    pub v: Rows,
    /// `[T, Hv]` f32, log decay.
    pub g: View,
    /// `[T, Hv]` f32.
    pub beta: View,
    /// `[N, Hv, K, V]` f32: the state before the first token, replaced by the state after the last.
    pub state: View,
    /// `[T, Hv V]`.
    pub o: Rows,
}

impl Io {
    /// Checks that every view holds the shape.
    fn check(&self, shape: &Shape, store: Dtype) -> Result<()> {
        let (t, h) = (shape.tokens(), &shape.heads);
        let (qk, vo) = (h.hk as u64 * h.k as u64, h.hv as u64 * h.v as u64);
        for (what, rows, width) in [("q", &self.q, qk), ("k", &self.k, qk), ("v", &self.v, vo), ("o", &self.o, vo)] {
            check_rows(what, rows, t, width, store)?;
        }
        need("g", &self.g, t * h.hv as u64 * 4)?;
        need("beta", &self.beta, t * h.hv as u64 * 4)?;
        need("state", &self.state, shape.sequences() as u64 * h.state_len() * 4)
    }
}

/// An error unless these are `t` rows of `width` numbers, stored as `store`.
fn check_rows(what: &str, rows: &Rows, t: u64, width: u64, store: Dtype) -> Result<()> {
    if rows.stride < width || rows.stride > u32::MAX as u64 {
        return Err(Error::argument(format!("stride of {what}"), rows.stride, format!("{width} to 2^32 - 1")));
    }
    // Kernels read and write 16-bit numbers in pairs, as 32-bit words.
    if store.size() == 2 && (rows.off % 2 != 0 || rows.stride % 2 != 0) {
        let found = format!("number {} with stride {}", rows.off, rows.stride);
        return Err(Error::argument(format!("rows of {what}"), found, format!("even numbers for {store}")));
    }
    need(what, &rows.view, rows.reach(t, width) * store.size())
}

/// An error unless the view holds `bytes` bytes.
fn need(what: &str, view: &View, bytes: u64) -> Result<()> {
    if view.bytes < bytes {
        return Err(Error::argument(what, format!("{} bytes", view.bytes), format!("at least {bytes} bytes")));
    }
    Ok(())
}

/// A part of some rows as a kernel sees it: an aligned view, the number in it where the first row starts, and the numbers
/// from one row to the next.
struct Window {
    view: View,
    off: u32,
    stride: u32,
}

/// The rows `range` of `rows`, each `width` numbers of `size` bytes.
fn window(caps: &Caps, what: &str, rows: &Rows, range: &std::ops::Range<u64>, width: u64, size: u64) -> Result<Window> {
    let begin = (rows.off + range.start * rows.stride) * size;
    let end = (rows.off + (range.end - 1) * rows.stride + width) * size;
    // 16-bit numbers are read as 32-bit words, so a window must not begin inside one.
    let aligned = begin - begin % caps.align.max(4);
    // Kernels read whole words; the last one may reach past an odd end.
    let end = end.next_multiple_of(4).min(rows.view.bytes);
    if end - aligned > caps.max_binding {
        return Err(Error::Unsupported {
            what: format!("{what}: {} bytes for tokens {range:?}", end - aligned),
            by: caps.name.clone(),
            why: format!("a binding holds {} bytes", caps.max_binding),
        });
    }
    let off = ((begin - aligned) / size) as u32;
    Ok(Window { view: rows.view.slice(aligned, end - aligned)?, off, stride: rows.stride as u32 })
}
