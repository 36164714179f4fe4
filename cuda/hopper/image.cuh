// The steps by which `prepare` makes the image of a chunk, with A, P and the vectors, out of K K^T and Q K^T, by one warpgroup.
//
// The inverse of I + L, L strictly lower [64, 64], by blocks of 16: diagonal blocks D_b by substitution in f32 (a thread per
// column), the others from top to bottom, X_bj = -D_b sum_m L_bm X_mj, by mma in TF32 (the mantissa of half, the range of f32),
// warp j taking block column j. It works on Y_b = X_bj^T, so that results are the next product's left operand in registers.
#pragma once
#include "forward.cuh"

namespace hopper {

// Shared memory of the inverse, in f32: L [64, 64], with the blocks D where it has nothing, above its diagonal, and behind it these rounded to TF32.
constexpr int L_STRIDE = 72;  // 8 mod 32: pairs of 8 rows hit all banks
constexpr int R_STRIDE = 24;  // of the rounded blocks, the same
constexpr int R_BLOCK = 16 * R_STRIDE + 16;
constexpr int L_BYTES = CHUNK * L_STRIDE * 4;
constexpr int R_BYTES = 4 * R_BLOCK * 4;

// How A and P lie: columns of 16, as in the image in memory; panels, for the backward.
enum class Lie { IMAGE, PANEL };

// Where the rounded D_b and D_b itself start, from L's start, and how far its rows are apart. The backward, which has the room, keeps it behind the
// others: there ptxas has no register for another place.
__device__ __forceinline__ int r_at(int b) { return L_BYTES / 4 + b * R_BLOCK; }
template <Lie LIE>
__device__ __forceinline__ int d_at(int b) {
    return LIE == Lie::PANEL ? r_at(b) + R_BYTES / 4 : (b >> 1) * 16 * L_STRIDE + 32 + (b & 1) * 16;
}
template <Lie LIE>
constexpr int D_STRIDE = LIE == Lie::PANEL ? R_STRIDE : L_STRIDE;

// Where this lane's row of 8 numbers starts: row lane % 8 of the block of rows 8 r to 8 r + 7, columns 16 x + 8 half on.
template <Lie LIE>
__device__ __forceinline__ uint32_t block_row(uint32_t base, int x, int r, int half, int lane) {
    if constexpr (LIE == Lie::PANEL) return swizzled(base, 8 * r + (lane & 7), 2 * x + half);
    return base + image_columns(x) + (r - 2 * x) * 256 + half * 128 + (lane & 7) * 16;
}

// g of a lane's tokens 2 lane and 2 lane + 1 of a warp's 64, in powers of two, summed over the tokens up to them.
__device__ __forceinline__ float2 sum_gates(float2 x, int lane) {
    float sum = x.x + x.y;
#pragma unroll
    for (int off = 1; off < 32; off *= 2) {
        float y = __shfl_up_sync(~0u, sum, off);
        if (lane >= off) sum += y;
    }
    // Not sum - pair, which would lose digits after a cliff.
    float before = __shfl_up_sync(~0u, sum, 1);
    if (lane == 0) before = 0.f;
    return make_float2(before + x.x, sum);
}

// |row|^2 of a tile [64, K], in two neighbouring threads, a half of the row each; one starts with other units than the other, or both
// would read the same banks.
template <class E, int K>
__device__ __forceinline__ float half_square(uint32_t tile, int row, int half) {
    constexpr int UNITS = K / 16;
    float sum[2] = {};
#pragma unroll 2
    for (int u = 0; u < UNITS; u++) {
        const int unit = half * UNITS + (u ^ (half * (UNITS / 2)));
        const uint4 x = shared_16(swizzled(tile + (unit / 8) * PANEL, row, unit % 8));
        const uint32_t w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int n = 0; n < 4; n++) sum[0] = fmaf(E::lo(w[n]), E::lo(w[n]), sum[0]), sum[1] = fmaf(E::hi(w[n]), E::hi(w[n]), sum[1]);
    }
    const float own = sum[0] + sum[1];
    return own + __shfl_xor_sync(~0u, own, 1);
}

