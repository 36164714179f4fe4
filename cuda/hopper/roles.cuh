// The skeleton that Hopper kernels share (sm_90a): barriers, copies by the tensor copy engine, wgmma bookkeeping, registers
// per role. Nothing here knows what is computed.
//
// Proxies. Ordinary accesses to shared memory and those of wgmma and the copy engine go through different proxies. Whoever
// writes shared memory with ordinary stores (stmatrix, cp.async too) that wgmma or the copy engine reads next calls
// `fence_proxy()` after its own writes and before the barrier that announces them.
#pragma once
#include <cuda.h>
#include <cstdint>

namespace hopper {

constexpr int WARPGROUP = 128;

__device__ __forceinline__ uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// A number as a type.
template <int N>
struct Int {
    __device__ constexpr operator int() const { return N; }
};

// Tells the compiler that all lanes hold the same number.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// The next multiple of 1024. Counted from the array, so that the compiler still knows the memory as shared.
__device__ __forceinline__ char* align_1024(char* smem) { return smem + (-smem_addr(smem) & 1023); }

// ---- mbarriers -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbar_init(uint32_t bar, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbar_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbar_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ bool mbar_try(uint32_t bar, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    return done != 0;
}

// Waits for the phase `parity`. With a place for it (`hung`, host memory), a wait longer than a second writes `code` there
// and stops the kernel: a missed arrival is then an error with a name, not a hang. It stops by a store to address 0, because
// ptxas gives a kernel that holds `trap` no more registers in the branch of a role than at its entry.
__device__ __forceinline__ void mbar_wait(uint32_t bar, uint32_t parity, uint32_t* hung, uint32_t code) {
    if (mbar_try(bar, parity)) return;
    long long t0 = clock64();
    while (!mbar_try(bar, parity)) {
        if (hung != nullptr && clock64() - t0 > (1ll << 31)) {
            *(volatile uint32_t*)hung = code;
            __threadfence_system();
            *(volatile uint32_t*)nullptr = code;
        }
    }
}

// ---- named barriers ------------------------------------------------------------------------------------------------

// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads.
__device__ __forceinline__ void bar_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- copies --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Box at (x, y) of a matrix in memory into shared memory; completes on `bar`.
__device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
        "l"(map), "r"(x), "r"(y), "r"(bar)
        : "memory");
}

// Box at (x, y) from shared memory into a matrix in memory; rows past its end are left out.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, int x, int y, uint32_t src) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x), "r"(y), "r"(src)
                 : "memory");
}

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src),
                 "r"(bytes), "r"(bar)
                 : "memory");
}

__device__ __forceinline__ void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// The calling thread's stores have read shared memory.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// The calling thread's stores are complete.
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// 16 bytes from memory into shared memory, or zeros.
__device__ __forceinline__ void copy16(uint32_t dst, const void* src, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(live ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- 8 x 8 blocks of 16-bit numbers --------------------------------------------------------------------------------

// Four blocks, lane l giving the address of row l % 8 of block l / 8. Plain: lane 4 i + j holds elements (i, 2j) and (i, 2j + 1)
// of each; transposed: (2j, i) and (2j + 1, i).
__device__ __forceinline__ void ldsm_trans(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}

__device__ __forceinline__ void stsm(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

__device__ __forceinline__ void stsm_trans(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(r0), "r"(r1), "r"(r2),
                 "r"(r3)
                 : "memory");
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

// Shared memory tiles are panels [rows, 64] of 16-bit numbers: 128 bytes a row, 16-byte units swizzled by `unit ^ (row & 7)`,
// base on 1024 bytes: what the copy engine writes with SWIZZLE_128B.
__device__ __forceinline__ uint32_t swizzled(uint32_t panel, int row, int unit) {
    return panel + row * 128 + ((unit ^ (row & 7)) << 4);
}

// Operand whose reduced dimension is contiguous: 8-row groups 1024 bytes apart. 16 columns on: + 32 bytes.
__device__ __forceinline__ uint64_t desc_k_major(uint32_t addr) {
    return (uint64_t)((addr & 0x3ffff) >> 4) | (1ull << 16) | ((uint64_t)(1024 >> 4) << 32) | (1ull << 62);
}

// Operand whose reduced dimension is the row: groups of 8 rows 1024 bytes apart, panels of 64 columns `panel` bytes apart.
// 16 rows on: + 2048 bytes.
__device__ __forceinline__ uint64_t desc_mn_major(uint32_t addr, uint32_t panel) {
    return (uint64_t)((addr & 0x3ffff) >> 4) | ((uint64_t)(panel >> 4) << 16) | ((uint64_t)(1024 >> 4) << 32) | (1ull << 62);
}

// Operand in blocks of 8 x 8, rows contiguous: the next 8 of the reduced dimension 128 bytes on, the next 8 rows 256.
__device__ __forceinline__ uint64_t desc_blocks(uint32_t addr) {
    return (uint64_t)((addr & 0x3ffff) >> 4) | ((uint64_t)(128 >> 4) << 16) | ((uint64_t)(256 >> 4) << 32);
}

// The same operand `bytes` further on. One addition: derived anew from its address, each descriptor costs a chain of four
// operations in the uniform datapath, longer than the product [64, 64] that waits for it.
__device__ __forceinline__ uint64_t desc_step(uint64_t d, uint32_t bytes) {
    return (d & 0xffffffff00000000ull) | (uint32_t)((uint32_t)d + (bytes >> 4));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the newest N groups are complete.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving reads or writes of a product's registers across this point.
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N>
__device__ __forceinline__ void hold(uint32_t (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i])::"memory");
}

// ---- registers per role --------------------------------------------------------------------------------------------

template <int N>
__device__ __forceinline__ void regs_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void regs_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

}  // namespace hopper
