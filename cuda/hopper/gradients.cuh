// `gradients`: dq, dk, dg and dbeta of one chunk and key head from what `keep` and `reverse` left, over its value heads.
//
// Blocks stay and take one (chunk, key head) after the other. Roles: warpgroups 0 and 1 each have 64 of the 128 columns of dQ and of dK,
// whose sums over the value heads stay in registers; 0 also has Q K^T and M1, 1 has K K^T and M2. Of warpgroup 2, warp 0 issues all
// loads, and warp 1 makes dg and dbeta. Per value head
//   0: M1 = dO e^T     E1 = s G o M1 diag(beta)        1: M2 = dV e^T     D = -G o M2 diag(beta)
//   both: dK += state o (e dS'^T) - in o (dV S^T) + (D + D^T) K + E1^T Q        dQ += out o (dO S^T) + E1 K
// and the sums over rows and columns of P o M1 (0) and L o M2 (1), both of a tile from the same f32 numbers: where gates forget
// fast they cancel. Of the products [64, 64] that are not summed in place two at most are under way, and while one runs, the
// other's results are scaled and summed.
//
// Barriers: full[s], empty[s] of a tile (empty: a lane of each of the 8 warps), qk_full[2], qk_empty[2] of K and Q, tiles (8 warps: E1 and D
// are there), done[2] (8 warps, by the head's number: E1 and D have been read, its sums are there), sums_free[2] (warp 1 of warpgroup 2 has
// read them). Named: 1 and 2, within a warpgroup; 3, both.
#pragma once
#include "scan.cuh"

