// What a chunk needs before the state is known, for one key head and all its value heads, as gdn_prepare.cu says it, with K K^T and
// Q K^T on the matrix units: products of stored numbers are exact there.
//
// 2 warps; warp w has rows 16 w to 16 w + 15 of both products as sums. The inverse is f32 throughout, in blocks of 16:
//
//   [ P 0 ]^-1   [       P^-1         0   ]
//   [ R Q ]    = [ -Q^-1 R P^-1     Q^-1 ]
#include "prepare.cuh"
#include "tiles.cuh"

constexpr u32 B = 16;        // side of a block
constexpr u32 SIDE = C + 4;  // between rows: eight rows of four numbers lie in all banks

template <u32 K>
struct Shared {
    union {
        // Until both products are there.
        struct {
            Rows<K> q, k;
        };
        // From then on, per value head.
        struct {
            alignas(16) float lower[C * SIDE];    // L [C, C]; then R P^-1 in its upper right block
            alignas(16) float inverse[C * SIDE];  // (I + L)^-1 [C, C], but for its upper right block
        };
    };
    Tokens tokens;
};

// Warp w: the inverse of block w of the diagonal, a column each of its first 16 threads. x_i = e_i - sum_(m < i) L_im x_m
__device__ __forceinline__ void invert_blocks(const float* lower, float* inverse) {
    const u32 first = threadIdx.x / 32 * B, column = threadIdx.x % 32;
    if (column >= B) return;
    float x[B];
#pragma unroll
    for (u32 i = 0; i < B; i++) {
        x[i] = i == column ? 1.f : 0.f;
#pragma unroll
        for (u32 m = 0; m < i; m += 4) {
            const float4 row = *(const float4*)(lower + (first + i) * SIDE + first + m);
#pragma unroll
            for (u32 e = 0; e < 4; e++)
                if (m + e < i) x[i] = fmaf(-get(row, e), x[m + e], x[i]);
        }
        inverse[(first + i) * SIDE + first + column] = x[i];
    }
}

// Numbers 4 (threadIdx.x % 4) .. of row threadIdx.x / 4 of the product of two blocks
__device__ __forceinline__ float4 block_product(const float* a, const float* b) {
    const float* row = a + threadIdx.x / 4 * SIDE;
    float4 sum = four(0.f);
#pragma unroll
    for (u32 m = 0; m < B; m++) add(sum, row[m], *(const float4*)(b + m * SIDE + threadIdx.x % 4 * 4));
    return sum;
}

// inverse from lower
template <u32 K>
__device__ __forceinline__ void invert(Shared<K>& s) {
    const u32 own = threadIdx.x / 4 * SIDE + threadIdx.x % 4 * 4;
    invert_blocks(s.lower, s.inverse);
    __syncthreads();
    *(float4*)(s.lower + B + own) = block_product(s.lower + B * SIDE, s.inverse);
    __syncthreads();
    *(float4*)(s.inverse + B * SIDE + own) = -1.f * block_product(s.inverse + B * SIDE + B, s.lower + B);
    __syncthreads();
}

