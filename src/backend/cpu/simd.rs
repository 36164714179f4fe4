//! Vectors: which width to use, loads and stores, exp and its kin, dot products, conversions of stored types.
//!
//! Everything here is inlined into a cell, which [`Level::dispatch`] compiles once per instruction set.

use std::any::TypeId;

use pulp::{Scalar128b, Simd, WithSimd};

use super::bind::{Stored, StoredMut};
use crate::shape::Dtype;

/// The instruction set that kernels are run with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Level(pulp::Arch);

impl Level {
    /// The best that this processor has.
    pub fn detect() -> Self {
        Level(pulp::Arch::new())
    }

    /// The portable one, whatever the processor has.
    #[cfg(test)]
    pub fn portable() -> Self {
        Level(pulp::Arch::Scalar)
    }

    /// Its name, for people.
    pub fn name(self) -> String {
        let text = format!("{:?}", self.0);
        match text.split(['(', ' ']).next() {
            Some("V4") => "AVX-512".into(),
            Some("V3") => "AVX2 and FMA".into(),
            Some("Scalar") | None => "portable".into(),
            Some(other) => other.into(),
        }
    }

    /// Runs `op` compiled for this instruction set.
    #[inline(always)]
    pub fn dispatch<O: WithSimd>(self, op: O) -> O::Output {
        match self.0 {
            // Four lanes that the compiler maps to whatever baseline the target has.
            pulp::Arch::Scalar => op.with_simd(Scalar128b),
            arch => arch.dispatch(op),
        }
    }
}

/// Reads one vector.
///
/// # Safety
/// `at` points to as many numbers as a vector has lanes.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(_: S, at: *const f32) -> S::f32s {
    // SAFETY: as the caller promises; any alignment.
    unsafe { at.cast::<S::f32s>().read_unaligned() }
}

/// Writes one vector.
///
/// # Safety
/// `at` points to as many numbers as a vector has lanes, which nothing else refers to.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(_: S, at: *mut f32, v: S::f32s) {
    // SAFETY: as the caller promises; any alignment.
    unsafe { at.cast::<S::f32s>().write_unaligned(v) }
}

/// Asks for `bytes` bytes from `at` on; a hint, which nothing depends on. The address need not be valid.
#[inline(always)]
pub(super) fn prefetch(at: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch never faults, and its instruction is part of every x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, bytes);
}

/// `a b + c`, fused where the processor can; a library call for it would be a hundred times slower.
#[inline(always)]
pub(super) fn fma<S: Simd>(s: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
    if TypeId::of::<S>() == TypeId::of::<Scalar128b>() {
        s.add_f32s(s.mul_f32s(a, b), c)
    } else {
        s.mul_add_e_f32s(a, b, c)
    }
}

/// `exp(x)` to about 1 ulp; 0 below the smallest normal result, 2.4e38 above 88.37.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let small = s.less_than_f32s(x, s.splat_f32s(-87.33654));
    let clamped = s.min_f32s(s.max_f32s(x, s.splat_f32s(-87.33654)), s.splat_f32s(88.37));
    // n = round(x / ln 2), left with its exponent bias in the low bits of a number near 1.5 * 2^23.
    let magic = s.splat_f32s(12_582_912.0 + 127.0);
    let biased = fma(s, clamped, s.splat_f32s(std::f32::consts::LOG2_E), magic);
    let n = s.sub_f32s(biased, magic);
    // r = x - n ln 2, with ln 2 in two parts; |r| <= ln 2 / 2.
    let r = fma(s, n, s.splat_f32s(-0.693_359_4), clamped);
    let r = fma(s, n, s.splat_f32s(2.121_944_4e-4), r);
    let mut p = s.splat_f32s(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = fma(s, p, r, s.splat_f32s(c));
    }
    let p = s.add_f32s(fma(s, p, s.mul_f32s(r, r), r), s.splat_f32s(1.0));
    let power = s.wrapping_dyn_shl_u32s(s.transmute_u32s_f32s(biased), s.splat_u32s(23));
    let y = s.mul_f32s(p, s.transmute_f32s_u32s(power));
    let y = s.select_f32s(small, s.splat_f32s(0.0), y);
    // min and max may have dropped a NaN.
    s.select_f32s(s.equal_f32s(x, x), y, x)
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let one = s.splat_f32s(1.0);
    s.div_f32s(one, s.add_f32s(one, exp(s, s.neg_f32s(x))))
}

/// The derivative of `x sigmoid(x)`.
#[inline(always)]
pub(super) fn silu_slope<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let one = s.splat_f32s(1.0);
    let e = exp(s, s.neg_f32s(x));
    let sigmoid = s.div_f32s(one, s.add_f32s(one, e));
    // 1 - sigmoid loses the digits of a small difference.
    let positive = s.less_than_f32s(s.splat_f32s(0.0), x);
    let rest = s.select_f32s(positive, s.mul_f32s(e, sigmoid), s.sub_f32s(one, sigmoid));
    s.mul_f32s(sigmoid, fma(s, x, rest, one))
}

/// Replaces every number by `f` of it.
#[inline(always)]
pub(super) fn map<S: Simd>(s: S, x: &mut [f32], f: impl Fn(S::f32s) -> S::f32s) {
    for x in x.chunks_mut(S::F32_LANES) {
        // One place where `f` is used, so that its code is there once.
        let whole = x.len() == S::F32_LANES;
        // SAFETY: a whole vector of numbers is there where it is read or written as one.
        let v = if whole { unsafe { load(s, x.as_ptr()) } } else { s.partial_load_f32s(x) };
        let v = f(v);
        match whole {
            // SAFETY: as above.
            true => unsafe { store(s, x.as_mut_ptr(), v) },
            false => s.partial_store_f32s(x, v),
        }
    }
}

