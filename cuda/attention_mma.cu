// Softmax attention of many query rows over one page of the caches on the matrix units, as partial results: m, l and acc per query row
// and split.
//
//   S = scale Q K^T, masked     m' = max(m, rowmax S)     P = exp(S - m')
//   l <- exp(m - m') l + rowsum P     acc <- exp(m - m') acc + P V
//
// The units multiply numbers of 16 bits. Each operand is a sum of f16 parts: two of Q, P and f32 keys and values, which hold 22 bits, and
// one of 16-bit keys and values, which are exact there. f16 has a small range, so that first a row of Q, K or V is multiplied by a power
// of two that brings its largest number to [2^14, 2^15): what the second part then leaves is 2^-22 of a number, or 2^-40 of the row's
// largest. Products of two second parts are left out. The units add up with truncation: short sums of theirs go into sums that are rounded,
// and the products with second parts have sums of their own.
//
// 8 warps share a tile of 64 query rows: warp w has 16 of them, and half of D, of S's inner index as of the columns of acc. So Q and acc
// stay in registers; the two warps of the same rows exchange their parts of S, and both have all of P. Keys and values come to shared
// memory through registers, where they are scaled and split once for all warps; their loads are under way during the products before.
#include "attend.cuh"
#include "mma.cuh"

constexpr u32 QR = 64;
constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 BF16 = 2;        // code of the type
constexpr u32 TILES = KT / 8;  // of S, [16, 8] each, in a warp

// The power of two that a row is in units of, for its largest number.
__device__ __forceinline__ float unit_of(float most) {
    // 2^-100 is small enough for what comes of a row of zeros, and its inverse is a number.
    const u32 exponent = max(__float_as_uint(most) >> 23, 41u);
    return __uint_as_float((exponent - 14) << 23);
}
// 2^power / x, for x a power of two
__device__ __forceinline__ float over(u32 power, float x) { return __uint_as_float(((254 + power) << 23) - __float_as_uint(x)); }

// What f16 parts are pairs of: the nearest, and what it leaves.
__device__ __forceinline__ u32 high_part(float2 x) { return pack<F16>(x.x, x.y); }
__device__ __forceinline__ u32 low_part(float2 x, u32 high) {
    const float2 taken = unpack<F16>(high);
    return pack<F16>(x.x - taken.x, x.y - taken.y);
}

// exp(x) for x <= 0, without branches; its argument is rounded once more than expf's, by 2^-24 of it.
__device__ __forceinline__ float exp_of(float x) { return exp2f(1.44269504f * x); }

