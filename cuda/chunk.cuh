// What the chunked kernels of the operator share: tokens of a chunk, tables, the layout of what they leave for each other.
#pragma once
#include "common.cuh"

constexpr u32 C = 32;  // tokens of a chunk

// Per (chunk, value head) in ws, f32. The first six are always there; all with the gradients.
constexpr u32 WS_A = 0;                 // A [C, C]
constexpr u32 WS_P = C * C;             // P [C, C]
constexpr u32 WS_U = 2 * C * C;         // u [C]
constexpr u32 WS_O = WS_U + C;          // o [C]
constexpr u32 WS_N = WS_U + 2 * C;      // n [C]
constexpr u32 WS_GAMMA = WS_U + 3 * C;  // gamma_C, in [C]
constexpr u32 WS_SHORT = WS_U + 4 * C;
constexpr u32 WS_B = WS_SHORT;          // B [C, C]
constexpr u32 WS_G = WS_B + C * C;      // G [C, C]
constexpr u32 WS_R = WS_G + C * C;      // R [C, C]
constexpr u32 WS_RK = WS_R + C * C;     // rk [C]
constexpr u32 WS_RQ = WS_RK + C;        // rq [C]
constexpr u32 WS_BETA = WS_RK + 2 * C;  // beta [C]
constexpr u32 WS_DC = WS_RK + 3 * C;    // dc [C]
constexpr u32 WS_DBETA = WS_RK + 4 * C; // dbeta [C]
constexpr u32 WS_LONG = WS_RK + 5 * C;
static_assert(WS_SHORT == 2 * C * C + 4 * C && WS_LONG == 5 * C * C + 9 * C, "the contract of gdn_prepare");

// (first token, tokens, sequence, 0), the tokens at most C
__device__ __forceinline__ uint4 chunk_of(const void* chunks, u32 i) {
    uint4 chunk = ((const uint4*)chunks)[i];
    chunk.y = min(chunk.y, C);
    return chunk;
}

// (first chunk, end, slot, 0) of a segment, the end inside a table of `bytes` bytes
__device__ __forceinline__ uint4 segment_of(const void* segments, u32 i, uint64_t bytes) {
    uint4 segment = ((const uint4*)segments)[i];
    segment.y = (u32)min((uint64_t)segment.x + segment.y, bytes / 16);
    return segment;
}

// Numbers that a scan saves per (chunk, value head): S or dS' [K, V], U or X [C, V], N or Z [C, V].
__device__ __forceinline__ size_t saved_numbers(u32 dk, u32 dv) { return (size_t)(dk + 2 * C) * dv; }