namespace hopper {

// Shared memory, in bytes from a base on 1024.
//   slot s    a tile: e^T, dO, dV [64, V], 64 columns of V of dS'^T, S^T [64, K], or their low bits: from its load until all 8 warps arrived
//   K, Q      of the chunk, by its number modulo 2: from their load until dK, dQ, which take their places, have left
//   E1, D     written by 0 and by 1, read by both: from `done` of the head before until this head's
//   VEC       vectors of a value head's image, by its number modulo 4: a load waits for a slot that the head two before the last gave back, for
//             whose sums the head in work has waited
//   SUMS      what becomes dc and dbeta, by the number modulo 2: from sums_free until `done`, then for the warp that reads them
//   NORMS     with L2 norms, rows' products with those of Q and K, from each warpgroup
template <int K, int V>
struct GradientSmem {
    static constexpr int PER_HEAD = 3 + 2 * (V / 64);
    static constexpr int SLOTS = 8;
    static constexpr int SLOT = K / 64 * PANEL;
    static constexpr int KQ = SLOTS * SLOT;
    static constexpr int E1 = KQ + 2 * 2 * SLOT;
    static constexpr int D = E1 + PANEL;
    static constexpr int VEC = D + PANEL;
    static constexpr int SUMS = VEC + 4 * 2048;
    static constexpr int NORMS = SUMS + 2 * 4160;
    static constexpr int BARRIERS = NORMS + 1024;
    static constexpr int BYTES = BARRIERS + SLOTS * 16 + 128 + 1024;
    static_assert(K == 128 && V <= K, "halves of 64 columns");
    static_assert(BYTES <= 232448, "shared memory of a block");
};
// f32 in SUMS: [2][64] by warpgroup, [64], [4][64] by warp for the columns, [8] by warp for the last.
constexpr int SUM_Q = 0, SUM_Z = 128, SUM_U = 256, SUM_ROW1 = 384, SUM_ROW2 = 448, SUM_COL1 = 512, SUM_COL2 = 768, SUM_LAST = 1024;

struct GradientMaps {
    CUtensorMap q, k, d_o, dv, dq, dk;
};

// Which of a value head's tiles is which: e, dV, dO, dS' (V / 64), S (V / 64), and where they count, the low bits of dS' and S. In the order in which their places are free again, as near as
// may be: a place is not taken before those in front of it.
constexpr int TILE_E = 0, TILE_DV = 1, TILE_DO = 2, TILE_DS = 3;

// The sum over the four lanes of a row.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// The thread's part of the rows of x [64, K] times those of a tile in shared memory, rows row0 and row0 + 8, added to `sums`.
template <class E, int K>
__device__ __forceinline__ void row_dots(float (&sums)[2], const float (&x)[K / 2], const char* tile, int row0, int j) {
#pragma unroll
    for (int b = 0; b < K / 8; b++) {
        const char* at = tile + (b / 8) * PANEL + 4 * j;
        const uint32_t y = *(const uint32_t*)(at + swizzled(0, row0, b % 8)), z = *(const uint32_t*)(at + swizzled(0, row0 + 8, b % 8));
        sums[0] += x[4 * b] * E::lo(y) + x[4 * b + 1] * E::hi(y);
        sums[1] += x[4 * b + 2] * E::lo(z) + x[4 * b + 3] * E::hi(z);
    }
}

// What has been multiplied, [64, 64], its rows times add0, add1, to the sum of dQ or dK; its rows' products with those of Q or K, times
// dot0, dot1, to `to` [64].
template <class E>
__device__ __forceinline__ void take_product(const float (&x)[32], float (&sum)[32], const char* rows, float dot0, float dot1, float add0, float add1, float* to, int row0,
                                             int j) {
    float dots[2] = {0.f, 0.f};
    row_dots<E, 64>(dots, x, rows, row0, j);
#pragma unroll
    for (int b = 0; b < 8; b++) {
        float* at = sum + 4 * b;
        at[0] += add0 * x[4 * b], at[1] += add0 * x[4 * b + 1], at[2] += add1 * x[4 * b + 2], at[3] += add1 * x[4 * b + 3];
    }
    const float lo = dot0 * quad_sum(dots[0]), hi = dot1 * quad_sum(dots[1]);
    if (j == 0) to[row0] = lo, to[row0 + 8] = hi;
}

// d [64, N] += or = a b^T over the 64 numbers of a panel each; a [64 rows, 64] K-major or, TRANS_A, [64, 64 rows].
template <class E, int TRANS_A, int TRANS_B, int N>
__device__ __forceinline__ void multiply_panels(float (&d)[N], uint32_t a, uint32_t b, int add) {
    const uint64_t x = TRANS_A ? desc_mn_major(a, PANEL) : desc_k_major(a), y = TRANS_B ? desc_mn_major(b, PANEL) : desc_k_major(b);
#pragma unroll
    for (int s = 0; s < 4; s++)
        E::template mma_ss<TRANS_A, TRANS_B>(d, desc_step(x, s * (TRANS_A ? 2048 : 32)), desc_step(y, s * (TRANS_B ? 2048 : 32)), s > 0 || add);
}

// Columns 16 s to 16 s + 15 of a [64, 64] packed as a left operand, transposed into a panel; the caller's warp writes columns 16 warp to 16 warp + 15.
__device__ __forceinline__ void store_transposed(uint32_t panel, const uint32_t (&x)[4], int s, int warp, int lane) {
    // Blocks (rows, columns) (0, 0), (8, 0), (0, 8), (8, 8) of x: there (0, 0), (0, 8), (8, 0), (8, 8).
    const int block = lane >> 3;
    stsm_trans(panel + swizzled(0, 16 * s + (block >> 1) * 8 + (lane & 7), 2 * warp + (block & 1)), x[0], x[1], x[2], x[3]);
}

// Sums over the warp's 16 rows of the columns of a [64, 64] (lane 4 i + j has columns 8 b + 2 j, + 1), to `to`. At every step a lane gives half of
// its columns away, so that in the end it has those of b = i.
__device__ __forceinline__ void store_columns(float* to, float (&x)[16], int i, int j) {
    auto step = [&](auto half) {
        const bool upper = i & half / 2;
#pragma unroll
        for (int n = 0; n < half; n++) {
            const float given = upper ? x[n] : x[n + half], kept = upper ? x[n + half] : x[n];
            x[n] = kept + __shfl_xor_sync(~0u, given, 2 * half);
        }
    };
    step(Int<8>{}), step(Int<4>{}), step(Int<2>{});
    *(float2*)(to + 8 * i + 2 * j) = make_float2(x[0], x[1]);
}

// <a, b> of two kept tiles [64, K] with their low bits (backward.cuh): the thread's share, of the half `half` of the columns.
template <class E, int K>
__device__ __forceinline__ float kept_dot(const char* a, const char* b, uint32_t low_a, uint32_t low_b, int half, int tid) {
    const int row0 = 16 * (tid >> 5) + (tid >> 2) % 8, j = tid & 3;
    constexpr int STEPS = K / 64;  // of 16 numbers
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < STEPS; n++) {
        const int at_low = (half * STEPS + n) * 2048 + tid * 16;
        const uint4 x_low = shared_16(low_a + at_low), y_low = shared_16(low_b + at_low);
        const uint32_t xs[4] = {x_low.x, x_low.y, x_low.z, x_low.w}, ys[4] = {y_low.x, y_low.y, y_low.z, y_low.w};
#pragma unroll
        for (int m = 0; m < 8; m++) {
            // As keep_rows has them: blocks of 8 columns and then of 8 rows.
            const int unit = 4 * (half * STEPS + n) + m / 4 * 2 + m % 4 / 2;
            const uint32_t at = swizzled(unit / 8 * PANEL, row0 + m % 2 * 8, unit % 8) + 4 * j;
            const uint32_t x = *(const uint32_t*)(a + at), y = *(const uint32_t*)(b + at);
            float u[2], v[2];
            with_low(u, x, xs[m / 2], m % 2 * 2), with_low(v, y, ys[m / 2], m % 2 * 2);
            sum += u[0] * v[0] + u[1] * v[1];
        }
    }
    return sum;
}

