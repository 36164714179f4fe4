// `scan`: one value head of one segment, chunk after chunk, with the state in registers; `state`, the same without outputs; and
// `keep`, which leaves S and e = C W of each chunk for the backward (backward.cuh: GRAD, whose image has other places and factors).
//
// Roles. Warpgroups 0 .. WG-1 are consumers: each owns 64 of the V columns of the state, transposed, S^T [64, K] f32 as a wgmma
// accumulator, and does all products of its columns; consumers never wait for each other (except to clear the rows behind
// a sequence's end). Warpgroup WG is the producer: one lane of it issues all loads. WG = V / 64 / parts; the grid's parts
// take the rest of V.
//
// Everything on the serial chain stays in registers: a product's result, scaled and rounded, is the left operand of the next.
//   U^T = S^T K^T     W^T = V^T - vec_in o U^T     N^T = W^T A^T     S^T <- e^(c_C) S^T + (vec_state o N^T) K
// Off the chain, behind each link one filler for the time in which its result is scaled and rounded:
//   O^T = vec_out o (S^T Q^T) + N^T P^T:  half of S^T Q^T behind U, half behind N, N^T P^T behind S
//
// E is the stored type, I the one in which A, P, W and N are multiplied: the same, or half inside bf16. Half there leaves
// errors of 3e-3 where bf16 leaves 4.4e-3 (keys alike, cos 0.94: 4.9e-3 for 7.8e-3), for numbers of v below 65504.
//
// Barriers: full[s] (the producer's bytes), empty[s] (a lane of each consumer warp). Named: 8, all consumers at a ragged end.
#pragma once
#include "backward.cuh"

