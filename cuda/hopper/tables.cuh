// The tables of these kernels from those of the rows of the kernel table, whose chunks have 32 tokens.
//
// A block takes a sequence. Chunks of 64 tokens follow those of the sequences before; there are half as many as of 32, and the places that are
// left over are empty, behind all others. Segments are put by length, longest first: blocks start in that order, and what starts last is
// short. In the table of what goes before the scans they follow those of the sequences before, as the states do.
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

// Of a sequence that has so many chunks of 32: chunks of 64; segments of full length, chunks behind them, and how many segments that makes.
struct Lengths {
    int chunks, full, tail, segments;
    __device__ __forceinline__ Lengths(const TablesArgs& p, uint32_t count) {
        chunks = (int)((count + 1) / 2);
        const bool whole = p.to_ordered == nullptr;
        full = whole ? 0 : chunks / p.cut, tail = whole ? chunks : chunks % p.cut;
        segments = full + (has_tail() ? 1 : 0);
    }
    __device__ __forceinline__ bool has_tail() const { return tail > 0 || full == 0; }
};

// 128 threads.
__device__ __forceinline__ void tables(const TablesArgs& p) {
    STATIC_SHARED(int, sums, 4 * 6);
    const int at = blockIdx.x, sequences = gridDim.x, tid = threadIdx.x;
    const uint4 sequence = p.sequences[at];
    const uint32_t first = sequence.x, count = sequence.y;
    const int row = (int)sequence.z;
    const bool whole = p.to_ordered == nullptr, in_order = sequences <= IN_ORDER;
    const Lengths own(p, count);

    // Of the sequences before: chunks, places that are left over, segments, those of full length. Of all: those, and the tails that are longer, or
    // as long and before.
    enum { CHUNKS, EMPTY, SEGMENTS, FULL, ALL_FULL, LONGER };
    int sum[6] = {};
    for (int n = tid; n < (in_order ? sequences : at); n += blockDim.x) {
        const uint32_t other_count = p.sequences[n].y;
        const Lengths other(p, other_count);
        if (n < at) sum[CHUNKS] += other.chunks, sum[EMPTY] += (int)other_count - other.chunks, sum[SEGMENTS] += other.segments, sum[FULL] += other.full;
        sum[ALL_FULL] += other.full;
        sum[LONGER] += other.has_tail() && (other.tail > own.tail || (other.tail == own.tail && n < at));
    }
#pragma unroll
    for (int n = 0; n < 6; n++) {
#pragma unroll
        for (int step = 1; step < 32; step *= 2) sum[n] += __shfl_xor_sync(~0u, sum[n], step);
        if (tid % 32 == 0) sums[tid / 32 * 6 + n] = sum[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 6; n++) sum[n] = sums[n] + sums[6 + n] + sums[12 + n] + sums[18 + n];

    for (int i = tid; i < own.chunks; i += blockDim.x) {
        const uint4 one = p.chunks[first + 2 * i];
        const uint32_t other = 2 * i + 1 < (int)count ? p.chunks[first + 2 * i + 1].y : 0;
        p.to_chunks[sum[CHUNKS] + i] = {(int)one.x, (int)(one.y + other)};
    }
    const uint4 last_sequence = p.sequences[sequences - 1];
    const int end_place = (int)(last_sequence.x + last_sequence.y) - sum[EMPTY];
    for (int i = tid; i < (int)count - own.chunks; i += blockDim.x) p.to_chunks[end_place - 1 - i] = {0, 0};

    const uint4 begin = p.chunks[first], end = p.chunks[first + (count > 0 ? count - 1 : 0)];
    const int token = count > 0 ? (int)begin.x : 0, tokens = count > 0 ? (int)(end.x + end.y - begin.x) : 0;
    for (int m = tid; m < own.segments; m += blockDim.x) {
        const int place = sum[SEGMENTS] + m, skip = m * p.cut * CHUNK;
        const int to = !in_order ? place : m < own.full ? sum[FULL] + m : sum[ALL_FULL] + sum[LONGER];
        const bool last = m + 1 == own.segments;
        const int length = last ? tokens - skip : p.cut * CHUNK;
        Segment segment = {token + skip, length, sum[CHUNKS] + m * p.cut, whole ? row : place, last ? row : -1, sum[CHUNKS], sum[CHUNKS] + own.chunks, 0};
        p.to_segments[to] = segment;
        if (p.to_back != nullptr) {
            segment.out = m == 0 ? row : -1;
            p.to_back[to] = segment;
        }
        if (!whole) {
            segment.out = last ? -1 : place + 1;
            p.to_ordered[place] = segment;
        }
    }
    if (whole) return;
    if (tid == 0) p.to_cuts[at] = {sum[SEGMENTS], own.segments, row, 0};
    if (at + 1 == sequences)
        for (int place = sum[SEGMENTS] + own.segments + tid; place < p.places; place += blockDim.x) {
            const Segment none = {0, 0, 0, -1, -1, 0, 0, 0};
            p.to_segments[place] = p.to_ordered[place] = none;
            if (p.to_back != nullptr) p.to_back[place] = none;
        }
}

}  // namespace hopper
