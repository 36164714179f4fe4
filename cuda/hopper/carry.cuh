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
template <int K, bool BACK = false>
__device__ __forceinline__ void carry(const CarryArgs& p) {
    STATIC_SHARED(float, state, K * CARRY_STRIDE);
    const int threads = K * 2, tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, i = lane >> 2, j = lane & 3;
    const Cut cut = p.cuts[blockIdx.x / p.hv];
    const int h = blockIdx.x % p.hv, column = blockIdx.y * CARRY_COLUMNS;
    auto row_of = [&](long long r) { return (r * p.hv + h) * K * p.v + column; };

    const int begin = BACK ? cut.first + cut.count - 1 : cut.first, end = BACK ? cut.first : cut.first + cut.count - 1, step = BACK ? -1 : 1;

    // The states before the first segment, to memory and into `state`.
    for (int n = tid; n < K * CARRY_COLUMNS; n += threads) {
        int row = n / CARRY_COLUMNS, col = n % CARRY_COLUMNS;
        float x = cut.in >= 0 ? p.h0[row_of(cut.in) + row * p.v + col] : 0.f;
        state[row * CARRY_STRIDE + col] = x;
        p.states[row_of(begin) + row * p.v + col] = x;
    }
    bool current = true;  // `state` holds the states before segment s
    for (int s = begin; s != end; s += step) {
        if (p.warm[s * p.hv + h] >= 0) {
            current = false;
            continue;
        }
        float* own = p.states + row_of(s + step);
        if (!current) {
            __syncthreads();
            const float* x = p.states + row_of(s);
            for (int n = tid; n < K * CARRY_COLUMNS; n += threads)
                state[n / CARRY_COLUMNS * CARRY_STRIDE + n % CARRY_COLUMNS] = x[n / CARRY_COLUMNS * p.v + n % CARRY_COLUMNS];
            current = true;
        }
        const float* m = p.transitions + ((long long)(s + 1) * p.hv + h) * K * K + (BACK ? 2 * j * K + 16 * warp + i : (16 * warp + i) * K + 2 * j);
        float acc[4][4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 lo = *(const float2*)(own + (16 * warp + i) * p.v + 8 * n + 2 * j);
            float2 hi = *(const float2*)(own + (16 * warp + i + 8) * p.v + 8 * n + 2 * j);
            acc[n][0] = lo.x, acc[n][1] = lo.y, acc[n][2] = hi.x, acc[n][3] = hi.y;
        }
        float2 lo[K / 8], hi[K / 8];
#pragma unroll
        for (int x = 0; x < K / 8; x++) {
            if constexpr (BACK) {
                const float* at = m + 8 * x * K;
                lo[x] = make_float2(at[0], at[K]), hi[x] = make_float2(at[8], at[K + 8]);
            } else {
                lo[x] = *(const float2*)(m + 8 * x), hi[x] = *(const float2*)(m + 8 * K + 8 * x);
            }
        }
        __syncthreads();
#pragma unroll
        for (int x = 0; x < K / 8; x++) {
            uint32_t a[4] = {tf32(lo[x].x), tf32(hi[x].x), tf32(lo[x].y), tf32(hi[x].y)};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float* b = state + (8 * x + 2 * j) * CARRY_STRIDE + 8 * n + i;
                mma_tf32(acc[n], a, tf32(b[0]), tf32(b[CARRY_STRIDE]));
            }
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int row = 16 * warp + i, col = 8 * n + 2 * j;
            *(float2*)(state + row * CARRY_STRIDE + col) = make_float2(acc[n][0], acc[n][1]);
            *(float2*)(state + (row + 8) * CARRY_STRIDE + col) = make_float2(acc[n][2], acc[n][3]);
            *(float2*)(own + row * p.v + col) = make_float2(acc[n][0], acc[n][1]);
            *(float2*)(own + (row + 8) * p.v + col) = make_float2(acc[n][2], acc[n][3]);
        }
    }
}

}  // namespace hopper
