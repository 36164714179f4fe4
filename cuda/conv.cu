// The causal convolution over time, its tail, and their gradients. A thread has one channel, a block 64.
#include "common.cuh"

constexpr u32 CHANNELS = 64;

// Taps of a launch: the models' four, known when it is compiled, or as many as it says, up to 8. Arrays have room for TAPS; those of
// fewer taps fill their end, and the rest is 0.
template <u32 TAPS>
__device__ __forceinline__ u32 taps_of(u32 taps) {
    return TAPS == 4 ? 4 : taps;
}

// Tables of sequences: first token, tokens, slot, 0.
__device__ __forceinline__ uint4 row_of(const void* table, u32 i) { return ((const uint4*)table)[i]; }

// The taps - 1 rows of (tail, x) before token `begin`, oldest first: row begin + j of it counts from the start of the tail.
template <u32 TAPS>
__device__ __forceinline__ void load_past(float (&past)[TAPS], const float* tail, const float* x, u32 taps, u32 begin, u32 channels,
                                          size_t stride) {
#pragma unroll
    for (u32 j = 0; j < TAPS - 1; j++) {
        past[j] = 0.f;
        if (j + taps < TAPS) continue;
        const u32 row = begin + j - (TAPS - taps);
        past[j] = row < taps - 1 ? tail[(size_t)row * channels] : x[(row - (taps - 1)) * stride];
    }
}

// The weights of a channel, [taps].
template <u32 TAPS>
__device__ __forceinline__ void load_weight(float (&weight)[TAPS], const void* w, u32 c, u32 taps) {
#pragma unroll
    for (u32 j = 0; j < TAPS; j++) weight[j] = j + taps < TAPS ? 0.f : ((const float*)w)[(size_t)c * taps + j - (TAPS - taps)];
}

template <u32 TAPS>
__device__ __forceinline__ void shift(float (&past)[TAPS]) {
#pragma unroll
    for (u32 j = 0; j + 1 < TAPS; j++) past[j] = past[j + 1];
}

// x[place], where the place is known only when the kernel runs: registers have no addresses.
template <u32 TAPS>
__device__ __forceinline__ float at_place(const float (&x)[TAPS], u32 place) {
    float y = x[0];
#pragma unroll
    for (u32 j = 1; j < TAPS; j++) y = j == place ? x[j] : y;
    return y;
}

// sum_j weight[j] past[j] over the last `taps` places: what lies before them may be anything.
template <u32 TAPS>
__device__ __forceinline__ float taps_sum(const float (&weight)[TAPS], const float (&past)[TAPS], u32 taps) {
    float sum = 0.f;
#pragma unroll
    for (u32 j = 0; j < TAPS; j++)
        if (j + taps >= TAPS) sum = fmaf(weight[j], past[j], sum);
    return sum;
}

// y[t, c] = act(sum_j w[c, j] * x[t - (taps - 1) + j, c]); a thread walks its channel over a block of tokens.
template <u32 TAPS>
__device__ __forceinline__ void conv_forward(const row::conv::Launch& l) {
    const uint3 cell = cell_of(l);
    const u32 c = cell.x * CHANNELS + threadIdx.x;
    if (c >= l.p.channels) return;
    const uint4 seq = row_of(l.m.seqs, cell.y);
    const size_t first = (size_t)cell.z * l.p.block;
    if (first > seq.y || (first == seq.y && first > 0)) return;
    const u32 begin = (u32)first, end = (u32)min((size_t)seq.y, first + l.p.block);
    const size_t x_stride = l.p.x_stride, y_stride = l.p.y_stride;
    const float* x = (const float*)l.m.x + l.p.x_off + seq.x * x_stride + c;                      // [tokens, x_stride]
    float* y = (float*)l.m.y + l.p.y_off + seq.x * y_stride + c;                                  // [tokens, y_stride]
    const u32 taps = taps_of<TAPS>(l.c.taps);
    float* tail = (float*)l.m.tail + (size_t)seq.z * (taps - 1) * l.p.channels + c;               // [taps - 1, channels]

    float weight[TAPS], past[TAPS];
    load_weight<TAPS>(weight, l.m.w, c, taps);
    load_past<TAPS>(past, tail, x, taps, begin, l.p.channels, x_stride);
    for (u32 t = begin; t < end; t++) {
        past[TAPS - 1] = x[t * x_stride];
        const float sum = taps_sum<TAPS>(weight, past, taps);
        shift<TAPS>(past);
        y[t * y_stride] = l.c.silu ? silu(sum) : sum;
    }
    if (l.c.store_tail) {
#pragma unroll
        for (u32 j = 0; j < TAPS - 1; j++)
            if (j + taps >= TAPS) tail[(size_t)(j + taps - TAPS) * l.p.channels] = past[j];
    }
}

