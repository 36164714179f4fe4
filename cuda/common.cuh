// Included by every kernel file: how a kernel is declared, the cell it computes, stored numbers, activations.
//
//   KERNEL(name, row, threads) { .. }   a kernel of `threads` threads at most; `l` is the row's Launch (rows.cuh)
//   KERNEL_AT_ONCE(.., blocks)          the same with registers for so many blocks at once on a multiprocessor
//   SHARED(Type, name)                  memory that the block shares; it holds anything before it is written
//   LAUNCH_SHARED(Type, name)           the same whose size the launch says (choose.rs): more than the 48 KB that need no asking
//
// Element indices are size_t: a tensor may have more than 2^31 of them.
#pragma once
#include <stdint.h>

#ifdef GATEDELTA_EMULATOR
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KERNEL_AT_ONCE(name, row_name, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ row::row_name::Launch l)
#define SHARED(Type, name) __shared__ Type name
#define LAUNCH_SHARED(Type, name)                              \
    extern __shared__ __align__(16) char name##_bytes[]; \
    Type& name = *(Type*)name##_bytes
#endif
// One block a multiprocessor is promised: without it the compiler spills to fit more.
#define KERNEL(name, row_name, threads) KERNEL_AT_ONCE(name, row_name, threads, 1)

#include "rows.cuh"

typedef uint32_t u32;

// The largest number of threads of a block whose size is chosen at run time.
constexpr u32 MOST_THREADS = 256;

// The cell that this block computes. A launch may reach the device in several parts, each with its own base.
template <class Launch>
__device__ __forceinline__ uint3 cell_of(const Launch& l) {
    return make_uint3(blockIdx.x + l.base[0], blockIdx.y + l.base[1], blockIdx.z + l.base[2]);
}

// ---- four numbers -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float4 four(float x) { return make_float4(x, x, x, x); }
__device__ __forceinline__ float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ __forceinline__ float4 operator-(float4 a, float4 b) { return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w); }
__device__ __forceinline__ float4 operator*(float s, float4 a) { return make_float4(s * a.x, s * a.y, s * a.z, s * a.w); }
__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
// sum += s a
__device__ __forceinline__ void add(float4& sum, float s, float4 a) {
    sum.x = fmaf(s, a.x, sum.x);
    sum.y = fmaf(s, a.y, sum.y);
    sum.z = fmaf(s, a.z, sum.z);
    sum.w = fmaf(s, a.w, sum.w);
}
// sum + a . b
__device__ __forceinline__ float add_dot(float sum, float4 a, float4 b) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
__device__ __forceinline__ float get(float4 a, u32 i) { return i == 0 ? a.x : i == 1 ? a.y : i == 2 ? a.z : a.w; }

// ---- stored numbers -----------------------------------------------------------------------------------------------

struct F32 {
    typedef float Raw;
    static constexpr bool HALF = false, BRAIN = false;
    static __device__ __forceinline__ float number(Raw x) { return x; }
    static __device__ __forceinline__ Raw stored(float x) { return x; }
};

struct F16 {
    typedef uint16_t Raw;
    static constexpr bool HALF = true, BRAIN = false;
#ifdef GATEDELTA_EMULATOR
    static float number(Raw x) { return emulator::half_to_float(x); }
    static Raw stored(float x) { return emulator::float_to_half(x); }
#else
    static __device__ __forceinline__ float number(Raw x) { return __half2float(__ushort_as_half(x)); }
    static __device__ __forceinline__ Raw stored(float x) { return __half_as_ushort(__float2half_rn(x)); }
#endif
};

struct Bf16 {
    typedef uint16_t Raw;
    static constexpr bool HALF = true, BRAIN = true;
    static __device__ __forceinline__ float number(Raw x) { return __uint_as_float((u32)x << 16); }
#ifdef GATEDELTA_EMULATOR
    static Raw stored(float x) { return emulator::float_to_bf16(x); }
#else
    static __device__ __forceinline__ Raw stored(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#endif
};

// The two 16-bit numbers of a word; the first in the low half.
template <class T>
__device__ __forceinline__ float2 unpack(u32 word) {
    return make_float2(T::number((uint16_t)(word & 0xffff)), T::number((uint16_t)(word >> 16)));
}
template <class T>
__device__ __forceinline__ u32 pack(float a, float b) {
    return (u32)T::stored(a) | (u32)T::stored(b) << 16;
}

template <class T>
__device__ __forceinline__ const typename T::Raw* stored_at(const void* p, size_t i) {
    return (const typename T::Raw*)p + i;
}

// Element i.
template <class T>
__device__ __forceinline__ float load(const void* p, size_t i) {
    return T::number(*stored_at<T>(p, i));
}

// Elements i to i + 3; of 16-bit numbers i is even.
template <class T>
__device__ __forceinline__ float4 load4(const void* p, size_t i) {
    if constexpr (T::HALF) {
        const u32* words = (const u32*)stored_at<T>(p, i);
        const float2 a = unpack<T>(words[0]), b = unpack<T>(words[1]);
        return make_float4(a.x, a.y, b.x, b.y);
    } else {
        const float* x = (const float*)p + i;
        return make_float4(x[0], x[1], x[2], x[3]);
    }
}

template <class T>
__device__ __forceinline__ void store4(void* p, size_t i, float4 x) {
    if constexpr (T::HALF) {
        u32* words = (u32*)((typename T::Raw*)p + i);
        words[0] = pack<T>(x.x, x.y);
        words[1] = pack<T>(x.z, x.w);
    } else {
        float* to = (float*)p + i;
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    }
}

// ---- activations --------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

// The derivative of silu.
__device__ __forceinline__ float silu_slope(float x) {
    const float e = expf(-x), s = 1.f / (1.f + e);
    // 1 - s loses the digits of a small difference.
    return s * (1.f + x * (x > 0.f ? e * s : 1.f - s));
}

// log(1 + e^x), the identity above 20.
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

// ---- heads --------------------------------------------------------------------------------------------------------

// The q/k head that value head h reads.
__device__ __forceinline__ u32 key_head(u32 h, u32 hk, u32 hv, u32 head_map) { return head_map == 0 ? h / (hv / hk) : h % hk; }

// Value head `member` of q/k head h.
__device__ __forceinline__ u32 value_head(u32 h, u32 member, u32 hk, u32 group, u32 head_map) {
    return head_map == 0 ? h * group + member : h + member * hk;
}
