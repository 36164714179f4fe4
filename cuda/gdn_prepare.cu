// What a chunk needs before the state is known: A, P, u, o, n and gamma_C for one key head and all its value heads.
//
//   A = (I + strictlower(diag(beta) G o (rk K)(rk K)^T))^-1 diag(beta)     P = s (rq Q)(rk K)^T o G
//   u = gamma rk     o = s gamma rq     n = (gamma_C / gamma) rk
//
// 64 threads form an 8 x 8 grid; thread (ti, tj) holds the 4 x 4 blocks of K K^T and Q K^T at row 4 ti, column 4 tj in registers.
// The gates are applied per value head, then each column of the inverse is solved by one thread.
#include "prepare.cuh"

constexpr u32 EDGE = C / 8;
constexpr u32 DEPTH = 4;  // width of a staged slice of q and k, in fours
// One four between blocks of rows, so that threads that read EDGE rows apart do not meet in a bank.
constexpr u32 SIDE = C * DEPTH + 8;
__device__ __forceinline__ u32 tile_at(u32 row) { return row * DEPTH + row / EDGE; }

struct Shared {
    float4 q[SIDE];  // [C, DEPTH]
    float4 k[SIDE];  // [C, DEPTH]
    float lower[C * C];         // L [C, C]
    float inverse[C * (C + 1)]; // (I + L)^-1 [C, C + 1]
    Tokens tokens;
};

// kk = K K^T, qk = Q K^T [EDGE, EDGE] of this thread; the inverse norms of all rows go to shared memory.
template <class T>
__device__ __forceinline__ void products(const row::gdn_prepare::Launch& l, Shared& s, uint4 chunk, u32 head_k, float (&kk)[EDGE][EDGE],
                                         float (&qk)[EDGE][EDGE]) {
    const u32 lane = threadIdx.x, ti = lane / 8, tj = lane % 8, len = chunk.y, dk = l.c.dk;
    const size_t q0 = l.p.q_off + (size_t)chunk.x * l.p.q_stride + (size_t)head_k * dk;
    const size_t k0 = l.p.k_off + (size_t)chunk.x * l.p.k_stride + (size_t)head_k * dk;
#pragma unroll
    for (u32 a = 0; a < EDGE; a++)
#pragma unroll
        for (u32 b = 0; b < EDGE; b++) kk[a][b] = qk[a][b] = 0.f;
    float sum_q = 0.f, sum_k = 0.f;
    for (u32 depth = 0; depth < dk; depth += 4 * DEPTH) {
        __syncthreads();
        for (u32 e = lane; e < C * DEPTH; e += THREADS) {
            const u32 row = e / DEPTH, col = depth + 4 * (e % DEPTH);
            const bool valid = row < len;
            s.q[tile_at(row) + e % DEPTH] = valid ? load4<T>(l.m.q, q0 + (size_t)row * l.p.q_stride + col) : four(0.f);
            s.k[tile_at(row) + e % DEPTH] = valid ? load4<T>(l.m.k, k0 + (size_t)row * l.p.k_stride + col) : four(0.f);
        }
        __syncthreads();
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
#pragma unroll
            for (u32 b = 0; b < EDGE; b++) {
                const float4 right = s.k[tile_at(tj * EDGE + b) + d];
#pragma unroll
                for (u32 a = 0; a < EDGE; a++) {
                    kk[a][b] = add_dot(kk[a][b], s.k[tile_at(ti * EDGE + a) + d], right);
                    qk[a][b] = add_dot(qk[a][b], s.q[tile_at(ti * EDGE + a) + d], right);
                }
            }
        }
        if (lane < C) {
#pragma unroll
            for (u32 d = 0; d < DEPTH; d++) {
                const float4 q = s.q[tile_at(lane) + d], k = s.k[tile_at(lane) + d];
                sum_q = add_dot(sum_q, q, q);
                sum_k = add_dot(sum_k, k, k);
            }
        }
    }
    if (lane < C) {
        s.tokens.norm_q[lane] = inverse_norm(l.c.l2norm, sum_q);
        s.tokens.norm_k[lane] = inverse_norm(l.c.l2norm, sum_k);
    }
}

// One column of the inverse, and what goes with it. x_i = e_i - sum_(m < i) L_im x_m: a thread reads only the column it wrote.
__device__ __forceinline__ void solve(const row::gdn_prepare::Launch& l, Shared& s, float* ws, u32 len) {
    const u32 j = threadIdx.x;
    if (j >= C) return;
    const bool valid = j < len;
    const float beta = s.tokens.beta[j];
    for (u32 i = 0; i < C; i++) {
        float x = i == j ? 1.f : 0.f;
        for (u32 m = 0; m < i; m++) x = fmaf(-s.lower[i * C + m], s.inverse[m * (C + 1) + j], x);
        s.inverse[i * (C + 1) + j] = x;
        const bool inside = valid && i < len;
        ws[WS_A + i * C + j] = inside ? x * beta : 0.f;
        if (l.c.grad) ws[WS_B + i * C + j] = inside ? x : 0.f;
    }
    store_token(l, s.tokens, ws, j, len);
}

template <class T>
__device__ __forceinline__ void prepare(const row::gdn_prepare::Launch& l) {
    SHARED(Shared, s);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, ti = lane / 8, tj = lane % 8, head_k = cell.y;
    const uint4 chunk = chunk_of(l.m.chunks, cell.x);
    const u32 len = chunk.y, hv = l.p.hv;
    if (len == 0) return;
    float kk[EDGE][EDGE], qk[EDGE][EDGE];
    products<T>(l, s, chunk, head_k, kk, qk);
    __syncthreads();
    if (ti == tj) {
#pragma unroll
        for (u32 a = 0; a < EDGE; a++) {
            const u32 i = ti * EDGE + a;
            s.tokens.square_k[i] = s.tokens.norm_k[i] * s.tokens.norm_k[i] * kk[a][a];
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
        for (u32 a = 0; a < EDGE; a++) {
            const u32 i = ti * EDGE + a;
#pragma unroll
            for (u32 b = 0; b < EDGE; b++) {
                const u32 j = tj * EDGE + b;
                const Entry x = entry_of(l, s.tokens, i, j, len, kk[a][b], qk[a][b]);
                s.lower[i * C + j] = x.lower;
                ws[WS_P + i * C + j] = x.p;
                if (l.c.grad) {
                    ws[WS_G + i * C + j] = x.gate;
                    ws[WS_R + i * C + j] = x.r;
                }
            }
        }
        __syncthreads();
        solve(l, s, ws, len);
    }
}

KERNEL(gdn_prepare_f32, gdn_prepare, THREADS) { prepare<F32>(l); }
KERNEL(gdn_prepare_f16, gdn_prepare, THREADS) { prepare<F16>(l); }
KERNEL(gdn_prepare_bf16, gdn_prepare, THREADS) { prepare<Bf16>(l); }
