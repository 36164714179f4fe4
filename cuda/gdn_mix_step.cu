// One decoded token of a mixer after its convolution, fused: L2 norm, gates, recurrence, gated norm.
//
// As gdn_step, but a block takes a whole head, whose outputs are normed together. Thread (ty, tx) takes rows ty, ty + groups, .. of columns 4 tx
// to 4 tx + 3: in registers, all asked for at once, if they are HELD; else the state is read twice (for S^T k and S^T q, then for its
// update), the second time from a cache, a row after the other.
#include "reduce.cuh"

struct Shared {
    float4 sk[MOST_THREADS], sq[MOST_THREADS];  // parts of S^T k and S^T q [groups, V]
};

constexpr u32 HELD = 16;  // K = 128 with 256 threads for V = 128

// ROWS: those of a thread; 0: as many as there are.
template <u32 ROWS>
__device__ __forceinline__ void mix_step(const row::gdn_mix_step::Launch& l) {
    SHARED(Shared, part);
    SHARED(Parts, parts);
    const uint3 cell = cell_of(l);
    const u32 lane = threadIdx.x, dk = l.c.dk, dv = l.c.dv, quads = dv / 4, groups = blockDim.x / quads;
    const u32 tx = lane % quads, ty = lane / quads;
    const bool works = ty < groups;
    const u32 hk = l.p.hk, hv = l.p.hv, head = cell.y, head_k = key_head(head, hk, hv, l.p.head_map);
    const uint4 seq = ((const uint4*)l.m.seqs)[cell.x];  // first token, tokens, slot, 0
    const float* small = (const float*)l.m.small;        // A_log [Hv], dt_bias [Hv], norm weight [V]
    float4* state = (float4*)l.m.state + ((size_t)seq.z * hv + head) * dk * quads + tx;  // [K, V / 4]

    float4 held[ROWS ? ROWS : 1];
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) held[i] = state[(size_t)(ty + i * groups) * quads];
    for (u32 n = 0; n < seq.y; n++) {
        const size_t t = (size_t)seq.x + n;
        const float* q = (const float*)l.m.qkv + t * l.p.qkv_stride + (size_t)head_k * dk;                                     // [K]
        const float* k = q + (size_t)hk * dk;                                                                                 // [K]
        const float* v = (const float*)l.m.qkv + t * l.p.qkv_stride + 2 * (size_t)hk * dk + (size_t)head * dv + 4 * tx;       // [4]
        const float* proj = (const float*)l.m.proj + t * l.p.p_stride;

        float4 dots = four(0.f);
        for (u32 i = lane; i < dk; i += blockDim.x) {
            dots.x = fmaf(k[i], k[i], dots.x);
            dots.y = fmaf(q[i], q[i], dots.y);
            dots.z = fmaf(k[i], q[i], dots.z);
        }
        dots = reduce_sum4(dots, parts);
        float4 sk = four(0.f), sq = four(0.f);
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            add(sk, k[ty + i * groups], held[i]);
            add(sq, q[ty + i * groups], held[i]);
        }
        if (ROWS == 0 && works) {
            for (u32 r = ty; r < dk; r += groups) {
                const float4 s = state[(size_t)r * quads];
                add(sk, k[r], s);
                add(sq, q[r], s);
            }
        }
        part.sk[lane] = sk;
        part.sq[lane] = sq;
        __syncthreads();
        sk = sq = four(0.f);
        for (u32 r = 0; r < groups; r++) {
            sk = sk + part.sk[r * quads + tx];
            sq = sq + part.sq[r * quads + tx];
        }
        const float norm_k = 1.f / sqrtf(dots.x + 1e-6f), norm_q = 1.f / sqrtf(dots.y + 1e-6f);
        const float a = proj[l.p.a_off + head] + small[hv + head];
        const float e = expf(-expf(small[head]) * softplus(a));
        const float beta = sigmoid(proj[l.p.b_off + head]);
        const float4 d = beta * (make_float4(v[0], v[1], v[2], v[3]) - e * norm_k * sk);
        const float4 o = l.p.scale * norm_q * (e * sq + norm_k * dots.z * d);
        const float4 kd = norm_k * d;
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            held[i] = e * held[i];
            add(held[i], k[ty + i * groups], kd);
        }
        if (ROWS == 0 && works) {
            for (u32 r = ty; r < dk; r += groups) {
                float4 s = e * state[(size_t)r * quads];
                add(s, k[r], kd);
                state[(size_t)r * quads] = s;
            }
        }
        const float square = reduce_sum(ty == 0 ? dot(o, o) : 0.f, parts);
        if (ty == 0) {
            const float norm = 1.f / sqrtf(square / (float)dv + l.p.eps);
            const float* z = proj + l.p.z_off + (size_t)head * dv + 4 * tx;                  // [4]
            const float* w = small + 2 * hv + 4 * tx;                                        // [4]
            float* y = (float*)l.m.y + (t * hv + head) * dv + 4 * tx;                        // [4]
#pragma unroll
            for (u32 c = 0; c < 4; c++) y[c] = get(o, c) * norm * w[c] * silu(z[c]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) state[(size_t)(ty + i * groups) * quads] = held[i];
}

KERNEL(gdn_mix_step, gdn_mix_step, MOST_THREADS) {
    if (l.c.dk * l.c.dv == HELD * 4 * blockDim.x && blockDim.x % (l.c.dv / 4) == 0)
        mix_step<HELD>(l);
    else
        mix_step<0>(l);
}
