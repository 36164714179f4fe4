// Tests and times the Hopper backward kernels: a program of its own, beside the crate.
//
//   nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 -Xcompiler -O3,-mavx2,-mfma,-pthread -DHOPPER_ALL -o backward backward.cu bench/backward.cu
//   ./backward check [from to [seed]]  every case against float64
//   ./backward time [consumers cut]  FlashQLA's table of the backward, with its own figures (of an H200) beside
//   ./backward one ...          a single pass, for a profiler
//
// Each case poisons scratch and outputs with NaN; an answer must be finite, within its bound, and the same in every bit when
// run again. tests/cuda/emulator/runtime.h says how the checks run without a GPU.
#include "../carry.cuh"
#include "../gradients_careful.cuh"
#include "../prepare.cuh"
#include "../reverse.cuh"
#include "../scan.cuh"
#include "support.h"

#include <string>

using std::vector;
using namespace hopper;

#ifdef GATEDELTA_EMULATOR
#define DECLARE(NAME, ...) extern "C" void NAME(void* const*);
#else
#define DECLARE(NAME, ...) extern "C" __global__ void NAME(__VA_ARGS__);
#endif
#define OF_K(NAME, K)                                                                                                          \
    DECLARE(hopper_grad_prepare_##NAME##_##K, const __grid_constant__ PrepareArgs, const __grid_constant__ PrepareMaps)                                             \
    DECLARE(hopper_keep_##NAME##_##K##_w1, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)                 \
    DECLARE(hopper_keep_##NAME##_##K##_w2, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)                 \
    DECLARE(hopper_reverse_##NAME##_##K##_w1, const __grid_constant__ ReverseArgs, const __grid_constant__ ReverseMaps)        \
    DECLARE(hopper_reverse_##NAME##_##K##_w2, const __grid_constant__ ReverseArgs, const __grid_constant__ ReverseMaps)        \
    DECLARE(hopper_gradients_##NAME##_##K##_v64, const __grid_constant__ GradientArgs, const __grid_constant__ GradientMaps)   \
    DECLARE(hopper_gradients_##NAME##_##K##_v128, const __grid_constant__ GradientArgs, const __grid_constant__ GradientMaps)
#define CUT(NAME, K)                                                                                                    \
    DECLARE(hopper_grad_state_##NAME##_##K, const __grid_constant__ ScanArgs, const __grid_constant__ ScanMaps)         \
    DECLARE(hopper_reverse_state_##NAME##_##K, const __grid_constant__ ReverseArgs, const __grid_constant__ ReverseMaps)
CUT(bf16, k128)
CUT(f16, k128)
DECLARE(hopper_grad_warm, const __grid_constant__ GradWarmArgs)
DECLARE(hopper_grad_carry_k128, const __grid_constant__ CarryArgs)
DECLARE(hopper_reverse_carry_k128, const __grid_constant__ CarryArgs)
OF_K(bf16, k128)
OF_K(f16, k128)
DECLARE(hopper_gradients_careful_bf16_k128_v64, const __grid_constant__ GradientArgs, const __grid_constant__ GradientMaps)
DECLARE(hopper_gradients_careful_bf16_k128_v128, const __grid_constant__ GradientArgs, const __grid_constant__ GradientMaps)

typedef const void* Kernel;
// The kernel for a case: by type, then by what follows. K is 128: what else there is, the backend leaves to the general kernels.
#define BY_TYPE(F16, HEAD, TAIL) ((F16) ? (Kernel)HEAD##_f16_k128##TAIL : (Kernel)HEAD##_bf16_k128##TAIL)

struct Case {
    const char* name;
    vector<int> lens;
    int hk, hv, k, v;
    bool f16;
    Decay decay;
    bool states, l2norm, mod;  // states: h0 and dht
    int pad;                   // rows behind the last sequence, full of NaN
    float spread;              // keys share a direction: 0 none, 1 all
    int wg;                    // consumers per block of the scans; 0: chosen
    int cut = 0;               // chunks in a segment; 0: sequences stay whole
};

// Chunks in a segment, as the backend chooses them (Costs::best_cut of hopper.rs): `keep` and `reverse` run at once.
static int best_cut(const vector<int>& lens, int heads) {
    double chunks = 0, longest = 0;
    for (int x : lens) chunks += (x + CHUNK - 1) / CHUNK, longest = std::max(longest, (double)((x + CHUNK - 1) / CHUNK));
    const double full = 2.1 * chunks * 2 * heads / multiprocessors();
    double least = 0.95 * std::max(full, longest);
    int best = 0;
    for (int length : {16, 32, 64, 128, 256}) {
        const double filled = full * (1 + 2.0 / length);
        const double time = 7 + std::max(0.7 * length, (0.32 + 1.6 / length) * filled) + 0.6 * longest / length + std::max(filled, (double)length);
        if (length < longest && time < least) best = length, least = time;
    }
    return best;
}

// Two kernels beside each other on `s`, where streams are more than names.
template <class A, class B>
static void beside(cudaStream_t s, A a, B b) {
#ifdef GATEDELTA_EMULATOR
    a(s), b(s);
#else
    static cudaStream_t other = nullptr;
    static cudaEvent_t fork, join;
    if (other == nullptr) {
        CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
        CHECK(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
        CHECK(cudaEventCreateWithFlags(&join, cudaEventDisableTiming));
    }
    CHECK(cudaEventRecord(fork, s));
    CHECK(cudaStreamWaitEvent(other, fork, 0));
    a(s), b(other);
    CHECK(cudaEventRecord(join, other));
    CHECK(cudaStreamWaitEvent(s, join, 0));
#endif
}

static const char* decay_name(Decay d) {
    static const char* names[] = {"A=0..16", "none", "slow", "bench", "cliffs"};
    return names[(int)d];
}

// Device memory and tables of one case.
struct Run {
    const Case& c;
    int tokens = 0, rows = 0, n = 0, wg;
    vector<int> cu;
    vector<Chunk> chunks;
    vector<Segment> segments, back, ordered;  // for `keep`, for `reverse`; by sequence, for what goes before them
    vector<Cut> cuts;
    Buffer warm, warm_back, starts, ends, transitions, d_back, d_ordered, d_cuts;
    CarryArgs ca, cb;
    GradWarmArgs wa;
    Buffer q, k, v, d_o, g, beta, h0, dht;
    Buffer dq, dk, dv, dg, dbeta, dh0;
    Buffer images, states, dstates, news, d_chunks, d_segments;
    Buffer lows, rests, cancels;  // bf16: where sums cancel
    PrepareArgs pa;
    PrepareMaps pm;
    ScanArgs ka;
    ScanMaps km;
    ReverseArgs ra;
    ReverseMaps rm;
    GradientArgs ga;
    GradientMaps gm;

    explicit Run(const Case& c, uint64_t seed) : c(c) {
        n = (int)c.lens.size();
        cu.push_back(0);
        for (int s = 0; s < n; s++) {
            const int origin = (int)chunks.size(), own = (c.lens[s] + CHUNK - 1) / CHUNK, first = (int)ordered.size();
            const int step = c.cut ? c.cut : std::max(1, own), count = std::max(1, (own + step - 1) / step);
            cuts.push_back({first, count, c.states ? s : -1, 0});
            for (int m = 0; m < count; m++) {
                const int at = first + m, skip = m * step * CHUNK;
                const bool last = m + 1 == count;
                Segment x = {tokens + skip, last ? c.lens[s] - skip : step * CHUNK, origin + m * step, 0, 0, origin, origin + own, 0};
                const int state = c.cut ? at : c.states ? s : -1;
                x.in = state, x.out = last ? s : -1, segments.push_back(x);
                x.in = state, x.out = m == 0 ? s : -1, back.push_back(x);
                x.in = at, x.out = last ? -1 : at + 1, ordered.push_back(x);
            }
            for (int t = 0; t < c.lens[s]; t += CHUNK) chunks.push_back({tokens + t, std::min(CHUNK, c.lens[s] - t)});
            tokens += c.lens[s];
            cu.push_back(tokens);
        }
        chunks.push_back({0, 0});  // an empty place, as the backend's tables have them
        for (vector<Segment>* x : {&segments, &back})
            std::stable_sort(x->begin(), x->end(), [](const Segment& a, const Segment& b) { return a.tokens > b.tokens; });
        rows = tokens + c.pad;
        const size_t of_k = (size_t)rows * c.hk * c.k * 2, of_v = (size_t)rows * c.hv * c.v * 2, gates = (size_t)rows * c.hv * 4, places = chunks.size() * c.hv;
        for (Buffer* b : {&q, &k, &dq, &dk}) b->make(of_k);
        for (Buffer* b : {&v, &d_o, &dv}) b->make(of_v);
        for (Buffer* b : {&g, &beta, &dg, &dbeta}) b->make(gates);
        for (Buffer* b : {&h0, &dht, &dh0}) b->make((size_t)n * c.hv * c.k * c.v * 4);
        images.make(places * GRAD_BYTES), news.make(places * CHUNK * c.v * 2);
        states.make(places * c.v / 64 * kept_bytes(c.k)), dstates.make(states.bytes);
        if (!c.f16) {
            lows.make((1 + places) * GRAD_LOW_BYTES + places * (c.v / 64) * PANEL), rests.make(places * c.v / 64 * (c.k / 64 + 1) * PANEL);
            cancels.make(chunks.size() * c.hk);
        }
        d_chunks.make(chunks.size() * sizeof(Chunk)), d_segments.make(segments.size() * sizeof(Segment));
        CHECK(cudaMemcpy(d_chunks.p, chunks.data(), d_chunks.bytes, cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(d_segments.p, segments.data(), d_segments.bytes, cudaMemcpyHostToDevice));
        d_back.make(back.size() * sizeof(Segment)), d_ordered.make(ordered.size() * sizeof(Segment)), d_cuts.make(cuts.size() * sizeof(Cut));
        CHECK(cudaMemcpy(d_back.p, back.data(), d_back.bytes, cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(d_ordered.p, ordered.data(), d_ordered.bytes, cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(d_cuts.p, cuts.data(), d_cuts.bytes, cudaMemcpyHostToDevice));
        if (c.cut) {
            const size_t jobs = ordered.size() * c.hv;
            warm.make(jobs * 4), warm_back.make(jobs * 4), starts.make(jobs * c.k * c.v * 4), ends.make(jobs * c.k * c.v * 4);
            transitions.make((jobs + c.hv) * c.k * transition_stride(c.k) * 4);
        }
        for (Buffer* b : {&q, &k, &v, &d_o, &g, &beta}) CHECK(cudaMemset(b->p, 0xff, b->bytes));
        make_rows(q.p, tokens * c.hk, c.k, c.f16, seed + 1, !c.l2norm, c.l2norm ? 3.f : 1.f, 0.f);
        make_rows(k.p, tokens * c.hk, c.k, c.f16, seed + 2, !c.l2norm, c.l2norm ? 2.f : 1.f, c.spread);
        make_rows(v.p, tokens * c.hv, c.v, c.f16, seed + 3, false, 1.f, 0.f);
        make_rows(d_o.p, tokens * c.hv, c.v, c.f16, seed + 6, false, 1.f, 0.f);
        make_gates((float*)g.p, (float*)beta.p, tokens, c.hv, c.decay, seed + 4);
        make_floats((float*)h0.p, (size_t)n * c.hv * c.k * c.v, seed + 5, 0.3f);
        make_floats((float*)dht.p, (size_t)n * c.hv * c.k * c.v, seed + 7, 0.3f);
        if (tokens > 2) {  // nothing may be divided by beta
            const float zero = 0.f;
            CHECK(cudaMemcpy((float*)beta.p + c.hv, &zero, 4, cudaMemcpyHostToDevice));
        }
        CHECK(cudaDeviceSynchronize());

        const CUtensorMap map_q = tensor_map(q.p, rows, c.hk * c.k, c.f16), map_k = tensor_map(k.p, rows, c.hk * c.k, c.f16);
        km.q = map_q, km.k = map_k, km.v = km.o = tensor_map(v.p, rows, c.hv * c.v, c.f16);
        rm.q = map_q, rm.k = map_k, rm.d_o = tensor_map(d_o.p, rows, c.hv * c.v, c.f16);
        gm.q = map_q, gm.k = map_k, gm.d_o = rm.d_o, gm.dv = tensor_map(dv.p, rows, c.hv * c.v, c.f16);
        gm.dq = tensor_map(dq.p, rows, c.hk * c.k, c.f16), gm.dk = tensor_map(dk.p, rows, c.hk * c.k, c.f16);
        const float scale = 1.f / sqrtf((float)c.k);
        pm = {map_q, map_k};
        pa = {(float*)g.p, (float*)beta.p, (Chunk*)d_chunks.p, (char*)images.p, scale, c.hk, c.hv, c.mod, c.l2norm, (int)chunks.size(), (char*)lows.p, (unsigned char*)cancels.p};
        ka = {(Segment*)d_segments.p, (char*)images.p, (float*)(c.cut ? starts.p : h0.p), nullptr, (float*)states.p, nullptr, news.p, 0, c.hk, c.hv, c.mod, c.v, hung_device(),
              (char*)lows.p, (unsigned char*)cancels.p, (int)chunks.size()};
        ra = {(Segment*)d_back.p, (char*)images.p, (float*)(c.cut ? ends.p : dht.p), (float*)dh0.p, (char*)dstates.p, dv.p, c.hv * c.v, c.hk, c.hv, c.mod, c.v, hung_device(), nullptr,
              (char*)lows.p, (char*)rests.p, (unsigned char*)cancels.p};
        ca = {(Segment*)d_ordered.p, (Cut*)d_cuts.p, (char*)images.p, (int*)warm.p, (float*)h0.p, (float*)starts.p, (float*)transitions.p, -12.f,
              c.hv, c.v};
        cb = ca, cb.h0 = (float*)dht.p, cb.states = (float*)ends.p;
        wa = {ca, (int*)warm_back.p};
        ga = {(Chunk*)d_chunks.p, (char*)images.p, (char*)states.p, (char*)dstates.p, (char*)news.p, dq.p, dk.p, (float*)dg.p, (float*)dbeta.p,
              c.hk * c.k, c.hk * c.k, scale, (int)chunks.size(), c.hk, c.hv, c.mod, c.l2norm, hung_device(),
              (unsigned char*)cancels.p, (char*)lows.p, (char*)rests.p, (int)chunks.size()};
        // Two consumers share the loads of a block; with few blocks, one each fills the chip better. As the backend has it.
        wg = c.wg ? c.wg : c.v % 128 != 0 || (c.cut ? 4 : 3) * (c.cut ? ((int)chunks.size() + c.cut - 1) / c.cut : n) * c.hv <= 3 * multiprocessors() ? 1 : 2;
    }

    vector<Buffer*> outputs() { return {&dq, &dk, &dv, &dg, &dbeta, &dh0}; }

    void poison() {
        for (Buffer* b : outputs()) CHECK(cudaMemset(b->p, 0xff, b->bytes));
        for (Buffer* b : {&images, &states, &dstates, &news, &warm, &warm_back, &starts, &ends, &transitions, &lows, &rests, &cancels})
            if (b->bytes) CHECK(cudaMemset(b->p, 0xff, b->bytes));
    }

    void prepare(cudaStream_t s) {
        const int bytes = PrepareSmem<128, true>::bytes(c.hv / c.hk);
        LAUNCH(BY_TYPE(c.f16, hopper_grad_prepare, ), chunks.size() * c.hk, 128, bytes, s, &pa, &pm);
    }
    // The states before the segments, and the gradients of those behind them.
    void carry(cudaStream_t s) {
        if (c.cut) carry_states(s), join(s);
    }
    void carry_states(cudaStream_t s) {
        const unsigned jobs = (unsigned)(ordered.size() * c.hv);
        LAUNCH(hopper_grad_warm, jobs, 128, 0, s, &wa);
        ScanArgs state = ka;
        state.segments = (Segment*)d_ordered.p, state.states_out = (float*)starts.p, state.transitions = (float*)transitions.p, state.warm = (int*)warm.p;
        ReverseArgs back = ra;
        back.segments = (Segment*)d_ordered.p, back.dstates_out = (float*)ends.p, back.warm = (int*)warm_back.p;
        const int bytes = ScanSmem<128, 1, 3, false, true>::BYTES;
        const int back_bytes = REVERSE_BYTES<128, 1, 3>;
        beside(
            s, [&](cudaStream_t s) { LAUNCH(BY_TYPE(c.f16, hopper_grad_state, ), jobs * (c.v / 64 + c.k / 64), 256, bytes, s, &state, &km); },
            [&](cudaStream_t s) { LAUNCH(BY_TYPE(c.f16, hopper_reverse_state, ), jobs * (c.v / 64), 256, back_bytes, s, &back, &rm); });
    }
    void join(cudaStream_t s) {
        const unsigned x = (unsigned)(cuts.size() * c.hv), y = c.v / CARRY_COLUMNS;
        beside(
            s, [&](cudaStream_t s) { LAUNCH2((Kernel)hopper_grad_carry_k128, x, y, carry_threads(128), (CarrySmem<128>::BYTES), s, &ca); },
            [&](cudaStream_t s) { LAUNCH2((Kernel)hopper_reverse_carry_k128, x, y, carry_threads(128), (CarrySmem<128>::BYTES), s, &cb); });
    }
    unsigned scan_blocks() const { return (unsigned)(segments.size() * c.hv * (c.v / 64 / wg)); }
    void keep(cudaStream_t s) {
        const int bytes = wg == 2 ? ScanSmem<128, 2, 3, false, true, true>::BYTES : ScanSmem<128, 1, 3, false, true, true>::BYTES;
        const Kernel kernel = wg == 2 ? BY_TYPE(c.f16, hopper_keep, _w2) : BY_TYPE(c.f16, hopper_keep, _w1);
        ScanArgs args = ka;
        LAUNCH(kernel, scan_blocks(), (wg + 1) * 128, bytes, s, &args, &km);
    }
    void reverse(cudaStream_t s) {
        const int bytes = wg == 2 ? REVERSE_BYTES<128, 2, 2> : REVERSE_BYTES<128, 1, 3>;
        const Kernel kernel = wg == 2 ? BY_TYPE(c.f16, hopper_reverse, _w2) : BY_TYPE(c.f16, hopper_reverse, _w1);
        LAUNCH(kernel, scan_blocks(), (wg + 1) * 128, bytes, s, &ra, &rm);
    }
    void gradients(cudaStream_t s) {
        const int bytes = c.v == 128 ? GradientSmem<128, 128>::BYTES : GradientSmem<128, 64>::BYTES;
        const Kernel kernel = c.f16 ? c.v == 128 ? (Kernel)hopper_gradients_f16_k128_v128 : (Kernel)hopper_gradients_f16_k128_v64
                                    : c.v == 128 ? (Kernel)hopper_gradients_bf16_k128_v128 : (Kernel)hopper_gradients_bf16_k128_v64;
        const size_t blocks = std::min<size_t>(multiprocessors(), chunks.size() * c.hk);
        const int careful_bytes = c.v == 128 ? CarefulSmem<128, 128>::BYTES : CarefulSmem<128, 64>::BYTES;
        const Kernel careful = c.v == 128 ? (Kernel)hopper_gradients_careful_bf16_k128_v128 : (Kernel)hopper_gradients_careful_bf16_k128_v64;
        beside(
            s, [&](cudaStream_t s) { LAUNCH(kernel, blocks, 384, bytes, s, &ga, &gm); },
            [&](cudaStream_t s) {
                if (!c.f16) LAUNCH(careful, blocks, 256, careful_bytes, s, &ga, &gm);
            });
    }
    void scans(cudaStream_t s) { beside(s, [&](cudaStream_t s) { keep(s); }, [&](cudaStream_t s) { reverse(s); }); }
    void all(cudaStream_t s) { prepare(s), carry(s), scans(s), gradients(s); }

    // Products of all four kernels; bytes that must come from and go to memory, and those that these kernels move.
    double flops() const {
        const double C = CHUNK, kd = c.k, vd = c.v;
        return 2.0 * tokens * c.hv * (8 * kd * vd + C * (3 * kd + 5 * vd)) + 2.0 * tokens * c.hk * C * 4 * kd;
    }
    double bytes() const { return 2.0 * tokens * (4.0 * c.hk * c.k + 3.0 * c.hv * c.v) + 16.0 * tokens * c.hv + 12.0 * n * c.hv * c.k * c.v; }
    double moved() const {
        const double of_k = 2.0 * tokens * c.hk * c.k, of_v = 2.0 * tokens * c.hv * c.v, kept = (c.f16 ? 2.0 : 3.0) * tokens / CHUNK * c.hv * c.k * c.v;
        const double image = (double)tokens / CHUNK * c.hv;
        return 9 * of_k + 7 * of_v + 4 * kept + image * (GRAD_BYTES + (PANEL + 1024) + (2 * PANEL + 1024) + 2048);
    }
};

struct Host {
    vector<double> q, k, v, d_o, dq, dk, dv;
    vector<float> g, beta, h0, dht, dg, dbeta, dh0;
    explicit Host(const Run& r) {
        const bool f = r.c.f16;
        q = read16(r.q, f), k = read16(r.k, f), v = read16(r.v, f), d_o = read16(r.d_o, f), dq = read16(r.dq, f), dk = read16(r.dk, f), dv = read16(r.dv, f);
        g = read32(r.g), beta = read32(r.beta), h0 = read32(r.h0), dht = read32(r.dht), dg = read32(r.dg), dbeta = read32(r.dbeta), dh0 = read32(r.dh0);
    }
};

struct Sum {
    double err = 0, ref = 0;
    void add(double got, double want) {
        // Not a number must count: a comparison with NaN is false.
        double e = got - want;
        err += e * e, ref += want * want;
    }
    double value() const { return err == 0 ? 0 : sqrt(err / std::max(ref, 1e-300)); }
};
enum { DQ, DK, DV, DG, DBETA, DH0, OUTPUTS };
static const char* output_names[] = {"dq", "dk", "dv", "dg", "dbeta", "dh0"};
typedef std::array<Sum, OUTPUTS> Sums;

// A row as the operator sees it, and 1 / its length.
static double unit_row(const double* x, int k, bool l2norm, double* y) {
    double sum = 1e-6;
    for (int i = 0; i < k; i++) sum += x[i] * x[i];
    const double r = l2norm ? 1 / sqrt(sum) : 1;
    for (int i = 0; i < k; i++) y[i] = x[i] * r;
    return r;
}

// The backward of one sequence and key head, token by token, for all its value heads; errors by chunk.
static void reference(const Run& r, const Host& x, int s, int kh, vector<Sums>& by_chunk, Sums& total) {
    const Case& c = r.c;
    const int K = c.k, V = c.v, T = c.lens[s], group = c.hv / c.hk, chunks = (T + CHUNK - 1) / CHUNK;
    const double scale = 1.0 / sqrt((double)K);
    const size_t n = (size_t)K * V;
    by_chunk.resize(std::max(1, chunks));
    vector<double> dq((size_t)T * K, 0.0), dk((size_t)T * K, 0.0), qs((size_t)T * K), ks((size_t)T * K), rq(T), rk(T);
    for (int t = 0; t < T; t++) {
        const size_t at = ((size_t)(r.cu[s] + t) * c.hk + kh) * K;
        rq[t] = unit_row(&x.q[at], K, c.l2norm, &qs[(size_t)t * K]), rk[t] = unit_row(&x.k[at], K, c.l2norm, &ks[(size_t)t * K]);
    }
    for (int m = 0; m < group; m++) {
        const int h = c.mod ? kh + m * c.hk : kh * group + m;
        const size_t state_at = ((size_t)s * c.hv + h) * n;
        vector<double> S(n, 0.0), dS(n, 0.0), err(V), u(V), du(V);
        vector<vector<double>> starts(chunks), inside(CHUNK + 1, vector<double>(n));
        if (c.states)
            for (size_t i = 0; i < n; i++) S[i] = x.h0[state_at + i], dS[i] = x.dht[state_at + i];
        // One token forward; `err` is v less what the state says.
        auto step = [&](int t) {
            const size_t row = r.cu[s] + t;
            const double *k = &ks[(size_t)t * K], *v = &x.v[(row * c.hv + h) * V], decay = exp((double)x.g[row * c.hv + h]), beta = x.beta[row * c.hv + h];
            for (int j = 0; j < V; j++) err[j] = v[j];
            for (int i = 0; i < K; i++)
                for (int j = 0; j < V; j++) S[(size_t)i * V + j] *= decay, err[j] -= k[i] * S[(size_t)i * V + j];
            for (int i = 0; i < K; i++)
                for (int j = 0; j < V; j++) S[(size_t)i * V + j] += k[i] * beta * err[j];
        };
        for (int t = 0; t < T; t++) {
            if (t % CHUNK == 0) starts[t / CHUNK] = S;
            step(t);
        }
        for (int n_chunk = chunks - 1; n_chunk >= 0; n_chunk--) {
            const int t0 = n_chunk * CHUNK, t1 = std::min(T, t0 + CHUNK);
            S = starts[n_chunk];
            vector<vector<double>> errs;
            inside[0] = S;
            for (int t = t0; t < t1; t++) step(t), inside[t + 1 - t0] = S, errs.push_back(err);
            for (int t = t1 - 1; t >= t0; t--) {
                const size_t row = r.cu[s] + t;
                const double *q = &qs[(size_t)t * K], *k = &ks[(size_t)t * K], *d_o = &x.d_o[(row * c.hv + h) * V];
                const double decay = exp((double)x.g[row * c.hv + h]), beta = x.beta[row * c.hv + h];
                const vector<double>&before = inside[t - t0], &after = inside[t + 1 - t0], &e = errs[t - t0];
                double *dqt = &dq[(size_t)t * K], *dkt = &dk[(size_t)t * K];
                std::fill(du.begin(), du.end(), 0.0);
                for (int i = 0; i < K; i++) {
                    double* d = &dS[(size_t)i * V];
                    double a = 0, b = 0;
                    for (int j = 0; j < V; j++) {
                        a += after[(size_t)i * V + j] * d_o[j], d[j] += scale * q[i] * d_o[j];
                        b += d[j] * beta * e[j], du[j] += d[j] * k[i];
                    }
                    dqt[i] += scale * a, dkt[i] += b;
                }
                double dbeta = 0, dg = 0;
                for (int j = 0; j < V; j++) {
                    dbeta += du[j] * e[j], u[j] = beta * du[j];
                    by_chunk[n_chunk][DV].add(x.dv[(row * c.hv + h) * V + j], u[j]);
                }
                for (int i = 0; i < K; i++) {
                    double* d = &dS[(size_t)i * V];
                    double b = 0;
                    for (int j = 0; j < V; j++) {
                        const double decayed = decay * before[(size_t)i * V + j];
                        d[j] -= k[i] * u[j], b += decayed * u[j], dg += d[j] * decayed, d[j] *= decay;
                    }
                    dkt[i] -= b;
                }
                by_chunk[n_chunk][DG].add(x.dg[row * c.hv + h], dg), by_chunk[n_chunk][DBETA].add(x.dbeta[row * c.hv + h], dbeta);
            }
        }
        for (size_t i = 0; i < n; i++) by_chunk[0][DH0].add(x.dh0[state_at + i], dS[i]);
    }
    for (int t = 0; t < T; t++) {
        const size_t at = ((size_t)(r.cu[s] + t) * c.hk + kh) * K;
        auto compare = [&](double* d, const double* y, double norm, const vector<double>& got, int what) {
            double dot = 0;
            if (c.l2norm)
                for (int i = 0; i < K; i++) dot += d[i] * y[i];
            for (int i = 0; i < K; i++) by_chunk[t / CHUNK][what].add(got[at + i], norm * (d[i] - y[i] * dot));
        };
        compare(&dq[(size_t)t * K], &qs[(size_t)t * K], rq[t], x.dq, DQ);
        compare(&dk[(size_t)t * K], &ks[(size_t)t * K], rk[t], x.dk, DK);
    }
    for (const Sums& one : by_chunk)
        for (int o = 0; o < OUTPUTS; o++) total[o].err += one[o].err, total[o].ref += one[o].ref;
}

static bool check(const Case& c, int repeats, int seed) {
    Run r(c, seed);
    vector<Buffer> first(r.outputs().size());
    int differ = 0;
    for (int n = 0; n < repeats; n++) {
        r.poison();
        r.all(0);
        finish(c.name);
        for (size_t i = 0; i < first.size(); i++) {
            Buffer& own = *r.outputs()[i];
            if (n > 0) {
                differ += !same(first[i], own);
                continue;
            }
            first[i].make(own.bytes);
            CHECK(cudaMemcpy(first[i].p, own.p, own.bytes, cudaMemcpyDeviceToDevice));
        }
    }
    Host x(r);
    // All key heads where there is little to do, else the first and the last.
    vector<std::pair<int, int>> jobs;
    for (int s = 0; s < r.n; s++)
        for (int kh = 0; kh < c.hk; kh++)
            if ((long long)r.tokens * c.hv < 40000 || kh == 0 || kh == c.hk - 1) jobs.push_back({s, kh});
    vector<vector<Sums>> by_chunk(jobs.size());
    vector<Sums> totals(jobs.size());
    parallel((int)jobs.size(), [&](int i) { reference(r, x, jobs[i].first, jobs[i].second, by_chunk[i], totals[i]); });
    Sums all;
    double worst[OUTPUTS] = {};
    for (const Sums& one : totals)
        for (int o = 0; o < OUTPUTS; o++) {
            all[o].err += one[o].err, all[o].ref += one[o].ref;
            if (!(one[o].value() <= worst[o])) worst[o] = one[o].value();
        }
    const double bound = c.f16 ? 1e-3 : 5e-3;
    bool pad_kept = true, ok = differ == 0;
    for (size_t i = (size_t)r.tokens * c.hv * c.v; i < x.dv.size(); i++) pad_kept = pad_kept && x.dv[i] != x.dv[i];
    for (size_t i = (size_t)r.tokens * c.hk * c.k; i < x.dk.size(); i++) pad_kept = pad_kept && x.dk[i] != x.dk[i] && x.dq[i] != x.dq[i];
    for (size_t i = (size_t)r.tokens * c.hv; i < x.dg.size(); i++) pad_kept = pad_kept && x.dg[i] != x.dg[i] && x.dbeta[i] != x.dbeta[i];
    for (int o = 0; o < OUTPUTS; o++) ok = ok && all[o].value() <= bound;
    ok = ok && pad_kept;
    printf("%-4s %-20s %s K%d V%d %d/%d %-7s wg%d cut%d ", ok ? "ok" : "FAIL", c.name, c.f16 ? "f16 " : "bf16", c.k, c.v, c.hk, c.hv, decay_name(c.decay), r.wg, c.cut);
    for (int o = 0; o < OUTPUTS; o++) printf(" %s %.1e (%.1e)", output_names[o], all[o].value(), worst[o]);
    printf("%s%s\n", differ ? "  RUNS DIFFER" : "", pad_kept ? "" : "  PAD WRITTEN");
    if (!ok)
        for (size_t i = 0, shown = 0; i < jobs.size() && shown < 4; i++)
            for (size_t m = by_chunk[i].size(); m-- > 0 && shown < 4;) {
                bool bad = false;
                for (int o = 0; o < OUTPUTS; o++) bad = bad || !(by_chunk[i][m][o].value() <= 2 * bound);
                if (!bad) continue;
                printf("       seq %d key head %d chunk %zu of %zu:", jobs[i].first, jobs[i].second, m, by_chunk[i].size());
                for (int o = 0; o < OUTPUTS; o++) printf(" %s %.1e", output_names[o], by_chunk[i][m][o].value());
                printf("\n"), shown++;
                break;
            }
    fflush(stdout);
    return ok;
}

static vector<Case> cases() {
    vector<Case> all;
    auto add = [&](const char* name, vector<int> lens, int hk, int hv, int k, int v, bool f16, Decay d, bool states = true, bool l2 = false, bool mod = false,
                   int pad = 0, float spread = 0, int wg = 0, int cut = 0) { all.push_back({name, lens, hk, hv, k, v, f16, d, states, l2, mod, pad, spread, wg, cut}); };
    for (int wg : {1, 2}) {
        add("one chunk, no state", {64}, 1, 1, 128, 128, false, Decay::None, false, false, false, 0, 0, wg);
        add("one chunk, state", {64}, 1, 1, 128, 128, false, Decay::Slow, true, false, false, 0, 0, wg);
        add("two chunks", {128}, 1, 1, 128, 128, false, Decay::Slow, true, false, false, 0, 0, wg);
        add("one token", {1}, 8, 16, 128, 128, false, Decay::Slow, true, false, false, 3, 0, wg);
        add("ragged", {37, 0, 64, 65, 1, 300}, 2, 4, 128, 128, false, Decay::Mixed, true, false, false, 15, 0, wg);
        add("f16", {37, 64, 300}, 2, 4, 128, 128, true, Decay::Mixed, true, false, false, 15, 0, wg);
    }
    add("V 64", {200, 64}, 2, 4, 128, 64, false, Decay::Mixed);
    add("l2norm", {300, 77}, 2, 4, 128, 128, false, Decay::Mixed, true, true);
    add("l2norm, f16", {300, 77}, 2, 4, 128, 128, true, Decay::Slow, true, true);
    add("head map mod", {200, 77}, 2, 8, 128, 128, false, Decay::Mixed, true, false, true);
    add("cliffs, -inf", {400}, 2, 4, 128, 128, false, Decay::Cliffs);
    add("cliffs, -inf, f16", {400}, 2, 4, 128, 128, true, Decay::Cliffs);
    add("bench", {500}, 2, 4, 128, 128, false, Decay::Bench);
    add("bench, f16", {500}, 2, 4, 128, 128, true, Decay::Bench);
    add("no decay", {500}, 1, 2, 128, 128, false, Decay::None);
    // One head, no decay: dg is a sum of K V products that mostly cancel, and no other head's hides it.
    for (bool f16 : {false, true}) {
        add("one head, no decay", {500}, 1, 1, 128, 128, f16, Decay::None);
        add("one head, cut", {1100}, 1, 1, 128, 128, f16, Decay::None, true, true, false, 0, 0, 0, 4);
    }
    add("keys alike", {300}, 1, 2, 128, 128, false, Decay::Slow, true, false, false, 0, 0.5f);
    for (int wg : {1, 2}) add("keys alike", {300, 65}, 2, 4, 128, 128, false, Decay::Slow, true, true, true, 7, 0.5f, wg);
    add("keys alike, V 64", {200, 64}, 1, 3, 128, 64, false, Decay::None, true, false, false, 0, 0.5f);
    add("keys alike, cut", {700, 64, 1, 129}, 2, 4, 128, 128, false, Decay::Mixed, true, false, false, 5, 0.5f, 0, 2);
    for (Decay d : {Decay::Mixed, Decay::None, Decay::Slow, Decay::Bench, Decay::Cliffs}) add("cut", {700, 64, 1, 129}, 2, 8, 128, 128, false, d, true, false, false, 5, 0, 0, 2);
    add("cut, f16", {700, 64, 0, 129}, 2, 8, 128, 128, true, Decay::Bench, true, false, false, 5, 0, 2, 2);
    add("cut, no states", {700, 64, 1, 129}, 2, 8, 128, 128, false, Decay::Bench, false, true, false, 5, 0, 0, 3);
    add("cut, V 64", {400, 129}, 2, 4, 128, 64, false, Decay::Bench, true, true, true, 0, 0, 0, 2);
    add("2048 bench", {2048}, 1, 2, 128, 128, false, Decay::Bench);
    add("4096 no decay", {4096}, 1, 2, 128, 128, false, Decay::None);
    add("4096 no decay, f16", {4096}, 1, 2, 128, 128, true, Decay::None);
    add("4096 4/8", {4096}, 4, 8, 128, 128, false, Decay::Mixed);
    add("ragged 16/32", {410, 431, 294, 991, 386, 1584}, 16, 32, 128, 128, false, Decay::Bench);
    add("32768 4/8, cut", {32768}, 4, 8, 128, 128, false, Decay::Bench, true, false, false, 0, 0, 0, 32);
    add("32768 4/8", {32768}, 4, 8, 128, 128, false, Decay::Bench);
    return all;
}

#ifndef GATEDELTA_EMULATOR
static void time_case(const char* name, const vector<int>& lens, int hk, int hv, int wg, int cut, double published, int repeats) {
    Case c{name, lens, hk, hv, 128, 128, false, Decay::Bench, true, false, false, 0, 0, wg, cut};
    Run r(c, 99);
    const double whole = time_of([&](cudaStream_t s) { r.all(s); }, repeats);
    const double parts[5] = {time_of([&](cudaStream_t s) { r.prepare(s); }, repeats), time_of([&](cudaStream_t s) { r.keep(s); }, repeats),
                             time_of([&](cudaStream_t s) { r.reverse(s); }, repeats), time_of([&](cudaStream_t s) { r.gradients(s); }, repeats),
                             time_of([&](cudaStream_t s) { r.scans(s); }, repeats)};
    const double carry = cut ? time_of([&](cudaStream_t s) { r.carry(s); }, repeats) : 0, join = cut ? time_of([&](cudaStream_t s) { r.join(s); }, repeats) : 0;
    const double bw = bandwidth();
    printf("%-9s %2d/%-2d wg%d cut%-3d %.4f ms (prepare %.4f, carry %.4f with %.4f to join, keep %.4f, reverse %.4f, both %.4f, gradients %.4f)  by FLOP %.3f, by bytes %.3f, bytes moved %.3f; FlashQLA on an H200 %.3f, x%.2f\n",
           name, hk, hv, r.wg, cut, whole, parts[0], carry, join, parts[1], parts[2], parts[4], parts[3], r.flops() / 790e9, r.bytes() / bw * 1e3, r.moved() / bw * 1e3, published, published / whole);
    finish(name);
    fflush(stdout);
}

static void time_all(int wg, int cut) {
    struct Row {
        const char* name;
        vector<int> lens;
        double published[4];  // of 16/32, 8/16, 4/8, 2/4
    };
    const Row rows[] = {
        {"32k_1seq", {32768}, {2.515, 1.377, 0.887, 0.548}},
        {"8k_1seq", {8192}, {0.789, 0.452, 0.321, 0.29}},
        {"32k_8seq", {3274, 1029, 2909, 5061, 2011, 3793, 9932, 4759}, {2.893, 1.541, 0.841, 0.547}},
        {"8k_8seq", {161, 1928, 3157, 563, 1244, 229, 177, 733}, {0.759, 0.697, 0.395, 0.268}},
        {"8k_2seq", {7053, 1139}, {0.87, 0.532, 0.377, 0.29}},
        {"8k_4seq", {5809, 1244, 406, 733}, {1.259, 0.589, 0.405, 0.286}},
        {"32k_2seq", {7212, 25556}, {2.581, 1.41, 0.889, 0.541}},
        {"32k_4seq", {7212, 7072, 13725, 4759}, {2.978, 1.562, 0.85, 0.536}},
    };
    printf("copy %.2f TB/s\n", bandwidth() / 1e12);
    for (const Row& row : rows)
        for (int i = 0; i < 4; i++) {
            const int own = cut >= 0 ? cut : best_cut(row.lens, 32 >> i);
            time_case(row.name, row.lens, 16 >> i, 32 >> i, wg, own, row.published[i], 20);
            if (cut < 0 && own) time_case(row.name, row.lens, 16 >> i, 32 >> i, wg, 0, row.published[i], 20);
        }
}
#endif

int main(int argc, char** argv) {
    std::string what = argc > 1 ? argv[1] : "check";
    describe();
    if (what == "check") {
        int from = argc > 2 ? atoi(argv[2]) : 0, to = argc > 3 ? atoi(argv[3]) : 1 << 30, seed = argc > 4 ? atoi(argv[4]) : 1234, failed = 0, n = 0;
        for (const Case& c : cases()) {
            if (n >= from && n < to) failed += !check(c, 2, seed);
            n++;
        }
        printf("%d failed\n", failed);
        return failed != 0;
    }
#ifndef GATEDELTA_EMULATOR
    if (what == "time") return time_all(argc > 2 ? atoi(argv[2]) : 0, argc > 3 ? atoi(argv[3]) : -1), 0;
#endif
    if (what == "one" && argc > 6) {  // length, sequences, Hk, Hv, consumers, chunks of a segment: one pass, for a profiler
        Case c{"one", vector<int>(atoi(argv[3]), atoi(argv[2])), atoi(argv[4]), atoi(argv[5]), 128, 128, false, Decay::Bench, true, false, false, 0, 0, atoi(argv[6]), argc > 7 ? atoi(argv[7]) : 0};
        Run r(c, 99);
        r.all(0);
        finish("one");
        return 0;
    }
    fprintf(stderr, "backward: expected check, time or one, found %s\n", what.c_str());
    return 2;
}