namespace hopper {

// Shared memory, in bytes from a base on 1024.
//   stage s   [Q,] K [64, K], V [64, 64 WG], A, [P,] vectors: from the producer's loads (empty[s] taken) until all consumers
//             arrived on empty[s], after their last product of that chunk; ring of STAGES. The blocks of A and P above the
//             diagonal are zeroed once: no load touches them.
//   staging   per consumer warp, O [64, 16] of the last chunk: written and read by that warp alone. KEEP: S^T [16, K], e^T [16, 64],
//             read by the copies that the warp's first lane asks for
template <int K, int WG, int STAGES, bool OUT, bool GRAD = false, bool KEEP = false>
struct ScanSmem {
    static constexpr int KT = 0;
    static constexpr int V = KT + (K / 64) * PANEL;
    static constexpr int Q = V + WG * PANEL;
    static constexpr int A = Q + (OUT ? (K / 64) * PANEL : 0);
    static constexpr int P = A + PANEL;
    static constexpr int VEC = P + (OUT ? PANEL : 0);
    static constexpr int STAGE = VEC + 1024;
    static constexpr int STAGING = STAGES * STAGE;
    static constexpr int BARRIERS = STAGING + (OUT ? WG * PANEL : KEEP ? WG * (K / 64 + 1) * PANEL : 0);
    static constexpr int BYTES = BARRIERS + STAGES * 16 + 1024;
    static constexpr int LOADED = STAGE - (GRAD ? 0 : OUT ? 2 : 1) * (PANEL - 5120);
};

// Codes in `hung`.
enum : uint32_t { HUNG_PRODUCER = 0x100, HUNG_CONSUMER = 0x200 };

// Zeroes rows from `len` on of a panel; all `threads` threads.
__device__ __forceinline__ void clear_rows(char* panel, int len, int tid, int threads) {
    for (int n = len * 8 + tid; n < CHUNK * 8; n += threads) *(uint4*)(panel + n * 16) = make_uint4(0, 0, 0, 0);
}

// What a kernel is given: passed by value, as the copy engine's tensor maps must be.
struct ScanMaps {
    CUtensorMap q, k, v;
};

// Lower triangular [64, 64] from the image: of columns 16 x to 16 x + 15 all 64 rows, those above from the zeros.
__device__ __forceinline__ void load_low(uint32_t to, const char* from, uint32_t bar) {
#pragma unroll
    for (int x = 0; x < 4; x++) bulk_load(to + x * 2048 + x * 512, from + image_columns(x), 2048 - x * 512, bar);
}

template <class E, class I, int K, int WG, int STAGES, bool OUT, bool GRAD = false, bool KEEP = false>
__device__ __forceinline__ void scan(const ScanArgs& p, const ScanMaps& maps) {
    DYNAMIC_SHARED(smem_raw);
    char* smem = align_1024(smem_raw);
    using M = ScanSmem<K, WG, STAGES, OUT, GRAD, KEEP>;
    static_assert(GRAD ? !OUT : !KEEP, "the image of the backward is for passes without outputs");
    constexpr long long IMAGE = GRAD ? GRAD_BYTES : IMAGE_BYTES;
    constexpr int PANELS = K / 64;
    const int warpgroup = uniform(threadIdx.x / WARPGROUP), tid = threadIdx.x % WARPGROUP, warp = tid >> 5, lane = tid & 31;
    const uint32_t base = smem_addr(smem), full = base + M::BARRIERS, empty = full + STAGES * 8;

    // The block's share: a segment, a value head, a part of V. For `state`, parts of K after those of V: the transition.
    const int parts_v = p.v / (64 * WG), parts = parts_v + (OUT || KEEP ? 0 : K / (64 * WG));
    const int part = blockIdx.x % parts, h = blockIdx.x / parts % p.hv, at_seg = blockIdx.x / parts / p.hv;
    const Segment seg = p.segments[at_seg];
    int token = seg.token, tokens = seg.tokens, chunk = seg.chunk;
    const int kh = key_head(h, p.hk, p.hv, p.mod);
    bool transition = false;
    if constexpr (!OUT && !KEEP) {
        // Only the chunks that the state behind the segment remembers; the transition of all, or none.
        const int warm = p.warm[at_seg * p.hv + h];
        const int all = (tokens + CHUNK - 1) / CHUNK;
        transition = part >= parts_v;
        // The backward needs transitions of all segments: one carries a gradient over the last.
        if ((seg.out < 0 && !(GRAD && transition)) || (transition && warm >= 0)) return;
        const int skip = warm >= 0 ? all - warm : 0;
        token += skip * CHUNK, tokens -= skip * CHUNK, chunk += skip;
    }
    token = uniform(token), tokens = uniform(tokens);
    const int chunks = (tokens + CHUNK - 1) / CHUNK;
    const int width = OUT || !transition ? p.v : K;                       // columns of the state
    const int first = 64 * WG * (transition ? part - parts_v : part);     // the block's first

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, WG * 4);
        }
        mbar_init_fence();
    }
    for (int n = threadIdx.x; n < STAGES * (PANEL / 16); n += (WG + 1) * WARPGROUP) {
        char* at = smem + n / (PANEL / 16) * M::STAGE + n % (PANEL / 16) * 16;
        int x = n % (PANEL / 16) / 128, row16 = n % 128 / 32;
        if (!GRAD && row16 < x) {
            *(uint4*)(at + M::A) = make_uint4(0, 0, 0, 0);
            if constexpr (OUT) *(uint4*)(at + M::P) = make_uint4(0, 0, 0, 0);
        }
        if constexpr (!OUT)
            if (transition)  // V of the transition is zero
                for (int y = 0; y < WG; y++) *(uint4*)(at + M::V + y * PANEL) = make_uint4(0, 0, 0, 0);
    }
    fence_proxy();
    __syncthreads();

    if (warpgroup == WG) {
        if constexpr (WG > 1) regs_down<24>();
        if (tid == 0) {
            tma_prefetch(&maps.k);
            tma_prefetch(&maps.v);
            if constexpr (OUT) tma_prefetch(&maps.q);
            const char* image = p.images + ((long long)chunk * p.hv + h) * IMAGE;
            int s = 0;
            uint32_t phase = 1;
            for (int n = 0; n < chunks; n++) {
                mbar_wait(empty + 8 * s, phase, p.hung, HUNG_PRODUCER + s);
                const uint32_t bar = full + 8 * s, to = base + s * M::STAGE;
                const int row = token + n * CHUNK;
                mbar_expect(bar, M::LOADED - (transition ? WG * PANEL : 0));
#pragma unroll
                for (int x = 0; x < PANELS; x++) tma_load(to + M::KT + x * PANEL, &maps.k, kh * K + 64 * x, row, bar);
                if (!transition)
#pragma unroll
                    for (int x = 0; x < WG; x++) tma_load(to + M::V + x * PANEL, &maps.v, h * p.v + first + 64 * x, row, bar);
                if constexpr (GRAD)
                    bulk_load(to + M::A, image + GRAD_C, PANEL, bar);
                else
                    load_low(to + M::A, image + IMAGE_A, bar);
                bulk_load(to + M::VEC, image + (GRAD ? GRAD_VEC : IMAGE_VEC), 1024, bar);
                if constexpr (OUT) {
#pragma unroll
                    for (int x = 0; x < PANELS; x++) tma_load(to + M::Q + x * PANEL, &maps.q, kh * K + 64 * x, row, bar);
                    load_low(to + M::P, image + IMAGE_P, bar);
                }
                image += p.hv * IMAGE;
                if (++s == STAGES) s = 0, phase ^= 1;
            }
        }
    } else {
        if constexpr (WG > 1) regs_up<240>();
        const int i = lane >> 2, j = lane & 3;
        const int column = first + 64 * warpgroup;  // of the state, the consumer's first
        const int v0 = column + 16 * warp + i;      // the thread's first; the other is v0 + 8
        // Row and unit that this lane addresses in ldmatrix of blocks (b, v), (b, v + 8), (b + 1, v), (b + 1, v + 8); 16 rows on: + 2048.
        const int lane_row = (lane >> 4) * 8 + (lane & 7);
        const uint32_t lane_at = swizzled(0, lane_row, 2 * warp + ((lane >> 3) & 1));
        // The warp's staging, rows of 32 bytes; units swizzled by bit 2 of the row. 16 rows on: + 512.
        char* own = smem + M::STAGING + warpgroup * PANEL + warp * 2048;
        const uint32_t own_at = smem_addr(own) + lane_row * 32 + ((((lane >> 3) & 1) ^ ((lane_row >> 2) & 1)) << 4);

        // S^T: s[4b + e]: row v0 (+ 8 for e >= 2), column 8b + 2j + e % 2.
        float s[K / 2];
#pragma unroll
        for (int n = 0; n < K / 2; n++) s[n] = 0.f;
        if constexpr (OUT || KEEP) {
            if (seg.in >= 0) {
                const float* x = p.states_in + ((long long)seg.in * p.hv + h) * K * p.v + v0;
#pragma unroll
                for (int b = 0; b < K / 8; b++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[4 * b + e] = x[(8 * b + 2 * j + e % 2) * p.v + (e / 2) * 8];
            }
        } else if (transition) {
#pragma unroll
            for (int b = 0; b < K / 8; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[4 * b + e] = 8 * b + 2 * j + e % 2 == v0 + (e / 2) * 8 ? 1.f : 0.f;
        }

        float o[32], u[32];
        // GRAD: what the rounding of W and of N for the state leaves is multiplied, too: dg of a head without decay is <dS', S> of K V
        // numbers that mostly cancel, and the state's errors stay in it (NOTES.md).
        uint32_t sb[K / 4], w[16], rest[GRAD ? 16 : 1];

        // Waits for the tiles of chunk n in stage `st`; rows behind the sequence's end are another's: zeroes them.
        auto arrive = [&](int n, int st, uint32_t phase) {
            mbar_wait(full + 8 * st, phase, p.hung, HUNG_CONSUMER + 16 * warpgroup + st);
            const int len = tokens - n * CHUNK;
            if (len < CHUNK) {
                char* stage = smem + st * M::STAGE;
                const int t = threadIdx.x;
                for (int x = 0; x < (OUT ? 2 : 1) * PANELS + WG; x++) clear_rows(stage + x * PANEL, len, t, WG * WARPGROUP);
                fence_proxy();
                bar_sync(8, WG * WARPGROUP);
            }
        };
        // d^T = S^T X^T for the tile X at `at`, columns from 16 FROM to 16 TO of S.
        auto multiply = [&](float (&d)[32], uint32_t at, auto from, auto to) {
            const uint64_t tile = desc_k_major(at);
#pragma unroll
            for (int x = from; x < to; x++)
                E::template mma_rs<0>(d, sb + 4 * x, desc_step(tile, (x / 4) * PANEL + (x % 4) * 32), x > 0);
            wgmma_commit();
        };
        // d^T (+)= a^T X^T for the lower triangular X at `at`.
        auto multiply_low = [&](float (&d)[32], const uint32_t (&a)[16], uint32_t at, int add) {
            const uint64_t tile = GRAD ? desc_k_major(at) : desc_blocks(at);
#pragma unroll
            for (int x = 0; x < 4; x++) I::template mma_rs<0>(d, a + 4 * x, desc_step(tile, x * (GRAD ? 32 : 2048)), x > 0 || add);
            wgmma_commit();
        };
        // W^T = V^T - vec_in o U^T.
        auto make_w = [&](uint32_t at, const float* vec) {
            uint32_t v[4][4];
            float2 c[8];
#pragma unroll
            for (int b = 0; b < 4; b++) ldsm_trans(v[b], at + M::V + warpgroup * PANEL + lane_at + b * 2048);
#pragma unroll
            for (int b = 0; b < 8; b++) c[b] = *(const float2*)(vec + VEC_IN + 8 * b);
            if constexpr (OUT)
                wgmma_wait<1>();
            else
                wgmma_wait<0>();
            hold(u);
#pragma unroll
            for (int b = 0; b < 8; b++) {
                const float* y = u + 4 * b;
                uint32_t lo = v[b / 2][b % 2 * 2], hi = v[b / 2][b % 2 * 2 + 1];
                const float x[4] = {fmaf(-c[b].x, y[0], E::lo(lo)), fmaf(-c[b].y, y[1], E::hi(lo)), fmaf(-c[b].x, y[2], E::lo(hi)), fmaf(-c[b].y, y[3], E::hi(hi))};
                w[2 * b] = I::pack(x[0], x[1]), w[2 * b + 1] = I::pack(x[2], x[3]);
                if constexpr (GRAD) {
                    rest[2 * b] = I::pack(x[0] - I::lo(w[2 * b]), x[1] - I::hi(w[2 * b]));
                    rest[2 * b + 1] = I::pack(x[2] - I::lo(w[2 * b + 1]), x[3] - I::hi(w[2 * b + 1]));
                }
            }
        };
        // O of a chunk to memory: the warp turns its 16 columns round in its staging.
        auto store_o = [&](int row0, int len) {
#pragma unroll
            for (int b = 0; b < 4; b++)
                stsm_trans(own_at + b * 512, E::pack(o[8 * b], o[8 * b + 1]), E::pack(o[8 * b + 2], o[8 * b + 3]),
                           E::pack(o[8 * b + 4], o[8 * b + 5]), E::pack(o[8 * b + 6], o[8 * b + 7]));
            __syncwarp();
            char* to = (char*)p.o + ((long long)(row0 + (lane >> 1)) * p.o_stride + h * p.v + column + 16 * warp) * 2 + (lane & 1) * 16;
            const char* from = own + (lane >> 1) * 32 + (((lane & 1) ^ ((lane >> 3) & 1)) << 4);
#pragma unroll
            for (int b = 0; b < 4; b++)
                if ((lane >> 1) + 16 * b < len) *(uint4*)(to + b * 32 * p.o_stride) = *(const uint4*)(from + b * 512);
            __syncwarp();
        };
        // S^T and e^T of chunk n to memory, the warp's 16 rows of each, as the product before and after them have them.
        char* const kept = smem + M::STAGING + (warpgroup * 4 + warp) * (K / 64 + 1) * 2048;
        auto keep_state = [&](int n) {
            if constexpr (KEEP) keep_rows<K / 64>(kept, keep_states(p, K, chunk + n, h, column / 64) + warp * 2048, sb, lane);
        };
        auto keep_news_of = [&](int n) {
            if constexpr (KEEP) {
                uint32_t x[16];
#pragma unroll
                for (int y = 0; y < 16; y++) x[y] = E::pack(u[2 * y], u[2 * y + 1]);
                keep_rows<1>(kept + K / 64 * 2048, keep_news(p, chunk + n, h, column / 64) + warp * 2048, x, lane);
            }
        };
        constexpr auto Z = Int<0>{};
        constexpr auto HALF = Int<K / 32>{};
        constexpr auto ALL = Int<K / 16>{};

        int st = 0;
        uint32_t phase = 0;
        if (chunks > 0) {
            arrive(0, 0, 0);
#pragma unroll
            for (int x = 0; x < K / 4; x++) sb[x] = E::pack(s[2 * x], s[2 * x + 1]);
            wgmma_fence();
            multiply(u, base + M::KT, Z, ALL);
            if constexpr (OUT) multiply(o, base + M::Q, Z, HALF);
            keep_state(0);
            make_w(base, (const float*)(smem + M::VEC) + 2 * j);
            wgmma_wait<0>();
        }
        // Nothing is in flight where the loop turns.
        for (int n = 0; n < chunks; n++) {
            const uint32_t at = base + st * M::STAGE;
            const float* vec = (const float*)(smem + st * M::STAGE + M::VEC) + 2 * j;

            // N^T = W^T A^T; behind it the second half of S^T Q^T.
            if constexpr (OUT) hold(o);
            hold(w);
            wgmma_fence();
            multiply_low(u, w, at + M::A, 0);
            if constexpr (GRAD) {
                hold(rest);
                multiply_low(u, rest, at + M::A, 1);
            }
            if constexpr (OUT) multiply(o, at + M::Q, HALF, ALL);
            if constexpr (KEEP && KEEPS_LOW<E>) keep_low<K>(keep_states(p, K, chunk + n, h, column / 64) + K / 64 * PANEL, s, sb, tid);
            const float last = ((const float*)(smem + st * M::STAGE + M::VEC))[VEC_LAST];
            float2 cs[8];
#pragma unroll
            for (int b = 0; b < 8; b++) cs[b] = *(const float2*)(vec + VEC_STATE + 8 * b);
#pragma unroll
            for (int x = 0; x < K / 2; x++) s[x] *= last;
            if constexpr (OUT)
                wgmma_wait<1>();
            else
                wgmma_wait<0>();
            hold(u);
            uint32_t nb[16], ns[16];
            // S^T <- e^(c_C) S^T + (vec_state o N^T) K; behind it O^T = vec_out o O^T + N^T P^T.
            hold(s);
            const uint64_t rows = desc_mn_major(at + M::KT, PANEL);
#pragma unroll
            for (int x = 0; x < 4; x++) {
#pragma unroll
                for (int b = 2 * x; b < 2 * x + 2; b++) {
                    const float y[4] = {cs[b].x * u[4 * b], cs[b].y * u[4 * b + 1], cs[b].x * u[4 * b + 2], cs[b].y * u[4 * b + 3]};
                    ns[2 * b] = E::pack(y[0], y[1]), ns[2 * b + 1] = E::pack(y[2], y[3]);
                    if constexpr (GRAD) {
                        rest[2 * b] = E::pack(y[0] - E::lo(ns[2 * b]), y[1] - E::hi(ns[2 * b]));
                        rest[2 * b + 1] = E::pack(y[2] - E::lo(ns[2 * b + 1]), y[3] - E::hi(ns[2 * b + 1]));
                    }
                }
#pragma unroll
                for (int b = 4 * x; b < 4 * x + 4; b++) {
                    hold(ns[b]);
                    if constexpr (GRAD) hold(rest[b]);
                }
                wgmma_fence();
                E::template mma_rs<1>(s, ns + 4 * x, desc_step(rows, x * 2048), 1);
                if constexpr (GRAD) E::template mma_rs<1>(s, rest + 4 * x, desc_step(rows, x * 2048), 1);
            }
            wgmma_commit();
            if constexpr (OUT) {
#pragma unroll
                for (int x = 0; x < 16; x++) nb[x] = I::pack(u[2 * x], u[2 * x + 1]);
                float2 co[8];
#pragma unroll
                for (int b = 0; b < 8; b++) co[b] = *(const float2*)(vec + VEC_OUT + 8 * b);
                wgmma_wait<1>();
                hold(o);
#pragma unroll
                for (int b = 0; b < 8; b++) o[4 * b] *= co[b].x, o[4 * b + 1] *= co[b].y, o[4 * b + 2] *= co[b].x, o[4 * b + 3] *= co[b].y;
                hold(o);
                hold(nb);
                wgmma_fence();
                multiply_low(o, nb, at + M::P, 1);
                wgmma_wait<1>();
            } else {
                keep_news_of(n);
                wgmma_wait<0>();
            }
            hold(s);

            // U, W and half of S^T Q^T of the next chunk (after the last one: of whatever is there, for nothing).
            int next = st + 1;
            uint32_t next_phase = phase;
            if (next == STAGES) next = 0, next_phase ^= 1;
            if (n + 1 < chunks) arrive(n + 1, next, next_phase);
            const uint32_t at_next = base + next * M::STAGE;
            {
                const uint64_t tile = desc_k_major(at_next + M::KT);
#pragma unroll
                for (int x = 0; x < K / 16; x += 2) {
#pragma unroll
                    for (int b = 4 * x; b < 4 * x + 8; b++) {
                        sb[b] = E::pack(s[2 * b], s[2 * b + 1]);
                        hold(sb[b]);
                    }
                    wgmma_fence();
#pragma unroll
                    for (int y = x; y < x + 2; y++)
                        E::template mma_rs<0>(u, sb + 4 * y, desc_step(tile, (y / 4) * PANEL + (y % 4) * 32), y > 0);
                }
                wgmma_commit();
            }
            if constexpr (OUT) {
                wgmma_wait<1>();
                hold(o);
            }
            __syncwarp();
            if (lane == 0) mbar_arrive(empty + 8 * st);
            if constexpr (OUT) {
                store_o(token + n * CHUNK, tokens - n * CHUNK);
                hold(o);
                wgmma_fence();
                multiply(o, at_next + M::Q, Z, HALF);
            }
            if (n + 1 < chunks) keep_state(n + 1);
            make_w(at_next, (const float*)(smem + next * M::STAGE + M::VEC) + 2 * j);
            if constexpr (OUT) wgmma_wait<0>();
            st = next, phase = next_phase;
        }
        if constexpr (KEEP) {
            if (lane == 0) bulk_wait();
        }
        const int out = GRAD && transition ? at_seg + 1 : seg.out;
        if (out >= 0 && (!KEEP || p.states_out != nullptr)) {
            float* x = (transition ? p.transitions : p.states_out) + ((long long)out * p.hv + h) * K * width + v0;
#pragma unroll
            for (int b = 0; b < K / 8; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[(8 * b + 2 * j + e % 2) * width + (e / 2) * 8] = s[4 * b + e];
        }
    }
}

}  // namespace hopper
