// P of a chunk, which the scan makes of the Q and K that it has in shared memory anyway: by a warpgroup that does nothing else, while
// consumers are at U, N and S.
//
//   P_ij = s rq_i e^(c_i - c_j) rk_j q_i.k_j for i >= j
//
// e^(c_i - c_j) rk_j is one power of two, of what `prepare` leaves. rq is made here, and with it s e^c rq, the rows' factor of S Q^T.
#pragma once
#include "image.cuh"

namespace hopper {

// Q, K [64, K] as panels and the image's vectors at `vec`; P to `to`, in columns of 16 like A (`load_low` of scan.cuh), and what its rounding
// leaves to `rest_to` the same way, if LOW. What lies above the diagonal's blocks is left alone.
template <class E, int K, int COLUMNS, bool LOW>
__device__ __forceinline__ void scores(uint32_t q, uint32_t key, uint32_t vec, uint32_t to, uint32_t rest_to, float scale, bool l2norm, int warp, int lane) {
    const int i = lane >> 2, j = lane & 3;
    const uint64_t tile_q = desc_k_major(uniform(q)), tile_k = desc_k_major(uniform(key));
    // Of the thread's rows, 16 warp + i and 8 further on: c, and s rq. Shared memory answers late while products read it, and so do shuffles: all
    // that is read is asked for at once, and before products are.
    const uint32_t rows_at = vec + 4 * (VEC_OUT + 16 * warp + i);
    const float c0 = shared_f32(rows_at), c1 = shared_f32(rows_at + 32);
    float f0 = scale, f1 = scale;
    if (l2norm) {  // two lanes have a row of the warp's 16
        const float f = rsqrtf(half_square<E, K>(q, 16 * warp + lane / 2, lane % 2) + 1e-6f);
        f0 *= __shfl_sync(~0u, f, 2 * i), f1 *= __shfl_sync(~0u, f, 2 * i + 16);
    }
    // Lane l addresses row l % 8 of block l / 8: (rows, columns) (0, 0), (8, 0), (0, 8), (8, 8).
    const uint32_t at = (2 * warp + ((lane >> 3) & 1)) * 256 + (lane >> 4) * 128 + (lane & 7) * 16;
#pragma unroll 1
    for (int from = 0; from < 64; from += COLUMNS) {
        // Columns `from` on of Q K^T: beside two consumers registers are left for half of them at once.
        float qk[COLUMNS / 2];
        float2 ck[COLUMNS / 8];
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) ck[n] = shared_f32x2(vec + 4 * (VEC_KEYS + from + 8 * n + 2 * j));
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < K / 16; s++) {
            const uint32_t step = (s / 4) * PANEL + (s % 4) * 32;
            E::mma_ss(qk, desc_step(tile_q, step), desc_step(tile_k, step + from * 128), s > 0);
        }
        wgmma_commit();
        if (from == 0) {
            __syncwarp();
            if (j == 0) shared_put_f32(rows_at, exp2_fast(c0) * f0), shared_put_f32(rows_at + 32, exp2_fast(c1) * f1);
        }
        // What 16 columns are multiplied by: while they are made, if there are registers.
        auto powers = [&](int x, float* y) {
#pragma unroll
            for (int n = 0; n < 2; n++, y += 4) {
                const float2 k = ck[2 * x + n];
                y[0] = f0 * exp2_fast(c0 - k.x), y[1] = f0 * exp2_fast(c0 - k.y), y[2] = f1 * exp2_fast(c1 - k.x), y[3] = f1 * exp2_fast(c1 - k.y);
            }
        };
        constexpr bool EARLY = COLUMNS == 64;
        float by[EARLY ? COLUMNS / 2 : 8];
        if constexpr (EARLY) {
#pragma unroll
            for (int x = 0; x < COLUMNS / 16; x++)
                if (x <= warp) powers(x, by + 8 * x);
        }
        wgmma_wait<0>();
        hold(qk);
#pragma unroll
        for (int x = 0; x < COLUMNS / 16; x++) {
            const int block = from / 16 + x;
            if (block > warp) continue;
            float* y = EARLY ? by + 8 * x : by;
            if constexpr (!EARLY) powers(x, y);
            // Above the diagonal powers may be infinite. There lie of a block on it: of rows i, columns beyond i, and all from 8 on; of rows 8 + i, columns
            // beyond 8 + i.
            const bool diagonal = block == warp, first = diagonal && 2 * j > i, second = diagonal && 2 * j + 1 > i;
#pragma unroll
            for (int e = 0; e < 8; e++) y[e] *= qk[8 * x + e];
            y[0] = first ? 0.f : y[0], y[1] = second ? 0.f : y[1], y[4] = diagonal ? 0.f : y[4], y[5] = diagonal ? 0.f : y[5];
            y[6] = first ? 0.f : y[6], y[7] = second ? 0.f : y[7];
            stsm(to + block * 2048 + at, E::pack(y[0], y[1]), E::pack(y[2], y[3]), E::pack(y[4], y[5]), E::pack(y[6], y[7]));
            if constexpr (LOW)
                stsm(rest_to + block * 2048 + at, pack_rest<E>(y[0], y[1]), pack_rest<E>(y[2], y[3]), pack_rest<E>(y[4], y[5]), pack_rest<E>(y[6], y[7]));
        }
    }
}

}  // namespace hopper
