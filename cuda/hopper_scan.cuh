// `scan`: one value head of one segment, chunk after chunk, with the state in registers.
//
// Roles. Warpgroups 0 .. WG-1 are consumers: each owns 64 of the V columns of the state, transposed, S^T [64, K] f32 as a wgmma
// accumulator, and does all products of its columns; consumers never wait for each other (except to clear the rows behind
// a sequence's end). Warpgroup WG is the producer: one lane of it issues all loads. WG = V / 64 / parts; the grid's parts
// take the rest of V.
//
// Everything on the serial chain stays in registers: a product's result, scaled and rounded, is the left operand of the next.
//   U^T = S^T K^T     W^T = V^T - vec_in o U^T     N^T = W^T A^T     S^T <- e^(c_C) S^T + (vec_state o N^T) K
// Off the chain, filling its gaps:
//   O^T = vec_out o (S^T Q^T) + N^T P^T
//
// Barriers: full[s] (the producer's bytes), empty[s] (a lane of each consumer warp). Named: 1 + w, consumer w around its
// staging; 8, all consumers at a ragged end.
#pragma once
#include "hopper_forward.cuh"

namespace hopper {

// Shared memory, in bytes from a base on 1024.
//   stage s   Q, K [64, K], V [64, 64 WG], image: from the producer's loads (empty[s] taken) until all consumers arrived on
//             empty[s], after their last product of that chunk; ring of STAGES
//   staging   per consumer, O [64, 64]: from the write after the last product of a chunk until the store has read it
template <int K, int WG, int STAGES>
struct ScanSmem {
    static constexpr int Q = 0;
    static constexpr int KT = Q + (K / 64) * PANEL;
    static constexpr int V = KT + (K / 64) * PANEL;
    static constexpr int IMAGE = V + WG * PANEL;
    static constexpr int STAGE = IMAGE + IMAGE_BYTES;
    static constexpr int STAGING = STAGES * STAGE;
    static constexpr int BARRIERS = STAGING + WG * PANEL;
    static constexpr int BYTES = BARRIERS + STAGES * 16 + 1024;
};

// Codes in `hung`.
enum : uint32_t { HUNG_PRODUCER = 0x100, HUNG_CONSUMER = 0x200 };

// Zeroes rows from `len` on of a panel; all `threads` threads.
__device__ __forceinline__ void clear_rows(char* panel, int len, int tid, int threads) {
    for (int n = len * 8 + tid; n < CHUNK * 8; n += threads) *(uint4*)(panel + n * 16) = make_uint4(0, 0, 0, 0);
}

// What a kernel is given: passed by value, as the copy engine's tensor maps must be.
struct ScanMaps {
    CUtensorMap q, k, v, o;
};

// d [64, 64] (+)= a b^T with b lower triangular as the image keeps it: rows above a column's block are left out.
template <class E, int ADD>
__device__ __forceinline__ void multiply_low(float (&d)[32], const uint32_t (&a)[16], uint32_t b) {
    E::template mma_low<0>(d, a, desc_blocks(b + image_columns(0)), ADD);
    E::template mma_low<1>(d, a + 4, desc_blocks(b + image_columns(1)), 1);
    E::template mma_low<2>(d, a + 8, desc_blocks(b + image_columns(2)), 1);
    E::template mma_low<3>(d, a + 12, desc_blocks(b + image_columns(3)), 1);
}

template <class E, int K, int WG, int STAGES>
__device__ __forceinline__ void scan(const ScanArgs& p, const ScanMaps& maps) {
    extern __shared__ char smem_raw[];
    char* smem = (char*)(((uintptr_t)smem_raw + 1023) & ~(uintptr_t)1023);
    using M = ScanSmem<K, WG, STAGES>;
    constexpr int PANELS = K / 64;
    const int warpgroup = uniform(threadIdx.x / WARPGROUP), tid = threadIdx.x % WARPGROUP, warp = tid >> 5, lane = tid & 31;
    const uint32_t base = smem_addr(smem), full = base + M::BARRIERS, empty = full + STAGES * 8;

    const int parts = p.v / (64 * WG);
    const int part = blockIdx.x % parts, h = blockIdx.x / parts % p.hv;
    const Segment seg = p.segments[blockIdx.x / parts / p.hv];
    const int token = uniform(seg.token), tokens = uniform(seg.tokens), chunks = (tokens + CHUNK - 1) / CHUNK;
    const int kh = key_head(h, p.hk, p.hv, p.mod);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, WG * 4);
        }
        mbar_init_fence();
    }
    __syncthreads();

    if (warpgroup == WG) {
        if constexpr (WG > 1) regs_down<24>();
        if (tid == 0) {
            tma_prefetch(&maps.q);
            tma_prefetch(&maps.k);
            tma_prefetch(&maps.v);
            tma_prefetch(&maps.o);
            const char* image = p.images + ((long long)seg.chunk * p.hv + h) * IMAGE_BYTES;
            int s = 0;
            uint32_t phase = 1;
            for (int n = 0; n < chunks; n++) {
                mbar_wait(empty + 8 * s, phase, p.hung, HUNG_PRODUCER + s);
                const uint32_t bar = full + 8 * s, to = base + s * M::STAGE;
                const int row = token + n * CHUNK;
                mbar_expect(bar, M::STAGE);
#pragma unroll
                for (int x = 0; x < PANELS; x++) tma_load(to + M::KT + x * PANEL, &maps.k, kh * K + 64 * x, row, bar);
#pragma unroll
                for (int x = 0; x < PANELS; x++) tma_load(to + M::Q + x * PANEL, &maps.q, kh * K + 64 * x, row, bar);
#pragma unroll
                for (int x = 0; x < WG; x++) tma_load(to + M::V + x * PANEL, &maps.v, h * p.v + 64 * (part * WG + x), row, bar);
                bulk_load(to + M::IMAGE, image, IMAGE_BYTES, bar);
                image += (long long)p.hv * IMAGE_BYTES;
                if (++s == STAGES) s = 0, phase ^= 1;
            }
        }
    } else {
        if constexpr (WG > 1) regs_up<240>();
        const int i = lane >> 2, j = lane & 3;
        const int column = 64 * (part * WG + warpgroup);  // of V, the consumer's first
        const int v0 = column + 16 * warp + i;            // of V, the thread's first; the other is v0 + 8
        const uint32_t staging = base + M::STAGING + warpgroup * PANEL;
        // Row and unit that this lane addresses in ldmatrix and stmatrix of blocks (b, v), (b, v + 8), (b + 1, v), (b + 1, v + 8).
        const int lane_row = (lane >> 4) * 8 + (lane & 7), lane_unit = 2 * warp + ((lane >> 3) & 1);
        const uint32_t lane_at = swizzled(0, lane_row, lane_unit);  // 16 rows on: + 2048

        // S^T: s[4b + e]: row v0 (+ 8 for e >= 2), column 8b + 2j + e % 2.
        float s[K / 2];
#pragma unroll
        for (int n = 0; n < K / 2; n++) s[n] = 0.f;
        if (seg.in >= 0) {
            const float* x = p.states_in + ((long long)seg.in * p.hv + h) * K * p.v + v0;
#pragma unroll
            for (int b = 0; b < K / 8; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[4 * b + e] = x[(8 * b + 2 * j + e % 2) * p.v + (e / 2) * 8];
        }

        // Every product is one link of the chain and one filler issued behind it; nothing is in flight where the loop turns.
        float o[32], u[32];
        uint32_t sb[K / 4], w[16], ob[16];
        const int before_end = chunks - 1;

        // Waits for chunk n in stage `st`; rows behind the sequence's end are another's: zeroes them.
        auto arrive = [&](int n, int st, uint32_t phase) {
            mbar_wait(full + 8 * st, phase, p.hung, HUNG_CONSUMER + 16 * warpgroup + st);
            const int len = tokens - n * CHUNK;
            if (len < CHUNK) {
                char* stage = smem + st * M::STAGE;
                const int t = threadIdx.x;
                for (int x = 0; x < 2 * PANELS + WG; x++) clear_rows(stage + x * PANEL, len, t, WG * WARPGROUP);
                fence_proxy();
                bar_sync(8, WG * WARPGROUP);
            }
        };
        // U^T = S^T K^T.
        auto issue_u = [&](uint32_t at) {
#pragma unroll
            for (int x = 0; x < K / 16; x++)
                E::template mma_rs<0>(u, sb + 4 * x, desc_k_major(at + M::KT + (x / 4) * PANEL + (x % 4) * 32), x > 0);
            wgmma_commit();
        };
        // W^T = V^T - vec_in o U^T.
        auto make_w = [&](uint32_t at, const float* vec) {
#pragma unroll
            for (int b = 0; b < 4; b++) {
                uint32_t v[4];
                ldsm_trans(v, at + M::V + warpgroup * PANEL + lane_at + b * 2048);
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    const float* y = u + 8 * b + 4 * x;
                    float2 c = *(const float2*)(vec + VEC_IN + 16 * b + 8 * x);
                    w[4 * b + 2 * x] = E::pack(fmaf(-c.x, y[0], E::lo(v[2 * x])), fmaf(-c.y, y[1], E::hi(v[2 * x])));
                    w[4 * b + 2 * x + 1] = E::pack(fmaf(-c.x, y[2], E::lo(v[2 * x + 1])), fmaf(-c.y, y[3], E::hi(v[2 * x + 1])));
                }
            }
        };
        // O of a whole chunk to memory by way of the staging.
        auto stage_o = [&]() {
            if (tid == 0) bulk_wait_read();
            bar_sync(1 + warpgroup, WARPGROUP);
#pragma unroll
            for (int b = 0; b < 4; b++) stsm_trans(staging + lane_at + b * 2048, ob[4 * b], ob[4 * b + 1], ob[4 * b + 2], ob[4 * b + 3]);
        };

        int st = 0;
        uint32_t phase = 0;
        if (chunks > 0) {
            arrive(0, 0, 0);
#pragma unroll
            for (int x = 0; x < K / 4; x++) sb[x] = E::pack(s[2 * x], s[2 * x + 1]);
            wgmma_fence();
            issue_u(base);
            wgmma_wait<0>();
            hold(u);
            make_w(base, (const float*)(smem + M::IMAGE + IMAGE_VEC) + 2 * j);
        }
        for (int n = 0; n < chunks; n++) {
            const uint32_t at = base + st * M::STAGE;
            const float* vec = (const float*)(smem + st * M::STAGE + M::IMAGE + IMAGE_VEC) + 2 * j;

            // N^T = W^T A^T; behind it O^T = S^T Q^T.
            wgmma_fence();
            multiply_low<E, 0>(u, w, at + M::IMAGE + IMAGE_A);
            wgmma_commit();
#pragma unroll
            for (int x = 0; x < K / 16; x++)
                E::template mma_rs<0>(o, sb + 4 * x, desc_k_major(at + M::Q + (x / 4) * PANEL + (x % 4) * 32), x > 0);
            wgmma_commit();
            if (n > 0) {
                stage_o();
                fence_proxy();
                bar_sync(1 + warpgroup, WARPGROUP);
                if (tid == 0) {
                    tma_store(&maps.o, h * p.v + column, token + (n - 1) * CHUNK, staging);
                    bulk_commit();
                }
            }
            const float last = vec[VEC_LAST];
#pragma unroll
            for (int x = 0; x < K / 2; x++) s[x] *= last;
            wgmma_wait<1>();
            hold(u);
            uint32_t nb[16], ns[16];
#pragma unroll
            for (int b = 0; b < 8; b++) {
                float2 c = *(const float2*)(vec + VEC_STATE + 8 * b);
                ns[2 * b] = E::pack(c.x * u[4 * b], c.y * u[4 * b + 1]);
                ns[2 * b + 1] = E::pack(c.x * u[4 * b + 2], c.y * u[4 * b + 3]);
                nb[2 * b] = E::pack(u[4 * b], u[4 * b + 1]);
                nb[2 * b + 1] = E::pack(u[4 * b + 2], u[4 * b + 3]);
            }

            // S^T <- e^(c_C) S^T + (vec_state o N^T) K; behind it O^T = vec_out o O^T + N^T P^T.
            hold(s);
            hold(ns);
            hold(nb);
            wgmma_fence();
#pragma unroll
            for (int x = 0; x < 4; x++) E::template mma_rs<1>(s, ns + 4 * x, desc_mn_major(at + M::KT + x * 2048, PANEL), 1);
            wgmma_commit();
            wgmma_wait<1>();
            hold(o);
#pragma unroll
            for (int b = 0; b < 8; b++) {
                float2 c = *(const float2*)(vec + VEC_OUT + 8 * b);
                o[4 * b] *= c.x, o[4 * b + 1] *= c.y, o[4 * b + 2] *= c.x, o[4 * b + 3] *= c.y;
            }
            hold(o);
            wgmma_fence();
            multiply_low<E, 1>(o, nb, at + M::IMAGE + IMAGE_P);
            wgmma_commit();
            wgmma_wait<1>();
            hold(s);

            // U and W of the next chunk (after the last one: of whatever is there, for nothing).
#pragma unroll
            for (int x = 0; x < K / 4; x++) sb[x] = E::pack(s[2 * x], s[2 * x + 1]);
            int next = st + 1;
            uint32_t next_phase = phase;
            if (next == STAGES) next = 0, next_phase ^= 1;
            if (n < before_end) arrive(n + 1, next, next_phase);
            const uint32_t at_next = base + next * M::STAGE;
            hold(sb);
            wgmma_fence();
            issue_u(at_next);
            wgmma_wait<1>();
            hold(o);
#pragma unroll
            for (int x = 0; x < 16; x++) ob[x] = E::pack(o[2 * x], o[2 * x + 1]);
            __syncwarp();
            if (lane == 0) mbar_arrive(empty + 8 * st);
            wgmma_wait<0>();
            hold(u);
            make_w(at_next, (const float*)(smem + next * M::STAGE + M::IMAGE + IMAGE_VEC) + 2 * j);
            st = next, phase = next_phase;
        }
        // The last chunk's output; its rows may end before the chunk does.
        if (chunks > 0) {
            const int start = token + before_end * CHUNK, len = tokens - before_end * CHUNK;
            stage_o();
            bar_sync(1 + warpgroup, WARPGROUP);
            const char* from = smem + M::STAGING + warpgroup * PANEL;
            for (int x = tid; x < len * 8; x += WARPGROUP) {
                int row = x / 8, unit = x % 8;
                char* to = (char*)p.o + ((start + row) * p.o_stride + h * p.v + column) * 2 + unit * 16;
                *(uint4*)to = *(const uint4*)(from + swizzled(0, row, unit));
            }
        }
        if (seg.out >= 0) {
            float* x = p.states_out + ((long long)seg.out * p.hv + h) * K * p.v + v0;
#pragma unroll
            for (int b = 0; b < K / 8; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[(8 * b + 2 * j + e % 2) * p.v + (e / 2) * 8] = s[4 * b + e];
        }
        if (tid == 0) bulk_wait();
    }
}

}  // namespace hopper
