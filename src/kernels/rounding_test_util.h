// How far float32 results may lie from their definition by rounding on the way, besides float32's own.
#pragma once

#include "hwy/targets.h"
#include "kernels/types.h"

namespace latte::kernels {

// Where pairs of bfloat16 are multiplied (tile_matmul-inl.h), weights are rounded to bfloat16: half a unit, relative.
inline double WeightRounding(DType dtype) {
  const bool pairs = (hwy::SupportedTargets() & HWY_AVX3_ZEN4) != 0;
  return pairs && dtype == DType::kBFloat16 ? 0x1p-9 : 0.0;
}

}  // namespace latte::kernels
