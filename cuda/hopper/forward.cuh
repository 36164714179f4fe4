// What the two forward kernels of Gated DeltaNet share on Hopper: the numbers of a launch, the tables, and the image that
// `prepare` leaves for `scan`.
//
// Per chunk of C = 64 tokens and value head, with c the gates summed within the chunk (Yang, Kautz, Hatamizadeh, "Gated Delta
// Networks", 2024; the inverse as in Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence
// Length", 2024):
//
//   G_ij = e^(c_i - c_j), i >= j      A = (I + strictlower(diag(beta) G o K K^T))^-1 diag(beta)      P = s lower(G o Q K^T)
//   N = A (V - e^c o (K S))           O = s e^c o (Q S) + P N           S <- e^(c_C) S + K^T (e^(c_C - c) o N)
//
// `prepare` makes A, P and the vectors, for all chunks at once; `scan` walks the chunks of one sequence. With L2 norms, K and Q
// stay as they are and their factors rk, rq go into A, P and the vectors. Where each value head has a key head of its own and memory is the
// bound, the scan makes P of the Q and K that it has anyway (scores.cuh), and `prepare` reads no Q.
#pragma once
#include "roles.cuh"
#include "types.cuh"

namespace hopper {

constexpr int CHUNK = 64;
constexpr int PANEL = CHUNK * 128;  // bytes of a panel [64, 64]

// The image of one chunk and value head. A and P are lower triangular: of columns 16 x to 16 x + 15 the rows from 16 x on are
// kept, in blocks of 8 x 8 (128 bytes, rows contiguous), two blocks side by side, then the 8 rows below.
constexpr int IMAGE_A = 0;
constexpr int IMAGE_VEC = 5120;  // f32: [64] e^c rk, [64] e^(c_C - c) rk, [64] s e^c rq, then the numbers below
constexpr int IMAGE_P = IMAGE_VEC + 1024;
constexpr int IMAGE_BYTES = IMAGE_P + 5120;  // on 128 bytes, or each copy of it touches a line more: 1.5 % of a prefill
// Where the scan makes P: of the vectors, whose last 16 bytes lie where P would, and of A and them.
constexpr int VEC_BYTES = 1040;
constexpr int KEYS_BYTES = IMAGE_VEC + VEC_BYTES;
// What rounding A and P leaves, of a chunk and value head in which sums cancel (`CANCELS`): both as in the image.
constexpr int LOW_A = 0;
constexpr int LOW_P = 5120;
constexpr int LOW_BYTES = 2 * 5120;  // the first is of zeros, for chunks where nothing cancels; then those of chunks and heads
// Where columns 16 x begin.
__host__ __device__ constexpr int image_columns(int x) { return 256 * (8 * x - x * (x - 1)); }
constexpr int VEC_IN = 0, VEC_STATE = 64;
constexpr int VEC_OUT = 128;    // where the scan makes P, c log2(e), of which it makes s e^c rq
constexpr int VEC_LAST = 192;   // e^(c_C)
constexpr int VEC_TOTAL = 193;  // c_C log2(e)
constexpr int VEC_GROWS = 194;  // 1 if beta |k|^2 > 2 for some token of the first half; next: of the second
constexpr int VEC_KEYS = 196;   // where the scan makes P: [64] c log2(e) - log2(rk), so that e^(c_i - c_j) rk_j is one power

// The image that the backward starts from (backward.cuh): C and P diag(beta) [64, 64] as whole panels, as both are also read
// transposed, and the vectors; that of the state with beta in it.
constexpr int GRAD_C = 0;
constexpr int GRAD_P = PANEL;
constexpr int GRAD_VEC = 2 * PANEL;
constexpr int GRAD_BYTES = 2 * PANEL + 2048;
constexpr int GRAD_LOW_BYTES = 2 * PANEL;  // what rounding C and P diag(beta) leaves where sums cancel; the first is of zeros, as above
// Norms are in the exponents, so that e^(c_i - c_j) r_i r_j is one power: [64] each, in powers of two
constexpr int VEC_C = 256;     // c - rk, of columns
constexpr int VEC_BETA = 320;  // (beta itself)
constexpr int VEC_CK = 384;    // c + rk, of rows of K K^T
constexpr int VEC_CQ = 448;    // c + rq + s, of rows of Q K^T

// A log decay below this is as good as none: sums of larger ones lose digits.
constexpr float G_MIN = -30.f;
constexpr float LOG2E = 1.4426950408889634f;

// Where keys of a chunk are alike and gates hardly forget, S and O are small sums of large N, and rounding A, P and N to 16 bits shows. A chunk
// and value head counts as such where
//   sum over j < i of (G_ij k_i.k_j)^2 > CANCELS sum over i of |k_i|^4
// Without decay the sums have the ratio 0.25 for random keys of K = 128, 0.5 of K = 64, 31.5 for equal ones. Where it is less than CANCELS, errors
// stay below 4.8e-3 in bf16 and 9e-4 in f16; above, they go up to 7e-2 and 2e-2 (NOTES.md).
template <class E>
constexpr float CANCELS = 0.75f;
template <>
constexpr float CANCELS<F16> = 1.5f;

// Whether that is asked for the backward, whose f16 no pass gets.
template <class E>
constexpr bool ASKS_GRAD = false;
template <>
constexpr bool ASKS_GRAD<Bf16> = true;

// Up to C tokens of one sequence.
struct Chunk {
    int token;  // the first
    int len;    // 1 to C, or 0: an empty place
};

// A run of chunks of one sequence that one block walks.
struct Segment {
    int token;   // the first
    int tokens;  // how many; only the last segment of a sequence may end within a chunk
    int chunk;   // the first, as an index into the images
    int in;      // row of the states it starts from, -1: zeros
    int out;     // row of the states it leaves, -1: none
    int origin;  // first chunk of its sequence
    int end;     // behind the last chunk of its sequence; for the backward
    int pad;
};

// The segments of one sequence that is cut.
struct Cut {
    int first;  // segment, and row of the states that they start from; the others follow
    int count;
    int in;  // row of the initial states, -1: zeros
    int pad;
};

struct PrepareArgs {
    const float* g;     // [T, Hv]
    const float* beta;  // [T, Hv]
    const Chunk* chunks;
    char* images;  // [chunks, Hv, IMAGE_BYTES]
    float scale;
    int hk, hv;
    int mod;     // value head h has key head h mod Hk; else h / (Hv / Hk)
    int l2norm;  // divide q and k by sqrt(sum of squares + 1e-6)
    int places;  // chunks, empty ones too
    char* lows;              // [1 + chunks x Hv, LOW_BYTES]. For the backward see backward.cuh
    unsigned char* cancels;  // [Hv, places]: 1 where sums of the chunk cancel, and its place in `lows` is written
};

// Beside it, passed by value, as the copy engine's tensor maps must be.
struct PrepareMaps {
    CUtensorMap q, k;
};

struct ScanArgs {
    const Segment* segments;
    const char* images;      // [chunks, Hv, IMAGE_BYTES]
    const float* states_in;  // [.., Hv, K, V]
    float* states_out;       // [.., Hv, K, V]
    float* transitions;      // [.., Hv, K, K + 4], for `state`; for `keep` see keep_states of backward.cuh
    const int* warm;         // [segments, Hv], for `state`: see `warm`
    void* o;                 // [T, o_stride]; for `keep` see keep_news of backward.cuh
    long long o_stride;
    int hk, hv;
    int mod;
    int v;           // V
    uint32_t* hung;  // host memory, or null: see mbar_wait
    const char* lows;              // as for `prepare`; `keep` writes there, too
    const unsigned char* cancels;  // [Hv, places]; for the backward [places, Hk]
    int places;
    int l2norm;  // these two as for `prepare`
    float scale;
    int pad;
};

struct CarryArgs {
    const Segment* segments;
    const Cut* cuts;
    const char* images;
    int* warm;           // [segments, Hv]: chunks that the state behind a segment remembers, -1: more than there are
    const float* h0;     // [.., Hv, K, V]
    float* states;       // [segments, Hv, K, V]: before each segment
    const float* transitions;  // [segments, Hv, K, K + 4]: over the segment before
    float threshold;     // sum of log decays behind which nothing is remembered
    int hv, v;
};

// Numbers from one row of a transition to the next: as `carry` has them in shared memory, where they come as they are.
__host__ __device__ constexpr int transition_stride(int k) { return k + 4; }

// Zeroes rows from `len` on of a panel; all `threads` threads.
__device__ __forceinline__ void clear_rows(uint32_t panel, int len, int tid, int threads) {
#pragma unroll 1
    for (int n = len * 8 + tid; n < CHUNK * 8; n += threads) shared_zero_16(panel + n * 16);
}

// What rounding two numbers to I leaves, rounded.
template <class I>
__device__ __forceinline__ uint32_t pack_rest(float x, float y) {
    const uint32_t high = I::pack(x, y);
    return I::pack(x - I::lo(high), y - I::hi(high));
}

__device__ __forceinline__ int key_head(int h, int hk, int hv, int mod) { return mod ? h % hk : h / (hv / hk); }

}  // namespace hopper
