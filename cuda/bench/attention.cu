// Softmax attention of a prefill on its own: checks partial results against float64, then times whole passes, the kernel on the matrix
// units (attention_mma.cu) beside the template of attention.cu with 32 query rows, which it replaced.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_80,code=sm_90 -o attention cuda/bench/attention.cu && ./attention [check [CASES]|time]
//
// The check runs without a GPU too, if slowly, as those of hopper/bench do (tests/cuda/emulator/runtime.h).
// time: a pass of so many tokens at a position over the pages of a cache, all launches of one layer; `wanted`: blocks that a page is cut
// into (src/tune.rs). TFLOP/s count 4 D for each query row and key that it sees, once, whatever the parts of operands.
#include "../hopper/bench/support.h"

#include <string>

#include "../attend.cuh"
#include "../mma.cuh"
#include "../reduce.cuh"

namespace general {
#include "../attention.cu"
KERNEL(bench_attend_f32_q32_d256, attend, 128) { attend<F32, 32, 128, 256>(l); }
KERNEL(bench_attend_f16_q32_d256, attend, 128) { attend<F16, 32, 128, 256>(l); }
KERNEL(bench_attend_bf16_q32_d256, attend, 128) { attend<Bf16, 32, 128, 256>(l); }
}  // namespace general
#undef ATTEND_KERNELS
namespace matrix {
#include "../attention_mma.cu"
}  // namespace matrix

using std::vector;

constexpr u32 D = 256;
const char* const NAMES[3] = {"f32", "f16", "bf16"};

struct Kernel {
    const void* body;
    u32 tile, threads, bytes;
};

static Kernel kernel_of(bool mma, int type) {
    if (mma) {
        typedef matrix::Shared<F32, D> Wide;
        typedef matrix::Shared<matrix::Half, D> Narrow;
        if (type == 0) return {(const void*)matrix::attend_mma_f32_d256, 64, 256, sizeof(Wide)};
        return {(const void*)matrix::attend_mma_half_d256, 64, 256, sizeof(Narrow)};
    }
    const void* all[3] = {(const void*)general::bench_attend_f32_q32_d256, (const void*)general::bench_attend_f16_q32_d256,
                          (const void*)general::bench_attend_bf16_q32_d256};
    return {all[type], 32, 128, 0};
}

static float stored(int type, float x, uint16_t* bits) {
#ifdef GATEDELTA_EMULATOR
    *bits = type == 1 ? F16::stored(x) : Bf16::stored(x);
    return type == 1 ? F16::number(*bits) : Bf16::number(*bits);
#else
    const __half_raw half = __float2half_rn(x);
    const __nv_bfloat16_raw brain = __float2bfloat16_rn(x);
    *bits = type == 1 ? half.x : brain.x;
    return type == 1 ? __half2float(half) : __bfloat162float(brain);
#endif
}

static void launch(const Kernel& kernel, u32 x, u32 y, u32 z, row::attend::Launch& l, cudaStream_t stream) {
#ifdef GATEDELTA_EMULATOR
    const uint32_t grid[3] = {x, y, z};
    if (!emulator::run_grid((void (*)(const void*))kernel.body, &l, grid, kernel.threads, kernel.bytes)) emulator_error() = 1;
#else
    void* args[] = {&l};
    CHECK(cudaFuncSetAttribute(kernel.body, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)kernel.bytes));
    CHECK(cudaLaunchKernel(kernel.body, dim3(x, y, z), dim3(kernel.threads), args, kernel.bytes, stream));
#endif
}

// Numbers that are about normal, the same for the same seed.
static vector<float> numbers(size_t n, uint32_t seed, float factor) {
    vector<float> x(n);
    uint64_t s = seed * 0x9e3779b97f4a7c15ull + 1;
    for (float& y : x) {
        float sum = 0;
        for (int i = 0; i < 4; i++) {
            s = s * 6364136223846793005ull + 1442695040888963407ull;
            sum += (float)(s >> 40) * (1.f / (1 << 24)) - 0.5f;
        }
        y = factor * 1.73f * sum;
    }
    return x;
}

struct PageOf {
    u32 start, len, span, splits, slot0;
};

// A pass of `tokens` tokens from `from` on.
struct Pass {
    int type;
    u32 tokens, heads, kv, from, page, slots = 0;
    vector<PageOf> pages;
    vector<float> q, k, v;
    Buffer dq, dk, dv, dpos, part;