// The same number, which the compiler takes for a new one: what is computed from it is not kept in registers from slice to slice.
__device__ __forceinline__ u32 again(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The largest over the lanes that differ in the bits below COUNT.
template <u32 COUNT>
__device__ __forceinline__ float max_lanes(float x) {
#pragma unroll
    for (u32 step = 1; step < COUNT; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Keys and values of 16 bits, of either type: which one is a number of the launch, since only their way to shared memory differs.
struct Half {
    typedef uint16_t Raw;
    static constexpr bool HALF = true;
};

template <class T, u32 DP>
struct Sizes {
    static constexpr u32 PARTS = T::HALF ? 1 : 2;  // of a key or value
    static constexpr u32 CHUNKS = DP / 8;          // eights of D

    // Number i of D that is at place `at` of a chunk. Of f32 a thread loads a four of either half of D, so that a warp's loads are
    // without gaps; where Q, K and V have their numbers does not matter as long as it is the same.
    static __device__ __forceinline__ u32 number_of(u32 chunk, u32 at) {
        if constexpr (T::HALF) return 8 * chunk + at;
        else return at / 4 * (DP / 2) + 4 * chunk + at % 4;
    }
};

// KT rows of keys or values in parts: 16 bytes are a part of a chunk. Their places are swapped so that eight rows of one lie in all banks.
template <class T, u32 DP>
struct Slice : Sizes<T, DP> {
    using Sizes<T, DP>::PARTS;
    using Sizes<T, DP>::CHUNKS;
    alignas(16) uint16_t x[KT * DP * PARTS];
    alignas(16) float unit[KT];  // of each row

    __device__ __forceinline__ uint16_t* at(u32 row, u32 chunk, u32 part = 0) {
        const u32 i = PARTS * chunk + part;
        return x + 8 * (row * CHUNKS * PARTS + i / 8 * 8 + (i % 8 ^ row % 8));
    }
};

// This thread's share of a slice on its way to shared memory, in MOST pieces if it is of as many rows: registers are scarce.
template <class T, u32 DP, u32 MOST>
struct Share : Sizes<T, DP> {
    using Sizes<T, DP>::PARTS;
    using Sizes<T, DP>::CHUNKS;
    static constexpr u32 ROWS = KT * CHUNKS / THREADS, PIECES = ROWS < MOST ? ROWS : MOST, COUNT = ROWS / PIECES;
    uint4 x[COUNT][PARTS];

    static __device__ __forceinline__ u32 row(u32 piece, u32 i) { return ((piece * COUNT + i) * THREADS + threadIdx.x) / CHUNKS; }
    static __device__ __forceinline__ u32 chunk() { return threadIdx.x % CHUNKS; }

    // Places from `place` on; those from `end` on need not be written yet, and are not read.
    __device__ __forceinline__ void load(u32 piece, const typename T::Raw* cache, u32 stride, u32 dim, u32 place, u32 end) {
        place = again(place);
#pragma unroll
        for (u32 i = 0; i < COUNT; i++)
#pragma unroll
            for (u32 p = 0; p < PARTS; p++) {
                const u32 number = Sizes<T, DP>::number_of(chunk(), 4 * p);
                const bool valid = place + row(piece, i) < end && number < dim;
                x[i][p] = valid ? *(const uint4*)(cache + ((size_t)(place + row(piece, i)) * stride + number)) : uint4{0, 0, 0, 0};
            }
    }
    __device__ __forceinline__ void store(u32 piece, Slice<T, DP>& to, bool brain) const {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) {
            float2 pair[4];
            float most = 0.f;
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                pair[e] = pair_of(i, e, brain);
                most = fmaxf(most, fmaxf(fabsf(pair[e].x), fabsf(pair[e].y)));
            }
            const float unit = unit_of(max_lanes<CHUNKS>(most)), factor = over(0, unit);
            if (chunk() == 0) to.unit[row(piece, i)] = unit;
            u32 high[4], low[4];
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                pair[e] = make_float2(factor * pair[e].x, factor * pair[e].y);
                high[e] = high_part(pair[e]);
                if constexpr (PARTS == 2) low[e] = low_part(pair[e], high[e]);
            }
            *(uint4*)to.at(row(piece, i), chunk()) = uint4{high[0], high[1], high[2], high[3]};
            if constexpr (PARTS == 2) *(uint4*)to.at(row(piece, i), chunk(), 1) = uint4{low[0], low[1], low[2], low[3]};
        }
    }

private:
    // Numbers 2 e, 2 e + 1 of the chunk.
    __device__ __forceinline__ float2 pair_of(u32 i, u32 e, bool brain) const {
        if constexpr (T::HALF) {
            const u32 word[4] = {x[i][0].x, x[i][0].y, x[i][0].z, x[i][0].w};
            return brain ? unpack<Bf16>(word[e]) : unpack<F16>(word[e]);
        } else {
            const uint4 four = x[i][e / 2];
            const u32 a = e % 2 ? four.z : four.x, b = e % 2 ? four.w : four.y;
            return make_float2(__uint_as_float(a), __uint_as_float(b));
        }
    }
};

// Lifetimes: k from the first barrier of its slice to the second, v and scores from the second to the next slice's first; the rest from
// the first barrier of all on. A copy of these numbers in choose.rs says how much it is.
template <class T, u32 DP>
struct Shared {
    Slice<T, DP> k, v;
    float4 scores[WARPS][TILES][32];  // S of a warp's half of D
    float* part[QR];                  // where a row's m, l, acc [D] go, if there is the row
    float unit[2][QR];                // of a row of Q, either half of D
    u32 end[QR];                      // where the places end that it sees
};

