// The recurrence, token by token, for a few tokens of each sequence: decode and verify.
//
//   S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
//
// With S the state before the token and e = exp(g): d = beta (v - e S^T k) and o = s (e S^T q + (k . q) d), so that one pass over S
// and one exchange between threads serve both. The state is in registers (state.cuh).
//
// A step moves the state once each way and computes next to nothing: what counts is how many bytes are on their way at once, and how long
// the rows that they lie in are. Three or four blocks with 64 columns of a K of 128 keep 96 to 128 KB on their way to a multiprocessor. What
// a block waits for before it may ask for its state, a multiprocessor waits for several times a step: it is the table alone. And what is asked
// for behind the state comes behind the states of all blocks beside this one: k, q, v and the gates are asked for before.
#include "state.cuh"

template <u32 VT, u32 G>
struct Shared {
    float4 sk[G * VT / 4];  // parts of S^T k [G, VT]
    float4 sq[G * VT / 4];  // parts of S^T q
    float4 dots[G];         // parts of k . k, q . q, k . q
};

// Four numbers as they are in memory, of 16 bits in two words.
template <class T>
struct Quad {
    float4 x;
    __device__ __forceinline__ void load(const void* p, size_t i) { x = load4<T>(p, i); }
    __device__ __forceinline__ float4 numbers() const { return x; }
};
struct HalfQuad {
    u32 low, high;
};
template <class T>
struct QuadOf16 : HalfQuad {
    __device__ __forceinline__ void load(const void* p, size_t i) {
        const u32* words = (const u32*)stored_at<T>(p, i);
        low = words[0], high = words[1];
    }
    __device__ __forceinline__ float4 numbers() const {
        const float2 a = unpack<T>(low), b = unpack<T>(high);
        return make_float4(a.x, a.y, b.x, b.y);
    }
};
template <>
struct Quad<F16> : QuadOf16<F16> {};
template <>
struct Quad<Bf16> : QuadOf16<Bf16> {};

// key_head; without its divisions where a q/k head has a power of two of value heads.
__device__ __forceinline__ u32 key_head_by_shift(u32 head, u32 hk, u32 hv, u32 head_map) {
    const int shift = __ffs(hv) - __ffs(hk);
    if (head_map == 0 && shift >= 0 && hk << shift == hv) return head >> shift;
    return key_head(head, hk, hv, head_map);
}

// V: that of all heads, with K = KP, so that no address needs more than a number added; or 0: as the launch says.
template <class T, u32 KP, u32 VT, u32 G, u32 V>
__device__ __forceinline__ void step(const row::gdn_step::Launch& l) {
    typedef Slice<KP, VT, G> State;
    constexpr u32 QUADS = State::QUADS, ROWS = State::ROWS;
    typedef Shared<VT, G> Parts;
    SHARED(Parts, part);
    // The grid begins with the columns (choose.rs): blocks that run at the same time are beside each other in memory.
    const u32 of_seqs = blockIdx.z + l.base[0], head = blockIdx.y + l.base[1], tile = blockIdx.x + l.base[2];
    const u32 lane = threadIdx.x, tx = lane % QUADS, ty = lane / QUADS;
    const u32 hv = l.p.hv, dk = V ? KP : l.c.dk, dv = V ? V : l.p.dv;
    const u32 column = tile * VT + 4 * tx, row0 = ty * ROWS;
    const uint4 seq = ((const uint4*)l.m.seqs)[of_seqs];  // first token, tokens, slot, 0
    if (seq.y == 0) return;
    const bool valid = row0 < dk;
    const u32 head_k = key_head_by_shift(head, l.p.hk, hv, l.p.head_map);
    size_t gate = l.p.g_off + (size_t)seq.x * hv + head;
    size_t q0 = l.p.q_off + (size_t)seq.x * l.p.q_stride + (size_t)head_k * dk + row0;
    size_t k0 = l.p.k_off + (size_t)seq.x * l.p.k_stride + (size_t)head_k * dk + row0;
    size_t v0 = l.p.v_off + (size_t)seq.x * l.p.v_stride + (size_t)head * dv + column;
    size_t o0 = l.p.o_off + (size_t)seq.x * l.p.o_stride + (size_t)head * dv + column;
    float log_decay, b;
    Quad<T> keys[ROWS / 4], queries[ROWS / 4], values;
    auto ask = [&] {
        log_decay = ((const float*)l.m.g)[gate], b = ((const float*)l.m.beta)[gate];  // [T, Hv]
#pragma unroll
        for (u32 r = 0; r < ROWS / 4; r++) {
            keys[r] = queries[r] = {};
            if (valid) keys[r].load(l.m.k, k0 + 4 * r), queries[r].load(l.m.q, q0 + 4 * r);
        }
        values.load(l.m.v, v0);
    };
    ask();
    float* state = (float*)l.m.state + (((size_t)seq.z * hv + head) * dk + row0) * dv + column;
    float4 s[ROWS];
    State::load(s, state, row0, dk, dv);
    u32 left = seq.y;
#pragma unroll 1
    do {
        float4 sk = four(0.f), sq = four(0.f), dots = four(0.f);
#pragma unroll
        for (u32 r = 0; r < ROWS / 4; r++) {
            const float4 k = keys[r].numbers(), q = queries[r].numbers();
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
        const float4 d = b * (values.numbers() - e * norm_k * sk);
        if (ty == 0) store4<T>(l.m.o, o0, l.p.scale * norm_q * (e * sq + norm_k * dots.z * d));
        const float4 kd = norm_k * d;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            s[r] = e * s[r];
            add(s[r], get(keys[r / 4].numbers(), r % 4), kd);
        }
        if (left > 1) {
            gate += hv, q0 += l.p.q_stride, k0 += l.p.k_stride, v0 += l.p.v_stride, o0 += l.p.o_stride;
            ask();
        }
    } while (--left > 0);
    // As if it were another number: the addresses of the loads are not kept in registers for the stores.
    u32 stride = dv;
    if (V == 0) asm volatile("" : "+r"(stride));
    if (l.c.store) State::store(s, state, row0, dk, stride);
}

// Blocks at once on a multiprocessor: as many as there are registers for.
#define STEP_KERNEL(T, NAME, KP, VT, G, BLOCKS) \
    KERNEL_AT_ONCE(gdn_step_##NAME##_k##KP##_v##VT, gdn_step, (Slice<KP, VT, G>::THREADS), BLOCKS) { step<T, KP, VT, G, 0>(l); }
// The models' heads, K = V = 128, by themselves.
#define STEP_KERNEL_128(T, NAME, VT, G, BLOCKS)                                                             \
    KERNEL_AT_ONCE(gdn_step_##NAME##_k128_v##VT, gdn_step, (Slice<128, VT, G>::THREADS), BLOCKS) {           \
        if (l.c.dk == 128 && l.p.dv == 128)                                                                \
            step<T, 128, VT, G, 128>(l);                                                                   \
        else                                                                                               \
            step<T, 128, VT, G, 0>(l);                                                                     \
    }
// A V that 64 does not divide, or a K above 128: for the largest K alone.
#define STEP_KERNELS(T, NAME, BLOCKS)      \
    STEP_KERNEL(T, NAME, 64, 64, 8, BLOCKS) \
    STEP_KERNEL_128(T, NAME, 64, 8, 3)   \
    STEP_KERNEL(T, NAME, 256, 32, 16, 3) \
    STEP_KERNEL(T, NAME, 256, 16, 16, 3)
STEP_KERNELS(F32, f32, 4)
STEP_KERNELS(F16, f16, 5)
STEP_KERNELS(Bf16, bf16, 5)
