// The instructions of `cuda/hopper/ptx.cuh` and the products of `types.cuh` as ordinary C++.
//
// Copies to shared memory are complete when they are asked for; those from it are done when they are waited for, as late as they may be,
// so that a place that is used again too soon, or a wait that is missing, shows as wrong numbers. Products of a warpgroup are done when they are waited for, as late as they may be:
// results that are read and tiles that are given back too soon show as wrong numbers. Not shown: which proxy a write goes through,
// and registers that change while a product reads them.
#pragma once
#include "emulator.h"

#define ENTRY(NAME, THREADS, BLOCKS, A)                                          \
    static void NAME##_body(const A& p);                                         \
    extern "C" void NAME(void* const* args) { NAME##_body(*(const A*)args[0]); } \
    extern "C" const uint32_t NAME##_threads = THREADS;                          \
    extern "C" const uint32_t NAME##_sizes[] = {sizeof(A), 0};                   \
    static void NAME##_body(const A& p)
#define ENTRY_MAPS(NAME, THREADS, BLOCKS, A, M)                                                         \
    static void NAME##_body(const A& p, const M& maps);                                                 \
    extern "C" void NAME(void* const* args) { NAME##_body(*(const A*)args[0], *(const M*)args[1]); }    \
    extern "C" const uint32_t NAME##_threads = THREADS;                                                 \
    extern "C" const uint32_t NAME##_sizes[] = {sizeof(A), sizeof(M), 0};                               \
    static void NAME##_body(const A& p, const M& maps)
#define DYNAMIC_SHARED(name) char* name = emulator::shared_base()
#define STATIC_SHARED(Type, name, count)  \
    static const char name##_key = 0;     \
    Type* name = (Type*)emulator::shared_memory(&name##_key, sizeof(Type) * (count))

// Rows of numbers of 2 or 4 bytes, as the copy engine takes them: what cuTensorMapEncodeTiled of the stand-in writes.
struct alignas(64) CUtensorMap {
    const char* base;
    uint64_t width, rows, stride;  // numbers, rows, bytes
    uint32_t box_width, box_rows;
    uint64_t size;  // bytes of a number
    uint64_t rest[10];
};
static_assert(sizeof(CUtensorMap) == 128, "as the driver's");

inline long long clock64() { return 0; }
inline void __threadfence_system() {}
inline int __any_sync(uint32_t, bool x) { return emulator::ballot(x) != 0; }
inline uint32_t __ballot_sync(uint32_t, bool x) { return emulator::ballot(x); }
// Two meetings more than on a GPU: before it the place is emptied, and behind it read.
inline int __syncthreads_or(int x) {
    static const char key = 0;
    int* any = (int*)emulator::shared_memory(&key, sizeof(int));
    if (threadIdx.x == 0) *any = 0;
    __syncthreads();
    if (x) *any = 1;
    __syncthreads();
    const int all = *any;
    __syncthreads();
    return all;
}
template <class T>
T __shfl_up_sync(uint32_t, T x, uint32_t step) {
    const uint32_t lane = emulator::lane();
    return emulator::shuffle(x, lane >= step ? lane - step : lane);
}

namespace hopper {

inline uint32_t smem_addr(const void* p) { return (uint32_t)((const char*)p - emulator::shared_base()); }

// ---- mbarriers, copies: hopper.cpp ---------------------------------------------------------------------------------

void mbar_init(uint32_t bar, uint32_t arrivals);
void mbar_expect(uint32_t bar, uint32_t bytes);
void mbar_arrive(uint32_t bar);
// Comes back when something has happened since; true if it was that phase's end.
bool mbar_try(uint32_t bar, uint32_t parity);
inline void mbar_init_fence() {}
inline void mbar_inval(uint32_t bar) { memset(emulator::shared_base() + bar, 0xff, 8); }
inline void bar_sync(int id, int threads) { emulator::wait_named(id, threads); }

inline void fence_proxy() {}
inline int lane_id() { return threadIdx.x % 32; }
inline bool elect() { return threadIdx.x % 32 == 0; }
void tma_load(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t bar);
inline void tma_prefetch(const CUtensorMap*) {}
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar);
void bulk_store(void* dst, uint32_t src, uint32_t bytes);
// The box that `tma_load` takes, back into the matrix; of its numbers those that lie in it.
void tma_store(const CUtensorMap* map, int x, int y, uint32_t src);
void bulk_commit();
void bulk_wait_read();
inline void bulk_wait() { bulk_wait_read(); }
inline void copy16(uint32_t dst, const void* src, bool live) { emulator::copy_later(emulator::shared_base() + dst, src, 16, live); }
inline void copies_end() { emulator::copies_end(); }
template <int N>
void copies_wait() {
    emulator::copies_wait(N);
}

inline float shared_f32(uint32_t at) { return *(const float*)(emulator::shared_base() + at); }
inline float2 shared_f32x2(uint32_t at) { return *(const float2*)(emulator::shared_base() + at); }
inline uint4 shared_16(uint32_t at) { return *(const uint4*)(emulator::shared_base() + at); }
inline void shared_put_f32(uint32_t at, float x) { memcpy(emulator::shared_base() + at, &x, 4); }
inline void shared_zero_16(uint32_t at) { memset(emulator::shared_base() + at, 0, 16); }

void ldsm_trans(uint32_t (&r)[4], uint32_t addr);
void stsm(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3);
void stsm_trans(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3);

// ---- products of a warpgroup ---------------------------------------------------------------------------------------

struct Product {
    float* d;                // this thread's numbers of D [64, columns]
    int columns;
    const uint32_t* a;       // registers of A [64, 16], or null: A is at `desc_a`
    uint64_t desc_a, desc_b;
    bool trans_a, trans, add, half;  // half: IEEE half, else bfloat16
};
void wgmma(const Product& p);
void wgmma_commit();
void wgmma_wait_all_but(uint32_t groups);
inline void wgmma_fence() {}
template <int N>
void wgmma_wait() {
    wgmma_wait_all_but(N);
}

template <int N>
void hold(float (&)[N]) {}
template <int N>
void hold(uint32_t (&)[N]) {}
inline void hold(uint32_t&) {}
template <int N>
void regs_up() {}
template <int N>
void regs_down() {}

inline float exp2_fast(float x) { return exp2f(x); }
inline uint32_t bytes_of(uint32_t x, uint32_t y, uint32_t which) {
    const uint64_t from = x | (uint64_t)y << 32;
    uint32_t r = 0;
    for (int n = 0; n < 4; n++, which >>= 4) {
        const uint8_t byte = (uint8_t)(from >> 8 * (which & 7));
        r |= (uint32_t)(which & 8 ? byte >> 7 ? 255 : 0 : byte) << 8 * n;
    }
    return r;
}
inline uint32_t tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <bool HALF>
struct Stored {
    static uint16_t bits(float x) { return HALF ? emulator::float_to_half(x) : emulator::float_to_bf16(x); }
    static float number(uint16_t x) { return HALF ? emulator::half_to_float(x) : __uint_as_float((uint32_t)x << 16); }
    static uint32_t pack(float lo, float hi) { return bits(lo) | (uint32_t)bits(hi) << 16; }
    static float lo(uint32_t x) { return number((uint16_t)x); }
    static float hi(uint32_t x) { return number((uint16_t)(x >> 16)); }
    template <int TRANS, int N>
    static void mma_rs(float (&d)[N], const uint32_t* a, uint64_t b, int add) {
        wgmma({d, 2 * N, a, 0, b, false, TRANS != 0, add != 0, HALF});
    }
    template <int TRANS_A = 0, int TRANS_B = 0, int N>
    static void mma_ss(float (&d)[N], uint64_t a, uint64_t b, int add) {
        wgmma({d, 2 * N, nullptr, a, b, TRANS_A != 0, TRANS_B != 0, add != 0, HALF});
    }
};
typedef Stored<false> Bf16;
typedef Stored<true> F16;

}  // namespace hopper