    Pass(int type, u32 tokens, u32 heads, u32 kv, u32 from, u32 page, float sharp)
        : type(type), tokens(tokens), heads(heads), kv(kv), from(from), page(page) {
        const u32 end = from + tokens;
        q = numbers((size_t)tokens * heads * D, 1, sharp);
        k = numbers((size_t)end * kv * D, 2, 1), v = numbers((size_t)end * kv * D, 3, 1);
        vector<u32> pos(tokens);
        for (u32 i = 0; i < tokens; i++) pos[i] = from + i;
        put(dq, q.data(), q.size() * 4), put(dpos, pos.data(), tokens * 4);
        cache(dk, k), cache(dv, v);
    }
    static void put(Buffer& b, const void* x, size_t bytes) {
        b.make(bytes);
        CHECK(cudaMemcpy(b.p, x, bytes, cudaMemcpyHostToDevice));
    }
    void cache(Buffer& b, vector<float>& x) {
        if (type == 0) return put(b, x.data(), x.size() * 4);
        vector<uint16_t> bits(x.size());
        for (size_t i = 0; i < x.size(); i++) x[i] = stored(type, x[i], &bits[i]);
        put(b, bits.data(), bits.size() * 2);
    }
    // Cuts the pages as src/tune.rs does: each is as long as all before it, in about `wanted` blocks.
    void cut(u32 tile, u32 wanted) {
        const u32 end = from + tokens, rows = tokens * (heads / kv);
        const uint64_t cells = (uint64_t)((rows + tile - 1) / tile) * kv, slot = (uint64_t)tokens * heads * (D + 2) * 4;
        pages.clear(), slots = 0;
        for (u32 start = 0, len = page; start < end; start += len, len = start) {
            const u32 keys = std::min(end - start, len);
            const uint64_t splits = std::clamp<uint64_t>(std::min(wanted / cells, (16u << 20) / slot), 1, 64);
            const u32 span = (std::max<u32>((u32)((keys + splits - 1) / splits), 64) + 31) / 32 * 32, n = (keys + span - 1) / span;
            pages.push_back({start, len, span, n, slots});
            slots += n;
        }
        CHECK(cudaFree(part.p));
        part.make((size_t)tokens * heads * slots * (D + 2) * 4);
    }
    void run(const Kernel& kernel, cudaStream_t stream) {
        for (const PageOf& p : pages) {
            row::attend::Launch l = {};
            const size_t first = (size_t)p.start * kv * D * (type == 0 ? 4 : 2);
            l.m = {dq.p, (char*)dk.p + first, (char*)dv.p + first, dpos.p, part.p};
            l.c = {D, (u32)type, kernel.tile, KT, kernel.threads};
            l.p = {tokens, heads, kv, p.start, std::min(p.len, from + tokens - p.start), p.span, p.slot0, slots, 0.0625f};
            const u32 rows = tokens * (heads / kv);
            launch(kernel, (rows + kernel.tile - 1) / kernel.tile, kv, p.splits, l, stream);
        }
    }
    vector<float> read() {
        vector<float> x(part.bytes / 4);
        CHECK(cudaMemcpy(x.data(), part.p, part.bytes, cudaMemcpyDeviceToHost));
        return x;
    }
    double flops() const {
        double n = 0;
        for (u32 i = 0; i < tokens; i++) n += from + i + 1;
        return n * heads * D * 4;
    }
    // The relative L2 error of acc / l over some of the rows, splits put together.
    double error(const vector<float>& found) const {
        double difference = 0, size = 0;
        const u32 some = std::min(tokens * heads, 96u);
        for (u32 n = 0; n < some; n++) {
            const u32 at = (u32)((uint64_t)n * (tokens * heads - 1) / std::max(1u, some - 1));
            const u32 t = at / heads, h = at % heads, c = h / (heads / kv);
            vector<double> score(from + t + 1), y(D, 0), sum(D, 0);
            double most = -1e300, l = 0, m = -1e300, total = 0;
            for (u32 p = 0; p <= from + t; p++) {
                double s = 0;
                for (u32 i = 0; i < D; i++) s += (double)q[(size_t)at * D + i] * k[((size_t)p * kv + c) * D + i];
                score[p] = 0.0625 * s, most = std::max(most, score[p]);
            }
            for (u32 p = 0; p <= from + t; p++) {
                const double e = exp(score[p] - most);
                l += e;
                for (u32 i = 0; i < D; i++) y[i] += e * v[((size_t)p * kv + c) * D + i];
            }
            const float* parts = found.data() + (size_t)at * slots * (D + 2);
            for (u32 s = 0; s < slots; s++) m = std::max(m, (double)parts[(size_t)s * (D + 2)]);
            for (u32 s = 0; s < slots; s++) {
                const float* p = parts + (size_t)s * (D + 2);
                const double e = exp(p[0] - m);
                total += e * p[1];
                for (u32 i = 0; i < D; i++) sum[i] += e * p[2 + i];
            }
            for (u32 i = 0; i < D; i++) {
                const double a = y[i] / l, b = sum[i] / total;
                difference += (a - b) * (a - b), size += a * a;
            }
        }
        return sqrt(difference / size);
    }
};

