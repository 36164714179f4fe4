// Carries the state of one head over the chunks of one segment, for VT columns, on the matrix units: gdn_scan.cu, with every product
// transposed so that its left operand is in registers.
//
//   W^T = V^T - u o (S^T K^T)     N^T = W^T A^T     O^T = o o (S^T Q^T) + N^T P^T     S^T <- gamma_C S^T + (n o N)^T K
//
// K of the next chunk comes while this one is worked on, Q as soon as this one's has been read; V, A and P come behind the products
// with S. Both warps of the same columns compute W and N; each computes O of two eights of tokens, h and 3 - h, which cost the same.
#include "state_mma.cuh"

// Lifetimes: k[i] from the barrier before its chunk to the next one; q to the second barrier of its chunk; v, a, p, factors and both
// exchanges from there to the next chunk's first.
template <u32 K>
struct Shared {
    Rows<K> k[2];
    Rows<K> q;
    Rows<VT> v;
    Square a, p;
    alignas(16) float factors[4 * C];  // u, o, n [C], gamma_C in a [C]
    Exchange<EIGHTS> ks;               // parts of S^T K^T
    Exchange<2> qs;                    // parts of S^T Q^T, of the eights that the other half stores
};

template <class T, u32 K>
__device__ __forceinline__ void scan(const row::gdn_scan::Launch& l) {
    typedef Shared<K> Tiles;
    static_assert(sizeof(Tiles) <= 48 << 10, "what every device has");
    SHARED(Tiles, t);
    const uint3 cell = cell_of(l);
    const Place at;
    const u32 head = cell.y, hv = l.p.hv, dv = l.p.dv, save = l.c.save, kind = l.c.walk;
    const u32 head_k = key_head(head, l.p.hk, hv, l.p.head_map), column = cell.z * VT;
    const Walk walk = walk_of(kind, l.m.segments, cell.x, head, hv, l.bytes[4]);
    auto state_of = [&](u32 slot) { return (float*)l.m.state + ((size_t)slot * hv + head) * K * dv + column; };
    auto fetch_k = [&](u32 index) {
        const uint4 chunk = chunk_of(l.m.chunks, index);
        const size_t first = l.p.k_off + (size_t)chunk.x * l.p.k_stride + (size_t)head_k * K;
        t.k[(index - walk.first) % 2].template fetch<SCAN_THREADS>(l.m.k, first, l.p.k_stride, chunk.y);
    };
    auto fetch_q = [&](u32 index) {
        const uint4 chunk = chunk_of(l.m.chunks, index);
        const size_t first = l.p.q_off + (size_t)chunk.x * l.p.q_stride + (size_t)head_k * K;
        t.q.template fetch<SCAN_THREADS>(l.m.q, first, l.p.q_stride, chunk.y);
    };

    StateTile<K> s;
    s.clear_all();
    if (kind < 2 && walk.taken) s.load(at, state_of(walk.slot), dv);
    if (kind == 3) s.each(at, [&](float& x, u32 row, u32 v) { x = row == column + v ? 1.f : 0.f; });
    if (walk.first < walk.end) {
        fetch_k(walk.first);
        if (save == 0) fetch_q(walk.first);
        copies_end();
    }
    for (u32 index = walk.first; index < walk.end; index++) {
        const uint4 chunk = chunk_of(l.m.chunks, index);
        const u32 len = chunk.y;
        const float* ws = (const float*)l.m.ws + ((size_t)index * hv + head) * (l.c.grad ? WS_LONG : WS_SHORT);
        float* saved = (float*)l.m.o + ((size_t)index * hv + head) * saved_numbers(K, dv) + column;  // with save = 1
        const bool more = index + 1 < walk.end;
        Rows<K>& k = t.k[(index - walk.first) % 2];

        copies_wait<0>();
        __syncthreads();
        if (kind != 3) {
            const size_t first = l.p.v_off + (size_t)chunk.x * l.p.v_stride + (size_t)head * dv + column;
            t.v.template fetch<SCAN_THREADS>(l.m.v, first, l.p.v_stride, len);
        }
        t.a.template fetch<SCAN_THREADS>(ws + WS_A);
        if (save == 0) t.p.template fetch<SCAN_THREADS>(ws + WS_P);
        if (threadIdx.x < C) copy_16(t.factors + 4 * threadIdx.x, ws + WS_U + 4 * threadIdx.x, true);
        copies_end();
        if (more) fetch_k(index + 1);
        copies_end();
        if (save == 1) s.store(at, saved, dv);

        // (K S)^T, (Q S)^T
        Sums ks, own;
        s.template times<T>(at, k, ks);
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) t.ks.give(i, ks[i]);
        if (save == 0) {
            Sums qs;
            s.template times<T>(at, t.q, qs);
            // Eights h and 3 - h stay here, the others go to the other half.
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                own[0][e] = at.half ? qs[1][e] : qs[0][e];
                own[1][e] = at.half ? qs[2][e] : qs[3][e];
                own[2][e] = at.half ? qs[0][e] : qs[1][e];
                own[3][e] = at.half ? qs[3][e] : qs[2][e];
            }
            t.qs.give(0, own[2]);
            t.qs.give(1, own[3]);
        }
        copies_wait<1>();
        __syncthreads();
        if (more && save == 0) fetch_q(index + 1);
        copies_end();

        // W = V - u o (K S)
        u32 v[EIGHTS][2];
        if (kind != 3) load_columns(at, t.v, v);
        Sums n;
        u32 w[EIGHTS][4];
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) {
            t.ks.take(i, ks[i]);
            const float2 u = pair_of(t.factors, at, i);
#pragma unroll
            for (u32 e = 0; e < 4; e++) ks[i][e] *= e % 2 ? u.y : u.x;
            float2 v0 = make_float2(0.f, 0.f), v1 = v0;
            if (kind != 3) v0 = unpack<T>(v[i][0]), v1 = unpack<T>(v[i][1]);
            left(w[i], make_float2(v0.x - ks[i][0], v0.y - ks[i][1]), make_float2(v1.x - ks[i][2], v1.y - ks[i][3]));
            clear(n[i]);
        }
        // N = A W; A is lower triangular, in two parts: rounded, it would be wrong in the same way for all columns, and dg shows that.
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++)
#pragma unroll
            for (u32 m = 0; m <= i; m++) {
                const float2 a = t.a.along(i, m);
                u32 b[2], rest[2];
                right(b, a);
                right_rest(rest, a, b);
                mma_tf32(n[i], w[m], rest);
                mma_tf32(n[i], w[m], b);
            }
        if (save == 1) {
            store_sums(at, ks, saved + (size_t)K * dv, dv);
            store_sums(at, n, saved + (size_t)(K + C) * dv, dv);
        }
        // O = o o (Q S) + P N; P is lower triangular
        if (save == 0) {
#pragma unroll
            for (u32 i = 0; i < EIGHTS; i++) left(w[i], n[i]);
#pragma unroll
            for (u32 part = 0; part < 2; part++) {
                const u32 i = part == 0 ? at.half : 3 - at.half;
                t.qs.take(part, own[part]);
                const float2 o = pair_of(t.factors + C, at, i);
#pragma unroll
                for (u32 e = 0; e < 4; e++) own[part][e] *= e % 2 ? o.y : o.x;
#pragma unroll
                for (u32 m = 0; m < EIGHTS; m++)
                    if (m <= i) {
                        u32 b[2];
                        right(b, t.p.along(i, m));
                        mma_tf32(own[part], w[m], b);
                    }
                // Pairs of tokens become pairs of columns.
                const u32 token = 8 * i + at.g, c = column + at.column + 2 * at.t;
                const u32 low = turn(pack<T>(own[part][0], own[part][1])), high = turn(pack<T>(own[part][2], own[part][3]));
                if (token < len) {
                    const size_t first = l.p.o_off + (size_t)(chunk.x + token) * l.p.o_stride + (size_t)head * dv + c;
                    u32* to = (u32*)((uint16_t*)l.m.o + first);
                    to[0] = low, to[4] = high;
                }
            }
        }
        // S <- gamma_C S + K^T (n o N)
#pragma unroll
        for (u32 i = 0; i < EIGHTS; i++) {
            const float2 f = pair_of(t.factors + 2 * C, at, i);
            left(w[i], make_float2(f.x * n[i][0], f.y * n[i][1]), make_float2(f.x * n[i][2], f.y * n[i][3]));
        }
        s.scale(t.factors[3 * C]);
        s.template add<T>(at, k, w);
    }
    if (walk.taken) s.store(at, state_of(walk.to), dv);
}

MMA_SCAN_KERNELS(gdn_scan_mma, gdn_scan, scan)
