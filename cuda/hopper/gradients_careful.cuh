// `gradients_careful`: what `gradients` makes, of the chunks and key heads in which sums cancel (CANCELS of forward.cuh), whose value heads
// `gradients` leaves alone; beside it. There what rounding e, dV, dS' and E1 leaves shows in dq, dk, dg and dbeta, and is multiplied, too:
//   M1 = dO (e + e_lo)^T      M2 = dV (e + e_lo)^T + dV_lo e^T      dK: (e + e_lo) dS'^T + e dS_lo'^T      dQ: (E1 + E1_lo) K
// and dbeta_i is dV_i . e_i / beta_i, as z_i and the sum over a column of F, each of which is large, cancel.
//
// Two warpgroups with 64 of the 128 columns of dQ and dK each, as there; 0 also has M1, 1 M2. One thread asks for what a value head needs, and all
// wait for it: mostly every block finds nothing to do, so this is to be short, not fast.
#pragma once
#include "gradients.cuh"

namespace hopper {

// Shared memory, in bytes from a base on 1024.
//   K, Q               of the chunk, until dK, dQ, which take their places, have left
//   E to DS_LO         of a value head, until all products of them have ended
//   S, low bits        the same, over DS_LO, E_LO and DV_LO, when these have been multiplied
//   E1, E1_LO, D       written by 0 and by 1, read by both
//   SUMS, OWN, NORMS   as in gradients.cuh; dV_i . e_i
template <int K, int V>
struct CarefulSmem {
    static constexpr int TILE = V / 64 * PANEL, STATE = V / 64 * (K / 64) * PANEL;
    static constexpr int KT = 0;
    static constexpr int Q = KT + K / 64 * PANEL;
    static constexpr int E = Q + K / 64 * PANEL;
    static constexpr int E_LO = E + TILE;
    static constexpr int DV = E_LO + TILE;
    static constexpr int DV_LO = DV + TILE;
    static constexpr int DO = DV_LO + TILE;
    static constexpr int DS = DO + TILE;
    static constexpr int DS_LO = DS + STATE;
    static constexpr int E1 = DS_LO + STATE;
    static constexpr int E1_LO = E1 + PANEL;
    static constexpr int D = E1_LO + PANEL;
    static constexpr int VEC = D + PANEL;
    static constexpr int SUMS = VEC + 2048;
    static constexpr int OWN = SUMS + 4160;
    static constexpr int NORMS = OWN + 256;
    static constexpr int BARRIERS = NORMS + 1024;
    static constexpr int BYTES = BARRIERS + 64 + 1024;
    static_assert(K == 128 && V <= K, "halves of 64 columns");
    static_assert(BYTES <= 232448, "shared memory of a block");
};

template <class E, int K, int V>
__device__ __forceinline__ void gradients_careful(const GradientArgs& p, const GradientMaps& maps) {
    // Mostly that is all: there is nothing.
    const int places = p.chunk_count * p.hk;
    bool any = false;
    for (int n = blockIdx.x + threadIdx.x * gridDim.x; n < places; n += 2 * WARPGROUP * gridDim.x) any |= p.cancels[n] != 0;
    if (uniform(__syncthreads_or(any)) == 0) return;

    DYNAMIC_SHARED(smem_raw);
    char* smem = align_1024(smem_raw);
    using M = CarefulSmem<K, V>;
    constexpr int PARTS = V / 64, PANELS = K / 64;
    const int warpgroup = uniform(threadIdx.x / WARPGROUP), tid = threadIdx.x % WARPGROUP, warp = tid >> 5, lane = tid & 31;
    const bool second = warpgroup == 1;
    const int i = lane >> 2, j = lane & 3, row0 = 16 * warp + i, row1 = row0 + 8;
    const uint32_t base = smem_addr(smem), of_chunk = base + M::BARRIERS, of_head = of_chunk + 8, of_states = of_chunk + 16;
    const float* vec = (const float*)(smem + M::VEC);
    float *sums = (float*)(smem + M::SUMS), *own_sums = (float*)(smem + M::OWN);
    const int group = p.hv / p.hk;
    if (threadIdx.x == 0) {
        for (int n = 0; n < 3; n++) mbar_init(of_chunk + 8 * n, 1);
        mbar_init_fence();
    }
    __syncthreads();

    uint32_t chunk_phase = 0, head_phase = 0;
    for (int n = blockIdx.x; n < places; n += gridDim.x) {
        if (uniform(p.cancels[n]) == 0) continue;
        const int chunk = n / p.hk, kh = n % p.hk;
        const int token = p.chunks[chunk].token, len = p.chunks[chunk].len;
        if (threadIdx.x == 0) {
            mbar_expect(of_chunk, 2 * PANELS * PANEL);
            for (int x = 0; x < PANELS; x++) {
                tma_load(base + M::KT + x * PANEL, &maps.k, kh * K + 64 * x, token, of_chunk);
                tma_load(base + M::Q + x * PANEL, &maps.q, kh * K + 64 * x, token, of_chunk);
            }
        }
        const char *k_rows = smem + M::KT + warpgroup * PANEL, *q_rows = smem + M::Q + warpgroup * PANEL;  // the warpgroup's columns
        float dq[32], dk[32];
#pragma unroll
        for (int x = 0; x < 32; x++) dq[x] = dk[x] = 0.f;

        for (int m = 0; m < group; m++) {
            const int h = p.mod ? kh + m * p.hk : kh * group + m;
            const long long at = (long long)chunk * p.hv + h;
            if (threadIdx.x == 0) {
                mbar_expect(of_head, 5 * M::TILE + 2 * M::STATE + 2048);
                const char* rests = p.rests + at * PARTS * (PANELS + 1) * PANEL;
                bulk_load(base + M::VEC, p.images + at * GRAD_BYTES + GRAD_VEC, 2048, of_head);
                bulk_load(base + M::E, p.news + at * M::TILE, M::TILE, of_head);
                bulk_load(base + M::E_LO, p.lows + (1 + (long long)p.places * p.hv) * GRAD_LOW_BYTES + at * M::TILE, M::TILE, of_head);
                for (int x = 0; x < PARTS; x++) {
                    tma_load(base + M::DV + x * PANEL, &maps.dv, h * V + 64 * x, token, of_head);
                    tma_load(base + M::DO + x * PANEL, &maps.d_o, h * V + 64 * x, token, of_head);
                    bulk_load(base + M::DS + x * PANELS * PANEL, p.dstates + (at * PARTS + x) * kept_bytes(K), PANELS * PANEL, of_head);
                    bulk_load(base + M::DS_LO + x * PANELS * PANEL, rests + x * (PANELS + 1) * PANEL, PANELS * PANEL, of_head);
                    bulk_load(base + M::DV_LO + x * PANEL, rests + (x * (PANELS + 1) + PANELS) * PANEL, PANEL, of_head);
                }
            }
            if (m == 0) {
                mbar_wait(of_chunk, chunk_phase, p.hung, HUNG_CONSUMER + 1);
                chunk_phase ^= 1;
            }
            mbar_wait(of_head, head_phase, p.hung, HUNG_CONSUMER + 2);
            if (len < CHUNK) {
                // Rows behind the sequence's end are another's.
#pragma unroll 1
                for (int x = 0; x < PANELS; x++)
                    if (m == 0) clear_rows(base + (second ? M::KT : M::Q) + x * PANEL, len, tid, WARPGROUP);
#pragma unroll 1
                for (int x = 0; x < PARTS; x++) clear_rows(base + (second ? M::DV : M::DO) + x * PANEL, len, tid, WARPGROUP);
                fence_proxy();
                __syncthreads();
            }

            float own[32], tile[32], other[32];
            wgmma_fence();
            // Q K^T or K K^T, raw; M1 or M2.
#pragma unroll
            for (int x = 0; x < PANELS; x++) multiply_panels<E, 0, 0>(own, base + (second ? M::KT : M::Q) + x * PANEL, base + M::KT + x * PANEL, x > 0);
#pragma unroll
            for (int x = 0; x < PARTS; x++) {
                const uint32_t left = base + (second ? M::DV : M::DO) + x * PANEL;
                multiply_panels<E, 0, 1>(tile, left, base + M::E + x * PANEL, x > 0);
                multiply_panels<E, 0, 1>(tile, left, base + M::E_LO + x * PANEL, 1);
            }
            if (second) {
#pragma unroll
                for (int x = 0; x < PARTS; x++) multiply_panels<E, 1, 1>(tile, base + M::DV_LO + x * PANEL, base + M::E + x * PANEL, 1);
            }
            // e dS'^T.
#pragma unroll
            for (int x = 0; x < PARTS; x++) {
                const uint32_t right = x * PANELS * PANEL + warpgroup * PANEL;
                multiply_panels<E, 1, 1>(other, base + M::E + x * PANEL, base + M::DS + right, x > 0);
                multiply_panels<E, 1, 1>(other, base + M::E_LO + x * PANEL, base + M::DS + right, 1);
                multiply_panels<E, 1, 1>(other, base + M::E + x * PANEL, base + M::DS_LO + right, 1);
            }
            wgmma_commit();
            wgmma_wait<0>();
            hold(own);
            hold(tile);
            hold(other);

            // The tile of M1 or M2 becomes E1 or D; its sums over rows and columns, and M2's diagonal.
            {
                if (second && j == i >> 1) {
#pragma unroll
                    for (int x = 0; x < 4; x++)
                        if (x == warp) own_sums[row0] = i & 1 ? tile[8 * x + 1] : tile[8 * x], own_sums[row1] = i & 1 ? tile[8 * x + 7] : tile[8 * x + 6];
                }
                const float* own_rows = vec + (second ? VEC_CK : VEC_CQ);
                const float c0 = own_rows[row0], c1 = own_rows[row1];
                float rows0 = 0.f, rows1 = 0.f, columns[16];
                const int below = row0 - 2 * j - (second ? 1 : 0);  // K K^T is taken below the diagonal
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    uint32_t packed[4], low[4];
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int b = 2 * s + half;
                        const float2 c = *(const float2*)(vec + VEC_C + 8 * b + 2 * j), beta = *(const float2*)(vec + VEC_BETA + 8 * b + 2 * j);
                        float g[4], f[4];
                        g[0] = below >= 8 * b ? exp2_fast(c0 - c.x) * tile[4 * b] : 0.f;
                        g[1] = below >= 8 * b + 1 ? exp2_fast(c0 - c.y) * tile[4 * b + 1] : 0.f;
                        g[2] = below >= 8 * b - 8 ? exp2_fast(c1 - c.x) * tile[4 * b + 2] : 0.f;
                        g[3] = below >= 8 * b - 7 ? exp2_fast(c1 - c.y) * tile[4 * b + 3] : 0.f;
#pragma unroll
                        for (int e = 0; e < 4; e++) f[e] = g[e] * own[4 * b + e];
                        columns[2 * b] = f[0] + f[2], columns[2 * b + 1] = f[1] + f[3];
                        rows0 += beta.x * f[0] + beta.y * f[1], rows1 += beta.x * f[2] + beta.y * f[3];
                        const float x = second ? -beta.x : beta.x, y = second ? -beta.y : beta.y;
                        packed[2 * half] = E::pack(x * g[0], y * g[1]), packed[2 * half + 1] = E::pack(x * g[2], y * g[3]);
                        low[2 * half] = pack_rest<E>(x * g[0], y * g[1]), low[2 * half + 1] = pack_rest<E>(x * g[2], y * g[3]);
                    }
                    store_transposed(base + (second ? M::D : M::E1), packed, s, warp, lane);
                    if (!second) store_transposed(base + M::E1_LO, low, s, warp, lane);
                }
                rows0 = quad_sum(rows0), rows1 = quad_sum(rows1);
                float* to = sums + (second ? SUM_ROW2 : SUM_ROW1);
                if (j == 0) to[row0] = rows0, to[row1] = rows1;
                store_columns(sums + (second ? SUM_COL2 : SUM_COL1) + 64 * warp, columns, i, j);
            }
            fence_proxy();
            // All products of what S and the low bits take the place of have ended, E1 and D are there.
            __syncthreads();
            const bool low = KEEPS_LOW<E> && counts(vec[VEC_LAST]);
            if (threadIdx.x == 0) {
                mbar_expect(of_states, M::STATE + (low ? 2 * M::TILE : 0));
                for (int x = 0; x < PARTS; x++) {
                    const char *s = p.states + (at * PARTS + x) * kept_bytes(K), *ds = p.dstates + (at * PARTS + x) * kept_bytes(K);
                    bulk_load(base + M::DS_LO + x * PANELS * PANEL, s, PANELS * PANEL, of_states);
                    if (low) {
                        bulk_load(base + M::E_LO + x * PANEL, ds + PANELS * PANEL, PANEL, of_states);
                        bulk_load(base + M::DV_LO + x * PANEL, s + PANELS * PANEL, PANEL, of_states);
                    }
                }
            }
            float* row_sums = sums + 64 * warpgroup;
            auto take = [&](const float (&x)[32], float (&sum)[32], const char* rows, float dot0, float dot1, float add0, float add1, float* to) {
                take_product<E>(x, sum, rows, dot0, dot1, add0, add1, to, row0, j);
            };
            take(other, dk, k_rows, exp2_fast(vec[VEC_TOTAL] - vec[VEC_C + row0]), exp2_fast(vec[VEC_TOTAL] - vec[VEC_C + row1]), vec[VEC_STATE + row0],
                 vec[VEC_STATE + row1], row_sums + SUM_Z);
            mbar_wait(of_states, head_phase, p.hung, HUNG_CONSUMER + 3);
            head_phase ^= 1;

            // dV S^T and dO S^T; (D + D^T) K, E1^T Q and E1 K.
            hold(dk);
            hold(dq);
            wgmma_fence();
#pragma unroll
            for (int x = 0; x < PARTS; x++) {
                const uint32_t right = base + M::DS_LO + x * PANELS * PANEL + warpgroup * PANEL;
                multiply_panels<E, 0, 1>(tile, base + M::DV + x * PANEL, right, x > 0);
                multiply_panels<E, 0, 1>(other, base + M::DO + x * PANEL, right, x > 0);
            }
            {
                const uint32_t k_own = base + M::KT + warpgroup * PANEL, q_own = base + M::Q + warpgroup * PANEL;
                multiply_panels<E, 1, 1>(dk, base + M::D, k_own, 1);
                multiply_panels<E, 0, 1>(dk, base + M::D, k_own, 1);
                multiply_panels<E, 0, 1>(dk, base + M::E1, q_own, 1);
                multiply_panels<E, 1, 1>(dq, base + M::E1, k_own, 1);
                multiply_panels<E, 1, 1>(dq, base + M::E1_LO, k_own, 1);
            }
            wgmma_commit();
            wgmma_wait<0>();
            hold(tile);
            hold(other);
            hold(dk);
            hold(dq);
            {
                const float lo = vec[VEC_IN + row0], hi = vec[VEC_IN + row1];
                take(tile, dk, k_rows, lo, hi, -lo, -hi, row_sums + SUM_U);
            }
            {
                const float lo = vec[VEC_OUT + row0], hi = vec[VEC_OUT + row1];
                take(other, dq, q_rows, lo, hi, lo, hi, row_sums + SUM_Q);
            }
            // <dS', S>, half of the columns each.
            float dot = 0.f;
#pragma unroll 1
            for (int x = 0; x < PARTS; x++) {
                const int a = M::DS + x * PANELS * PANEL, b = M::DS_LO + x * PANELS * PANEL;
                if (low)
                    dot += kept_dot<E, K>(smem + a, smem + b, base + M::E_LO + x * PANEL, base + M::DV_LO + x * PANEL, warpgroup, tid);
                else
                    dot += panel_dot<E>(base + a + warpgroup * PANEL, base + b + warpgroup * PANEL, tid);
            }
#pragma unroll
            for (int step = 1; step < 32; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
            if (lane == 0) sums[SUM_LAST + 4 * warpgroup + warp] = dot;
            __syncthreads();
            if (threadIdx.x < 32) store_gates(p, sums, vec, token, len, h, lane, own_sums);
            // Before the next head's tiles and sums.
            __syncthreads();
        }

        if (p.l2norm) {
            // Less the parts along the rows of q and k, whose products with dq and dk both warpgroups have a half of.
            float* to = (float*)(smem + M::NORMS);
            auto leave = [&](const float (&x)[32], const char* rows, float* to) {
                float dots[2] = {0.f, 0.f};
                row_dots<E, 64>(dots, x, rows, row0, j);
                const float lo = quad_sum(dots[0]), hi = quad_sum(dots[1]);
                if (j == 0) to[row0] = lo, to[row1] = hi;
            };
            leave(dq, q_rows, to + 128 * warpgroup);
            leave(dk, k_rows, to + 128 * warpgroup + 64);
            __syncthreads();
            auto along = [&](int which, int row) {
                // The square of the norm, from twice its power.
                const float ck = vec[VEC_CK + row], c = vec[VEC_C + row];
                const float n2 = which ? exp2_fast(ck - c) : exp2_fast(2.f * vec[VEC_CQ + row] - (ck + c)) / (p.scale * p.scale);
                return n2 * (to[64 * which + row] + to[128 + 64 * which + row]);
            };
            less_along<E>(dq, q_rows, along(0, row0), along(0, row1), row0, j);
            less_along<E>(dk, k_rows, along(1, row0), along(1, row1), row0, j);
            __syncthreads();
        }
        const uint32_t q_own = base + M::Q + warpgroup * PANEL, k_own = base + M::KT + warpgroup * PANEL;
        put_half<E>(dq, q_own, warp, lane);
        put_half<E>(dk, k_own, warp, lane);
        bar_sync(1 + warpgroup, WARPGROUP);
        const int column = kh * K + 64 * warpgroup;
        store_part(q_own, (char*)p.dq + (token * p.dq_stride + column) * 2, p.dq_stride, len, tid);
        store_part(k_own, (char*)p.dk + (token * p.dk_stride + column) * 2, p.dk_stride, len, tid);
        fence_proxy();
        // Before the next chunk's K, Q and tiles.
        __syncthreads();
    }
}

}  // namespace hopper
