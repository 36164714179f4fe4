// What the bench programs share: device memory, inputs made on the device, tensor maps, the host's threads.
#pragma once
#ifdef GATEDELTA_EMULATOR
#include "runtime.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// A kernel with pointers to its parameters.
#define LAUNCH(kernel, blocks, threads, bytes, stream, ...) LAUNCH2(kernel, blocks, 1, threads, bytes, stream, __VA_ARGS__)
#define LAUNCH2(kernel, blocks, rows_, threads, bytes, stream, ...)                                                                                      \
    do {                                                                                                                                         \
        void* args_[] = {__VA_ARGS__};                                                                                                           \
        CHECK(cudaFuncSetAttribute((const void*)(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes)));                           \
        CHECK(cudaLaunchKernel((const void*)(kernel), dim3((unsigned)(blocks), (unsigned)(rows_)), dim3((unsigned)(threads)), args_, (size_t)(bytes), (stream)));   \
    } while (0)
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define CHECK(x)                                                                                        \
    do {                                                                                                \
        cudaError_t e_ = (x);                                                                           \
        if (e_ != cudaSuccess) {                                                                        \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_));         \
            fflush(stdout);                                                                             \
            exit(3);                                                                                    \
        }                                                                                               \
    } while (0)

struct Buffer {
    void* p = nullptr;
    size_t bytes = 0;
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { cudaFree(p); }
    void make(size_t n) {
        bytes = n;
        CHECK(cudaMalloc(&p, n ? n : 16));
    }
};

#ifndef GATEDELTA_EMULATOR
// Where a kernel that waits too long says so.
inline uint32_t* hung_host() {
    static uint32_t* p = nullptr;
    if (!p) {
        CHECK(cudaHostAlloc(&p, 64, cudaHostAllocMapped));
        *p = 0;
    }
    return p;
}
inline uint32_t* hung_device() {
    uint32_t* d;
    CHECK(cudaHostGetDevicePointer(&d, hung_host(), 0));
    return d;
}

inline void finish(const char* name) {
    cudaError_t e = cudaDeviceSynchronize();
    if (e != cudaSuccess) {
        printf("FAIL %s: %s; hung code 0x%x (0x1ss producer, 0x2ws consumer w, stage s (8: for O), 0x30w storing, 0x40w zeroing; 0: not a wait)\n", name, cudaGetErrorString(e), *hung_host());
        fflush(stdout);
        exit(4);
    }
}

inline int multiprocessors() {
    static int n = 0;
    if (!n) CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
    return n;
}

// Bytes a second of a large copy on this device, reads plus writes.
inline double bandwidth() {
    static double bw = 0;
    if (bw > 0) return bw;
    Buffer a, b;
    size_t n = (size_t)2 << 30;
    a.make(n), b.make(n);
    cudaEvent_t x, y;
    CHECK(cudaEventCreate(&x));
    CHECK(cudaEventCreate(&y));
    for (int i = 0; i < 4; i++) {
        CHECK(cudaEventRecord(x));
        CHECK(cudaMemcpyAsync(b.p, a.p, n, cudaMemcpyDeviceToDevice));
        CHECK(cudaEventRecord(y));
        CHECK(cudaEventSynchronize(y));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, x, y));
        bw = std::max(bw, 2.0 * n / ms * 1e3);
    }
    return bw;
}

inline void describe() {
    cudaDeviceProp p;
    CHECK(cudaGetDeviceProperties(&p, 0));
    printf("%s, %d multiprocessors\n", p.name, p.multiProcessorCount);
}

// A row-major matrix in boxes of `box_rows` rows of 128 bytes, swizzled.
inline CUtensorMap tensor_boxes(void* p, uint64_t rows, uint64_t columns, CUtensorMapDataType type, unsigned box_rows) {
    typedef CUresult (*Encode)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                               const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000, cudaEnableDefault, &found));
        if (found != cudaDriverEntryPointSuccess) fprintf(stderr, "cuTensorMapEncodeTiled not found\n"), exit(3);
    }
    CUtensorMap m;
    const unsigned size = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    cuuint64_t dims[2] = {columns, rows ? rows : 1}, strides[1] = {columns * size};
    cuuint32_t box[2] = {128 / size, box_rows}, step[2] = {1, 1};
    CUresult e = encode(&m, type, 2, p, dims, strides, box, step,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (e != CUDA_SUCCESS) fprintf(stderr, "cuTensorMapEncodeTiled: %d\n", (int)e), exit(3);
    return m;
}

// A row-major matrix of 16-bit numbers in boxes of [64, 64], swizzled.
inline CUtensorMap tensor_map(void* p, uint64_t rows, uint64_t columns, bool f16) {
    return tensor_boxes(p, rows, columns, f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 64);
}

