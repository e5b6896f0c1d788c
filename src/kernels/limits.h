// Loops that reach this machine's physical limits, so that a benchmark can say what share of them a kernel gets.
#pragma once

#include <cstdint>

namespace latte::kernels {

// Fused multiply-adds on registers alone, on the best SIMD target. Returns how many floating-point operations that was (two
// each).
int64_t RunMultiplyAdds(int64_t iterations);

// Sums `count` floats: reads memory at the rate it can be read.
float ReadMemory(const float* data, int64_t count);

}  // namespace latte::kernels
