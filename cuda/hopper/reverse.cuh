// `reverse`: the gradient of the state of one value head, chunk after chunk from a segment's end, in registers; it leaves dS' of
// each chunk, and dV.
//
// Roles and registers are those of scan.cuh: dS^T [64, K] f32 per consumer, every product of it without another warpgroup.
//   U^T = dS'^T K^T     y^T = state o U^T + R^T     dV^T = y^T C     dS^T <- last dS'^T - (in o dV^T) K + (out o dO^T) Q
// The chain has three products, U, dV and the first of dS; the others fill the time in which its results are scaled and
// rounded: (out o dO^T) Q behind dV, and R^T = dO^T (P diag(beta)) of the chunk before behind dS.
//
// CARRY: only the state's gradient before the segment, from zeros behind the chunks that it depends on, for the segment before.
//
// CAREFUL: a segment in some chunk of which sums cancel goes on with what rounding C, P, dS' for U and out o dO leaves, too, and leaves what is left
// of dS' and dV for the last kernel (backward.cuh). K dS' is small there beside dS', most of whose directions are those of Q, and rows of P^T dO are
// nearly alike.
//
// Barriers: full[s] (the producer's bytes), empty[s] (a lane of each consumer warp), tail (a lane of each of warps 1 to 3 of the
// producer's: the first chunk, if it is not whole, is there and zeroed behind the sequence's end; consumers wait for it instead of full[0]).
#pragma once
#include "scan.cuh"

