// The tables of these kernels from those of the rows of the kernel table, whose chunks have 32 tokens.
//
// A block takes a sequence: its chunks of 64 tokens go to the first places of those that its chunks of 32 have, the others are empty.
// Its segments follow those of the sequences before; places behind the last sequence's are empty. Whole sequences have their places by length,
// longest first: blocks start in that order, and what starts last is short.
#pragma once
#include "forward.cuh"

namespace hopper {

struct TablesArgs {
    const uint4* chunks;     // first token, tokens, sequence, 0: chunks of at most 32 tokens, all but the last of a sequence full
    const uint4* sequences;  // first chunk, chunks, row of the states, 0
    Chunk* to_chunks;
    Segment* to_segments;  // [places], for `scan`
    Segment* to_ordered;   // [places], for `state`: each leaves its state where the next one starts; null: sequences stay whole
    Cut* to_cuts;          // [sequences]
    Segment* to_back;      // [places], for `reverse`: the first of a sequence leaves the gradient of its state; null: none
    int cut;               // chunks of 64 in a segment
    int places;
};

// So many sequences at most are put in order: each looks at all the others.
constexpr int IN_ORDER = 1024;

// Chunks of 64 of a sequence that has so many of 32, and its segments.
__device__ __forceinline__ int chunks_of(uint32_t count) { return (int)((count + 1) / 2); }
__device__ __forceinline__ int segments_of(const TablesArgs& p, uint32_t count) {
    return p.to_ordered == nullptr ? 1 : max(1, (chunks_of(count) + p.cut - 1) / p.cut);
}

// 128 threads.
__device__ __forceinline__ void tables(const TablesArgs& p) {
    STATIC_SHARED(int, sums, 4);
    const int at = blockIdx.x, tid = threadIdx.x;
    const uint4 sequence = p.sequences[at];
    const uint32_t first = sequence.x, count = sequence.y;
    const int row = (int)sequence.z, chunks = chunks_of(count);
    for (uint32_t i = tid; i < count; i += blockDim.x) {
        Chunk chunk = {0, 0};
        if ((int)i < chunks) {
            const uint4 one = p.chunks[first + 2 * i];
            const uint32_t other = 2 * i + 1 < count ? p.chunks[first + 2 * i + 1].y : 0;
            chunk = {(int)one.x, (int)(one.y + other)};
        }
        p.to_chunks[first + i] = chunk;
    }

    int before = at;
    const bool whole = p.to_ordered == nullptr;
    if (!whole || gridDim.x <= IN_ORDER) {
        int sum = 0;
        for (int n = tid; n < (whole ? (int)gridDim.x : at); n += blockDim.x) {
            const uint32_t other = p.sequences[n].y;
            sum += whole ? other > count || (other == count && n < at) : segments_of(p, other);
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (tid % 32 == 0) sums[tid / 32] = sum;
        __syncthreads();
        before = sums[0] + sums[1] + sums[2] + sums[3];
    }
    const int segments = segments_of(p, count);
    const uint4 begin = p.chunks[first], end = p.chunks[first + (count > 0 ? count - 1 : 0)];
    const int token = count > 0 ? (int)begin.x : 0, tokens = count > 0 ? (int)(end.x + end.y - begin.x) : 0;
    for (int m = tid; m < segments; m += blockDim.x) {
        const int place = before + m, skip = m * p.cut * CHUNK;
        const bool last = m + 1 == segments;
        const int length = last ? tokens - skip : p.cut * CHUNK;
        Segment segment = {token + skip, length, (int)first + m * p.cut, whole ? row : place, last ? row : -1, (int)first, (int)first + chunks, 0};
        p.to_segments[place] = segment;
        if (p.to_back != nullptr) {
            segment.out = m == 0 ? row : -1;
            p.to_back[place] = segment;
        }
        if (!whole) {
            segment.out = last ? -1 : place + 1;
            p.to_ordered[place] = segment;
        }
    }
    if (whole) return;
    if (tid == 0) p.to_cuts[at] = {before, segments, row, 0};
    if (at + 1 == (int)gridDim.x)
        for (int place = before + segments + tid; place < p.places; place += blockDim.x) {
            const Segment none = {0, 0, 0, -1, -1, 0, 0, 0};
            p.to_segments[place] = p.to_ordered[place] = none;
            if (p.to_back != nullptr) p.to_back[place] = none;
        }
}

}  // namespace hopper
