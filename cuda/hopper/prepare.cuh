// `prepare`: A, P and the vectors of one chunk for all value heads of one key head.
//
// One warpgroup per (chunk, key head): K K^T and Q K^T once by wgmma, kept in registers; then per value head the gates, the
// inverse and the image. Grid: chunks x Hk. Blocks overlap each other (4 to 6 per SM); there are no roles. Where the scan makes P there is no Q.
#pragma once
#include "image.cuh"

namespace hopper {

// Shared memory, in bytes from a base on 1024. Lifetimes:
//   K[, Q]  loads .. the end of K K^T, Q K^T and the norms
//   L, D    the value heads; over K and Q. D twice: as it is, and behind L rounded to TF32, as L's blocks below the diagonal are
//   image   the value heads; each is stored before the next overwrites it
//   sums    of the four warps: of the key head, before the first value head .. behind its L; of a value head, behind its L
template <int K, bool GRAD = false, bool WITH_P = true>
struct PrepareSmem {
    static constexpr int L = 0;
    static constexpr int END_LD = L_BYTES + (GRAD ? 2 : 1) * R_BYTES;
    static constexpr int TILES = (WITH_P ? 2 : 1) * CHUNK * K * 2;
    static constexpr int IMAGE = ((TILES > END_LD ? TILES : END_LD) + 1023) / 1024 * 1024;
    static constexpr int NORMS = IMAGE + (GRAD ? GRAD_BYTES : WITH_P ? IMAGE_BYTES : KEYS_BYTES);  // f32: rk [64], rq [64], |k|^2 [64]
    static constexpr int SUMS = NORMS + 768;           // f32: [4] of the key head, [4] of a value head
    static constexpr int FULL = SUMS + 32;             // barrier: K and Q are there
    static constexpr int GATES = FULL + 16;            // f32, per value head: c log2(e) [64], beta [64]
    static constexpr int bytes(int group) { return GATES + group * 512; }
};

// GRAD: the image of the backward, with C = (I + strictlower(G o K K^T) diag(beta))^-1: A = diag(beta) C.
// ONE: as many key heads as value heads. WITH_P: or the scan makes P.
template <class E, int K, bool GRAD = false, bool ONE = false, bool WITH_P = true>
__device__ __forceinline__ void prepare(const PrepareArgs& p, const PrepareMaps& maps) {
    DYNAMIC_SHARED(smem_raw);
    // On 1024 already, behind the system's 1024 bytes, as there is no static shared memory: no room is left for rounding up. Without these words
    // ptxas spills.
    char* smem = align_1024(smem_raw);
    using M = PrepareSmem<K, GRAD, WITH_P>;
    constexpr int PANELS = K / 64, TILES = (WITH_P ? 2 : 1) * PANELS;
    constexpr Lie LIE = GRAD ? Lie::PANEL : Lie::IMAGE;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, i = lane >> 2, j = lane & 3;
    const int group = ONE ? 1 : p.hv / p.hk;
    const int chunk = blockIdx.x / p.hk, kh = blockIdx.x % p.hk;
    const int token = p.chunks[chunk].token, len = p.chunks[chunk].len;
    constexpr bool ASKS = GRAD ? ASKS_GRAD<E> : true;
    constexpr int LOW = GRAD ? GRAD_LOW_BYTES : LOW_BYTES;
    if constexpr (ASKS) {
        if (blockIdx.x == 0)
            for (int n = tid; n < LOW / 16; n += 128) *(uint4*)(p.lows + n * 16) = make_uint4(0, 0, 0, 0);
    }
    if (len == 0) {  // an empty place of the table
        if constexpr (ASKS && GRAD)
            if (tid == 0) p.cancels[blockIdx.x] = 0;
        return;
    }

    const uint32_t sk = smem_addr(smem), sq = sk + PANELS * PANEL, image = smem_addr(smem + M::IMAGE), full = smem_addr(smem + M::FULL);
    float* l = (float*)(smem + M::L);
    float* rk = (float*)(smem + M::NORMS);
    float *rq = rk + 64, *square = rk + 128;
    float* gates = (float*)(smem + M::GATES);

    // K [64, K], and Q
    if (warp == 0 && elect()) {
        mbar_init(full, 1);
        mbar_init_fence();
        mbar_expect(full, TILES * PANEL);
#pragma unroll
        for (int x = 0; x < PANELS; x++) {
            tma_load(sk + x * PANEL, &maps.k, kh * K + 64 * x, token, full);
            if constexpr (WITH_P) tma_load(sq + x * PANEL, &maps.q, kh * K + 64 * x, token, full);
        }
    }
    auto head_of = [&](int m) { return ONE ? kh : p.mod ? kh + m * p.hk : kh * group + m; };
    // Gates of all value heads: a warp sums 64 of them, two a lane.
    for (int m = warp; m < group; m += 4) {
        const int h = head_of(m);
        float x[2], b[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            int row = 2 * lane + n;
            bool live = row < len;
            long long at = (long long)(token + (live ? row : 0)) * p.hv + h;
            x[n] = live ? fmaxf(p.g[at], G_MIN) * LOG2E : 0.f;
            b[n] = live ? p.beta[at] : 0.f;
        }
        *(float2*)(gates + m * 128 + 2 * lane) = sum_gates(make_float2(x[0], x[1]), lane);
        *(float2*)(gates + m * 128 + 64 + 2 * lane) = make_float2(b[0], b[1]);
    }
    __syncthreads();
    mbar_wait(full, 0, nullptr, 0);
    // Behind the chunk lies what follows it in memory.
    if (len < CHUNK) {
        for (int x = 0; x < TILES; x++) clear_rows(sk + x * PANEL, len, tid, 128);
        fence_proxy();
        __syncthreads();
    }

    // kk = K K^T, qk = Q K^T: rows 16 warp + i, + 8.
    float kk[32], qk[WITH_P ? 32 : 1];
    const uint64_t tile_k = desc_k_major(uniform(sk));
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < K / 16; s++) {
        uint64_t k = desc_step(tile_k, (s / 4) * PANEL + (s % 4) * 32);
        E::mma_ss(kk, k, k, s > 0);
    }
    if constexpr (WITH_P) {
        const uint64_t tile_q = desc_k_major(uniform(sq));
#pragma unroll
        for (int s = 0; s < K / 16; s++) {
            uint32_t at = (s / 4) * PANEL + (s % 4) * 32;
            E::mma_ss(qk, desc_step(tile_q, at), desc_step(tile_k, at), s > 0);
        }
    }
    wgmma_commit();
    // Norms: of Q two threads a row, of K what the diagonal of K K^T says, which lies in blocks 2 warp and 2 warp + 1 of 8 columns.
    if constexpr (WITH_P) {
        if (p.l2norm) {
            const float sum = half_square<E, K>(sq, tid / 2, tid % 2);
            if (tid % 2 == 0) rq[tid / 2] = rsqrtf(sum + 1e-6f);
        } else if (tid < 64) {
            rq[tid] = 1.f;
        }
    }
    wgmma_wait<0>();
    hold(kk);
    hold(qk);
    const int row0 = 16 * warp + i, row1 = row0 + 8;
    float diagonal = 0.f;
#pragma unroll
    for (int x = 0; x < 4; x++)
        if (x == warp && j == i >> 1) {
            float d0 = i & 1 ? kk[8 * x + 1] : kk[8 * x], d1 = i & 1 ? kk[8 * x + 7] : kk[8 * x + 6];
            const float r0 = p.l2norm ? rsqrtf(d0 + 1e-6f) : 1.f, r1 = p.l2norm ? rsqrtf(d1 + 1e-6f) : 1.f;
            d0 *= r0 * r0, d1 *= r1 * r1;
            rk[row0] = r0, rk[row1] = r1;
            square[row0] = d0, square[row1] = d1;
            diagonal = d0 * d0 + d1 * d1;
        }
    __syncthreads();

