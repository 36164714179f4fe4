// Entry points of the Hopper backward kernels (sm_90a), one per stored type, K and number of consumers, or K and V. HOPPER_ALL: also those
// that the backend does not choose, for `bench`.
#include "carry.cuh"
#include "gradients_careful.cuh"
#include "prepare.cuh"
#include "reverse.cuh"
#include "scan.cuh"

using namespace hopper;

#define PREPARE(NAME, E, K) ENTRY_MAPS(NAME, 128, 4, PrepareArgs, PrepareMaps) { prepare<E, K, true>(p, maps); }
PREPARE(hopper_grad_prepare_bf16_k128, Bf16, 128)
#ifdef HOPPER_ALL
PREPARE(hopper_grad_prepare_f16_k128, F16, 128)
#endif

#define KEEP(NAME, E, K, WG) ENTRY_MAPS(NAME, (WG + 1) * 128, 1, ScanArgs, ScanMaps) { scan<E, K, WG, 3, false, true, true>(p, maps); }
KEEP(hopper_keep_bf16_k128_w2, Bf16, 128, 2)
KEEP(hopper_keep_bf16_k128_w1, Bf16, 128, 1)
#ifdef HOPPER_ALL
KEEP(hopper_keep_f16_k128_w2, F16, 128, 2)
KEEP(hopper_keep_f16_k128_w1, F16, 128, 1)
#endif

#define REVERSE(NAME, E, K, WG) ENTRY_MAPS(NAME, (WG + 1) * 128, 1, ReverseArgs, ReverseMaps) { reverse<E, K, WG, WG == 2 ? 2 : 3>(p, maps); }
REVERSE(hopper_reverse_bf16_k128_w2, Bf16, 128, 2)
REVERSE(hopper_reverse_bf16_k128_w1, Bf16, 128, 1)
#ifdef HOPPER_ALL
REVERSE(hopper_reverse_f16_k128_w2, F16, 128, 2)
REVERSE(hopper_reverse_f16_k128_w1, F16, 128, 1)
#endif

#define GRADIENTS(NAME, E, K, V) ENTRY_MAPS(NAME, 384, 1, GradientArgs, GradientMaps) { gradients<E, K, V>(p, maps); }
GRADIENTS(hopper_gradients_bf16_k128_v128, Bf16, 128, 128)
GRADIENTS(hopper_gradients_bf16_k128_v64, Bf16, 128, 64)
#ifdef HOPPER_ALL
GRADIENTS(hopper_gradients_f16_k128_v128, F16, 128, 128)
GRADIENTS(hopper_gradients_f16_k128_v64, F16, 128, 64)
#endif

#define CAREFUL(NAME, E, K, V) ENTRY_MAPS(NAME, 256, 1, GradientArgs, GradientMaps) { gradients_careful<E, K, V>(p, maps); }
CAREFUL(hopper_gradients_careful_bf16_k128_v128, Bf16, 128, 128)
CAREFUL(hopper_gradients_careful_bf16_k128_v64, Bf16, 128, 64)

// Where sequences are cut: one consumer a block.
#define STATE(NAME, E, K) ENTRY_MAPS(NAME, 256, 1, ScanArgs, ScanMaps) { scan<E, K, 1, 3, false, true>(p, maps); }
STATE(hopper_grad_state_bf16_k128, Bf16, 128)
#ifdef HOPPER_ALL
STATE(hopper_grad_state_f16_k128, F16, 128)
#endif
#define CARRY_BACK(NAME, E, K) ENTRY_MAPS(NAME, 256, 1, ReverseArgs, ReverseMaps) { reverse<E, K, 1, 3, true>(p, maps); }
CARRY_BACK(hopper_reverse_state_bf16_k128, Bf16, 128)
#ifdef HOPPER_ALL
CARRY_BACK(hopper_reverse_state_f16_k128, F16, 128)
#endif
ENTRY(hopper_grad_warm, 128, 1, GradWarmArgs) { warm<true>(p.carry, p.back); }
ENTRY(hopper_grad_carry_k128, carry_threads(128), 1, CarryArgs) { carry<128>(p); }
ENTRY(hopper_reverse_carry_k128, carry_threads(128), 1, CarryArgs) { carry<128, true>(p); }
