// The gradients of q and k of one chunk and key head, summed over its value heads in the order of their index, on the matrix units.
//
//   b = Z S^T + P K
//   a = n o (N dS'^T) - u o ((beta o X) S^T) + P^T Q + R K
//   dq = b - rq^2 q (q . b)     dk = a - rk^2 k (k . a)     (with l2norm; else dq = b, dk = a)
//   dc_i += q_i . [Z S^T]_i - k_i . [n o (N dS'^T)]_i
//   dc_C += sum_i k_i . [n o (N dS'^T)]_i + gamma_C <dS', S>
//
// 8 warps; warp w has K / 8 columns of a and b, all rows, as sums: it reads its rows of S and dS' straight from memory, each number once
// in the block, four at a time as in gdn_grad_chunk_mma.cu. P and R of all value heads are added up in shared memory.
#include "tiles.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;

struct Shared {
    Square p, r;
    float part[2][WARPS][C];  // parts of sums over K
    float inner[WARPS];       // parts of <dS', S>
    float dots[2][C];
};

// Sums [C, 8 N] of a warp: d[m][n][e] at row 16 m + g + 8 (e / 2), column 8 n + 2 t + e % 2 of its own.
template <u32 N>
struct Sums {
    float d[2][N][4];

    __device__ __forceinline__ Sums() {
#pragma unroll
        for (u32 m = 0; m < 2; m++)
#pragma unroll
            for (u32 n = 0; n < N; n++) clear(d[m][n]);
    }
    __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
        for (u32 m = 0; m < 2; m++)
#pragma unroll
            for (u32 n = 0; n < N; n++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) d[m][n][e] += other.d[m][n][e];
    }
    // f(row, column, sum at it, sum at the next column)
    template <class F>
    __device__ __forceinline__ void each(F f) {
        const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (u32 m = 0; m < 2; m++)
#pragma unroll
            for (u32 h = 0; h < 2; h++)
#pragma unroll
                for (u32 n = 0; n < N; n++) f(16 * m + g + 8 * h, 8 * n + 2 * t, d[m][n][2 * h], d[m][n][2 * h + 1]);
    }
};

// Rows of a chunk of Q or K from this warp's first column on, zeros past the chunk's end.
template <class T>
struct Source {
    const typename T::Raw* first;
    size_t stride;
    u32 len;

    // Numbers c and c + 1 of row i
    __device__ __forceinline__ float2 along(u32 i, u32 c) const {
        return i < len ? unpack<T>(*(const u32*)(first + i * stride + c)) : make_float2(0.f, 0.f);
    }
    // Number c of rows i and i + 1
    __device__ __forceinline__ float2 down(u32 i, u32 c) const {
        return make_float2(i < len ? T::number(first[i * stride + c]) : 0.f, i + 1 < len ? T::number(first[(i + 1) * stride + c]) : 0.f);
    }
};

// This warp's parts of the dots of x's rows and d's.
template <class T, u32 N>
__device__ __forceinline__ void give_dots(float (&part)[C], Sums<N>& d, const Source<T>& x) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};  // of rows g + 8 r
    d.each([&](u32 i, u32 c, float& a, float& b) {
        const float2 row = x.along(i, c);
        sum[i / 8] = fmaf(row.x, a, fmaf(row.y, b, sum[i / 8]));
    });
#pragma unroll
    for (u32 r = 0; r < 4; r++) {
        const float whole = sum_lanes<1, 2>(sum[r]);
        if (threadIdx.x % 4 == 0) part[threadIdx.x % 32 / 4 + 8 * r] = whole;
    }
}

__device__ __forceinline__ float row_sum(const float (&part)[WARPS][C], u32 row) {
    float sum = 0.f;
    for (u32 w = 0; w < WARPS; w++) sum += part[w][row];
    return sum;
}

// d += (rows of x, of [C, V], times their factors) y^T, of two steps of V; x from row g and this lane's first number on
template <u32 N>
__device__ __forceinline__ void multiply(Sums<N>& d, const float* x, size_t dv, const float (&factors)[4], const u32 (&y)[N][2][2]) {
#pragma unroll
    for (u32 m = 0; m < 2; m++) {
        u32 a[2][4];
        left_2(a, factors[2 * m] * *(const float4*)(x + 16 * m * dv), factors[2 * m + 1] * *(const float4*)(x + (16 * m + 8) * dv));
#pragma unroll
        for (u32 n = 0; n < N; n++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) mma_tf32(d.d[m][n], a[i], y[n][i]);
    }
}

