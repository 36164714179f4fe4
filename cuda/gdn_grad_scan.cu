// Carries the gradient of one head's state over the chunks of one segment, last to first, for VT columns.
//
//   dN = n o (K dS') + P^T dO     X = B^T dN     dS = gamma_C dS' - K^T (u o beta o X) + Q^T Z, Z = o o dO
//
// walk = 1: the walk of each head; 2: the same from zero, and nothing is saved. Threads and slices as in gdn_scan.cu.
#include "chunk.cuh"
#include "state.cuh"

constexpr u32 TOKENS = C / GROUPS;
constexpr u32 DEPTH = 32;
constexpr u32 PAD = 1;

template <u32 KP, u32 VT>
struct Shared {
    static constexpr u32 SLICE = C * DEPTH / (2 * KP);  // tokens of a slice of K and of Q for the update
    union {
        float4 k[C * (DEPTH / 4 + PAD)];  // K [C, DEPTH]
        float4 dn[C * VT / 4];            // dN [C, VT], from then on
        float4 kq[2][SLICE * KP / 4];     // K and Q [SLICE, K], for the update
    };
    union {
        float4 s[DEPTH * VT / 4];  // rows of dS' [DEPTH, VT]
        float4 x[C * VT / 4];      // -u o beta o X [C, VT], from then on
    };
    float4 o[C * VT / 4];  // dO, then Z [C, VT]
    float p[C * C];        // P [C, C]
    float b[C * C];        // B [C, C]
    float u[C], of[C], n[C], beta[C], gamma;
};