namespace hopper {

// Shared memory, in bytes from a base on 1024.
//   stage s   K, Q [64, K], dO [64, 64 WG], C, P, [C_lo, P_lo,] vectors: from the producer's loads until all consumers arrived on empty[s], after
//             their last product of that chunk; ring of STAGES
//   staging   per consumer warp, dS'^T [16, K], read by the copies that one lane asks for, and dV [64, 16]. CAREFUL: what is left of both by way
//             of the first
template <int K, int WG, int STAGES, bool CAREFUL = false>
struct ReverseSmem {
    static constexpr int KT = 0;
    static constexpr int Q = KT + (K / 64) * PANEL;
    static constexpr int DO = Q + (K / 64) * PANEL;
    static constexpr int C = DO + WG * PANEL;
    static constexpr int P = C + PANEL;
    static constexpr int C_LO = P + PANEL;
    static constexpr int P_LO = C_LO + (CAREFUL ? PANEL : 0);
    static constexpr int VEC = P_LO + (CAREFUL ? PANEL : 0);
    static constexpr int STAGE = VEC + 1024;
    static constexpr int STAGING = STAGES * STAGE;
    static constexpr int BARRIERS = STAGING + WG * (K / 64 + 1) * PANEL;
    static constexpr int BYTES = BARRIERS + 128 + 1024;
    static_assert(BYTES <= 232448, "shared memory of a block");
};

// Stages of a careful pass; what a launch has room for serves both.
constexpr int CAREFUL_REVERSE_STAGES = 2;
template <int K, int WG, int STAGES>
constexpr int REVERSE_BYTES = ReverseSmem<K, WG, STAGES>::BYTES > ReverseSmem<K, WG, CAREFUL_REVERSE_STAGES, true>::BYTES
                                  ? ReverseSmem<K, WG, STAGES>::BYTES
                                  : ReverseSmem<K, WG, CAREFUL_REVERSE_STAGES, true>::BYTES;

struct ReverseMaps {
    CUtensorMap q, k, d_o;
};

template <class E, int K, int WG, int STAGES, bool CARRY = false, bool CAREFUL = false>
__device__ __forceinline__ void reverse(const ReverseArgs& p, const ReverseMaps& maps) {
    DYNAMIC_SHARED(smem_raw);
    using M = ReverseSmem<K, WG, STAGES, CAREFUL>;
    constexpr int PANELS = K / 64;
    constexpr bool ASKS = !CAREFUL && ASKS_GRAD<E>;
    const int warpgroup = uniform(threadIdx.x / WARPGROUP), tid = threadIdx.x % WARPGROUP, warp = tid >> 5, lane = tid & 31;
    const uint32_t base = smem_addr(align_1024(smem_raw)), full = base + M::BARRIERS, empty = full + STAGES * 8, tail = empty + STAGES * 8;

    // The block's share: a segment, a value head, a part of V.
    const int parts = p.v / (64 * WG), part = blockIdx.x % parts, h = blockIdx.x / parts % p.hv;
    const int at_seg = blockIdx.x / parts / p.hv;
    const Segment seg = p.segments[at_seg];
    const int kh = key_head(h, p.hk, p.hv, p.mod);
    int len = seg.tokens;
    if constexpr (CARRY) {
        if (seg.chunk == seg.origin) return;  // nobody is before it
        const int warm = p.warm[at_seg * p.hv + h];
        if (warm >= 0) len = min(len, warm * CHUNK);
    }
    const int token = uniform(seg.token), tokens = uniform(len), chunk = seg.chunk;
    const int in = CARRY ? -1 : seg.in, out = CARRY ? at_seg - 1 : seg.out;
    const int chunks = (tokens + CHUNK - 1) / CHUNK;
    const int first = 64 * WG * part;  // column of V

    // Asked for before all that follows, and there behind it.
    bool cancels = false;
    if constexpr (ASKS)
        for (int n = threadIdx.x; n < chunks; n += (WG + 1) * WARPGROUP) cancels |= p.cancels[(long long)(chunk + n) * p.hk + kh] != 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, WG * 4 * WARP_ARRIVALS);
        }
        mbar_init(tail, 3 * WARP_ARRIVALS);
        mbar_init_fence();
    }
    if constexpr (ASKS) {
        // As in scan.cuh.
        if (uniform(__syncthreads_or(cancels)) != 0) {
            if (threadIdx.x == 0)
                for (uint32_t bar = full; bar <= tail; bar += 8) mbar_inval(bar);
            __syncthreads();
            reverse<E, K, WG, CAREFUL_REVERSE_STAGES, CARRY, true>(p, maps);
            return;
        }
    } else {
        __syncthreads();
    }

    if (warpgroup == WG) {
        if constexpr (WG > 1) regs_down<Registers<K>::SERVER>();
        if (uniform(warp) == 0 && elect()) {
            tma_prefetch(&maps.k);
            tma_prefetch(&maps.q);
            tma_prefetch(&maps.d_o);
            // By numbers: beside two consumers there are 24 registers.
            int image_at = (chunk + chunks - 1) * p.hv + h, asked_at = (chunk + chunks - 1) * p.hk + kh;
            int s = 0;
            uint32_t phase = 1;
            for (int row = token + (chunks - 1) * CHUNK; row >= token; row -= CHUNK) {
                const int low_at = CAREFUL && p.cancels[asked_at] != 0 ? 1 + image_at : 0;
                mbar_wait(empty + 8 * s, phase, p.hung, HUNG_PRODUCER + s);
                const uint32_t bar = full + 8 * s, to = base + s * M::STAGE;
                const char* image = p.images + (long long)image_at * GRAD_BYTES;
                mbar_expect(bar, M::STAGE);
#pragma unroll
                for (int x = 0; x < WG; x++) tma_load(to + M::DO + x * PANEL, &maps.d_o, h * p.v + first + 64 * x, row, bar);
                bulk_load(to + M::C, image, 2 * PANEL, bar);
                if constexpr (CAREFUL) bulk_load(to + M::C_LO, p.lows + (long long)low_at * GRAD_LOW_BYTES, GRAD_LOW_BYTES, bar);
                bulk_load(to + M::VEC, image + GRAD_VEC, 1024, bar);
#pragma unroll
                for (int x = 0; x < PANELS; x++) tma_load(to + M::KT + x * PANEL, &maps.k, kh * K + 64 * x, row, bar);
#pragma unroll
                for (int x = 0; x < PANELS; x++) tma_load(to + M::Q + x * PANEL, &maps.q, kh * K + 64 * x, row, bar);
                image_at -= p.hv, asked_at -= p.hk;
                if (++s == STAGES) s = 0, phase ^= 1;
            }
        } else if (warp > 0 && tokens % CHUNK != 0) {
            clear_tail(base, 2 * PANELS + WG, tokens % CHUNK, full, 0, tail, warp - 1, 3, lane, p.hung);
        }
    } else {
        if constexpr (WG > 1) regs_up<Registers<K>::CONSUMER>();
        const int i = lane >> 2, j = lane & 3;
        const int column = first + 64 * warpgroup;  // of V, the consumer's first
        const int v0 = first + threadIdx.x / 32 * 16 + i;  // the thread's first; the other is v0 + 8
        // As in scan.cuh: what this lane addresses in ldmatrix of dO, and in its warp's staging of dV.
        const int lane_row = (lane >> 4) * 8 + (lane & 7);
        const uint32_t lane_at = threadIdx.x / WARPGROUP * PANEL + swizzled(M::DO, lane_row, 2 * warp + ((lane >> 3) & 1));
        const uint32_t kept = base + M::STAGING + threadIdx.x / 32 * (PANELS + 1) * 2048, own = kept + PANELS * 2048;
        const uint32_t own_at = own + lane_row * 32 + ((((lane >> 3) & 1) ^ ((lane_row >> 2) & 1)) << 4);

        // dS^T: s[4b + e]: row v0 (+ 8 for e >= 2), column 8b + 2j + e % 2.
        float s[K / 2];
#pragma unroll
        for (int n = 0; n < K / 2; n++) s[n] = 0.f;
        if (in >= 0) {
            const float* x = p.dstates_in + ((long long)in * p.hv + h) * K * p.v + v0;
#pragma unroll
            for (int b = 0; b < K / 8; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[4 * b + e] = x[(8 * b + 2 * j + e % 2) * p.v + (e / 2) * 8];
        }

        float r[32], u[32];
        uint32_t sb[K / 4], w[16], rest[16], d_o[16];  // rest: what y's rounding leaves

        // Waits for the chunk in stage `st`.
        auto arrive = [&](int st, uint32_t phase) { mbar_wait(full + 8 * st, phase, p.hung, HUNG_CONSUMER + 16 * warpgroup + st); };
        // dO^T of a stage as a left operand: [64 of V, 64 tokens].
        auto load_do = [&](uint32_t at) {
#pragma unroll
            for (int b = 0; b < 4; b++) {
                uint32_t x[4];
                ldsm_trans(x, at + lane_at + b * 2048);
#pragma unroll
                for (int e = 0; e < 4; e++) d_o[4 * b + e] = x[e];
            }
        };
        // d^T (+)= a^T X for the tile X [64, 64], C or P of the stage at `at`.
        auto multiply = [&](float (&d)[32], const uint32_t (&a)[16], uint32_t at, auto x_at, int add) {
            const uint64_t tile = desc_step(desc_mn_major(x_at, PANEL), at);
#pragma unroll
            for (int x = 0; x < 4; x++) E::template mma_rs<1>(d, a + 4 * x, desc_step(tile, x * 2048), x > 0 || add);
            wgmma_commit();
        };
        // U^T = dS^T K^T, dS^T rounded step by step.
        auto multiply_state = [&](uint32_t at) {
            const uint64_t tile = desc_step(desc_k_major(M::KT), at);
#pragma unroll
            for (int x = 0; x < K / 16; x += 2) {
#pragma unroll
                for (int b = 4 * x; b < 4 * x + 8; b++) {
                    sb[b] = E::pack(s[2 * b], s[2 * b + 1]);
                    hold(sb[b]);
                }
                wgmma_fence();
#pragma unroll
                for (int y = x; y < x + 2; y++) E::template mma_rs<0>(u, sb + 4 * y, desc_step(tile, (y / 4) * PANEL + (y % 4) * 32), y > 0);
            }
            wgmma_commit();
        };
        auto keep_state = [&](int n) {
            if constexpr (!CARRY) keep_rows<PANELS>(kept, keep_states(p, K, chunk + n, h, column / 64) + warp * 2048, sb, lane);
        };
        // U^T += what rounding dS^T leaves, times K^T; chunk n's, to memory. A panel at a time, as there are no registers for more.
        auto multiply_rest = [&](uint32_t at, int n) {
            const uint64_t tile = desc_step(desc_k_major(M::KT), at);
#pragma unroll
            for (int x = 0; x < PANELS; x++) {
                uint32_t low[16];
#pragma unroll
                for (int y = 0; y < 16; y++) {
                    const int b = 16 * x + y;
                    low[y] = E::pack(s[2 * b] - E::lo(sb[b]), s[2 * b + 1] - E::hi(sb[b]));
                }
                hold(low);
                wgmma_fence();
#pragma unroll
                for (int y = 0; y < 4; y++) E::template mma_rs<0>(u, low + 4 * y, desc_step(tile, x * PANEL + y * 32), 1);
                wgmma_commit();
                if constexpr (!CARRY)
                    if (n >= 0) keep_rows<1>(kept + x * 2048, keep_rests(p, K, chunk + n, h, column / 64) + x * PANEL + warp * 2048, low, lane);
                wgmma_wait<0>();
                hold(u);
            }
        };

        // y^T = state o U^T + R^T, packed in two parts.
        auto make_y = [&](uint32_t factors) {
            float2 c[8];
#pragma unroll
            for (int b = 0; b < 8; b++) c[b] = shared_f32x2(factors + 4 * (VEC_STATE + 8 * b));
            wgmma_wait<0>();
            hold(r);
            hold(u);
#pragma unroll
            for (int b = 0; b < 8; b++) {
                const float *x = u + 4 * b, *z = r + 4 * b;
                const float y[4] = {fmaf(c[b].x, x[0], z[0]), fmaf(c[b].y, x[1], z[1]), fmaf(c[b].x, x[2], z[2]), fmaf(c[b].y, x[3], z[3])};
                w[2 * b] = E::pack(y[0], y[1]), w[2 * b + 1] = E::pack(y[2], y[3]);
                rest[2 * b] = E::pack(y[0] - E::lo(w[2 * b]), y[1] - E::hi(w[2 * b]));
                rest[2 * b + 1] = E::pack(y[2] - E::lo(w[2 * b + 1]), y[3] - E::hi(w[2 * b + 1]));
            }
        };

        int st = 0;
        uint32_t phase = 0;
        if (chunks > 0) {
            mbar_wait(tokens % CHUNK != 0 ? tail : full, 0, p.hung, HUNG_CONSUMER + 16 * warpgroup);
            load_do(base);
#pragma unroll
            for (int x = 0; x < K / 4; x++) sb[x] = E::pack(s[2 * x], s[2 * x + 1]);
            hold(sb);
            hold(d_o);
            wgmma_fence();
            multiply(r, d_o, base, Int<M::P>{}, 0);
            if constexpr (CAREFUL) multiply(r, d_o, base, Int<M::P_LO>{}, 1);
            const uint64_t tile = desc_k_major(base + M::KT);
#pragma unroll
            for (int x = 0; x < K / 16; x++) E::template mma_rs<0>(u, sb + 4 * x, desc_step(tile, (x / 4) * PANEL + (x % 4) * 32), x > 0);
            wgmma_commit();
            keep_state(chunks - 1);
            if constexpr (CAREFUL) multiply_rest(base, chunks - 1);
            make_y(base + M::VEC + 8 * j);
        }
        // Nothing is in flight where the loop turns; w holds y of the chunk, d_o its dO.
        uint32_t at = base;
        for (int n = chunks - 1; n >= 0; n--) {
            const uint32_t factors = at + M::VEC + 8 * j;
            // dV^T = y^T C.
            hold(w);
            hold(rest);
            wgmma_fence();
            multiply(u, w, at, Int<M::C>{}, 0);
            multiply(u, rest, at, Int<M::C>{}, 1);
            if constexpr (CAREFUL) multiply(u, w, at, Int<M::C_LO>{}, 1);
            const float last = shared_f32(at + M::VEC + 4 * VEC_LAST);
            if constexpr (!CARRY && KEEPS_LOW<E>)
                if (counts(last)) keep_low<K>(keep_states(p, K, chunk + n, h, column / 64) + PANELS * PANEL, s, sb, tid);
            // Behind it dS^T = last dS'^T + (out o dO^T) Q.
            if constexpr (CAREFUL) {
                // The registers of y's rest are needed.
                wgmma_wait<0>();
                hold(u);
            }
#pragma unroll
            for (int b = 0; b < 8; b++) {
                const float2 x = shared_f32x2(factors + 4 * (VEC_OUT + 8 * b));
                if constexpr (CAREFUL) {
                    rest[2 * b] = pack_rest<E>(x.x * E::lo(d_o[2 * b]), x.y * E::hi(d_o[2 * b]));
                    rest[2 * b + 1] = pack_rest<E>(x.x * E::lo(d_o[2 * b + 1]), x.y * E::hi(d_o[2 * b + 1]));
                }
                d_o[2 * b] = E::pack(x.x * E::lo(d_o[2 * b]), x.y * E::hi(d_o[2 * b]));
                d_o[2 * b + 1] = E::pack(x.x * E::lo(d_o[2 * b + 1]), x.y * E::hi(d_o[2 * b + 1]));
            }
#pragma unroll
            for (int x = 0; x < K / 2; x++) s[x] *= last;
            hold(s);
            hold(d_o);
            if constexpr (CAREFUL) hold(rest);
            {
                const uint64_t rows = desc_step(desc_mn_major(M::Q, PANEL), at);
                wgmma_fence();
#pragma unroll
                for (int x = 0; x < 4; x++) E::template mma_rs<1>(s, d_o + 4 * x, desc_step(rows, x * 2048), 1);
                if constexpr (CAREFUL) {
#pragma unroll
                    for (int x = 0; x < 4; x++) E::template mma_rs<1>(s, rest + 4 * x, desc_step(rows, x * 2048), 1);
                }
                wgmma_commit();
            }
            float2 c[8];
#pragma unroll
            for (int b = 0; b < 8; b++) c[b] = shared_f32x2(factors + 4 * (VEC_IN + 8 * b));
            wgmma_wait<1>();
            hold(u);
            // dS^T -= (in o dV^T) K.
            {
                const uint64_t rows = desc_step(desc_mn_major(M::KT, PANEL), at);
#pragma unroll
                for (int x = 0; x < 4; x++) {
#pragma unroll
                    for (int b = 2 * x; b < 2 * x + 2; b++) {
                        w[2 * b] = E::pack(-c[b].x * u[4 * b], -c[b].y * u[4 * b + 1]);
                        w[2 * b + 1] = E::pack(-c[b].x * u[4 * b + 2], -c[b].y * u[4 * b + 3]);
                    }
#pragma unroll
                    for (int b = 4 * x; b < 4 * x + 4; b++) hold(w[b]);
                    wgmma_fence();
                    E::template mma_rs<1>(s, w + 4 * x, desc_step(rows, x * 2048), 1);
                }
                wgmma_commit();
            }
            // dV to the warp's staging, while that runs.
            if constexpr (!CARRY) {
#pragma unroll
                for (int b = 0; b < 4; b++) stsm_trans(own_at + b * 512, E::pack(u[8 * b], u[8 * b + 1]), E::pack(u[8 * b + 2], u[8 * b + 3]),
                           E::pack(u[8 * b + 4], u[8 * b + 5]), E::pack(u[8 * b + 6], u[8 * b + 7]));
            }
            if constexpr (CAREFUL && !CARRY) {
                uint32_t x[16];
#pragma unroll
                for (int y = 0; y < 16; y++) x[y] = pack_rest<E>(u[2 * y], u[2 * y + 1]);
                keep_rows<1>(kept, keep_rests(p, K, chunk + n, h, column / 64) + PANELS * PANEL + warp * 2048, x, lane);
            }
            int next = st + 1;
            uint32_t next_phase = phase;
            if (next == STAGES) next = 0, next_phase ^= 1;
            if (n > 0) arrive(next, next_phase);
            const uint32_t at_next = at + (next == 0 ? -(STAGES - 1) * M::STAGE : M::STAGE);
            wgmma_wait<0>();
            hold(s);
            __syncwarp();
            warp_arrive(empty + 8 * st, lane);
            // R and U of the chunk before (in front of the first one: of whatever is there, for nothing).
            load_do(at_next);
            hold(d_o);
            wgmma_fence();
            multiply(r, d_o, at_next, Int<M::P>{}, 0);
            if constexpr (CAREFUL) multiply(r, d_o, at_next, Int<M::P_LO>{}, 1);
            multiply_state(at_next);
            if (n > 0) keep_state(n - 1);
            if constexpr (CAREFUL) multiply_rest(at_next, n - 1);
            if constexpr (!CARRY) {
                const int row0 = token + n * CHUNK, len = tokens - n * CHUNK;
                char* to = (char*)p.dv + ((long long)(row0 + (lane >> 1)) * p.dv_stride + h * p.v + column + 16 * warp) * 2 + (lane & 1) * 16;
                const uint32_t from = own + (lane >> 1) * 32 + (((lane & 1) ^ ((lane >> 3) & 1)) << 4);
#pragma unroll
                for (int b = 0; b < 4; b++)
                    if ((lane >> 1) + 16 * b < len) *(uint4*)(to + b * 32 * p.dv_stride) = shared_16(from + b * 512);
                __syncwarp();
            }
            make_y(at_next + M::VEC + 8 * j);
            st = next, phase = next_phase, at = at_next;
        }
        if (elect()) bulk_wait();
        if (out >= 0) {
            float* x = p.dstates_out + ((long long)out * p.hv + h) * K * p.v + v0;
#pragma unroll
            for (int b = 0; b < K / 8; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[(8 * b + 2 * j + e % 2) * p.v + (e / 2) * 8] = s[4 * b + e];
        }
    }
}

}  // namespace hopper
