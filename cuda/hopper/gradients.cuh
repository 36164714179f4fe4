// `gradients`: dq, dk, dg and dbeta of one chunk and key head from what `keep` and `reverse` left, over its value heads.
//
// Blocks stay and take one (chunk, key head) after the other. Roles: warpgroup 0 has what belongs to the rows of Q (M1, dQ),
// warpgroup 1 what belongs to those of K (M2, dK); of warpgroup 2 one lane issues all loads. Both sums over the value heads stay in
// registers, and Q K^T, K K^T too. Per value head
//   0: M1 = dO e^T     E1 = s G o M1 diag(beta), to the other      dQ += out o (dO S^T) + E1 K
//   1: dK += state o (e dS'^T)     M2 = dV e^T     D = -G o M2 diag(beta)     dK += -in o (dV S^T) + (D + D^T) K + E1^T Q
// and the sums over rows and columns of P o M1 (0) and L o M2 (1), both of a tile from the same f32 numbers: where gates forget
// fast they cancel. What is bound here is memory (146 KB a chunk and value head for 12 MFLOP), so the ring of tiles is as long as shared
// memory allows and the products wait for each other.
//
// Barriers: full[s], empty[s] of a tile (empty: a lane of each of the 8 warps), qk_full, qk_empty of K and Q, e1 (4 warps of 0). Named: 1
// and 2 within a warpgroup, 3 both.
#pragma once
#include "scan.cuh"

