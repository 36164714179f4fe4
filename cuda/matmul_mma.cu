// y[i, j] (+)= sum_k x[i, k] w[j, k] for many rows of x and 16-bit weights, on the matrix units.
//
// x stays f32: it is split into numbers that the units take, and each is multiplied with w, which is exact there: three of bf16 with
// bf16 weights, whose sum is x but for 2^-25 of it; two of tf32 with f16 weights (half would not hold the range of x), but for 2^-22.
// The units add up with truncation: after each slice their sums go into sums that are rounded.
//
// 4 warps share a tile of 64 x 64, each with 32 x 32 of it. Slices of 32 numbers of x and w come by copies in the background, two
// slices ahead.
#include "mma.cuh"

constexpr u32 TILE = 64;
constexpr u32 THREADS = 128;
constexpr u32 DEPTH = 32;      // numbers of a slice
constexpr u32 STAGES = 3;      // slices in shared memory: one in use, two on their way
constexpr u32 WIDTH = DEPTH + 8;  // numbers of a row there: what eight rows are read at falls into different banks

struct Shared {
    float x[STAGES][TILE * WIDTH];
    uint16_t w[STAGES][TILE * WIDTH];
};

// This lane's share of 16 rows of x and 16 numbers of each, as operands a[i] of one product of bf16 or of two of tf32: rows g and g + 8,
// numbers 2 t, 2 t + 1, 2 t + 8 and 2 t + 9; x is the sum of the parts.
template <class T>
struct Left;

template <>
struct Left<Bf16> {
    u32 part[3][4];

    __device__ __forceinline__ void put(u32 i, float2 x) {
#pragma unroll
        for (u32 p = 0; p < 3; p++) {
            part[p][i] = pack<Bf16>(x.x, x.y);
            const float2 taken = unpack<Bf16>(part[p][i]);
            x = make_float2(x.x - taken.x, x.y - taken.y);
        }
    }
    // d += x w^T, the smallest part first
    __device__ __forceinline__ void multiply(float (&d)[4], const u32 (&w)[2]) const {
        mma_bf16(d, part[2], w);
        mma_bf16(d, part[1], w);
        mma_bf16(d, part[0], w);
    }
};

template <>
struct Left<F16> {
    u32 part[2][2][4];  // of the first and the second product

    __device__ __forceinline__ void put(u32 i, float2 x) {
        // Number 2 t of eight takes the place of t, 2 t + 1 that of t + 4, in x as in w.
        const float pair[2] = {x.x, x.y};
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            const u32 high = to_tf32(pair[j]);
            part[i / 2][0][2 * j + i % 2] = high;
            part[i / 2][1][2 * j + i % 2] = to_tf32(pair[j] - __uint_as_float(high));
        }
    }
    __device__ __forceinline__ void multiply(float (&d)[4], const u32 (&w)[2]) const {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const float2 pair = unpack<F16>(w[i]);
            const u32 b[2] = {__float_as_uint(pair.x), __float_as_uint(pair.y)};
            mma_tf32(d, part[i][1], b);
            mma_tf32(d, part[i][0], b);
        }
    }
};

template <class T>
__device__ __forceinline__ void matmul(const row::matmul::Launch& l) {
    SHARED(Shared, s);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, warp = lane / 32, g = lane % 32 / 4, t = lane % 4;
    const u32 m = l.p.m, n = l.p.n, k = l.p.k, m0 = cell.y * TILE, n0 = cell.x * TILE;
    const u32 row0 = warp / 2 * 32, column0 = warp % 2 * 32;  // of this warp's part of the tile
    const float* x = (const float*)l.m.x + l.p.x_off;
    const uint16_t* w = (const uint16_t*)l.m.w;

    const u32 slices = (k + DEPTH - 1) / DEPTH;
    auto fetch = [&](u32 slice) {
        if (slice < slices) {
            const u32 stage = slice % STAGES, depth = slice * DEPTH;
#pragma unroll
            for (u32 e = lane; e < TILE * DEPTH / 4; e += THREADS) {
                const u32 row = e / (DEPTH / 4), at = e % (DEPTH / 4) * 4, i = depth + at;
                const bool valid = i < k;
                const float* from = x + (size_t)min(m0 + row, m - 1) * l.p.x_stride + (valid ? i : 0);
                copy_16(&s.x[stage][row * WIDTH + at], from, valid);
            }
#pragma unroll
            for (u32 e = lane; e < TILE * DEPTH / 8; e += THREADS) {
                const u32 row = e / (DEPTH / 8), at = e % (DEPTH / 8) * 8, i = depth + at;
                const bool valid = i < k;
                const uint16_t* from = w + (size_t)min(n0 + row, n - 1) * k + (valid ? i : 0);
                copy_16(&s.w[stage][row * WIDTH + at], from, valid);
            }
        }
        copies_end();
    };

    float sum[2][4][4];
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) sum[i][j][e] = 0.f;
    fetch(0);
    fetch(1);
    for (u32 slice = 0; slice < slices; slice++) {
        copies_wait<1>();
        __syncthreads();
        // Goes where the slice before this one was, which no thread reads any more.
        fetch(slice + 2);
        const float* xs = s.x[slice % STAGES];
        const uint16_t* ws = s.w[slice % STAGES];
        float d[2][4][4];
#pragma unroll
        for (u32 i = 0; i < 2; i++)
#pragma unroll
            for (u32 j = 0; j < 4; j++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) d[i][j][e] = 0.f;
#pragma unroll
        for (u32 step = 0; step < DEPTH; step += 16) {
            u32 b[4][2];
#pragma unroll
            for (u32 j = 0; j < 4; j++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) b[j][i] = *(const u32*)(ws + (column0 + 8 * j + g) * WIDTH + step + 8 * i + 2 * t);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const float* rows = xs + (row0 + 16 * i + g) * WIDTH + step + 2 * t;
                Left<T> a;
#pragma unroll
                for (u32 e = 0; e < 4; e++) a.put(e, *(const float2*)(rows + e % 2 * 8 * WIDTH + e / 2 * 8));
#pragma unroll
                for (u32 j = 0; j < 4; j++) a.multiply(d[i][j], b[j]);
            }
        }
#pragma unroll
        for (u32 i = 0; i < 2; i++)
#pragma unroll
            for (u32 j = 0; j < 4; j++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) sum[i][j][e] += d[i][j][e];
    }
    float* y = (float*)l.m.y + l.p.y_off;
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                const u32 row = m0 + row0 + 16 * i + g + e / 2 * 8, column = n0 + column0 + 8 * j + 2 * t + e % 2;
                if (row < m && column < n) {
                    float* to = y + (size_t)row * l.p.y_stride + column;
                    *to = l.c.add ? *to + sum[i][j][e] : sum[i][j][e];
                }
            }
}

KERNEL(matmul_mma_f16, matmul, THREADS) { matmul<F16>(l); }
KERNEL(matmul_mma_bf16, matmul, THREADS) { matmul<Bf16>(l); }
