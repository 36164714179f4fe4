//! Builders of the model: each function checks its arguments and appends the launches of one operation to a [`Pass`](crate::pass::Pass).
//!
//! Activations are f32 matrices of tokens by numbers ([`Rows`], or a packed [`View`]); weights keep their stored type and may
//! lie in several parts ([`Weight`]), because a device limits how much a kernel sees through one argument. Activations are
//! not cut: an operation on more tokens than fit is refused with the numbers, and the caller sends fewer at a time.

mod attention;
mod grad;
mod linear;
mod mixer;
mod small;
mod weight;

pub use attention::{Attention, AttentionShape, KvPage, attention, attention_scratch};
pub use grad::{
    ConvGrad, GateGrad, GatedNormGrad, conv_grad, conv_grad_scratch, gate_grad, gate_grad_scratch, gated_norm_grad,
    gated_norm_grad_scratch,
};
pub use linear::{Norm, linear, norm_linear, swiglu_up};
pub use mixer::{Seqs, conv, gate, gated_norm, mix_step};
pub use small::{argmax, copy, embed, fill, rms_norm, swiglu};
pub use weight::{Part, Weight};

use crate::backend::View;
use crate::error::{Error, Result};
use crate::pass::Rows;
use crate::tune::Caps;

/// The view cut down to the numbers of `size` bytes that a kernel uses, a product of `counts`, if the device can show them
/// to a kernel.
fn need(caps: &Caps, what: &str, view: &View, size: u64, counts: &[u64]) -> Result<View> {
    let bytes = count(what, counts)? * size;
    if view.bytes < bytes {
        let expected = format!("at least {bytes} bytes for {counts:?} numbers");
        return Err(Error::argument(what, format!("{} bytes", view.bytes), expected));
    }
    if !view.offset.is_multiple_of(caps.align.max(1)) {
        let expected = format!("a multiple of {} on {}", caps.align, caps.name);
        return Err(Error::argument(format!("{what}: first byte of the view"), view.offset, expected));
    }
    if bytes > caps.max_binding {
        return Err(Error::Unsupported {
            what: format!("{what} of {bytes} bytes"),
            by: caps.name.clone(),
            why: format!("a kernel sees at most {} bytes of a buffer", caps.max_binding),
        });
    }
    view.slice(0, bytes)
}

/// [`need`] of f32 or u32 numbers.
fn words(caps: &Caps, what: &str, view: &View, counts: &[u64]) -> Result<View> {
    need(caps, what, view, 4, counts)
}

/// The same for `rows` rows of `width` f32 numbers.
fn need_rows(caps: &Caps, what: &str, at: &Rows, rows: u64, width: u64) -> Result<View> {
    if rows > 1 && at.stride < width {
        return Err(Error::argument(format!("{what}: stride"), at.stride, format!("at least {width}")));
    }
    let (stride, off) = (small(format!("{what}: stride"), at.stride)?, small(format!("{what}: offset"), at.off)?);
    // Each term is below 2^32 by now, so that their sum does not overflow.
    count(&format!("{what}: rows"), &[rows, stride.max(1) as u64])?;
    small(format!("{what}: width"), width.max(off as u64))?;
    words(caps, what, &at.view, &[at.reach(rows, width)])
}

/// The product of sizes. Kernels count the numbers of one argument in 32 bits.
fn count(what: &str, sizes: &[u64]) -> Result<u64> {
    let n = sizes.iter().try_fold(1u64, |n, &size| n.checked_mul(size)).filter(|&n| n <= u32::MAX as u64);
    n.ok_or_else(|| Error::argument(what, format!("{sizes:?}"), "a product less than 2^32"))
}

/// A number that kernels hold in 32 bits.
fn small(what: impl Into<String>, n: u64) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::argument(what, n, "less than 2^32"))
}

/// A number that kernels hold in 32 bits, and not zero.
fn some(what: impl Into<String>, n: u64) -> Result<u32> {
    let what = what.into();
    if n == 0 { Err(Error::argument(what, 0, "at least 1")) } else { small(what, n) }
}
