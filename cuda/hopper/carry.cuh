// Cutting a sequence into segments that run at once. Where the gates forget, the state behind a segment depends on its last
// chunks alone; where they don't, it is affine in the state before it, S <- S_own + M S, with the transition M [K, K].
//
//   warm    per segment and head: how many chunks back the gates' sum falls below the threshold. Nothing grows (|I - beta k k^T|
//           <= 1) while beta |k|^2 <= 2; where a token of the sequence so far exceeds that, all chunks and M are taken.
//   state   (scan.cuh) runs those chunks from zeros: S_own; and, where they are all, from the identity: M, rounded to TF32
//   carry   walks the segments of a sequence and puts the states before them together, in f32 (products in TF32)
#pragma once
#include "forward.cuh"
#include "prepare.cuh"

namespace hopper {

// A block of 128 threads per (segment, head). GRAD: the image of the backward, and `back` gets the same counted from the segment's start, for the
// gradient of the state; whether all chunks are taken then depends on the whole sequence, so that it is the same for both.
template <bool GRAD = false>
__device__ __forceinline__ void warm(const CarryArgs& p, int* back = nullptr) {
    const int at = blockIdx.x, lane = threadIdx.x % 32;
    const Segment seg = p.segments[at / p.hv];
    const int h = at % p.hv, chunks = (seg.tokens + CHUNK - 1) / CHUNK;
    int result = -1, result_back = -1;
    if (GRAD || seg.out >= 0) {
        constexpr int BYTES = GRAD ? GRAD_BYTES : IMAGE_BYTES, VEC = GRAD ? GRAD_VEC : IMAGE_VEC;
        auto vec = [&](int chunk) { return (const float*)(p.images + ((long long)chunk * p.hv + h) * BYTES + VEC); };
        bool grows = false;
        for (int c = seg.origin + threadIdx.x; c < (GRAD ? seg.end : seg.chunk + chunks); c += blockDim.x) {
            float2 x = *(const float2*)(vec(c) + VEC_GROWS);
            grows = grows || x.x != 0.f || x.y != 0.f;
        }
        grows = __syncthreads_or(grows) != 0;
        if (threadIdx.x >= 32) return;
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
    if (threadIdx.x == 0) {
        p.warm[at] = result;
        if constexpr (GRAD) back[at] = result_back;
    }
}

constexpr int CARRY_COLUMNS = 16;  // of V per block
constexpr int CARRY_TILES = CARRY_COLUMNS / 8;
constexpr int carry_threads(int k) { return k; }

// Shared memory, in f32.
//   stage s   the transition over a segment, [K, K + 4], from when it is asked for until it has been multiplied: three, so that the next two are
//             on their way meanwhile. Rows are padded so that a product's operands hit all banks: rows i and columns j and j + 4, or BACK,
//             columns i and rows 2j and 2j + 1, which are then the product's
//   state     before the segment, rounded to TF32, the rows that a lane multiplies at once side by side: k and k + 4 of 8, or BACK, 2k and 2k + 1
template <int K>
struct CarrySmem {
    static constexpr int STAGES = 3;
    static constexpr int STRIDE = transition_stride(K);
    static constexpr int STAGE = K * STRIDE;
    static constexpr int STATE_STRIDE = 2 * CARRY_COLUMNS + 8;
    static constexpr int STATE = STAGES * STAGE;
    static constexpr int BARRIERS = STATE + K / 2 * STATE_STRIDE;
    static constexpr int BYTES = BARRIERS * 4 + 64;
    static_assert(BYTES <= 232448, "shared memory of a block");
};

// Grid: (cuts x Hv) x V / CARRY_COLUMNS; K / 32 warps, each of which owns 32 rows of the state. On an H200, a segment: 2.5 us with 16 rows a warp, as
// shared memory is read twice as often; 1.75 with [32, 32]; 1.05 with [32, 16] and twice the blocks, of which there are few; no less with 8 columns.
// BACK: gradients of states behind the segments, from the last to the first, by transposed transitions: h0 is dht, states those gradients.
//
// Segments whose heads have forgotten have their states already; only the others are walked. The chain from one to the next is the product
// alone.
template <int K, bool BACK = false>
__device__ __forceinline__ void carry(const CarryArgs& p) {
    DYNAMIC_SHARED(smem_raw);
    using M = CarrySmem<K>;
    float *smem = (float*)smem_raw, *state = smem + M::STATE;
    const uint32_t base = smem_addr(smem_raw), full = base + M::BARRIERS * 4;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, i = lane >> 2, j = lane & 3;
    const Cut cut = p.cuts[blockIdx.x / p.hv];
    const int h = blockIdx.x % p.hv, column = blockIdx.y * CARRY_COLUMNS;
    auto row_of = [&](long long r) { return (r * p.hv + h) * K * p.v + column; };

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

    // The transition over a segment, into a stage that everybody has read.
    auto ask = [&](uint32_t stage, int n) {
        if (tid != 0 || n >= count) return;
        mbar_expect(full + 8 * stage, M::STAGE * 4);
        bulk_load(base + stage * M::STAGE * 4, p.transitions + ((long long)(at(n) + 1) * p.hv + h) * M::STAGE, M::STAGE * 4, full + 8 * stage);
    };
    if (tid == 0) {
        for (int s = 0; s < M::STAGES; s++) mbar_init(full + 8 * s, 1);
        mbar_init_fence();
    }
    __syncthreads();

    // The thread's share of the state: rows `row`, + 8, + 16, + 24, columns 8 c + 2j and + 1.
    const int row = warp * 32 + i;
    const long long step = (long long)p.hv * K * p.v * (BACK ? -1 : 1);  // from a segment's state to the next one's
    float* const own = p.states + row_of(at(0)) + (long long)row * p.v + 2 * j;
    float* const put = state + (warp * 16 + (BACK ? i / 2 : i % 4)) * M::STATE_STRIDE + 4 * j + (BACK ? i % 2 : i / 4);
    // The nearest TF32 number. Two instructions would do it, an addition and a mask, but for numbers that are none: they would become zeros.
    auto rounded = [](float x) { return __uint_as_float(tf32(x)); };
    // A state of memory, as products give it, and to shared memory: x[m][c], of rows 16 m on.
    auto load = [&](float (&x)[2][CARRY_TILES][4], const float* from) {
#pragma unroll
        for (int m = 0; m < 2; m++, from += 16 * p.v)
#pragma unroll
            for (int c = 0; c < CARRY_TILES; c++) {
                const float2 lo = *(const float2*)(from + 8 * c), hi = *(const float2*)(from + 8 * p.v + 8 * c);
                x[m][c][0] = lo.x, x[m][c][1] = lo.y, x[m][c][2] = hi.x, x[m][c][3] = hi.y;
            }
    };
    auto store = [&](const float (&x)[2][CARRY_TILES][4], float* to) {
#pragma unroll
        for (int m = 0; m < 2; m++, to += 16 * p.v)
#pragma unroll
            for (int c = 0; c < CARRY_TILES; c++) {
                *(float2*)(to + 8 * c) = make_float2(x[m][c][0], x[m][c][1]);
                *(float2*)(to + 8 * p.v + 8 * c) = make_float2(x[m][c][2], x[m][c][3]);
            }
    };
    auto share = [&](const float (&x)[2][CARRY_TILES][4]) {
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int c = 0; c < CARRY_TILES; c++)
#pragma unroll
                for (int e = 0; e < 4; e++) put[(2 * m + e / 2) * 4 * M::STATE_STRIDE + 2 * (8 * c + e % 2)] = rounded(x[m][c][e]);
    };

    float sum[2][CARRY_TILES][4], before[2][CARRY_TILES][4] = {};
    int n = next(0), after = next(n + 1);
    uint32_t stage = 0, phase = 0;
    ask(0, n), ask(1, after);
    if (n < count) load(sum, own + (n + 1) * step);
    // The state before the first segment: to memory too.
    if (cut.in >= 0) load(before, p.h0 + row_of(cut.in) + (long long)row * p.v + 2 * j);
    store(before, own);
    share(before);
    int current = 0;  // the segment before which `state` is
    while (n < count) {
        if (current != n) {
            // Written by `state`, and by nobody here.
            load(before, own + n * step);
            share(before);
        }
        const int last = next(after + 1);
        if (after < count) load(before, own + (after + 1) * step);
        __syncthreads();
        ask(stage == 0 ? 2 : stage - 1, last);
        mbar_wait(full + 8 * stage, phase, nullptr, 0);
        const float* m = smem + stage * M::STAGE + (BACK ? 2 * j * M::STRIDE + row : row * M::STRIDE + j);
        const float* right = state + j * M::STATE_STRIDE + 2 * i;
#pragma unroll
        for (int x = 0; x < K / 8; x++) {
            uint32_t a[2][4];
#pragma unroll
            for (int y = 0; y < 2; y++) {
                const float* from = BACK ? m + 8 * x * M::STRIDE + 16 * y : m + 8 * x + 16 * y * M::STRIDE;
                constexpr int COLUMN = BACK ? M::STRIDE : 4, ROW = BACK ? 8 : 8 * M::STRIDE;
                a[y][0] = __float_as_uint(from[0]), a[y][1] = __float_as_uint(from[ROW]);
                a[y][2] = __float_as_uint(from[COLUMN]), a[y][3] = __float_as_uint(from[ROW + COLUMN]);
            }
#pragma unroll
            for (int c = 0; c < CARRY_TILES; c++) {
                const float2 b = *(const float2*)(right + 4 * x * M::STATE_STRIDE + 16 * c);
#pragma unroll
                for (int y = 0; y < 2; y++) mma_tf32(sum[y][c], a[y], __float_as_uint(b.x), __float_as_uint(b.y));
            }
        }
        __syncthreads();
        share(sum);
        store(sum, own + (n + 1) * step);
#pragma unroll
        for (int y = 0; y < 2; y++)
#pragma unroll
            for (int c = 0; c < CARRY_TILES; c++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[y][c][e] = before[y][c][e];
        current = n + 1, n = after, after = last;
        if (++stage == M::STAGES) stage = 0, phase ^= 1;
    }
}

}  // namespace hopper
