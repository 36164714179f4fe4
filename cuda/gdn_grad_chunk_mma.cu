// What the gradients inside a chunk are made of, for one value head, on the matrix units: gdn_grad_chunk.cu says what.
//
//   dP = lower(dO N^T)     dL = -strictlower(X N^T)
//
// 2 warps; warp w has rows 16 w to 16 w + 15 of both products as sums. A lane takes four numbers of a row at a time, 16 of them being
// two steps of a product, straight from memory: nothing is read twice but N, by both warps.
#include "grad_chunk.cuh"
#include "tiles.cuh"

struct Shared {
    float e[C], r_dl[C], of_v[C], of_u[C];  // sums over the columns of a row
    float column[2][C];                     // parts of sum_i E_ij
};

template <class T>
__device__ __forceinline__ void grad_chunk(const row::gdn_grad_chunk::Launch& l) {
    SHARED(Shared, s);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 head = cell.y, hv = l.p.hv, dk = l.c.dk, dv = l.c.dv;
    const uint4 chunk = chunk_of(l.m.chunks, cell.x);
    const u32 len = chunk.y;
    const size_t v0 = l.p.v_off + (size_t)chunk.x * l.p.v_stride + (size_t)head * dv;
    const size_t do0 = l.p.do_off + (size_t)chunk.x * l.p.do_stride + (size_t)head * dv;
    const size_t dv0 = l.p.dv_off + (size_t)chunk.x * l.p.dv_stride + (size_t)head * dv;
    const size_t index = (size_t)cell.x * hv + head, u0 = index * saved_numbers(dk, dv) + (size_t)dk * dv;
    float* ws = (float*)l.m.ws + index * WS_LONG;
    const float* u_saved = (const float*)l.m.saved + u0;   // U, then N [C, V]
    const float* n_saved = u_saved + (size_t)C * dv;
    const float* x_saved = (const float*)l.m.dsaved + u0;  // X [C, V]

    // Before the triangles are cut: d[n][e] at row 16 w + g + 8 (e / 2), column 8 n + 2 t + e % 2
    float dp[C / 8][4], dl[C / 8][4];
#pragma unroll
    for (u32 n = 0; n < C / 8; n++) clear(dp[n]), clear(dl[n]);
    const u32 rows[2] = {16 * warp + g, 16 * warp + g + 8};
    const float beta[2] = {ws[WS_BETA + rows[0]], ws[WS_BETA + rows[1]]};
    float of_v[2] = {0.f, 0.f}, of_u[2] = {0.f, 0.f};  // parts of X_i . (V - U)_i and dv_i . U_i
    for (u32 step = 0; step < dv; step += 16) {
        const u32 c = step + 4 * t;
        float4 o[2], x[2];
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            o[h] = four(0.f), x[h] = four(0.f);
            const size_t i = rows[h];
            if (i < len) {
                o[h] = load4<T>(l.m.d_o, do0 + i * l.p.do_stride + c);
                x[h] = *(const float4*)(x_saved + i * dv + c);
                const float4 u = *(const float4*)(u_saved + i * dv + c), v = load4<T>(l.m.v, v0 + i * l.p.v_stride + c);
                const float4 own = beta[h] * x[h];
                of_v[h] = add_dot(of_v[h], x[h], v - u);
                of_u[h] = add_dot(of_u[h], own, u);
                store4<T>(l.m.dv, dv0 + i * l.p.dv_stride + c, own);
            }
        }
        u32 left_o[2][4], left_x[2][4];
        left_2(left_o, o[0], o[1]);
        left_2(left_x, x[0], x[1]);
#pragma unroll
        for (u32 n = 0; n < C / 8; n++)
            // Above the diagonal there is nothing.
            if (8 * n < 16 * (warp + 1)) {
                u32 b[2][2];
                right_2(b, *(const float4*)(n_saved + (size_t)(8 * n + g) * dv + c));
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    mma_tf32(dp[n], left_o[i], b[i]);
                    mma_tf32(dl[n], left_x[i], b[i]);
                }
            }
    }

    // Every E_ij is one number, whichever sum it goes into: where a gate forgets fast the two sums cancel.
    float column[C / 8][2];
#pragma unroll
    for (u32 n = 0; n < C / 8; n++) column[n][0] = column[n][1] = 0.f;
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        const u32 i = rows[h];
        const RowFactors factors = row_factors(ws, i);
        float e = 0.f, r_dl = 0.f;
#pragma unroll
        for (u32 n = 0; n < C / 8; n++)
#pragma unroll
            for (u32 c = 0; c < 2; c++) {
                const u32 j = 8 * n + 2 * t + c;
                const Share x = take_number(ws, l.p.scale, factors, i, j, dp[n][2 * h + c], dl[n][2 * h + c]);
                e += x.e;
                r_dl += x.r_dl;
                column[n][c] += x.e;
            }
        // Over the lanes of a row.
        e = sum_lanes<1, 2>(e), r_dl = sum_lanes<1, 2>(r_dl);
        of_v[h] = sum_lanes<1, 2>(of_v[h]), of_u[h] = sum_lanes<1, 2>(of_u[h]);
        if (t == 0) s.e[i] = e, s.r_dl[i] = r_dl, s.of_v[i] = of_v[h], s.of_u[i] = of_u[h];
    }
    // Over the lanes of a column.
#pragma unroll
    for (u32 n = 0; n < C / 8; n++)
#pragma unroll
        for (u32 c = 0; c < 2; c++) {
            const float sum = sum_lanes<4, 16>(column[n][c]);
            if (g == 0) s.column[warp][8 * n + 2 * t + c] = sum;
        }
    __syncthreads();
    const u32 i = threadIdx.x;
    if (i < C) {
        ws[WS_DC + i] = s.e[i] - (s.column[0][i] + s.column[1][i]) - s.of_u[i];
        ws[WS_DBETA + i] = s.of_v[i] + s.r_dl[i];
    }
}

KERNEL(gdn_grad_chunk_mma_f16, gdn_grad_chunk, THREADS) { grad_chunk<F16>(l); }
KERNEL(gdn_grad_chunk_mma_bf16, gdn_grad_chunk, THREADS) { grad_chunk<Bf16>(l); }
