// Carries the gradient of one head's state over the chunks of one segment, last to first, for VT columns, on the matrix units:
// gdn_grad_scan.cu, with every product transposed so that its left operand is in registers.
//
//   dN^T = n o (dS'^T K^T) + dO^T P     X^T = dN^T B     dS^T = gamma_C dS'^T - (u o beta o X)^T K + Z^T Q, Z = o o dO
//
// K of the chunk before comes while this one is worked on; Q, dO, P and B come behind the product with dS'. Both warps of the same
// columns compute dN and X.
#include "state_mma.cuh"

// Lifetimes: k[i] from the barrier before its chunk to the next one; all else from the second barrier of a chunk to the next one's first.
template <u32 K>
struct Shared {
    Rows<K> k[2];
    Rows<K> q;
    Rows<VT> o;  // dO
    Square p, b;
    alignas(16) float factors[4 * C];  // u, o, n [C], gamma_C in a [C]
    alignas(16) float beta[C];
    Exchange<EIGHTS> ks;  // parts of dS'^T K^T
};

template <class T, u32 K>
__device__ __forceinline__ void grad_scan(const row::gdn_grad_scan::Launch& l) {
    typedef Shared<K> Tiles;
    static_assert(sizeof(Tiles) <= 48 << 10, "what every device has");
    SHARED(Tiles, t);
    const uint3 cell = cell_of(l);
    const Place at;
    const u32 head = cell.y, hv = l.p.hv, dv = l.p.dv, kind = l.c.walk;
    const u32 head_k = key_head(head, l.p.hk, hv, l.p.head_map), column = cell.z * VT;
    const Walk walk = walk_of(kind, l.m.segments, cell.x, head, hv, l.bytes[4]);
    auto state_of = [&](u32 slot) { return (float*)l.m.dstate + ((size_t)slot * hv + head) * K * dv + column; };
    auto fetch_k = [&](u32 index) {
        const uint4 chunk = chunk_of(l.m.chunks, index);
        const size_t first = l.p.k_off + (size_t)chunk.x * l.p.k_stride + (size_t)head_k * K;
        t.k[(index - walk.first) % 2].template fetch<SCAN_THREADS>(l.m.k, first, l.p.k_stride, chunk.y);
    };

    StateTile<K> s;
    s.clear_all();
    if (kind < 2 && walk.taken) s.load(at, state_of(walk.slot), dv);
    if (walk.first < walk.end) {
        fetch_k(walk.end - 1);
        copies_end();
    }
    for (u32 index = walk.end; index-- > walk.first;) {
        const uint4 chunk = chunk_of(l.m.chunks, index);
        const u32 len = chunk.y;
        const float* ws = (const float*)l.m.ws + ((size_t)index * hv + head) * WS_LONG;
        float* saved = (float*)l.m.dsaved + ((size_t)index * hv + head) * saved_numbers(K, dv) + column;  // dS' [K, V], X, Z [C, V]
        Rows<K>& k = t.k[(index - walk.first) % 2];

        copies_wait<0>();
        __syncthreads();
        const size_t q0 = l.p.q_off + (size_t)chunk.x * l.p.q_stride + (size_t)head_k * K;
        const size_t do0 = l.p.do_off + (size_t)chunk.x * l.p.do_stride + (size_t)head * dv + column;
        t.q.template fetch<SCAN_THREADS>(l.m.q, q0, l.p.q_stride, len);
        t.o.template fetch<SCAN_THREADS>(l.m.d_o, do0, l.p.do_stride, len);
        t.p.template fetch<SCAN_THREADS>(ws + WS_P);
        t.b.template fetch<SCAN_THREADS>(ws + WS_B);
        if (threadIdx.x < C) copy_16(t.factors + 4 * threadIdx.x, ws + WS_U + 4 * threadIdx.x, true);
        if (threadIdx.x < C / 4) copy_16(t.beta + 4 * threadIdx.x, ws + WS_BETA + 4 * threadIdx.x, true);
        copies_end();
        if (index > walk.first) fetch_k(index - 1);
        copies_end();
        if (kind != 2) s.store(at, saved, dv);

        Sums dn;  // (K dS')^T, then dN^T
        s.template times<T>(at, k, dn);
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) t.ks.give(i, dn[i]);
        copies_wait<1>();
        __syncthreads();

        // dN = n o (K dS') + P^T dO; P is lower triangular
        u32 o[EIGHTS][2];
        load_columns(at, t.o, o);
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) {
            t.ks.take(i, dn[i]);
            const float2 n = pair_of(t.factors + 2 * C, at, i);
#pragma unroll
            for (u32 e = 0; e < 4; e++) dn[i][e] *= e % 2 ? n.y : n.x;
        }
        u32 a[EIGHTS][4];
#pragma unroll
        for (u32 m = 0; m < EIGHTS; m++) {
            left<T>(a[m], o[m][0], o[m][1]);
#pragma unroll
            for (u32 i = 0; i <= m; i++) {
                u32 b[2];
                right(b, t.p.down(m, i));
                mma_tf32(dn[i], a[m], b);
            }
        }
        // X = B^T dN; B is lower triangular
        Sums x;
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) clear(x[i]);
#pragma unroll
        for (u32 m = 0; m < EIGHTS; m++) {
            left(a[m], dn[m]);
#pragma unroll
            for (u32 i = 0; i <= m; i++) {
                u32 b[2];
                right(b, t.b.down(m, i));
                mma_tf32(x[i], a[m], b);
            }
        }
        // dS = gamma_C dS' - K^T (u o beta o X) + Q^T Z, Z = o o dO
        s.scale(t.factors[3 * C]);
        Sums z;
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) {
            const float2 u = pair_of(t.factors, at, i), beta = pair_of(t.beta, at, i), f = pair_of(t.factors + C, at, i);
            const float2 own = make_float2(-u.x * beta.x, -u.y * beta.y);
            left(a[i], make_float2(own.x * x[i][0], own.y * x[i][1]), make_float2(own.x * x[i][2], own.y * x[i][3]));
            const float2 o0 = unpack<T>(o[i][0]), o1 = unpack<T>(o[i][1]);
            z[i][0] = f.x * o0.x, z[i][1] = f.y * o0.y, z[i][2] = f.x * o1.x, z[i][3] = f.y * o1.y;
        }
        if (kind != 2) {
            store_sums(at, x, saved + (size_t)K * dv, dv);
            store_sums(at, z, saved + (size_t)(K + C) * dv, dv);
        }
        s.template add<T>(at, k, a);
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) left(a[i], z[i]);
        s.template add<T>(at, t.q, a);
    }
    if (walk.taken) s.store(at, state_of(walk.to), dv);
}

MMA_SCAN_KERNELS(gdn_grad_scan_mma, gdn_grad_scan, grad_scan)