namespace hopper {

// Shared memory, in bytes from a base on 1024.
//   slot s    a tile: e^T, dO, dV [64, V] or 64 columns of V of dS'^T, S^T [64, K]: from its load until all 8 warps arrived
//   K, Q      of the chunk: from their load until dK, dQ, which take their places, are in memory
//   E1, D     written by 0 and by 1, read by 1: within a value head
//   VEC       vectors of a value head's image, by its number modulo 3: a load waits for a slot that the head before the last gave back
//   SUMS      what becomes dc and dbeta, by the number modulo 2: written before barrier 3 of the head, read behind it by one warp
template <int K, int V>
struct GradientSmem {
    static constexpr int PER_HEAD = 3 + 2 * (V / 64);
    static constexpr int SLOTS = PER_HEAD == 7 ? 10 : 2 * PER_HEAD;
    static constexpr int SLOT = (K > V ? K : V) / 64 * PANEL;
    static constexpr int KT = SLOTS * SLOT;
    static constexpr int Q = KT + K / 64 * PANEL;
    static constexpr int E1 = Q + K / 64 * PANEL;
    static constexpr int D = E1 + PANEL;
    static constexpr int VEC = D + PANEL;
    static constexpr int SUMS = VEC + 3 * 2048;
    static constexpr int BARRIERS = SUMS + 2 * 4096;
    static constexpr int BYTES = BARRIERS + SLOTS * 16 + 32 + 1024;
    static_assert(BYTES <= 232448, "shared memory of a block");
};
// f32 in SUMS: [64] each, [4][64] by warp for the columns, [8] by warp for the last.
constexpr int SUM_Q = 0, SUM_ROW1 = 64, SUM_Z = 128, SUM_U = 192, SUM_ROW2 = 256, SUM_COL1 = 320, SUM_COL2 = 576, SUM_LAST = 832;

struct GradientMaps {
    CUtensorMap q, k, d_o, dv;
};

// Which of a value head's tiles is which: e, dO, dS' (V / 64), dV, S (V / 64).
constexpr int TILE_E = 0, TILE_DO = 1, TILE_DS = 2;

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

// d [64, N] += or = a b^T over the 64 numbers of a panel each; a [64 rows, 64] K-major or, TRANS_A, [64, 64 rows].
template <class E, int TRANS_A, int TRANS_B, int N>
__device__ __forceinline__ void multiply_panels(float (&d)[N], uint32_t a, uint32_t b, int add) {
    const uint64_t x = TRANS_A ? desc_mn_major(a, PANEL) : desc_k_major(a), y = TRANS_B ? desc_mn_major(b, PANEL) : desc_k_major(b);
#pragma unroll
    for (int s = 0; s < 4; s++)
        E::template mma_ss<TRANS_A, TRANS_B>(d, desc_step(x, s * (TRANS_A ? 2048 : 32)), desc_step(y, s * (TRANS_B ? 2048 : 32)), s > 0 || add);
}

// A [64, 64] packed as a left operand, transposed into a panel; the caller's warp writes columns 16 warp to 16 warp + 15.
__device__ __forceinline__ void store_transposed(uint32_t panel, const uint32_t (&x)[16], int warp, int lane) {
    // Blocks of step s, (rows, columns) (0, 0), (8, 0), (0, 8), (8, 8) of x: there (0, 0), (0, 8), (8, 0), (8, 8).
    const int block = lane >> 3;
#pragma unroll
    for (int s = 0; s < 4; s++)
        stsm_trans(panel + swizzled(0, 16 * s + (block >> 1) * 8 + (lane & 7), 2 * warp + (block & 1)), x[4 * s], x[4 * s + 1], x[4 * s + 2], x[4 * s + 3]);
}

// Sums over the warp's 16 rows of the columns of a [64, 64] (lane 4 i + j has columns 8 b + 2 j, + 1), to `to`.
__device__ __forceinline__ void store_columns(float* to, float (&x)[16], int i, int j) {
#pragma unroll
    for (int n = 0; n < 16; n++)
#pragma unroll
        for (int step = 4; step < 32; step *= 2) x[n] += __shfl_xor_sync(~0u, x[n], step);
#pragma unroll
    for (int b = 0; b < 8; b++)
        if (i == b) *(float2*)(to + 8 * b + 2 * j) = make_float2(x[2 * b], x[2 * b + 1]);
}

// The low bits of two kept tiles [64, K] (backward.cuh), from memory: the thread's share, of the half `half` of the columns.
template <class E, int K>
struct Low {
    static constexpr int STEPS = K / 64;  // of 16 numbers
    uint4 a[STEPS], b[STEPS];
    // `there`: there are some; else zeros.
    __device__ __forceinline__ void load(const char* low_a, const char* low_b, int half, int tid, bool there) {
        if constexpr (KEEPS_LOW<E>) {
#pragma unroll
            for (int n = 0; n < STEPS; n++) {
                a[n] = b[n] = make_uint4(0, 0, 0, 0);
                if (there) {
                    a[n] = *(const uint4*)(low_a + (half * STEPS + n) * 2048 + tid * 16);
                    b[n] = *(const uint4*)(low_b + (half * STEPS + n) * 2048 + tid * 16);
                }
            }
        }
    }
};

// <a, b> of two kept tiles [64, K]: the thread's share.
template <class E, int K>
__device__ __forceinline__ float kept_dot(const char* a, const char* b, const Low<E, K>& low, int half, int tid) {
    const int row0 = 16 * (tid >> 5) + (tid >> 2) % 8, j = tid & 3;
    constexpr int STEPS = Low<E, K>::STEPS;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < STEPS; n++) {
        const uint32_t xs[4] = {low.a[n].x, low.a[n].y, low.a[n].z, low.a[n].w}, ys[4] = {low.b[n].x, low.b[n].y, low.b[n].z, low.b[n].w};
#pragma unroll
        for (int m = 0; m < 8; m++) {
            // As keep_rows has them: blocks of 8 columns and then of 8 rows.
            const int unit = 4 * (half * STEPS + n) + m / 4 * 2 + m % 4 / 2;
            const uint32_t at = swizzled(unit / 8 * PANEL, row0 + m % 2 * 8, unit % 8) + 4 * j;
            const uint32_t x = *(const uint32_t*)(a + at), y = *(const uint32_t*)(b + at);
            float u[2] = {E::lo(x), E::hi(x)}, v[2] = {E::lo(y), E::hi(y)};
            if constexpr (KEEPS_LOW<E>) with_low(u, x, xs[m / 2], m % 2 * 2), with_low(v, y, ys[m / 2], m % 2 * 2);
            sum += u[0] * v[0] + u[1] * v[1];
        }
    }
    return sum;
}

