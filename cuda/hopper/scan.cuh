// `scan`: one value head of one segment, chunk after chunk, with the state in registers; `state`, the same without outputs; and
// `keep`, which leaves S and e = C W of each chunk for the backward (backward.cuh: GRAD, whose image has other places and factors).
//
// Roles. Warpgroups 0 .. WG-1 are consumers: each owns 64 of the V columns of the state, transposed, S^T [64, K] f32 as a wgmma
// accumulator, and does all products of its columns; consumers never wait for each other. Warpgroup WG serves them: a lane of its
// warp 0 issues all loads, warp 1 + w stores O of consumer w, and warp 0 with those that have no O zeroes the rows behind a sequence's
// end. MAKES: warpgroup WG + 1 makes P (scores.cuh), which is loaded otherwise. WG = V / 64 / parts; the grid's parts take the rest of V.
//
// Everything on the serial chain stays in registers: a product's result, scaled and rounded, is the left operand of the next.
//   U^T = S^T K^T     W^T = V^T - vec_in o U^T     N^T = W^T A^T     S^T <- e^(c_C) S^T + (vec_state o N^T) K
// Off the chain, behind each link one filler for the time in which its result is scaled and rounded:
//   O^T = vec_out o (S^T Q^T) + N^T P^T:  half of S^T Q^T behind U, half behind N, N^T P^T behind S
// Products complete in the order in which they are issued, so what waits for one of them leaves those behind it in flight: each
// step of S and of U, between which registers are rounded, is a group of its own, for ptxas makes it one whatever is said.
//
// CAREFUL: for segments in some chunk of which the sums cancel (CANCELS of forward.cuh). S and O are then small sums of large N, and
// what rounding A, P and N leaves shows in them (up to 7e-2 where 4.4e-3 is left otherwise, in f16 2e-2 for 6e-4), so that it is multiplied, too:
//   N^T = W^T (A + A_lo)^T     S^T += (M + M_lo) K, M = vec_state o N^T     O^T += (N + N_lo)^T P^T + N^T P_lo^T
// W and S for U and S Q^T stay as they are: what is rounded there is like another V, or o, and does not grow. With outputs that is a kernel
// of its own, beside the usual one: each leaves the other's segments alone as it begins. In one kernel ptxas has too few registers for both.
// `state` has them, and goes on as the careful one; so do the passes of the backward, to which only C_lo is new; `keep` also leaves what
// rounding e leaves.
//
// Barriers: full[s] (the producer's bytes), empty[s] (a lane of each consumer warp), tail (a lane of each warp that zeroes: the last
// chunk, which is not whole, is there and zeroed; who multiplies waits for it instead of full[s]), made[s] (a lane of each warp that makes P: it is
// there, and so is the rows' factor), o_full[w] (a lane of each warp of consumer
// w: its O is in its staging), o_free[w] (the storing lane: it has been read). Named: 8, the warps that zero, when the last load is issued.
#pragma once
#include "backward.cuh"
#include "scores.cuh"

