// The recurrence, token by token, for a few tokens of each sequence: decode and verify.
//
//   S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
//
// With S the state before the token and e = exp(g): d = beta (v - e S^T k) and o = s (e S^T q + (k . q) d), so that one pass over S
// and one exchange between threads serve both. The state is in registers (state.cuh).
#include "state.cuh"

template <u32 VT>
struct Shared {
    float4 sk[GROUPS * VT / 4];  // parts of S^T k [GROUPS, VT]
    float4 sq[GROUPS * VT / 4];  // parts of S^T q
    float4 dots[GROUPS];         // parts of k . k, q . q, k . q
};

template <class T, u32 KP, u32 VT>
__device__ __forceinline__ void step(const row::gdn_step::Launch& l) {
    typedef Slice<KP, VT> State;
    constexpr u32 QUADS = State::QUADS, ROWS = State::ROWS;
    typedef Shared<VT> Parts;
    SHARED(Parts, part);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, tx = lane % QUADS, ty = lane / QUADS;
    const u32 head = cell.y, hv = l.p.hv, dk = l.c.dk, dv = l.p.dv;
    const u32 head_k = key_head(head, l.p.hk, hv, l.p.head_map);
    const u32 column = cell.z * VT + 4 * tx, row0 = ty * ROWS;
    const uint4 seq = ((const uint4*)l.m.seqs)[cell.x];  // first token, tokens, slot, 0
    const float* g = (const float*)l.m.g;                // [T, Hv]
    const float* beta = (const float*)l.m.beta;          // [T, Hv]
    float* state = (float*)l.m.state + (((size_t)seq.z * hv + head) * dk + row0) * dv + column;

    float4 s[ROWS];
    State::load(s, state, row0, dk, dv);
    for (u32 i = 0; i < seq.y; i++) {
        const size_t t = (size_t)seq.x + i;
        const size_t q0 = l.p.q_off + t * l.p.q_stride + (size_t)head_k * dk + row0;
        const size_t k0 = l.p.k_off + t * l.p.k_stride + (size_t)head_k * dk + row0;
        float4 keys[ROWS / 4], sk = four(0.f), sq = four(0.f), dots = four(0.f);
#pragma unroll
        for (u32 r = 0; r < ROWS / 4; r++) {
            const bool valid = row0 + 4 * r < dk;
            const float4 k = valid ? load4<T>(l.m.k, k0 + 4 * r) : four(0.f);
            const float4 q = valid ? load4<T>(l.m.q, q0 + 4 * r) : four(0.f);
            keys[r] = k;
            dots.x = add_dot(dots.x, k, k);
            dots.y = add_dot(dots.y, q, q);
            dots.z = add_dot(dots.z, k, q);
            add_rows(sk, k, s[4 * r], s[4 * r + 1], s[4 * r + 2], s[4 * r + 3]);
            add_rows(sq, q, s[4 * r], s[4 * r + 1], s[4 * r + 2], s[4 * r + 3]);
        }
        __syncthreads();
        part.sk[lane] = sk;
        part.sq[lane] = sq;
        if (tx == 0) part.dots[ty] = dots;
        __syncthreads();
        sk = sq = dots = four(0.f);
#pragma unroll
        for (u32 r = 0; r < GROUPS; r++) {
            sk = sk + part.sk[r * QUADS + tx];
            sq = sq + part.sq[r * QUADS + tx];
            dots = dots + part.dots[r];
        }
        const float norm_k = l.c.l2norm ? 1.f / sqrtf(dots.x + 1e-6f) : 1.f;
        const float norm_q = l.c.l2norm ? 1.f / sqrtf(dots.y + 1e-6f) : 1.f;
        const float e = expf(g[l.p.g_off + t * hv + head]);
        const float4 v = load4<T>(l.m.v, l.p.v_off + t * l.p.v_stride + (size_t)head * dv + column);
        const float4 d = beta[l.p.g_off + t * hv + head] * (v - e * norm_k * sk);
        if (ty == 0) {
            const float4 out = l.p.scale * norm_q * (e * sq + norm_k * dots.z * d);
            store4<T>(l.m.o, l.p.o_off + t * l.p.o_stride + (size_t)head * dv + column, out);
        }
        const float4 kd = norm_k * d;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            s[r] = e * s[r];
            add(s[r], get(keys[r / 4], r % 4), kd);
        }
    }
    if (l.c.store) State::store(s, state, row0, dk, dv);
}

STATE_KERNELS(gdn_step, gdn_step, step)
