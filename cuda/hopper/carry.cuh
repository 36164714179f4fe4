// Cutting a sequence into segments that run at once. Where the gates forget, the state behind a segment depends on its last
// chunks alone; where they don't, it is affine in the state before it, S <- S_own + M S, with the transition M [K, K].
//
//   warm    per segment and head: how many chunks back the gates' sum falls below the threshold. Nothing grows (|I - beta k k^T|
//           <= 1) while beta |k|^2 <= 2; where a token of the sequence so far exceeds that, all chunks and M are taken.
//   state   (scan.cuh) runs those chunks from zeros: S_own; and, where they are all, from the identity: M
//   carry   walks the segments of a sequence and puts the states before them together, in f32 (products in TF32)
#pragma once
#include "forward.cuh"
#include "prepare.cuh"

namespace hopper {

// A warp per (segment, head). GRAD: the image of the backward, and `back` gets the same counted from the segment's start, for the
// gradient of the state; whether all chunks are taken then depends on the whole sequence, so that it is the same for both.
template <bool GRAD = false>
__device__ __forceinline__ void warm(const CarryArgs& p, int* back = nullptr) {
    int at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (at >= p.segment_count * p.hv) return;
    const Segment seg = p.segments[at / p.hv];
    const int h = at % p.hv, chunks = (seg.tokens + CHUNK - 1) / CHUNK;
    int result = -1, result_back = -1;
    if (GRAD || seg.out >= 0) {
        constexpr int BYTES = GRAD ? GRAD_BYTES : IMAGE_BYTES, VEC = GRAD ? GRAD_VEC : IMAGE_VEC;
        auto vec = [&](int chunk) { return (const float*)(p.images + ((long long)chunk * p.hv + h) * BYTES + VEC); };
        bool grows = false;
        for (int c = seg.origin + lane; c < (GRAD ? seg.end : seg.chunk + chunks); c += 32) {
            float2 x = *(const float2*)(vec(c) + VEC_GROWS);
            grows = grows || x.x != 0.f || x.y != 0.f;
        }
        grows = __any_sync(~0u, grows);
        // Chunks from `from` on, in steps of `step`, until they have forgotten.
        auto count = [&](int from, int step) {
            float total = 0.f;
            int found = -1;
            for (int n = 0; n < chunks && found < 0 && !grows; n += 32) {
                float sum = n + lane < chunks ? vec(from + step * (n + lane))[VEC_TOTAL] : 0.f;
#pragma unroll
                for (int off = 1; off < 32; off *= 2) {
                    float y = __shfl_up_sync(~0u, sum, off);
                    if (lane >= off) sum += y;
                }
                uint32_t below = __ballot_sync(~0u, total + sum < p.threshold * LOG2E);
                if (below) found = min(n + __ffs(below), chunks);
                total += __shfl_sync(~0u, sum, 31);
            }
            return found;
        };
        result = count(seg.chunk + chunks - 1, -1);
        if constexpr (GRAD) {
            result_back = count(seg.chunk, 1);
            // Summed in another order, one may reach the threshold and the other not.
            if (result < 0 || result_back < 0) result = result_back = -1;
        }
    }
    if (lane == 0) {
        p.warm[at] = result;
        if constexpr (GRAD) back[at] = result_back;
    }
}

constexpr int CARRY_COLUMNS = 32;  // of V per block
constexpr int CARRY_STRIDE = 36;   // of the state in shared memory: 4 mod 32, rows 2j and columns i hit all banks

// Grid: (cuts x Hv) x V / 32; K / 16 warps, warp w owns rows 16 w of the state. BACK: gradients of states behind the segments, from the last
// to the first, by transposed transitions: h0 is dht, states those gradients.
//
// Segments whose heads have forgotten have their states already; only the others are walked. The chain from one to the next is the product
// alone: the next one's transition and own state come while a product runs.
template <int K, bool BACK = false>
__device__ __forceinline__ void carry(const CarryArgs& p) {
    STATIC_SHARED(float, state, K * CARRY_STRIDE);
    const int threads = K * 2, tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, i = lane >> 2, j = lane & 3;
    const Cut cut = p.cuts[blockIdx.x / p.hv];
    const int h = blockIdx.x % p.hv, column = blockIdx.y * CARRY_COLUMNS;
    auto row_of = [&](long long r) { return (r * p.hv + h) * K * p.v + column; };
    const int row = 16 * warp + i;

    // Segments by their number in the order in which they are walked: the state before `at(n)` goes over it to that before `at(n + 1)`.
    auto at = [&](int n) { return BACK ? cut.first + cut.count - 1 - n : cut.first + n; };
    const int count = cut.count - 1;

    // The next segment from n on that has not forgotten; `count` if there is none. All warps know which of 32 at a time.
    uint32_t joined = 0;
    int known = 0;
    auto next = [&](int n) {
        for (; n < count; n++) {
            if (n >= known) {
                joined = __ballot_sync(~0u, known + lane < count && p.warm[at(known + lane) * p.hv + h] < 0);
                known += 32;
            }
            if (joined >> (n & 31) & 1) return n;
        }
        return count;
    };
    // M of a segment and the state that it leaves from zeros: rows `row` and `row + 8`, as the product takes and gives them.
    struct Step {
        float2 lo[K / 8], hi[K / 8];
        float own[4][4];
    };
    auto load = [&](Step& x, int n) {
        const float* m = p.transitions + ((long long)(at(n) + 1) * p.hv + h) * K * K + (BACK ? 2 * j * K + row : row * K + 2 * j);
#pragma unroll
        for (int y = 0; y < K / 8; y++) {
            if constexpr (BACK) {
                const float* from = m + 8 * y * K;
                x.lo[y] = make_float2(from[0], from[K]), x.hi[y] = make_float2(from[8], from[K + 8]);
            } else {
                x.lo[y] = *(const float2*)(m + 8 * y), x.hi[y] = *(const float2*)(m + 8 * K + 8 * y);
            }
        }
        const float* own = p.states + row_of(at(n + 1));
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float2 lo = *(const float2*)(own + row * p.v + 8 * c + 2 * j), hi = *(const float2*)(own + (row + 8) * p.v + 8 * c + 2 * j);
            x.own[c][0] = lo.x, x.own[c][1] = lo.y, x.own[c][2] = hi.x, x.own[c][3] = hi.y;
        }
    };
    // The state before segment n, from memory into `state`.
    auto fetch = [&](const float* x) {
        for (int y = tid; y < K * CARRY_COLUMNS; y += threads)
            state[y / CARRY_COLUMNS * CARRY_STRIDE + y % CARRY_COLUMNS] = x == nullptr ? 0.f : x[y / CARRY_COLUMNS * p.v + y % CARRY_COLUMNS];
    };