// d -= factor of the row times x's row
template <class T, u32 N>
__device__ __forceinline__ void subtract(Sums<N>& d, const float (&factors)[C], const Source<T>& x) {
    d.each([&](u32 i, u32 c, float& a, float& b) {
        const float2 row = x.along(i, c);
        a -= factors[i] * row.x, b -= factors[i] * row.y;
    });
}

// to a tensor of rows `stride` apart
template <class T, u32 N>
__device__ __forceinline__ void store(Sums<N>& d, void* to, size_t first, size_t stride, u32 len) {
    d.each([&](u32 i, u32 c, float& a, float& b) {
        if (i < len) *(u32*)((typename T::Raw*)to + first + i * stride + c) = pack<T>(a, b);
    });
}

template <class T, u32 K>
__device__ __forceinline__ void grad_qk(const row::gdn_grad_qk::Launch& l) {
    constexpr u32 N = K / 8 / WARPS;
    const float ones[4] = {1.f, 1.f, 1.f, 1.f};
    SHARED(Shared, s);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 head_k = cell.y, hv = l.p.hv, dv = l.c.dv, group = l.c.group, column = warp * 8 * N;
    const uint4 chunk = chunk_of(l.m.chunks, cell.x);
    const u32 len = chunk.y;
    const size_t own = (size_t)head_k * K + column;
    const Source<T> q = {stored_at<T>(l.m.q, l.p.q_off + (size_t)chunk.x * l.p.q_stride + own), l.p.q_stride, len};
    const Source<T> k = {stored_at<T>(l.m.k, l.p.k_off + (size_t)chunk.x * l.p.k_stride + own), l.p.k_stride, len};
    auto ws_of = [&](u32 member) {
        return (float*)l.m.ws + ((size_t)cell.x * hv + value_head(head_k, member, l.p.hk, group, l.p.head_map)) * WS_LONG;
    };

    Sums<N> a, b;
    for (u32 member = 0; member < group; member++) {
        const u32 head = value_head(head_k, member, l.p.hk, group, l.p.head_map);
        float* ws = ws_of(member);
        const size_t saved0 = ((size_t)cell.x * hv + head) * saved_numbers(K, dv);
        const float* saved = (const float*)l.m.saved + saved0;    // S [K, V], U, N [C, V]
        const float* dsaved = (const float*)l.m.dsaved + saved0;  // dS' [K, V], X, Z [C, V]
        // From this lane's first row and number on.
        const size_t row = (size_t)g * dv + 4 * t;
        const float *n = saved + (size_t)(K + C) * dv + row, *x = dsaved + (size_t)K * dv + row, *z = x + (size_t)C * dv;
        const float *before = saved + (size_t)column * dv + row, *after = dsaved + (size_t)column * dv + row;

        float of_x[4], of_n[4];  // factors of X and N, of rows g, g + 8, g + 16, g + 24
#pragma unroll
        for (u32 r = 0; r < 4; r++) {
            const u32 i = g + 8 * r;
            of_x[r] = -(ws[WS_U + i] * ws[WS_BETA + i]), of_n[r] = ws[WS_N + i];
        }
        Sums<N> of_s, of_ds;  // Z S^T, n o (N dS'^T)
        float inner = 0.f;
        for (u32 step = 0; step < dv; step += 16) {
            u32 right_s[N][2][2], right_ds[N][2][2];
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                const size_t at = (size_t)8 * i * dv + step;
                const float4 vs = *(const float4*)(before + at), vd = *(const float4*)(after + at);
                inner = add_dot(inner, vs, vd);
                right_2(right_s[i], vs);
                right_2(right_ds[i], vd);
            }
            multiply(of_s, z + step, dv, ones, right_s);
            multiply(a, x + step, dv, of_x, right_s);
            multiply(of_ds, n + step, dv, of_n, right_ds);
        }
        inner = sum_lanes<1, 16>(inner);
        __syncthreads();
        if (lane == 0) s.inner[warp] = inner;
        give_dots(s.part[0][warp], of_s, q);
        give_dots(s.part[1][warp], of_ds, k);
        b.add(of_s);
        a.add(of_ds);
        __syncthreads();
        const u32 i = threadIdx.x;
        // The last token's own share cancels: its factor is 1 whatever its gate.
        if (i < C) s.dots[0][i] = i + 1 < len ? row_sum(s.part[1], i) : 0.f;
        __syncthreads();
        if (i < len) {
            float dc = row_sum(s.part[0], i) - s.dots[0][i];
            if (i == len - 1) {
                float share = 0.f;
                for (u32 w = 0; w < WARPS; w++) share += s.inner[w];
                for (u32 j = 0; j < C; j++) dc += s.dots[0][j];
                dc = fmaf(ws[WS_GAMMA], share, dc);
            }
            ws[WS_DC + i] += dc;
        }
    }

    // b += P K     a += P^T Q + R K, with P and R summed over the value heads
    for (u32 e = threadIdx.x; e < C * C / 4; e += THREADS) {
        const u32 i = e / (C / 4), j = e % (C / 4) * 4;
        float4 p = four(0.f), r = four(0.f);
        for (u32 member = 0; member < group; member++) {
            const float* ws = ws_of(member) + 4 * e;
            p = p + *(const float4*)(ws + WS_P), r = r + *(const float4*)(ws + WS_R);
        }
        *(float4*)s.p.at(i, j) = p, *(float4*)s.r.at(i, j) = r;
    }
    __syncthreads();
