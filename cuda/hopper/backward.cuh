// What the backward kernels of Gated DeltaNet share on Hopper: what `prepare`, `keep` and `reverse` leave for the kernels after them.
//
// Per chunk of C = 64 tokens and value head, with S the state before it and S' the one after, and what is known of the forward:
//
//   C = (I + L diag(beta))^-1, L = strictlower(G o K K^T), so that A = diag(beta) C      P as in forward.cuh
//   e = C (V - in o (K S))      N = beta o e      S' = last S + K^T (state o e)
//
// with state = beta e^(c_C - c), in = e^c, out = s e^c (rk, rq in them with L2 norms). Given dO and dS':
//
//   y = state o (K dS') + (P diag(beta))^T dO     dV = C^T y     dS = last dS' - K^T (in o dV) + Q^T (out o dO)
//   M1 = lower(dO e^T)      M2 = strictlower(dV e^T)      F = P o M1 - L o M2
//   dQ = out o (dO S^T) + (s G o M1 diag(beta)) K
//   dK = state o (e dS'^T) - in o (dV S^T) + (s G o M1 diag(beta))^T Q - (D + D^T) K,     D = G o M2 diag(beta)
//   z_i = (e^(c_C - c_i) k_i) . (e dS'^T)_i       dbeta_j = z_j + sum_i F_ij
//   dc_i = q_i . [out o (dO S^T)]_i - k_i . [in o (dV S^T)]_i + sum_j F_ij beta_j - beta_i dbeta_i
//   dc_C += sum_i beta_i z_i + last <dS', S>      dg_t = sum_(i >= t) dc_i in the chunk
//
// That is the adjoint of src/kernel/gdn_grad.rs with N = beta o e put in: dbeta_i = X_i . e_i, X = B^T dN = dN - L^T dV, so that
// neither X, V nor V - in o (K S) is needed once e and dV are there, nothing is divided by beta, and the sums over a column of F are
// dbeta's as well as dc's. beta itself is nowhere in the two scans.
#pragma once
#include "forward.cuh"