// a [64, 64] as a product's result: its rows times f0, f1, its columns times those of `columns` [64].
__device__ __forceinline__ void fold_norms(float (&a)[32], float f0, float f1, const float* columns, int j) {
#pragma unroll
    for (int b = 0; b < 8; b++) {
        float2 c = *(const float2*)(columns + 8 * b + 2 * j);
        a[4 * b] *= f0 * c.x, a[4 * b + 1] *= f0 * c.y, a[4 * b + 2] *= f1 * c.x, a[4 * b + 3] *= f1 * c.y;
    }
}

// Types of A for which both operands of the inverse are in two parts where sums cancel: f16 has the digits of TF32.
template <class I>
constexpr bool INVERTS_IN_PARTS = false;
template <>
constexpr bool INVERTS_IN_PARTS<F16> = true;

// The nearest TF32 numbers. Each is three instructions, so that what several warps multiply is rounded where it is written.
__device__ __forceinline__ float2 rounded_tf32(float2 x) { return make_float2(__uint_as_float(tf32(x.x)), __uint_as_float(tf32(x.y))); }

// L = strictlower(beta_i G_ij kk_ij) to `l`, blocks below the diagonal rounded to TF32 (unless EXACT); P = G_ij qk_ij for i >= j to `p_at`, if there is Q K^T. For the
// backward beta_j in both.
template <class I, Lie LIE, bool EXACT = false, int N>
__device__ __forceinline__ void form(const float (&kk)[32], const float (&qk)[N], const float* c, const float* beta, float* l, uint32_t p_at, int warp, int lane) {
    constexpr bool GRAD = LIE == Lie::PANEL, WITH_P = N == 32;
    const int i = lane >> 2, j = lane & 3, row0 = 16 * warp + i, row1 = row0 + 8;
    const float c0 = c[row0], c1 = c[row1], b0 = beta[row0], b1 = beta[row1];
#pragma unroll
    for (int x = 0; x < 4; x++) {
        // Lane l addresses row l % 8 of block l / 8: (rows, columns) (0, 0), (8, 0), (0, 8), (8, 8).
        const int block = lane >> 3;
        const uint32_t to = block_row<LIE>(p_at, x, 2 * warp + (block & 1), block >> 1, lane);
        if (x > warp) {
            if constexpr (GRAD) stsm(to, 0, 0, 0, 0);
            continue;
        }
        uint32_t lo[2], hi[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            int col = 16 * x + 8 * n + 2 * j;
            float2 cc = *(const float2*)(c + col);
            float g00 = row0 >= col ? exp2_fast(c0 - cc.x) : 0.f, g01 = row0 > col ? exp2_fast(c0 - cc.y) : 0.f;
            float g10 = row1 >= col ? exp2_fast(c1 - cc.x) : 0.f, g11 = row1 > col ? exp2_fast(c1 - cc.y) : 0.f;
            float b00 = b0, b01 = b0, b10 = b1, b11 = b1;
            if constexpr (GRAD) {
                float2 bb = *(const float2*)(beta + col);
                b00 = b10 = bb.x, b01 = b11 = bb.y;
            }
            const float* y = kk + 8 * x + 4 * n;
            float2 l0 = make_float2(row0 > col ? b00 * g00 * y[0] : 0.f, row0 > col + 1 ? b01 * g01 * y[1] : 0.f);
            float2 l1 = make_float2(row1 > col ? b10 * g10 * y[2] : 0.f, row1 > col + 1 ? b11 * g11 * y[3] : 0.f);
            if (!EXACT && x != warp) l0 = rounded_tf32(l0), l1 = rounded_tf32(l1);
            *(float2*)(l + row0 * L_STRIDE + col) = l0;
            *(float2*)(l + row1 * L_STRIDE + col) = l1;
            if constexpr (GRAD) g00 *= b00, g01 *= b01, g10 *= b10, g11 *= b11;
            if constexpr (WITH_P) {
                const float* z = qk + 8 * x + 4 * n;
                lo[n] = I::pack(row0 >= col ? g00 * z[0] : 0.f, row0 > col ? g01 * z[1] : 0.f);
                hi[n] = I::pack(row1 >= col ? g10 * z[2] : 0.f, row1 > col ? g11 * z[3] : 0.f);
            }
        }
        if constexpr (WITH_P) stsm(to, lo[0], hi[0], lo[1], hi[1]);
    }
}