// Sums of a tile [16, 8]: of products of first parts, and of those with a second one.
struct Sums {
    float high[4], low[4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (u32 e = 0; e < 4; e++) high[e] = low[e] = 0.f;
    }
    template <u32 PARTS>
    __device__ __forceinline__ void multiply(const u32 (&a)[2][4], const u32 (&b)[PARTS][2]) {
        mma_f16(low, a[1], b[0]);
        if constexpr (PARTS == 2) mma_f16(low, a[0], b[1]);
        mma_f16(high, a[0], b[0]);
    }
};

// A warp's half of Q as left operands, 16 numbers of D a step.
template <class T, u32 DP>
struct Queries : Sizes<T, DP> {
    using Sizes<T, DP>::PARTS;
    static constexpr u32 STEPS = DP / 32, CHUNK0 = DP / 16;
    u32 part[STEPS][2][4];

    // Units of the rows, of this half of D, go to `units`. Reads Q twice: the first time for its largest numbers.
    __device__ __forceinline__ void load(const Cell<QR>& cell, u32 row, u32 half, float* units) {
        const u32 t = threadIdx.x % 4, dim = cell.l.c.dim;
        const float scale = cell.l.p.scale;
        const float* q[2] = {};
        float factor[2];
        auto pair_at = [&](u32 e, u32 step) {
            const u32 number = Sizes<T, DP>::number_of(half * CHUNK0 + 2 * step + e / 2, 2 * t);
            return q[e % 2] && number < dim ? *(const float2*)(q[e % 2] + number) : make_float2(0.f, 0.f);
        };
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            q[i] = cell.valid(row + 8 * i) ? cell.q(row + 8 * i) : nullptr;
            float most = 0.f;
#pragma unroll 2
            for (u32 step = 0; step < STEPS; step++)
#pragma unroll
                for (u32 e = i; e < 4; e += 2) {
                    const float2 x = pair_at(e, step);
                    most = fmaxf(most, fmaxf(fabsf(x.x), fabsf(x.y)));
                }
            const float unit = unit_of(fabsf(scale * max_lanes<4>(most)));
            if (t == 0) units[row + 8 * i] = unit;
            factor[i] = over(0, unit);
        }
#pragma unroll
        for (u32 step = 0; step < STEPS; step++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                const float2 x = pair_at(e, step);
                const float2 scaled = make_float2(factor[e % 2] * (scale * x.x), factor[e % 2] * (scale * x.y));
                part[step][0][e] = high_part(scaled);
                part[step][1][e] = low_part(scaled, part[step][0][e]);
            }
    }
    // s = this half's part of the tile of S with keys 8 n .. 8 n + 8; two tiles at a time, for the units' sake.
    __device__ __forceinline__ void times(Slice<T, DP>& k, u32 lane, u32 half, u32 n, const float* units, u32 row, float (&s)[2][4]) const {
        Sums d[2];
        d[0].clear(), d[1].clear();
#pragma unroll
        for (u32 i = 0; i < 2; i++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) s[i][e] = 0.f;
#pragma unroll
        for (u32 step = 0; step < STEPS; step += 2)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 row = 8 * (n + i) + lane % 8, chunk = half * CHUNK0 + 2 * step;
                u32 x[4];
                load_4(x, k.at(row, chunk, lane / 8));
                if constexpr (PARTS == 1) {
                    const u32 b[2][1][2] = {{{x[0], x[1]}}, {{x[2], x[3]}}};
                    d[i].template multiply<1>(part[step], b[0]);
                    d[i].template multiply<1>(part[step + 1], b[1]);
                } else {
                    u32 y[4];
                    load_4(y, k.at(row, chunk + 2, lane / 8));
                    const u32 b[2][2][2] = {{{x[0], x[2]}, {x[1], x[3]}}, {{y[0], y[2]}, {y[1], y[3]}}};
                    d[i].template multiply<2>(part[step], b[0]);
                    d[i].template multiply<2>(part[step + 1], b[1]);
                }
#pragma unroll
                for (u32 e = 0; e < 4; e++) s[i][e] += d[i].high[e], d[i].high[e] = 0.f;
            }
        const float of_row[2] = {units[row], units[row + 8]};
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const float2 unit = *(const float2*)(k.unit + 8 * (n + i) + 2 * (lane % 4));
#pragma unroll
            for (u32 e = 0; e < 4; e++) s[i][e] = (s[i][e] + d[i].low[e]) * of_row[e / 2] * (e % 2 ? unit.y : unit.x);
        }
    }
};

