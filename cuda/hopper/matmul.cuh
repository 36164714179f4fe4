// `matmul`: y [m, n] (+)= x [m, k] w^T for f32 x and bf16 w [n, k], many rows of x (sm_90a).
//
//   x = x0 + x1 + x2 + r,  x0 = bf16(x), x1 = bf16(x - x0), x2 = bf16(x - x0 - x1), |r| <= 2^-25 |x|
//   y = sum over slices of 64 of k of ( x2 w^T + x1 w^T + x0 w^T )
//
// w is exact in bf16 and so is each product of a part with it in the units; their sums are not: they truncate, each time towards zero. So they
// are taken for one slice alone, 12 additions a number, and added to sums in f32 that round. PARTS = 2 leaves x2 out: |r| <= 2^-18 |x|.
//
// Roles. Warpgroups 0 and 1 are consumers, warpgroup 2 serves them: one lane of its warp 0 issues all loads. A block walks tiles of y,
// `gridDim.x` apart; loads run ahead over the border between tiles.
//   large  tile [128, 128], each consumer has 64 of its rows and all of k
//   small  tile [64, 64], each consumer has the whole tile and one half of each slice of k (32 numbers); they exchange halves of their sums at the end
//          (so that few rows or few columns make blocks enough for the device)
//
// x is the left operand and comes from registers: a thread reads its pairs from shared memory as f32 and splits them there, one step of 16 of k
// ahead of the products, which run meanwhile. The copy engine's swizzle moves 16-byte units by the row's lowest three bits, and
// 16 lanes read pairs of 4 rows at once. With rows 0, 1, 2, 3 of a fragment in rows 0, 2, 4, 6 of the tile these are 128 different bytes; with
// rows in their order every two of them would be in the same banks. Rows of y are stored where they belong, so nothing else sees that order.
//
// Barriers: full[s] (the producer's bytes), empty[s] (a lane of each consumer warp). Named, small alone: 1, both consumers, when sums
// to be exchanged are in shared memory, and when they have been read.
#pragma once
#include "roles.cuh"
#include "types.cuh"

