// y (+)= n w^T for few rows of x, or y = silu(n w^T) * (n up^T) with GLU; n = x * rsqrt(mean(x^2) + eps) * norm with norm.
//
// The threads of a block share four rows of w: each takes 16 bytes of every row at a time, neighbours next to it, and all meet once at
// the end: sums over a warp by exchange, then over the warps through shared memory.
#include "reduce.cuh"

constexpr u32 THREADS = 128;
constexpr u32 ROWS = 4;  // of w in a block

template <u32 BATCH, u32 GLU>
struct Sums {
    // of [b][r]: row b of x with row r of w, then with rows of up; squares of the rows of x
    float product[BATCH][ROWS * (1 + GLU)], square[BATCH];
};

template <u32 BATCH, u32 GLU>
struct Shared {
    Sums<BATCH, GLU> part[THREADS / 32];
};

// The STEP numbers of 16 bytes.
template <class T>
struct Words {
    static constexpr u32 STEP = T::HALF ? 8 : 4;
    float x[STEP];
    __device__ __forceinline__ explicit Words(uint4 w) {
        const u32 word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if constexpr (T::HALF) {
                const float2 pair = unpack<T>(word[i]);
                x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
            } else {
                x[i] = __uint_as_float(word[i]);
            }
        }
    }
};

// Sums over this thread's numbers, where rows of x and w are whole words of 16 bytes.
template <class T, u32 BATCH, u32 GLU>
__device__ __forceinline__ void wide_sums(const row::matvec::Launch& l, u32 row0, Sums<BATCH, GLU>& s) {
    constexpr u32 STEP = Words<T>::STEP;
    const u32 words = l.p.k / STEP;
    const uint4* w = (const uint4*)l.m.w;    // [n, k / STEP]
    const uint4* up = (const uint4*)l.m.up;  // the same
    for (u32 c = threadIdx.x; c < words; c += blockDim.x) {
        float x[BATCH][STEP];
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            const float4* from = (const float4*)((const float*)l.m.x + l.p.x_off + (size_t)min(b, l.p.m - 1) * l.p.x_stride + c * STEP);
#pragma unroll
            for (u32 i = 0; i < STEP / 4; i++) {
                const float4 four = from[i];
                x[b][4 * i] = four.x, x[b][4 * i + 1] = four.y, x[b][4 * i + 2] = four.z, x[b][4 * i + 3] = four.w;
            }
        }
        if (l.c.norm) {
            const float* norm = (const float*)l.m.norm + c * STEP;
#pragma unroll
            for (u32 i = 0; i < STEP; i++) {
                const float factor = norm[i];
#pragma unroll
                for (u32 b = 0; b < BATCH; b++) {
                    s.square[b] = fmaf(x[b][i], x[b][i], s.square[b]);
                    x[b][i] *= factor;
                }
            }
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const size_t at = (size_t)min(row0 + r, l.p.n - 1) * words + c;
            const Words<T> own(w[at]);
#pragma unroll
            for (u32 b = 0; b < BATCH; b++)
#pragma unroll
                for (u32 i = 0; i < STEP; i++) s.product[b][r] = fmaf(x[b][i], own.x[i], s.product[b][r]);
            if constexpr (GLU == 1) {
                const Words<T> other(up[at]);
#pragma unroll
                for (u32 b = 0; b < BATCH; b++)
#pragma unroll
                    for (u32 i = 0; i < STEP; i++) s.product[b][ROWS + r] = fmaf(x[b][i], other.x[i], s.product[b][ROWS + r]);
            }
        }
    }
}

// The same one by one.
template <class T, u32 BATCH, u32 GLU>
__device__ __forceinline__ void narrow_sums(const row::matvec::Launch& l, u32 row0, Sums<BATCH, GLU>& s) {
    for (u32 i = threadIdx.x; i < l.p.k; i += blockDim.x) {
        const float factor = l.c.norm ? ((const float*)l.m.norm)[i] : 1.f;
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            const float x = ((const float*)l.m.x)[l.p.x_off + (size_t)min(b, l.p.m - 1) * l.p.x_stride + i];
            s.square[b] = fmaf(x, x, s.square[b]);
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                const size_t at = (size_t)min(row0 + r, l.p.n - 1) * l.p.k + i;
                s.product[b][r] = fmaf(x * factor, load<T>(l.m.w, at), s.product[b][r]);
                if constexpr (GLU == 1) s.product[b][ROWS + r] = fmaf(x * factor, load<T>(l.m.up, at), s.product[b][ROWS + r]);
            }
        }
    }
}

template <class T, u32 BATCH, u32 GLU>
__device__ __forceinline__ void matvec(const row::matvec::Launch& l) {
    typedef Shared<BATCH, GLU> Meeting;
    SHARED(Meeting, shared);
    const u32 row0 = cell_of(l).x * ROWS, lane = threadIdx.x, warps = blockDim.x / 32;
    Sums<BATCH, GLU> s;
#pragma unroll
    for (u32 b = 0; b < BATCH; b++) {
        s.square[b] = 0.f;
#pragma unroll
        for (u32 r = 0; r < ROWS * (1 + GLU); r++) s.product[b][r] = 0.f;
    }
    if (l.c.wide) wide_sums<T, BATCH, GLU>(l, row0, s);
    else narrow_sums<T, BATCH, GLU>(l, row0, s);

#pragma unroll
    for (u32 b = 0; b < BATCH; b++) {
        s.square[b] = reduce_warp<Add>(s.square[b]);
#pragma unroll
        for (u32 r = 0; r < ROWS * (1 + GLU); r++) s.product[b][r] = reduce_warp<Add>(s.product[b][r]);
    }
    if (lane % 32 == 0) shared.part[lane / 32] = s;
    __syncthreads();
    // Thread 4 b + r has row b of x and row r of w.
    const u32 b = lane / ROWS, r = lane % ROWS;
    if (b >= BATCH || b >= l.p.m || row0 + r >= l.p.n) return;
    float sum = 0.f, other = 0.f, square = 0.f;
    for (u32 i = 0; i < warps; i++) {
        sum += shared.part[i].product[b][r];
        if constexpr (GLU == 1) other += shared.part[i].product[b][ROWS + r];
        square += shared.part[i].square[b];
    }
    const float scale = l.c.norm ? 1.f / sqrtf(square / (float)l.p.k + l.p.eps) : 1.f;
    sum *= scale;
    if constexpr (GLU == 1) sum = silu(sum) * (other * scale);
    float* y = (float*)l.m.y + l.p.y_off + (size_t)b * l.p.y_stride + row0 + r;
    *y = l.c.add ? *y + sum : sum;
}

// One row of x, or up to two, four (of 16-bit weights, as models have) and eight: what is computed for rows that are not there is time.
#define MATVEC_KERNELS(NAME, T) MATVEC_KERNEL(NAME, T, 1) MATVEC_KERNEL(NAME, T, 8)
#define MATVEC_KERNELS_16(NAME, T) MATVEC_KERNELS(NAME, T) MATVEC_KERNEL(NAME, T, 2) MATVEC_KERNEL(NAME, T, 4)
#define MATVEC_KERNEL(NAME, T, B)                                      \
    KERNEL(NAME##_b##B, matvec, THREADS) { matvec<T, B, 0>(l); }       \
    KERNEL(NAME##_b##B##_glu, matvec, THREADS) { matvec<T, B, 1>(l); }
MATVEC_KERNELS(matvec_f32, F32)
MATVEC_KERNELS_16(matvec_f16, F16)
MATVEC_KERNELS_16(matvec_bf16, Bf16)