// dQ or dK [64, K] of a warp's 16 rows to memory, by way of the tile's place in shared memory. With norms: less its part along the tile's
// row x, y - n^2 x (x . y).
template <class E, int K>
__device__ __forceinline__ void store_rows(float (&y)[K / 2], char* tile, const float* norm, char* to, long long stride, int len, int warp, int lane) {
    const int i = lane >> 2, j = lane & 3, row0 = 16 * warp + i;
    if (norm != nullptr) {
        float dots[2] = {0.f, 0.f};
        row_dots<E, K>(dots, y, tile, row0, j);
        const float lo = norm[row0] * norm[row0] * quad_sum(dots[0]), hi = norm[row0 + 8] * norm[row0 + 8] * quad_sum(dots[1]);
#pragma unroll
        for (int b = 0; b < K / 8; b++) {
            const char* at = tile + (b / 8) * PANEL + 4 * j;
            const uint32_t x = *(const uint32_t*)(at + swizzled(0, row0, b % 8)), z = *(const uint32_t*)(at + swizzled(0, row0 + 8, b % 8));
            y[4 * b] -= lo * E::lo(x), y[4 * b + 1] -= lo * E::hi(x), y[4 * b + 2] -= hi * E::lo(z), y[4 * b + 3] -= hi * E::hi(z);
        }
        __syncwarp();
    }
    const int block = lane >> 3;
    const uint32_t at = smem_addr(tile);
#pragma unroll
    for (int s = 0; s < K / 16; s++)
        stsm(at + (s / 4) * PANEL + swizzled(0, 16 * warp + (block & 1) * 8 + (lane & 7), 2 * (s % 4) + (block >> 1)), E::pack(y[8 * s], y[8 * s + 1]),
             E::pack(y[8 * s + 2], y[8 * s + 3]), E::pack(y[8 * s + 4], y[8 * s + 5]), E::pack(y[8 * s + 6], y[8 * s + 7]));
    __syncwarp();
    constexpr int UNITS = K / 8;
#pragma unroll
    for (int n = 0; n < 16 * UNITS / 32; n++) {
        const int row = 16 * warp + (n * 32 + lane) / UNITS, unit = (n * 32 + lane) % UNITS;
        if (row < len) *(uint4*)(to + row * stride * 2 + unit * 16) = *(const uint4*)(tile + swizzled((unit / 8) * PANEL, row, unit % 8));
    }
}

