// What the kernels of softmax attention share: the query rows and the keys of a cell.
#pragma once
#include "common.cuh"

// The largest score of no key.
constexpr float NOTHING = -3e38f;
constexpr u32 KT = 32;  // keys of a slice

// Query row r of key head c is head c * group + r % group of token r / group. A cell has the QR rows from row0 on, and the keys of a split
// that any of their tokens sees: places first .. end of the page.
template <u32 QR>
struct Cell {
    const row::attend::Launch& l;
    u32 head, group, row0, rows, first, end, split;

    __device__ __forceinline__ explicit Cell(const row::attend::Launch& launch) : l(launch) {
        const uint3 cell = cell_of(l);
        head = cell.y, split = cell.z, row0 = cell.x * QR;
        group = l.p.heads / l.p.kv_heads, rows = l.p.tokens * group, first = split * l.p.span;
        u32 most = 0;
        for (u32 i = row0 / group; i <= (min(row0 + QR, rows) - 1) / group; i++) most = max(most, seen(i));
        end = min(first + l.p.span, min(most, l.p.page_len));
    }
    // Places of the page that a token sees.
    __device__ __forceinline__ u32 seen(u32 token) const {
        const u32 behind = ((const u32*)l.m.pos)[token] + 1;
        return behind < l.p.page_start ? 0 : behind - l.p.page_start;
    }
    __device__ __forceinline__ bool valid(u32 r) const { return row0 + r < rows; }
    // Where the places end that row r of the cell sees.
    __device__ __forceinline__ u32 end_of(u32 r) const { return min(seen(min((row0 + r) / group, l.p.tokens - 1)), end); }
    // The query of row r, in [T, heads].
    __device__ __forceinline__ size_t query_of(u32 r) const {
        return (size_t)((row0 + r) / group) * l.p.heads + head * group + (row0 + r) % group;
    }
    __device__ __forceinline__ const float* q(u32 r) const { return (const float*)l.m.q + query_of(r) * l.c.dim; }  // [D]
    // m, l, acc [D] of row r
    __device__ __forceinline__ float* part(u32 r) const {
        return (float*)l.m.part + (query_of(r) * l.p.slots + l.p.slot0 + split) * (l.c.dim + 2);
    }
    // A cache [page_len, kv, D] from this head on; its rows are `place_stride` apart.
    template <class Raw>
    __device__ __forceinline__ const Raw* cache(const void* all) const {
        return (const Raw*)all + (size_t)head * l.c.dim;
    }
    __device__ __forceinline__ size_t place_stride() const { return (size_t)l.p.kv_heads * l.c.dim; }
};