// The thread's share of the sum over j < i of (G_ij kk_ij)^2, less CANCELS times that over i of kk_ii^2.
template <class E>
__device__ __forceinline__ float excess(const float (&kk)[32], const float* c, int warp, int lane) {
    const int i = lane >> 2, j = lane & 3, row0 = 16 * warp + i, row1 = row0 + 8;
    float sum = 0.f;
#pragma unroll
    for (int x = 0; x < 4; x++) {
        if (x > warp) continue;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int col = 16 * x + 8 * n + 2 * j;
            const float2 cc = *(const float2*)(c + col);
            auto add = [&](int row, int column, float y, float cj) {
                y *= exp2_fast(c[row] - cj);
                // Above the diagonal y may be infinite.
                if (row > column) sum = fmaf(y, y, sum);
                if (row == column) sum = fmaf(y, -CANCELS<E> * y, sum);
            };
            const float* y = kk + 8 * x + 4 * n;
            add(row0, col, y[0], cc.x), add(row0, col + 1, y[1], cc.y), add(row1, col, y[2], cc.x), add(row1, col + 1, y[3], cc.y);
        }
    }
    return sum;
}

// The same without G, of which kk's symmetry makes half a sum over all of it; `diagonal` are the kk_ii^2 that the thread has.
template <class E>
__device__ __forceinline__ float excess_without_gates(const float (&kk)[32], float diagonal) {
    float sum[4] = {};
#pragma unroll
    for (int n = 0; n < 32; n++) sum[n % 4] = fmaf(kk[n], kk[n], sum[n % 4]);
    return 0.5f * ((sum[0] + sum[1]) + (sum[2] + sum[3])) - (0.5f + CANCELS<E>) * diagonal;
}

// The sum of a warp's threads to `to` [4 warps].
__device__ __forceinline__ void share_sum(float x, float* to, int warp, int lane) {
#pragma unroll
    for (int off = 16; off; off /= 2) x += __shfl_xor_sync(~0u, x, off);
    if (lane == 0) to[warp] = x;
}

// What rounding a number to TF32 leaves, rounded.
__device__ __forceinline__ uint32_t rest_tf32(float x) { return tf32(x - __uint_as_float(tf32(x))); }

// What rounding P, for the backward P diag(beta), leaves to `low` in memory, laid out as in the image: P anew, as few chunks come here.
template <class I, Lie LIE = Lie::IMAGE>
__device__ __forceinline__ void form_rest(const float (&qk)[32], const float* c, const float* beta, char* low, int warp, int lane) {
    constexpr bool GRAD = LIE == Lie::PANEL;
    const int i = lane >> 2, j = lane & 3, row0 = 16 * warp + i, row1 = row0 + 8;
#pragma unroll
    for (int x = 0; x < 4; x++) {
        if (x > warp) {
            if constexpr (GRAD) *(uint4*)(low + swizzled(0, 16 * warp + (lane & 15), 2 * x + (lane >> 4))) = make_uint4(0, 0, 0, 0);
            continue;
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int col = 16 * x + 8 * n + 2 * j;
            const float2 cc = *(const float2*)(c + col), bb = GRAD ? *(const float2*)(beta + col) : make_float2(1.f, 1.f);
            const float* z = qk + 8 * x + 4 * n;
            auto part = [&](int row, float a, float b) {
                return pack_rest<I>(row >= col ? exp2_fast(c[row] - cc.x) * bb.x * a : 0.f, row > col ? exp2_fast(c[row] - cc.y) * bb.y * b : 0.f);
            };
            // Row i of the blocks of rows 16 warp and + 8, columns 8 n.
            char* to = GRAD ? low + swizzled(0, row0, 2 * x + n) + j * 4 : low + image_columns(x) + 2 * (warp - x) * 256 + n * 128 + i * 16 + j * 4;
            *(uint32_t*)to = part(row0, z[0], z[1]);
            *(uint32_t*)(to + (GRAD ? 1024 : 256)) = part(row1, z[2], z[3]);
        }
    }
}