    Step step;
    int n = next(0);
    if (n < count) load(step, n);
    // The state before the first segment: to memory too.
    fetch(cut.in >= 0 ? p.h0 + row_of(cut.in) : nullptr);
    float* begin = p.states + row_of(at(0));
    for (int y = tid; y < K * CARRY_COLUMNS; y += threads)
        begin[y / CARRY_COLUMNS * p.v + y % CARRY_COLUMNS] = state[y / CARRY_COLUMNS * CARRY_STRIDE + y % CARRY_COLUMNS];
    int current = 0;  // the segment before which `state` is
    while (n < count) {
        if (current != n) {
            __syncthreads();
            fetch(p.states + row_of(at(n)));
        }
        const int after = next(n + 1);
        Step coming;
        if (after < count) load(coming, after);
        __syncthreads();
#pragma unroll
        for (int x = 0; x < K / 8; x++) {
            const uint32_t a[4] = {tf32(step.lo[x].x), tf32(step.hi[x].x), tf32(step.lo[x].y), tf32(step.hi[x].y)};
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const float* b = state + (8 * x + 2 * j) * CARRY_STRIDE + 8 * c + i;
                mma_tf32(step.own[c], a, tf32(b[0]), tf32(b[CARRY_STRIDE]));
            }
        }
        __syncthreads();
        float* own = p.states + row_of(at(n + 1));
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int col = 8 * c + 2 * j;
            const float2 lo = make_float2(step.own[c][0], step.own[c][1]), hi = make_float2(step.own[c][2], step.own[c][3]);
            *(float2*)(state + row * CARRY_STRIDE + col) = lo, *(float2*)(state + (row + 8) * CARRY_STRIDE + col) = hi;
            *(float2*)(own + row * p.v + col) = lo, *(float2*)(own + (row + 8) * p.v + col) = hi;
        }
        current = n + 1;
        if (after < count) step = coming;
        n = after;
    }
}

}  // namespace hopper
