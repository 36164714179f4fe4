// The gates of the operator from their projections, and their gradients.
#include "common.cuh"

// g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b)
KERNEL(gate, gate, MOST_THREADS) {
    const float* ab = (const float*)l.m.ab;  // [T, stride]
    const float* a_log = (const float*)l.m.a_log;
    const float* dt_bias = (const float*)l.m.dt_bias;
    float* g = (float*)l.m.g;        // [T, Hv]
    float* beta = (float*)l.m.beta;  // [T, Hv]
    const size_t first = (size_t)cell_of(l).x * l.c.block, end = min((size_t)l.p.tokens * l.p.hv, first + l.c.block);
    for (size_t i = first + threadIdx.x; i < end; i += blockDim.x) {
        const size_t t = i / l.p.hv, h = i - t * l.p.hv, row = t * l.p.stride + h;
        g[i] = -expf(a_log[h]) * softplus(ab[l.p.a_off + row] + dt_bias[h]);
        beta[i] = sigmoid(ab[l.p.b_off + row]);
    }
}

// da = -exp(A_log) sigmoid(a + dt_bias) dg, db = sigmoid(b) sigmoid(-b) dbeta, and the sums of dA_log and ddt_bias over the tokens of
// a cell; a thread walks them for one head.
KERNEL(gate_grad, gate_grad, MOST_THREADS) {
    const uint3 cell = cell_of(l);
    const u32 h = cell.x * blockDim.x + threadIdx.x, hv = l.p.hv;
    if (h >= hv) return;
    const float* ab = (const float*)l.m.ab;        // [T, stride]
    const float* dg = (const float*)l.m.dg;        // [T, Hv]
    const float* dbeta = (const float*)l.m.dbeta;  // [T, Hv]
    float* dab = (float*)l.m.dab;                  // [T, d_stride]
    float* part = (float*)l.m.part + (size_t)cell.y * 2 * hv + h;
    const float rate = -expf(((const float*)l.m.a_log)[h]), bias = ((const float*)l.m.dt_bias)[h];
    const size_t first = (size_t)cell.y * l.p.block, end = min((size_t)l.p.tokens, first + l.p.block);
    float sum_a_log = 0.f, sum_bias = 0.f;
    for (size_t t = first; t < end; t++) {
        const size_t row = t * l.p.stride + h, d_row = t * l.p.d_stride + h;
        const float a = ab[l.p.a_off + row] + bias, b = ab[l.p.b_off + row], d = rate * dg[t * hv + h];
        // Above 20, where softplus is the identity, sigmoid is 1.
        const float da = d * sigmoid(a);
        dab[l.p.da_off + d_row] = da;
        // 1 - sigmoid(b) would lose the digits of a small difference.
        dab[l.p.db_off + d_row] = sigmoid(b) * sigmoid(-b) * dbeta[t * hv + h];
        sum_a_log += d * softplus(a);
        sum_bias += da;
    }
    part[0] = sum_a_log;
    part[hv] = sum_bias;
}
