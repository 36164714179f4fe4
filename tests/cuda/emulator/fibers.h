#pragma once
#include "emulator.h"

namespace emulator {

// Runs a kernel over a grid of blocks that share `dynamic` bytes beside what it declares; false if threads of a block wait for
// others that never come.
bool run_grid(void (*kernel)(const void*), const void* launch, const uint32_t grid[3], uint32_t threads, size_t dynamic);

}  // namespace emulator