// <a, b> of two panels that lie alike: the thread's share.
template <class E>
__device__ __forceinline__ float panel_dot(uint32_t a, uint32_t b, int tid) {
    float sum = 0.f;
    // Half, unpacked, takes registers that are not there.
    constexpr int AT_ONCE = KEEPS_LOW<E> ? 4 : 1;
#pragma unroll AT_ONCE
    for (int n = 0; n < PANEL / 2048; n++) {
        const uint4 x = shared_16(a + n * 2048 + tid * 16), y = shared_16(b + n * 2048 + tid * 16);
        const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int m = 0; m < 4; m++) sum += E::lo(xs[m]) * E::lo(ys[m]) + E::hi(xs[m]) * E::hi(ys[m]);
    }
    return sum;
}

// dc and dbeta from the sums of a head; dg is the sum of dc from a token to the chunk's end. One warp, two tokens a lane. With `own`, dV_i . e_i:
// dbeta_i = X_i . e_i, dV = beta o X, where the sum over a column and z cancel.
__device__ __forceinline__ void store_gates(const GradientArgs& p, const float* sums, const float* vec, int token, int len, int h, int lane, const float* own = nullptr) {
    float dc[2], z_all = 0.f, dbeta[2];
    const float2 beta = *(const float2*)(vec + VEC_BETA + 2 * lane);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int row = 2 * lane + e;
        const float b = e ? beta.y : beta.x, z = sums[SUM_Z + row] + sums[SUM_Z + 64 + row];
        float column = 0.f;
#pragma unroll
        for (int w = 0; w < 4; w++) column += sums[SUM_COL1 + 64 * w + row] - sums[SUM_COL2 + 64 * w + row];
        dbeta[e] = z + column;
        z_all += b * z;
        dc[e] = (sums[SUM_ROW1 + row] - sums[SUM_ROW2 + row]) - b * dbeta[e] + (sums[SUM_Q + row] + sums[SUM_Q + 64 + row] - sums[SUM_U + row] - sums[SUM_U + 64 + row]);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) z_all += __shfl_xor_sync(~0u, z_all, step);
    float dot = 0.f;
#pragma unroll
    for (int w = 0; w < 8; w++) dot += sums[SUM_LAST + w];
    float after = dc[0] + dc[1];
    if (lane == 31) after += z_all + vec[VEC_LAST] * dot;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float y = __shfl_sync(~0u, after, lane + step < 32 ? lane + step : lane);
        if (lane + step < 32) after += y;
    }
    if (own != nullptr) {
        const float2 x = *(const float2*)(own + 2 * lane);
        if (beta.x > 1e-20f) dbeta[0] = x.x / beta.x;
        if (beta.y > 1e-20f) dbeta[1] = x.y / beta.y;
    }
    const long long at = (long long)(token + 2 * lane) * p.hv + h;
    if (2 * lane < len) p.dg[at] = after, p.dbeta[at] = dbeta[0];
    if (2 * lane + 1 < len) p.dg[at + p.hv] = after - dc[0], p.dbeta[at + p.hv] = dbeta[1];
}

// 64 columns of dQ or dK, of a warp's 16 rows, into the panel of Q or K whose place they take.
template <class E>
__device__ __forceinline__ void put_half(const float (&y)[32], uint32_t panel, int warp, int lane) {
    const int block = lane >> 3;
    const uint32_t row = 16 * warp + (block & 1) * 8 + (lane & 7);
#pragma unroll
    for (int s = 0; s < 4; s++)
        stsm(panel + swizzled(0, row, 2 * s + (block >> 1)), E::pack(y[8 * s], y[8 * s + 1]), E::pack(y[8 * s + 2], y[8 * s + 3]), E::pack(y[8 * s + 4], y[8 * s + 5]),
             E::pack(y[8 * s + 6], y[8 * s + 7]));
}