#pragma unroll
    for (u32 step = 0; step < C / 8; step++) {
        u32 right_q[N][2], right_k[N][2];
#pragma unroll
        for (u32 n = 0; n < N; n++) {
            right(right_q[n], q.down(8 * step + 2 * t, 8 * n + g));
            right(right_k[n], k.down(8 * step + 2 * t, 8 * n + g));
        }
#pragma unroll
        for (u32 m = 0; m < 2; m++) {
            u32 left_p[4], across[4], left_r[4];
            left(left_p, s.p.along(2 * m, step), s.p.along(2 * m + 1, step));
            left(across, s.p.down(step, 2 * m), s.p.down(step, 2 * m + 1));
            left(left_r, s.r.along(2 * m, step), s.r.along(2 * m + 1, step));
#pragma unroll
            for (u32 n = 0; n < N; n++) {
                mma_tf32(b.d[m][n], left_p, right_k[n]);
                mma_tf32(a.d[m][n], across, right_q[n]);
                mma_tf32(a.d[m][n], left_r, right_k[n]);
            }
        }
    }

    if (l.c.l2norm) {
        // The norms are the same for all value heads.
        const float* ws = ws_of(0);
        give_dots(s.part[0][warp], b, q);
        give_dots(s.part[1][warp], a, k);
        __syncthreads();
        if (threadIdx.x < 2 * C) {
            const u32 which = threadIdx.x / C, i = threadIdx.x % C;
            const float norm = ws[(which == 0 ? WS_RQ : WS_RK) + i];
            s.dots[which][i] = norm * norm * row_sum(s.part[which], i);
        }
        __syncthreads();
        subtract(b, s.dots[0], q);
        subtract(a, s.dots[1], k);
    }
    store<T>(b, l.m.dq, l.p.dq_off + (size_t)chunk.x * l.p.dq_stride + own, l.p.dq_stride, len);
    store<T>(a, l.m.dk, l.p.dk_off + (size_t)chunk.x * l.p.dk_stride + own, l.p.dk_stride, len);
}

KERNEL(gdn_grad_qk_mma_f16_k64, gdn_grad_qk, THREADS) { grad_qk<F16, 64>(l); }
KERNEL(gdn_grad_qk_mma_f16_k128, gdn_grad_qk, THREADS) { grad_qk<F16, 128>(l); }
KERNEL(gdn_grad_qk_mma_bf16_k64, gdn_grad_qk, THREADS) { grad_qk<Bf16, 64>(l); }
KERNEL(gdn_grad_qk_mma_bf16_k128, gdn_grad_qk, THREADS) { grad_qk<Bf16, 128>(l); }
