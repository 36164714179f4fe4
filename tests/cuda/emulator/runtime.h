// The few functions of the CUDA runtime that `cuda/hopper/bench` uses, over the stand-in for the driver: its checks run without a GPU.
//
//   g++ -std=c++17 -O2 -w -fno-strict-aliasing -DGATEDELTA_EMULATOR -DHOPPER_ALL -Itests/cuda/emulator -Icuda -x c++ cuda/hopper/backward.cu \
//       cuda/hopper/bench/backward.cu tests/cuda/emulator/{fibers,hopper,driver}.cpp -ldl -lpthread -o backward
#pragma once
#include "fibers.h"
#include "hopper.h"

#include <stdlib.h>
#include <time.h>

typedef int cudaError_t;
typedef void* cudaStream_t;
typedef double cudaEvent_t;
typedef void* cudaGraph_t;
typedef void* cudaGraphExec_t;
enum { cudaSuccess = 0, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaStreamCaptureModeThreadLocal };

inline const char* cudaGetErrorString(cudaError_t) { return "threads of a block wait for others that never come"; }
inline cudaError_t& emulator_error() {
    static cudaError_t e = 0;
    return e;
}
// Poisoned, as on the stand-in for the driver.
inline cudaError_t cudaMalloc(void** p, size_t n) {
    *p = aligned_alloc(1024, (n + 1023) / 1024 * 1024);
    memset(*p, 0xff, n);
    return *p ? 0 : 1;
}
inline cudaError_t cudaFree(void* p) { return free(p), 0; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n, int) { return memcpy(to, from, n), 0; }
inline cudaError_t cudaMemset(void* p, int x, size_t n) { return memset(p, x, n), 0; }
inline cudaError_t cudaMemsetAsync(void* p, int x, size_t n, cudaStream_t) { return memset(p, x, n), 0; }
inline cudaError_t cudaDeviceSynchronize() { return emulator_error(); }
inline cudaError_t cudaStreamCreate(cudaStream_t*) { return 0; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return 0; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulator_error(); }
inline cudaError_t cudaEventCreate(cudaEvent_t*) { return 0; }
inline cudaError_t cudaEventRecord(cudaEvent_t& e, cudaStream_t = nullptr) {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    e = t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
    return 0;
}
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) { return *ms = (float)(b - a), 0; }

#define LAUNCH(kernel, blocks, threads, bytes, stream, ...) LAUNCH2(kernel, blocks, 1, threads, bytes, stream, __VA_ARGS__)
#define LAUNCH2(kernel, blocks, rows_, threads, bytes, stream, ...)                                              \
    do {                                                                                                 \
        const void* args_[] = {__VA_ARGS__};                                                             \
        const uint32_t grid_[3] = {(uint32_t)(blocks), (uint32_t)(rows_), 1};                                            \
        if (!emulator::run_grid((void (*)(const void*))(kernel), args_, grid_, threads, bytes)) emulator_error() = 1; \
    } while (0)
