// y[i, j] (+)= sum_k x[i, k] w[j, k] for many rows of x, in true f32. 16-bit weights take this way only where their rows are not whole
// words of 16 bytes; else see matmul_mma.cu.
//
// 256 threads share a tile of 64 x 64; slices of x and w pass through shared memory, thread (ty, tx) sums 4 x 4 products: of rows
// ty, ty + 16, .. of x with rows tx, tx + 16, .. of w.
#include "common.cuh"

constexpr u32 TILE = 64;
constexpr u32 DEPTH = 8;            // width of a slice, in fours
constexpr u32 SIDE = 16, REG = TILE / SIDE;
constexpr u32 THREADS = SIDE * SIDE;
// Fours of a row of a slice: one more than needed, so that neighbouring rows do not meet in a bank.
constexpr u32 WIDTH = DEPTH + 1;

struct Shared {
    float4 x[TILE * WIDTH];
    float4 w[TILE * WIDTH];
};

// Four numbers of a row of k from number i on, zeros past its end.
template <class T>
__device__ __forceinline__ float4 four_of(const void* p, size_t row, u32 i, u32 k, bool wide) {
    if (wide) return i < k ? load4<T>(p, row + i) : four(0.f);
    float x[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) x[j] = i + j < k ? load<T>(p, row + i + j) : 0.f;
    return make_float4(x[0], x[1], x[2], x[3]);
}

template <class T>
__device__ __forceinline__ void matmul(const row::matmul::Launch& l) {
    SHARED(Shared, s);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, tx = lane % SIDE, ty = lane / SIDE, m0 = cell.y * TILE, n0 = cell.x * TILE;
    const u32 m = l.p.m, n = l.p.n, k = l.p.k;
    const bool wide = l.c.wide != 0;
    float sum[REG][REG];
#pragma unroll
    for (u32 i = 0; i < REG; i++)
#pragma unroll
        for (u32 j = 0; j < REG; j++) sum[i][j] = 0.f;
    for (u32 depth = 0; depth < k; depth += 4 * DEPTH) {
        for (u32 e = lane; e < TILE * DEPTH; e += THREADS) {
            const u32 row = e / DEPTH, at = e % DEPTH, i = depth + 4 * at;
            const size_t x0 = l.p.x_off + (size_t)min(m0 + row, m - 1) * l.p.x_stride, w0 = (size_t)min(n0 + row, n - 1) * k;
            s.x[row * WIDTH + at] = four_of<F32>(l.m.x, x0, i, k, wide);
            s.w[row * WIDTH + at] = four_of<T>(l.m.w, w0, i, k, wide);
        }
        __syncthreads();
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
            float4 w[REG];
#pragma unroll
            for (u32 j = 0; j < REG; j++) w[j] = s.w[(tx + j * SIDE) * WIDTH + d];
#pragma unroll
            for (u32 i = 0; i < REG; i++) {
                const float4 x = s.x[(ty + i * SIDE) * WIDTH + d];
#pragma unroll
                for (u32 j = 0; j < REG; j++) sum[i][j] = add_dot(sum[i][j], x, w[j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < REG; i++) {
        const u32 row = m0 + ty + i * SIDE;
#pragma unroll
        for (u32 j = 0; j < REG; j++) {
            const u32 column = n0 + tx + j * SIDE;
            if (row < m && column < n) {
                float* y = (float*)l.m.y + l.p.y_off + (size_t)row * l.p.y_stride + column;
                *y = l.c.add ? *y + sum[i][j] : sum[i][j];
            }
        }
    }
}

KERNEL(matmul_f32, matmul, THREADS) { matmul<F32>(l); }
KERNEL(matmul_f16, matmul, THREADS) { matmul<F16>(l); }
KERNEL(matmul_bf16, matmul, THREADS) { matmul<Bf16>(l); }
