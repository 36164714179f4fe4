// The two stored types: how pairs are packed, and their warpgroup products (wgmma, sm_90a).
//
// Fragments. Of d [64, N], thread t of the warpgroup (warp w, lane 4 i + j) holds, for every block of 8 columns b,
// d[4b], d[4b+1] = rows 16w + i, columns 8b + 2j, 8b + 2j + 1 and d[4b+2], d[4b+3] the same of row 16w + i + 8. Packed in
// pairs in that order, these are the fragments of a [64, 16] for block pairs: a product's result, rounded, is the next
// product's left operand without leaving the registers.
#pragma once
#ifndef GATEDELTA_EMULATOR
#include <cstdint>

namespace hopper {

// ---- the text of products --------------------------------------------------------------------------------------------

#define NUMBERS_0_TO_31                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_32_TO_63                                                              \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_0_TO_15 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_8(d, n) \
    "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]), "+f"(d[n + 6]), "+f"(d[n + 7])
#define SUMS_32(d, n) SUMS_8(d, n), SUMS_8(d, n + 8), SUMS_8(d, n + 16), SUMS_8(d, n + 24)

// d [64, N] (+)= a [64, 16] b [16, N] of the type T.
//   mma_rs  a in registers, b in shared memory. TRANS: b lies [16, N] with N contiguous.
//   mma_ss  both in shared memory. TRANS_A, TRANS_B: of that one not the 16 are contiguous but the 64 or N.
#define PRODUCTS(T)                                                                                                            \
    template <int TRANS>                                                                                                       \
    static __device__ __forceinline__ void mma_rs(float (&d)[32], const uint32_t* a, uint64_t b, int add) {                    \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." T "." T            \
                     " {" NUMBERS_0_TO_31 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"                                      \
                     : SUMS_32(d, 0)                                                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANS));                               \
    }                                                                                                                          \
    template <int TRANS>                                                                                                       \
    static __device__ __forceinline__ void mma_rs(float (&d)[64], const uint32_t* a, uint64_t b, int add) {                    \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." T "." T           \
                     " {" NUMBERS_0_TO_31 ", " NUMBERS_32_TO_63 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"                \
                     : SUMS_32(d, 0), SUMS_32(d, 32)                                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANS));                               \
    }                                                                                                                          \
    template <int TRANS_A = 0, int TRANS_B = 0>                                                                                \
    static __device__ __forceinline__ void mma_ss(float (&d)[16], uint64_t a, uint64_t b, int add) {                           \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32." T "." T            \
                     " {" NUMBERS_0_TO_15 "}, %16, %17, p, 1, 1, %19, %20;\n}"                                                  \
                     : SUMS_8(d, 0), SUMS_8(d, 8)                                                                              \
                     : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));                                                   \
    }                                                                                                                          \
    template <int TRANS_A = 0, int TRANS_B = 0>                                                                                \
    static __device__ __forceinline__ void mma_ss(float (&d)[32], uint64_t a, uint64_t b, int add) {                           \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." T "." T            \
                     " {" NUMBERS_0_TO_31 "}, %32, %33, p, 1, 1, %35, %36;\n}"                                                  \
                     : SUMS_32(d, 0)                                                                                           \
                     : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));                                                   \
    }                                                                                                                          \
    template <int TRANS_A = 0, int TRANS_B = 0>                                                                                \
    static __device__ __forceinline__ void mma_ss(float (&d)[64], uint64_t a, uint64_t b, int add) {                           \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." T "." T           \
                     " {" NUMBERS_0_TO_31 ", " NUMBERS_32_TO_63 "}, %64, %65, p, 1, 1, %67, %68;\n}"                            \
                     : SUMS_32(d, 0), SUMS_32(d, 32)                                                                           \
                     : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));                                                   \
    }

// bfloat16 as the stored type.
struct Bf16 {
    // Two f32 as a pair of 16-bit numbers, lo first in memory.
    static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
        uint32_t r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
        return r;
    }
    static __device__ __forceinline__ float lo(uint32_t x) { return __uint_as_float(x << 16); }
    static __device__ __forceinline__ float hi(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
    PRODUCTS("bf16")
};

// IEEE half as the stored type.
struct F16 {
    static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
        uint32_t r;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
        return r;
    }
    static __device__ __forceinline__ float lo(uint32_t x) { float r; asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(r) : "r"(x)); return r; }
    static __device__ __forceinline__ float hi(uint32_t x) { float r; asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b; }" : "=f"(r) : "r"(x)); return r; }
    PRODUCTS("f16")
};

#undef PRODUCTS
#undef SUMS_32
#undef SUMS_8
#undef NUMBERS_32_TO_63
#undef NUMBERS_0_TO_31
#undef NUMBERS_0_TO_15

}  // namespace hopper

#endif
