// Norms over a row: RMS norm, the gated norm of the operator's output, and the gradients of the latter.
#include "reduce.cuh"

// y[r] = x[row0 + r] * rsqrt(mean(x[row0 + r]^2) + eps) * w
KERNEL(rms_norm, rms_norm, MOST_THREADS) {
    SHARED(Parts, parts);
    const size_t r = cell_of(l).x;
    const u32 dim = l.p.dim;
    const float* x = (const float*)l.m.x + (l.p.row0 + r) * dim;
    const float* w = (const float*)l.m.w;
    float* y = (float*)l.m.y + r * dim;
    float sum = 0.f;
    for (u32 i = threadIdx.x; i < dim; i += blockDim.x) sum = fmaf(x[i], x[i], sum);
    const float norm = 1.f / sqrtf(reduce_sum(sum, parts) / (float)dim + l.p.eps);
    for (u32 i = threadIdx.x; i < dim; i += blockDim.x) y[i] = x[i] * norm * w[i];
}

// y = o * rsqrt(mean(o^2) + eps) * w * silu(z) over the V numbers of a head.
KERNEL(gated_norm, gated_norm, MOST_THREADS) {
    SHARED(Parts, parts);
    const uint3 cell = cell_of(l);
    const u32 dv = l.c.dv;
    const size_t at = ((size_t)cell.y * l.p.hv + cell.x) * dv;
    const float* o = (const float*)l.m.o + at;
    const float* z = (const float*)l.m.z + l.p.z_off + (size_t)cell.y * l.p.z_stride + (size_t)cell.x * dv;
    const float* w = (const float*)l.m.w;
    float* y = (float*)l.m.y + at;
    float sum = 0.f;
    for (u32 i = threadIdx.x; i < dv; i += blockDim.x) sum = fmaf(o[i], o[i], sum);
    const float norm = 1.f / sqrtf(reduce_sum(sum, parts) / (float)dv + l.p.eps);
    for (u32 i = threadIdx.x; i < dv; i += blockDim.x) y[i] = o[i] * norm * w[i] * silu(z[i]);
}

// With r = rsqrt(mean(o^2) + eps) and u = dy w silu(z):
//   do = r u - r^3 mean(o u) o     dz = dy w o r silu'(z)     dw = sum over tokens and heads of dy o r silu(z)
// A block takes head after head of its cell, a thread the same columns of each.
constexpr u32 WIDE = 256 / 32;  // columns of a thread, for the widest head and the fewest threads

KERNEL(gated_norm_grad, gated_norm_grad, MOST_THREADS) {
    SHARED(Parts, parts);
    const size_t cell = cell_of(l).x;
    const u32 dv = l.c.dv, lane = threadIdx.x, lanes = blockDim.x;
    const float* w = (const float*)l.m.w;
    const size_t first = cell * l.p.block, end = min((size_t)l.p.tokens * l.p.hv, first + l.p.block);

    float weight[WIDE], dweight[WIDE];
#pragma unroll
    for (u32 k = 0; k < WIDE; k++) {
        const u32 i = k * lanes + lane;
        weight[k] = i < dv ? w[i] : 0.f;
        dweight[k] = 0.f;
    }
    for (size_t row = first; row < end; row++) {
        const size_t t = row / l.p.hv, column = (row - t * l.p.hv) * dv;
        const float* o = (const float*)l.m.o + row * dv;
        const float* dy = (const float*)l.m.dy + row * dv;
        const float* z = (const float*)l.m.z + l.p.z_off + t * l.p.z_stride + column;
        float* d_o = (float*)l.m.d_o + row * dv;
        float* dz = (float*)l.m.dz + l.p.dz_off + t * l.p.dz_stride + column;
        float own[WIDE], up[WIDE], slope[WIDE];  // o, dy silu(z), dy silu'(z)
        float4 sums = four(0.f);                 // sum o^2, sum o u
#pragma unroll
        for (u32 k = 0; k < WIDE; k++) {
            const u32 i = k * lanes + lane;
            own[k] = up[k] = slope[k] = 0.f;
            if (i < dv) {
                own[k] = o[i];
                up[k] = dy[i] * silu(z[i]);
                slope[k] = dy[i] * silu_slope(z[i]);
                sums.x = fmaf(own[k], own[k], sums.x);
                sums.y = fmaf(own[k] * up[k], weight[k], sums.y);
            }
        }
        sums = reduce_sum4(sums, parts);
        const float norm = 1.f / sqrtf(sums.x / (float)dv + l.p.eps), pull = norm * norm * (sums.y / (float)dv);
#pragma unroll
        for (u32 k = 0; k < WIDE; k++) {
            const u32 i = k * lanes + lane;
            if (i < dv) {
                const float x = own[k] * norm;
                d_o[i] = norm * (up[k] * weight[k] - pull * own[k]);
                dz[i] = slope[k] * weight[k] * x;
                dweight[k] = fmaf(up[k], x, dweight[k]);
            }
        }
    }
    float* part = (float*)l.m.part + cell * dv;
#pragma unroll
    for (u32 k = 0; k < WIDE; k++) {
        const u32 i = k * lanes + lane;
        if (i < dv) part[i] = dweight[k];
    }
}