namespace hopper {

struct MatmulArgs {
    float* y;            // [m, y_stride]; rows of n numbers are written
    long long y_stride;  // numbers
    uint32_t m, n, k;
    uint32_t add;        // 1: y += x w^T
    uint32_t* hung;      // or null: see mbar_wait
};

// Rows of x in boxes of [tile's rows, 32] f32, rows of w in boxes of [tile's columns, 64]; behind m, n and k they are read as zeros.
struct MatmulMaps {
    CUtensorMap x, w;
};

constexpr int SLICE = 64;          // numbers of k in a stage
constexpr uint32_t TILES_DOWN = 8; // tiles one below the other that blocks take before those to the right: 132 blocks at once have 8 x 17 tiles, so
                                   // that L2 serves each slice of x 17 times and each of w 8 times

// Shared memory, in bytes from a base on 1024.
//   stage s   x [ROWS, 64] as two panels [ROWS, 32] of f32, w [COLUMNS, 64] as one panel of bf16; rows of 128 bytes, swizzled. From the producer's
//             loads (empty[s] taken) until both consumers arrived on empty[s], when the last product of that slice is complete
//   exchange  small: of each consumer the half of its sums that is the other's to store, [16 numbers, 128 threads] f32: from its stores behind one
//             barrier 1 until the next barrier 1 but one
template <bool SMALL>
struct MatmulSmem {
    static constexpr int ROWS = SMALL ? 64 : 128, COLUMNS = SMALL ? 64 : 128, STAGES = SMALL ? 8 : 4;
    static constexpr int PANEL_X = ROWS * 128;
    static constexpr int W = 2 * PANEL_X;
    static constexpr int STAGE = W + COLUMNS * 128;
    static constexpr int EXCHANGE = STAGES * STAGE;
    static constexpr int BARRIERS = EXCHANGE + (SMALL ? 2 * 16 * WARPGROUP * 4 : 0);
    static constexpr int BYTES = BARRIERS + 128 + 1024;
};

enum : uint32_t { HUNG_MATMUL_PRODUCER = 0x500, HUNG_MATMUL_CONSUMER = 0x600 };

// First row and column of tile `t` of y.
template <class M>
__device__ __forceinline__ void matmul_tile(const MatmulArgs& p, uint32_t t, int& row, int& column) {
    const uint32_t down = (p.m + M::ROWS - 1) / M::ROWS, across = (p.n + M::COLUMNS - 1) / M::COLUMNS;
    const uint32_t band = t / (TILES_DOWN * across), in_band = t % (TILES_DOWN * across), high = min(TILES_DOWN, down - band * TILES_DOWN);
    row = (int)((band * TILES_DOWN + in_band % high) * M::ROWS);
    column = (int)(in_band / high * M::COLUMNS);
}

template <bool SMALL, int PARTS>
__device__ __forceinline__ void matmul(const MatmulArgs& p, const MatmulMaps& maps) {
    DYNAMIC_SHARED(smem_raw);
    using M = MatmulSmem<SMALL>;
    constexpr int STAGES = M::STAGES, SUMS = M::COLUMNS / 2;
    const int warpgroup = uniform(threadIdx.x / WARPGROUP), tid = threadIdx.x % WARPGROUP, warp = tid >> 5, lane = tid & 31;
    const uint32_t base = smem_addr(align_1024(smem_raw)), full = base + M::BARRIERS, empty = full + STAGES * 8;
    const uint32_t tiles = ((p.m + M::ROWS - 1) / M::ROWS) * ((p.n + M::COLUMNS - 1) / M::COLUMNS);
    const int slices = (int)((p.k + SLICE - 1) / SLICE);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, 2 * 4 * WARP_ARRIVALS);
        }
        mbar_init_fence();
    }
    __syncthreads();

    if (warpgroup == 2) {
        regs_down<Registers<64>::SERVER>();
        if (warp != 0) return;
        if (elect()) {
            tma_prefetch(&maps.x);
            tma_prefetch(&maps.w);
        }
        int s = 0;
        uint32_t phase = 0;
        for (uint32_t t = blockIdx.x; t < tiles; t += gridDim.x) {
            int row, column;
            matmul_tile<M>(p, t, row, column);
            for (int n = 0; n < slices; n++) {
                const uint32_t to = base + s * M::STAGE, bar = full + 8 * s;
                mbar_wait(empty + 8 * s, phase ^ 1, p.hung, HUNG_MATMUL_PRODUCER + s);
                if (elect()) {
                    mbar_expect(bar, M::STAGE);
                    tma_load(to + M::W, &maps.w, n * SLICE, column, bar);
                    tma_load(to, &maps.x, n * SLICE, row, bar);
                    tma_load(to + M::PANEL_X, &maps.x, n * SLICE + 32, row, bar);
                }
                __syncwarp();
                if (++s == STAGES) s = 0, phase ^= 1;
            }
        }
        return;
    }

    regs_up<Registers<64>::CONSUMER>();
    // Lane 4 i + j has rows i and i + 8 of its warp's 16 in a fragment, which lie in rows `own` and `own` + 8 of the tile's 16, and of a step of 16
    // of k the pairs at 2 j and 2 j + 8.
    const int i = lane >> 2, j = lane & 3, own = 2 * (i & 3) + (i >> 2);
    const int first = (SMALL ? 0 : 64 * warpgroup) + 16 * warp + own;  // the thread's first row in the tile
    // Where its first pair is in a panel of x. Unit (j >> 1) ^ own: half a step on flips bit 1 of the unit, a step on bit 2, 8 rows on adds 1024.
    const uint32_t pair = first * 128 + (((j >> 1) ^ own) << 4) + (j & 1) * 8 + (SMALL ? warpgroup * M::PANEL_X : 0);
    const uint32_t code = HUNG_MATMUL_CONSUMER + 16 * warpgroup;
    constexpr int STEPS = SMALL ? 2 : 4;  // of 16 of k in the consumer's share of a slice

    // sum, d [64, COLUMNS]: 4 b + e is row `first` (+ 8 for e >= 2), column 8 b + 2 j + e % 2.
    float sum[SUMS], d[SUMS];
    // Parts of x [64, 16], the largest first; a step's, and the next one's.
    uint32_t part[2][4 * PARTS];

    // The parts of step `y` of the stage at `at`.
    auto split = [&](uint32_t (&parts)[4 * PARTS], uint32_t at, auto y) {
        constexpr int STEP = y;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint32_t from = (pair ^ (STEP % 2 * 64 + e / 2 * 32)) + STEP / 2 * M::PANEL_X + e % 2 * 1024;
            float2 x = shared_f32x2(at + from);
#pragma unroll
            for (int n = 0; n < PARTS; n++) {
                const uint32_t taken = Bf16::pack(x.x, x.y);
                parts[4 * n + e] = taken;
                x.x -= Bf16::lo(taken), x.y -= Bf16::hi(taken);
            }
        }
    };
    // d (+)= the parts times w^T of step `y` of the stage whose w is `tile`, the smallest part first: a group.
    auto multiply = [&](uint32_t (&parts)[4 * PARTS], uint64_t tile, auto y) {
        constexpr int STEP = y;
        hold(parts);
        hold(d);
        wgmma_fence();
#pragma unroll
        for (int n = PARTS - 1; n >= 0; n--) Bf16::mma_rs<0>(d, parts + 4 * n, desc_step(tile, STEP * 32), STEP > 0 || n < PARTS - 1);
        wgmma_commit();
    };

    uint32_t t = blockIdx.x;
    int s = 0, slice = 0;
    uint32_t phase = 0, at = base;
    uint64_t tile = desc_step(desc_k_major(base + M::W), SMALL ? warpgroup * 64 : 0);
    if (t < tiles) {
        mbar_wait(full, 0, p.hung, code);
        split(part[0], at, Int<0>{});
    }
