//! Weights of any stored type as vectors.
//!
//! A vector of 16-bit numbers is read as 32-bit words; their lower halves are the even elements and their upper halves the
//! odd ones. Nothing shuffles them back: the other operand of the product is put into the same order once ([`permute`]),
//! and a sum does not mind the order of its terms. Elements past the last whole pair of vectors keep their places.

use pulp::Simd;

use super::bind::Stored;
use super::simd::{fma, load, store, widen};
use crate::shape::Dtype;

/// A stored type.
pub(super) trait Weight {
    const TYPE: Dtype;

    /// The two vectors that `2 * lanes` numbers at `at` make.
    ///
    /// # Safety
    /// So many numbers are there.
    unsafe fn pair<S: Simd>(s: S, at: *const u8) -> (S::f32s, S::f32s);
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Weight for F32 {
    const TYPE: Dtype = Dtype::F32;

    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, at: *const u8) -> (S::f32s, S::f32s) {
        let at = at.cast::<f32>();
        // SAFETY: as the caller promises; the loads accept any alignment.
        unsafe { (load(s, at), load(s, at.wrapping_add(S::F32_LANES))) }
    }
}

impl Weight for F16 {
    const TYPE: Dtype = Dtype::F16;

    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, at: *const u8) -> (S::f32s, S::f32s) {
        // SAFETY: as the caller promises.
        let words = unsafe { words(s, at) };
        let low = s.and_u32s(words, s.splat_u32s(0xffff));
        (half(s, low), half(s, s.wrapping_dyn_shr_u32s(words, s.splat_u32s(16))))
    }
}

/// f16 numbers in the lower halves of words, the upper ones 0, as f32.
#[inline(always)]
fn half<S: Simd>(s: S, h: S::u32s) -> S::f32s {
    let bits = s.and_u32s(h, s.splat_u32s(0x7fff));
    // The exponent and fraction as an f32 of the wrong bias: 2^-112 times the value, subnormals included.
    let value = s.transmute_f32s_u32s(s.wrapping_dyn_shl_u32s(bits, s.splat_u32s(13)));
    let value = s.transmute_u32s_f32s(s.mul_f32s(value, s.splat_f32s(f32::from_bits(0x7780_0000))));
    let special = s.greater_than_or_equal_u32s(bits, s.splat_u32s(0x7c00));
    let value = s.or_u32s(value, s.select_u32s(special, s.splat_u32s(0x7f80_0000), s.splat_u32s(0)));
    let sign = s.wrapping_dyn_shl_u32s(s.and_u32s(h, s.splat_u32s(0x8000)), s.splat_u32s(16));
    s.transmute_f32s_u32s(s.or_u32s(value, sign))
}

impl Weight for Bf16 {
    const TYPE: Dtype = Dtype::Bf16;

    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, at: *const u8) -> (S::f32s, S::f32s) {
        // SAFETY: as the caller promises.
        let words = unsafe { words(s, at) };
        let even = s.wrapping_dyn_shl_u32s(words, s.splat_u32s(16));
        let odd = s.and_u32s(words, s.splat_u32s(0xffff_0000));
        (s.transmute_f32s_u32s(even), s.transmute_f32s_u32s(odd))
    }
}

/// One vector of words, in the order of a little-endian machine whatever this one is.
///
/// # Safety
/// So many bytes are there.
#[inline(always)]
unsafe fn words<S: Simd>(s: S, at: *const u8) -> S::u32s {
    // SAFETY: as the caller promises; any alignment.
    let words = unsafe { at.cast::<S::u32s>().read_unaligned() };
    if cfg!(target_endian = "big") {
        let (low, high) =
            (s.wrapping_dyn_shr_u32s(words, s.splat_u32s(16)), s.wrapping_dyn_shl_u32s(words, s.splat_u32s(16)));
        return s.or_u32s(low, high);
    }
    words
}

/// Puts a row of f32 into the order that [`Weight::pair`] gives.
#[inline(always)]
pub(super) fn permute<S: Simd, W: Weight>(_: S, x: &[f32], out: &mut [f32]) {
    if W::TYPE == Dtype::F32 {
        out.copy_from_slice(x);
        return;
    }
    let pair = 2 * S::F32_LANES;
    let whole = x.len() - x.len() % pair;
    for (x, out) in x[..whole].chunks_exact(pair).zip(out[..whole].chunks_exact_mut(pair)) {
        let (even, odd) = out.split_at_mut(S::F32_LANES);
        for (i, x) in x.chunks_exact(2).enumerate() {
            (even[i], odd[i]) = (x[0], x[1]);
        }
    }
    out[whole..].copy_from_slice(&x[whole..]);
}

/// `out = numbers [at, at + out.len()) of w` in the order that [`Weight::pair`] gives.
#[inline(always)]
pub(super) fn expand<S: Simd, W: Weight>(s: S, w: &Stored, at: usize, out: &mut [f32]) {
    let (n, size, lanes) = (out.len(), W::TYPE.size() as usize, S::F32_LANES);
    let whole = n - n % (2 * lanes);
    let bytes = w.bytes(at, n);
    for i in (0..whole).step_by(2 * lanes) {
        // SAFETY: 2 lanes numbers from i are inside the n that `bytes` and `out` have.
        unsafe {
            let (even, odd) = W::pair(s, bytes.as_ptr().add(i * size));
            store(s, out.as_mut_ptr().add(i), even);
            store(s, out.as_mut_ptr().add(i + lanes), odd);
        }
    }
    widen(w, at + whole, &mut out[whole..]);
}

/// `sum_p w[at + p] x[r, p]` for `M` rows of x, `k` numbers each and already in order.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "iterators over vectors by value do not always stay in registers")]
pub(super) fn dots<S: Simd, W: Weight, const M: usize>(s: S, w: &Stored, at: usize, x: &[f32], k: usize) -> [f32; M] {
    let (size, lanes) = (W::TYPE.size() as usize, S::F32_LANES);
    let whole = k - k % (2 * lanes);
    let (bytes, x) = (w.bytes(at, k), &x[..M * k]);
    let mut sums = [[s.splat_f32s(0.0); 2]; M];
    for i in (0..whole).step_by(2 * lanes) {
        // SAFETY: 2 lanes numbers from i are inside the k that `bytes` and each row of x have.
        unsafe {
            let (even, odd) = W::pair(s, bytes.as_ptr().add(i * size));
            for r in 0..M {
                let x = x.as_ptr().add(r * k + i);
                sums[r][0] = fma(s, even, load(s, x), sums[r][0]);
                sums[r][1] = fma(s, odd, load(s, x.add(lanes)), sums[r][1]);
            }
        }
    }
    let mut tail = [0f32; 64];
    let tail = &mut tail[..k - whole];
    widen(w, at + whole, tail);
    let mut out = [0f32; M];
    for r in 0..M {
        for (w, x) in tail.iter().zip(&x[r * k + whole..]) {
            out[r] += w * x;
        }
        out[r] += s.reduce_sum_f32s(s.add_f32s(sums[r][0], sums[r][1]));
    }
    out
}
