// Reductions over all threads of a block, in an order that depends on its size alone. Every thread calls them, and every thread
// gets the result. Blocks have a multiple of 32 threads, MOST_REDUCED at most.
#pragma once
#include "common.cuh"

constexpr u32 MOST_REDUCED = 1024;

struct Parts {
    float4 part[MOST_REDUCED / 32];
};

struct Add {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Max {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op>
__device__ __forceinline__ float reduce_warp(float x) {
    for (int step = 16; step > 0; step >>= 1) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

template <class Op>
__device__ __forceinline__ float reduce(float x, Parts& shared) {
    x = reduce_warp<Op>(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.part[threadIdx.x / 32].x = x;
    __syncthreads();
    x = shared.part[0].x;
    for (u32 i = 1; i < blockDim.x / 32; i++) x = Op::of(x, shared.part[i].x);
    return x;
}

__device__ __forceinline__ float reduce_sum(float x, Parts& shared) { return reduce<Add>(x, shared); }
__device__ __forceinline__ float reduce_max(float x, Parts& shared) { return reduce<Max>(x, shared); }

__device__ __forceinline__ float4 reduce_sum4(float4 x, Parts& shared) {
    x = make_float4(reduce_warp<Add>(x.x), reduce_warp<Add>(x.y), reduce_warp<Add>(x.z), reduce_warp<Add>(x.w));
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.part[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared.part[0];
    for (u32 i = 1; i < blockDim.x / 32; i++) x = x + shared.part[i];
    return x;
}