// Milliseconds of the work as a replayed graph, the L2 overwritten before each run: the median.
inline double time_of(const std::function<void(cudaStream_t)>& work, int repeats) {
    cudaStream_t s;
    CHECK(cudaStreamCreate(&s));
    work(s);
    CHECK(cudaStreamSynchronize(s));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    work(s);
    CHECK(cudaStreamEndCapture(s, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    static Buffer flush;
    if (!flush.p) flush.make(256u << 20);
    cudaEvent_t a, b;
    CHECK(cudaEventCreate(&a));
    CHECK(cudaEventCreate(&b));
    std::vector<float> ms;
    for (int n = 0; n < repeats + 2; n++) {
        CHECK(cudaMemsetAsync(flush.p, n, flush.bytes, s));
        CHECK(cudaEventRecord(a, s));
        CHECK(cudaGraphLaunch(exec, s));
        CHECK(cudaEventRecord(b, s));
        CHECK(cudaStreamSynchronize(s));
        float x;
        CHECK(cudaEventElapsedTime(&x, a, b));
        if (n >= 2) ms.push_back(x);
    }
    CHECK(cudaEventDestroy(a));
    CHECK(cudaEventDestroy(b));
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(s));
    std::sort(ms.begin(), ms.end());
    return ms[ms.size() / 2];
}

#endif  // the emulator

// ---- inputs --------------------------------------------------------------------------------------------------------

// Mixed: g = -A softplus(x / 2 + 1), A from 0 for the first head to 16 for the last. Bench: logsigmoid(x) / 16 for three heads
// of four, none for the fourth. Cliffs: mostly slow, now and then -80 or minus infinity.
enum class Decay { Mixed, None, Slow, Bench, Cliffs };

__device__ inline uint64_t hash64(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
__device__ inline float uniform01(uint64_t seed, uint64_t i) { return ((hash64(seed * 0x100000001b3ull + i) >> 40) + 0.5f) / 16777216.f; }
#ifdef GATEDELTA_EMULATOR
inline float cospif(float x) { return cosf(3.14159265f * x); }
#endif
__device__ inline float normal(uint64_t seed, uint64_t i) {
    return sqrtf(-2.f * logf(uniform01(seed, 2 * i))) * cospif(2.f * uniform01(seed, 2 * i + 1));
}
__device__ inline float gate_of(int decay, uint64_t seed, uint64_t i, int h, int hv) {
    const float x = normal(seed, i);
    switch ((Decay)decay) {
        case Decay::Mixed: {
            float a = hv == 1 ? 1.f : h == 0 ? 0.f : h == hv - 1 ? 16.f : 16.f * uniform01(seed + 9, h);
            return -a * log1pf(expf(0.5f * x + 1.f));
        }
        case Decay::None: break;
        case Decay::Slow: return -0.05f * uniform01(seed + 3, i);
        case Decay::Bench: return h % 4 == 3 ? 0.f : -log1pf(expf(-x)) / 16.f;
        case Decay::Cliffs: {
            float u = uniform01(seed + 5, i);
            return u < 0.01f ? -INFINITY : u < 0.03f ? -80.f : -0.05f * uniform01(seed + 3, i);
        }
    }
    return 0.f;
}

#ifndef GATEDELTA_EMULATOR
// A warp per row.
__global__ void fill_rows(void* p, int rows, int width, int f16, uint64_t seed, int unit, float scale, float spread) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float sum = 0;
    for (int i = lane; i < width; i += 32) {
        float x = (1 - spread) * normal(seed, (uint64_t)row * width + i) + spread * normal(seed + 77, i);
        sum += x * x;
    }
    for (int off = 16; off; off /= 2) sum += __shfl_xor_sync(~0u, sum, off);
    float s = scale * (unit ? rsqrtf(sum) : 1.f);
    for (int i = lane; i < width; i += 32) {
        float x = s * ((1 - spread) * normal(seed, (uint64_t)row * width + i) + spread * normal(seed + 77, i));
        size_t at = (size_t)row * width + i;
        if (f16)
            ((__half*)p)[at] = __float2half(x);
        else
            ((__nv_bfloat16*)p)[at] = __float2bfloat16(x);
    }
}
__global__ void fill_gates(float* g, float* beta, int tokens, int hv, int decay, uint64_t seed) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)tokens * hv) return;
    int h = (int)(i % hv);
    g[i] = gate_of(decay, seed, i, h, hv);
    beta[i] = 1.f / (1.f + expf(-normal(seed + 1, i)));
}
__global__ void fill_floats(float* p, size_t n, uint64_t seed, float scale) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) p[i] = scale * normal(seed, i);
}
__global__ void compare(const uint4* a, const uint4* b, size_t n, int* differ) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && (a[i].x != b[i].x || a[i].y != b[i].y || a[i].z != b[i].z || a[i].w != b[i].w)) *differ = 1;
}

inline void make_rows(void* p, int rows, int width, bool f16, uint64_t seed, bool unit, float scale, float spread) {
    if (rows) fill_rows<<<(rows + 7) / 8, 256>>>(p, rows, width, f16, seed, unit, scale, spread);
    CHECK(cudaGetLastError());
}
inline void make_gates(float* g, float* beta, int tokens, int hv, Decay d, uint64_t seed) {
    size_t n = (size_t)tokens * hv;
    if (n) fill_gates<<<(unsigned)((n + 255) / 256), 256>>>(g, beta, tokens, hv, (int)d, seed);
    CHECK(cudaGetLastError());
}
inline void make_floats(float* p, size_t n, uint64_t seed, float scale) {
    if (n) fill_floats<<<(unsigned)((n + 255) / 256), 256>>>(p, n, seed, scale);
    CHECK(cudaGetLastError());
}

