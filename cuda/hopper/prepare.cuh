// `prepare`: A, P and the vectors of one chunk for all value heads of one key head.
//
// One warpgroup per (chunk, key head): K K^T and Q K^T once by wgmma, kept in registers; then per value head the gates, the
// inverse and the image. Grid: chunks x Hk. Blocks overlap each other (4 per SM); there are no roles.
//
// The inverse of I + L, L strictly lower [64, 64], by blocks of 16: diagonal blocks D_b by substitution in f32 (a thread per
// column), the others from top to bottom, X_bj = -D_b sum_m L_bm X_mj, by mma in TF32 (the mantissa of half, the range of f32),
// warp j taking block column j. It works on Y_b = X_bj^T, so that results are the next product's left operand in registers.
#pragma once
#include "forward.cuh"

namespace hopper {

// Shared memory, in bytes from a base on 1024. Lifetimes:
//   K, Q    loads .. the end of K K^T, Q K^T and the norms
//   L, D    the value heads; over K and Q
//   image   the value heads; each is stored before the next overwrites it
template <int K, bool GRAD = false>
struct PrepareSmem {
    static constexpr int L_STRIDE = 72;    // f32; 8 mod 32: pairs of 8 rows hit all banks
    static constexpr int D_STRIDE = 24;    // the same
    static constexpr int D_BLOCK = 16 * D_STRIDE + 16;
    static constexpr int L = 0;
    static constexpr int D = CHUNK * L_STRIDE * 4;
    static constexpr int END_LD = D + 4 * D_BLOCK * 4;
    static constexpr int TILES = 2 * CHUNK * K * 2;
    static constexpr int IMAGE = ((TILES > END_LD ? TILES : END_LD) + 1023) / 1024 * 1024;
    static constexpr int NORMS = IMAGE + (GRAD ? GRAD_BYTES : IMAGE_BYTES);  // f32: rk [64], rq [64], |k|^2 [64]
    static constexpr int GATES = NORMS + 768;          // f32, per value head: c log2(e) [64], beta [64]
    static constexpr int bytes(int group) { return GATES + group * 512 + 1024; }
};

// Column j and j + 4 of a product's left operand, and row j and j + 4 of its right one, are named 2j and 2j + 1 by all callers of
// mma_tf32: the sum does not mind, and a result's pairs of columns then fit as they are.

// acc [16, 16] += y b^T, y [16, 16] as a result, b [16, 16] f32 rows in shared memory.
__device__ __forceinline__ void mma_16(float (&acc)[2][4], const float (&y)[2][4], const float* b, int stride, int i, int j) {
#pragma unroll
    for (int s = 0; s < 2; s++) {
        uint32_t a[4] = {tf32(y[s][0]), tf32(y[s][2]), tf32(y[s][1]), tf32(y[s][3])};
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 x = *(const float2*)(b + (8 * n + i) * stride + 8 * s + 2 * j);
            mma_tf32(acc[n], a, tf32(x.x), tf32(x.y));
        }
    }
}

