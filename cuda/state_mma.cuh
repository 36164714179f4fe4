// A tile of a head's state in registers, as the scans on the matrix units hold it: S^T [VT, K], so that it is the left operand of
// S^T K^T as it stands, and a sum of (n o N)^T K.
//
// 4 warps share it: warp w has 16 of the 32 columns of V and half of K. Everything [VT, C] that follows is there twice, in both warps
// of the same columns; what a warp's half of K gives is added up through shared memory.
#pragma once
#include "tiles.cuh"

constexpr u32 VT = 32;
constexpr u32 SCAN_THREADS = 128;
constexpr u32 EIGHTS = C / 8;  // of tokens

// This thread's place.
struct Place {
    u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    u32 half = warp / 2;        // of K
    u32 column = warp % 2 * 16; // of V, in the tile
};

// Sums [16, C] of a warp, each lane's own: d[i][e] at column g + 8 (e / 2) of V, token 8 i + 2 t + e % 2.
typedef float Sums[EIGHTS][4];

// What warps leave for the other half of K. Written before a barrier, read after it.
template <u32 COUNT>
struct Exchange {
    float4 part[SCAN_THREADS / 32][COUNT][32];

    __device__ __forceinline__ void give(u32 i, const float (&d)[4]) {
        part[threadIdx.x / 32][i][threadIdx.x % 32] = make_float4(d[0], d[1], d[2], d[3]);
    }
    // Both halves add the same two numbers.
    __device__ __forceinline__ void take(u32 i, float (&d)[4]) {
        const float4 x = part[threadIdx.x / 32 ^ 2][i][threadIdx.x % 32];
        d[0] += x.x, d[1] += x.y, d[2] += x.z, d[3] += x.w;
    }
};

template <u32 K>
struct StateTile {
    static constexpr u32 HALF = K / 2, TILES = HALF / 8;
    float s[TILES][4];  // column g + 8 (e / 2) of V, row 8 j + 2 t + e % 2 of this warp's half of K

    // f(number, row of K, column of V in the tile)
    template <class F>
    __device__ __forceinline__ void each(const Place& at, F f) {
#pragma unroll
        for (u32 j = 0; j < TILES; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) f(s[j][e], at.half * HALF + 8 * j + 2 * at.t + e % 2, at.column + at.g + 8 * (e / 2));
    }
    __device__ __forceinline__ void clear_all() {
#pragma unroll
        for (u32 j = 0; j < TILES; j++) clear(s[j]);
    }
    // state [K, V] from the tile's first column on
    __device__ __forceinline__ void load(const Place& at, const float* state, u32 dv) {
        each(at, [&](float& x, u32 row, u32 column) { x = state[(size_t)row * dv + column]; });
    }
    __device__ __forceinline__ void store(const Place& at, float* state, u32 dv) {
        each(at, [&](float& x, u32 row, u32 column) { state[(size_t)row * dv + column] = x; });
    }
    __device__ __forceinline__ void scale(float gamma) {
#pragma unroll
        for (u32 j = 0; j < TILES; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) s[j][e] *= gamma;
    }
    // d = S^T X^T of this half of K, for rows X [C, K]
    template <class T>
    __device__ __forceinline__ void times(const Place& at, Rows<K>& rows, Sums& d) const {
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) clear(d[i]);
#pragma unroll
        for (u32 j = 0; j < TILES; j += 4) {
            u32 x[EIGHTS][4];
#pragma unroll
            for (u32 i = 0; i < EIGHTS; i++) rows.along(x[i], 8 * i, at.half * TILES + j);
#pragma unroll
            for (u32 step = 0; step < 4; step++) {
                u32 a[4];
                left(a, s[j + step]);
#pragma unroll
                for (u32 i = 0; i < EIGHTS; i++) {
                    u32 b[2];
                    right<T>(b, x[i][step]);
                    mma_tf32(d[i], a, b);
                }
            }
        }
    }
    // S^T += D X, for rows X [C, K] and D [16, C] as left operands
    template <class T>
    __device__ __forceinline__ void add(const Place& at, Rows<K>& rows, const u32 (&d)[EIGHTS][4]) {
#pragma unroll
        for (u32 j = 0; j < TILES; j++) {
            u32 x[EIGHTS];
            rows.down(x, at.half * TILES + j);
#pragma unroll
            for (u32 i = 0; i < EIGHTS; i++) {
                u32 b[2];
                right<T>(b, x[i]);
                mma_tf32(s[j], d[i], b);
            }
        }
    }
};

// Left operands [16, 8] of each eight tokens from the stored rows [C, VT], and the numbers themselves: w[i] has this lane's pairs of
// tokens 8 i + 2 t, 2 t + 1, of column g and of g + 8.
__device__ __forceinline__ void load_columns(const Place& at, Rows<VT>& rows, u32 (&w)[EIGHTS][2]) {
#pragma unroll
    for (u32 c = 0; c < 2; c++) {
        u32 x[EIGHTS];
        rows.down(x, at.column / 8 + c);
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) w[i][c] = x[i];
    }
}

// The factors of this lane's two tokens of an eight.
__device__ __forceinline__ float2 pair_of(const float* factors, const Place& at, u32 eight) {
    return *(const float2*)(factors + 8 * eight + 2 * at.t);
}

// to [C, V] from the tile's first column on; each half stores half of the tokens
__device__ __forceinline__ void store_sums(const Place& at, const Sums& d, float* to, u32 dv) {
#pragma unroll
    for (u32 i = 0; i < EIGHTS; i++)
        if (i / 2 == at.half) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) to[(size_t)(8 * i + 2 * at.t + e % 2) * dv + at.column + at.g + 8 * (e / 2)] = d[i][e];
        }
}

#define MMA_SCAN_KERNELS(NAME, ROW, BODY)                                              \
    KERNEL(NAME##_f16_k64, ROW, SCAN_THREADS) { BODY<F16, 64>(l); }                    \
    KERNEL(NAME##_f16_k128, ROW, SCAN_THREADS) { BODY<F16, 128>(l); }                  \
    KERNEL(NAME##_bf16_k64, ROW, SCAN_THREADS) { BODY<Bf16, 64>(l); }                  \
    KERNEL(NAME##_bf16_k128, ROW, SCAN_THREADS) { BODY<Bf16, 128>(l); }