namespace hopper {

// S of a chunk before it, dS' of it, e: transposed, 16-bit, in panels [64, 64] as they lie in shared memory (roles.cuh).
//   states, dstates  [chunks, Hv, V / 64] of K / 64 panels [64 of V, 64 of K], then half as many bytes with the next 8 bits
//                    of the same numbers, as the threads have them, for <dS', S>; bfloat16 only, and only of a chunk over which
//                    the head keeps so much of its state that this sum counts (`counts`)
//   news             [chunks, Hv, V / 64]         panels [64 of V, 64 tokens]
__host__ __device__ constexpr int kept_bytes(int k) { return k / 64 * (PANEL + PANEL / 2); }
template <class E>
constexpr bool KEEPS_LOW = false;
template <>
constexpr bool KEEPS_LOW<Bf16> = true;

// Whether <dS', S> is needed to 16 bits: dg has e^(c_C) <dS', S>, beside what the chunk's own tokens add. Below this e^(c_C) the low bits
// change no error of dg in its second digit (NOTES.md).
constexpr float COUNTS_FROM = 0.1f;
__device__ __forceinline__ bool counts(float last) { return last >= COUNTS_FROM; }
template <class Args>
__device__ __forceinline__ char* keep_states(const Args& p, int k, int chunk, int h, int part) {
    return (char*)p.transitions + (((long long)chunk * p.hv + h) * (p.v / 64) + part) * kept_bytes(k);
}
template <class Args>
__device__ __forceinline__ char* keep_news(const Args& p, int chunk, int h, int part) {
    return (char*)p.o + (((long long)chunk * p.hv + h) * (p.v / 64) + part) * PANEL;
}

// Where sums cancel (CANCELS of forward.cuh), what rounding left is multiplied, too, where it would show (NOTES.md). A chunk counts as such for
// all value heads of a key head if it does for one; there
//   lows   two panels of zeros, for chunks of the same segment in which nothing cancels; [places, Hv] twos, what is left of C and P diag(beta), by
//          `prepare`; then, by `keep`, what is left of e, as `news`
//   rests  [places, Hv, V / 64] of K / 64 + 1 panels, by `reverse`: what is left of dS', as in `dstates`, and of dV^T [64 of V, 64 tokens]
// `keep` and `reverse` leave theirs for all chunks of a segment in which there is one.
template <class Args>
__device__ __forceinline__ char* keep_news_rest(const char* lows, const Args& p, int chunk, int h, int part) {
    return (char*)lows + (1 + (long long)p.places * p.hv) * GRAD_LOW_BYTES + (((long long)chunk * p.hv + h) * (p.v / 64) + part) * PANEL;
}
template <class Args>
__device__ __forceinline__ char* keep_rests(const Args& p, int k, int chunk, int h, int part) {
    return p.rests + (((long long)chunk * p.hv + h) * (p.v / 64) + part) * (k / 64 + 1) * PANEL;
}

// A warp's 16 rows of a transposed [64, 64 PANELS], packed as a product's left operand, to `to` in every panel of memory, by way of
// `staging` (PANELS times 2048 bytes), whose last copies have been asked for by the lane that is elected.
template <int PANELS, int N>
__device__ __forceinline__ void keep_rows(uint32_t staging, char* to, const uint32_t (&x)[N], int lane) {
    static_assert(N == PANELS * 16, "four numbers for 16 columns");
    if (elect()) bulk_wait_read();
    __syncwarp();
    const uint32_t at = staging;
    const int block = lane >> 3, row = (block & 1) * 8 + (lane & 7);
#pragma unroll
    for (int s = 0; s < 4 * PANELS; s++)
        stsm(at + (s / 4) * 2048 + swizzled(0, row, 2 * (s % 4) + (block >> 1)), x[4 * s], x[4 * s + 1], x[4 * s + 2], x[4 * s + 3]);
    fence_proxy();
    __syncwarp();
    if (elect()) {
#pragma unroll
        for (int y = 0; y < PANELS; y++) bulk_store(to + (long long)y * PANEL, at + y * 2048, 2048);
        bulk_commit();
    }
}

// Of an f32 in units of its last place less the bfloat16 `high` that it was rounded to: from -32768 to 32768, here as byte 2 of 255 times
// that, so that both ends fit. The numbers' order is that of their bits, so this holds over powers of two, too.
__device__ __forceinline__ uint32_t low_bits(float x, uint32_t high) { return (__float_as_uint(x) - high) * 255u; }

// The low bits of the thread's numbers x of [64, K], rounded to `high`: 16 bytes for every 16 numbers, the threads' side by side.
template <int K>
__device__ __forceinline__ void keep_low(char* to, const float (&x)[K / 2], const uint32_t (&high)[K / 4], int tid) {
#pragma unroll
    for (int n = 0; n < K / 32; n++) {
        uint32_t w[4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const int at = 4 * n + m;
            const float* y = x + 4 * at;
            const uint32_t a = high[2 * at], b = high[2 * at + 1];
            w[m] = bytes_of(bytes_of(low_bits(y[0], a << 16), low_bits(y[1], a & 0xffff0000u), 0x0062), bytes_of(low_bits(y[2], b << 16), low_bits(y[3], b & 0xffff0000u), 0x0062), 0x5410);
        }
        *(uint4*)(to + n * 2048 + tid * 16) = make_uint4(w[0], w[1], w[2], w[3]);
    }
}

// The two bfloat16 of `high` with bytes m and m + 1 (m: 0, 2) of `low` behind them, as f32.
__device__ __forceinline__ void with_low(float (&y)[2], uint32_t high, uint32_t low, int m) {
    y[0] = __uint_as_float((high << 16) + bytes_of(low, 0, m ? 0xaa24 : 0x8804));
    y[1] = __uint_as_float((high & 0xffff0000u) + bytes_of(low, 0, m ? 0xbb34 : 0x9914));
}

struct ReverseArgs {
    const Segment* segments;  // in: row of dstates_in; out: row of dstates_out; -1: zeros, none
    const char* images;       // [chunks, Hv, GRAD_BYTES]
    const float* dstates_in;  // [.., Hv, K, V]
    float* dstates_out;       // [.., Hv, K, V]
    char* transitions;        // dS' of each chunk: `dstates`
    void* dv;                 // [T, dv_stride]
    long long dv_stride;
    int hk, hv;
    int mod;
    int v;            // V
    uint32_t* hung;   // host memory, or null: see mbar_wait
    const int* warm;  // [segments, Hv], for a pass that only carries: chunks from a segment's start on that its start's gradient depends on
    const char* lows;
    char* rests;
    const unsigned char* cancels;  // [places, Hk]: 1 where sums of the chunk cancel for a head of the group
};

// `warm`: what the forward has, and the same from the segments' starts.
struct GradWarmArgs {
    CarryArgs carry;
    int* back;  // [segments, Hv]
};

struct GradientArgs {
    const Chunk* chunks;
    const char* images;   // [chunks, Hv, GRAD_BYTES]
    const char* states;   // S
    const char* dstates;  // dS'
    const char* news;     // e
    void* dq;             // [T, dq_stride]
    void* dk;             // [T, dk_stride]
    float* dg;            // [T, Hv]
    float* dbeta;         // [T, Hv]
    long long dq_stride, dk_stride;
    float scale;
    int chunk_count, hk, hv;
    int mod;
    int l2norm;  // dq and dk are those of q and k before their norms
    uint32_t* hung;
    const unsigned char* cancels;  // [places, Hk]
    const char* lows;              // this and the next for chunks in which sums cancel
    char* rests;
    int places, pad;
};

}  // namespace hopper
