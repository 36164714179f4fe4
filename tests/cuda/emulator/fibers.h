#pragma once
#include "emulator.h"

namespace emulator {

// Runs a kernel over a grid of blocks; false if threads of a block wait for others that never come.
bool run_grid(void (*kernel)(const void*), const void* launch, const uint32_t grid[3], uint32_t threads);

}  // namespace emulator
