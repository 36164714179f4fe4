// Softmax attention of a model: norms and rotary of queries and keys, partial results of few query rows over one page of the caches
// (of more: attention_mma.cu), the merge.
#include "attend.cuh"
#include "reduce.cuh"

constexpr u32 MOST_DIM = 256;

struct Row {
    float x[MOST_DIM];
};

// Number i of a row after rotary: (a, b) -> (a cos - b sin, b cos + a sin) for the pair (i, i + rot / 2).
__device__ __forceinline__ float rotated(const Row& row, const float* rope, u32 i, u32 rot) {
    if (i >= rot) return row.x[i];
    const u32 pairs = rot / 2, j = i % pairs;
    const float cosine = rope[j], sine = rope[pairs + j];
    return i < pairs ? row.x[j] * cosine - row.x[j + pairs] * sine : row.x[j + pairs] * cosine + row.x[j] * sine;
}

template <class T>
__device__ __forceinline__ void attn_prepare(const row::attn_prepare::Launch& l) {
    SHARED(Parts, parts);
    SHARED(Row, row);
    const uint3 cell = cell_of(l);
    const size_t t = cell.y;
    const u32 heads = l.p.heads, kv = l.p.kv_heads, dim = l.c.dim, rot = l.c.rot;
    const bool is_q = cell.x < heads, is_v = cell.x >= heads + kv;
    // Queries are followed by their gates: head h starts at 2 h D. Keys and values come after all of them.
    const size_t block = is_q ? 2 * cell.x : heads + cell.x;
    const float* x = (const float*)l.m.qkv + (t * 2 * (heads + kv) + block) * dim;  // [D]
    const float* weight = (const float*)(is_q ? l.m.q_norm : l.m.k_norm);           // [D]
    const float* rope = (const float*)l.m.rope + t * rot;                           // [rot]: cosines, then sines

    float sum = 0.f;
    for (u32 i = threadIdx.x; i < dim; i += blockDim.x) sum = fmaf(x[i], x[i], sum);
    const float norm = 1.f / sqrtf(reduce_sum(sum, parts) / (float)dim + l.p.eps);
    for (u32 i = threadIdx.x; i < dim; i += blockDim.x) row.x[i] = is_v ? x[i] : x[i] * norm * weight[i];
    __syncthreads();
    if (is_q) {
        float* q = (float*)l.m.q + (t * heads + cell.x) * dim;
        for (u32 i = threadIdx.x; i < dim; i += blockDim.x) q[i] = rotated(row, rope, i, rot);
        return;
    }
    // A position before this page wraps around to a large number.
    const u32 place = ((const u32*)l.m.pos)[t] - l.p.page_start;
    if (place >= l.p.page_len) return;
    typename T::Raw* to = (typename T::Raw*)(is_v ? l.m.v_cache : l.m.k_cache) + ((size_t)place * kv + (cell.x - heads) % kv) * dim;
    for (u32 i = threadIdx.x; i < dim; i += blockDim.x) to[i] = T::stored(is_v ? row.x[i] : rotated(row, rope, i, rot));
}

KERNEL(attn_prepare_f32, attn_prepare, MOST_THREADS) { attn_prepare<F32>(l); }
KERNEL(attn_prepare_f16, attn_prepare, MOST_THREADS) { attn_prepare<F16>(l); }
KERNEL(attn_prepare_bf16, attn_prepare, MOST_THREADS) { attn_prepare<Bf16>(l); }

// Causal softmax attention over one page of the caches, as partial results: m, l and acc per query row and split.
//
// A block carries QR query rows over the keys of a split, KT at a time:
//   S = scale Q K^T, masked     m' = max(m, rowmax S)     P = exp(S - m')
//   l <- exp(m - m') l + rowsum P     acc <- exp(m - m') acc + P V
// DP is D rounded up to what the kernel is compiled for.
constexpr u32 DEPTH = 8;          // width of a slice of q and k, in fours
constexpr u32 WIDTH = DEPTH + 1;  // of a row there: neighbouring rows do not meet in a bank

template <u32 QR, u32 LANES>
struct Attend {
    float4 q[QR * WIDTH];
    float4 k[KT * WIDTH];
    float scores[QR * KT];  // S, then P
    float row[LANES];       // a number per thread for its neighbours in a row
    float decay[QR];        // exp(m - m'), in the end m
};

