// A slice of a head's state in registers, as the scans and the step hold it.
//
// Threads form a grid of G x QUADS; thread (ty, tx) holds rows ty * ROWS to ty * ROWS + ROWS - 1 of columns 4 tx to 4 tx + 3.
// KP is K rounded up to what the kernel is compiled for; rows from K on are 0.
#pragma once
#include "common.cuh"

constexpr u32 GROUPS = 16;

template <u32 KP, u32 VT, u32 G = GROUPS>
struct Slice {
    static constexpr u32 QUADS = VT / 4;
    static constexpr u32 THREADS = G * QUADS;
    static constexpr u32 ROWS = KP / G;
    static_assert(VT % 16 == 0 && ROWS % 4 == 0, "rows and columns in fours");
    static_assert(16 % ROWS == 0, "K is a multiple of 16: all rows of a thread lie in it, or none");

    // state [K, V], from this thread's first row and column on
    static __device__ __forceinline__ void load(float4 (&s)[ROWS], const float* state, u32 row0, u32 dk, u32 dv) {
        const bool valid = row0 < dk;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) s[r] = valid ? *(const float4*)(state + (size_t)r * dv) : four(0.f);
    }
    // From the identity; its last rows and columns may lie outside K.
    static __device__ __forceinline__ void identity(float4 (&s)[ROWS], u32 row0, u32 column) {
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const u32 at = row0 + r - column;
            s[r] = make_float4(at == 0 ? 1.f : 0.f, at == 1 ? 1.f : 0.f, at == 2 ? 1.f : 0.f, at == 3 ? 1.f : 0.f);
        }
    }
    static __device__ __forceinline__ void store(const float4 (&s)[ROWS], float* state, u32 row0, u32 dk, u32 dv) {
        if (row0 >= dk) return;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) *(float4*)(state + (size_t)r * dv) = s[r];
    }
};

// sum += x . (s0, s1, s2, s3), the rows that belong to the four numbers of x
__device__ __forceinline__ void add_rows(float4& sum, float4 x, float4 s0, float4 s1, float4 s2, float4 s3) {
    add(sum, x.x, s0);
    add(sum, x.y, s1);
    add(sum, x.z, s2);
    add(sum, x.w, s3);
}

// The models' columns for each K; those of a V that 32 does not divide for the largest alone. The scans' K of 64 is left to the matrix units (state_mma.cuh) with 16 bits; a smaller one is rare enough to be taken for 128.
#define SCAN_KERNELS(NAME, ROW, BODY)                \
    STATE_KERNEL(NAME##_f32, ROW, BODY, F32, 64, 32) \
    STATE_KERNELS_OF(NAME##_f32, ROW, BODY, F32)     \
    STATE_KERNELS_OF(NAME##_f16, ROW, BODY, F16)     \
    STATE_KERNELS_OF(NAME##_bf16, ROW, BODY, Bf16)
#define STATE_KERNELS_OF(NAME, ROW, BODY, T)      \
    STATE_KERNEL(NAME, ROW, BODY, T, 128, 32)     \
    STATE_KERNEL(NAME, ROW, BODY, T, 256, 32)     \
    STATE_KERNEL(NAME, ROW, BODY, T, 256, 16)
#define STATE_KERNEL(NAME, ROW, BODY, T, KP, VT) \
    KERNEL(NAME##_k##KP##_v##VT, ROW, (Slice<KP, VT>::THREADS)) { BODY<T, KP, VT>(l); }
