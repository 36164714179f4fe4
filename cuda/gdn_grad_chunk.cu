// What the gradients inside a chunk are made of, for one value head; and dg, dbeta from what it leaves.
//
//   dP = lower(dO N^T)     dL = -strictlower(X N^T)     E = dP o P + diag(beta) R o dL
//   dv = beta o X          dbeta_i = X_i . (V - U)_i + sum_j dL_ij R_ij
//   dc_i = -dv_i . U_i + sum_j E_ij - sum_j E_ji
//
// 64 threads form an 8 x 8 grid; thread (ti, tj) holds the 4 x 4 block of dP and dL at row 4 ti, column 4 tj in registers while dO, N
// and X pass through shared memory in slices of V.
#include "grad_chunk.cuh"

constexpr u32 EDGE = C / 8;
constexpr u32 DEPTH = 4;                     // width of a staged slice, in fours
constexpr u32 STAGED = C * DEPTH / THREADS;  // places of a slice that a thread stages
constexpr u32 SIDE = C * DEPTH + 8;          // one four between blocks of rows: see gdn_prepare.cu
__device__ __forceinline__ u32 tile_at(u32 row) { return row * DEPTH + row / EDGE; }

struct Shared {
    float4 o[SIDE], n[SIDE], x[SIDE];  // dO, N, X [C, DEPTH]
    float2 of_v[C * DEPTH];            // parts of X_i . (V - U)_i and dv_i . U_i
    float2 of_row[C * 8];              // parts of sum_j E_ij and sum_j dL_ij R_ij
    float of_column[C * 8];            // parts of sum_i E_ij
};

template <class T>
__device__ __forceinline__ void grad_chunk(const row::gdn_grad_chunk::Launch& l) {
    SHARED(Shared, s);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, ti = lane / 8, tj = lane % 8, head = cell.y, hv = l.p.hv, dk = l.c.dk, dv = l.c.dv;
    const uint4 chunk = chunk_of(l.m.chunks, cell.x);
    const u32 len = chunk.y;
    const size_t v0 = l.p.v_off + (size_t)chunk.x * l.p.v_stride + (size_t)head * dv;
    const size_t do0 = l.p.do_off + (size_t)chunk.x * l.p.do_stride + (size_t)head * dv;
    const size_t dv0 = l.p.dv_off + (size_t)chunk.x * l.p.dv_stride + (size_t)head * dv;
    const size_t index = (size_t)cell.x * hv + head;
    float* ws = (float*)l.m.ws + index * WS_LONG;
    const size_t u0 = index * saved_numbers(dk, dv) + (size_t)dk * dv;
    const float4* u_saved = (const float4*)((const float*)l.m.saved + u0);  // U, then N [C, V / 4]
    const float4* n_saved = u_saved + C * (dv / 4);
    const float4* x_saved = (const float4*)((const float*)l.m.dsaved + u0);  // X [C, V / 4]

    float dp[EDGE][EDGE], dl[EDGE][EDGE];  // before the triangles are cut
#pragma unroll
    for (u32 a = 0; a < EDGE; a++)
#pragma unroll
        for (u32 b = 0; b < EDGE; b++) dp[a][b] = dl[a][b] = 0.f;
    float2 dots[STAGED];
#pragma unroll
    for (u32 e = 0; e < STAGED; e++) dots[e] = make_float2(0.f, 0.f);
    for (u32 slice = 0; slice < dv / 4; slice += DEPTH) {
        __syncthreads();
#pragma unroll
        for (u32 e = 0; e < STAGED; e++) {
            const u32 place = lane + e * THREADS, row = place / DEPTH, col = slice + place % DEPTH;
            float4 o = four(0.f), n = four(0.f), x = four(0.f);
            if (row < len) {
                o = load4<T>(l.m.d_o, do0 + (size_t)row * l.p.do_stride + 4 * col);
                n = n_saved[row * (dv / 4) + col];
                x = x_saved[row * (dv / 4) + col];
                const float4 u = u_saved[row * (dv / 4) + col], own = ws[WS_BETA + row] * x;
                const float4 v = load4<T>(l.m.v, v0 + (size_t)row * l.p.v_stride + 4 * col);
                dots[e].x = add_dot(dots[e].x, x, v - u);
                dots[e].y = add_dot(dots[e].y, own, u);
                store4<T>(l.m.dv, dv0 + (size_t)row * l.p.dv_stride + 4 * col, own);
            }
            const u32 at = tile_at(row) + place % DEPTH;
            s.o[at] = o, s.n[at] = n, s.x[at] = x;
        }
        __syncthreads();
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
#pragma unroll
            for (u32 b = 0; b < EDGE; b++) {
                const float4 right = s.n[tile_at(tj * EDGE + b) + d];
#pragma unroll
                for (u32 a = 0; a < EDGE; a++) {
                    dp[a][b] = add_dot(dp[a][b], s.o[tile_at(ti * EDGE + a) + d], right);
                    dl[a][b] = add_dot(dl[a][b], s.x[tile_at(ti * EDGE + a) + d], right);
                }
            }
        }
    }