/// `out = f(out, x)`, number by number.
#[inline(always)]
pub(super) fn zip<S: Simd>(s: S, out: &mut [f32], x: &[f32], f: impl Fn(S::f32s, S::f32s) -> S::f32s) {
    let n = out.len().min(x.len());
    for (out, x) in out[..n].chunks_mut(S::F32_LANES).zip(x[..n].chunks(S::F32_LANES)) {
        let whole = out.len() == S::F32_LANES;
        let (a, b) = match whole {
            // SAFETY: a whole vector of numbers is there where it is read or written as one.
            true => unsafe { (load(s, out.as_ptr()), load(s, x.as_ptr())) },
            false => (s.partial_load_f32s(out), s.partial_load_f32s(x)),
        };
        let v = f(a, b);
        match whole {
            // SAFETY: as above.
            true => unsafe { store(s, out.as_mut_ptr(), v) },
            false => s.partial_store_f32s(out, v),
        }
    }
}

/// `sum_i a[i] b[i]`, in four vectors of partial sums.
#[inline(always)]
pub(super) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, a_tail) = S::as_simd_f32s(&a[..n]);
    let (b, b_tail) = S::as_simd_f32s(&b[..n]);
    let zero = s.splat_f32s(0.0);
    let mut sum = [zero; 4];
    let (a4, a_rest) = pulp::as_arrays::<4, _>(a);
    let (b4, b_rest) = pulp::as_arrays::<4, _>(b);
    for (a, b) in a4.iter().zip(b4) {
        for i in 0..4 {
            sum[i] = fma(s, a[i], b[i], sum[i]);
        }
    }
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        sum[0] = fma(s, a, b, sum[0]);
    }
    sum[1] = fma(s, s.partial_load_f32s(a_tail), s.partial_load_f32s(b_tail), sum[1]);
    s.reduce_sum_f32s(s.add_f32s(s.add_f32s(sum[0], sum[1]), s.add_f32s(sum[2], sum[3])))
}

/// Reads `out.len()` stored numbers from number `at`.
#[inline(always)]
pub(super) fn widen(from: &Stored, at: usize, out: &mut [f32]) {
    let bytes = from.bytes(at, out.len());
    match from.dtype {
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_ne_bytes(*b);
            }
        }
        Dtype::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f16_to_f32(u16::from_ne_bytes(*b));
            }
        }
        Dtype::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f32::from_bits((u16::from_ne_bytes(*b) as u32) << 16);
            }
        }
    }
}

/// Writes `x` as stored numbers from number `at`, rounded to nearest even.
///
/// # Safety
/// As [`StoredMut::bytes`].
#[inline(always)]
pub(super) unsafe fn narrow(to: &StoredMut, at: usize, x: &[f32]) {
    // SAFETY: as the caller promises.
    let bytes = unsafe { to.bytes(at, x.len()) };
    match to.dtype {
        Dtype::F32 => {
            for (b, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(x) {
                *b = x.to_ne_bytes();
            }
        }
        Dtype::F16 => {
            for (b, &x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(x) {
                *b = half::f16::from_f32(x).to_ne_bytes();
            }
        }
        Dtype::Bf16 => {
            for (b, &x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(x) {
                *b = bf16_from_f32(x).to_ne_bytes();
            }
        }
    }
}

/// Without branches, so that loops over it become vectors.
#[inline(always)]
fn f16_to_f32(h: u16) -> f32 {
    let h = h as u32;
    let sign = (h & 0x8000) << 16;
    // The exponent and fraction as an f32 of the wrong bias: 2^-112 times the value, subnormals included.
    let value = f32::from_bits((h & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if h & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(value.to_bits() | special | sign)
}

/// Rounds to nearest even; a NaN stays one.
#[inline(always)]
fn bf16_from_f32(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { (bits >> 16 | 0x40) as u16 } else { rounded as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a mut [f32]);

    impl WithSimd for Exp<'_> {
        type Output = ();

        fn with_simd<S: Simd>(self, s: S) {
            map(
                s,
                self.0,
                #[inline(always)]
                |x| exp(s, x),
            );
        }
    }

    #[test]
    fn exp_is_within_two_ulp_and_keeps_nan() {
        for level in [Level::detect(), Level::portable()] {
            let x: Vec<f32> = (0..200_003).map(|i| -87.0 + i as f32 * 8.7e-4).collect();
            let mut y = x.clone();
            level.dispatch(Exp(&mut y));
            for (&x, &y) in x.iter().zip(&y) {
                let exact = (x as f64).exp();
                assert!(((y as f64 - exact) / exact).abs() < 2.4e-7, "exp({x}) = {y}");
            }
            let mut y = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -200.0, 0.0];
            level.dispatch(Exp(&mut y));
            assert!(y[0].is_nan() && y[1] == 0.0 && y[2] > 1e38 && y[3] == 0.0 && y[4] == 1.0, "{y:?}");
        }
    }

    #[test]
    fn sixteen_bit_types_convert_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let (fast, slow) = (f16_to_f32(bits), half::f16::from_bits(bits).to_f32());
            assert!(fast == slow || fast.is_nan() && slow.is_nan(), "{bits:x}: {fast} {slow}");
        }
        for i in 0..=u16::MAX as u32 {
            let x = f32::from_bits(i.wrapping_mul(65_537).wrapping_add(i << 3));
            let (fast, slow) = (half::bf16::from_bits(bf16_from_f32(x)), half::bf16::from_f32(x));
            assert!(fast == slow || fast.is_nan() && slow.is_nan(), "{x}: {fast} {slow}");
        }
    }
}