// Column t % 16 of D_b, b = t / 16: x_r = [r = column] - sum_(m < r) L_rm x_m; rounded to TF32, too. 64 threads, t from 0.
template <Lie LIE>
__device__ __forceinline__ void substitute(float* l, int t) {
    const int b = t >> 4, column = t & 15;
    const float* lb = l + 16 * b * L_STRIDE + 16 * b;
    float x[16];
#pragma unroll
    for (int r = 0; r < 16; r++) x[r] = r == column ? 1.f : 0.f;
#pragma unroll
    for (int r = 1; r < 16; r++)
#pragma unroll
        for (int u = 0; u < r; u += 4) {
            float4 y = *(const float4*)(lb + r * L_STRIDE + u);
            x[r] -= y.x * x[u];
            if (u + 1 < r) x[r] -= y.y * x[u + 1];
            if (u + 2 < r) x[r] -= y.z * x[u + 2];
            if (u + 3 < r) x[r] -= y.w * x[u + 3];
        }
#pragma unroll
    for (int r = 0; r < 16; r++) {
        l[d_at<LIE>(b) + r * D_STRIDE<LIE> + column] = x[r];
        l[r_at(b) + r * R_STRIDE + column] = __uint_as_float(tf32(x[r]));
    }
}

// The vectors of one row. WITH_P: of rq, too, s included.
template <bool WITH_P>
__device__ __forceinline__ void row_factors(float* vec, const float* c, int row, int len, float rk, float rq) {
    const float last = c[CHUNK - 1], e = exp2_fast(c[row]);
    vec[VEC_IN + row] = e * rk;
    vec[VEC_STATE + row] = row < len ? exp2_fast(last - c[row]) * rk : 0.f;
    vec[VEC_OUT + row] = WITH_P ? e * rq : c[row];
    if constexpr (!WITH_P) vec[VEC_KEYS + row] = c[row] - log2f(rk);
    if (row == 0) vec[VEC_LAST] = exp2_fast(last), vec[VEC_TOTAL] = last;
}