#pragma unroll
    for (int n = 0; n < SUMS; n++) sum[n] = 0.f;
    // Where the loop turns no product is in flight, and part[0] holds step 0 of the slice.
    while (t < tiles) {
        multiply(part[0], tile, Int<0>{});
        split(part[1], at, Int<1>{});
        multiply(part[1], tile, Int<1>{});
        if constexpr (STEPS == 4) {
            wgmma_wait<1>();
            hold(part[0]);
            split(part[0], at, Int<2>{});
            multiply(part[0], tile, Int<2>{});
            wgmma_wait<1>();
            hold(part[1]);
            split(part[1], at, Int<3>{});
            multiply(part[1], tile, Int<3>{});
        }
        // While those run: step 0 of the next slice, of the next tile too.
        int next = s + 1;
        uint32_t next_phase = phase;
        if (next == STAGES) next = 0, next_phase ^= 1;
        const bool ends = slice + 1 == slices, more = !ends || t + gridDim.x < tiles;
        const uint32_t step = next == 0 ? -(STAGES - 1) * M::STAGE : M::STAGE;
        if (more) mbar_wait(full + 8 * next, next_phase, p.hung, code + next);
        wgmma_wait<1>();
        hold(part[0]);
        // Behind the last slice the parts of whatever is there, for nothing.
        split(part[0], at + (more ? step : 0), Int<0>{});
        wgmma_wait<0>();
        hold(d);
        __syncwarp();
        warp_arrive(empty + 8 * s, lane);
#pragma unroll
        for (int n = 0; n < SUMS; n++) sum[n] += d[n];
        s = next, phase = next_phase, at += step, tile = desc_step(tile, step);
        if (!ends) {
            slice++;
            continue;
        }

        int row, column;
        matmul_tile<M>(p, t, row, column);
        const int from = SMALL ? warpgroup * (SUMS / 2) : 0;  // the first of the thread's sums that it stores
        constexpr int STORED = SMALL ? SUMS / 2 : SUMS;
        float out[STORED];
        if constexpr (SMALL) {
            constexpr uint32_t HALF = 16 * WARPGROUP * 4;
            const uint32_t mine = base + M::EXCHANGE + tid * 4 + warpgroup * HALF, others = mine + HALF - 2 * warpgroup * HALF;
#pragma unroll
            for (int n = 0; n < STORED; n++) shared_put_f32(mine + n * (WARPGROUP * 4), warpgroup == 0 ? sum[n + STORED] : sum[n]);
            bar_sync(1, 2 * WARPGROUP);
#pragma unroll
            for (int n = 0; n < STORED; n++) out[n] = (warpgroup == 0 ? sum[n] : sum[n + STORED]) + shared_f32(others + n * (WARPGROUP * 4));
            bar_sync(1, 2 * WARPGROUP);
        } else {
#pragma unroll
            for (int n = 0; n < STORED; n++) out[n] = sum[n];
        }
        float* y = p.y + (long long)(row + first) * p.y_stride + column + 2 * from + 2 * j;
        const int left = (int)p.n - (column + 2 * from + 2 * j);  // columns of y from the thread's first one on
        const bool pairs = (p.y_stride & 1) == 0 && ((uintptr_t)p.y & 7) == 0;
        constexpr int BLOCKS = STORED / 4, AT_ONCE = BLOCKS < 8 ? BLOCKS : 8;  // of 8 columns; old numbers that are on their way at the same time
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (row + first + 8 * e >= (int)p.m) continue;
            float* to = y + 8 * e * p.y_stride;
            if (pairs && left >= 8 * BLOCKS - 2 * j) {
#pragma unroll
                for (int b0 = 0; b0 < BLOCKS; b0 += AT_ONCE) {
                    if (p.add) {
                        float2 old[AT_ONCE];
#pragma unroll
                        for (int b = 0; b < AT_ONCE; b++) old[b] = *(const float2*)(to + 8 * (b0 + b));
#pragma unroll
                        for (int b = 0; b < AT_ONCE; b++) out[4 * (b0 + b) + 2 * e] += old[b].x, out[4 * (b0 + b) + 2 * e + 1] += old[b].y;
                    }
#pragma unroll
                    for (int b = b0; b < b0 + AT_ONCE; b++) *(float2*)(to + 8 * b) = make_float2(out[4 * b + 2 * e], out[4 * b + 2 * e + 1]);
                }
            } else {
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                    for (int x = 0; x < 2; x++)
                        if (8 * b + x < left) to[8 * b + x] = p.add ? to[8 * b + x] + out[4 * b + 2 * e + x] : out[4 * b + 2 * e + x];
            }
        }
#pragma unroll
        for (int n = 0; n < SUMS; n++) sum[n] = 0.f;
        slice = 0, t += gridDim.x;
    }
}

}  // namespace hopper