template <class T, u32 K>
__device__ __forceinline__ void prepare(const row::gdn_prepare::Launch& l) {
    typedef Shared<K> Tiles;
    SHARED(Tiles, s);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, head_k = cell.y, hv = l.p.hv;
    const uint4 chunk = chunk_of(l.m.chunks, cell.x);
    const u32 len = chunk.y;
    if (len == 0) return;
    const size_t q0 = l.p.q_off + (size_t)chunk.x * l.p.q_stride + (size_t)head_k * K;
    const size_t k0 = l.p.k_off + (size_t)chunk.x * l.p.k_stride + (size_t)head_k * K;
    s.q.template fetch<THREADS>(l.m.q, q0, l.p.q_stride, len);
    s.k.template fetch<THREADS>(l.m.k, k0, l.p.k_stride, len);
    copies_end();
    copies_wait<0>();
    __syncthreads();

    // kk = K K^T, qk = Q K^T: d[n][e] at row 16 w + g + 8 (e / 2), column 8 n + 2 t + e % 2
    float kk[C / 8][4], qk[C / 8][4];
#pragma unroll
    for (u32 n = 0; n < C / 8; n++) clear(kk[n]), clear(qk[n]);
    float sum_q[2] = {0.f, 0.f}, sum_k[2] = {0.f, 0.f};  // of squares, of rows g and g + 8
#pragma unroll 2
    for (u32 step = 0; step < K / 16; step++) {
        u32 q[4], k[4];
        const u32 row = 16 * warp + lane % 16, part = 2 * step + lane / 16;
        load_4(q, s.q.at(row, part));
        load_4(k, s.k.at(row, part));
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            const float2 x = unpack<T>(q[e]), y = unpack<T>(k[e]);
            sum_q[e % 2] += x.x * x.x + x.y * x.y;
            sum_k[e % 2] += y.x * y.x + y.y * y.y;
        }
#pragma unroll
        for (u32 n = 0; n < C / 8; n += 2)
            // Above the diagonal there is nothing.
            if (8 * n < 16 * (warp + 1)) {
                u32 b[4];
                load_4(b, s.k.at(8 * n + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    const u32 pair[2] = {b[2 * i], b[2 * i + 1]};
                    mma_16<T>(kk[n + i], k, pair);
                    mma_16<T>(qk[n + i], q, pair);
                }
            }
    }
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        sum_q[h] = sum_lanes<1, 2>(sum_q[h]), sum_k[h] = sum_lanes<1, 2>(sum_k[h]);
        if (t == 0) {
            const u32 i = 16 * warp + g + 8 * h;
            const float norm = inverse_norm(l.c.l2norm, sum_k[h]);
            s.tokens.norm_q[i] = inverse_norm(l.c.l2norm, sum_q[h]);
            s.tokens.norm_k[i] = norm;
            s.tokens.square_k[i] = norm * norm * sum_k[h];
        }
    }

    for (u32 member = 0; member < l.c.group; member++) {
        const u32 head = value_head(head_k, member, l.p.hk, l.c.group, l.p.head_map);
        const size_t g0 = l.p.g_off + (size_t)chunk.x * hv + head;
        float* ws = (float*)l.m.ws + ((size_t)cell.x * hv + head) * (l.c.grad ? WS_LONG : WS_SHORT);
        __syncthreads();
        cumulate(s.tokens, (const float*)l.m.g + g0, (const float*)l.m.beta + g0, hv, len);
        __syncthreads();
#pragma unroll
        for (u32 n = 0; n < C / 8; n++)
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const u32 i = 16 * warp + g + 8 * h, j = 8 * n + 2 * t, at = i * C + j;
                const Entry x = entry_of(l, s.tokens, i, j, len, kk[n][2 * h], qk[n][2 * h]);
                const Entry y = entry_of(l, s.tokens, i, j + 1, len, kk[n][2 * h + 1], qk[n][2 * h + 1]);
                *(float2*)(s.lower + i * SIDE + j) = make_float2(x.lower, y.lower);
                *(float2*)(ws + WS_P + at) = make_float2(x.p, y.p);
                if (l.c.grad) {
                    *(float2*)(ws + WS_G + at) = make_float2(x.gate, y.gate);
                    *(float2*)(ws + WS_R + at) = make_float2(x.r, y.r);
                }
            }
        __syncthreads();
        invert(s);
        // A = (I + L)^-1 diag(beta)
#pragma unroll
        for (u32 e = threadIdx.x; e < C * C / 4; e += THREADS) {
            const u32 i = e / (C / 4), j = e % (C / 4) * 4;
            const float4 beta = *(const float4*)(s.tokens.beta + j);
            float4 x = four(0.f);
            if (i < len && (i >= B || j < B)) {
                x = *(const float4*)(s.inverse + i * SIDE + j);
                x = make_float4(j < len ? x.x : 0.f, j + 1 < len ? x.y : 0.f, j + 2 < len ? x.z : 0.f, j + 3 < len ? x.w : 0.f);
            }
            *(float4*)(ws + WS_A + 4 * e) = make_float4(x.x * beta.x, x.y * beta.y, x.z * beta.z, x.w * beta.w);
            if (l.c.grad) *(float4*)(ws + WS_B + 4 * e) = x;
        }
        if (threadIdx.x < C) store_token(l, s.tokens, ws, threadIdx.x, len);
    }
}

KERNEL(gdn_prepare_mma_f16_k64, gdn_prepare, THREADS) { prepare<F16, 64>(l); }
KERNEL(gdn_prepare_mma_f16_k128, gdn_prepare, THREADS) { prepare<F16, 128>(l); }
KERNEL(gdn_prepare_mma_bf16_k64, gdn_prepare, THREADS) { prepare<Bf16, 64>(l); }
KERNEL(gdn_prepare_mma_bf16_k128, gdn_prepare, THREADS) { prepare<Bf16, 128>(l); }
