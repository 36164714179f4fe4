// CUDA as ordinary C++, for the kernel files of `cuda/`: a block's threads are fibers of one host thread, switched where they wait
// for each other; its shared memory is poisoned before it starts. Slow, and right: what it cannot show is said in `driver.cpp`.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct uint2 {
    uint32_t x, y;
};
struct uint3 {
    uint32_t x, y, z;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint3 make_uint3(uint32_t x, uint32_t y, uint32_t z) { return {x, y, z}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator {

// The thread that runs on this host thread now.
struct Thread {
    uint3 thread;
    uint3 block;
    uint3 block_size;
    uint3 grid_size;
};
extern __thread Thread* now __attribute__((tls_model("initial-exec")));

// Waits until every live thread of the block, or of the warp, has come here.
void wait_block();
void wait_warp();
// Memory of `bytes` bytes that all threads of the warp see; the same until the warp's threads have met twice.
void* warp_memory(size_t bytes);
// Memory of the block: the same address for the same `key`, poisoned when the block starts.
void* shared_memory(const void* key, size_t bytes);
// Where the block's memory starts, with that whose size the launch says, which must be `bytes` at least.
char* shared_base(size_t bytes = 0);
// Waits until `threads` threads have come to barrier `id`.
void wait_named(uint32_t id, uint32_t threads);
// Waits until something has happened. Whoever changes what others poll says so.
void poll();
void happen();
// Counts blocks: a different one for each that this host thread runs.
uint64_t block_number();
// Aborts if an instruction would on a GPU: `p` is no multiple of `bytes`.
void aligned(const void* p, size_t bytes);
// A copy to shared memory, of zeros unless `valid`. It is done as late as it may be: when the thread waits for its group.
void copy_later(void* shared, const void* global, uint32_t bytes, bool valid);
void copies_end();
// Until at most `left` of the thread's groups are under way.
void copies_wait(uint32_t left);

inline uint32_t lane() { return now->thread.x % 32; }

float half_to_float(uint16_t x);
uint16_t float_to_half(float x);
uint16_t float_to_bf16(float x);

template <class T>
T shuffle(T x, uint32_t from) {
    T* slots = (T*)warp_memory(32 * sizeof(T));
    slots[lane()] = x;
    wait_warp();
    T y = slots[from % 32];
    wait_warp();
    return y;
}

// Bit l: what lane l says.
inline uint32_t ballot(bool x) {
    uint8_t* said = (uint8_t*)warp_memory(32);
    said[lane()] = x;
    wait_warp();
    uint32_t all = 0;
    for (int l = 0; l < 32; l++) all |= (uint32_t)said[l] << l;
    wait_warp();
    return all;
}

}  // namespace emulator

#define threadIdx (emulator::now->thread)
#define blockIdx (emulator::now->block)
#define blockDim (emulator::now->block_size)
#define gridDim (emulator::now->grid_size)

inline void __syncthreads() { emulator::wait_block(); }
inline void __syncwarp(uint32_t = ~0u) { emulator::wait_warp(); }
template <class T>
T __shfl_sync(uint32_t, T x, int from) {
    return emulator::shuffle(x, from);
}
template <class T>
T __shfl_xor_sync(uint32_t, T x, int step) {
    return emulator::shuffle(x, emulator::lane() ^ step);
}

inline float __uint_as_float(uint32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline int __ffs(uint32_t x) { return __builtin_ffs((int)x); }
inline uint32_t __float_as_uint(float x) {
    uint32_t y;
    memcpy(&y, &x, 4);
    return y;
}
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
template <class T>
T min(T a, T b) {
    return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
    return a > b ? a : b;
}

#define KERNEL_AT_ONCE(name, row_name, threads, blocks)                                      \
    static void name##_body(const row::row_name::Launch& l);                                       \
    extern "C" void name(const row::row_name::Launch& l) { name##_body(l); }                       \
    extern "C" const uint32_t name##_threads = threads;                                  \
    extern "C" const uint32_t name##_bytes = sizeof(row::row_name::Launch);                        \
    static void name##_body(const row::row_name::Launch& l)
#define SHARED(Type, name)                    \
    static const char name##_key = 0;         \
    Type& name = *(Type*)emulator::shared_memory(&name##_key, sizeof(Type))
#define LAUNCH_SHARED(Type, name) Type& name = *(Type*)emulator::shared_base(sizeof(Type))
