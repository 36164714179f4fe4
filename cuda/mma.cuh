// Instructions that C++ has no words for, sm_80 and later: products of tiles by a warp, their operands from shared memory, and copies
// that go on in the background.
//
// Lane 4 g + t holds, of D += A B with A [16, K], B [K, 8], D [16, 8] (PTX ISA, "Matrix multiply-accumulate operation using mma"):
//   d[0], d[1]: row g, columns 2 t, 2 t + 1; d[2], d[3]: the same of row g + 8
//   16 bits, K = 16: a[0] row g, a[1] row g + 8, columns 2 t, 2 t + 1; a[2], a[3] the same, 8 columns on; b[0] rows 2 t, 2 t + 1 of column
//   g, b[1] 8 rows on
//   tf32, K = 8: a[0] row g, a[1] row g + 8, column t; a[2], a[3] the same, 4 columns on; b[0] row t of column g, b[1] 4 rows on
// load_4 brings four matrices [8, 8] of 16 bits, lane l says where row l % 8 of matrix l / 8 is: x[i] holds columns 2 t, 2 t + 1 of row g of
// matrix i; or, across, rows 2 t, 2 t + 1 of column g.
#pragma once
#include "common.cuh"

#ifdef GATEDELTA_EMULATOR

namespace emulator {

struct Operands {
    u32 a[4], b[2];
};

// D += A B, element by element: `at_a` and `at_b` say which lane's register holds the pair of numbers or the number k of a row.
template <class A, class B>
void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int k, A of_a, B of_b) {
    Operands* all = (Operands*)warp_memory(32 * sizeof(Operands));
    memcpy(all[lane()].a, a, sizeof a);
    memcpy(all[lane()].b, b, sizeof b);
    wait_warp();
    const int g = lane() / 4, t = lane() % 4;
    for (int e = 0; e < 4; e++) {
        const int row = g + e / 2 * 8, column = 2 * t + e % 2;
        float sum = d[e];
        for (int i = 0; i < k; i++) sum += of_a(all, row, i) * of_b(all, i, column);
        d[e] = sum;
    }
    wait_warp();
}

// The same for 16-bit numbers.
template <class T>
void mma_16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    auto number = [](u32 word, int i) { return T::number((uint16_t)(word >> 16 * (i & 1))); };
    mma(d, a, b, 16, [=](Operands* all, int row, int k) { return number(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k); },
        [=](Operands* all, int k, int column) { return number(all[column * 4 + k % 8 / 2].b[k / 8], k); });
}

// Number k of row `row` of four matrices, as the lanes point at them.
inline uint16_t matrix_number(const void* const* rows, int matrix, int row, int k) {
    return ((const uint16_t*)rows[8 * matrix + row])[k];
}

template <bool ACROSS>
void load_4(u32 (&x)[4], const void* row) {
    const void** rows = (const void**)warp_memory(32 * sizeof(void*));
    aligned(row, 16);
    rows[lane()] = row;
    wait_warp();
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; i++) {
        auto at = [&](int e) { return (u32)(ACROSS ? matrix_number(rows, i, 2 * t + e, g) : matrix_number(rows, i, g, 2 * t + e)); };
        x[i] = at(0) | at(1) << 16;
    }
    wait_warp();
}

}  // namespace emulator

inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emulator::mma_16<Bf16>(d, a, b); }
inline void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emulator::mma_16<F16>(d, a, b); }
inline void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    using namespace emulator;
    mma(d, a, b, 8, [](Operands* all, int row, int k) { return __uint_as_float(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); },
        [](Operands* all, int k, int column) { return __uint_as_float(all[column * 4 + k % 4].b[k / 4]); });
}
// The nearest number with 10 bits after the point, ties away from zero.
inline u32 to_tf32(float x) {
    const u32 bits = __float_as_uint(x);
    return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}
inline void load_4(u32 (&x)[4], const void* row) { emulator::load_4<false>(x, row); }
inline void load_4_across(u32 (&x)[4], const void* row) { emulator::load_4<true>(x, row); }
// What lane 4 g + t holds of row g, columns 2 t, 2 t + 1 becomes rows 2 t, 2 t + 1 of column g.
inline u32 turn(u32 x) {
    uint16_t* all = (uint16_t*)emulator::warp_memory(32 * sizeof(u32));
    memcpy(all + 2 * emulator::lane(), &x, 4);
    emulator::wait_warp();
    const u32 g = emulator::lane() / 4, t = emulator::lane() % 4;
    const u32 y = (u32)all[8 * (2 * t) + g] | (u32)all[8 * (2 * t + 1) + g] << 16;
    emulator::wait_warp();
    return y;
}
inline void copy_16(void* shared, const void* global, bool valid) { emulator::copy_later(shared, global, 16, valid); }
inline void copy_4(void* shared, const void* global, bool valid) { emulator::copy_later(shared, global, 4, valid); }
inline void copies_end() { emulator::copies_end(); }
template <int N>
void copies_wait() {
    emulator::copies_wait(N);
}

#else

__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The nearest number with 10 bits after the point.
__device__ __forceinline__ u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void load_4(u32 (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}
__device__ __forceinline__ void load_4_across(u32 (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}
// What lane 4 g + t holds of row g, columns 2 t, 2 t + 1 becomes rows 2 t, 2 t + 1 of column g.
__device__ __forceinline__ u32 turn(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// Starts a copy of 16 bytes to shared memory; of zeros where there is nothing to copy.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool valid) {
    const u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// The same of 4 bytes.
__device__ __forceinline__ void copy_4(void* shared, const void* global, bool valid) {
    const u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid ? 4 : 0) : "memory");
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif
