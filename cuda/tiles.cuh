// Tiles of a chunk in shared memory, and how they become operands of products of tf32 (mma.cuh).
//
// Stored 16-bit numbers are exact in tf32, f32 numbers are rounded to 10 bits after the point whatever their size: products of the two
// have one form for both stored types, and no number overflows. A product adds up over its inner index in any order, as long as both
// operands have the same: of eight numbers, 2 t takes the place of t and 2 t + 1 that of t + 4, so that each lane's two numbers lie side
// by side, in memory as in a sum d of the product before.
#pragma once
#include "chunk.cuh"
#include "mma.cuh"

// ---- operands -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void clear(float (&d)[4]) { d[0] = d[1] = d[2] = d[3] = 0.f; }

// The left operand [16, 8]: columns 2 t, 2 t + 1 of rows g and g + 8.
__device__ __forceinline__ void left(u32 (&a)[4], float2 row, float2 row_8) {
    a[0] = to_tf32(row.x), a[1] = to_tf32(row_8.x), a[2] = to_tf32(row.y), a[3] = to_tf32(row_8.y);
}
// The same from sums: D [16, 8] of one product is the left operand of another.
__device__ __forceinline__ void left(u32 (&a)[4], const float (&d)[4]) { left(a, make_float2(d[0], d[1]), make_float2(d[2], d[3])); }
// The same from stored numbers.
template <class T>
__device__ __forceinline__ void left(u32 (&a)[4], u32 row, u32 row_8) {
    const float2 x = unpack<T>(row), y = unpack<T>(row_8);
    a[0] = __float_as_uint(x.x), a[1] = __float_as_uint(y.x), a[2] = __float_as_uint(x.y), a[3] = __float_as_uint(y.y);
}

// The right operand [8, 8]: rows 2 t, 2 t + 1 of column g.
__device__ __forceinline__ void right(u32 (&b)[2], float2 x) { b[0] = to_tf32(x.x), b[1] = to_tf32(x.y); }
// What is left of two numbers that were rounded to b.
__device__ __forceinline__ void right_rest(u32 (&rest)[2], float2 x, const u32 (&b)[2]) {
    right(rest, make_float2(x.x - __uint_as_float(b[0]), x.y - __uint_as_float(b[1])));
}
template <class T>
__device__ __forceinline__ void right(u32 (&b)[2], u32 word) {
    const float2 x = unpack<T>(word);
    b[0] = __float_as_uint(x.x), b[1] = __float_as_uint(x.y);
}

// Operands of two steps, of 16 numbers together, of which a lane has 4 t to 4 t + 3: of rows g and g + 8; of column g.
__device__ __forceinline__ void left_2(u32 (&a)[2][4], float4 x, float4 y) {
    left(a[0], make_float2(x.x, x.y), make_float2(y.x, y.y));
    left(a[1], make_float2(x.z, x.w), make_float2(y.z, y.w));
}
__device__ __forceinline__ void right_2(u32 (&b)[2][2], float4 x) {
    right(b[0], make_float2(x.x, x.y));
    right(b[1], make_float2(x.z, x.w));
}

// The sum over the lanes that differ in the bits FROM to TO.
template <u32 FROM, u32 TO>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (u32 step = FROM; step <= TO; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// d += A B of stored numbers, over 16 of them
template <class T>
__device__ __forceinline__ void mma_16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if constexpr (T::BRAIN) mma_bf16(d, a, b);
    else mma_f16(d, a, b);
}

// ---- rows of stored numbers ---------------------------------------------------------------------------------------

// [C, WIDTH] 16-bit numbers in chunks of eight, whose places are swapped so that a chunk of eight rows lies in all banks.
template <u32 WIDTH>
struct Rows {
    alignas(16) uint16_t x[C * WIDTH];

    __device__ __forceinline__ uint16_t* at(u32 row, u32 chunk) {
        const u32 swap = WIDTH >= 64 ? row % 8 : row / 2 % 4;
        return x + row * WIDTH + 8 * (chunk ^ swap);
    }
    // Starts copies of `len` rows, `stride` apart; the rows after them become zeros.
    template <u32 THREADS>
    __device__ __forceinline__ void fetch(const void* from, size_t first, size_t stride, u32 len) {
        const uint16_t* rows = (const uint16_t*)from + first;
        if (((uintptr_t)rows | 2 * stride) % 16 == 0) {
#pragma unroll
            for (u32 e = threadIdx.x; e < C * WIDTH / 8; e += THREADS) {
                const u32 row = e / (WIDTH / 8), chunk = e % (WIDTH / 8);
                copy_16(at(row, chunk), rows + (row < len ? row : 0) * stride + 8 * chunk, row < len);
            }
        } else {
            for (u32 e = threadIdx.x; e < C * WIDTH / 2; e += THREADS) {
                const u32 row = e / (WIDTH / 2), pair = e % (WIDTH / 2);
                copy_4(at(row, pair / 4) + 2 * (pair % 4), rows + (row < len ? row : 0) * stride + 2 * pair, row < len);
            }
        }
    }
    // x[i]: columns 2 t, 2 t + 1 of row `row` + g, eight columns on from one i to the next
    __device__ __forceinline__ void along(u32 (&w)[4], u32 row, u32 chunk) {
        const u32 lane = threadIdx.x % 32;
        load_4(w, at(row + lane % 8, chunk + lane / 8));
    }
    // x[i]: rows 2 t, 2 t + 1 of column 8 chunk + g, eight rows on from one i to the next
    __device__ __forceinline__ void down(u32 (&w)[4], u32 chunk) {
        load_4_across(w, at(threadIdx.x % 32, chunk));
    }
};

// ---- squares of f32 -----------------------------------------------------------------------------------------------

// [C, C] f32. Eights are swapped so that pairs of a row as well as numbers of a column are read from different banks.
struct Square {
    alignas(16) float x[C * C];

    __device__ __forceinline__ float* at(u32 i, u32 j) { return x + i * C + (j ^ 8 * ((i ^ i >> 2) & 3)); }
    // Starts copies.
    template <u32 THREADS>
    __device__ __forceinline__ void fetch(const float* from) {
#pragma unroll
        for (u32 e = threadIdx.x; e < C * C / 4; e += THREADS) copy_16(at(e / (C / 4), e % (C / 4) * 4), from + 4 * e, true);
    }
    // The two numbers at columns 2 t, 2 t + 1 of block (i, j) of [8, 8], row g
    __device__ __forceinline__ float2 along(u32 i, u32 j) {
        const u32 lane = threadIdx.x % 32;
        return *(const float2*)at(8 * i + lane / 4, 8 * j + 2 * (lane % 4));
    }
    // The two at rows 2 t, 2 t + 1, column g
    __device__ __forceinline__ float2 down(u32 i, u32 j) {
        const u32 lane = threadIdx.x % 32, row = 8 * i + 2 * (lane % 4), column = 8 * j + lane / 4;
        return make_float2(*at(row, column), *at(row + 1, column));
    }
};