// Equal in every bit. Sizes are multiples of 16.
inline bool same(const Buffer& a, const Buffer& b) {
    static int* d = nullptr;
    if (!d) CHECK(cudaMalloc(&d, 4));
    CHECK(cudaMemset(d, 0, 4));
    size_t n = a.bytes / 16;
    if (n) compare<<<(unsigned)((n + 255) / 256), 256>>>((uint4*)a.p, (uint4*)b.p, n, d);
    int x;
    CHECK(cudaMemcpy(&x, d, 4, cudaMemcpyDeviceToHost));
    return x == 0;
}

#else  // the emulator: the same numbers, by the host

inline uint32_t* hung_device() { return nullptr; }
inline int multiprocessors() { return 3; }
inline double bandwidth() { return 1e9; }
inline void describe() { printf("the stand-in for a GPU\n"); }
inline void finish(const char* name) {
    if (cudaDeviceSynchronize() != cudaSuccess) printf("FAIL %s: a launch came to no end\n", name), exit(4);
}
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
inline CUtensorMap tensor_boxes(void* p, uint64_t rows, uint64_t columns, CUtensorMapDataType type, unsigned box_rows) {
    const uint64_t size = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    return {(const char*)p, columns, rows ? rows : 1, columns * size, (uint32_t)(128 / size), box_rows, size, {}};
}
inline CUtensorMap tensor_map(void* p, uint64_t rows, uint64_t columns, bool) { return tensor_boxes(p, rows, columns, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 64); }
inline void make_rows(void* p, int rows, int width, bool f16, uint64_t seed, bool unit, float scale, float spread) {
    for (size_t row = 0; row < (size_t)rows; row++) {
        auto x = [&](int i) { return (1 - spread) * normal(seed, row * width + i) + spread * normal(seed + 77, i); };
        float sum = 0;
        for (int i = 0; i < width; i++) sum += x(i) * x(i);
        for (int i = 0; i < width; i++) {
            const float y = x(i) * scale * (unit ? 1.f / sqrtf(sum) : 1.f);
            ((uint16_t*)p)[row * width + i] = f16 ? emulator::float_to_half(y) : emulator::float_to_bf16(y);
        }
    }
}
inline void make_gates(float* g, float* beta, int tokens, int hv, Decay d, uint64_t seed) {
    for (size_t i = 0; i < (size_t)tokens * hv; i++) g[i] = gate_of((int)d, seed, i, (int)(i % hv), hv), beta[i] = 1.f / (1.f + expf(-normal(seed + 1, i)));
}
inline void make_floats(float* p, size_t n, uint64_t seed, float scale) {
    for (size_t i = 0; i < n; i++) p[i] = scale * normal(seed, i);
}
inline bool same(const Buffer& a, const Buffer& b) { return memcmp(a.p, b.p, a.bytes) == 0; }

#endif

// ---- to the host ---------------------------------------------------------------------------------------------------

inline double from16(uint16_t bits, bool f16) {
    if (f16) {
        int e = (bits >> 10) & 31, m = bits & 1023;
        double x = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
        return bits >> 15 ? -x : x;
    }
    uint32_t w = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &w, 4);
    return f;
}

inline void parallel(int n, const std::function<void(int)>& f) {
    std::atomic<int> next(0);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); t++)
        threads.emplace_back([&] {
            for (int i; (i = next++) < n;) f(i);
        });
    for (auto& t : threads) t.join();
}

inline std::vector<double> read16(const Buffer& b, bool f16) {
    std::vector<uint16_t> x(b.bytes / 2);
    CHECK(cudaMemcpy(x.data(), b.p, x.size() * 2, cudaMemcpyDeviceToHost));
    std::vector<double> y(x.size());
    const size_t step = 1 << 20;
    parallel((int)((x.size() + step - 1) / step), [&](int i) {
        for (size_t j = i * step; j < std::min(x.size(), (i + 1) * step); j++) y[j] = from16(x[j], f16);
    });
    return y;
}
inline std::vector<float> read32(const Buffer& b) {
    std::vector<float> x(b.bytes / 4);
    CHECK(cudaMemcpy(x.data(), b.p, x.size() * 4, cudaMemcpyDeviceToHost));
    return x;
}
inline void dump16(const Buffer& b, bool f16, int width, int rows, int columns) {
    std::vector<double> x = read16(b, f16);
    for (int i = 0; i < rows && (size_t)(i + 1) * width <= x.size(); i++) {
        printf("       o[%d]", i);
        for (int j = 0; j < columns; j++) printf(" %.4f", x[(size_t)i * width + j]);
        printf("\n");
    }
}
