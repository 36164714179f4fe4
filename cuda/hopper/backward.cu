// Entry points of the Hopper backward kernels (sm_90a), one per stored type, K and number of consumers, or K and V.
#include "carry.cuh"
#include "gradients.cuh"
#include "prepare.cuh"
#include "reverse.cuh"
#include "scan.cuh"

using namespace hopper;

#define PREPARE(NAME, E, K) ENTRY(NAME, 128, 4, PrepareArgs) { prepare<E, E, K, true>(p); }
PREPARE(hopper_grad_prepare_bf16_k128, Bf16, 128)
PREPARE(hopper_grad_prepare_bf16_k64, Bf16, 64)
PREPARE(hopper_grad_prepare_f16_k128, F16, 128)
PREPARE(hopper_grad_prepare_f16_k64, F16, 64)

#define KEEP(NAME, E, K, WG) ENTRY_MAPS(NAME, (WG + 1) * 128, 1, ScanArgs, ScanMaps) { scan<E, E, K, WG, 3, false, true, true>(p, maps); }
KEEP(hopper_keep_bf16_k128_w2, Bf16, 128, 2)
KEEP(hopper_keep_bf16_k128_w1, Bf16, 128, 1)
KEEP(hopper_keep_bf16_k64_w2, Bf16, 64, 2)
KEEP(hopper_keep_bf16_k64_w1, Bf16, 64, 1)
KEEP(hopper_keep_f16_k128_w2, F16, 128, 2)
KEEP(hopper_keep_f16_k128_w1, F16, 128, 1)
KEEP(hopper_keep_f16_k64_w2, F16, 64, 2)
KEEP(hopper_keep_f16_k64_w1, F16, 64, 1)

#define REVERSE(NAME, E, K, WG) ENTRY_MAPS(NAME, (WG + 1) * 128, 1, ReverseArgs, ReverseMaps) { reverse<E, K, WG, WG == 2 ? 2 : 3>(p, maps); }
REVERSE(hopper_reverse_bf16_k128_w2, Bf16, 128, 2)
REVERSE(hopper_reverse_bf16_k128_w1, Bf16, 128, 1)
REVERSE(hopper_reverse_bf16_k64_w2, Bf16, 64, 2)
REVERSE(hopper_reverse_bf16_k64_w1, Bf16, 64, 1)
REVERSE(hopper_reverse_f16_k128_w2, F16, 128, 2)
REVERSE(hopper_reverse_f16_k128_w1, F16, 128, 1)
REVERSE(hopper_reverse_f16_k64_w2, F16, 64, 2)
REVERSE(hopper_reverse_f16_k64_w1, F16, 64, 1)

#define GRADIENTS(NAME, E, K, V) ENTRY_MAPS(NAME, 384, 1, GradientArgs, GradientMaps) { gradients<E, K, V>(p, maps); }
GRADIENTS(hopper_gradients_bf16_k128_v128, Bf16, 128, 128)
GRADIENTS(hopper_gradients_bf16_k128_v64, Bf16, 128, 64)
GRADIENTS(hopper_gradients_bf16_k64_v128, Bf16, 64, 128)
GRADIENTS(hopper_gradients_bf16_k64_v64, Bf16, 64, 64)
GRADIENTS(hopper_gradients_f16_k128_v128, F16, 128, 128)
GRADIENTS(hopper_gradients_f16_k128_v64, F16, 128, 64)
GRADIENTS(hopper_gradients_f16_k64_v128, F16, 64, 128)
GRADIENTS(hopper_gradients_f16_k64_v64, F16, 64, 64)
