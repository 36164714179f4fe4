// Entry points of the Hopper matrix product (sm_90a). HOPPER_ALL: also x in two parts, for `bench`.
#include "matmul.cuh"

using namespace hopper;

#define MATMUL(NAME, SMALL, PARTS) ENTRY_MAPS(NAME, 3 * 128, 1, MatmulArgs, MatmulMaps) { matmul<SMALL, PARTS>(p, maps); }
MATMUL(hopper_matmul_bf16_large, false, 3)
MATMUL(hopper_matmul_bf16_small, true, 3)
#ifdef HOPPER_ALL
MATMUL(hopper_matmul_bf16_large_two, false, 2)
MATMUL(hopper_matmul_bf16_small_two, true, 2)
#endif