template <class T, u32 QR, u32 LANES, u32 DP>
__device__ __forceinline__ void attend(const row::attend::Launch& l) {
    typedef Attend<QR, LANES> Tiles;
    SHARED(Tiles, t);
    // Scores: threads along keys and along query rows, two keys and REG_Q rows each.
    constexpr u32 SX = KT / 2, SY = LANES / SX, REG_Q = QR / SY;
    // Softmax: threads of a query row.
    constexpr u32 PER_ROW = LANES / QR;
    // Output: threads along D, 8 numbers each; groups of threads along query rows; rows of a thread.
    constexpr u32 OX = DP / 8, OY = LANES / OX, OUT = (QR + OY - 1) / OY;
    static_assert(REG_Q * SY == QR && PER_ROW * QR == LANES && OY > 0, "threads share rows evenly");

    const Cell<QR> cell(l);
    const u32 lane = threadIdx.x, dim = l.c.dim, end = cell.end;
    const typename T::Raw* k_cache = cell.template cache<typename T::Raw>(l.m.k_cache);  // [page_len, kv, D], of this head
    const typename T::Raw* v_cache = cell.template cache<typename T::Raw>(l.m.v_cache);
    const size_t place_stride = cell.place_stride();

    const u32 own = lane / PER_ROW, own_part = lane % PER_ROW;
    const u32 own_end = cell.end_of(own);
    float m = NOTHING, sum = 0.f;  // sum: of this thread's keys alone
    const u32 sx = lane % SX, sy = lane / SX, ox = lane % OX, oy = lane / OX;
    const bool in_dim = ox * 8 < dim;
    float acc[OUT][8];
#pragma unroll
    for (u32 i = 0; i < OUT; i++)
#pragma unroll
        for (u32 j = 0; j < 8; j++) acc[i][j] = 0.f;

    for (u32 k0 = cell.first; k0 < end; k0 += KT) {
        // S = scale Q K^T
        float s[REG_Q][2];
#pragma unroll
        for (u32 i = 0; i < REG_Q; i++) s[i][0] = s[i][1] = 0.f;
        for (u32 depth = 0; depth < dim / 4; depth += DEPTH) {
            __syncthreads();
            for (u32 e = lane; e < QR * DEPTH; e += LANES) {
                const u32 r = e / DEPTH, at = depth + e % DEPTH;
                const bool valid = cell.valid(r) && at < dim / 4;
                const float4 q = valid ? *(const float4*)(cell.q(r) + 4 * at) : four(0.f);
                t.q[r * WIDTH + e % DEPTH] = l.p.scale * q;
            }
            for (u32 e = lane; e < KT * DEPTH; e += LANES) {
                const u32 key = e / DEPTH, at = depth + e % DEPTH;
                const size_t place = min(k0 + key, end - 1);  // what lies behind is masked, and need not be written yet
                t.k[key * WIDTH + e % DEPTH] = at < dim / 4 ? load4<T>(k_cache, place * place_stride + 4 * at) : four(0.f);
            }
            __syncthreads();
#pragma unroll
            for (u32 d = 0; d < DEPTH; d++) {
                const float4 a = t.k[sx * WIDTH + d], b = t.k[(sx + SX) * WIDTH + d];
#pragma unroll
                for (u32 i = 0; i < REG_Q; i++) {
                    const float4 q = t.q[(sy + i * SY) * WIDTH + d];
                    s[i][0] = add_dot(s[i][0], q, a);
                    s[i][1] = add_dot(s[i][1], q, b);
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < REG_Q; i++) {
            t.scores[(sy + i * SY) * KT + sx] = s[i][0];
            t.scores[(sy + i * SY) * KT + sx + SX] = s[i][1];
        }
        __syncthreads();

        // m' and P; a masked place has P = 0.
        float most = NOTHING;
        for (u32 j = own_part; j < KT; j += PER_ROW)
            if (k0 + j < own_end) most = fmaxf(most, t.scores[own * KT + j]);
        t.row[lane] = most;
        __syncthreads();
        float next = m;
#pragma unroll
        for (u32 j = 0; j < PER_ROW; j++) next = fmaxf(next, t.row[own * PER_ROW + j]);
        const float shrink = expf(m - next);
        sum *= shrink;
        m = next;
        for (u32 j = own_part; j < KT; j += PER_ROW) {
            const float p = k0 + j < own_end ? expf(t.scores[own * KT + j] - m) : 0.f;
            t.scores[own * KT + j] = p;
            sum += p;
        }
        if (own_part == 0) t.decay[own] = shrink;
        __syncthreads();

        // acc <- exp(m - m') acc + P V
#pragma unroll
        for (u32 i = 0; i < OUT; i++) {
            const float f = t.decay[min(oy + i * OY, QR - 1)];
#pragma unroll
            for (u32 j = 0; j < 8; j++) acc[i][j] *= f;
        }
        // Places past the end are not read: a place that no token of the tile sees may hold anything, and 0 NaN is not 0.
        if (in_dim) {
            const u32 count = min(KT, end - k0);
#pragma unroll 4
            for (u32 key = 0; key < count; key++) {
                const size_t from = (k0 + key) * place_stride + ox * 8;
                const float4 low = load4<T>(v_cache, from), high = load4<T>(v_cache, from + 4);
                const float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (u32 i = 0; i < OUT; i++) {
                    const float p = t.scores[min(oy + i * OY, QR - 1) * KT + key];
#pragma unroll
                    for (u32 j = 0; j < 8; j++) acc[i][j] = fmaf(p, v[j], acc[i][j]);
                }
            }
        }
    }

    __syncthreads();
    t.row[lane] = sum;
    if (own_part == 0) t.decay[own] = m;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < OUT; i++) {
        const u32 r = oy + i * OY;
        if (r >= QR || !cell.valid(r) || !in_dim) continue;
        float* to = cell.part(r);
#pragma unroll
        for (u32 j = 0; j < 8; j++) to[2 + ox * 8 + j] = acc[i][j];
        if (ox == 0) {
            float total = 0.f;
#pragma unroll
            for (u32 j = 0; j < PER_ROW; j++) total += t.row[r * PER_ROW + j];
            to[0] = t.decay[r];
            to[1] = total;
        }
    }
}

#define ATTEND_KERNELS(NAME, T)                                 \
    KERNEL(NAME##_q4_d64, attend, 64) { attend<T, 4, 64, 64>(l); } \
    KERNEL(NAME##_q4_d256, attend, 64) { attend<T, 4, 64, 256>(l); }
ATTEND_KERNELS(attend_f32, F32)
ATTEND_KERNELS(attend_f16, F16)
ATTEND_KERNELS(attend_bf16, Bf16)

// m = max m_s     y = sum_s exp(m_s - m) acc_s / sum_s exp(m_s - m) l_s * sigmoid(gate)
KERNEL(attend_merge, attend_merge, MOST_THREADS) {
    SHARED(Parts, parts);
    const uint3 cell = cell_of(l);
    const size_t t = cell.y, query = t * l.p.heads + cell.x;
    const u32 dim = l.c.dim, slots = l.p.slots;
    const float* part = (const float*)l.m.part + query * slots * (dim + 2);                          // [slots, D + 2]
    const float* gate = (const float*)l.m.qkv + t * l.p.qkv_stride + (2 * (size_t)cell.x + 1) * dim;  // [D]
    float* y = (float*)l.m.y + query * dim;                                                          // [D]

    float most = NOTHING;
    for (u32 s = threadIdx.x; s < slots; s += blockDim.x) most = fmaxf(most, part[(size_t)s * (dim + 2)]);
    most = reduce_max(most, parts);
    float total = 0.f;
    for (u32 s = threadIdx.x; s < slots; s += blockDim.x) {
        const float* slot = part + (size_t)s * (dim + 2);
        total = fmaf(expf(slot[0] - most), slot[1], total);
    }
    total = reduce_sum(total, parts);
    for (u32 i = threadIdx.x; i < dim; i += blockDim.x) {
        float sum = 0.f;
        for (u32 s = 0; s < slots; s++) {
            const float* slot = part + (size_t)s * (dim + 2);
            sum = fmaf(expf(slot[0] - most), slot[2 + i], sum);
        }
        // A token that sees no key gets 0.
        y[i] = (total == 0.f ? 0.f : sum / total) * sigmoid(gate[i]);
    }
}
