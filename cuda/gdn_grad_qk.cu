// The gradients of q and k of one chunk and key head, summed over its value heads in the order of their index.
//
//   b = Z S^T + P K
//   a = n o (N dS'^T) - u o ((beta o X) S^T) + P^T Q + R K
//   dq = b - rq^2 q (q . b)     dk = a - rk^2 k (k . a)     (with l2norm; else dq = b, dk = a)
//   dc_i += q_i . [Z S^T]_i - k_i . [n o (N dS'^T)]_i
//   dc_C += sum_i k_i . [n o (N dS'^T)]_i + gamma_C <dS', S>
//
// Threads form a grid of C / ROWS x K / 4; thread (ty, tx) holds rows ty * ROWS to ty * ROWS + ROWS - 1 of columns 4 tx to 4 tx + 3 of
// a and b in registers. S, dS', Z, X and N pass through shared memory in slices of V, then P, P^T and R in slices of tokens.
#include "chunk.cuh"

constexpr u32 MOST_QUADS = 64;  // K / 4
constexpr u32 THREADS = 256;
constexpr u32 PART = C + 1;     // between the parts of a row's sum: odd, so that neighbours do not meet in a bank

template <u32 ROWS>
struct Shared {
    static constexpr u32 DEPTH = ROWS <= 4 ? 2 : 1;                  // width of a slice, in fours
    static constexpr u32 QUADS = ROWS <= 4 ? 32 : MOST_QUADS;        // at most
    static constexpr u32 SIDE = 4 * QUADS * DEPTH + QUADS;           // one four after each four rows: no shared banks either
    union {
        struct {
            float4 s[SIDE], ds[SIDE];  // S, dS' [K, DEPTH]
        };
        struct {
            float of_row[QUADS * PART];  // parts of sums over K
            float inner[THREADS];        // parts of <dS', S>
        };
    };
    float4 rows[3][C * DEPTH];  // Z, -u o beta o X, n o N; or P, P^T, R: [C, DEPTH]
    float dots[C];
};

// x against four rows
__device__ __forceinline__ void add_dots(float4& sum, float4 x, float4 s0, float4 s1, float4 s2, float4 s3) {
    sum.x = add_dot(sum.x, x, s0);
    sum.y = add_dot(sum.y, x, s1);
    sum.z = add_dot(sum.z, x, s2);
    sum.w = add_dot(sum.w, x, s3);
}

