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
constexpr u32 WS_GAMMA = WS_U + 3 * C;  // gamma_C, then 1 if no token makes a state longer, in [C]
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

// What a scan walks: chunks from a first one on, from the state in a slot, which it leaves in another.
struct Walk {
    u32 first, end, slot, to;
    bool taken;
};

// The walk of a segment and head by the table of segments (kind 0: first chunk, chunks, slot, _) or by one of walks, [segments, Hv]:
// kind 1: first chunk, chunks, slot, slot to leave the state in; 2 and 3: first chunk, chunks, transition, slot to leave it in. With 3
// only those with a transition are taken. The end is inside a table of chunks of `bytes` bytes.
__device__ __forceinline__ Walk walk_of(u32 kind, const void* table, u32 segment, u32 head, u32 hv, uint64_t bytes) {
    const uint4 row = ((const uint4*)table)[kind > 0 ? (size_t)segment * hv + head : segment];
    const u32 chunks = kind == 3 && row.z != 1 ? 0 : row.y;
    const u32 end = (u32)min((uint64_t)row.x + chunks, bytes / 16);
    return {row.x, end, row.z, kind == 0 ? row.z : row.w, chunks > 0};
}

// Numbers that a scan saves per (chunk, value head): S or dS' [K, V], U or X [C, V], N or Z [C, V].
__device__ __forceinline__ size_t saved_numbers(u32 dk, u32 dv) { return (size_t)(dk + 2 * C) * dv; }