// The first `len` rows of a panel to memory, by a warpgroup.
__device__ __forceinline__ void store_part(uint32_t panel, char* to, long long stride, int len, int tid) {
#pragma unroll 1
    for (int row = tid >> 3; row < len; row += 16) *(uint4*)(to + row * stride * 2 + (tid & 7) * 16) = shared_16(swizzled(panel, row, tid & 7));
}

// y less its part along the rows x of a panel, y - n^2 x (x . y); dots: n^2 (x . y) of rows row0 and row0 + 8.
template <class E>
__device__ __forceinline__ void less_along(float (&y)[32], const char* panel, float lo, float hi, int row0, int j) {
#pragma unroll
    for (int b = 0; b < 8; b++) {
        const char* at = panel + 4 * j;
        const uint32_t x = *(const uint32_t*)(at + swizzled(0, row0, b)), z = *(const uint32_t*)(at + swizzled(0, row0 + 8, b));
        y[4 * b] -= lo * E::lo(x), y[4 * b + 1] -= lo * E::hi(x), y[4 * b + 2] -= hi * E::lo(z), y[4 * b + 3] -= hi * E::hi(z);
    }
}

template <class E, int K, int V>
__device__ __forceinline__ void gradients(const GradientArgs& p, const GradientMaps& maps) {
    DYNAMIC_SHARED(smem_raw);
    char* smem = align_1024(smem_raw);
    using M = GradientSmem<K, V>;
    constexpr int PARTS = V / 64, PER_HEAD = M::PER_HEAD, SLOTS = M::SLOTS, TILE_S = TILE_DS + PARTS, TILE_LOW = TILE_S + PARTS;
    const int warpgroup = uniform(threadIdx.x / WARPGROUP), tid = threadIdx.x % WARPGROUP, warp = tid >> 5, lane = tid & 31;
    const uint32_t base = smem_addr(smem), full = base + M::BARRIERS, empty = full + SLOTS * 8;
    const uint32_t qk_full = empty + SLOTS * 8, qk_empty = qk_full + 16, tiles = qk_empty + 16, done = tiles + 8, sums_free = done + 16;
    const int group = p.hv / p.hk;
    auto head = [&](int kh, int m) { return p.mod ? kh + m * p.hk : kh * group + m; };
    // The block's share, for each role: `work` of a chunk and of a key head; the next chunk's place is on its way meanwhile. Empty places are behind
    // all others. Chunks in which sums cancel are left to gradients_careful.cuh.
    auto walk = [&](auto work) {
        const int chunks_on = gridDim.x / p.hk, heads_on = gridDim.x % p.hk;
        int chunk = blockIdx.x / p.hk, kh = blockIdx.x % p.hk;
        auto place = [&](int chunk, int kh) {
            Chunk c = chunk < p.chunk_count ? p.chunks[chunk] : Chunk{0, 0};
            if constexpr (ASKS_GRAD<E>)
                if (chunk < p.chunk_count && p.cancels[chunk * p.hk + kh] != 0) c.len = -c.len;
            return c;
        };
        Chunk c = place(chunk, kh);
        while (c.len != 0) {
            int after = chunk + chunks_on, kh_after = kh + heads_on;
            if (kh_after >= p.hk) kh_after -= p.hk, after++;
            const Chunk coming = place(after, kh_after);
            if (!ASKS_GRAD<E> || c.len > 0) work(chunk, kh, c);
            chunk = after, kh = kh_after, c = coming;
        }
    };

    if (threadIdx.x == 0) {
        for (int s = 0; s < SLOTS; s++) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, 8 * WARP_ARRIVALS);
        }
        for (int s = 0; s < 2; s++) {
            mbar_init(qk_full + 8 * s, 1);
            mbar_init(qk_empty + 8 * s, 8 * WARP_ARRIVALS);
            mbar_init(done + 8 * s, 8 * WARP_ARRIVALS);
            mbar_init(sums_free + 8 * s, WARP_ARRIVALS);
        }
        mbar_init(tiles, 8 * WARP_ARRIVALS);
        mbar_init_fence();
    }
    __syncthreads();

    if (warpgroup == 2) {
        // As where K is 64: the warp of the sums needs 40.
        regs_down<Registers<64>::SERVER>();
        if (uniform(warp) == 0 && elect()) {
            tma_prefetch(&maps.q);
            tma_prefetch(&maps.k);
            tma_prefetch(&maps.d_o);
            tma_prefetch(&maps.dv);
            tma_prefetch(&maps.dq);
            tma_prefetch(&maps.dk);
            int s = 0, vec = 0;
            uint32_t phase = 1, qk = 0;  // qk: chunks so far
            walk([&](int chunk, int kh, const Chunk& c) {
                for (int m = 0; m < group; m++) {
                    const int h = head(kh, m);
                    const long long at = (long long)chunk * p.hv + h;
                    const float last = KEEPS_LOW<E> ? ((const float*)(p.images + at * GRAD_BYTES + GRAD_VEC))[VEC_LAST] : 0.f;
                    // The next tile's slot, once it is free.
                    auto take = [&](uint32_t bytes) {
                        mbar_wait(empty + 8 * s, phase, p.hung, HUNG_PRODUCER + s);
                        mbar_expect(full + 8 * s, bytes);
                    };
                    auto next = [&] {
                        if (++s == SLOTS) s = 0, phase ^= 1;
                    };
                    auto load_states = [&](const char* from) {
                        for (int x = 0; x < PARTS; x++) {
                            take(M::SLOT);
                            bulk_load(base + s * M::SLOT, from + (at * PARTS + x) * kept_bytes(K), M::SLOT, full + 8 * s);
                            next();
                        }
                    };
                    auto load_low = [&](const char* from) {
                        take(PARTS * PANEL);
                        for (int x = 0; x < PARTS; x++) bulk_load(base + s * M::SLOT + x * PANEL, from + (at * PARTS + x) * kept_bytes(K) + M::SLOT, PANEL, full + 8 * s);
                        next();
                    };
                    if (m == 0) {
                        const uint32_t n = qk % 2, bar = qk_full + 8 * n, to = base + M::KQ + n * 2 * M::SLOT;
                        mbar_wait(qk_empty + 8 * n, qk / 2 % 2 ^ 1, p.hung, HUNG_PRODUCER + 0x20);
                        mbar_expect(bar, 2 * M::SLOT);
                        for (int x = 0; x < K / 64; x++) {
                            tma_load(to + x * PANEL, &maps.k, kh * K + 64 * x, c.token, bar);
                            tma_load(to + M::SLOT + x * PANEL, &maps.q, kh * K + 64 * x, c.token, bar);
                        }
                        qk++;
                    }
                    take(PARTS * PANEL + 2048);
                    bulk_load(base + s * M::SLOT, p.news + at * PARTS * PANEL, PARTS * PANEL, full + 8 * s);
                    bulk_load(base + M::VEC + vec * 2048, p.images + at * GRAD_BYTES + GRAD_VEC, 2048, full + 8 * s);
                    next();
                    take(PARTS * PANEL);
                    for (int x = 0; x < PARTS; x++) tma_load(base + s * M::SLOT + x * PANEL, &maps.dv, h * V + 64 * x, c.token, full + 8 * s);
                    next();
                    take(PARTS * PANEL);
                    for (int x = 0; x < PARTS; x++) tma_load(base + s * M::SLOT + x * PANEL, &maps.d_o, h * V + 64 * x, c.token, full + 8 * s);
                    next();
                    load_states(p.dstates);
                    load_states(p.states);
                    if (KEEPS_LOW<E> && counts(last)) load_low(p.dstates), load_low(p.states);
                    vec = (vec + 1) % 4;
                }
            });
        } else if (warp == 1) {
            uint32_t n = 0;  // value heads so far
            walk([&](int, int kh, const Chunk& c) {
                for (int m = 0; m < group; m++, n++) {
                    mbar_wait(done + 8 * (n % 2), n / 2 % 2, p.hung, HUNG_STORE);
                    store_gates(p, (const float*)(smem + M::SUMS + n % 2 * 4160), (const float*)(smem + M::VEC + n % 4 * 2048), c.token, c.len, head(kh, m), lane);
                    __syncwarp();
                    warp_arrive(sums_free + 8 * (n % 2), lane);
                }
            });
        }
        return;
    }

    regs_up<Registers<64>::CONSUMER>();
    const bool second = warpgroup == 1;
    const int i = lane >> 2, j = lane & 3, row0 = 16 * warp + i, row1 = row0 + 8;
    const uint32_t e1 = base + M::E1, d_tile = base + M::D;
    uint32_t position = 0;       // of the value head's first tile, modulo two rounds of the ring: slot and parity of the round
    uint32_t heads = 0, qk = 0;  // value heads and chunks so far

    auto slot = [&](int tile) {
        const uint32_t s = position + tile;
        return (int)(s >= 2 * SLOTS ? s - 2 * SLOTS : s >= SLOTS ? s - SLOTS : s);
    };
    auto await = [&](int tile) {
        mbar_wait(full + 8 * slot(tile), (position + tile) / SLOTS & 1, p.hung, HUNG_CONSUMER + 16 * warpgroup + tile);
    };
    auto give = [&](int tile) {
        warp_arrive(empty + 8 * slot(tile), lane);
    };
    auto place = [&](int tile) { return base + slot(tile) * M::SLOT; };
    // Rows of a tile behind the sequence's end are another's: zeroes them.
    auto clear = [&](uint32_t tile, int panels, int len) {
#pragma unroll 1
        for (int x = 0; x < panels; x++) clear_rows(tile + x * PANEL, len, tid, WARPGROUP);
        fence_proxy();
        bar_sync(3, 2 * WARPGROUP);
    };

    walk([&](int, int kh, const Chunk& c) {
        const int token = c.token, len = c.len;
        const uint32_t stage = qk % 2;
        const int own_panel = M::KQ + stage * 2 * M::SLOT + warpgroup * PANEL;  // of K: this warpgroup's columns; + SLOT: of Q
        const uint32_t sk = base + M::KQ + stage * 2 * M::SLOT, sq = sk + M::SLOT;
        const char *k_rows = smem + own_panel, *q_rows = k_rows + M::SLOT;
        mbar_wait(qk_full + 8 * stage, qk / 2 % 2, p.hung, HUNG_CONSUMER + 16 * warpgroup + 15);
        if (len < CHUNK) clear(second ? sk : sq, K / 64, len);
        float dq[32], dk[32];
#pragma unroll
        for (int n = 0; n < 32; n++) dq[n] = dk[n] = 0.f;

        for (int m = 0; m < group; m++) {
            const float* vec = (const float*)(smem + M::VEC + heads % 4 * 2048);
            float* sums = (float*)(smem + M::SUMS + heads % 2 * 4160);
            float *row_sums = sums + 64 * warpgroup, tile[32], other[32];  // results of products [64, 64], two under way at most

            // x = left times the tiles from `right` on, this warpgroup's 64 columns.
            auto multiply = [&](float (&x)[32], auto trans, int left, int right) {
                wgmma_fence();
#pragma unroll
                for (int y = 0; y < PARTS; y++) multiply_panels<E, trans, 1>(x, place(left) + y * PANEL, place(right + y) + warpgroup * PANEL, y > 0);
                wgmma_commit();
            };
            auto take = [&](const float (&x)[32], float (&sum)[32], const char* rows, float dot0, float dot1, float add0, float add1, float* to) {
                take_product<E>(x, sum, rows, dot0, dot1, add0, add1, to, row0, j);
            };
            // The tile of M1 or M2 becomes E1 or D; its sums over rows and columns.
            auto work_up = [&](const float (&own)[32]) {
                const float* own_rows = vec + (second ? VEC_CK : VEC_CQ);
                const float c0 = own_rows[row0], c1 = own_rows[row1];
                float rows0 = 0.f, rows1 = 0.f, columns[16];
                const float* own_columns = vec + 2 * j;
                const int below = row0 - 2 * j - (second ? 1 : 0);  // K K^T is taken below the diagonal
                mbar_wait(done + 8 * ((heads + 1) % 2), (heads + 1) / 2 % 2 ^ 1, p.hung, HUNG_CONSUMER + 16 * warpgroup + 13);
                mbar_wait(sums_free + 8 * (heads % 2), heads / 2 % 2 ^ 1, p.hung, HUNG_CONSUMER + 16 * warpgroup + 12);
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    uint32_t packed[4];
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int b = 2 * s + half;
                        const float2 c = *(const float2*)(own_columns + VEC_C + 8 * b), beta = *(const float2*)(own_columns + VEC_BETA + 8 * b);
                        float g[4];
                        g[0] = below >= 8 * b ? exp2_fast(c0 - c.x) * tile[4 * b] : 0.f;
                        g[1] = below >= 8 * b + 1 ? exp2_fast(c0 - c.y) * tile[4 * b + 1] : 0.f;
                        g[2] = below >= 8 * b - 8 ? exp2_fast(c1 - c.x) * tile[4 * b + 2] : 0.f;
                        g[3] = below >= 8 * b - 7 ? exp2_fast(c1 - c.y) * tile[4 * b + 3] : 0.f;
                        float f[4];
#pragma unroll
                        for (int e = 0; e < 4; e++) f[e] = g[e] * own[4 * b + e];
                        columns[2 * b] = f[0] + f[2], columns[2 * b + 1] = f[1] + f[3];
                        rows0 += beta.x * f[0] + beta.y * f[1], rows1 += beta.x * f[2] + beta.y * f[3];
                        const float x = second ? -beta.x : beta.x, y = second ? -beta.y : beta.y;
                        packed[2 * half] = E::pack(x * g[0], y * g[1]), packed[2 * half + 1] = E::pack(x * g[2], y * g[3]);
                    }
                    // Volatile: or the vectors' numbers of all steps are loaded at once.
                    store_transposed(second ? d_tile : e1, packed, s, warp, lane);
                }
                fence_proxy();
                __syncwarp();
                warp_arrive(tiles, lane);
                rows0 = quad_sum(rows0), rows1 = quad_sum(rows1);
                float* to = sums + (second ? SUM_ROW2 : SUM_ROW1);
                if (j == 0) to[row0] = rows0, to[row1] = rows1;
                store_columns(sums + (second ? SUM_COL2 : SUM_COL1) + 64 * warp, columns, i, j);
            };
            // <dS', S>, half of the columns each.
            bool low = false;
            auto last_dot = [&] {
                float dot = 0.f;
                low = KEEPS_LOW<E> && counts(vec[VEC_LAST]);
                if (low) {
                    await(TILE_LOW), await(TILE_LOW + 1);
#pragma unroll 1
                    for (int x = 0; x < PARTS; x++)
                        dot += kept_dot<E, K>(smem + slot(TILE_DS + x) * M::SLOT, smem + slot(TILE_S + x) * M::SLOT, place(TILE_LOW) + x * PANEL, place(TILE_LOW + 1) + x * PANEL,
                                              warpgroup, tid);
                    __syncwarp();
                    give(TILE_LOW), give(TILE_LOW + 1);
                } else {
#pragma unroll
                    for (int x = 0; x < PARTS; x++) dot += panel_dot<E>(place(TILE_DS + x) + warpgroup * PANEL, place(TILE_S + x) + warpgroup * PANEL, tid);
                }
#pragma unroll
                for (int step = 1; step < 32; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
                if (lane == 0) sums[SUM_LAST + 4 * warpgroup + warp] = dot;
            };

            await(TILE_E);
            await(TILE_DO);
            await(TILE_DV);
            if (len < CHUNK) clear(place(second ? TILE_DV : TILE_DO), PARTS, len);
            // Q K^T or K K^T, raw: of every head anew, as registers for them are not there while what is [64, 64] is taken.
            float own[32];
            wgmma_fence();
#pragma unroll
            for (int x = 0; x < K / 64; x++) multiply_panels<E, 0, 0>(own, (second ? sk : sq) + x * PANEL, sk + x * PANEL, x > 0);
#pragma unroll
            for (int x = 0; x < PARTS; x++) multiply_panels<E, 0, 1>(tile, place(second ? TILE_DV : TILE_DO) + x * PANEL, place(TILE_E) + x * PANEL, x > 0);
            wgmma_commit();
#pragma unroll 1
            for (int x = 0; x < PARTS; x++) await(TILE_DS + x);
            // e dS'^T, while the tile is worked up.
            multiply(other, Int<1>{}, TILE_E, TILE_DS);
            wgmma_wait<1>();
            hold(tile);
            hold(own);
            work_up(own);
            if (m == 0 && qk > 0) {
                // What the chunk before left has been read.
                if (warp == 0) {
                    if (elect()) bulk_wait_read();
                    __syncwarp();
                }
                warp_arrive(qk_empty + 8 * (stage ^ 1), lane);
            }
#pragma unroll 1
            for (int x = 0; x < PARTS; x++) await(TILE_S + x);
            // dV S^T, while that is taken.
            multiply(tile, Int<0>{}, TILE_DV, TILE_S);
            wgmma_wait<1>();
            hold(other);
            give(TILE_E);
            {
                // e^(c_C - c) rk: what is left of K behind the chunk, without beta.
                const float left0 = exp2_fast(vec[VEC_TOTAL] - vec[VEC_C + row0]), left1 = exp2_fast(vec[VEC_TOTAL] - vec[VEC_C + row1]);
                take(other, dk, k_rows, left0, left1, vec[VEC_STATE + row0], vec[VEC_STATE + row1], row_sums + SUM_Z);
            }
            // dO S^T, while both are.
            hold(other);
            multiply(other, Int<0>{}, TILE_DO, TILE_S);
            last_dot();
            __syncwarp();
#pragma unroll
            for (int x = 0; x < PARTS; x++) give(TILE_DS + x);
            wgmma_wait<1>();
            hold(tile);
            give(TILE_DV);
            {
                const float lo = vec[VEC_IN + row0], hi = vec[VEC_IN + row1];
                take(tile, dk, k_rows, lo, hi, -lo, -hi, row_sums + SUM_U);
            }
            mbar_wait(tiles, heads % 2, p.hung, HUNG_CONSUMER + 16 * warpgroup + 14);
            hold(dk);
            wgmma_fence();
            multiply_panels<E, 1, 1>(dk, d_tile, sk + warpgroup * PANEL, 1);
            multiply_panels<E, 0, 1>(dk, d_tile, sk + warpgroup * PANEL, 1);
            multiply_panels<E, 0, 1>(dk, e1, sq + warpgroup * PANEL, 1);
            wgmma_commit();
            wgmma_wait<1>();
            hold(other);
            give(TILE_DO);
#pragma unroll
            for (int x = 0; x < PARTS; x++) give(TILE_S + x);
            {
                const float lo = vec[VEC_OUT + row0], hi = vec[VEC_OUT + row1];
                take(other, dq, q_rows, lo, hi, lo, hi, row_sums + SUM_Q);
            }
            hold(dq);
            wgmma_fence();
            multiply_panels<E, 1, 1>(dq, e1, sk + warpgroup * PANEL, 1);
            wgmma_commit();
            wgmma_wait<0>();
            hold(dk);
            hold(dq);
            __syncwarp();
            warp_arrive(done + 8 * (heads % 2), lane);
            position += PER_HEAD + (low ? 2 : 0);
            if (position >= 2 * SLOTS) position -= 2 * SLOTS;
            heads++;
        }

        if (p.l2norm) {
            // Less the parts along the rows of q and k, whose products with dq and dk both warpgroups have a half of.
            const float* vec = (const float*)(smem + M::VEC + (heads - 1) % 4 * 2048);
            float* to = (float*)(smem + M::NORMS);
            auto leave = [&](const float (&x)[32], const char* rows, float* to) {
                float dots[2] = {0.f, 0.f};
                row_dots<E, 64>(dots, x, rows, row0, j);
                const float lo = quad_sum(dots[0]), hi = quad_sum(dots[1]);
                if (j == 0) to[row0] = lo, to[row1] = hi;
            };
            leave(dq, q_rows, to + 128 * warpgroup);
            leave(dk, k_rows, to + 128 * warpgroup + 64);
            bar_sync(3, 2 * WARPGROUP);
            auto along = [&](int which, int row) {
                // The square of the norm, from twice its power.
                const float ck = vec[VEC_CK + row], c = vec[VEC_C + row];
                const float n2 = which ? exp2_fast(ck - c) : exp2_fast(2.f * vec[VEC_CQ + row] - (ck + c)) / (p.scale * p.scale);
                return n2 * (to[64 * which + row] + to[128 + 64 * which + row]);
            };
            less_along<E>(dq, q_rows, along(0, row0), along(0, row1), row0, j);
            less_along<E>(dk, k_rows, along(1, row0), along(1, row1), row0, j);
            bar_sync(3, 2 * WARPGROUP);
        }
        // All products of the warpgroup have read the panels.
        bar_sync(1 + warpgroup, WARPGROUP);
        put_half<E>(dq, base + own_panel + M::SLOT, warp, lane);
        put_half<E>(dk, base + own_panel, warp, lane);
        fence_proxy();
        bar_sync(1 + warpgroup, WARPGROUP);
        const int column = kh * K + 64 * warpgroup;
        if (len < CHUNK) {
            store_part(base + own_panel + M::SLOT, (char*)p.dq + (token * p.dq_stride + column) * 2, p.dq_stride, len, tid);
            store_part(base + own_panel, (char*)p.dk + (token * p.dk_stride + column) * 2, p.dk_stride, len, tid);
            __syncwarp();
        } else if (warp == 0 && elect()) {
            tma_store(&maps.dq, column, token, base + own_panel + M::SLOT);
            tma_store(&maps.dk, column, token, base + own_panel);
            bulk_commit();
        }
        qk++;
    });
    if (warp == 0 && elect()) bulk_wait();
}

}  // namespace hopper
