// Carries the state of one head over the chunks of one segment, for VT columns.
//
//   W = V - u o (K S)     N = A W     O = o o (Q S) + P N     S <- gamma_C S + K^T (n o N)
//
// save = 1: S before the chunk, U = u o (K S) and N go into o instead of O. save = 2: neither.
// walk = 1: the walk of each head; 2: the same from zero; 3: from the identity with v = 0, for heads with a transition.
//
// The state is in registers (state.cuh); thread (ty, tx) computes rows ty and ty + 16 of the [C, VT] products. K and Q pass
// through shared memory in slices: of 32 columns for the products with S, of whole tokens for the update of S.
#include "chunk.cuh"
#include "state.cuh"

constexpr u32 TOKENS = C / GROUPS;  // rows of the [C, VT] products that a thread has
constexpr u32 DEPTH = 32;           // columns of a slice of K and Q
constexpr u32 PAD = 1;              // fours after a row of a slice, so that neighbouring rows do not meet in a bank

template <u32 KP, u32 VT>
struct Shared {
    static constexpr u32 SLICE = C * DEPTH / KP;  // tokens of a slice for the update
    union {
        float4 k[C * (DEPTH / 4 + PAD)];  // K [C, DEPTH], for the products with S
        float4 nk[SLICE * KP / 4];        // n o K [SLICE, K], for the update
    };
    union {
        float4 q[C * (DEPTH / 4 + PAD)];  // Q [C, DEPTH], for the products with S
        float4 n[C * VT / 4];             // N [C, VT], from then on
    };
    union {
        float4 s[DEPTH * VT / 4];  // rows of S [DEPTH, VT], for the products with it
        float4 w[C * VT / 4];      // W [C, VT], from then on
    };
    float a[C * C];  // A [C, C]
    float p[C * C];  // P [C, C]
    float u[C], o[C], nf[C], gamma;
};

