// What the kernels of gdn_prepare share: the gates of a chunk, and what goes into ws that is no product.
#pragma once
#include "chunk.cuh"

constexpr u32 THREADS = 64;

// The largest beta |rk k|^2 of a token that counts as one that makes no state longer: 2, and a little for rounding.
constexpr float LONGEST_STEP = 2.00001f;

// The tokens of a chunk.
struct Tokens {
    float norm_q[C], norm_k[C];
    // Cumulated gates c = whole + frac, whole an integer and |frac| <= 1/2: differences of large c keep their digits.
    float whole[C], frac[C];
    alignas(16) float beta[C];
    float square_k[C];  // |rk k|^2
};

// exp(c_i - c_j) for i >= j
__device__ __forceinline__ float decay(const Tokens& s, u32 i, u32 j) {
    return expf((s.whole[i] - s.whole[j]) + (s.frac[i] - s.frac[j]));
}

// 1 / |x| with l2norm, from the sum of squares
__device__ __forceinline__ float inverse_norm(u32 l2norm, float sum) { return l2norm ? 1.f / sqrtf(sum + 1e-6f) : 1.f; }

// The cumulated gates of a value head. Every thread adds in the same order, so that the sums of two tokens share their roundings.
__device__ __forceinline__ void cumulate(Tokens& s, const float* g, const float* beta, u32 hv, u32 len) {
    const u32 lane = threadIdx.x;
    if (lane >= C) return;
    s.frac[lane] = lane < len ? fmaxf(g[(size_t)lane * hv], -1e4f) : 0.f;
    __syncwarp();
    const u32 last = min(lane, len - 1);
    float w = 0.f, f = 0.f;
#pragma unroll 8
    for (u32 j = 0; j < C; j++) {
        const float gate = s.frac[j], gate_whole = rintf(gate);
        if (j > last) continue;
        f += gate - gate_whole;
        const float carry = rintf(f);
        w += gate_whole + carry;
        f -= carry;
    }
    __syncwarp();
    s.whole[lane] = w;
    s.frac[lane] = f;
    s.beta[lane] = lane < len ? beta[(size_t)lane * hv] : 0.f;
}

// What L, P, G and R have at (i, j).
struct Entry {
    float lower = 0.f, p = 0.f, gate = 0.f, r = 0.f;
};

// L = strictlower(diag(beta) G o K K^T)     P = s Q K^T o G, from the products without norms
__device__ __forceinline__ Entry entry_of(const row::gdn_prepare::Launch& l, const Tokens& s, u32 i, u32 j, u32 len, float kk, float qk) {
    Entry x;
    if (j <= i && i < len) {
        x.gate = decay(s, i, j);
        const float d = x.gate * s.norm_k[j];
        x.p = l.p.scale * d * s.norm_q[i] * qk;
        if (j < i) {
            x.r = d * s.norm_k[i] * kk;
            x.lower = s.beta[i] * x.r;
        }
    }
    return x;
}

// The numbers of token j < C.
__device__ __forceinline__ void store_token(const row::gdn_prepare::Launch& l, const Tokens& s, float* ws, u32 j, u32 len) {
    const bool valid = j < len;
    const u32 last = len - 1;
    const float gamma = valid ? expf(s.whole[j] + s.frac[j]) : 0.f;
    ws[WS_U + j] = gamma * s.norm_k[j];
    ws[WS_O + j] = l.p.scale * gamma * s.norm_q[j];
    ws[WS_N + j] = valid ? decay(s, last, j) * s.norm_k[j] : 0.f;
    if (j != 1) {
        ws[WS_GAMMA + j] = expf(s.whole[last] + s.frac[last]);
    } else {
        // No token makes a state longer. NaN fails.
        bool contracts = true;
        for (u32 i = 0; i < len; i++) {
            const float step = s.beta[i] * s.square_k[i];
            contracts = contracts && step >= 0.f && step <= LONGEST_STEP;
        }
        ws[WS_GAMMA + 1] = contracts ? 1.f : 0.f;
    }
    if (l.c.grad) {
        ws[WS_RK + j] = valid ? s.norm_k[j] : 0.f;
        ws[WS_RQ + j] = valid ? s.norm_q[j] : 0.f;
        ws[WS_BETA + j] = s.beta[j];
    }
}