template <class T, u32 DP>
__device__ __forceinline__ void attend(const row::attend::Launch& l) {
    typedef Sizes<T, DP> S;
    typedef Shared<T, DP> Memory;
    LAUNCH_SHARED(Memory, m);
    const Cell<QR> cell(l);
    const u32 lane_id = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane_id / 4, t = lane_id % 4;
    const u32 half = warp / (WARPS / 2), row = warp % (WARPS / 2) * 16 + g;  // and row + 8
    const u32 dim = l.c.dim, end = cell.end;
    const bool brain = l.c.kv_type == BF16;
    const typename T::Raw* k_cache = cell.template cache<typename T::Raw>(l.m.k_cache);  // [page_len, kv, D], of this head
    const typename T::Raw* v_cache = cell.template cache<typename T::Raw>(l.m.v_cache);
    const u32 stride = cell.place_stride();
    // Not in registers, of which none are left.
    if (threadIdx.x < QR) {
        m.part[threadIdx.x] = cell.valid(threadIdx.x) ? cell.part(threadIdx.x) : nullptr;
        m.end[threadIdx.x] = cell.end_of(threadIdx.x);
    }

    Queries<T, DP> q;
    q.load(cell, row, half, m.unit[half]);
    float most[2] = {NOTHING, NOTHING}, total[2] = {0.f, 0.f};  // m, and the part of l of this thread's keys; rows g and g + 8
    constexpr u32 CHUNKS = S::CHUNKS / 2;                       // of this half
    float acc[CHUNKS][4];
#pragma unroll
    for (u32 c = 0; c < CHUNKS; c++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) acc[c][e] = 0.f;
    typedef Share<T, DP, T::HALF ? 2 : 4> Keys;
    typedef Share<T, DP, 2> Values;
#pragma unroll
    for (u32 piece = 0; piece < Keys::PIECES; piece++) {
        Keys keys;
        keys.load(piece, k_cache, stride, dim, cell.first, end);
        keys.store(piece, m.k, brain);
    }
    for (u32 k0 = cell.first; k0 < end; k0 += KT) {
        __syncthreads();
        const u32 lane = again(lane_id);
        // S = scale Q K^T, while V comes; not unrolled, which would double the code for nothing
#pragma unroll 1
        for (u32 n = 0; n < TILES; n += 2) {
            const u32 piece = n / 2;
            Values values;
            if (piece < Values::PIECES) values.load(piece, v_cache, stride, dim, k0, end);
            float s[2][4];
            q.times(m.k, lane, half, n, m.unit[half], row, s);
#pragma unroll
            for (u32 i = 0; i < 2; i++) m.scores[warp][n + i][lane] = make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
            if (piece < Values::PIECES) values.store(piece, m.v, brain);
        }
        __syncthreads();

        // m' and P; a masked place has P = 0. Both warps of a row add the same two numbers.
        u32 left[2];  // of this thread's places of the slice, those up to here are seen
#pragma unroll
        for (u32 i = 0; i < 2; i++) left[i] = max(m.end[row + 8 * i], k0 + 2 * t) - k0 - 2 * t;
        float s[TILES][4], next[2] = {most[0], most[1]};
#pragma unroll
        for (u32 n = 0; n < TILES; n++) {
            const float4 own = m.scores[warp][n][lane], other = m.scores[warp ^ WARPS / 2][n][lane];
            s[n][0] = own.x + other.x, s[n][1] = own.y + other.y, s[n][2] = own.z + other.z, s[n][3] = own.w + other.w;
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                if (8 * n + e % 2 >= left[e / 2]) s[n][e] = -INFINITY;
                next[e / 2] = fmaxf(next[e / 2], s[n][e]);
            }
        }
        float shrink[2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            next[i] = max_lanes<4>(next[i]);
            shrink[i] = exp_of(most[i] - next[i]);
            total[i] *= shrink[i];
            most[i] = next[i];
        }
        // The largest unit of V's rows is that of P V; the others make P smaller.
        const float unit = max_lanes<32>(m.v.unit[lane]), raise = over(15, unit), lower = unit * 0x1p-15f;
        u32 p[KT / 16][2][4];
#pragma unroll
        for (u32 n = 0; n < TILES; n++) {
            const float2 units = *(const float2*)(m.v.unit + 8 * n + 2 * t);
            const float2 factor = make_float2(raise * units.x, raise * units.y);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float x[2];
#pragma unroll
                for (u32 e = 0; e < 2; e++) {
                    x[e] = exp_of(s[n][2 * i + e] - most[i]);
                    total[i] += x[e];
                }
                const float2 scaled = make_float2(factor.x * x[0], factor.y * x[1]);
                const u32 high = high_part(scaled);
                p[n / 2][0][n % 2 * 2 + i] = high;
                p[n / 2][1][n % 2 * 2 + i] = low_part(scaled, high);
            }
        }
        // acc <- exp(m - m') acc + P V, while K of the next slice comes
        Keys keys;
        constexpr u32 EACH = CHUNKS / Keys::PIECES;  // chunks for a piece
