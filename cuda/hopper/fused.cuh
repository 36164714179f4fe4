// `fused`: the scan of whole sequences without `prepare`: its producer warpgroup makes the images, in shared memory, for two chunks
// at most ahead of the consumers (scan.cuh), from the tiles of K and Q that they multiply anyway. For grids that fill the device with one
// block a head: no image is written or read, Q and K are read once a value head.
//
// Of a chunk, the makers' four warps, w = 0 .. 3 (- - -: a barrier among them):
//   all: K K^T by wgmma; behind it the gates (w 0), beta (w 1), norms, the loads of the next chunk but two (w 3)
//   - - -  L from K K^T, rows 16 w on; Q K^T by wgmma, behind what follows
//   - - -  D: substitution, 64 threads (w 0, 1); vectors, 64 threads (w 2, 3); P from Q K^T, rows 16 w on: 1 and 2 blocks for those that
//          substitute, 3 and 4 for the others
//   - - -  A, columns 16 w on
// Gates and norms lie in two places in turn, so that the next chunk's are written while the last warp still reads these.
#pragma once
#include "image.cuh"
#include "scan.cuh"

namespace hopper {

struct FusedArgs {
    ScanArgs scan;      // without images
    const float* g;     // [T, Hv]
    const float* beta;  // [T, Hv]
    float scale;
    int l2norm;
};

// Shared memory, in bytes from a base on 1024.
//   stage s    K [64, K], V [64, 128], Q: as in ScanSmem
//   image i    A, P, vectors: from its making (empty of the chunk before the last taken) until all consumers arrived on that chunk's empty
//   staging    as in ScanSmem
//   L, D       a chunk's making
//   factors i  f32: c log2(e), beta, fade, rk, rq [64] each: a chunk's making, in turn
template <int K, int STAGES>
struct FusedSmem {
    static constexpr int KT = 0;
    static constexpr int V = (K / 64) * PANEL;
    static constexpr int Q = V + 2 * PANEL;
    static constexpr int STAGE = Q + (K / 64) * PANEL;
    static constexpr int A = 0, P = PANEL, VEC = 2 * PANEL;
    static constexpr int IMAGES = STAGES * STAGE, IMAGE_STEP = 2 * PANEL + 1024, IMAGE_PLACES = 2;
    static constexpr int STAGING = IMAGES + IMAGE_PLACES * IMAGE_STEP;
    static constexpr int L = STAGING + 2 * PANEL;
    static constexpr int D = L + L_BYTES;
    static constexpr int FACTORS = D + D_BYTES, FACTORS_STEP = 5 * CHUNK * 4;
    static constexpr int BARRIERS = FACTORS + 2 * FACTORS_STEP;
    static constexpr int BYTES = BARRIERS + (STAGES * 2 + IMAGE_PLACES) * 8 + 1024;
    static constexpr int LOADED = STAGE;
};

enum : uint32_t { HUNG_MAKER = 0x300 };

template <int WIDTH>
struct Fused {
    const FusedArgs& args;

    static constexpr bool FUSED = true;
    // 504 a lane for the three warpgroups.
    static constexpr int PRODUCER_REGS = WIDTH == 128 ? 88 : 120, CONSUMER_REGS = WIDTH == 128 ? 208 : 192;
    template <int K, int WG, int STAGES, bool OUT, bool GRAD, bool KEEP>
    using Smem = FusedSmem<K, STAGES>;

