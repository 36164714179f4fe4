// Tests and times the Hopper forward kernels: a program of its own, beside the crate.
//
//   nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 -Xcompiler -O3,-mavx2,-mfma,-pthread -o forward forward.cu bench/forward.cu
//   ./forward check            every case against float64, stage by stage where it fails
//   ./forward time             the shapes that predictions were made for, or one of them (LOADS=1: P from `prepare` everywhere)
//   ./forward one ...          a single pass, for a profiler
//
// Each case poisons scratch and outputs with NaN; an answer must be finite, within its bound, and the same in every bit when
// run again. tests/cuda/emulator/runtime.h says how the checks run without a GPU.
#include "../carry.cuh"
#include "../prepare.cuh"
#include "../scan.cuh"
#include "support.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

using std::vector;
using namespace hopper;

// Defined in forward.cu.
#ifdef GATEDELTA_EMULATOR
#define DECLARE(NAME, ...) extern "C" void NAME(void* const*);
#else
#define DECLARE(NAME, ...) extern "C" __global__ void NAME(__VA_ARGS__);
#endif
#define OF_K(KIND)                                                                                              \
    DECLARE(hopper_prepare_##KIND, const __grid_constant__ PrepareArgs, const __grid_constant__ PrepareMaps)                                         \
    DECLARE(hopper_scan_##KIND##_w2, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)        \
    DECLARE(hopper_scan_##KIND##_w1, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)        \
    DECLARE(hopper_state_##KIND, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
OF_K(bf16_k128)
OF_K(bf16_k64)
OF_K(f16_k128)
OF_K(f16_k64)
DECLARE(hopper_prepare_one_bf16_k128, const __grid_constant__ PrepareArgs, const __grid_constant__ PrepareMaps)
DECLARE(hopper_prepare_one_f16_k128, const __grid_constant__ PrepareArgs, const __grid_constant__ PrepareMaps)
DECLARE(hopper_prepare_keys_bf16_k128, const __grid_constant__ PrepareArgs, const __grid_constant__ PrepareMaps)
DECLARE(hopper_prepare_keys_f16_k128, const __grid_constant__ PrepareArgs, const __grid_constant__ PrepareMaps)
DECLARE(hopper_scan_careful_bf16_k128, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_scan_careful_bf16_k64, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_scan_careful_f16_k128, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_scan_careful_f16_k64, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_scan_making_bf16_k128_w2, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_scan_making_bf16_k128_w1, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_scan_making_f16_k128_w2, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_scan_making_f16_k128_w1, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_scan_making_careful_bf16_k128, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_scan_making_careful_f16_k128, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)
DECLARE(hopper_warm, const __grid_constant__ CarryArgs)
DECLARE(hopper_carry_k128, const __grid_constant__ CarryArgs)
DECLARE(hopper_carry_k64, const __grid_constant__ CarryArgs)

typedef const void* Kernel;
// The kernel for a case, by its types and K.
#define OF_CASE(HEAD, TAIL)                                                                                       \
    (c.f16 ? c.k == 128 ? (Kernel)HEAD##_f16_k128##TAIL : (Kernel)HEAD##_f16_k64##TAIL                            \
           : c.k == 128 ? (Kernel)HEAD##_bf16_k128##TAIL : (Kernel)HEAD##_bf16_k64##TAIL)

struct Case {
    const char* name;
    vector<int> lens;
    int hk, hv, k, v;
    bool f16;
    Decay decay;
    bool h0, l2norm, mod;
    int pad;        // rows behind the last sequence, full of NaN
    float spread;   // keys share a direction: 0 none, 1 all
    int wg;         // consumers per block; 0: chosen
    int cut;        // chunks in a segment; 0: sequences stay whole
};

static const char* decay_name(Decay d) {
    static const char* names[] = {"A=0..16", "none", "slow", "bench", "cliffs"};
    return names[(int)d];
}

// Device memory and tables of one case.
struct Run {
    const Case& c;
    int tokens = 0, rows = 0, n = 0;
    vector<int> cu;
    vector<Chunk> chunks;
    vector<Segment> segments, ordered;  // by length; by sequence
    vector<Cut> cuts;
    Buffer warm, starts, transitions, d_ordered, d_cuts;
    Buffer q, k, v, g, beta, h0, ht, o, images, lows, cancels, d_chunks, d_segments;
    ScanMaps maps;
    PrepareArgs pa;
    PrepareMaps pm;
    ScanArgs sa, sta;
    CarryArgs ca;
    int wg;
    bool one, makes;  // whether key heads are as many as value heads; whether the scan makes P

    explicit Run(const Case& c, uint64_t seed) : c(c) {
        n = (int)c.lens.size();
        one = c.hk == c.hv && c.k == 128, makes = one && !getenv("LOADS");
        cu.push_back(0);
        for (int s = 0; s < n; s++) {
            int step = c.cut ? c.cut * CHUNK : std::max(1, c.lens[s]), first = (int)segments.size();
            cuts.push_back({first, std::max(1, (c.lens[s] + step - 1) / step), c.h0 ? s : -1, 0});
            for (int t = 0, m = 0; m < cuts.back().count; m++, t += step) {
                bool last = m + 1 == cuts.back().count;
                segments.push_back({tokens + t, std::min(step, c.lens[s] - t), (int)chunks.size() + t / CHUNK, c.cut ? first + m : c.h0 ? s : -1,
                                    last ? s : -1, (int)chunks.size(), {}});
            }
            for (int t = 0; t < c.lens[s]; t += CHUNK) chunks.push_back({tokens + t, std::min(CHUNK, c.lens[s] - t)});
            tokens += c.lens[s];
            cu.push_back(tokens);
        }
        // The state pass leaves a segment's state where the next one starts.
        ordered = segments;
        for (size_t m = 0; m < ordered.size(); m++) ordered[m].out = ordered[m].out < 0 ? (int)m + 1 : -1;
        std::stable_sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) { return a.tokens > b.tokens; });
        rows = tokens + c.pad;
        q.make((size_t)rows * c.hk * c.k * 2), k.make((size_t)rows * c.hk * c.k * 2);
        v.make((size_t)rows * c.hv * c.v * 2), o.make((size_t)rows * c.hv * c.v * 2);
        g.make((size_t)rows * c.hv * 4), beta.make((size_t)rows * c.hv * 4);
        h0.make((size_t)n * c.hv * c.k * c.v * 4), ht.make((size_t)n * c.hv * c.k * c.v * 4);
        images.make(std::max<size_t>(1, chunks.size()) * c.hv * IMAGE_BYTES);
        lows.make((1 + chunks.size() * c.hv) * LOW_BYTES), cancels.make(std::max<size_t>(1, chunks.size()) * c.hv);
        d_chunks.make(std::max<size_t>(1, chunks.size()) * sizeof(Chunk)), d_segments.make(segments.size() * sizeof(Segment));
        CHECK(cudaMemcpy(d_chunks.p, chunks.data(), chunks.size() * sizeof(Chunk), cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(d_segments.p, segments.data(), segments.size() * sizeof(Segment), cudaMemcpyHostToDevice));
        if (c.cut) {
            size_t n = ordered.size() * c.hv;
            warm.make(n * 4), starts.make(n * c.k * c.v * 4), transitions.make(n * c.k * transition_stride(c.k) * 4);
            d_ordered.make(ordered.size() * sizeof(Segment)), d_cuts.make(cuts.size() * sizeof(Cut));
            CHECK(cudaMemcpy(d_ordered.p, ordered.data(), d_ordered.bytes, cudaMemcpyHostToDevice));
            CHECK(cudaMemcpy(d_cuts.p, cuts.data(), d_cuts.bytes, cudaMemcpyHostToDevice));
        }
        poison();
        for (Buffer* b : {&q, &k, &v, &g, &beta}) CHECK(cudaMemset(b->p, 0xff, b->bytes));
        make_rows(q.p, tokens * c.hk, c.k, c.f16, seed + 1, !c.l2norm, c.l2norm ? 3.f : 1.f, 0.f);
        make_rows(k.p, tokens * c.hk, c.k, c.f16, seed + 2, !c.l2norm, c.l2norm ? 2.f : 1.f, c.spread);
        make_rows(v.p, tokens * c.hv, c.v, c.f16, seed + 3, false, 1.f, 0.f);
        make_gates((float*)g.p, (float*)beta.p, tokens, c.hv, c.decay, seed + 4);
        make_floats((float*)h0.p, (size_t)n * c.hv * c.k * c.v, seed + 5, 0.3f);
        CHECK(cudaDeviceSynchronize());

        maps.q = tensor_map(q.p, rows, c.hk * c.k, c.f16), maps.k = tensor_map(k.p, rows, c.hk * c.k, c.f16);
        maps.v = tensor_map(v.p, rows, c.hv * c.v, c.f16), maps.o = tensor_map(o.p, rows, c.hv * c.v, c.f16);
        float scale = 1.f / sqrtf((float)c.k);
        pm = {maps.q, maps.k};
        pa = {(float*)g.p, (float*)beta.p, (Chunk*)d_chunks.p, (char*)images.p, scale, c.hk, c.hv, c.mod, c.l2norm,
              (int)chunks.size(), (char*)lows.p, (unsigned char*)cancels.p};
        sa = {(Segment*)d_segments.p, (char*)images.p, (float*)(c.cut ? starts.p : h0.p), (float*)ht.p, nullptr, nullptr, o.p, c.hv * c.v,
              c.hk, c.hv, c.mod, c.v, hung_device(), (char*)lows.p, (unsigned char*)cancels.p, (int)chunks.size(), c.l2norm, scale};
        sta = {(Segment*)d_ordered.p, (char*)images.p, nullptr, (float*)starts.p, (float*)transitions.p, (int*)warm.p, nullptr, 0,
               c.hk, c.hv, c.mod, c.v, hung_device(), (char*)lows.p, (unsigned char*)cancels.p, (int)chunks.size()};
        ca = {(Segment*)d_ordered.p, (Cut*)d_cuts.p, (char*)images.p, (int*)warm.p, (float*)h0.p, (float*)starts.p, (float*)transitions.p,
              -12.f, c.hv, c.v};
        // Two consumers share the loads of a block; with few blocks, one each fills the chip better.
        wg = c.wg ? c.wg : c.v % 128 != 0 || (int)segments.size() * c.hv * (c.v / 128) * 3 < multiprocessors() * 2 ? 1 : 2;
    }

    void poison() {
        for (Buffer* b : {&o, &ht, &images, &lows, &cancels, &warm, &starts, &transitions})
            if (b->bytes) CHECK(cudaMemset(b->p, 0xff, b->bytes));
    }

    void prepare(cudaStream_t s) {
        if (chunks.empty()) return;
        int bytes = makes ? PrepareSmem<128, false, false>::bytes(1) : c.k == 128 ? PrepareSmem<128>::bytes(c.hv / c.hk) : PrepareSmem<64>::bytes(c.hv / c.hk);
        Kernel kernel = makes ? c.f16 ? (Kernel)hopper_prepare_keys_f16_k128 : (Kernel)hopper_prepare_keys_bf16_k128
                        : one ? c.f16 ? (Kernel)hopper_prepare_one_f16_k128 : (Kernel)hopper_prepare_one_bf16_k128
                              : OF_CASE(hopper_prepare, );
        LAUNCH(kernel, chunks.size() * c.hk, 128, bytes, s, &pa, &pm);
    }

    // The states before the segments.
    void carry(cudaStream_t s) {
        if (!c.cut) return;
        int jobs = (int)ordered.size() * c.hv;
        LAUNCH(hopper_warm, jobs, 128, 0, s, &ca);
        int bytes = c.k == 128 ? ScanSmem<128, 1, 3, false>::BYTES : ScanSmem<64, 1, 3, false>::BYTES;
        LAUNCH(OF_CASE(hopper_state, ), jobs * (c.v / 64 + c.k / 64), 256, bytes, s, &sta, &maps);
        join(s);
    }
    void join(cudaStream_t s) {
        const int bytes = c.k == 128 ? CarrySmem<128>::BYTES : CarrySmem<64>::BYTES;
        LAUNCH2(c.k == 128 ? (Kernel)hopper_carry_k128 : (Kernel)hopper_carry_k64, cuts.size() * c.hv, c.v / CARRY_COLUMNS, carry_threads(c.k), bytes, s, &ca);
    }

    // Everything with outputs, behind what it needs.
    void forward(cudaStream_t s) {
        prepare(s), carry(s), scan(s);
    }

    void scan(cudaStream_t s) {
#ifdef GATEDELTA_EMULATOR
        usual(s), careful(s);
#else
        static cudaStream_t beside = nullptr;
        static cudaEvent_t fork, join;
        if (!beside) {
            CHECK(cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking));
            CHECK(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
            CHECK(cudaEventCreateWithFlags(&join, cudaEventDisableTiming));
        }
        CHECK(cudaEventRecord(fork, s));
        CHECK(cudaStreamWaitEvent(beside, fork, 0));
        usual(s), careful(beside);
        CHECK(cudaEventRecord(join, beside));
        CHECK(cudaStreamWaitEvent(s, join, 0));
#endif
    }

    void usual(cudaStream_t s) {
        if (makes) {
            const Kernel kernel = c.f16 ? wg == 2 ? (Kernel)hopper_scan_making_f16_k128_w2 : (Kernel)hopper_scan_making_f16_k128_w1
                                        : wg == 2 ? (Kernel)hopper_scan_making_bf16_k128_w2 : (Kernel)hopper_scan_making_bf16_k128_w1;
            const int bytes = wg == 2 ? ScanSmem<128, 2, 3, true, false, false, false, true>::BYTES : ScanSmem<128, 1, 3, true, false, false, false, true>::BYTES;
            LAUNCH(kernel, segments.size() * c.hv * (c.v / 64 / wg), scan_threads(wg, true), bytes, s, &sa, &maps);
            return;
        }
        int bytes = c.k == 128 ? wg == 2 ? ScanSmem<128, 2, 3, true>::BYTES : ScanSmem<128, 1, 3, true>::BYTES
                               : wg == 2 ? ScanSmem<64, 2, 3, true>::BYTES : ScanSmem<64, 1, 3, true>::BYTES;
        LAUNCH(wg == 2 ? OF_CASE(hopper_scan, _w2) : OF_CASE(hopper_scan, _w1), segments.size() * c.hv * (c.v / 64 / wg), scan_threads(wg, false), bytes, s, &sa, &maps);
    }
    // For the segments that the other one leaves alone: beside it, as the backend has it.
    void careful(cudaStream_t s) {
        if (makes) {
            const int bytes = ScanSmem<128, 1, CAREFUL_STAGES, true, false, false, true, true>::BYTES;
            LAUNCH(c.f16 ? (Kernel)hopper_scan_making_careful_f16_k128 : (Kernel)hopper_scan_making_careful_bf16_k128, segments.size() * c.hv * (c.v / 64), scan_threads(1, true), bytes, s, &sa, &maps);
            return;
        }
        const int bytes = c.k == 128 ? ScanSmem<128, 1, CAREFUL_STAGES, true, false, false, true>::BYTES : ScanSmem<64, 1, CAREFUL_STAGES, true, false, false, true>::BYTES;
        const Kernel kernel = c.f16 ? c.k == 128 ? (Kernel)hopper_scan_careful_f16_k128 : (Kernel)hopper_scan_careful_f16_k64
                                    : c.k == 128 ? (Kernel)hopper_scan_careful_bf16_k128 : (Kernel)hopper_scan_careful_bf16_k64;
        LAUNCH(kernel, segments.size() * c.hv * (c.v / 64), scan_threads(1, false), bytes, s, &sa, &maps);
    }

    // Of chunks and value heads: whether sums cancel there.
    vector<unsigned char> careful_cells() const {
        vector<unsigned char> x(chunks.size() * c.hv);
        if (!x.empty()) CHECK(cudaMemcpy(x.data(), cancels.p, x.size(), cudaMemcpyDeviceToHost));
        return x;
    }

    double flops() const {  // as in the roofline: nothing shared between heads
        double kd = c.k, vd = c.v, C = CHUNK;
        return (double)chunks.size() * c.hv * (2 * C * C * (2 * kd + 2 * vd) + 6 * C * kd * vd + C * C * C / 2);
    }
    double bytes() const {
        return 2.0 * tokens * (2.0 * c.hk * c.k + 2.0 * c.hv * c.v) + 8.0 * tokens * c.hv + (c.h0 ? 8.0 : 4.0) * n * c.hv * c.k * c.v;
    }
};

// Everything of a case on the host, as float64.
struct Host {
    vector<double> q, k, v, o;
    vector<float> g, beta, h0, ht;
    explicit Host(const Run& r) {
        q = read16(r.q, r.c.f16), k = read16(r.k, r.c.f16), v = read16(r.v, r.c.f16), o = read16(r.o, r.c.f16);
        g = read32(r.g), beta = read32(r.beta), h0 = read32(r.h0), ht = read32(r.ht);
    }
};

// A row of q or k as the operator sees it.
static vector<double> row_of(const vector<double>& x, size_t at, int k, bool l2norm) {
    vector<double> y(x.begin() + at, x.begin() + at + k);
    if (l2norm) {
        double sum = 1e-6;
        for (double e : y) sum += e * e;
        for (double& e : y) e /= sqrt(sum);
    }
    return y;
}

struct Sum {
    double err = 0, ref = 0;
    void add(double got, double want) {
        // Not a number must count: a comparison with NaN is false.
        double e = got - want;
        err += e * e, ref += want * want;
    }
    double value() const { return sqrt(err / std::max(ref, 1e-300)); }
};

// One head of one sequence, token by token; errors of o by chunk and of ht.
static void reference(const Run& r, const Host& x, int s, int h, vector<Sum>& by_chunk, Sum& by_state, double* worst_part) {
    const Case& c = r.c;
    int kh = c.mod ? h % c.hk : h / (c.hv / c.hk), K = c.k, V = c.v;
    vector<double> S((size_t)K * V, 0.0), rr(V), oo(V);
    if (c.h0)
        for (size_t i = 0; i < S.size(); i++) S[i] = x.h0[((size_t)s * c.hv + h) * K * V + i];
    double scale = 1.0 / sqrt((double)K);
    for (int t = 0; t < c.lens[s]; t++) {
        size_t row = r.cu[s] + t;
        vector<double> q = row_of(x.q, (row * c.hk + kh) * K, K, c.l2norm), k = row_of(x.k, (row * c.hk + kh) * K, K, c.l2norm);
        const double* v = &x.v[(row * c.hv + h) * V];
        double decay = exp((double)x.g[row * c.hv + h]), beta = x.beta[row * c.hv + h];
        std::fill(rr.begin(), rr.end(), 0.0), std::fill(oo.begin(), oo.end(), 0.0);
        for (int i = 0; i < K; i++) {
            double ki = k[i], *p = &S[(size_t)i * V];
            for (int j = 0; j < V; j++) p[j] *= decay, rr[j] += p[j] * ki;
        }
        for (int j = 0; j < V; j++) rr[j] = beta * (v[j] - rr[j]);
        for (int i = 0; i < K; i++) {
            double ki = k[i], qi = q[i], *p = &S[(size_t)i * V];
            for (int j = 0; j < V; j++) p[j] += ki * rr[j], oo[j] += p[j] * qi;
        }
        for (int j = 0; j < V; j++) by_chunk[t / CHUNK].add(x.o[(row * c.hv + h) * V + j], scale * oo[j]);
    }
    Sum parts[4];
    for (int i = 0; i < K; i++)
        for (int j = 0; j < V; j++) {
            double got = x.ht[((size_t)s * c.hv + h) * K * V + (size_t)i * V + j], want = S[(size_t)i * V + j];
            by_state.add(got, want), parts[(i >= 64) * 2 + (j >= 64)].add(got, want);
        }
    for (int i = 0; i < 4; i++) worst_part[i] = parts[i].value();
}

// What `prepare` left for one chunk and head, against float64: errors of A, P and the vectors.
static void check_images(const Run& r, const Host& x, int chunk, int h, double* errors) {
    const Case& c = r.c;
    int kh = c.mod ? h % c.hk : h / (c.hv / c.hk), K = c.k, len = r.chunks[chunk].len, token = r.chunks[chunk].token;
    vector<char> image(IMAGE_BYTES);
    CHECK(cudaMemcpy(image.data(), (char*)r.images.p + ((size_t)chunk * c.hv + h) * IMAGE_BYTES, IMAGE_BYTES, cudaMemcpyDeviceToHost));
    auto at = [&](int panel, int i, int j) {
        int x = j / 16;
        if (i < 16 * x) return 0.0;
        size_t byte = panel + image_columns(x) + (2 * ((i - 16 * x) / 8) + j / 8 % 2) * 128 + i % 8 * 16 + j % 8 * 2;
        uint16_t bits;
        memcpy(&bits, &image[byte], 2);
        return from16(bits, c.f16);
    };
    const float* vec = (const float*)&image[IMAGE_VEC];
    vector<double> cs(CHUNK), beta(CHUNK, 0.0), rk(CHUNK, 1.0), rq(CHUNK, 1.0);
    vector<vector<double>> q(CHUNK, vector<double>(K, 0.0)), k = q;
    double sum = 0;
    for (int i = 0; i < CHUNK; i++) {
        if (i < len) {
            size_t row = token + i;
            sum += std::max((double)x.g[row * c.hv + h], (double)G_MIN), beta[i] = x.beta[row * c.hv + h];
            k[i] = row_of(x.k, (row * c.hk + kh) * K, K, c.l2norm), q[i] = row_of(x.q, (row * c.hk + kh) * K, K, c.l2norm);
            if (c.l2norm) {
                auto raw = row_of(x.k, (row * c.hk + kh) * K, K, false), rawq = row_of(x.q, (row * c.hk + kh) * K, K, false);
                double a = 1e-6, b = 1e-6;
                for (int e = 0; e < K; e++) a += raw[e] * raw[e], b += rawq[e] * rawq[e];
                rk[i] = 1 / sqrt(a), rq[i] = 1 / sqrt(b);
            }
        }
        cs[i] = sum;
    }
    auto dot = [&](const vector<double>& a, const vector<double>& b) {
        double z = 0;
        for (int e = 0; e < K; e++) z += a[e] * b[e];
        return z;
    };
    double scale = 1 / sqrt((double)K);
    vector<vector<double>> L(CHUNK, vector<double>(CHUNK, 0.0)), X = L;
    for (int i = 0; i < CHUNK; i++)
        for (int j = 0; j < i; j++) L[i][j] = beta[i] * exp(cs[i] - cs[j]) * dot(k[i], k[j]);
    Sum a, p, v[3];
    for (int j = 0; j < CHUNK; j++)
        for (int i = 0; i < CHUNK; i++) {
            double z = i == j;
            for (int m = j; m < i; m++) z -= L[i][m] * X[m][j];
            X[i][j] = i < j ? 0 : z;
            a.add(at(IMAGE_A, i, j), X[i][j] * beta[j]);
            if (!r.makes) p.add(at(IMAGE_P, i, j), i >= j ? scale * exp(cs[i] - cs[j]) * dot(q[i], k[j]) : 0.0);
        }
    for (int i = 0; i < CHUNK; i++) {
        if (i < len) v[0].add(vec[VEC_IN + i], exp(cs[i]) * rk[i]);
        v[1].add(vec[VEC_STATE + i], i < len ? exp(cs[CHUNK - 1] - cs[i]) * rk[i] : 0.0);
        if (i >= len) continue;
        if (r.makes)
            v[2].add(vec[VEC_OUT + i], cs[i] * LOG2E), v[2].add(vec[VEC_KEYS + i], cs[i] * LOG2E - log2(rk[i]));
        else
            v[2].add(vec[VEC_OUT + i], scale * exp(cs[i]) * rq[i]);
    }
    errors[0] = a.value(), errors[1] = p.value();
    for (int i = 0; i < 3; i++) errors[2 + i] = v[i].value();
}

static bool check(const Case& c, int repeats) {
    Run r(c, 1234);
    Buffer o1, ht1;
    o1.make(r.o.bytes), ht1.make(r.ht.bytes);
    int differ = 0;
    for (int n = 0; n < repeats; n++) {
        r.poison();
        r.forward(0);
        finish(c.name);
        if (n == 0) {
            CHECK(cudaMemcpy(o1.p, r.o.p, r.o.bytes, cudaMemcpyDeviceToDevice));
            CHECK(cudaMemcpy(ht1.p, r.ht.p, r.ht.bytes, cudaMemcpyDeviceToDevice));
        } else {
            differ += !same(o1, r.o) || !same(ht1, r.ht);
        }
    }
    Host x(r);
    // Sampled heads: the first, the last and a few between; of few or short sequences all.
    vector<std::pair<int, int>> jobs;
    long long budget = 1500000;
    for (int s = 0; s < r.n; s++)
        for (int h = 0; h < c.hv; h++) {
            int step = std::max(1, c.hv / 6);
            bool take = (long long)r.tokens * c.hv < budget || h == 0 || h == c.hv - 1 || h % step == 1;
            if (take) jobs.push_back({s, h});
        }
    vector<vector<Sum>> by_chunk(jobs.size());
    vector<Sum> by_state(jobs.size());
    vector<double> parts(jobs.size() * 4);
    parallel((int)jobs.size(), [&](int i) {
        by_chunk[i].resize((c.lens[jobs[i].first] + CHUNK - 1) / CHUNK);
        reference(r, x, jobs[i].first, jobs[i].second, by_chunk[i], by_state[i], &parts[4 * i]);
    });
    Sum o, ht;
    double worst = 0;
    for (size_t i = 0; i < jobs.size(); i++) {
        Sum own;
        for (Sum& s : by_chunk[i]) own.err += s.err, own.ref += s.ref;
        o.err += own.err, o.ref += own.ref, ht.err += by_state[i].err, ht.ref += by_state[i].ref;
        if (own.ref > 0) worst = own.value() > worst || own.value() != own.value() ? own.value() : worst;
    }
    double images[5] = {};
    for (int i = 0; i < std::min<int>(6, (int)r.chunks.size()); i++) {
        double e[5];
        int chunk = (int)((long long)i * (r.chunks.size() - 1) / 5);
        check_images(r, x, chunk, (i * 7) % c.hv, e);
        for (int j = 0; j < 5; j++)
            if (!(e[j] <= images[j])) images[j] = e[j];
    }
    double bound = c.f16 ? 1e-3 : 5e-3;
    // Rows behind the last sequence belong to nobody and stay as they were.
    bool pad_kept = true;
    for (size_t i = (size_t)r.tokens * c.hv * c.v; i < x.o.size(); i++) pad_kept = pad_kept && x.o[i] != x.o[i];
    bool ok = (o.ref == 0 || o.value() <= bound) && ht.value() <= bound && differ == 0 && pad_kept;
    int careful = 0;
    for (unsigned char flag : r.careful_cells()) careful += flag != 0;
    char of_p[16] = "made";  // by the scan, which leaves it nowhere
    if (!r.makes) snprintf(of_p, sizeof of_p, "%.1e", images[1]);
    printf("%-4s %-22s %s K%d V%d %d/%d %-8s %s cut%d careful %d of %d  o %.2e (worst head %.2e) ht %.2e | A %.1e P %s vec %.0e %.0e %.0e%s%s\n", ok ? "ok" : "FAIL", c.name,
           c.f16 ? "f16 " : "bf16", c.k, c.v, c.hk, c.hv, decay_name(c.decay), r.wg == 2 ? "wg2" : "wg1", c.cut, careful, (int)r.chunks.size() * c.hv, o.value(), worst, ht.value(), images[0], of_p,
           images[2], images[3], images[4], differ ? "  RUNS DIFFER" : "", pad_kept ? "" : "  PAD WRITTEN");
    if (!ok) {
        for (size_t i = 0, shown = 0; i < jobs.size() && shown < 3; i++) {
            bool bad = !(by_state[i].value() <= bound);
            for (size_t m = 0; m < by_chunk[i].size(); m++)
                if (!(by_chunk[i][m].value() <= 2 * bound)) {
                    printf("       seq %d head %d: first bad chunk %zu of %zu, error %.2e; ht by quarter (k, v) %.1e %.1e %.1e %.1e\n", jobs[i].first,
                           jobs[i].second, m, by_chunk[i].size(), by_chunk[i][m].value(), parts[4 * i], parts[4 * i + 1], parts[4 * i + 2],
                           parts[4 * i + 3]);
                    bad = false, shown++;
                    break;
                }
            if (bad) {
                printf("       seq %d head %d: o good, ht %.2e; by quarter (k, v) %.1e %.1e %.1e %.1e\n", jobs[i].first, jobs[i].second,
                       by_state[i].value(), parts[4 * i], parts[4 * i + 1], parts[4 * i + 2], parts[4 * i + 3]);
                shown++;
            }
        }
        // Element by element for the smallest case: where is it wrong?
        if (r.tokens <= 64) dump16(r.o, c.f16, c.hv * c.v, 4, 8);
    }
    fflush(stdout);
    return ok;
}

static vector<Case> cases() {
    vector<Case> all;
    auto add = [&](const char* name, vector<int> lens, int hk, int hv, int k, int v, bool f16, Decay d, bool h0 = true, bool l2 = false, bool mod = false,
                   int pad = 0, float spread = 0, int wg = 0, int cut = 0) { all.push_back({name, lens, hk, hv, k, v, f16, d, h0, l2, mod, pad, spread, wg, cut}); };
    // From one product to all: the first that fails says which stage is wrong.
    for (int wg : {1, 2}) {
        add("one chunk, no state", {64}, 1, 1, 128, 128, false, Decay::None, false, false, false, 0, 0, wg);
        add("one chunk, state", {64}, 1, 1, 128, 128, false, Decay::None, true, false, false, 0, 0, wg);
        add("one chunk, gates", {64}, 1, 1, 128, 128, false, Decay::Slow, true, false, false, 0, 0, wg);
        add("two chunks", {128}, 1, 1, 128, 128, false, Decay::Slow, true, false, false, 0, 0, wg);
        add("eight chunks", {512}, 1, 2, 128, 128, false, Decay::Slow, true, false, false, 0, 0, wg);
        add("one token", {1}, 1, 1, 128, 128, false, Decay::Slow, true, false, false, 3, 0, wg);
        add("ragged", {37, 0, 64, 65, 200, 1, 1000}, 2, 4, 128, 128, false, Decay::Mixed, true, false, false, 15, 0, wg);
        add("f16", {37, 64, 1000}, 2, 4, 128, 128, true, Decay::Mixed, true, false, false, 15, 0, wg);
        add("K 64", {300, 64}, 2, 4, 64, 128, false, Decay::Mixed, true, false, false, 0, 0, wg);
    }
    add("V 64", {300, 64}, 2, 4, 128, 64, false, Decay::Mixed);
    add("K 64, V 64", {300, 64}, 2, 4, 64, 64, false, Decay::Mixed);
    add("K 64, V 64, f16", {300, 64}, 2, 4, 64, 64, true, Decay::Mixed);
    add("l2norm", {500, 77}, 2, 4, 128, 128, false, Decay::Mixed, true, true);
    add("l2norm, f16", {500, 77}, 2, 4, 128, 128, true, Decay::Mixed, true, true);
    add("l2norm, K 64", {500, 77}, 1, 2, 64, 64, false, Decay::Mixed, true, true);
    add("head map mod", {500, 77}, 2, 8, 128, 128, false, Decay::Mixed, true, false, true);
    add("cliffs, -inf", {700}, 2, 4, 128, 128, false, Decay::Cliffs);
    add("keys alike", {700}, 2, 4, 128, 128, false, Decay::Slow, true, false, false, 0, 0.8f);
    add("keys alike, no decay", {700}, 2, 4, 128, 128, false, Decay::None, true, false, false, 0, 0.8f);
    // Cosines of 0.2, 0.5, 0.8, 0.9, 0.98 and 1; a quarter of the heads without decay, the others with little.
    for (float spread : {1 / 3.f, 0.5f, 2 / 3.f, 0.75f, 0.875f, 1.f}) {
        add("keys alike, K 128", {300, 65}, 2, 4, 128, 128, false, Decay::Bench, false, false, false, 3, spread);
        add("keys alike, K 64", {300, 65}, 2, 4, 64, 64, false, Decay::Bench, true, false, true, 3, spread);
    }
    for (float spread : {0.5f, 0.8f, 1.f}) {
        add("keys alike, f16", {300, 65}, 2, 4, 128, 128, true, Decay::Bench, false, false, false, 3, spread);
        add("keys alike, f16, K 64", {300, 65}, 2, 4, 64, 64, true, Decay::None, true, false, true, 3, spread);
    }
    // Where the scan makes P, and with it what rounding it leaves.
    for (bool f16 : {false, true})
        for (int cut : {0, 2}) add("keys alike, P made", {300, 65}, 4, 4, 128, 128, f16, Decay::Bench, true, f16, false, 3, 0.8f, 0, cut);
    // Heads of which some cancel and others do not, at once.
    add("keys alike, l2norm", {130, 0, 700}, 2, 8, 128, 128, false, Decay::Mixed, true, true, false, 3, 0.9f, 2);
    add("no decay 4096", {4096}, 1, 2, 128, 128, false, Decay::None, false);
    add("no decay 4096, f16", {4096}, 1, 2, 128, 128, true, Decay::None, false);
    add("4096 4/4", {4096}, 4, 4, 128, 128, false, Decay::Mixed);
    add("4096 2/8", {4096}, 2, 8, 128, 128, false, Decay::Mixed);
    add("4096 4/16", {4096}, 4, 16, 128, 128, false, Decay::Mixed);
    add("ragged 16/32", {410, 431, 294, 991, 386, 1584}, 16, 32, 128, 128, false, Decay::Mixed);
    add("padded 16/64", {211, 774}, 16, 64, 128, 128, false, Decay::Mixed, true, false, false, 15);
    // Cut into segments.
    for (Decay d : {Decay::Mixed, Decay::None, Decay::Slow, Decay::Bench, Decay::Cliffs}) add("cut", {1500, 64, 1, 129}, 2, 4, 128, 128, false, d, true, false, false, 5, 0, 0, 4);
    for (Decay d : {Decay::Mixed, Decay::None, Decay::Slow, Decay::Bench, Decay::Cliffs}) {
        add("cut, keys alike", {900, 64, 1, 129}, 2, 4, 128, 128, false, d, true, false, false, 5, 0.8f, 0, 4);
        add("cut, keys equal, K 64", {900, 64, 1, 129}, 2, 4, 64, 64, false, d, true, false, false, 5, 1.f, 0, 4);
    }
    add("cut, f16, keys alike", {900, 64, 1, 129}, 2, 4, 128, 128, true, Decay::Bench, true, false, false, 5, 0.8f, 0, 4);
    add("cut, f16, keys equal, K 64", {900, 64, 1, 129}, 2, 4, 64, 64, true, Decay::Bench, true, false, false, 5, 1.f, 0, 4);
    add("cut, f16", {1500, 64, 1, 129}, 2, 4, 128, 128, true, Decay::Bench, true, false, false, 5, 0, 0, 4);
    add("cut, f16, no decay", {4096}, 2, 4, 128, 128, true, Decay::None, true, false, false, 5, 0, 0, 8);
    add("cut, K 64, V 64", {1500, 64, 1, 129}, 2, 4, 64, 64, false, Decay::Bench, true, false, false, 0, 0, 0, 4);
    add("cut, K 64", {1500, 64, 1, 129}, 2, 4, 64, 128, false, Decay::Bench, false, false, false, 0, 0, 0, 4);
    add("cut, V 64", {1500, 64, 1, 129}, 2, 4, 128, 64, false, Decay::Bench, false, true, false, 0, 0, 0, 4);
    add("cut, 32768 4/8", {32768}, 4, 8, 128, 128, false, Decay::Bench, true, false, false, 0, 0, 0, 32);
    add("cut, 32768 4/8, A", {32768}, 4, 8, 128, 128, false, Decay::Mixed, true, false, false, 0, 0, 0, 32);
    add("32768 16/64", {32768}, 16, 64, 128, 128, false, Decay::Mixed);
    return all;
}

#ifndef GATEDELTA_EMULATOR
static void time_case(const char* name, vector<int> lens, int hk, int hv, int wg, int cut, Decay d, int repeats, float spread = 0) {
    Case c{name, lens, hk, hv, 128, 128, false, d, true, false, false, 0, spread, wg, cut};
    Run r(c, 99);
    double whole = time_of([&](cudaStream_t s) { r.forward(s); }, repeats);
    double first = time_of([&](cudaStream_t s) { r.prepare(s); }, repeats), second = time_of([&](cudaStream_t s) { r.scan(s); }, repeats);
    double middle = cut ? time_of([&](cudaStream_t s) { r.carry(s); }, repeats) : 0, join = cut ? time_of([&](cudaStream_t s) { r.join(s); }, repeats) : 0;
    // The usual scan alone, and the careful one, which has nothing to do where nothing cancels.
    double usual = time_of([&](cudaStream_t s) { r.usual(s); }, repeats), careful = time_of([&](cudaStream_t s) { r.careful(s); }, repeats);
    double bw = bandwidth(), roof = std::max(r.flops() / 790e12, r.bytes() / bw) * 1e3;
    long long longest = 0;
    for (int x : lens) longest = std::max<long long>(longest, (x + CHUNK - 1) / CHUNK);
    auto per_chunk = [&](double ms) { return ms * 1e3 / (cut ? std::min<long long>(cut, longest) : longest); };
    printf("%-12s %2d/%2d wg%d cut%-3d %.4f ms (prepare %.4f, carry %.4f with %.4f to join, scan %.4f of usual %.4f and careful %.4f; %.2f us a chunk)  roof %.4f  x%.2f  %.0f TF/s\n", name, hk, hv, r.wg, cut, whole, first, middle, join,
           second, usual, careful, per_chunk(second), roof, whole / roof, r.flops() / whole / 1e9);
    finish(name);
    fflush(stdout);
}
#endif

int main(int argc, char** argv) {
    std::string what = argc > 1 ? argv[1] : "check";
    describe();
    if (what == "check") {
        int from = argc > 2 ? atoi(argv[2]) : 0, to = argc > 3 ? atoi(argv[3]) : 1 << 30, failed = 0, n = 0;
        for (const Case& c : cases()) {
            if (n >= from && n < to) {
                if (argc > 4) {  // where the case's number is left, so that a script can go on behind one that stops the device
                    FILE* f = fopen(argv[4], "w");
                    if (f) fprintf(f, "%d\n", n), fclose(f);
                }
                failed += !check(c, 3);
            }
            n++;
        }
        printf("%d failed\n", failed);
        return failed != 0;
    }
#ifndef GATEDELTA_EMULATOR
    if (what == "time" && argc > 5) {  // length, sequences, Hk, Hv, consumers, chunks of a segment
        auto number = [&](int i) { return i < argc ? atoi(argv[i]) : 0; };
        time_case("case", vector<int>(number(3), number(2)), number(4), number(5), number(6), number(7), Decay::Bench, 20);
        return 0;
    }
    if (what == "time") {
        int wg = argc > 2 ? atoi(argv[2]) : 0, cut = argc > 3 ? atoi(argv[3]) : 0;
        const int n = 20;
        for (int hv : {16, 32, 64}) time_case("1x32768", {32768}, 16, hv, wg, cut, Decay::Bench, n);
        time_case("1x32768", {32768}, 2, 8, wg, cut, Decay::Bench, n);
        time_case("1x8192", {8192}, 16, 32, wg, cut, Decay::Bench, n);
        // Keys alike: all segments are for the careful scan.
        time_case("1x32768 alike", {32768}, 16, 32, wg, cut, Decay::Bench, n, 0.8f);
        time_case("8192x4 alike", {8192, 8192, 8192, 8192}, 16, 32, wg, cut, Decay::Bench, n, 0.8f);
        if (cut) return 0;
        for (int hv : {16, 32, 64}) time_case("8192x4", {8192, 8192, 8192, 8192}, 16, hv, wg, cut, Decay::Bench, n);
        for (int hv : {16, 64}) time_case("4096x8", vector<int>(8, 4096), 16, hv, wg, cut, Decay::Bench, n);
        for (int hv : {16, 64}) time_case("1024x8", vector<int>(8, 1024), 16, hv, wg, cut, Decay::Bench, n);
        time_case("ragged", {3, 4091, 63, 65, 8192, 1000, 1, 2047, 5000, 129}, 16, 32, wg, cut, Decay::Bench, n);
        return 0;
    }
#endif
    if (what == "one" && argc > 6) {  // length, sequences, Hk, Hv, consumers, chunks of a segment: one forward pass, for a profiler
        Case c{"one", vector<int>(atoi(argv[3]), atoi(argv[2])), atoi(argv[4]), atoi(argv[5]), 128, 128, false, Decay::Bench, true, false, false, 0, 0, atoi(argv[6]), argc > 7 ? atoi(argv[7]) : 0};
        Run r(c, 99);
        r.forward(0);
        finish("one");
        return 0;
    }
    fprintf(stderr, "forward: expected check, time or one, found %s\n", what.c_str());
    return 2;
}
