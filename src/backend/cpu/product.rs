//! The register-blocked product that every matrix kernel of this backend is made of.
//!
//! `C[i, 0..16] = sum_p A[i, p] B[p, 0..16]`: up to 6 rows (12 with 16 lanes) of C stay in registers, A is broadcast number
//! by number, B is read as whole vectors. A panel of B is 16 columns wide whatever the vector width, so packed data looks
//! the same on every processor.

use pulp::Simd;

use super::simd::{fma, load};

/// Columns of a panel.
pub(super) const WIDTH: usize = 16;

/// Where the broadcast operand lies: element (i, p) is at `ptr + i * row + p * col`.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub ptr: *const f32,
    pub row: usize,
    pub col: usize,
}

/// Runs `out(i, column, vector of C[i, column..])` over `C = A B` for one panel of B.
///
/// Rows `first .. first + n` of C need `depth(first + n)` numbers of the sum, which lets triangular operands skip what is
/// zero.
///
/// # Safety
/// A holds `rows` rows of `depth(rows)` numbers and B `depth(rows)` rows of 16, `b_row` numbers apart.
#[inline(always)]
pub(super) unsafe fn product<S: Simd>(
    s: S,
    rows: usize,
    depth: impl Fn(usize) -> usize,
    a: Left,
    b: *const f32,
    b_row: usize,
    mut out: impl FnMut(usize, usize, S::f32s),
) {
    let mut i = 0;
    while i < rows {
        let left = rows - i;
        // Never fewer than four rows where that can be helped: fewer leave the multipliers waiting for their own results.
        let n = match (S::F32_LANES, left) {
            (16, 12..) => 12,
            (_, 6 | 7 | 10..) => 6,
            (_, 4 | 5 | 8 | 9) => 4,
            (_, 2 | 3) => 2,
            _ => 1,
        };
        let k = depth(i + n);
        // SAFETY: rows i .. i + n are among `rows`, and `depth` of them are there as the caller promises.
        unsafe {
            let a = Left { ptr: a.ptr.add(i * a.row), ..a };
            match n {
                12 => block::<S, 12>(s, k, a, b, b_row, i, &mut out),
                6 => block::<S, 6>(s, k, a, b, b_row, i, &mut out),
                4 => block::<S, 4>(s, k, a, b, b_row, i, &mut out),
                2 => block::<S, 2>(s, k, a, b, b_row, i, &mut out),
                _ => block::<S, 1>(s, k, a, b, b_row, i, &mut out),
            }
        }
        i += n;
    }
}

/// [`product`] of an upper triangular A `[n, n]`: row i of C needs rows i .. n of B.
///
/// # Safety
/// A holds `n` rows of `n` numbers and B `n` rows of 16, `b_row` numbers apart.
#[inline(always)]
pub(super) unsafe fn product_upper<S: Simd>(
    s: S,
    n: usize,
    a: Left,
    b: *const f32,
    b_row: usize,
    mut out: impl FnMut(usize, usize, S::f32s),
) {
    for first in (0..n).step_by(12) {
        // SAFETY: rows first .. n of both, as the caller promises.
        unsafe {
            let left = Left { ptr: a.ptr.add(first * (a.row + a.col)), ..a };
            product(
                s,
                (n - first).min(12),
                |_| n - first,
                left,
                b.add(first * b_row),
                b_row,
                #[inline(always)]
                |i, j, v| out(first + i, j, v),
            );
        }
    }
}

/// One block of rows.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn block<S: Simd, const ROWS: usize>(
    s: S,
    depth: usize,
    a: Left,
    b: *const f32,
    b_row: usize,
    first: usize,
    out: &mut impl FnMut(usize, usize, S::f32s),
) {
    // SAFETY: as the caller promises.
    unsafe {
        match S::F32_LANES {
            16 => vectors::<S, ROWS, 1>(s, depth, a, b, b_row, first, out),
            8 => vectors::<S, ROWS, 2>(s, depth, a, b, b_row, first, out),
            4 => vectors::<S, ROWS, 4>(s, depth, a, b, b_row, first, out),
            2 => vectors::<S, ROWS, 8>(s, depth, a, b, b_row, first, out),
            _ => vectors::<S, ROWS, 16>(s, depth, a, b, b_row, first, out),
        }
    }
}

/// `ROWS` by `N` vectors of C in registers.
///
/// # Safety
/// As [`product`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "iterators over vectors by value do not always stay in registers")]
unsafe fn vectors<S: Simd, const ROWS: usize, const N: usize>(
    s: S,
    depth: usize,
    a: Left,
    mut b: *const f32,
    b_row: usize,
    first: usize,
    out: &mut impl FnMut(usize, usize, S::f32s),
) {
    let mut c = [[s.splat_f32s(0.0); N]; ROWS];
    let mut p = a.ptr;
    for _ in 0..depth {
        let mut row = [s.splat_f32s(0.0); N];
        for j in 0..N {
            // SAFETY: row p of B has 16 numbers.
            row[j] = unsafe { load(s, b.add(j * S::F32_LANES)) };
        }
        for i in 0..ROWS {
            // SAFETY: A has `depth` numbers in each of its rows.
            let x = s.splat_f32s(unsafe { *p.add(i * a.row) });
            for j in 0..N {
                c[i][j] = fma(s, x, row[j], c[i][j]);
            }
        }
        b = b.wrapping_add(b_row);
        p = p.wrapping_add(a.col);
    }
    for i in 0..ROWS {
        for j in 0..N {
            out(first + i, j * S::F32_LANES, c[i][j]);
        }
    }
}

/// Packs rows as a panel: `panel[p * 16 + j] = x[j * row + p]` for `depth` numbers of `n` rows, zeros in columns past them.
#[inline(always)]
pub(super) fn pack(x: &[f32], row: usize, n: usize, depth: usize, panel: &mut [f32]) {
    let panel = &mut panel[..depth * WIDTH];
    if n < WIDTH {
        panel.fill(0.0);
    }
    for j in 0..n.min(WIDTH) {
        for (p, &x) in x[j * row..j * row + depth].iter().enumerate() {
            panel[p * WIDTH + j] = x;
        }
    }
}
