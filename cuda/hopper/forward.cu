// Entry points of the Hopper forward kernels (sm_90a), one per stored type, K and number of consumers.
#include "carry.cuh"
#include "prepare.cuh"
#include "scan.cuh"
#include "tables.cuh"

using namespace hopper;

#define PREPARE(NAME, E, K) ENTRY_MAPS(NAME, 128, 4, PrepareArgs, PrepareMaps) { prepare<E, K>(p, maps); }
PREPARE(hopper_prepare_bf16_k128, Bf16, 128)
PREPARE(hopper_prepare_bf16_k64, Bf16, 64)
PREPARE(hopper_prepare_f16_k128, F16, 128)
PREPARE(hopper_prepare_f16_k64, F16, 64)
// A value head for each key head: nothing is kept from head to head, and registers are left for a block more, without P for two.
#define PREPARE_ONE(NAME, E) ENTRY_MAPS(NAME, 128, 5, PrepareArgs, PrepareMaps) { prepare<E, 128, false, true>(p, maps); }
PREPARE_ONE(hopper_prepare_one_bf16_k128, Bf16)
PREPARE_ONE(hopper_prepare_one_f16_k128, F16)
#define PREPARE_KEYS(NAME, E) ENTRY_MAPS(NAME, 128, 6, PrepareArgs, PrepareMaps) { prepare<E, 128, false, true, false>(p, maps); }
PREPARE_KEYS(hopper_prepare_keys_bf16_k128, Bf16)
PREPARE_KEYS(hopper_prepare_keys_f16_k128, F16)

#define SCAN(NAME, E, K, WG, OUT) ENTRY_MAPS(NAME, scan_threads(WG, false), 1, ScanArgs, ScanMaps) { scan<E, K, WG, 3, OUT>(p, maps); }
SCAN(hopper_scan_bf16_k128_w2, Bf16, 128, 2, true)
SCAN(hopper_scan_bf16_k128_w1, Bf16, 128, 1, true)
SCAN(hopper_scan_bf16_k64_w2, Bf16, 64, 2, true)
SCAN(hopper_scan_bf16_k64_w1, Bf16, 64, 1, true)
// For segments in which sums cancel: with one consumer, and two stages, which are larger.
#define SCAN_CAREFUL(NAME, E, K) ENTRY_MAPS(NAME, scan_threads(1, false), 1, ScanArgs, ScanMaps) { scan<E, K, 1, CAREFUL_STAGES, true, false, false, true>(p, maps); }
SCAN_CAREFUL(hopper_scan_careful_bf16_k128, Bf16, 128)
SCAN_CAREFUL(hopper_scan_careful_bf16_k64, Bf16, 64)
SCAN_CAREFUL(hopper_scan_careful_f16_k128, F16, 128)
SCAN_CAREFUL(hopper_scan_careful_f16_k64, F16, 64)
SCAN(hopper_scan_f16_k128_w2, F16, 128, 2, true)
SCAN(hopper_scan_f16_k128_w1, F16, 128, 1, true)
SCAN(hopper_scan_f16_k64_w2, F16, 64, 2, true)
SCAN(hopper_scan_f16_k64_w1, F16, 64, 1, true)
// Which make P, behind `hopper_prepare_keys`.
#define SCAN_MAKING(NAME, E, WG) ENTRY_MAPS(NAME, scan_threads(WG, true), 1, ScanArgs, ScanMaps) { scan<E, 128, WG, 3, true, false, false, false, true>(p, maps); }
SCAN_MAKING(hopper_scan_making_bf16_k128_w2, Bf16, 2)
SCAN_MAKING(hopper_scan_making_bf16_k128_w1, Bf16, 1)
SCAN_MAKING(hopper_scan_making_f16_k128_w2, F16, 2)
SCAN_MAKING(hopper_scan_making_f16_k128_w1, F16, 1)
#define SCAN_MAKING_CAREFUL(NAME, E) \
    ENTRY_MAPS(NAME, scan_threads(1, true), 1, ScanArgs, ScanMaps) { scan<E, 128, 1, CAREFUL_STAGES, true, false, false, true, true>(p, maps); }
SCAN_MAKING_CAREFUL(hopper_scan_making_careful_bf16_k128, Bf16)
SCAN_MAKING_CAREFUL(hopper_scan_making_careful_f16_k128, F16)
SCAN(hopper_state_bf16_k128, Bf16, 128, 1, false)
SCAN(hopper_state_bf16_k64, Bf16, 64, 1, false)
SCAN(hopper_state_f16_k128, F16, 128, 1, false)
SCAN(hopper_state_f16_k64, F16, 64, 1, false)

ENTRY(hopper_warm, 128, 1, CarryArgs) { warm(p); }
ENTRY(hopper_carry_k128, carry_threads(128), 1, CarryArgs) { carry<128>(p); }
ENTRY(hopper_carry_k64, carry_threads(64), 1, CarryArgs) { carry<64>(p); }
ENTRY(hopper_tables, 128, 1, TablesArgs) { tables(p); }
