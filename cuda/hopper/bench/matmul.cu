// Tests and times the Hopper matrix product beside the general one: a program of its own, beside the crate.
//
//   nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 -Xcompiler -O3,-pthread -DHOPPER_ALL -o matmul matmul.cu ../matmul_mma.cu bench/matmul.cu
//   ./matmul check             some shapes against float64, every kernel
//   ./matmul time              the products of the 0.8B model's layers: milliseconds, TFLOP/s (2 m n k a second)
//   ./matmul one M N K KERNEL  a single product twice, for a profiler; KERNEL as `time` names it
//
// `check` poisons y; an answer must be finite, within 1e-5 of float64 (relative L2, of all sampled rows and of each), and the same in every
// bit when run again. `time` is ten products in a row, divided by ten, L2 overwritten before the first.
// tests/cuda/emulator/runtime.h says how the checks run without a GPU (with cuda/matmul_mma.cu beside).
#include "../../common.cuh"
#include "../matmul.cuh"
#include "support.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using std::vector;

#ifdef GATEDELTA_EMULATOR
#define DECLARE(NAME) extern "C" void NAME(void* const*);
extern "C" void matmul_mma_bf16(const row::matmul::Launch&);
#else
#define DECLARE(NAME) extern "C" __global__ void NAME(const __grid_constant__ hopper::MatmulArgs, const __grid_constant__ hopper::MatmulMaps);
extern "C" __global__ void matmul_mma_bf16(const __grid_constant__ row::matmul::Launch);
#endif
DECLARE(hopper_matmul_bf16_large)
DECLARE(hopper_matmul_bf16_small)
DECLARE(hopper_matmul_bf16_large_two)
DECLARE(hopper_matmul_bf16_small_two)

struct Kernel {
    const char* name;
    const void* function;
    unsigned side, bytes;  // of its tiles; 0: the general kernel
};
static const Kernel KERNELS[] = {
    {"large", (const void*)hopper_matmul_bf16_large, 128, hopper::MatmulSmem<false>::BYTES},
    {"small", (const void*)hopper_matmul_bf16_small, 64, hopper::MatmulSmem<true>::BYTES},
    {"large_two", (const void*)hopper_matmul_bf16_large_two, 128, hopper::MatmulSmem<false>::BYTES},
    {"small_two", (const void*)hopper_matmul_bf16_small_two, 64, hopper::MatmulSmem<true>::BYTES},
    {"general", (const void*)matmul_mma_bf16, 0, 0},
};

struct Product {
    unsigned m, n, k;
    Buffer x, w, y;
    hopper::MatmulMaps maps[2];  // boxes for the large tile, for the small one

    Product(unsigned m, unsigned n, unsigned k) : m(m), n(n), k(k) {
        x.make((size_t)m * k * 4), w.make((size_t)n * k * 2), y.make((size_t)m * n * 4);
        make_floats((float*)x.p, (size_t)m * k, 1, 1.f);
        make_rows(w.p, n, k, false, 2, false, 1.f, 0.f);
        for (int i = 0; i < 2; i++) {
            const unsigned side = i == 0 ? 128 : 64;
            maps[i].x = tensor_boxes(x.p, m, k, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, side);
            maps[i].w = tensor_boxes(w.p, n, k, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, side);
        }
    }

    void run(const Kernel& kernel, int add, cudaStream_t stream) {
        if (kernel.side == 0) {
            row::matmul::Launch l;
            memset(&l, 0, sizeof l);
            l.m = {x.p, w.p, y.p};
            l.bytes[0] = x.bytes, l.bytes[1] = w.bytes, l.bytes[2] = y.bytes;
            l.c = {1, (uint32_t)add, 64, 64, 32, 4, 4, 256, 1};
            l.p = {m, n, k, k, 0, n, 0};
#ifdef GATEDELTA_EMULATOR
            const uint32_t grid[3] = {(n + 63) / 64, (m + 63) / 64, 1};
            if (!emulator::run_grid((void (*)(const void*))matmul_mma_bf16, &l, grid, 128, 0)) emulator_error() = 1;
#else
            void* args[] = {&l};
            CHECK(cudaLaunchKernel(kernel.function, dim3((n + 63) / 64, (m + 63) / 64), dim3(128), args, 0, stream));
#endif
            return;
        }
        hopper::MatmulArgs args = {(float*)y.p, n, m, n, k, (uint32_t)add, hung_device()};
        const unsigned tiles = ((m + kernel.side - 1) / kernel.side) * ((n + kernel.side - 1) / kernel.side);
        LAUNCH(kernel.function, std::min(tiles, (unsigned)multiprocessors()), 384, kernel.bytes, stream, &args, &maps[kernel.side == 64]);
    }
};