// I is the type of A and P. GRAD: the image of the backward, with C = (I + strictlower(G o K K^T) diag(beta))^-1: A = diag(beta) C.
template <class E, class I, int K, bool GRAD = false>
__device__ __forceinline__ void prepare(const PrepareArgs& p) {
    DYNAMIC_SHARED(smem_raw);
    char* smem = align_1024(smem_raw);
    using M = PrepareSmem<K, GRAD>;
    constexpr int PANELS = K / 64;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, i = lane >> 2, j = lane & 3;
    const int group = p.hv / p.hk;
    const int chunk = blockIdx.x / p.hk, kh = blockIdx.x % p.hk;
    const int token = p.chunks[chunk].token, len = p.chunks[chunk].len;
    if (len == 0) return;  // an empty place of the table

    const uint32_t sk = smem_addr(smem), sq = sk + PANELS * PANEL, image = smem_addr(smem + M::IMAGE);
    float* l = (float*)(smem + M::L);
    float* d = (float*)(smem + M::D);
    float* rk = (float*)(smem + M::NORMS);
    float *rq = rk + 64, *square = rk + 128;
    float* gates = (float*)(smem + M::GATES);

    // K and Q [64, K], rows past the chunk zero.
    {
        const char* q = (const char*)p.q + (token * p.q_stride + (long long)kh * K) * 2;
        const char* k = (const char*)p.k + (token * p.k_stride + (long long)kh * K) * 2;
        constexpr int UNITS = K / 8;
#pragma unroll
        for (int n = 0; n < CHUNK * UNITS / 128; n++) {
            int at = n * 128 + tid, row = at / UNITS, unit = at % UNITS;
            bool live = row < len;
            long long r = live ? row : 0;
            uint32_t to = swizzled((unit / 8) * PANEL, row, unit % 8);
            copy16(sk + to, k + r * p.k_stride * 2 + unit * 16, live);
            copy16(sq + to, q + r * p.q_stride * 2 + unit * 16, live);
        }
    }
    // Gates of all value heads: a warp sums 64 of them, two a lane.
    for (int m = warp; m < group; m += 4) {
        int h = p.mod ? kh + m * p.hk : kh * group + m;
        float x[2], b[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            int row = 2 * lane + n;
            bool live = row < len;
            long long at = (long long)(token + (live ? row : 0)) * p.hv + h;
            x[n] = live ? fmaxf(p.g[at], G_MIN) * LOG2E : 0.f;
            b[n] = live ? p.beta[at] : 0.f;
        }
        float pair = x[0] + x[1], sum = pair;
#pragma unroll
        for (int off = 1; off < 32; off *= 2) {
            float y = __shfl_up_sync(~0u, sum, off);
            if (lane >= off) sum += y;
        }
        // Not sum - pair, which would lose digits after a cliff.
        float before = __shfl_up_sync(~0u, sum, 1);
        if (lane == 0) before = 0.f;
        *(float2*)(gates + m * 128 + 2 * lane) = make_float2(before + x[0], sum);
        *(float2*)(gates + m * 128 + 64 + 2 * lane) = make_float2(b[0], b[1]);
    }
    copy_wait();
    fence_proxy();
    __syncthreads();

    // kk = K K^T, qk = Q K^T: rows 16 warp + i, + 8.
    float kk[32], qk[32];
    const uint64_t tile_k = desc_k_major(uniform(sk)), tile_q = desc_k_major(uniform(sq));
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < K / 16; s++) {
        uint64_t k = desc_step(tile_k, (s / 4) * PANEL + (s % 4) * 32);
        E::mma_ss(kk, k, k, s > 0);
    }
