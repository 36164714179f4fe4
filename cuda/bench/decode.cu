// A step of decode on its own (gdn_step.cu, bf16, K = V = 128, one token a sequence): checks it against float64, then times it beside a copy
// of the state in place, which moves the same bytes, and an empty kernel with as many blocks.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_80,code=sm_90 -o decode cuda/bench/decode.cu && ./decode [check|time]
//
// The check runs without a GPU too, as that of attention.cu does. Before each time 256 MB are written and as many read: nothing is left in
// the caches that must be written back.
#include "../hopper/bench/support.h"

#include <string>

#include "../gdn_step.cu"

using std::vector;

constexpr u32 K = 128, V = 128, COLUMNS = 64, THREADS = 128;

static uint16_t brain(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}
static float number(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// Numbers in -1 .. 1, as bf16 stores them, the same for the same seed.
static vector<float> numbers(size_t n, uint32_t seed) {
    vector<float> x(n);
    uint64_t s = seed * 0x9e3779b97f4a7c15ull + 1;
    for (float& y : x) {
        s = s * 6364136223846793005ull + 1442695040888963407ull;
        y = number(brain((float)(int64_t)(s >> 32) * (1.f / (1u << 31)) - 1.f));
    }
    return x;
}

struct Step {
    u32 hk, hv, batch;
    vector<float> q, k, v, g, beta, h0;
    Buffer dq, dk, dv, dg, dbeta, dseqs, dstate, d_o;
    row::gdn_step::Launch l = {};

    Step(u32 hk, u32 hv, u32 batch) : hk(hk), hv(hv), batch(batch) {
        q = numbers((size_t)batch * hk * K, 1), k = numbers((size_t)batch * hk * K, 2), v = numbers((size_t)batch * hv * V, 3);
        g = numbers((size_t)batch * hv, 4), beta = numbers((size_t)batch * hv, 5), h0 = numbers((size_t)batch * hv * K * V, 6);
        for (float& x : g) x = -x * x;
        for (float& x : beta) x = x * x;
        put16(dq, q), put16(dk, k), put16(dv, v), put(dg, g.data(), g.size() * 4), put(dbeta, beta.data(), beta.size() * 4);
        vector<uint32_t> seqs;
        // The states of the sequences, the last one first.
        for (u32 i = 0; i < batch; i++) seqs.insert(seqs.end(), {i, 1, batch - 1 - i, 0});
        put(dseqs, seqs.data(), seqs.size() * 4), dstate.make(h0.size() * 4), d_o.make(v.size() * 2);
        l.m = {dq.p, dk.p, dv.p, (float*)dg.p, (float*)dbeta.p, dseqs.p, dstate.p, d_o.p};
        l.c.dk = K, l.c.dv_tile = COLUMNS, l.c.l2norm = 1, l.c.store = 1, l.c.lanes = THREADS;
        l.p.hk = hk, l.p.hv = hv, l.p.dv = V, l.p.scale = 0.088388346f;
        l.p.q_stride = l.p.k_stride = hk * K, l.p.v_stride = l.p.o_stride = hv * V;
    }
    static void put(Buffer& b, const void* x, size_t bytes) {
        b.make(bytes);
        CHECK(cudaMemcpy(b.p, x, bytes, cudaMemcpyHostToDevice));
    }
    static void put16(Buffer& b, const vector<float>& x) {
        vector<uint16_t> bits(x.size());
        for (size_t i = 0; i < x.size(); i++) bits[i] = brain(x[i]);
        put(b, bits.data(), bits.size() * 2);
    }
    void run(cudaStream_t stream) {
#ifdef GATEDELTA_EMULATOR
        const uint32_t grid[3] = {V / COLUMNS, hv, batch};
        if (!emulator::run_grid((void (*)(const void*))gdn_step_bf16_k128_v64, &l, grid, THREADS, 0)) emulator_error() = 1;
#else
        void* args[] = {&l};
        CHECK(cudaLaunchKernel((const void*)gdn_step_bf16_k128_v64, dim3(V / COLUMNS, hv, batch), dim3(THREADS), args, 0, stream));
#endif
    }
    // The larger relative error of o and of the states.
    double error() {
        CHECK(cudaMemcpy(dstate.p, h0.data(), dstate.bytes, cudaMemcpyHostToDevice));
        CHECK(cudaMemset(d_o.p, 0xff, d_o.bytes));
        run(0);
        finish("decode");
        vector<float> state(h0.size());
        vector<uint16_t> o(v.size());
        CHECK(cudaMemcpy(state.data(), dstate.p, dstate.bytes, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(o.data(), d_o.p, d_o.bytes, cudaMemcpyDeviceToHost));
        double of_o[2] = {}, of_state[2] = {};
        for (u32 n = 0; n < batch * hv; n++) {
            const u32 t = n / hv, h = n % hv, kh = h / (hv / hk);
            const float *qs = &q[((size_t)t * hk + kh) * K], *ks = &k[((size_t)t * hk + kh) * K];
            const size_t at = (size_t)(batch - 1 - t) * hv + h;
            double qq = 1e-6, kk = 1e-6;
            for (u32 i = 0; i < K; i++) qq += (double)qs[i] * qs[i], kk += (double)ks[i] * ks[i];
            for (u32 c = 0; c < V; c++) {
                const double e = exp((double)g[n]);
                double sk = 0, so = 0;
                for (u32 i = 0; i < K; i++) sk += e * h0[(at * K + i) * V + c] * ks[i] / sqrt(kk);
                const double d = beta[n] * (v[(size_t)n * V + c] - sk);
                for (u32 i = 0; i < K; i++) {
                    const double s = e * h0[(at * K + i) * V + c] + ks[i] / sqrt(kk) * d, x = s - state[(at * K + i) * V + c];
                    so += s * qs[i] / sqrt(qq) * l.p.scale;
                    of_state[0] += x * x, of_state[1] += s * s;
                }
                const double x = so - number(o[(size_t)n * V + c]);
                of_o[0] += x * x, of_o[1] += so * so;
            }
        }
        // o is rounded to bf16, the states are not: bounds of 5e-3 and 1e-5.
        return std::max(sqrt(of_o[0] / of_o[1]) / 500, sqrt(of_state[0] / of_state[1]));
    }
};

static int check() {
    int failed = 0;
    for (auto [hk, hv, batch] : {std::array<u32, 3>{1, 1, 3}, {2, 2, 1}, {2, 6, 5}, {4, 16, 2}}) {
        const double e = Step(hk, hv, batch).error();
        printf("%s %u/%u, batch %u: %.1e\n", e <= 1e-5 ? "ok  " : "FAIL", hk, hv, batch, e);
        failed += !(e <= 1e-5);
    }
    return failed;
}

#ifndef GATEDELTA_EMULATOR
__global__ void empty(const __grid_constant__ row::gdn_step::Launch l) {
    if (l.p.hk == 0) *(float*)l.m.o = 0.f;
}
// A block's [128, 64] numbers.
__global__ void __launch_bounds__(THREADS) copy_in_place(float4* state) {
    float4 x[16];
    float4* p = state + (size_t)blockIdx.x * (K * COLUMNS / 4) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = p[i * THREADS];
#pragma unroll
    for (int i = 0; i < 16; i++) x[i].x += 1.f, p[i * THREADS] = x[i];
}
__global__ void sum_all(const float4* x, float* sum, size_t n) {
    float s = 0.f;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) s += x[i].x + x[i].w;
    if (s == 1.5f) *sum = s;
}

// Microseconds of a replayed graph: the median of 100.
static double time_of_step(const std::function<void(cudaStream_t)>& work) {
    static Buffer written, read;
    if (!written.p) {
        written.make(256u << 20), read.make(256u << 20);
        CHECK(cudaMemset(read.p, 0, read.bytes));
    }
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamCreate(&s));
    CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    work(s);
    CHECK(cudaStreamEndCapture(s, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b;
    CHECK(cudaEventCreate(&a));
    CHECK(cudaEventCreate(&b));
    vector<float> us;
    for (int n = 0; n < 100; n++) {
        CHECK(cudaMemsetAsync(written.p, n, written.bytes, s));
        sum_all<<<1056, 256, 0, s>>>((const float4*)read.p, (float*)written.p, read.bytes / 16);
        CHECK(cudaEventRecord(a, s));
        CHECK(cudaGraphLaunch(exec, s));
        CHECK(cudaEventRecord(b, s));
        CHECK(cudaStreamSynchronize(s));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, a, b));
        us.push_back(ms * 1e3f);
    }
    CHECK(cudaEventDestroy(a));
    CHECK(cudaEventDestroy(b));
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(s));
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
}