#pragma unroll
        for (u32 c = 0; c < CHUNKS; c += 2) {
            if (c % EACH == 0) keys.load(c / EACH, k_cache, stride, dim, k0 + KT, end);
            Sums d[2];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                d[i].clear();
                u32 x[S::PARTS][4];
#pragma unroll
                for (u32 part = 0; part < S::PARTS; part++) load_4_across(x[part], m.v.at(lane, half * CHUNKS + c + i, part));
#pragma unroll
                for (u32 step = 0; step < KT / 16; step++) {
                    u32 b[S::PARTS][2];
#pragma unroll
                    for (u32 part = 0; part < S::PARTS; part++) b[part][0] = x[part][2 * step], b[part][1] = x[part][2 * step + 1];
                    d[i].template multiply<S::PARTS>(p[step], b);
                }
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) acc[c + i][e] = fmaf(acc[c + i][e], shrink[e / 2], lower * (d[i].high[e] + d[i].low[e]));
            if (c % EACH == EACH - 2) keys.store(c / EACH, m.k, brain);
        }
    }

    // Without a slice no barrier was passed.
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
#pragma unroll
        for (u32 step = 1; step < 4; step *= 2) total[i] += __shfl_xor_sync(0xffffffffu, total[i], step);
        float* to = m.part[row + 8 * i];
        if (!to) continue;
        if (half == 0 && t == 0) *(float2*)to = make_float2(most[i], total[i]);
#pragma unroll
        for (u32 c = 0; c < CHUNKS; c++) {
            const u32 number = S::number_of(half * CHUNKS + c, 2 * t);
            if (number < dim) *(float2*)(to + 2 + number) = make_float2(acc[c][2 * i], acc[c][2 * i + 1]);
        }
    }
}

KERNEL(attend_mma_f32_d64, attend, THREADS) { attend<F32, 64>(l); }
KERNEL(attend_mma_f32_d256, attend, THREADS) { attend<F32, 256>(l); }
KERNEL(attend_mma_half_d64, attend, THREADS) { attend<Half, 64>(l); }
KERNEL(attend_mma_half_d256, attend, THREADS) { attend<Half, 256>(l); }
