// What lets segments of one sequence run at the same time: what each head does at each cut, and the states before the segments.
#include "common.cuh"

// One head: a warm-up over as many chunks as it takes to forget, a transition, or the walk goes on. Threads share out the segments;
// where walks go on they read what the others decided.
KERNEL(gdn_cut, gdn_cut, 64) {
    const u32 head = cell_of(l).x, hv = l.p.hv, count = l.p.segments;
    const bool back = l.c.back != 0;
    // ws of any chunk length: see gdn_prepare.
    const size_t c = l.c.chunk, ws_numbers = l.c.grad ? 5 * c * c + 9 * c : 2 * c * c + 4 * c, ws_gamma = 2 * c * c + 3 * c;
    const uint4* segments = (const uint4*)l.m.segments;  // [segments]: first chunk, chunks, slot, slot backward
    uint4* walks = (uint4*)l.m.walks;                    // two of [segments, Hv]
    // Segment i in the order that segments are walked in.
    auto index_of = [&](u32 i) { return back ? count - 1 - i : i; };
    auto slot_of = [&](u32 s) { return back ? segments[s].w : segments[s].z; };
    auto walk_at = [&](u32 s) -> uint4& { return walks[(size_t)s * hv + head]; };
    // Walks end at a sequence's end, and where there is a walk for the state behind the cut.
    auto ends = [&](u32 s) { return slot_of(s) < l.p.sequences || walk_at(s).y > 0; };
    // How many chunks of a segment before the cut it takes to forget, counted from the cut; 0 if there are not enough.
    auto chunks_to_forget = [&](uint4 segment) -> u32 {
        float kept = 1.f;
        for (u32 n = 1; n <= segment.y; n++) {
            const u32 chunk = back ? segment.x + n - 1 : segment.x + segment.y - n;
            const float* gamma = (const float*)l.m.ws + ((size_t)chunk * hv + head) * ws_numbers + ws_gamma;
            if (gamma[1] != 1.f) return 0;
            kept *= gamma[0];
            // NaN is never forgotten.
            if (kept < l.p.forgotten) return n;
        }
        return 0;
    };

    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        const u32 s = index_of(i);
        const uint4 segment = segments[s];
        uint4 walk = make_uint4(0, 0, 0, 0);
        if (slot_of(s) >= l.p.sequences) {
            const u32 after = slot_of(index_of(min(i + 1, count - 1))), n = l.c.exact != 2 ? chunks_to_forget(segment) : 0;
            if (n > 0) walk = make_uint4(back ? segment.x : segment.x + segment.y - n, n, 0, after);
            else if (l.c.exact > 0) walk = make_uint4(segment.x, segment.y, 1, after);
        }
        walk_at(s) = walk;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        const u32 s = index_of(i), slot = slot_of(s);
        uint4 walk = make_uint4(0, 0, 0, 0);
        // A walk begins here unless the one before goes on.
        if (i == 0 || ends(index_of(i - 1))) {
            walk = make_uint4(segments[s].x, segments[s].y, slot, slot);
            u32 last = s;
            for (u32 j = i + 1; j < count && !ends(last); j++) {
                last = index_of(j);
                walk.x = min(walk.x, segments[last].x);
                walk.y += segments[last].y;
                // Into the sequence's slot if that is its end.
                walk.w = slot_of(last) < l.p.sequences ? slot_of(last) : slot;
            }
        }
        walks[l.p.half + (size_t)s * hv + head] = walk;
    }
}

// The states before the segments of one sequence and head, one after the other, for a tile of columns: S <- M S + E.
//
// A thread takes 4 x 4 numbers of the next state at a time; the last state is read where it was left.
KERNEL(gdn_carry, gdn_carry, MOST_THREADS) {
    const uint3 cell = cell_of(l);
    const u32 head = cell.y, hv = l.p.hv, dk = l.c.dk, dv = l.p.dv, quads = l.c.dv_tile / 4;
    const bool back = l.c.back != 0;
    const uint4* walks = (const uint4*)l.m.walks;                          // [segments, Hv]: first chunk, chunks, transition, slot of E
    const uint4 sequence = ((const uint4*)l.m.sequences)[cell.x];          // first segment, segments, 0, 0
    const uint4* segments = (const uint4*)l.m.segments;                    // [segments]: first chunk, chunks, slot, slot backward
    const size_t numbers = (size_t)dk * dv;
    const u32 count = sequence.y, column = cell.z * l.c.dv_tile;
    auto slot_of = [&](u32 s) { return back ? segments[s].w : segments[s].z; };
    auto carried = [&](u32 slot) { return (float*)l.m.carried + ((size_t)slot * hv + head) * numbers + column; };  // [K, V], of the tile

    // The first state goes where the walk of the first segment starts from; a sequence without keeps it.
    const float* state = (const float*)l.m.state + ((size_t)cell.x * hv + head) * numbers + column;
    float* start = carried(count == 0 ? cell.x : slot_of(back ? sequence.x + count - 1 : sequence.x));
    for (u32 e = threadIdx.x; e < dk * quads; e += blockDim.x) {
        const size_t at = (size_t)(e / quads) * dv + 4 * (e % quads);
        *(float4*)(start + at) = *(const float4*)(state + at);
    }
    for (u32 n = 1; n < count; n++) {
        __syncthreads();
        const u32 here = back ? sequence.x + count - n : sequence.x + n - 1, after = back ? here - 1 : here + 1;
        const uint4 walk = walks[(size_t)here * hv + head];
        if (walk.y == 0 || walk.z != 1) continue;
        const float* m = (const float*)l.m.m + ((size_t)walk.w * hv + head) * dk * dk;  // M [K, K]
        const float* before = carried(slot_of(here));
        float* to = carried(slot_of(after));
        for (u32 e = threadIdx.x; e < dk / 4 * quads; e += blockDim.x) {
            const u32 row = 4 * (e / quads), quad = 4 * (e % quads);
            float4 sum[4];  // E[row + r] + sum over j of M[row + r, j] S[j]
#pragma unroll
            for (u32 r = 0; r < 4; r++) sum[r] = *(const float4*)(to + (size_t)(row + r) * dv + quad);
            for (u32 j = 0; j < dk; j++) {
                const float4 s = *(const float4*)(before + (size_t)j * dv + quad);
#pragma unroll
                for (u32 r = 0; r < 4; r++) add(sum[r], back ? m[j * dk + row + r] : m[(row + r) * dk + j], s);
            }
#pragma unroll
            for (u32 r = 0; r < 4; r++) *(float4*)(to + (size_t)(row + r) * dv + quad) = sum[r];
        }
    }
}