    // Fold the norms of both sides in, once for all heads.
    fold_norms(kk, rk[row0], rk[row1], rk, j);
    if constexpr (WITH_P) fold_norms(qk, rq[row0] * p.scale, rq[row1] * p.scale, rk, j);
    // As G <= 1, no value head's sums cancel where those without gates do not: mostly none do, and nothing more is asked.
    float* sums = (float*)(smem + M::SUMS);
    auto positive = [](const float* x) {
        const float4 y = *(const float4*)x;
        return (y.x + y.y) + (y.z + y.w) > 0.f;
    };
    if constexpr (ASKS) share_sum(excess_without_gates<E>(kk, diagonal), sums, warp, lane);
    // Of the value head; GRAD: of any of the group.
    bool cancels = false;
    auto low_of = [&](int h) { return p.lows + (1 + (long long)chunk * p.hv + h) * LOW; };

    for (int m = 0; m < group; m++) {
        const int h = head_of(m);
        const float* c = gates + m * 128;
        const float* beta = c + 64;
        // The image before has been read; all warps are past L and D.
        if (m > 0) {
            if (tid == 0) bulk_wait_read();
            __syncthreads();
        }
        form<E, LIE>(kk, qk, c, beta, l, image + (GRAD ? GRAD_P : IMAGE_P), warp, lane);
        __syncthreads();
        if (tid < 64) {
            substitute<LIE>(l, tid);
        } else {
            int row = tid - 64;
            float* vec = (float*)(smem + M::IMAGE + (GRAD ? GRAD_VEC : IMAGE_VEC));
            row_factors<WITH_P>(vec, c, row, len, rk[row], WITH_P ? p.scale * rq[row] : 0.f);
            if constexpr (GRAD) {
                vec[VEC_STATE + row] *= beta[row];
                const float power = log2f(rk[row]);
                vec[VEC_C + row] = c[row] - power, vec[VEC_CK + row] = c[row] + power, vec[VEC_CQ + row] = c[row] + log2f(p.scale * rq[row]);
                vec[VEC_BETA + row] = beta[row];
            }
            bool grows = __any_sync(~0u, beta[row] * square[row] > 2.001f);
            if (lane == 0) vec[VEC_GROWS + row / 32] = grows;
        }
        __syncthreads();
        if constexpr (ASKS && GRAD) {
            // Of all value heads of the group at once, whose gradients are summed. The lane is asked anew, or it spills (`invert`).
            if (m == 0) {
                if (positive(sums))
                    for (int n = 0; n < group; n++) {
                        share_sum(excess<E>(kk, gates + n * 128, warp, lane_id()), sums + 4, warp, lane);
                        __syncthreads();
                        cancels = cancels || positive(sums + 4);
                        __syncthreads();
                    }
                if (tid == 0) p.cancels[blockIdx.x] = cancels;
            }
            if (cancels) form_rest<E, LIE>(qk, c, beta, low_of(h) + PANEL, warp, lane_id());
        } else if constexpr (ASKS) {
            cancels = positive(sums);
            if (cancels) {
                share_sum(excess<E>(kk, c, warp, ONE ? lane_id() : lane), sums + 4, warp, lane);
                __syncthreads();
                cancels = positive(sums + 4);
            }
            if (tid == 0) p.cancels[(long long)h * p.places + chunk] = cancels;
            if constexpr (WITH_P)
                if (cancels) form_rest<E>(qk, c, beta, low_of(h) + LOW_P, warp, lane);
            if constexpr (INVERTS_IN_PARTS<E>)
                if (cancels) {
                    form<E, LIE, true>(kk, qk, c, beta, l, image + IMAGE_P, warp, ONE ? lane_id() : lane);  // either way, the other spills
                    __syncthreads();
                }
        }
        const uint32_t a_at = image + (GRAD ? GRAD_C : IMAGE_A);
        if (ASKS && cancels)
            invert<E, LIE, ASKS>(l, beta, a_at, low_of(h) + (GRAD ? 0 : LOW_A), warp, lane);
        else
            invert<E, LIE>(l, beta, a_at, nullptr, warp, lane);
        fence_proxy();
        __syncthreads();
        if (tid == 0) {
            constexpr int BYTES = GRAD ? GRAD_BYTES : IMAGE_BYTES;
            bulk_store(p.images + ((long long)chunk * p.hv + h) * BYTES, image, WITH_P ? BYTES : KEYS_BYTES);
            bulk_commit();
        }
    }
    if (tid == 0) bulk_wait();
}

}  // namespace hopper