static bool check(unsigned m, unsigned n, unsigned k) {
    Product p(m, n, k);
    vector<float> x((size_t)m * k), y((size_t)m * n);
    CHECK(cudaMemcpy(x.data(), p.x.p, p.x.bytes, cudaMemcpyDeviceToHost));
    const vector<double> w = read16(p.w, false);
    // Rows that are compared: the first, the last, those around tiles' borders, and some between.
    vector<unsigned> rows;
    for (unsigned r = 0; r < m; r++)
        if (r < 3 || r + 2 > m || (r % 64 < 2 && r < 260) || r % 61 == 7) rows.push_back(r);
    vector<double> expected(rows.size() * n);
    parallel((int)rows.size(), [&](int i) {
        for (unsigned c = 0; c < n; c++) {
            double sum = 0;
            for (unsigned l = 0; l < k; l++) sum += (double)x[(size_t)rows[i] * k + l] * w[(size_t)c * k + l];
            expected[(size_t)i * n + c] = sum;
        }
    });
    bool good = true;
    for (const Kernel& kernel : KERNELS) {
        CHECK(cudaMemset(p.y.p, 0xff, p.y.bytes));
        p.run(kernel, 0, 0);
        finish(kernel.name);
        Buffer before;
        before.make(p.y.bytes);
        CHECK(cudaMemcpy(before.p, p.y.p, p.y.bytes, cudaMemcpyDeviceToDevice));
        CHECK(cudaMemcpy(y.data(), p.y.p, p.y.bytes, cudaMemcpyDeviceToHost));
        bool finite = true;
        for (float v : y) finite = finite && std::isfinite(v);
        double off = 0, all = 0, worst = 0;
        for (size_t i = 0; i < rows.size(); i++) {
            double row_off = 0, row_all = 0;
            for (unsigned c = 0; c < n; c++) {
                const double e = expected[i * n + c], d = y[(size_t)rows[i] * n + c] - e;
                row_off += d * d, row_all += e * e;
            }
            off += row_off, all += row_all, worst = std::max(worst, sqrt(row_off / row_all));
        }
        CHECK(cudaMemset(p.y.p, 0xff, p.y.bytes));
        p.run(kernel, 0, 0);
        finish(kernel.name);
        const bool again = same(before, p.y);
        // y += x w^T on top of it: twice as much.
        p.run(kernel, 1, 0);
        finish(kernel.name);
        CHECK(cudaMemcpy(y.data(), p.y.p, p.y.bytes, cudaMemcpyDeviceToHost));
        double added = 0;
        for (size_t i = 0; i < rows.size(); i++)
            for (unsigned c = 0; c < n; c++) {
                const double d = y[(size_t)rows[i] * n + c] - 2 * expected[i * n + c];
                added += d * d / 4;
            }
        const double error = sqrt(off / all), error_added = sqrt(added / all);
        const bool ok = finite && again && error <= 1e-5 && worst <= 1e-5 && error_added <= 1e-5;
        printf("%s %5u x %5u x %5u %-10s error %.2e, worst row %.2e, added %.2e%s%s\n", ok ? "ok  " : "FAIL", m, n, k, kernel.name, error, worst, error_added,
               finite ? "" : ", not finite", again ? "" : ", other bits");
        fflush(stdout);
        good &= ok;
    }
    return good;
}

#ifndef GATEDELTA_EMULATOR
static void time_all() {
    describe();
    static const unsigned SHAPES[][2] = {{6144, 1024}, {2048, 1024}, {3584, 1024}, {7168, 1024}, {16, 1024}, {4096, 1024}, {512, 1024}, {1024, 1024}, {1024, 2048}, {1024, 3584}};
    printf("    m     n     k");
    for (const Kernel& kernel : KERNELS) printf("  %18s", kernel.name);
    printf("   ms (TFLOP/s)\n");
    for (unsigned m : {512u, 2048u, 4096u, 8192u})
        for (auto [n, k] : SHAPES) {
            Product p(m, n, k);
            printf("%5u %5u %5u", m, n, k);
            for (const Kernel& kernel : KERNELS) {
                const int in_a_row = 10;
                const double ms = time_of([&](cudaStream_t s) { for (int i = 0; i < in_a_row; i++) p.run(kernel, 0, s); }, 10) / in_a_row;
                printf("  %8.4f (%7.1f)", ms, 2.0 * m * n * k / ms * 1e-9);
                fflush(stdout);
            }
            printf("\n");
        }
}
#endif

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    if (mode == "check") {
        bool good = true;
#ifdef GATEDELTA_EMULATOR
        static const unsigned SHAPES[][3] = {{64, 64, 64}, {130, 140, 136}, {300, 16, 200}, {200, 390, 320}};
#else
        static const unsigned SHAPES[][3] = {{64, 64, 64},      {130, 140, 136},    {9, 16, 1024},       {512, 16, 1024},     {512, 1024, 1024},  {513, 1000, 1032},
                                             {2048, 1024, 3584}, {2000, 6144, 1024}, {8192, 512, 1024}, {100, 7168, 2048}, {1111, 2049, 3000}};
#endif
        for (auto [m, n, k] : SHAPES) good &= check(m, n, k);
        printf(good ? "all good\n" : "FAILED\n");
        return good ? 0 : 1;
    }
#ifndef GATEDELTA_EMULATOR
    if (mode == "time") return time_all(), 0;
    if (mode == "one" && argc > 5)
        for (const Kernel& kernel : KERNELS)
            if (argv[5] == std::string(kernel.name)) {
                Product p(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
                for (int i = 0; i < 2; i++) p.run(kernel, 0, 0);
                return finish(kernel.name), 0;
            }
#endif
    fprintf(stderr, "usage: matmul check | time | one M N K KERNEL\n");
    return 2;
}
