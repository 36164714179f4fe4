// The recurrence, token by token, for a few tokens of each sequence: decode and verify.
//
//   S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
//
// With S the state before the token and e = exp(g): d = beta (v - e S^T k) and o = s (e S^T q + (k . q) d), so that one pass over S
// and one exchange between threads serve both. The state is in registers (state.cuh).
//
// A step moves the state once each way and computes next to nothing: what counts is how many bytes are on their way at once, and how long
// the rows that they lie in are. Three blocks with 64 columns of a K of 128 keep 96 KB on their way to a multiprocessor.
#include "state.cuh"

// Blocks in the order of the states in memory, columns first: those that run at the same time read the same pages.
__device__ __forceinline__ uint3 cell_in_order(const row::gdn_step::Launch& l) {
    const u32 i = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z), rest = i / gridDim.z;
    return make_uint3(rest / gridDim.y + l.base[0], rest % gridDim.y + l.base[1], i % gridDim.z + l.base[2]);
}

template <u32 VT, u32 G>
struct Shared {
    float4 sk[G * VT / 4];  // parts of S^T k [G, VT]
    float4 sq[G * VT / 4];  // parts of S^T q
    float4 dots[G];         // parts of k . k, q . q, k . q
};

template <class T, u32 KP, u32 VT, u32 G>
__device__ __forceinline__ void step(const row::gdn_step::Launch& l) {
    typedef Slice<KP, VT, G> State;
    constexpr u32 QUADS = State::QUADS, ROWS = State::ROWS;
    typedef Shared<VT, G> Parts;
    SHARED(Parts, part);
    const uint3 cell = cell_in_order(l);
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
        const size_t t = (size_t)seq.x + i, gate = l.p.g_off + t * hv + head;
        const size_t q0 = l.p.q_off + t * l.p.q_stride + (size_t)head_k * dk + row0;
        const size_t k0 = l.p.k_off + t * l.p.k_stride + (size_t)head_k * dk + row0;
        // Asked for before the state is waited for.
        const float log_decay = g[gate], b = beta[gate];
        const float4 v = load4<T>(l.m.v, l.p.v_off + t * l.p.v_stride + (size_t)head * dv + column);
        float4 keys[ROWS / 4], sk = four(0.f), sq = four(0.f), dots = four(0.f);
#pragma unroll
        for (u32 r = 0; r < ROWS / 4; r++) {
            const bool valid = row0 < dk;
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
        // Unrolled it would hold so many numbers that a block less fits.
#pragma unroll 1
        for (u32 r = 0; r < G; r++) {
            sk = sk + part.sk[r * QUADS + tx];
            sq = sq + part.sq[r * QUADS + tx];
            dots = dots + part.dots[r];
        }
        const float norm_k = l.c.l2norm ? 1.f / sqrtf(dots.x + 1e-6f) : 1.f;
        const float norm_q = l.c.l2norm ? 1.f / sqrtf(dots.y + 1e-6f) : 1.f;
        const float e = expf(log_decay);
        const float4 d = b * (v - e * norm_k * sk);
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
    // As if it were another number: the addresses of the loads are not kept in registers for the stores.
    u32 stride = dv;
    asm volatile("" : "+r"(stride));
    if (l.c.store) State::store(s, state, row0, dk, stride);
}

// Blocks at once on a multiprocessor: as many as there are registers for.
#define STEP_KERNEL(T, NAME, KP, VT, G, BLOCKS) \
    KERNEL_AT_ONCE(gdn_step_##NAME##_k##KP##_v##VT, gdn_step, (Slice<KP, VT, G>::THREADS), BLOCKS) { step<T, KP, VT, G>(l); }
// A V that 64 does not divide, or a K above 128: for the largest K alone.
#define STEP_KERNELS(T, NAME)           \
    STEP_KERNEL(T, NAME, 64, 64, 8, 5)   \
    STEP_KERNEL(T, NAME, 128, 64, 8, 3)  \
    STEP_KERNEL(T, NAME, 256, 32, 16, 3) \
    STEP_KERNEL(T, NAME, 256, 16, 16, 3)
STEP_KERNELS(F32, f32)
STEP_KERNELS(F16, f16)
STEP_KERNELS(Bf16, bf16)