template <class E, int K, int V>
__device__ __forceinline__ void gradients(const GradientArgs& p, const GradientMaps& maps) {
    DYNAMIC_SHARED(smem_raw);
    char* smem = align_1024(smem_raw);
    using M = GradientSmem<K, V>;
    constexpr int PARTS = V / 64, PER_HEAD = M::PER_HEAD, SLOTS = M::SLOTS, TILE_DV = TILE_DS + PARTS, TILE_S = TILE_DV + 1;
    const int warpgroup = uniform(threadIdx.x / WARPGROUP), tid = threadIdx.x % WARPGROUP, warp = tid >> 5, lane = tid & 31;
    const uint32_t base = smem_addr(smem), full = base + M::BARRIERS, empty = full + SLOTS * 8;
    const uint32_t qk_full = empty + SLOTS * 8, qk_empty = qk_full + 8, e1_full = qk_full + 16;
    const int group = p.hv / p.hk, jobs = p.chunk_count * p.hk;

    if (threadIdx.x == 0) {
        for (int s = 0; s < SLOTS; s++) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, 8 * WARP_ARRIVALS);
        }
        mbar_init(qk_full, 1);
        mbar_init(qk_empty, 8 * WARP_ARRIVALS);
        mbar_init(e1_full, 4 * WARP_ARRIVALS);
        mbar_init_fence();
    }
    __syncthreads();

    if (warpgroup == 2) {
        regs_down<24>();
        if (uniform(warp) == 0 && elect()) {
            tma_prefetch(&maps.q);
            tma_prefetch(&maps.k);
            tma_prefetch(&maps.d_o);
            tma_prefetch(&maps.dv);
            int s = 0, vec = 0;
            uint32_t phase = 1, qk_phase = 1;
            for (int job = blockIdx.x; job < jobs; job += gridDim.x) {
                const int chunk = job / p.hk, kh = job % p.hk;
                const Chunk c = p.chunks[chunk];
                if (c.len == 0) continue;
                for (int m = 0; m < group; m++) {
                    const int h = p.mod ? kh + m * p.hk : kh * group + m;
                    const long long at = (long long)chunk * p.hv + h;
                    // The next tile's slot, once it is free.
                    auto take = [&](uint32_t bytes) {
                        mbar_wait(empty + 8 * s, phase, p.hung, HUNG_PRODUCER + s);
                        mbar_expect(full + 8 * s, bytes);
                    };
                    auto next = [&] {
                        if (++s == SLOTS) s = 0, phase ^= 1;
                    };
                    take(PARTS * PANEL + 2048);
                    bulk_load(base + s * M::SLOT, p.news + at * PARTS * PANEL, PARTS * PANEL, full + 8 * s);
                    bulk_load(base + M::VEC + vec * 2048, p.images + at * GRAD_BYTES + GRAD_VEC, 2048, full + 8 * s);
                    next();
                    take(PARTS * PANEL);
                    for (int x = 0; x < PARTS; x++) tma_load(base + s * M::SLOT + x * PANEL, &maps.d_o, h * V + 64 * x, c.token, full + 8 * s);
                    next();
                    if (m == 0) {
                        mbar_wait(qk_empty, qk_phase, p.hung, HUNG_PRODUCER + 0x20);
                        mbar_expect(qk_full, 2 * (K / 64) * PANEL);
                        for (int x = 0; x < K / 64; x++) {
                            tma_load(base + M::KT + x * PANEL, &maps.k, kh * K + 64 * x, c.token, qk_full);
                            tma_load(base + M::Q + x * PANEL, &maps.q, kh * K + 64 * x, c.token, qk_full);
                        }
                        qk_phase ^= 1;
                    }
                    for (int x = 0; x < PARTS; x++) {
                        take(K / 64 * PANEL);
                        const char* from = p.dstates + (at * PARTS + x) * kept_bytes(K);
                        bulk_load(base + s * M::SLOT, from, K / 64 * PANEL, full + 8 * s);
                        next();
                    }
                    take(PARTS * PANEL);
                    for (int x = 0; x < PARTS; x++) tma_load(base + s * M::SLOT + x * PANEL, &maps.dv, h * V + 64 * x, c.token, full + 8 * s);
                    next();
                    for (int x = 0; x < PARTS; x++) {
                        take(K / 64 * PANEL);
                        const char* from = p.states + (at * PARTS + x) * kept_bytes(K);
                        bulk_load(base + s * M::SLOT, from, K / 64 * PANEL, full + 8 * s);
                        next();
                    }
                    if (++vec == 3) vec = 0;
                }
            }
        }
        return;
    }

    regs_up<240>();
    const bool of_k = warpgroup == 1;
    const int i = lane >> 2, j = lane & 3, row0 = 16 * warp + i, row1 = row0 + 8;
    const uint32_t sk = base + M::KT, sq = base + M::Q, e1 = base + M::E1;
    uint32_t position = 0;  // of the value head's first tile, modulo two rounds of the ring: slot and parity of the round
    int vec_at = 0;
    uint32_t parity = 0, qk_phase = 0;  // parity: of the value heads so far

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
    auto clear = [&](char* tile, int panels, int len) {
#pragma unroll 1
        for (int x = 0; x < panels; x++) clear_rows(smem_addr(tile) + x * PANEL, len, tid, WARPGROUP);
        fence_proxy();
        bar_sync(1 + warpgroup, WARPGROUP);
    };

    for (int job = blockIdx.x; job < jobs; job += gridDim.x) {
        const int chunk = job / p.hk, kh = job % p.hk;
        const int token = p.chunks[chunk].token, len = p.chunks[chunk].len;
        if (len == 0) continue;

        mbar_wait(qk_full, qk_phase, p.hung, HUNG_CONSUMER + 16 * warpgroup + 15);
        qk_phase ^= 1;
        if (len < CHUNK) {
            clear(smem + (of_k ? M::KT : M::Q), K / 64, len);
            bar_sync(3, 2 * WARPGROUP);
        }
        // Q K^T or K K^T, raw.
        float own[32], sum[K / 2];
        wgmma_fence();
#pragma unroll
        for (int x = 0; x < K / 64; x++) multiply_panels<E, 0, 0>(own, (of_k ? sk : sq) + x * PANEL, sk + x * PANEL, x > 0);
        wgmma_commit();
#pragma unroll
        for (int n = 0; n < K / 2; n++) sum[n] = 0.f;
        wgmma_wait<0>();
        hold(own);

        for (int m = 0; m < group; m++) {
            const int h = p.mod ? kh + m * p.hk : kh * group + m;
            const float* vec = (const float*)(smem + M::VEC + vec_at * 2048);
            float* sums = (float*)(smem + M::SUMS + parity * 4096);
            float tile[32];  // M1 or M2, or 64 columns of what is [64, K]: the sums over the heads leave no room for all of them
            uint32_t packed[16];

            // What the tile of M1 or M2 becomes: E1 or D, packed; its sums over rows and columns.
            auto work_up = [&] {
                const float norm0 = of_k ? vec[VEC_RK + row0] : p.scale * vec[VEC_RQ + row0];
                const float norm1 = of_k ? vec[VEC_RK + row1] : p.scale * vec[VEC_RQ + row1];
                const float c0 = vec[VEC_C + row0], c1 = vec[VEC_C + row1];
                float rows0 = 0.f, rows1 = 0.f, columns[16];
                const float* own_columns = vec + 2 * j;
                const int below = row0 - 2 * j - (of_k ? 1 : 0);  // K K^T is taken below the diagonal
#pragma unroll
                for (int b = 0; b < 8; b++) {
                    const float2 c = *(const float2*)(own_columns + VEC_C + 8 * b), beta = *(const float2*)(own_columns + VEC_BETA + 8 * b);
                    const float2 rk = *(const float2*)(own_columns + VEC_RK + 8 * b);
                    float g[4];
                    g[0] = below >= 8 * b ? exp2_fast(c0 - c.x) * rk.x * norm0 * tile[4 * b] : 0.f;
                    g[1] = below >= 8 * b + 1 ? exp2_fast(c0 - c.y) * rk.y * norm0 * tile[4 * b + 1] : 0.f;
                    g[2] = below >= 8 * b - 8 ? exp2_fast(c1 - c.x) * rk.x * norm1 * tile[4 * b + 2] : 0.f;
                    g[3] = below >= 8 * b - 7 ? exp2_fast(c1 - c.y) * rk.y * norm1 * tile[4 * b + 3] : 0.f;
                    float f[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) f[e] = g[e] * own[4 * b + e];
                    columns[2 * b] = f[0] + f[2], columns[2 * b + 1] = f[1] + f[3];
                    rows0 += beta.x * f[0] + beta.y * f[1], rows1 += beta.x * f[2] + beta.y * f[3];
                    const float x = of_k ? -beta.x : beta.x, y = of_k ? -beta.y : beta.y;
                    packed[2 * b] = E::pack(x * g[0], y * g[1]), packed[2 * b + 1] = E::pack(x * g[2], y * g[3]);
                    // Or the vectors' numbers of all blocks are loaded at once.
                    hold(packed[2 * b]);
                }
                rows0 = quad_sum(rows0), rows1 = quad_sum(rows1);
                float* to = sums + (of_k ? SUM_ROW2 : SUM_ROW1);
                if (j == 0) to[row0] = rows0, to[row1] = rows1;
                store_columns(sums + (of_k ? SUM_COL2 : SUM_COL1) + 64 * warp, columns, i, j);
                store_transposed(of_k ? base + M::D : e1, packed, warp, lane);
                fence_proxy();
            };
            // <dS', S>, half of the columns each; the low bits of the next part are on their way while one is summed.
            const long long kept = ((long long)chunk * p.hv + h) * PARTS * kept_bytes(K) + K / 64 * PANEL;
            Low<E, K> low;
            auto load_low = [&](int x) { low.load(p.dstates + kept + x * kept_bytes(K), p.states + kept + x * kept_bytes(K), warpgroup, tid, counts(vec[VEC_LAST])); };
            auto last_dot = [&] {
                float dot = 0.f;
#pragma unroll
                for (int x = 0; x < PARTS; x++) {
                    const Low<E, K> own = low;
                    if (x + 1 < PARTS) load_low(x + 1);
                    dot += kept_dot<E, K>(smem + slot(TILE_DS + x) * M::SLOT, smem + slot(TILE_S + x) * M::SLOT, own, warpgroup, tid);
                }
#pragma unroll
                for (int step = 1; step < 32; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
                if (lane == 0) sums[SUM_LAST + 4 * warpgroup + warp] = dot;
            };
            // x = left times the tiles from `right` on, [64, K] by panels: its factors `add` to the sum of dQ or dK, and its rows' products with
            // those of Q or K, times `dot`, to `to`.
            auto take = [&](auto trans, int left, int right, const char* rows, float dot0, float dot1, float add0, float add1, float* to) {
                float dots[2] = {0.f, 0.f};
#pragma unroll
                for (int y = 0; y < K / 64; y++) {
                    wgmma_fence();
#pragma unroll
                    for (int x = 0; x < PARTS; x++) multiply_panels<E, trans, 1>(tile, place(left) + x * PANEL, place(right + x) + y * PANEL, x > 0);
                    wgmma_commit();
                    wgmma_wait<0>();
                    hold(tile);
                    row_dots<E, 64>(dots, tile, rows + y * PANEL, row0, j);
#pragma unroll
                    for (int b = 0; b < 8; b++) {
                        float* at = sum + 32 * y + 4 * b;
                        at[0] += add0 * tile[4 * b], at[1] += add0 * tile[4 * b + 1], at[2] += add1 * tile[4 * b + 2], at[3] += add1 * tile[4 * b + 3];
                    }
                }
                const float lo = dot0 * quad_sum(dots[0]), hi = dot1 * quad_sum(dots[1]);
                if (j == 0) to[row0] = lo, to[row1] = hi;
            };

            await(TILE_E);
            if (of_k) {
                give(TILE_DO);
#pragma unroll 1
                for (int x = 0; x < PARTS; x++) await(TILE_DS + x);
                // e^(c_C - c) rk: what is left of K behind the chunk, without beta.
                const float left0 = exp2_fast(vec[VEC_TOTAL] - vec[VEC_C + row0]) * vec[VEC_RK + row0];
                const float left1 = exp2_fast(vec[VEC_TOTAL] - vec[VEC_C + row1]) * vec[VEC_RK + row1];
                take(Int<1>{}, TILE_E, TILE_DS, smem + M::KT, left0, left1, vec[VEC_STATE + row0], vec[VEC_STATE + row1], sums + SUM_Z);
            }
            const int x_tile = of_k ? TILE_DV : TILE_DO;
            await(x_tile);
            if (len < CHUNK) clear(smem + slot(x_tile) * M::SLOT, PARTS, len);
            wgmma_fence();
#pragma unroll
            for (int x = 0; x < PARTS; x++) multiply_panels<E, 0, 1>(tile, place(x_tile) + x * PANEL, place(TILE_E) + x * PANEL, x > 0);
            wgmma_commit();
            wgmma_wait<0>();
            hold(tile);
            give(TILE_E);
            work_up();
            if (!of_k) {
                __syncwarp();
                warp_arrive(e1_full, lane);
            }
            bar_sync(1 + warpgroup, WARPGROUP);
            if (of_k) {
                mbar_wait(e1_full, parity, p.hung, HUNG_CONSUMER + 16 * warpgroup + 14);
                hold(sum);
                wgmma_fence();
                multiply_panels<E, 1, 1>(sum, base + M::D, sk, 1);
                multiply_panels<E, 0, 1>(sum, base + M::D, sk, 1);
                multiply_panels<E, 0, 1>(sum, e1, sq, 1);
                wgmma_commit();
                wgmma_wait<0>();
                hold(sum);
            } else {
                hold(sum);
                wgmma_fence();
                multiply_panels<E, 1, 1>(sum, e1, sk, 1);
                wgmma_commit();
                wgmma_wait<0>();
                hold(sum);
            }
#pragma unroll 1
            for (int x = 0; x < PARTS; x++) await(TILE_S + x);
            load_low(0);
            {
                const float* at = vec + (of_k ? VEC_IN : VEC_OUT) + row0;
                const float sign = of_k ? -1.f : 1.f, lo = at[0], hi = at[8];
                take(Int<0>{}, x_tile, TILE_S, smem + (of_k ? M::KT : M::Q), lo, hi, sign * lo, sign * hi, sums + (of_k ? SUM_U : SUM_Q));
            }
            if (!of_k) {
#pragma unroll 1
                for (int x = 0; x < PARTS; x++) await(TILE_DS + x);
            }
            last_dot();
            // All products of this head have read their tiles.
            __syncwarp();
            if (!of_k) give(TILE_DO);
#pragma unroll
            for (int x = 0; x < PARTS; x++) give(TILE_DS + x), give(TILE_S + x);
            give(TILE_DV);
            bar_sync(3, 2 * WARPGROUP);

            if (!of_k && warp == 0) {
                // dbeta and dc, two tokens a lane; dg is the sum of dc from a token to the chunk's end.
                float dc[2];
                const float2 beta = *(const float2*)(vec + VEC_BETA + 2 * lane);
                float z_all = 0.f, dbeta[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int row = 2 * lane + e;
                    const float b = e ? beta.y : beta.x, z = sums[SUM_Z + row];
                    float column = 0.f;
#pragma unroll
                    for (int w = 0; w < 4; w++) column += sums[SUM_COL1 + 64 * w + row] - sums[SUM_COL2 + 64 * w + row];
                    dbeta[e] = z + column;
                    z_all += b * z;
                    dc[e] = (sums[SUM_ROW1 + row] - sums[SUM_ROW2 + row]) - b * dbeta[e] + (sums[SUM_Q + row] - sums[SUM_U + row]);
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
                const long long at = (long long)(token + 2 * lane) * p.hv + h;
                if (2 * lane < len) p.dg[at] = after, p.dbeta[at] = dbeta[0];
                if (2 * lane + 1 < len) p.dg[at + p.hv] = after - dc[0], p.dbeta[at + p.hv] = dbeta[1];
            }
            position += PER_HEAD;
            if (position >= 2 * SLOTS) position -= 2 * SLOTS;
            if (++vec_at == 3) vec_at = 0;
            parity ^= 1;
        }

        const float* norm = !p.l2norm ? nullptr : (const float*)(smem + M::VEC + (vec_at + 2) % 3 * 2048) + (of_k ? VEC_RK : VEC_RQ);
        char* const to = of_k ? (char*)p.dk + (token * p.dk_stride + (long long)kh * K) * 2 : (char*)p.dq + (token * p.dq_stride + (long long)kh * K) * 2;
        store_rows<E, K>(sum, smem + (of_k ? M::KT : M::Q), norm, to, of_k ? p.dk_stride : p.dq_stride, len, warp, lane);
        fence_proxy();
        __syncwarp();
        warp_arrive(qk_empty, lane);
    }
}

}  // namespace hopper