namespace hopper {

// Shared memory, in bytes from a base on 1024.
//   stage s   [Q,] K [64, K], V [64, 64 WG], A, [P,] vectors: from the producer's loads (empty[s] taken) until all consumers
//             arrived on empty[s], after their last product of that chunk; ring of STAGES. MAKES: P from full[s] on, made[s] says so, until then.
//             The blocks of A and P above the diagonal are zeroed once: nothing touches them. CAREFUL: A_lo, P_lo behind them, the same
//   staging   per consumer, O [64 tokens, 64] of a chunk as a panel: from the consumer's stores (o_free[w] taken) until the storing warp
//             has read it. KEEP: per consumer warp, S^T [16, K], e^T [16, 64], read by the copies that one lane asks for
template <int K, int WG, int STAGES, bool OUT, bool GRAD = false, bool KEEP = false, bool CAREFUL = false, bool MAKES = false>
struct ScanSmem {
    static constexpr int KT = 0;
    static constexpr int V = KT + (K / 64) * PANEL;
    static constexpr int Q = V + WG * PANEL;
    static constexpr int A = Q + (OUT ? (K / 64) * PANEL : 0);
    static constexpr int P = A + PANEL;
    static constexpr int A_LO = P + (OUT ? PANEL : 0);
    static constexpr int P_LO = A_LO + (CAREFUL ? PANEL : 0);
    static constexpr int VEC = P_LO + (CAREFUL && OUT ? PANEL : 0);
    static constexpr int STAGE = VEC + (MAKES ? 2048 : 1024);
    static constexpr int STAGING = STAGES * STAGE;
    static constexpr int BARRIERS = STAGING + (OUT ? WG * PANEL : KEEP ? WG * (K / 64 + 1) * PANEL : 0);
    static constexpr int BYTES = BARRIERS + 128 + 1024;
    // Of a chunk's vectors; all that is loaded.
    static constexpr int VECTORS = MAKES ? VEC_BYTES : 1024;
    static constexpr int LOADED = A + (CAREFUL ? 2 : 1) * (GRAD ? PANEL : (OUT && !MAKES ? 2 : 1) * 5120) + VECTORS;
};

// Threads of a block: consumers, who serves them, who makes P.
__host__ __device__ constexpr int scan_threads(int consumers, bool makes) { return (consumers + 1 + makes) * WARPGROUP; }

// Stages of the careful scan with outputs.
constexpr int CAREFUL_STAGES = 2;

// Codes in `hung`.
enum : uint32_t { HUNG_PRODUCER = 0x100, HUNG_CONSUMER = 0x200, HUNG_STORE = 0x300, HUNG_TAIL = 0x400, HUNG_MAKER = 0x500 };

// Zeroes what the first `panels` panels of a stage have from row `len` on, for products, when its last loads (phase `parity` of `full`)
// are there, and says so; warp `at` of `warps`. No phase of `full` before that one may be open, as it could pass for it.
__device__ __forceinline__ void clear_tail(uint32_t stage, int panels, int len, uint32_t full, uint32_t parity, uint32_t tail, int at, int warps, int lane, uint32_t* hung) {
    mbar_wait(full, parity, hung, HUNG_TAIL + at);
#pragma unroll 1
    for (int x = 0; x < panels; x++) clear_rows(stage + x * PANEL, len, at * 32 + lane, warps * 32);
    fence_proxy();
    __syncwarp();
    warp_arrive(tail, lane);
}

// What a kernel is given: passed by value, as the copy engine's tensor maps must be.
struct ScanMaps {
    CUtensorMap q, k, v, o;  // q, o: for passes with outputs
};

// Lower triangular [64, 64] from the image: of columns 16 x to 16 x + 15 all 64 rows, those above from the zeros.
__device__ __forceinline__ void load_low(uint32_t to, const char* from, uint32_t bar) {
#pragma unroll
    for (int x = 0; x < 4; x++) bulk_load(to + x * 2048 + x * 512, from + image_columns(x), 2048 - x * 512, bar);
}

template <class E, int K, int WG, int STAGES, bool OUT, bool GRAD = false, bool KEEP = false, bool CAREFUL = false, bool MAKES = false>
__device__ __forceinline__ void scan(const ScanArgs& p, const ScanMaps& maps) {
    DYNAMIC_SHARED(smem_raw);
    using M = ScanSmem<K, WG, STAGES, OUT, GRAD, KEEP, CAREFUL, MAKES>;
    static_assert(OUT || !MAKES, "P is for outputs");
    static_assert(GRAD ? !OUT : !KEEP, "the image of the backward is for passes without outputs");
    constexpr bool ASKS = GRAD ? !CAREFUL && ASKS_GRAD<E> : OUT || !CAREFUL;
    constexpr long long IMAGE = GRAD ? GRAD_BYTES : IMAGE_BYTES;
    constexpr int PANELS = K / 64;
    const int warpgroup = uniform(threadIdx.x / WARPGROUP), tid = threadIdx.x % WARPGROUP, warp = tid >> 5, lane = tid & 31;
    const uint32_t base = smem_addr(align_1024(smem_raw)), full = base + M::BARRIERS, empty = full + STAGES * 8, tail = empty + STAGES * 8;
    const uint32_t o_full = tail + 8, o_free = o_full + WG * 8, made = o_free + WG * 8;
    constexpr int THREADS = scan_threads(WG, MAKES);
    constexpr bool SHARES = MAKES || WG > 1;  // roles have registers of their own
    using Own = Registers<K, WG, MAKES>;
    constexpr int CLEARING = OUT ? 1 + WG : 1;  // the first of the warps that zero, beside warp 0

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
    const int first = 64 * WG * (transition ? part - parts_v : part);     // the block's first

    // Whether sums of a chunk cancel; the backward asks for all value heads of a key head.
    auto cancels_at = [&](int chunk) { return p.cancels[GRAD ? (long long)chunk * p.hk + kh : (long long)h * p.places + chunk] != 0; };
    // Asked for before all that follows, and there behind it.
    bool cancels = false;
    if constexpr (ASKS)
        for (int n = threadIdx.x; n < chunks; n += THREADS) cancels |= cancels_at(chunk + n);
    // Mostly that is all that a careful scan does: blocks that wait for its multiprocessor get it at once.
    if constexpr (ASKS && CAREFUL)
        if (uniform(__syncthreads_or(cancels)) == 0) return;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, WG * 4 * WARP_ARRIVALS);
            if constexpr (MAKES) mbar_init(made + 8 * s, 4 * WARP_ARRIVALS);
        }
        mbar_init(tail, (5 - CLEARING) * WARP_ARRIVALS);
        for (int w = 0; w < WG; w++) {
            mbar_init(o_full + 8 * w, 4 * WARP_ARRIVALS);
            mbar_init(o_free + 8 * w, 1);
        }
        mbar_init_fence();
    }
    for (int n = threadIdx.x; n < STAGES * (PANEL / 16); n += THREADS) {
        const uint32_t at = base + n / (PANEL / 16) * M::STAGE + n % (PANEL / 16) * 16;
        int x = n % (PANEL / 16) / 128, row16 = n % 128 / 32;
        if (!GRAD && row16 < x) {
            shared_zero_16(at + M::A);
            if constexpr (OUT) shared_zero_16(at + M::P);
            if constexpr (CAREFUL) shared_zero_16(at + M::A_LO);
            if constexpr (CAREFUL && OUT) shared_zero_16(at + M::P_LO);
        }
        if constexpr (!OUT)
            if (transition)  // V of the transition is zero
                for (int y = 0; y < WG; y++) shared_zero_16(at + M::V + y * PANEL);
    }
    fence_proxy();
    if constexpr (ASKS && !CAREFUL) {
        // ptxas must know that all threads are told the same, or it serialises the products behind it (C7518).
        if (uniform(__syncthreads_or(cancels)) != 0) {
            if constexpr (!OUT) {
                if (threadIdx.x == 0)
                    for (uint32_t bar = full; bar < o_free + WG * 8; bar += 8) mbar_inval(bar);
                __syncthreads();
                // What is left of A takes the place of a stage.
                static_assert(ScanSmem<K, WG, STAGES - 1, OUT, GRAD, KEEP, true>::BYTES <= M::BYTES, "shared memory of the launch");
                scan<E, K, WG, STAGES - 1, OUT, GRAD, KEEP, true>(p, maps);
            }
            return;
        }
    } else {
        __syncthreads();
    }

    // What says that the tiles of chunk n are in stage `st`, and zeroed behind the sequence's end; its phase is 0 where they end.
    auto whole = [&](int n) { return tokens - n * CHUNK >= CHUNK; };
    auto bar_of = [&](int n, int st) { return whole(n) ? full + 8 * st : tail; };

    // Loads of chunk n into stage s, by one lane.
    auto load = [&](int n, int s, uint32_t phase) {
        // What is left of A and P, by its number: two registers less than its address. Asked for before the wait.
        const int low_at = CAREFUL && !GRAD && cancels_at(chunk + n) ? 1 + (chunk + n) * p.hv + h : 0;
        mbar_wait(empty + 8 * s, phase, p.hung, HUNG_PRODUCER + s);
        const uint32_t bar = full + 8 * s, to = base + s * M::STAGE;
        const int row = token + n * CHUNK;
        const char* image = p.images + ((long long)(chunk + n) * p.hv + h) * IMAGE;
        mbar_expect(bar, M::LOADED - (transition ? WG * PANEL : 0));
#pragma unroll
        for (int x = 0; x < PANELS; x++) tma_load(to + M::KT + x * PANEL, &maps.k, kh * K + 64 * x, row, bar);
        if (!transition) {
#pragma unroll
            for (int x = 0; x < WG; x++) tma_load(to + M::V + x * PANEL, &maps.v, h * p.v + first + 64 * x, row, bar);
        }
        if constexpr (GRAD)
            bulk_load(to + M::A, image + GRAD_C, PANEL, bar);
        else
            load_low(to + M::A, image + IMAGE_A, bar);
        if constexpr (CAREFUL && !GRAD) load_low(to + M::A_LO, p.lows + (long long)low_at * LOW_BYTES + LOW_A, bar);
        bulk_load(to + M::VEC, image + (GRAD ? GRAD_VEC : IMAGE_VEC), M::VECTORS, bar);
        if constexpr (OUT) {
#pragma unroll
            for (int x = 0; x < PANELS; x++) tma_load(to + M::Q + x * PANEL, &maps.q, kh * K + 64 * x, row, bar);
        }
        if constexpr (OUT && !MAKES) {
            load_low(to + M::P, image + IMAGE_P, bar);
            if constexpr (CAREFUL) load_low(to + M::P_LO, p.lows + (long long)low_at * LOW_BYTES + LOW_P, bar);
        }
    };
    // O of chunk n, by warp 1 + w: of a whole chunk by the copy engine; of one that is not, the rows that are there.
    auto store = [&](int n) {
        const int w = warp - 1, column = h * p.v + first + 64 * w;
        const uint32_t from = base + M::STAGING + w * PANEL;
        mbar_wait(o_full + 8 * w, n & 1, p.hung, HUNG_STORE + w);
        const int row = token + n * CHUNK, len = tokens - n * CHUNK;
        if (len < CHUNK) {
            char* to = (char*)p.o + ((row + (lane >> 3)) * p.o_stride + column) * 2 + (lane & 7) * 16;
#pragma unroll 1
            for (int r = lane >> 3; r < len; r += 4, to += 8 * p.o_stride) *(uint4*)to = shared_16(swizzled(from, r, lane & 7));
        } else if (elect()) {
            tma_store(&maps.o, column, row, from);
            bulk_commit();
            bulk_wait_read();
            mbar_arrive(o_free + 8 * w);
        }
        __syncwarp();
    };
    const bool stores = OUT && warp >= 1 && warp <= WG;
    // The rows behind the end of the last chunk, by the warps that store nothing, behind the last load.
    auto clear = [&] {
        if (!stores && tokens % CHUNK != 0) {
            const int n = chunks - 1, s = n % STAGES;
            __syncwarp();
            bar_sync(8, (5 - CLEARING) * 32);
            clear_tail(base + s * M::STAGE, (OUT ? 2 : 1) * PANELS + WG, tokens % CHUNK, full + 8 * s, n / STAGES & 1, tail, warp == 0 ? 0 : warp - CLEARING + 1, 5 - CLEARING,
                       lane, p.hung);
        }
    };

    if (MAKES && warpgroup == WG + 1) {
        regs_down<Own::MAKER>();
        const uint32_t own_warp = uniform(warp);
        int s = 0;
        uint32_t phase = 0;
        for (int n = 0; n < chunks; n++) {
            const uint32_t at = base + s * M::STAGE;
            mbar_wait(bar_of(n, s), whole(n) ? phase : 0, p.hung, HUNG_MAKER + s);
            // Beside two consumers asked anew, so that what is made of them is not kept from chunk to chunk: registers are few.
            constexpr bool ANEW = WG > 1;
            uint32_t which = own_warp;
            if constexpr (ANEW) hold(which);
            const int which_lane = ANEW ? lane_id() : lane;
            scores<E, K, ANEW ? 32 : 64, CAREFUL>(at + M::Q, at + M::KT, at + M::VEC, at + M::P, at + M::P_LO, p.scale, p.l2norm, which, which_lane);
            fence_proxy();
            __syncwarp();
            warp_arrive(made + 8 * s, which_lane);
            if (++s == STAGES) s = 0, phase ^= 1;
        }
    } else if (warpgroup == WG) {
        if constexpr (SHARES) regs_down<Own::SERVER>();
        if (uniform(warp) == 0 && elect()) {
            tma_prefetch(&maps.k);
            tma_prefetch(&maps.v);
            if constexpr (OUT) tma_prefetch(&maps.q);
        }
        if (stores && lane == 0) tma_prefetch(&maps.o);
        int s = 0;
        uint32_t phase = 1;
        if (uniform(warp) == 0 && elect()) {
            for (int n = 0; n < chunks; n++) {
                load(n, s, phase);
                if (++s == STAGES) s = 0, phase ^= 1;
            }
        } else if (CAREFUL && GRAD && warp == 1 && elect()) {
            // What is left of C, whose bytes warp 0 expects with the others: it has no registers for it beside two consumers (24 a thread).
            for (int n = 0; n < chunks; n++) {
                const int low_at = cancels_at(chunk + n) ? 1 + (chunk + n) * p.hv + h : 0;
                mbar_wait(empty + 8 * s, phase, p.hung, HUNG_PRODUCER + s);
                bulk_load(base + s * M::STAGE + M::A_LO, p.lows + (long long)low_at * GRAD_LOW_BYTES, PANEL, full + 8 * s);
                if (++s == STAGES) s = 0, phase ^= 1;
            }
        } else if (stores) {
            for (int n = 0; n < chunks; n++) store(n);
        }
        clear();
        if (stores && elect()) bulk_wait();
    } else {
        if constexpr (SHARES) regs_up<Own::CONSUMER>();
        const int i = lane >> 2, j = lane & 3;
        const int column = first + 64 * warpgroup;  // of the state, the consumer's first
        const int v0 = column + 16 * warp + i;      // the thread's first; the other is v0 + 8
        // Row and unit that this lane addresses in ldmatrix of blocks (b, v), (b, v + 8), (b + 1, v), (b + 1, v + 8); 16 rows on: + 2048.
        const int lane_row = (lane >> 4) * 8 + (lane & 7);
        const uint32_t lane_at = swizzled(0, lane_row, 2 * warp + ((lane >> 3) & 1));
        const uint32_t staging = base + M::STAGING + warpgroup * PANEL;

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
        constexpr bool TWO = GRAD || CAREFUL;
        uint32_t sb[K / 4], w[16], rest[TWO ? 16 : 1];

        const uint32_t code = HUNG_CONSUMER + 16 * warpgroup;
        // o^T = S^T Q^T for the stage at `at`, columns from 16 FROM to 16 TO of S.
        auto multiply_q = [&](uint32_t at, auto from, auto to) {
            const uint64_t tile = desc_step(desc_k_major(M::Q), at);
#pragma unroll
            for (int x = from; x < to; x++)
                E::template mma_rs<0>(o, sb + 4 * x, desc_step(tile, (x / 4) * PANEL + (x % 4) * 32), x > 0);
            wgmma_commit();
        };
        // d^T (+)= a^T X^T for the lower triangular X, A or P, or what is left of them, of the stage at `at`.
        auto multiply_low = [&](float (&d)[32], const uint32_t (&a)[16], uint32_t at, auto x_at, int add) {
            const uint64_t tile = desc_step(GRAD ? desc_k_major(x_at) : desc_blocks(x_at), at);
#pragma unroll
            for (int x = 0; x < 4; x++) E::template mma_rs<0>(d, a + 4 * x, desc_step(tile, x * (GRAD ? 32 : 2048)), x > 0 || add);
        };
        // U^T = S^T K^T for the tiles of the stage at `at`, S^T rounded step by step, each step a group.
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
                wgmma_commit();
            }
        };
        // V^T of the stage at `at`, as U^T lies, its factors, and e^(c_C): early, as shared memory answers late while products read it, 100 cycles and more.
        uint32_t v[4][4];
        float2 c[8];
        float last = 1.f;
        auto load_factors = [&](uint32_t at) {
#pragma unroll
            for (int b = 0; b < 8; b++) c[b] = shared_f32x2(at + M::VEC + 4 * (VEC_IN + 8 * b + 2 * j));
        };
        // Beside two consumers and who makes P, registers are few while U is issued: O is finished before, and U's factors come behind it.
        constexpr bool FEW = MAKES && WG > 1;
        auto load_v = [&](uint32_t at) {
            last = shared_f32(at + M::VEC + 4 * VEC_LAST);
#pragma unroll
            for (int b = 0; b < 4; b++) ldsm_trans(v[b], at + M::V + warpgroup * PANEL + lane_at + b * 2048);
            if constexpr (!FEW) load_factors(at);
        };
        // W^T = V^T - vec_in o U^T, when U is there; behind it half of S^T Q^T may be in flight.
        auto make_w = [&] {
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
                w[2 * b] = E::pack(x[0], x[1]), w[2 * b + 1] = E::pack(x[2], x[3]);
                if constexpr (GRAD) {
                    rest[2 * b] = E::pack(x[0] - E::lo(w[2 * b]), x[1] - E::hi(w[2 * b]));
                    rest[2 * b + 1] = E::pack(x[2] - E::lo(w[2 * b + 1]), x[3] - E::hi(w[2 * b + 1]));
                }
            }
        };
        // O of a chunk to the staging.
        auto put_o = [&]() {
#pragma unroll
            for (int b = 0; b < 4; b++)
                stsm_trans(staging + lane_at + b * 2048, E::pack(o[8 * b], o[8 * b + 1]), E::pack(o[8 * b + 2], o[8 * b + 3]), E::pack(o[8 * b + 4], o[8 * b + 5]),
                           E::pack(o[8 * b + 6], o[8 * b + 7]));
        };
        // S^T and e^T of chunk n to memory, the warp's 16 rows of each, as the product before and after them have them.
        const uint32_t kept = base + M::STAGING + (warpgroup * 4 + warp) * (K / 64 + 1) * 2048;
        auto keep_state = [&](int n) {
            if constexpr (KEEP) keep_rows<K / 64>(kept, keep_states(p, K, chunk + n, h, column / 64) + warp * 2048, sb, lane);
        };
        auto keep_news_of = [&](int n) {
            if constexpr (KEEP) {
                uint32_t x[16];
#pragma unroll
                for (int y = 0; y < 16; y++) x[y] = E::pack(u[2 * y], u[2 * y + 1]);
                keep_rows<1>(kept + K / 64 * 2048, keep_news(p, chunk + n, h, column / 64) + warp * 2048, x, lane);
                if constexpr (CAREFUL) {
#pragma unroll
                    for (int y = 0; y < 16; y++) x[y] = pack_rest<E>(u[2 * y], u[2 * y + 1]);
                    keep_rows<1>(kept + K / 64 * 2048, keep_news_rest(p.lows, p, chunk + n, h, column / 64) + warp * 2048, x, lane);
                }
            }
        };
        constexpr auto Z = Int<0>{};
        constexpr auto HALF = Int<K / 32>{};
        constexpr auto ALL = Int<K / 16>{};

        int st = 0;
        uint32_t phase = 0;
        if (chunks > 0) {
            mbar_wait(bar_of(0, 0), 0, p.hung, code);
            load_v(base);
            multiply_state(base);
            if constexpr (FEW) load_factors(base);
            if constexpr (OUT) multiply_q(base, Z, HALF);
            keep_state(0);
            make_w();
            // Or ptxas keeps registers for what is in flight here through the loop.
            if constexpr (FEW) {
                wgmma_wait<0>();
                hold(o);
            }
        }
        // O in the staging is for its warp.
        auto give_o = [&]() {
            fence_proxy();
            __syncwarp();
            warp_arrive(o_full + 8 * warpgroup, lane);
        };
        // Where the loop turns, half of S^T Q^T of the chunk may be in flight; w holds its W, and O of the chunk before is in the staging.
        // Where a stage is goes from turn to turn: computed from its number, it is a chain of operations before the first product.
        uint32_t at = base;
        for (int n = 0; n < chunks; n++) {
            const uint32_t factors = at + M::VEC + 8 * j;

            // N^T = W^T A^T; behind it the second half of S^T Q^T.
            hold(w);
            wgmma_fence();
            multiply_low(u, w, at, Int<M::A>{}, 0);
            if constexpr (CAREFUL) multiply_low(u, w, at, Int<M::A_LO>{}, 1);
            wgmma_commit();
            if constexpr (GRAD) {
                hold(rest);
                multiply_low(u, rest, at, Int<M::A>{}, 1);
                wgmma_commit();
            }
            if constexpr (OUT) multiply_q(at, HALF, ALL);
            // While that runs: whether the next chunk is there is asked, O of the chunk before handed over, S^T <- e^(c_C) S^T. Behind the
            // last chunk, what follows is of whatever is there, for nothing.
            int next = st + 1;
            uint32_t next_phase = phase;
            if (next == STAGES) next = 0, next_phase ^= 1;
            const uint32_t at_next = at + (next == 0 ? -(STAGES - 1) * M::STAGE : M::STAGE);
            const bool more = n + 1 < chunks;
            const uint32_t bar = more ? bar_of(n + 1, next) : full + 8 * st, parity = more ? whole(n + 1) ? next_phase : 0 : phase;
            const bool there = mbar_try(bar, parity);
            float2 cs[8], co[8];
            auto load_out_factors = [&] {
#pragma unroll
                for (int b = 0; b < 8; b++) co[b] = shared_f32x2(factors + 4 * (VEC_OUT + 8 * b));
            };
#pragma unroll
            for (int b = 0; b < 8; b++) cs[b] = shared_f32x2(factors + 4 * (VEC_STATE + 8 * b));
            if constexpr (OUT && !MAKES) load_out_factors();
            if constexpr (KEEPS_LOW<E> && KEEP)
                if (counts(last)) keep_low<K>(keep_states(p, K, chunk + n, h, column / 64) + K / 64 * PANEL, s, sb, tid);
            // Before a branch, or ptxas moves them behind the wait.
#pragma unroll
            for (int x = 0; x < K / 2; x++) s[x] *= last;
            hold(s);
            if constexpr (OUT)
                if (n > 0) give_o();
            if (__builtin_expect(!there, 0)) mbar_wait(bar, parity, p.hung, code + next);
            wgmma_wait<OUT>();
            hold(u);
            uint32_t nb[16], ns[16], nb_rest[CAREFUL ? 16 : 1];
            // S^T <- e^(c_C) S^T + (vec_state o N^T) K, each step a group; behind it N^T P^T.
            hold(s);
            const uint64_t rows = desc_step(desc_mn_major(M::KT, PANEL), at);
#pragma unroll
            for (int x = 0; x < 4; x++) {
#pragma unroll
                for (int b = 2 * x; b < 2 * x + 2; b++) {
                    const float y[4] = {cs[b].x * u[4 * b], cs[b].y * u[4 * b + 1], cs[b].x * u[4 * b + 2], cs[b].y * u[4 * b + 3]};
                    ns[2 * b] = E::pack(y[0], y[1]), ns[2 * b + 1] = E::pack(y[2], y[3]);
                    if constexpr (TWO) {
                        rest[2 * b] = E::pack(y[0] - E::lo(ns[2 * b]), y[1] - E::hi(ns[2 * b]));
                        rest[2 * b + 1] = E::pack(y[2] - E::lo(ns[2 * b + 1]), y[3] - E::hi(ns[2 * b + 1]));
                    }
                }
#pragma unroll
                for (int b = 4 * x; b < 4 * x + 4; b++) {
                    hold(ns[b]);
                    if constexpr (TWO) hold(rest[b]);
                }
                wgmma_fence();
                E::template mma_rs<1>(s, ns + 4 * x, desc_step(rows, x * 2048), 1);
                if constexpr (TWO) E::template mma_rs<1>(s, rest + 4 * x, desc_step(rows, x * 2048), 1);
                wgmma_commit();
            }
            // O^T = vec_out o (S^T Q^T) + N^T P^T, while S runs.
            const uint32_t free = o_free + 8 * warpgroup, free_parity = (n & 1) ^ 1;
            bool place = true;
            if constexpr (OUT) {
                if constexpr (MAKES) {
                    mbar_wait(made + 8 * st, phase, p.hung, code + 9);
                    load_out_factors();
                }
#pragma unroll
                for (int x = 0; x < 16; x++) {
                    nb[x] = E::pack(u[2 * x], u[2 * x + 1]);
                    if constexpr (CAREFUL) nb_rest[x] = E::pack(u[2 * x] - E::lo(nb[x]), u[2 * x + 1] - E::hi(nb[x]));
                }
                wgmma_wait<4>();
                hold(o);
#pragma unroll
                for (int b = 0; b < 8; b++) o[4 * b] *= co[b].x, o[4 * b + 1] *= co[b].y, o[4 * b + 2] *= co[b].x, o[4 * b + 3] *= co[b].y;
                hold(o);
                hold(nb);
                if constexpr (CAREFUL) hold(nb_rest);
                wgmma_fence();
                multiply_low(o, nb, at, Int<M::P>{}, 1);
                if constexpr (CAREFUL) {
                    multiply_low(o, nb, at, Int<M::P_LO>{}, 1);
                    multiply_low(o, nb_rest, at, Int<M::P>{}, 1);
                }
                wgmma_commit();
                place = mbar_try(free, free_parity);
            } else {
                keep_news_of(n);
            }
            auto release = [&] {
                __syncwarp();
                warp_arrive(empty + 8 * st, lane);
            };
            auto finish_o = [&] {
                if (__builtin_expect(!place, 0)) mbar_wait(free, free_parity, p.hung, code + 8);
                put_o();
                hold(o);
            };
            // For O too, where its registers are needed.
            if constexpr (CAREFUL || FEW) {
                wgmma_wait<0>();
                hold(o);
            }
            if constexpr (FEW) {
                release();
                finish_o();
            }
            if constexpr (!CAREFUL) load_v(at_next);
            wgmma_wait<OUT>();
            hold(s);

            // U, W and half of S^T Q^T of the next chunk.
            multiply_state(at_next);
            if constexpr (FEW) load_factors(at_next);
            if constexpr (OUT) {
                wgmma_wait<K / 32>();
                hold(o);
            }
            if constexpr (!FEW) release();
            if constexpr (OUT) {
                if constexpr (!FEW) finish_o();
                wgmma_fence();
                multiply_q(at_next, Z, HALF);
            }
            if (n + 1 < chunks) keep_state(n + 1);
            if constexpr (CAREFUL) load_v(at_next);
            make_w();
            st = next, phase = next_phase, at = at_next;
        }
        wgmma_wait<0>();
        if constexpr (OUT)
            if (chunks > 0) give_o();
        if constexpr (KEEP) {
            if (elect()) bulk_wait();
        }
        const int out = GRAD && transition ? at_seg + 1 : seg.out;
        if (out >= 0 && (!KEEP || p.states_out != nullptr)) {
            const int stride = transition ? transition_stride(K) : p.v;
            float* x = (transition ? p.transitions : p.states_out) + ((long long)out * p.hv + h) * K * stride + v0;
#pragma unroll
            for (int b = 0; b < K / 8; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[(8 * b + 2 * j + e % 2) * stride + (e / 2) * 8] = transition ? __uint_as_float(tf32(s[4 * b + e])) : s[4 * b + e];
        }
    }
}

}  // namespace hopper