#pragma unroll
    for (u32 e = 0; e < STAGED; e++) s.of_v[lane + e * THREADS] = dots[e];

    // Every E_ij is one number, whichever sum it goes into: where a gate forgets fast the two sums cancel.
    float column[EDGE];
#pragma unroll
    for (u32 b = 0; b < EDGE; b++) column[b] = 0.f;
#pragma unroll
    for (u32 a = 0; a < EDGE; a++) {
        const u32 i = ti * EDGE + a;
        const RowFactors factors = row_factors(ws, i);
        float2 row = make_float2(0.f, 0.f);
#pragma unroll
        for (u32 b = 0; b < EDGE; b++) {
            const Share x = take_number(ws, l.p.scale, factors, i, tj * EDGE + b, dp[a][b], dl[a][b]);
            row.x += x.e;
            row.y += x.r_dl;
            column[b] += x.e;
        }
        s.of_row[i * 8 + tj] = row;
    }
#pragma unroll
    for (u32 b = 0; b < EDGE; b++) s.of_column[(tj * EDGE + b) * 8 + ti] = column[b];
    __syncthreads();
    if (lane < C) {
        float of_v = 0.f, of_u = 0.f, e = 0.f, r_dl = 0.f, columns = 0.f;
        for (u32 i = 0; i < DEPTH; i++) of_v += s.of_v[lane * DEPTH + i].x, of_u += s.of_v[lane * DEPTH + i].y;
        for (u32 i = 0; i < 8; i++) {
            e += s.of_row[lane * 8 + i].x;
            r_dl += s.of_row[lane * 8 + i].y;
            columns += s.of_column[lane * 8 + i];
        }
        ws[WS_DC + lane] = e - columns - of_u;
        ws[WS_DBETA + lane] = of_v + r_dl;
    }
}

KERNEL(gdn_grad_chunk_f32, gdn_grad_chunk, THREADS) { grad_chunk<F32>(l); }

// dg_t = sum of dc_i over i >= t in the chunk, and dbeta. A thread has one value head.
KERNEL(gdn_grad_gates, gdn_grad_gates, 64) {
    const uint3 cell = cell_of(l);
    const u32 head = cell.y * 64 + threadIdx.x, hv = l.p.hv;
    if (head >= hv) return;
    const uint4 chunk = chunk_of(l.m.chunks, cell.x);
    const float* ws = (const float*)l.m.ws + ((size_t)cell.x * hv + head) * WS_LONG;
    const size_t out = l.p.g_off + (size_t)chunk.x * hv + head;
    float sum = 0.f;
    for (u32 i = chunk.y; i-- > 0;) {
        sum += ws[WS_DC + i];
        ((float*)l.m.dg)[out + (size_t)i * hv] = sum;
        ((float*)l.m.dbeta)[out + (size_t)i * hv] = ws[WS_DBETA + i];
    }
}