// tail[slot] <- the last taps - 1 rows of (old tail, x).
KERNEL(conv_tail, conv_tail, CHANNELS) {
    const uint3 cell = cell_of(l);
    const u32 c = cell.x * CHANNELS + threadIdx.x, rows = l.c.taps - 1;
    if (c >= l.p.channels) return;
    const uint4 seq = row_of(l.m.seqs, cell.y);
    const size_t x_stride = l.p.x_stride;
    const float* x = (const float*)l.m.x + l.p.x_off + seq.x * x_stride + c;
    float* tail = (float*)l.m.tail + (size_t)seq.z * rows * l.p.channels + c;
    // Row j of the new tail is row tokens + j of (old tail, x): never before j, so ascending order reads before it writes.
    for (u32 j = 0; j < rows; j++) {
        const size_t row = (size_t)seq.y + j;
        tail[(size_t)j * l.p.channels] = row < rows ? tail[row * l.p.channels] : x[(row - rows) * x_stride];
    }
}

// dy silu'(p), p = sum_j weight[j] rows[j]
template <u32 TAPS>
__device__ __forceinline__ float slope_of(const float (&weight)[TAPS], const float (&rows)[TAPS], u32 taps, float dy, u32 silu) {
    return silu ? dy * silu_slope(taps_sum<TAPS>(weight, rows, taps)) : dy;
}

// dx and dw; a thread walks blocks of tokens of its channel.
//   dp[t] = dy[t] silu'(p[t])     dx[i] = sum_k w[taps - 1 - k] dp[i + k]     dw[j] = sum_t dp[t] X[t - (taps - 1) + j]
template <u32 TAPS>
__device__ __forceinline__ void conv_backward(const row::conv_grad::Launch& l) {
    const uint3 cell = cell_of(l);
    const u32 c = cell.x * CHANNELS + threadIdx.x;
    if (c >= l.p.channels) return;
    const u32 taps = taps_of<TAPS>(l.c.taps);
    float weight[TAPS], dweight[TAPS];
    load_weight<TAPS>(weight, l.m.w, c, taps);
#pragma unroll
    for (u32 j = 0; j < TAPS; j++) dweight[j] = 0.f;
    const size_t x_stride = l.p.x_stride, dy_stride = l.p.dy_stride, dx_stride = l.p.dx_stride;
    // The next block of this cell, counted from the first block of sequence n.
    size_t next = cell.y;
    for (u32 n = 0; n < l.p.count; n++) {
        const uint4 seq = row_of(l.m.seqs, n);
        const float* x = (const float*)l.m.x + l.p.x_off + seq.x * x_stride + c;
        const float* dy = (const float*)l.m.dy + l.p.dy_off + seq.x * dy_stride + c;
        float* dx = (float*)l.m.dx + l.p.dx_off + seq.x * dx_stride + c;
        const float* tail = (const float*)l.m.tail + (size_t)seq.z * (taps - 1) * l.p.channels + c;
        const u32 blocks = seq.y / l.p.block + (seq.y % l.p.block > 0 ? 1 : 0);
        for (; next < blocks; next += l.p.cells) {
            const u32 begin = (u32)next * l.p.block;
            const u32 end = (u32)min((size_t)seq.y, (size_t)begin + l.p.block);
            // X of token t and the TAPS - 1 rows before it; dp of token t and the TAPS - 1 tokens before it.
            float rows[TAPS], dp[TAPS];
#pragma unroll
            for (u32 j = 0; j < TAPS; j++) dp[j] = 0.f;
            load_past<TAPS>(rows, tail, x, taps, begin, l.p.channels, x_stride);
            for (size_t t = begin; t < (size_t)end + taps - 1; t++) {
                float d = 0.f;
                if (t < seq.y) {
                    rows[TAPS - 1] = x[t * x_stride];
                    d = slope_of<TAPS>(weight, rows, taps, dy[t * dy_stride], l.c.silu);
                    if (t < end) {
#pragma unroll
                        for (u32 j = 0; j < TAPS; j++) dweight[j] = fmaf(d, rows[j], dweight[j]);
                    }
                }
                dp[TAPS - 1] = d;
                if (t >= (size_t)begin + taps - 1) {
                    // dp of token i + k is at k from the first of the last `taps` places.
                    float sum = 0.f;
#pragma unroll
                    for (u32 k = 0; k < TAPS; k++)
                        if (k + taps >= TAPS) sum = fmaf(at_place<TAPS>(weight, 2 * TAPS - taps - 1 - k), dp[k], sum);
                    dx[(t - (taps - 1)) * dx_stride] = sum;
                }
                shift<TAPS>(rows);
                shift<TAPS>(dp);
            }
        }
        next -= blocks;
    }
    float* part = (float*)l.m.part + ((size_t)cell.y * l.p.channels + c) * taps;  // [taps]
#pragma unroll
    for (u32 j = 0; j < TAPS; j++)
        if (j + taps >= TAPS) part[j + taps - TAPS] = dweight[j];
}

