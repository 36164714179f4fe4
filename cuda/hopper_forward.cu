// Entry points of the Hopper forward kernels (sm_90a), one per stored type, K and number of consumers.
#include "hopper_prepare.cuh"
#include "hopper_scan.cuh"

using namespace hopper;

#define PREPARE(NAME, E, K) \
    extern "C" __global__ void __launch_bounds__(128, 4) NAME(const __grid_constant__ PrepareArgs p) { prepare<E, K>(p); }
PREPARE(hopper_prepare_bf16_k128, Bf16, 128)
PREPARE(hopper_prepare_bf16_k64, Bf16, 64)
PREPARE(hopper_prepare_f16_k128, F16, 128)
PREPARE(hopper_prepare_f16_k64, F16, 64)

#define SCAN(NAME, E, K, WG, STAGES)                                                                                          \
    extern "C" __global__ void __launch_bounds__((WG + 1) * 128, 1)                                                          \
        NAME(const __grid_constant__ ScanArgs p, const __grid_constant__ ScanMaps maps) {                                     \
        scan<E, K, WG, STAGES>(p, maps);                                                                                      \
    }
SCAN(hopper_scan_bf16_k128_w2, Bf16, 128, 2, 3)
SCAN(hopper_scan_bf16_k128_w1, Bf16, 128, 1, 3)
SCAN(hopper_scan_bf16_k64_w2, Bf16, 64, 2, 3)
SCAN(hopper_scan_bf16_k64_w1, Bf16, 64, 1, 3)
SCAN(hopper_scan_f16_k128_w2, F16, 128, 2, 3)
SCAN(hopper_scan_f16_k128_w1, F16, 128, 1, 3)
SCAN(hopper_scan_f16_k64_w2, F16, 64, 2, 3)
SCAN(hopper_scan_f16_k64_w1, F16, 64, 1, 3)
