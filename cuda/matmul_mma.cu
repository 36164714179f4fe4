// y[i, j] (+)= sum_k x[i, k] w[j, k] for many rows of x and 16-bit weights, on the matrix units.
//
// x stays f32: it is split into numbers that the units take, and each is multiplied with w, which is exact there: three of bf16 with
// bf16 weights, whose sum is x but for 2^-25 of it; two of tf32 with f16 weights (half would not hold the range of x), but for 2^-22.
// The units add up with truncation: after each slice their sums go into sums that are rounded.
//
// 4 warps share a tile of 64 x 64, each with 16 rows and all columns, so that each number of x is split once: a step of 16 of k is 24 products of a
// warp, 44 instructions to split x and 4 ldmatrix for w. Slices of 32 numbers of x and w come by copies in the background, two slices ahead.
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
    // d += x w^T for 8 columns of y in each d, the smallest part first. A product waits for the one before it into the same d, so the others go between.
    template <u32 N>
    __device__ __forceinline__ void multiply(float (&d)[N][4], const u32 (&w)[N][2]) const {
#pragma unroll
        for (u32 p = 3; p-- > 0;)
#pragma unroll
            for (u32 j = 0; j < N; j++) mma_bf16(d[j], part[p], w[j]);
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
    template <u32 N>
    __device__ __forceinline__ void multiply(float (&d)[N][4], const u32 (&w)[N][2]) const {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 b[N][2];
#pragma unroll
            for (u32 j = 0; j < N; j++) {
                const float2 pair = unpack<F16>(w[j][i]);
                b[j][0] = __float_as_uint(pair.x), b[j][1] = __float_as_uint(pair.y);
            }
#pragma unroll
            for (u32 p = 2; p-- > 0;)
#pragma unroll
                for (u32 j = 0; j < N; j++) mma_tf32(d[j], part[i][p], b[j]);
        }
    }
};

template <class T>
__device__ __forceinline__ void matmul(const row::matmul::Launch& l) {
    SHARED(Shared, s);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, warp = lane / 32, g = lane % 32 / 4, t = lane % 4;
    const u32 m = l.p.m, n = l.p.n, k = l.p.k, m0 = cell.y * TILE, n0 = cell.x * TILE;
    const u32 row0 = warp * 16;  // of this warp's part of the tile
    // What this lane addresses in load_4: row lane % 8 of blocks (j, first 8 of k), (j, last 8), (j + 1, first 8), (j + 1, last 8) of w.
    const u32 lane_at = (lane % 8 + lane % 32 / 16 * 8) * WIDTH + lane % 16 / 8 * 8;
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

    float sum[8][4];
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) sum[j][e] = 0.f;
    fetch(0);
    fetch(1);
    for (u32 slice = 0; slice < slices; slice++) {
        copies_wait<1>();
        __syncthreads();
        // Goes where the slice before this one was, which no thread reads any more.
        fetch(slice + 2);
        const float* xs = s.x[slice % STAGES];
        const uint16_t* ws = s.w[slice % STAGES];
        float d[8][4];
#pragma unroll
        for (u32 j = 0; j < 8; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) d[j][e] = 0.f;
#pragma unroll
        for (u32 step = 0; step < DEPTH; step += 16) {
            const float* rows = xs + (row0 + g) * WIDTH + step + 2 * t;
            Left<T> a;
#pragma unroll
            for (u32 e = 0; e < 4; e++) a.put(e, *(const float2*)(rows + e % 2 * 8 * WIDTH + e / 2 * 8));
            u32 b[8][2];
#pragma unroll
            for (u32 j = 0; j < 8; j += 2) {
                u32 two[4];
                load_4(two, ws + 8 * j * WIDTH + lane_at + step);
                b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
            }
            a.multiply(d, b);
        }
#pragma unroll
        for (u32 j = 0; j < 8; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) sum[j][e] += d[j][e];
    }
    float* y = (float*)l.m.y + l.p.y_off;
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            const u32 row = m0 + row0 + g + e / 2 * 8, column = n0 + 8 * j + 2 * t + e % 2;
            if (row < m && column < n) {
                float* to = y + (size_t)row * l.p.y_stride + column;
                *to = l.c.add ? *to + sum[j][e] : sum[j][e];
            }
        }
}

// Four blocks of 46 KB at once where a multiprocessor has the memory (sm_90, sm_100), which are 128 registers a thread; with f16 that would spill.
KERNEL(matmul_mma_f16, matmul, THREADS) { matmul<F16>(l); }
KERNEL_AT_ONCE(matmul_mma_bf16, matmul, THREADS, 4) { matmul<Bf16>(l); }