template <class T, u32 ROWS>
__device__ __forceinline__ void grad_qk(const row::gdn_grad_qk::Launch& l) {
    typedef Shared<ROWS> Tiles;
    constexpr u32 DEPTH = Tiles::DEPTH;
    SHARED(Tiles, t);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, lanes = blockDim.x, hv = l.p.hv, dk = l.c.dk, dv = l.c.dv, quads = dk / 4, group = l.c.group;
    const u32 tx = lane % quads, row0 = lane / quads * ROWS, head_k = cell.y;
    const uint4 chunk = chunk_of(l.m.chunks, cell.x);
    const u32 len = chunk.y;
    const size_t column = (size_t)head_k * dk + 4 * tx;
    const size_t q0 = l.p.q_off + (size_t)chunk.x * l.p.q_stride + column;
    const size_t k0 = l.p.k_off + (size_t)chunk.x * l.p.k_stride + column;
    // Rows of Q and K, zeros past a short chunk's end.
    auto q_row = [&](u32 i) { return i < len ? load4<T>(l.m.q, q0 + (size_t)i * l.p.q_stride) : four(0.f); };
    auto k_row = [&](u32 i) { return i < len ? load4<T>(l.m.k, k0 + (size_t)i * l.p.k_stride) : four(0.f); };
    auto head_of = [&](u32 member) { return value_head(head_k, member, l.p.hk, group, l.p.head_map); };
    auto ws_of = [&](u32 head) { return (float*)l.m.ws + ((size_t)cell.x * hv + head) * WS_LONG; };
    auto row_sum = [&](u32 row) {
        float sum = 0.f;
        for (u32 quad = 0; quad < quads; quad++) sum += t.of_row[quad * PART + row];
        return sum;
    };

    float4 a[ROWS], b[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) a[r] = b[r] = four(0.f);
    for (u32 member = 0; member < group; member++) {
        const u32 head = head_of(member);
        float* ws = ws_of(head);
        const size_t saved0 = ((size_t)cell.x * hv + head) * saved_numbers(dk, dv);
        const float4* saved = (const float4*)((const float*)l.m.saved + saved0);     // S [K, V / 4], U, N [C, V / 4]
        const float4* dsaved = (const float4*)((const float*)l.m.dsaved + saved0);   // dS' [K, V / 4], X, Z [C, V / 4]
        const u32 x0 = dk * (dv / 4), n0 = x0 + C * (dv / 4);

        float4 of_s[ROWS], of_ds[ROWS];  // Z S^T, n o (N dS'^T) [ROWS, 4]
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) of_s[r] = of_ds[r] = four(0.f);
        float inner = 0.f;
        for (u32 slice = 0; slice < dv / 4; slice += DEPTH) {
            __syncthreads();
            for (u32 e = lane; e < dk * DEPTH; e += lanes) {
                const u32 row = e / DEPTH, at = row * (dv / 4) + slice + e % DEPTH;
                const float4 vs = saved[at], vd = dsaved[at];
                t.s[e + row / 4] = vs;
                t.ds[e + row / 4] = vd;
                inner = add_dot(inner, vs, vd);
            }
            for (u32 e = lane; e < C * DEPTH; e += lanes) {
                const u32 row = e / DEPTH, at = row * (dv / 4) + slice + e % DEPTH;
                t.rows[0][e] = dsaved[n0 + at];
                t.rows[1][e] = -(ws[WS_U + row] * ws[WS_BETA + row]) * dsaved[x0 + at];
                t.rows[2][e] = ws[WS_N + row] * saved[n0 + at];
            }
            __syncthreads();
#pragma unroll
            for (u32 d = 0; d < DEPTH; d++) {
                const u32 at = tx * (4 * DEPTH + 1) + d;
                const float4 s0 = t.s[at], s1 = t.s[at + DEPTH], s2 = t.s[at + 2 * DEPTH], s3 = t.s[at + 3 * DEPTH];
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) {
                    add_dots(of_s[r], t.rows[0][(row0 + r) * DEPTH + d], s0, s1, s2, s3);
                    add_dots(a[r], t.rows[1][(row0 + r) * DEPTH + d], s0, s1, s2, s3);
                }
                const float4 d0 = t.ds[at], d1 = t.ds[at + DEPTH], d2 = t.ds[at + 2 * DEPTH], d3 = t.ds[at + 3 * DEPTH];
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) add_dots(of_ds[r], t.rows[2][(row0 + r) * DEPTH + d], d0, d1, d2, d3);
            }
        }
        __syncthreads();
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            t.of_row[tx * PART + row0 + r] = dot(q_row(row0 + r), of_s[r]);
            b[r] = b[r] + of_s[r];
        }
        __syncthreads();
        float dc = lane < C ? row_sum(lane) : 0.f;
        __syncthreads();
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            t.of_row[tx * PART + row0 + r] = dot(k_row(row0 + r), of_ds[r]);
            a[r] = a[r] + of_ds[r];
        }
        t.inner[lane] = inner;
        __syncthreads();
        if (lane < C) {
            // The last token's own share cancels: its factor is 1 whatever its gate.
            const float k_dot = lane + 1 < len ? row_sum(lane) : 0.f;
            float share = 0.f;
            for (u32 e = lane; e < lanes; e += C) share += t.inner[e];
            dc -= k_dot;
            t.dots[lane] = k_dot + ws[WS_GAMMA] * share;
        }
        __syncthreads();
        if (lane < len) {
            if (lane == len - 1)
                for (u32 i = 0; i < C; i++) dc += t.dots[i];
            ws[WS_DC + lane] += dc;
        }
    }

    // b += P K     a += P^T Q + R K, with P and R summed over the value heads
    for (u32 first = 0; first < len; first += 4 * DEPTH) {
        __syncthreads();
        for (u32 e = lane; e < C * DEPTH; e += lanes) {
            const u32 i = e / DEPTH, j = first + 4 * (e % DEPTH);
            float4 p = four(0.f), across = four(0.f), r = four(0.f);
            for (u32 member = 0; member < group; member++) {
                const float* ws = ws_of(head_of(member));
                p = p + *(const float4*)(ws + WS_P + i * C + j);
                const float* column = ws + WS_P + j * C + i;
                across = across + make_float4(column[0], column[C], column[2 * C], column[3 * C]);
                r = r + *(const float4*)(ws + WS_R + i * C + j);
            }
            t.rows[0][e] = p, t.rows[1][e] = across, t.rows[2][e] = r;
        }
        __syncthreads();
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
            const u32 j = first + 4 * d;
            const float4 k_0 = k_row(j), k_1 = k_row(j + 1), k_2 = k_row(j + 2), k_3 = k_row(j + 3);
            const float4 q_0 = q_row(j), q_1 = q_row(j + 1), q_2 = q_row(j + 2), q_3 = q_row(j + 3);
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                const u32 row = (row0 + r) * DEPTH + d;
                const float4 p = t.rows[0][row], across = t.rows[1][row], both = t.rows[2][row];
                add(b[r], p.x, k_0), add(b[r], p.y, k_1), add(b[r], p.z, k_2), add(b[r], p.w, k_3);
                add(a[r], across.x, q_0), add(a[r], across.y, q_1), add(a[r], across.z, q_2), add(a[r], across.w, q_3);
                add(a[r], both.x, k_0), add(a[r], both.y, k_1), add(a[r], both.z, k_2), add(a[r], both.w, k_3);
            }
        }
    }

    if (l.c.l2norm) {
        // The norms are the same for all value heads.
        const float* ws = ws_of(head_of(0));
        __syncthreads();
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) t.of_row[tx * PART + row0 + r] = dot(q_row(row0 + r), b[r]);
        __syncthreads();
        if (lane < C) t.dots[lane] = ws[WS_RQ + lane] * ws[WS_RQ + lane] * row_sum(lane);
        __syncthreads();
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            b[r] = b[r] - t.dots[row0 + r] * q_row(row0 + r);
            t.of_row[tx * PART + row0 + r] = dot(k_row(row0 + r), a[r]);
        }
        __syncthreads();
        if (lane < C) t.dots[lane] = ws[WS_RK + lane] * ws[WS_RK + lane] * row_sum(lane);
        __syncthreads();
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) a[r] = a[r] - t.dots[row0 + r] * k_row(row0 + r);
    }
    const size_t dq0 = l.p.dq_off + (size_t)chunk.x * l.p.dq_stride + column;
    const size_t dk0 = l.p.dk_off + (size_t)chunk.x * l.p.dk_stride + column;
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        const size_t i = row0 + r;
        if (i < len) {
            store4<T>(l.m.dq, dq0 + i * l.p.dq_stride, b[r]);
            store4<T>(l.m.dk, dk0 + i * l.p.dk_stride, a[r]);
        }
    }
}

#define QK_KERNELS(NAME, T)                                              \
    KERNEL(NAME##_r2, gdn_grad_qk, THREADS) { grad_qk<T, 2>(l); }        \
    KERNEL(NAME##_r4, gdn_grad_qk, THREADS) { grad_qk<T, 4>(l); }        \
    KERNEL(NAME##_r8, gdn_grad_qk, THREADS) { grad_qk<T, 8>(l); }
QK_KERNELS(gdn_grad_qk_f32, F32)
QK_KERNELS(gdn_grad_qk_f16, F16)
QK_KERNELS(gdn_grad_qk_bf16, Bf16)