template <class T, u32 KP, u32 VT>
__device__ __forceinline__ void scan(const row::gdn_scan::Launch& l) {
    typedef Slice<KP, VT> State;
    constexpr u32 QUADS = State::QUADS, ROWS = State::ROWS, LANES = State::THREADS, WIDTH = DEPTH / 4 + PAD;
    typedef Shared<KP, VT> Tiles;
    SHARED(Tiles, t);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, tx = lane % QUADS, ty = lane / QUADS;
    const u32 head = cell.y, hv = l.p.hv, dk = l.c.dk, dv = l.p.dv, save = l.c.save, kind = l.c.walk;
    const u32 head_k = key_head(head, l.p.hk, hv, l.p.head_map);
    const u32 column = cell.z * VT + 4 * tx, row0 = ty * ROWS;
    const Walk walk = walk_of(kind, l.m.segments, cell.x, head, hv, l.bytes[4]);
    auto state_of = [&](u32 slot) { return (float*)l.m.state + (((size_t)slot * hv + head) * dk + row0) * dv + column; };

    float4 s[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) s[r] = four(0.f);
    if (kind < 2 && walk.taken) State::load(s, state_of(walk.slot), row0, dk, dv);
    if (kind == 3) State::identity(s, row0, column);
    for (u32 at = walk.first; at < walk.end; at++) {
        const uint4 chunk = chunk_of(l.m.chunks, at);
        const u32 len = chunk.y;
        const size_t q0 = l.p.q_off + (size_t)chunk.x * l.p.q_stride + (size_t)head_k * dk;
        const size_t k0 = l.p.k_off + (size_t)chunk.x * l.p.k_stride + (size_t)head_k * dk;
        const size_t v0 = l.p.v_off + (size_t)chunk.x * l.p.v_stride + (size_t)head * dv + column;
        const size_t o0 = l.p.o_off + (size_t)chunk.x * l.p.o_stride + (size_t)head * dv + column;
        const float* ws = (const float*)l.m.ws + ((size_t)at * hv + head) * (l.c.grad ? WS_LONG : WS_SHORT);
        float* saved = (float*)l.m.o + ((size_t)at * hv + head) * saved_numbers(dk, dv) + column;  // with save = 1
        if (save == 1) State::store(s, saved + (size_t)row0 * dv, row0, dk, dv);

        // ks = K S, qs = Q S [TOKENS, 4]
        float4 ks[TOKENS], qs[TOKENS];
#pragma unroll
        for (u32 i = 0; i < TOKENS; i++) ks[i] = qs[i] = four(0.f);
        for (u32 depth = 0; depth < dk; depth += DEPTH) {
            __syncthreads();
            for (u32 e = lane; e < C * DEPTH / 4; e += LANES) {
                const u32 i = e / (DEPTH / 4), x = e % (DEPTH / 4), col = depth + 4 * x;
                const bool valid = i < len && col < dk;
                t.k[i * WIDTH + x] = valid ? load4<T>(l.m.k, k0 + (size_t)i * l.p.k_stride + col) : four(0.f);
                if (save == 0) t.q[i * WIDTH + x] = valid ? load4<T>(l.m.q, q0 + (size_t)i * l.p.q_stride + col) : four(0.f);
            }
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                // Rows before the slice wrap around to large numbers.
                const u32 d = row0 + r - depth;
                if (d < DEPTH) t.s[d * QUADS + tx] = s[r];
            }
            if (depth == 0) {
                for (u32 e = lane; e < C * C; e += LANES) {
                    t.a[e] = ws[WS_A + e];
                    t.p[e] = ws[WS_P + e];
                }
                for (u32 e = lane; e < C; e += LANES) t.u[e] = ws[WS_U + e], t.o[e] = ws[WS_O + e], t.nf[e] = ws[WS_N + e];
                if (lane == 0) t.gamma = ws[WS_GAMMA];
            }
            __syncthreads();
#pragma unroll 4
            for (u32 d = 0; d < DEPTH / 4; d++) {
                const float4 s0 = t.s[4 * d * QUADS + tx], s1 = t.s[(4 * d + 1) * QUADS + tx];
                const float4 s2 = t.s[(4 * d + 2) * QUADS + tx], s3 = t.s[(4 * d + 3) * QUADS + tx];
#pragma unroll
                for (u32 i = 0; i < TOKENS; i++) {
                    add_rows(ks[i], t.k[(ty + i * GROUPS) * WIDTH + d], s0, s1, s2, s3);
                    if (save == 0) add_rows(qs[i], t.q[(ty + i * GROUPS) * WIDTH + d], s0, s1, s2, s3);
                }
            }
        }
        __syncthreads();
        // W = V - u o (K S)
#pragma unroll
        for (u32 j = 0; j < TOKENS; j++) {
            const u32 i = ty + j * GROUPS;
            const float4 u = i < len ? t.u[i] * ks[j] : four(0.f);
            const bool has_v = i < len && kind != 3;
            t.w[i * QUADS + tx] = (has_v ? load4<T>(l.m.v, v0 + (size_t)i * l.p.v_stride) : four(0.f)) - u;
            if (save == 1) *(float4*)(saved + (size_t)(dk + i) * dv) = u;
        }
        __syncthreads();
        // N = A W; A is lower triangular
#pragma unroll
        for (u32 j = 0; j < TOKENS; j++) {
            const u32 i = ty + j * GROUPS;
            float4 n = four(0.f);
            for (u32 m = 0; m <= i; m++) add(n, t.a[i * C + m], t.w[m * QUADS + tx]);
            t.n[i * QUADS + tx] = n;
            if (save == 1) *(float4*)(saved + (size_t)(dk + C + i) * dv) = n;
        }
        __syncthreads();
        // O = o o (Q S) + P N; P is lower triangular
        if (save == 0) {
#pragma unroll
            for (u32 j = 0; j < TOKENS; j++) {
                const u32 i = ty + j * GROUPS;
                if (i < len) {
                    float4 out = t.o[i] * qs[j];
                    for (u32 m = 0; m <= i; m++) add(out, t.p[i * C + m], t.n[m * QUADS + tx]);
                    store4<T>(l.m.o, o0 + (size_t)i * l.p.o_stride, out);
                }
            }
        }
        // S <- gamma_C S + K^T (n o N)
        const float gamma = t.gamma;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) s[r] = gamma * s[r];
        for (u32 first = 0; first < len; first += Tiles::SLICE) {
            const u32 count = min(Tiles::SLICE, len - first);
            __syncthreads();
            for (u32 e = lane; e < count * (KP / 4); e += LANES) {
                const u32 i = first + e / (KP / 4), col = 4 * (e % (KP / 4));
                t.nk[e] = col < dk ? t.nf[i] * load4<T>(l.m.k, k0 + (size_t)i * l.p.k_stride + col) : four(0.f);
            }
            __syncthreads();
            for (u32 i = 0; i < count; i++) {
                const float4 n = t.n[(first + i) * QUADS + tx];
#pragma unroll
                for (u32 r = 0; r < ROWS / 4; r++) {
                    const float4 k = t.nk[i * (KP / 4) + row0 / 4 + r];
                    add(s[4 * r], k.x, n);
                    add(s[4 * r + 1], k.y, n);
                    add(s[4 * r + 2], k.z, n);
                    add(s[4 * r + 3], k.w, n);
                }
            }
        }
    }
    if (walk.taken) State::store(s, state_of(walk.to), row0, dk, dv);
}

SCAN_KERNELS(gdn_scan, gdn_scan, scan)
