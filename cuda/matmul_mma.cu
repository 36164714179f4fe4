// y[i, j] (+)= sum_k x[i, k] w[j, k] for many rows of x and 16-bit weights, on the matrix units.
//
// x stays f32: it is split in two numbers that the units take, x = high + low, and both are multiplied with w, which is exact there.
// What is left out is 2^-17 of x (bf16) or 2^-22 (tf32, for f16 weights, whose range half would not hold). The units add up with
// truncation: after each slice their sums go into sums that are rounded.
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

// Two neighbours of x as high and low parts of bf16.
__device__ __forceinline__ void split(float2 x, u32& high, u32& low) {
    high = pack<Bf16>(x.x, x.y);
    const float2 h = unpack<Bf16>(high);
    low = pack<Bf16>(x.x - h.x, x.y - h.y);
}

__device__ __forceinline__ void split_tf32(float x, u32& high, u32& low) {
    high = to_tf32(x);
    low = to_tf32(x - __uint_as_float(high));
}

// This lane's share of 16 rows of x and 16 numbers of each: rows g and g + 8, numbers 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, as operands of
// one product of bf16 or of two of tf32.
struct Left {
    u32 high[8], low[8];
};

template <class T>
__device__ __forceinline__ Left left_of(const float* x, u32 g, u32 t) {
    Left a;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const float2 pair = *(const float2*)(x + (g + i % 2 * 8) * WIDTH + 2 * t + i / 2 * 8);
        if constexpr (T::BRAIN) {
            split(pair, a.high[i], a.low[i]);
        } else {
            // Number 2 t of eight takes the place of t, 2 t + 1 that of t + 4, in x as in w.
            split_tf32(pair.x, a.high[i / 2 * 4 + i % 2], a.low[i / 2 * 4 + i % 2]);
            split_tf32(pair.y, a.high[i / 2 * 4 + 2 + i % 2], a.low[i / 2 * 4 + 2 + i % 2]);
        }
    }
    return a;
}

template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const Left& a, const u32 (&w)[2]) {
    if constexpr (T::BRAIN) {
        const u32 low[4] = {a.low[0], a.low[1], a.low[2], a.low[3]}, high[4] = {a.high[0], a.high[1], a.high[2], a.high[3]};
        mma_bf16(d, low, w);
        mma_bf16(d, high, w);
    } else {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const float2 pair = unpack<T>(w[i]);
            const u32 b[2] = {__float_as_uint(pair.x), __float_as_uint(pair.y)};
            const u32 low[4] = {a.low[4 * i], a.low[4 * i + 1], a.low[4 * i + 2], a.low[4 * i + 3]};
            const u32 high[4] = {a.high[4 * i], a.high[4 * i + 1], a.high[4 * i + 2], a.high[4 * i + 3]};
            mma_tf32(d, low, b);
            mma_tf32(d, high, b);
        }
    }
}

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
                const Left a = left_of<T>(xs + (row0 + 16 * i) * WIDTH + step, g, t);
#pragma unroll
                for (u32 j = 0; j < 4; j++) multiply<T>(d[i][j], a, b[j]);
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