static void time_all() {
    for (auto [hk, hv, batch] : {std::array<u32, 3>{16, 16, 1}, {16, 16, 32}, {16, 32, 32}, {16, 64, 32}, {16, 32, 128}}) {
        Step step(hk, hv, batch);
        CHECK(cudaMemset(step.dstate.p, 0, step.dstate.bytes));
        const u32 blocks = batch * hv * V / COLUMNS;
        const double mb = 2e-6 * step.dstate.bytes;
        const double nothing = time_of_step([&](cudaStream_t s) { empty<<<dim3(V / COLUMNS, hv, batch), THREADS, 0, s>>>(step.l); });
        const double copy = time_of_step([&](cudaStream_t s) { copy_in_place<<<blocks, THREADS, 0, s>>>((float4*)step.dstate.p); });
        const double own = time_of_step([&](cudaStream_t s) { step.run(s); });
        printf("%u/%u, batch %3u, %6.1f MB of states: empty %5.2f us, copy in place %6.2f us, step %6.2f us, %.2f TB/s\n", hk, hv, batch, mb, nothing, copy, own, mb / own);
        finish("decode");
    }
}
#endif

int main(int argc, char** argv) {
    const std::string what = argc > 1 ? argv[1] : "all";
    describe();
    int failed = 0;
    if (what != "time") failed = check();
#ifndef GATEDELTA_EMULATOR
    if (what != "check") time_all();
#endif
    return failed;
}