// The first `most` of the cases, each of all kernels.
static int check(int most) {
    int failed = 0;
    struct Case {
        u32 tokens, heads, kv, from, page;
        float sharp;
    };
    const Case cases[] = {{5, 4, 2, 0, 64, 1},      {70, 6, 2, 37, 100, 1},    {512, 8, 2, 0, 1024, 1},
                          {333, 5, 1, 500, 256, 1}, {512, 8, 2, 7680, 1024, 1}, {512, 8, 2, 1500, 1024, 8}};
    for (const Case& c : cases) {
        if (most-- <= 0) break;
        for (int type = 0; type < 3; type++)
            for (int mma = 0; mma < 2; mma++) {
                Pass pass(type, c.tokens, c.heads, c.kv, c.from, c.page, c.sharp);
                const Kernel kernel = kernel_of(mma, type);
                pass.cut(kernel.tile, mma ? 128 : 512);
                vector<float> out[2];
                for (vector<float>& x : out) {
                    CHECK(cudaMemset(pass.part.p, 0xff, pass.part.bytes));
                    pass.run(kernel, 0);
                    finish("attention");
                    x = pass.read();
                }
                const double e = pass.error(out[0]);
                const bool same = memcmp(out[0].data(), out[1].data(), out[0].size() * 4) == 0, good = e <= 1e-5 && same;
                printf("%s %-4s %-7s %4u tokens at %4u, %u/%u, q x %.0f: %.2e%s\n", good ? "ok  " : "FAIL", NAMES[type],
                       mma ? "matrix" : "general", c.tokens, c.from, c.heads, c.kv, c.sharp, e, same ? "" : ", other bits the second time");
                fflush(stdout);
                failed += !good;
            }
    }
    printf("%d failed\n", failed);
    return failed != 0;
}

#ifndef GATEDELTA_EMULATOR
static void time_all() {
    printf("8/2 heads, dim %u; ms of one layer's launches, TFLOP/s\n", D);
    for (int type : {0, 2})
        for (u32 tokens : {512u, 2048u})
            for (u32 from : {0u, 4096u, 8192u - tokens}) {
                Pass pass(type, tokens, 8, 2, from, type == 0 ? 1024 : 2048, 1);
                auto line = [&](bool mma, u32 wanted) {
                    const Kernel kernel = kernel_of(mma, type);
                    pass.cut(kernel.tile, wanted);
                    const double ms = time_of([&](cudaStream_t s) { pass.run(kernel, s); }, 20);
                    printf("%-4s %4u tokens at %4u  %-7s wanted %4u, %2u slots: %7.3f ms %6.1f TFLOP/s\n", NAMES[type], tokens, from,
                           mma ? "matrix" : "general", wanted, pass.slots, ms, pass.flops() / ms / 1e9);
                    fflush(stdout);
                };
                line(false, 512);
                for (u32 wanted : {128u, 256u, 512u}) line(true, wanted);
            }
}

#endif

int main(int argc, char** argv) {
    const std::string what = argc > 1 ? argv[1] : "all";
    describe();
    int failed = 0;
    if (what != "time") failed = check(argc > 2 ? atoi(argv[2]) : 1 << 30);
#ifndef GATEDELTA_EMULATOR
    if (what != "check") time_all();
#endif
    return failed;
}
