// What the kernels of gdn_grad_chunk share: what becomes of dP and dL, once their products are there.
#pragma once
#include "chunk.cuh"

constexpr u32 THREADS = 64;

// What a number of dP and of dL adds to sums: E_ij, and dL_ij R_ij.
struct Share {
    float e = 0.f, r_dl = 0.f;
};

// Row i's factors.
struct RowFactors {
    float rk, rq, beta;
};
__device__ __forceinline__ RowFactors row_factors(const float* ws, u32 i) { return {ws[WS_RK + i], ws[WS_RQ + i], ws[WS_BETA + i]}; }

// dP and -dL at (i, j), before the triangles are cut: P becomes s rq_i rk_j G_ij dP_ij, R becomes D + D^T with
// D_ij = beta_i rk_i rk_j G_ij dL_ij.
__device__ __forceinline__ Share take_number(float* ws, float scale, RowFactors row, u32 i, u32 j, float dp, float dl) {
    Share x;
    if (j > i) return x;
    const u32 at = i * C + j;
    const float gate = ws[WS_G + at] * ws[WS_RK + j];
    x.e = dp * ws[WS_P + at];
    ws[WS_P + at] = scale * row.rq * gate * dp;
    if (j < i) {
        x.r_dl = -ws[WS_R + at] * dl;
        x.e += row.beta * x.r_dl;
        const float both = -row.beta * row.rk * gate * dl;
        ws[WS_R + at] = both;
        ws[WS_R + j * C + i] = both;
    }
    return x;
}