    template <class E, class I, int K, class M, int STAGES>
    __device__ __forceinline__ void make(const ScanArgs& p, const ScanMaps& maps, char* smem, int kh, int h, int token, int tokens) const {
        constexpr int PANELS = K / 64, LOADER = 3;
        const int tid = threadIdx.x % WARPGROUP, warp = uniform(tid >> 5), lane = tid & 31, i = lane >> 2, j = lane & 3;
        const int chunks = (tokens + CHUNK - 1) / CHUNK;
        const uint32_t base = smem_addr(smem), full = base + M::BARRIERS, empty = full + STAGES * 8, ready = empty + STAGES * 8;
        float* l = (float*)(smem + M::L);
        float* d = (float*)(smem + M::D);

        // Tiles of chunk n to stage `s`: one thread.
        auto load = [&](int n, int s) {
            const uint32_t bar = full + 8 * s, to = base + s * M::STAGE;
            const int row = token + n * CHUNK;
            mbar_expect(bar, M::LOADED);
#pragma unroll
            for (int x = 0; x < PANELS; x++) tma_load(to + M::KT + x * PANEL, &maps.k, kh * K + 64 * x, row, bar);
#pragma unroll
            for (int x = 0; x < PANELS; x++) tma_load(to + M::Q + x * PANEL, &maps.q, kh * K + 64 * x, row, bar);
#pragma unroll
            for (int x = 0; x < 2; x++) tma_load(to + M::V + x * PANEL, &maps.v, h * p.v + 64 * x, row, bar);
        };
        // g (warp 0) or beta (warp 1) of the lane's two tokens of chunk n.
        const float* const source = (warp == 0 ? args.g : args.beta) + (long long)(token + 2 * lane) * p.hv + h;
        auto fetch = [&](int n) {
            const float* from = source + (long long)n * CHUNK * p.hv;
            const int left = tokens - n * CHUNK - 2 * lane;
            return make_float2(warp < 2 && left > 0 ? from[0] : 0.f, warp < 2 && left > 1 ? from[p.hv] : 0.f);
        };

        if (warp == LOADER && lane == 0) {
            tma_prefetch(&maps.k);
            tma_prefetch(&maps.q);
            tma_prefetch(&maps.v);
            for (int n = 0; n < STAGES && n < chunks; n++) load(n, n);
        }
        float2 gate = fetch(0);
        int s = 0;
        uint32_t phase = 0;
        for (int n = 0; n < chunks; n++) {
            const int len = tokens - n * CHUNK, place = n % M::IMAGE_PLACES;
            char* const stage = smem + s * M::STAGE;
            float* const c = (float*)(smem + M::FACTORS + place * M::FACTORS_STEP);
            float *const beta = c + 64, *const fade = c + 128, *const rk = c + 192, *const rq = c + 256;
            const uint32_t image = base + M::IMAGES + place * M::IMAGE_STEP;

            mbar_wait(full + 8 * s, phase, p.hung, HUNG_MAKER + s);
            if (len < CHUNK) {
                // Rows behind the sequence's end are another's.
                for (int x = 0; x < 2 * PANELS + 2; x++) clear_rows(stage + x * PANEL, len, tid, WARPGROUP);
                fence_proxy();
                bar_sync(9, WARPGROUP);
            }
            // One after the other in the same registers, X K^T [64, 64], rows 16 warp + i, + 8: K K^T, then Q K^T.
            float product[32];
            auto times_k = [&](int x_at) {
                const uint64_t tile_k = desc_k_major(uniform(base + s * M::STAGE + M::KT)), tile_x = desc_k_major(uniform(base + s * M::STAGE + x_at));
                wgmma_fence();
#pragma unroll
                for (int x = 0; x < K / 16; x++) {
                    const uint32_t at = (x / 4) * PANEL + (x % 4) * 32;
                    E::mma_ss(product, desc_step(tile_x, at), desc_step(tile_k, at), x > 0);
                }
                wgmma_commit();
            };
            times_k(M::KT);
            if (warp == 0) {
                const int row = 2 * lane;
                gate.x = row < len ? fmaxf(gate.x, G_MIN) * LOG2E : 0.f, gate.y = row + 1 < len ? fmaxf(gate.y, G_MIN) * LOG2E : 0.f;
                const float2 sum = sum_gates(gate, lane);
                const float end = __shfl_sync(~0u, sum.y, lane | 7);
                *(float2*)(c + row) = sum;
                *(float2*)(fade + row) = make_float2(exp2_fast(end - sum.x), exp2_fast(end - sum.y));
            } else if (warp == 1) {
                *(float2*)(beta + 2 * lane) = gate;
            } else if (warp == LOADER && lane == 0 && n >= 2) {
                // All consumers are past chunk n - 2: its image's place is this one's, its stage the next chunk's.
                const int before = s == STAGES - 1 ? 0 : s + 1;
                mbar_wait(empty + 8 * before, phase ^ (before > s), p.hung, HUNG_MAKER + 8 + before);
                if (n + 1 < chunks) load(n + 1, before);
            }
            if (n + 1 < chunks) gate = fetch(n + 1);
            (tid < 64 ? rk : rq)[tid & 63] = args.l2norm ? row_norm<E, K>(stage + (tid < 64 ? M::KT : M::Q), tid & 63) : 1.f;
            wgmma_wait<0>();
            hold(product);
            __syncwarp();
            bar_sync(9, WARPGROUP);

            const int row0 = 16 * warp + i, row1 = row0 + 8;
            if (args.l2norm) fold_norms(product, rk[row0], rk[row1], rk, j);
            form<I, true, false, Lie::COLUMNS>(product, product, c, beta, fade, l, 0, warp, lane);
            hold(product);
            times_k(M::Q);
            bar_sync(9, WARPGROUP);
            if (warp < 2) {
                substitute<true>(l, d, tid);
            } else {
                const int row = tid - 64;
                row_factors((float*)(smem + M::IMAGES + place * M::IMAGE_STEP + M::VEC), c, row, len, rk[row], args.scale * rq[row]);
            }
            wgmma_wait<0>();
            hold(product);
            fold_norms(product, args.scale * rq[row0], args.scale * rq[row1], rk, j);
            form<I, false, true, Lie::COLUMNS>(product, product, c, beta, fade, l, image + M::P, warp, lane);
            bar_sync(9, WARPGROUP);
            invert<I, Lie::COLUMNS, true>(l, d, beta, image + M::A, warp, lane);
            fence_proxy();
            __syncwarp();
            if (lane == 0) mbar_arrive(ready + 8 * place);
            if (++s == STAGES) s = 0, phase ^= 1;
        }
    }
};

// One block a sequence and value head, V = 128.
template <class E, class I, int K>
__device__ __forceinline__ void fused(const FusedArgs& p, const ScanMaps& maps) {
    scan<E, I, K, 2, 3, true, false, false, Fused<K>>(p.scan, maps, Fused<K>{p});
}

}  // namespace hopper