// Block column `warp` of A = X diag(beta) to `a_at`; for the backward of X, with zeros above it. LOW: what rounding A, or C, leaves to `low`, in
// memory, laid out as in the image. L X is then a small sum of large terms, and what rounding X to TF32 leaves is multiplied, too: without,
// 5.4e-3 were seen in o, with 3.1e-3 (all keys equal, beta 1). That of L, whose numbers are then nearly the same, and rounded alike, is not in
// bf16; in f16 it is, or 2.2e-3 are left in o and 4.7e-3 in ht: then L is EXACT.
template <class I, Lie LIE, bool LOW = false>
__device__ __forceinline__ void invert(const float* l, const float* beta, uint32_t a_at, char* low, int warp, int lane) {
    constexpr bool GRAD = LIE == Lie::PANEL;
    constexpr bool PARTS = LOW && INVERTS_IN_PARTS<I>;
    // Registers are few: no address is made before the branch that leads here, and beta is read where it is needed, or `prepare` spills.
    if constexpr (PARTS || (LOW && GRAD)) lane = lane_id();
    const int i = lane >> 2, j = lane & 3;
    const float* beta_at = beta + 16 * warp + i;
    const float beta0 = GRAD || PARTS ? 1.f : beta_at[0], beta1 = GRAD || PARTS ? 1.f : beta_at[8];
    // y[b]: sum_m X_(m, warp)^T L_bm^T over the m so far; then X_(b, warp)^T.
    float y[4][2][4] = {};
    // dst [16, 16] += a src^T, a [16, 16] as a result, src in shared memory. Column j and j + 4 of a
    // product's left operand, and row j and j + 4 of its right one, are named 2j and 2j + 1: the sum does not mind, and a result's
    // pairs of columns then fit as they are.
    auto multiply = [&](float (&dst)[2][4], const float (&a)[2][4], const float* src, int stride, auto known) {
        if constexpr (PARTS) {
            // One after the other, as all at once spill: both rounded, what is left of a, what is left of src.
#pragma unroll 1
            for (int part = 0; part < 3; part++) {
                auto left = [&](float x) { return part == 1 ? rest_tf32(x) : tf32(x); };
                auto right = [&](float x) { return part == 2 ? rest_tf32(x) : tf32(x); };
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    const uint32_t y[4] = {left(a[s][0]), left(a[s][2]), left(a[s][1]), left(a[s][3])};
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const float2 x = *(const float2*)(src + (8 * n + i) * stride + 8 * s + 2 * j);
                        mma_tf32(dst[n], y, right(x.x), right(x.y));
                    }
                }
            }
        } else {
            // Of `a`, which is rounded already where that is known; `src` always is.
            auto left = [&](float x) { return known ? __float_as_uint(x) : tf32(x); };
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const uint32_t y[4] = {left(a[s][0]), left(a[s][2]), left(a[s][1]), left(a[s][3])};
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const float2 x = *(const float2*)(src + (8 * n + i) * stride + 8 * s + 2 * j);
                    mma_tf32(dst[n], y, __float_as_uint(x.x), __float_as_uint(x.y));
                }
                if constexpr (LOW) {
                    const uint32_t rest[4] = {rest_tf32(a[s][0]), rest_tf32(a[s][2]), rest_tf32(a[s][1]), rest_tf32(a[s][3])};
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const float2 x = *(const float2*)(src + (8 * n + i) * stride + 8 * s + 2 * j);
                        mma_tf32(dst[n], rest, __float_as_uint(x.x), __float_as_uint(x.y));
                    }
                }
            }
        }
    };
    auto step = [&](auto at) {
        constexpr int b = at;
        // The blocks (0, 0), (0, 8), (8, 0), (8, 8), stored transposed.
        const int block = lane >> 3;
        const uint32_t to = block_row<LIE>(a_at, warp, 2 * b + (block >> 1), block & 1, lane);
        if (b < warp) {
            if constexpr (GRAD) stsm(to, 0, 0, 0, 0);
            if constexpr (GRAD && LOW) *(uint4*)(low + swizzled(0, 16 * b + (lane & 15), 2 * warp + (lane >> 4))) = make_uint4(0, 0, 0, 0);
            return;
        }
        const float* db = l + d_at<LIE>(b);
        if (b == warp) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const float* from = db + (8 * n + 2 * j) * D_STRIDE<LIE> + i;
                y[b][n][0] = from[0], y[b][n][1] = from[D_STRIDE<LIE>], y[b][n][2] = from[8], y[b][n][3] = from[D_STRIDE<LIE> + 8];
            }
        } else {
#pragma unroll
            for (int u = 0; u < b; u++)
                if (u >= warp) multiply(y[b], y[u], l + 16 * b * L_STRIDE + 16 * u, L_STRIDE, Int<!LOW>{});
            float t[2][4];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) t[n][e] = -y[b][n][e], y[b][n][e] = 0.f;
            multiply(y[b], t, PARTS ? db : l + r_at(b), PARTS ? D_STRIDE<LIE> : R_STRIDE, Int<0>{});
        }
        const float b0 = PARTS ? shared_f32(smem_addr(beta_at)) : beta0, b1 = PARTS ? shared_f32(smem_addr(beta_at + 8)) : beta1;
        stsm_trans(to, I::pack(y[b][0][0] * b0, y[b][0][1] * b0), I::pack(y[b][0][2] * b1, y[b][0][3] * b1), I::pack(y[b][1][0] * b0, y[b][1][1] * b0),
                   I::pack(y[b][1][2] * b1, y[b][1][3] * b1));
        if constexpr (!LOW) {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) y[b][n][e] = __uint_as_float(tf32(y[b][n][e]));
        }
        if constexpr (LOW) {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // Rows 8 n + 2j and + 1 of the block, column 8 half + i.
                    const float by = half ? b1 : b0;
                    const uint32_t rest = pack_rest<I>(y[b][n][2 * half] * by, y[b][n][2 * half + 1] * by);
                    char* to = low + image_columns(warp) + (2 * (b - warp) + n) * 256 + half * 128 + 2 * j * 16 + i * 2;
                    char* below = to + 16;
                    if constexpr (GRAD) {
                        const int row = 16 * b + 8 * n + 2 * j;
                        to = low + swizzled(0, row, 2 * warp + half) + i * 2, below = low + swizzled(0, row + 1, 2 * warp + half) + i * 2;
                    }
                    *(uint16_t*)to = (uint16_t)rest, *(uint16_t*)below = (uint16_t)(rest >> 16);
                }
        }
    };
    step(Int<0>{}), step(Int<1>{}), step(Int<2>{}), step(Int<3>{});
}

}  // namespace hopper