template <class T, u32 KP, u32 VT>
__device__ __forceinline__ void grad_scan(const row::gdn_grad_scan::Launch& l) {
    typedef Slice<KP, VT> State;
    constexpr u32 QUADS = State::QUADS, ROWS = State::ROWS, LANES = State::THREADS, WIDTH = DEPTH / 4 + PAD;
    typedef Shared<KP, VT> Tiles;
    SHARED(Tiles, t);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, tx = lane % QUADS, ty = lane / QUADS;
    const u32 head = cell.y, hv = l.p.hv, dk = l.c.dk, dv = l.p.dv, kind = l.c.walk;
    const u32 head_k = key_head(head, l.p.hk, hv, l.p.head_map);
    const u32 column = cell.z * VT + 4 * tx, row0 = ty * ROWS;
    const Walk walk = walk_of(kind, l.m.segments, cell.x, head, hv, l.bytes[4]);
    auto state_of = [&](u32 slot) { return (float*)l.m.dstate + (((size_t)slot * hv + head) * dk + row0) * dv + column; };

    float4 s[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) s[r] = four(0.f);
    if (kind < 2 && walk.taken) State::load(s, state_of(walk.slot), row0, dk, dv);
    for (u32 at = walk.end; at-- > walk.first;) {
        const uint4 chunk = chunk_of(l.m.chunks, at);
        const u32 len = chunk.y;
        const size_t q0 = l.p.q_off + (size_t)chunk.x * l.p.q_stride + (size_t)head_k * dk;
        const size_t k0 = l.p.k_off + (size_t)chunk.x * l.p.k_stride + (size_t)head_k * dk;
        const size_t do0 = l.p.do_off + (size_t)chunk.x * l.p.do_stride + (size_t)head * dv + column;
        const float* ws = (const float*)l.m.ws + ((size_t)at * hv + head) * WS_LONG;
        float* saved = (float*)l.m.dsaved + ((size_t)at * hv + head) * saved_numbers(dk, dv) + column;  // dS' [K, V], X, Z [C, V]
        if (kind != 2) State::store(s, saved + (size_t)row0 * dv, row0, dk, dv);

        float4 ks[TOKENS];  // K dS' [TOKENS, 4]
#pragma unroll
        for (u32 i = 0; i < TOKENS; i++) ks[i] = four(0.f);
        for (u32 depth = 0; depth < dk; depth += DEPTH) {
            __syncthreads();
            for (u32 e = lane; e < C * DEPTH / 4; e += LANES) {
                const u32 i = e / (DEPTH / 4), x = e % (DEPTH / 4), col = depth + 4 * x;
                t.k[i * WIDTH + x] = i < len && col < dk ? load4<T>(l.m.k, k0 + (size_t)i * l.p.k_stride + col) : four(0.f);
            }
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                // Rows before the slice wrap around to large numbers.
                const u32 d = row0 + r - depth;
                if (d < DEPTH) t.s[d * QUADS + tx] = s[r];
            }
            if (depth == 0) {
                for (u32 i = ty; i < C; i += GROUPS)
                    t.o[i * QUADS + tx] = i < len ? load4<T>(l.m.d_o, do0 + (size_t)i * l.p.do_stride) : four(0.f);
                for (u32 e = lane; e < C * C; e += LANES) t.p[e] = ws[WS_P + e], t.b[e] = ws[WS_B + e];
                for (u32 e = lane; e < C; e += LANES) {
                    t.u[e] = ws[WS_U + e], t.of[e] = ws[WS_O + e], t.n[e] = ws[WS_N + e], t.beta[e] = ws[WS_BETA + e];
                }
                if (lane == 0) t.gamma = ws[WS_GAMMA];
            }
            __syncthreads();
#pragma unroll 4
            for (u32 d = 0; d < DEPTH / 4; d++) {
                const float4 s0 = t.s[4 * d * QUADS + tx], s1 = t.s[(4 * d + 1) * QUADS + tx];
                const float4 s2 = t.s[(4 * d + 2) * QUADS + tx], s3 = t.s[(4 * d + 3) * QUADS + tx];
#pragma unroll
                for (u32 i = 0; i < TOKENS; i++) add_rows(ks[i], t.k[(ty + i * GROUPS) * WIDTH + d], s0, s1, s2, s3);
            }
        }
        __syncthreads();
        // dN = n o (K dS') + P^T dO; P is lower triangular
#pragma unroll
        for (u32 j = 0; j < TOKENS; j++) {
            const u32 i = ty + j * GROUPS;
            float4 dn = t.n[i] * ks[j];
            for (u32 m = i; m < len; m++) add(dn, t.p[m * C + i], t.o[m * QUADS + tx]);
            t.dn[i * QUADS + tx] = dn;
        }
        __syncthreads();
        // X = B^T dN, Z = o o dO; B is lower triangular
#pragma unroll
        for (u32 j = 0; j < TOKENS; j++) {
            const u32 i = ty + j * GROUPS;
            float4 x = four(0.f);
            for (u32 m = i; m < len; m++) add(x, t.b[m * C + i], t.dn[m * QUADS + tx]);
            if (kind != 2) *(float4*)(saved + (size_t)(dk + i) * dv) = x;
            t.x[i * QUADS + tx] = -(t.u[i] * t.beta[i]) * x;
            const float4 z = t.of[i] * t.o[i * QUADS + tx];
            if (kind != 2) *(float4*)(saved + (size_t)(dk + C + i) * dv) = z;
            t.o[i * QUADS + tx] = z;
        }
        // dS = gamma_C dS' - K^T (u o beta o X) + Q^T Z
        const float gamma = t.gamma;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) s[r] = gamma * s[r];
        for (u32 first = 0; first < len; first += Tiles::SLICE) {
            const u32 count = min(Tiles::SLICE, len - first);
            __syncthreads();
            for (u32 e = lane; e < count * (KP / 4); e += LANES) {
                const u32 i = first + e / (KP / 4), col = 4 * (e % (KP / 4));
                const bool valid = col < dk;
                t.kq[0][e] = valid ? load4<T>(l.m.k, k0 + (size_t)i * l.p.k_stride + col) : four(0.f);
                t.kq[1][e] = valid ? load4<T>(l.m.q, q0 + (size_t)i * l.p.q_stride + col) : four(0.f);
            }
            __syncthreads();
            for (u32 i = 0; i < count; i++) {
                const float4 x = t.x[(first + i) * QUADS + tx], z = t.o[(first + i) * QUADS + tx];
#pragma unroll
                for (u32 r = 0; r < ROWS / 4; r++) {
                    const float4 k = t.kq[0][i * (KP / 4) + row0 / 4 + r], q = t.kq[1][i * (KP / 4) + row0 / 4 + r];
#pragma unroll
                    for (u32 c = 0; c < 4; c++) {
                        add(s[4 * r + c], get(k, c), x);
                        add(s[4 * r + c], get(q, c), z);
                    }
                }
            }
        }
    }
    if (walk.taken) State::store(s, state_of(walk.to), row0, dk, dv);
}

SCAN_KERNELS(gdn_grad_scan, gdn_grad_scan, grad_scan)
