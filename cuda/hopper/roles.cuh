// The skeleton that Hopper kernels share (sm_90a), over the instructions of ptx.cuh: waits, and how tiles lie in shared memory.
// Nothing here knows what is computed.
//
// Proxies. Ordinary accesses to shared memory and those of wgmma and the copy engine go through different proxies. Whoever
// writes shared memory with ordinary stores (stmatrix, cp.async too) that wgmma or the copy engine reads next calls
// `fence_proxy()` after its own writes and before the barrier that announces them.
#pragma once
#ifdef GATEDELTA_EMULATOR
#include "hopper.h"
#else
#include "ptx.cuh"
#endif

namespace hopper {

constexpr int WARPGROUP = 128;

// A number as a type.
template <int N>
struct Int {
    __device__ constexpr operator int() const { return N; }
};

// Tells the compiler that all lanes hold the same number.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// The next multiple of 1024. Counted from the array, so that the compiler still knows the memory as shared.
__device__ __forceinline__ char* align_1024(char* smem) { return smem + (-smem_addr(smem) & 1023); }

// Waits for the phase `parity`. With a place for it (`hung`, host memory), a wait longer than a second writes `code` there
// and stops the kernel: a missed arrival is then an error with a name, not a hang. It stops by a store to address 0, because
// ptxas gives a kernel that holds `trap` no more registers in the branch of a role than at its entry.
__device__ __forceinline__ void mbar_wait(uint32_t bar, uint32_t parity, uint32_t* hung, uint32_t code) {
    if (__builtin_expect(mbar_try(bar, parity), 1)) return;
    long long t0 = clock64();
    while (!mbar_try(bar, parity)) {
        if (hung != nullptr && clock64() - t0 > (1ll << 31)) {
            *(volatile uint32_t*)hung = code;
            __threadfence_system();
            *(volatile uint32_t*)nullptr = code;
        }
    }
}

// A warp's arrival on an mbarrier: its first lane's, for all of them behind __syncwarp. racecheck does not see that order and reports what
// the other lanes read as a race (a program of nothing else, with the barriers of CCCL, is reported too): compiled with
// EVERY_LANE_ARRIVES, each lane arrives for itself.
#ifdef EVERY_LANE_ARRIVES
constexpr int WARP_ARRIVALS = 32;
#else
constexpr int WARP_ARRIVALS = 1;
#endif
__device__ __forceinline__ void warp_arrive(uint32_t bar, int lane) {
    if (WARP_ARRIVALS == 32 || lane == 0) mbar_arrive(bar);
}

// Registers of a thread where consumers are served by a warpgroup; MAKES: and another one makes what they multiply. A block keeps what it
// was launched with, so much a thread: who asks for more than the others have left waits for ever.
template <int K, int CONSUMERS = 2, bool MAKES = false>
struct Registers {
    static constexpr int WARPGROUPS = CONSUMERS + 1 + MAKES, LAUNCHED = WARPGROUPS == 4 ? 128 : 168;
    static constexpr int SERVER = K > 64 && CONSUMERS > 1 ? 24 : 40;
    static constexpr int CONSUMER = CONSUMERS == 1 ? 256 : MAKES ? 216 : K > 64 ? 240 : 232;
    static constexpr int MAKER = !MAKES ? 0 : CONSUMERS == 1 ? 152 : 56;
    static_assert(SERVER + CONSUMERS * CONSUMER + MAKER <= WARPGROUPS * LAUNCHED, "a block has no more");
};

// ---- tiles ---------------------------------------------------------------------------------------------------------

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

// The same operand `bytes` further on, a whole stage too: no block has 256 KB. One addition: derived anew from its address, each descriptor costs a chain of four
// operations in the uniform datapath, longer than the product [64, 64] that waits for it.
__device__ __forceinline__ uint64_t desc_step(uint64_t d, uint32_t bytes) {
    return (d & 0xffffffff00000000ull) | (uint32_t)((uint32_t)d + (bytes >> 4));
}

}  // namespace hopper
