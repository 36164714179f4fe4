// Rows that are a loop over numbers: copy, fill, embed, swiglu, argmax, sum_rows.
#include "common.cuh"

// dst[dst_off + i] = src[src_off + i], words of 32 bits.
KERNEL(copy, copy, MOST_THREADS) {
    const u32* src = (const u32*)l.m.src + l.p.src_off;
    u32* dst = (u32*)l.m.dst + l.p.dst_off;
    const size_t first = (size_t)cell_of(l).x * l.c.block, end = min((size_t)l.p.n, first + l.c.block);
    for (size_t i = first + threadIdx.x; i < end; i += blockDim.x) dst[i] = src[i];
}

// dst[dst_off + i] = word.
KERNEL(fill, fill, MOST_THREADS) {
    u32* dst = (u32*)l.m.dst + l.p.dst_off;
    const size_t first = (size_t)cell_of(l).x * l.c.block, end = min((size_t)l.p.n, first + l.c.block);
    for (size_t i = first + threadIdx.x; i < end; i += blockDim.x) dst[i] = l.p.word;
}

// x[t] = table[ids[t]], for the ids that this part of the table holds.
template <class T>
__device__ __forceinline__ void embed_row(const row::embed::Launch& l) {
    const size_t t = cell_of(l).x;
    // An id before this part wraps around to a large number.
    const u32 row = ((const u32*)l.m.ids)[t] - l.p.row0;
    if (row >= l.p.rows) return;
    float* x = (float*)l.m.x + t * l.p.dim;
    for (u32 i = threadIdx.x; i < l.p.dim; i += blockDim.x) x[i] = load<T>(l.m.table, (size_t)row * l.p.dim + i);
}
KERNEL(embed_f32, embed, MOST_THREADS) { embed_row<F32>(l); }
KERNEL(embed_f16, embed, MOST_THREADS) { embed_row<F16>(l); }
KERNEL(embed_bf16, embed, MOST_THREADS) { embed_row<Bf16>(l); }

// y = silu(gate) * up
KERNEL(swiglu, swiglu, MOST_THREADS) {
    const float* gate_up = (const float*)l.m.gate_up;  // [rows, 2 dim]: gate, then up
    float* y = (float*)l.m.y;                          // [rows, dim]
    const size_t first = (size_t)cell_of(l).x * l.c.block, end = min(first + l.c.block, (size_t)l.p.rows * l.p.dim);
    for (size_t i = first + threadIdx.x; i < end; i += blockDim.x) {
        const size_t gate = i + i / l.p.dim * l.p.dim;
        y[i] = silu(gate_up[gate]) * gate_up[gate + l.p.dim];
    }
}

// The index of the largest number of a row; the smallest index among equals; NaN never wins.
struct Best {
    float value[32];
    u32 index[32];
};
constexpr u32 NOBODY = 0xffffffffu;

// Takes the other one if it is better. While there is no index, any number is better, -infinity too.
__device__ __forceinline__ void challenge(float& value, u32& index, float other, u32 other_index) {
    const bool wins = index == NOBODY || other > value || (other == value && other_index < index);
    if (other_index != NOBODY && wins) value = other, index = other_index;
}

KERNEL(argmax, argmax, 1024) {
    SHARED(Best, best);
    const u32 row = cell_of(l).x, n = l.p.n, warp = threadIdx.x / 32;
    const float* x = (const float*)l.m.x + (size_t)row * n;  // [n]
    // Many loads under way at a time: a row is read by one block, whose time is latency.
    constexpr u32 AT_ONCE = 16;
    float value = 0.f;
    u32 index = NOBODY;
    for (u32 i = threadIdx.x; i < n; i += AT_ONCE * blockDim.x) {
        float v[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) v[j] = x[min(i + j * blockDim.x, n - 1)];
        // Past the end the last number comes again: it is challenged by itself and stays.
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) challenge(value, index, v[j], v[j] == v[j] ? min(i + j * blockDim.x, n - 1) : NOBODY);
    }
    for (int step = 16; step > 0; step >>= 1) {
        const float v = __shfl_xor_sync(0xffffffffu, value, step);
        challenge(value, index, v, __shfl_xor_sync(0xffffffffu, index, step));
    }
    if (threadIdx.x % 32 == 0) best.value[warp] = value, best.index[warp] = index;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 w = 1; w < blockDim.x / 32; w++) challenge(value, index, best.value[w], best.index[w]);
        ((u32*)l.m.ids)[row] = index;
    }
}

// y[c] = sum_r x[r, c]. Thread (ty, tx) adds up rows ty, ty + groups, .. of column tx; then the groups are added up in order.
struct ColumnSums {
    float sum[MOST_THREADS];
};

KERNEL(sum_rows, sum_rows, MOST_THREADS) {
    SHARED(ColumnSums, shared);
    const u32 columns = l.c.columns, groups = blockDim.x / columns;
    const u32 tx = threadIdx.x % columns, ty = threadIdx.x / columns, c = cell_of(l).x * columns + tx;
    const float* x = (const float*)l.m.x + l.p.x_off;  // [rows, x_stride]
    float sum = 0.f;
    if (c < l.p.n)
        for (u32 r = ty; r < l.p.rows; r += groups) sum += x[(size_t)r * l.p.x_stride + c];
    shared.sum[threadIdx.x] = sum;
    __syncthreads();
    if (ty == 0 && c < l.p.n) {
        for (u32 g = 1; g < groups; g++) sum += shared.sum[g * columns + tx];
        ((float*)l.m.y)[c] = sum;
    }
}