#pragma unroll
    for (int s = 0; s < K / 16; s++) {
        uint32_t at = (s / 4) * PANEL + (s % 4) * 32;
        E::mma_ss(qk, desc_step(tile_q, at), desc_step(tile_k, at), s > 0);
    }
    wgmma_commit();
    // Norms: a thread per row of K (0 to 63) and of Q (64 to 127).
    float norm = 1.f;
    if (p.l2norm) {
        float sum = 0.f;
        int row = tid & 63;
        uint32_t tile = (tid < 64 ? 0 : PANELS * PANEL);
#pragma unroll 4
        for (int u = 0; u < K / 8; u++) {
            uint4 x = *(const uint4*)(smem + tile + swizzled((u / 8) * PANEL, row, u % 8));
            const uint32_t w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int n = 0; n < 4; n++) sum += E::lo(w[n]) * E::lo(w[n]) + E::hi(w[n]) * E::hi(w[n]);
        }
        norm = rsqrtf(sum + 1e-6f);
    }
    (tid < 64 ? rk : rq)[tid & 63] = norm;
    wgmma_wait<0>();
    hold(kk);
    hold(qk);
    __syncthreads();

    // Fold the norms of both sides in, once for all heads.
    const int row0 = 16 * warp + i, row1 = row0 + 8;
    {
        float k0 = rk[row0], k1 = rk[row1], q0 = rq[row0] * p.scale, q1 = rq[row1] * p.scale;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            float2 c = *(const float2*)(rk + 8 * b + 2 * j);
            int col = 8 * b + 2 * j;
            kk[4 * b] *= k0 * c.x, kk[4 * b + 1] *= k0 * c.y, kk[4 * b + 2] *= k1 * c.x, kk[4 * b + 3] *= k1 * c.y;
            if (row0 == col) square[row0] = kk[4 * b];
            if (row0 == col + 1) square[row0] = kk[4 * b + 1];
            if (row1 == col) square[row1] = kk[4 * b + 2];
            if (row1 == col + 1) square[row1] = kk[4 * b + 3];
            qk[4 * b] *= q0 * c.x, qk[4 * b + 1] *= q0 * c.y, qk[4 * b + 2] *= q1 * c.x, qk[4 * b + 3] *= q1 * c.y;
        }
    }

    for (int m = 0; m < group; m++) {
        const int h = p.mod ? kh + m * p.hk : kh * group + m;
        const float* c = gates + m * 128;
        const float* beta = c + 64;
        // The image before has been read; all warps are past L and D.
        if (m > 0) {
            if (tid == 0) bulk_wait_read();
            __syncthreads();
        }
        // L = strictlower(beta_i G_ij kk_ij) to memory, P = G_ij qk_ij for i >= j to the image. GRAD: beta_j in both.
        {
            float c0 = c[row0], c1 = c[row1], b0 = beta[row0], b1 = beta[row1];
#pragma unroll
            for (int x = 0; x < 4; x++) {
                // Lane l addresses row l % 8 of block l / 8: (rows, columns) (0, 0), (8, 0), (0, 8), (8, 8).
                const int block = lane >> 3;
                const uint32_t whole = image + GRAD_P + swizzled(0, 16 * warp + (block & 1) * 8 + (lane & 7), 2 * x + (block >> 1));
                if (x > warp) {
                    if constexpr (GRAD) stsm(whole, 0, 0, 0, 0);
                    continue;
                }
                uint32_t lo[2], hi[2];
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    int col = 16 * x + 8 * n + 2 * j;
                    const float *y = kk + 8 * x + 4 * n, *z = qk + 8 * x + 4 * n;
                    float2 cc = *(const float2*)(c + col);
                    float g00 = row0 >= col ? exp2_fast(c0 - cc.x) : 0.f, g01 = row0 > col ? exp2_fast(c0 - cc.y) : 0.f;
                    float g10 = row1 >= col ? exp2_fast(c1 - cc.x) : 0.f, g11 = row1 > col ? exp2_fast(c1 - cc.y) : 0.f;
                    float b00 = b0, b01 = b0, b10 = b1, b11 = b1;
                    if constexpr (GRAD) {
                        float2 bb = *(const float2*)(beta + col);
                        b00 = b10 = bb.x, b01 = b11 = bb.y;
                    }
                    *(float2*)(l + row0 * M::L_STRIDE + col) =
                        make_float2(row0 > col ? b00 * g00 * y[0] : 0.f, row0 > col + 1 ? b01 * g01 * y[1] : 0.f);
                    *(float2*)(l + row1 * M::L_STRIDE + col) =
                        make_float2(row1 > col ? b10 * g10 * y[2] : 0.f, row1 > col + 1 ? b11 * g11 * y[3] : 0.f);
                    if constexpr (GRAD) g00 *= b00, g01 *= b01, g10 *= b10, g11 *= b11;
                    lo[n] = I::pack(row0 >= col ? g00 * z[0] : 0.f, row0 > col ? g01 * z[1] : 0.f);
                    hi[n] = I::pack(row1 >= col ? g10 * z[2] : 0.f, row1 > col ? g11 * z[3] : 0.f);
                }
                const int eighth = 2 * (warp - x) + (block & 1);
                stsm(GRAD ? whole : image + IMAGE_P + image_columns(x) + (2 * eighth + (block >> 1)) * 128 + (lane & 7) * 16, lo[0], hi[0], lo[1], hi[1]);
            }
        }
        __syncthreads();
        if (tid < 64) {
            // Column `col` of D_b: x_r = [r = col] - sum_(m < r) L_rm x_m.
            int b = tid >> 4, col = tid & 15;
            const float* lb = l + 16 * b * M::L_STRIDE + 16 * b;
            float x[16];
#pragma unroll
            for (int r = 0; r < 16; r++) {
                float sum = r == col ? 1.f : 0.f;
#pragma unroll
                for (int u = 0; u < r; u += 4) {
                    float4 y = *(const float4*)(lb + r * M::L_STRIDE + u);
                    sum -= y.x * x[u];
                    if (u + 1 < r) sum -= y.y * x[u + 1];
                    if (u + 2 < r) sum -= y.z * x[u + 2];
                    if (u + 3 < r) sum -= y.w * x[u + 3];
                }
                x[r] = sum;
                d[b * M::D_BLOCK + r * M::D_STRIDE + col] = sum;
            }
        } else {
            int row = tid - 64;
            float* vec = (float*)(smem + M::IMAGE + (GRAD ? GRAD_VEC : IMAGE_VEC));
            float last = c[63], e = exp2_fast(c[row]);
            vec[VEC_IN + row] = e * rk[row];
            vec[VEC_STATE + row] = row < len ? exp2_fast(last - c[row]) * rk[row] : 0.f;
            vec[VEC_OUT + row] = p.scale * e * rq[row];
            if constexpr (GRAD) {
                vec[VEC_STATE + row] *= beta[row];
                vec[VEC_C + row] = c[row], vec[VEC_BETA + row] = beta[row], vec[VEC_RK + row] = rk[row], vec[VEC_RQ + row] = rq[row];
            }
            bool grows = __any_sync(~0u, beta[row] * square[row] > 2.001f);
            if (row == 0) vec[VEC_LAST] = exp2_fast(last), vec[VEC_TOTAL] = last;
            if (lane == 0) vec[VEC_GROWS + row / 32] = grows;
        }
        __syncthreads();
        {
            // Block column `warp`: y[b] = X_(b, warp)^T.
            float y[4][2][4];
#pragma unroll
            for (int b = 0; b < 4; b++) {
                // The blocks (0, 0), (0, 8), (8, 0), (8, 8), stored transposed.
                const int block = lane >> 3;
                const uint32_t whole = image + GRAD_C + swizzled(0, 16 * b + (block >> 1) * 8 + (lane & 7), 2 * warp + (block & 1));
                if (b < warp) {
                    if constexpr (GRAD) stsm(whole, 0, 0, 0, 0);
                    continue;
                }
                if (b == warp) {
                    const float* db = d + b * M::D_BLOCK;
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const float* at = db + (8 * n + 2 * j) * M::D_STRIDE + i;
                        y[b][n][0] = at[0], y[b][n][1] = at[M::D_STRIDE];
                        y[b][n][2] = at[8], y[b][n][3] = at[M::D_STRIDE + 8];
                    }
                } else {
                    float t[2][4] = {};
#pragma unroll
                    for (int u = 0; u < b; u++)
                        if (u >= warp) mma_16(t, y[u], l + 16 * b * M::L_STRIDE + 16 * u, M::L_STRIDE, i, j);
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++) t[n][e] = -t[n][e], y[b][n][e] = 0.f;
                    mma_16(y[b], t, d + b * M::D_BLOCK, M::D_STRIDE, i, j);
                }
                const float b0 = GRAD ? 1.f : beta[16 * warp + i], b1 = GRAD ? 1.f : beta[16 * warp + i + 8];
                const int eighth = 2 * (b - warp) + (block >> 1);
                stsm_trans(GRAD ? whole : image + IMAGE_A + image_columns(warp) + (2 * eighth + (block & 1)) * 128 + (lane & 7) * 16,
                           I::pack(y[b][0][0] * b0, y[b][0][1] * b0), I::pack(y[b][0][2] * b1, y[b][0][3] * b1),
                           I::pack(y[b][1][0] * b0, y[b][1][1] * b0), I::pack(y[b][1][2] * b1, y[b][1][3] * b1));
            }
        }
        fence_proxy();
        __syncthreads();
        if (tid == 0) {
            constexpr int BYTES = GRAD ? GRAD_BYTES : IMAGE_BYTES;
            bulk_store(p.images + ((long long)chunk * p.hv + h) * BYTES, image, BYTES);
            bulk_commit();
        }
    }
    if (tid == 0) bulk_wait();
}

}  // namespace hopper