// What the tails add: dtail of the old one, and dtail_out of the new one.
template <u32 TAPS>
__device__ __forceinline__ void conv_tail_backward(const row::conv_tail_grad::Launch& l) {
    const uint3 cell = cell_of(l);
    const u32 c = cell.x * CHANNELS + threadIdx.x;
    if (c >= l.p.channels) return;
    const uint4 seq = row_of(l.m.seqs, cell.y);
    const size_t x_stride = l.p.x_stride, dy_stride = l.p.dy_stride, dx_stride = l.p.dx_stride, channels = l.p.channels;
    const u32 taps = taps_of<TAPS>(l.c.taps);
    const float* x = (const float*)l.m.x + l.p.x_off + seq.x * x_stride + c;
    const float* dy = (const float*)l.m.dy + l.p.dy_off + seq.x * dy_stride + c;
    float* dx = (float*)l.m.dx + l.p.dx_off + seq.x * dx_stride + c;
    const size_t slot = (size_t)seq.z * (taps - 1) * channels + c;
    const float* tail = (const float*)l.m.tail + slot;            // [taps - 1, channels]
    const float* dtail_out = (const float*)l.m.dtail_out + slot;  // the same
    float* dtail = (float*)l.m.dtail + slot;

    if (l.c.store) {
        float weight[TAPS], rows[TAPS], sums[TAPS];
        load_weight<TAPS>(weight, l.m.w, c, taps);
        load_past<TAPS>(rows, tail, x, taps, 0, l.p.channels, x_stride);
#pragma unroll
        for (u32 j = 0; j < TAPS; j++) sums[j] = 0.f;
#pragma unroll
        for (u32 t = 0; t < TAPS - 1; t++) {
            if (t + 1 < taps && t < seq.y) {
                rows[TAPS - 1] = x[t * x_stride];
                const float d = slope_of<TAPS>(weight, rows, taps, dy[t * dy_stride], l.c.silu);
                // Row i of the old tail gets w[i - t] dp[t]; weights start at place TAPS - taps.
#pragma unroll
                for (u32 i = t; i < TAPS - 1; i++) sums[i] = fmaf(at_place<TAPS>(weight, i - t + TAPS - taps), d, sums[i]);
                shift<TAPS>(rows);
            }
        }
#pragma unroll
        for (u32 i = 0; i < TAPS - 1; i++) {
            if (i + 1 >= taps) continue;
            // Row i of the old tail is row i - tokens of the new one.
            if (l.c.add && i >= seq.y) sums[i] += dtail_out[(i - seq.y) * channels];
            dtail[i * channels] = sums[i];
        }
    }
    if (l.c.add) {
        // Row i of the new tail is row tokens + i of (old tail, x).
        for (u32 i = 0; i < taps - 1; i++) {
            const size_t row = (size_t)seq.y + i;
            if (row >= taps - 1) dx[(row - (taps - 1)) * dx_stride] += dtail_out[i * channels];
        }
    }
}

#define TAPS_KERNELS(NAME, N)                                                                  \
    KERNEL(conv_##NAME, conv, CHANNELS) { conv_forward<N>(l); }                                \
    KERNEL(conv_grad_##NAME, conv_grad, CHANNELS) { conv_backward<N>(l); }                     \
    KERNEL(conv_tail_grad_##NAME, conv_tail_grad, CHANNELS) { conv_tail_backward<N>(l); }
TAPS_KERNELS(four, 4)
TAPS_KERNELS(any, 8)
