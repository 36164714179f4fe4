// The tables of these kernels from those of the rows of the kernel table, whose chunks have 32 tokens.
//
// A block takes a segment: its chunks of 64 tokens go to the first places of those that its chunks of 32 have, the others are empty.
#pragma once
#include "forward.cuh"

namespace hopper {

struct TablesArgs {
    const uint4* chunks;    // first token, tokens, sequence, 0: chunks of at most 32 tokens, all but the last of a sequence full
    const uint4* segments;  // first chunk, chunks, row of the states, 0
    Chunk* to_chunks;
    Segment* to_segments;
};

__device__ __forceinline__ void tables(const TablesArgs& p) {
    const uint4 segment = p.segments[blockIdx.x];
    const uint32_t first = segment.x, count = segment.y;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        Chunk chunk = {0, 0};
        if (2 * i < count) {
            const uint4 one = p.chunks[first + 2 * i];
            const uint32_t other = 2 * i + 1 < count ? p.chunks[first + 2 * i + 1].y : 0;
            chunk = {(int)one.x, (int)(one.y + other)};
        }
        p.to_chunks[first + i] = chunk;
    }
    if (threadIdx.x == 0) {
        const uint4 begin = p.chunks[first], end = p.chunks[first + (count > 0 ? count - 1 : 0)];
        const int tokens = count > 0 ? (int)(end.x + end.y - begin.x) : 0, row = (int)segment.z;
        p.to_segments[blockIdx.x] = {count > 0 ? (int)begin.x : 0, tokens, (int)first, row, row, (int)first, {}};
    }
}

}  // namespace hopper
