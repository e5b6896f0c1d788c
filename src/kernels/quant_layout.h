// What the packed quantised formats are made of (quant_matmul.h), for those who pack them and those who multiply with them.
#pragma once

#include <cstdint>

#include "kernels/quant_matmul.h"

namespace latte::kernels {

constexpr bool kHasMinimum(WeightFormat format) {
  return format == WeightFormat::kQ4_1 || format == WeightFormat::kQ5_1 || format == WeightFormat::kQ2_K;
}
constexpr int64_t kBitsOf(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ2_K:
      return 2;
    case WeightFormat::kQ4_0:
    case WeightFormat::kQ4_1:
    case WeightFormat::kQ3_K:
    case WeightFormat::kIQ4_NL:
      return 4;
    case WeightFormat::kQ5_0:
    case WeightFormat::kQ5_1:
      return 5;
    case WeightFormat::kQ6_K:
      return 6;
    default:
      return 8;
  }
}
// What a stored quant has more than the number it stands for.
constexpr int32_t kOffsetOf(WeightFormat format) {
  if (format == WeightFormat::kQ3_K) return 4;
  if (format == WeightFormat::kIQ4_NL) return 128;  // of the table's entries
  return kHasMinimum(format) ? 0 : 1 << (kBitsOf(format) - 1);
}
constexpr int64_t kScalesOf(WeightFormat format) { return HasHalfScales(format) ? 2 : 1; }  // of a block and row

// What kIQ4_NL's quants stand for, with kOffsetOf() added (ggml-common.h: kvalues_iq4nl).
constexpr uint8_t kIQ4Table[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

// Of a block of a group: bytes of its quants; float16 numbers behind them.
constexpr int64_t kBlockQuantBytes(WeightFormat format) { return kGroupRows * kQuantBlock * kBitsOf(format) / 8; }
constexpr int64_t kBlockScales(WeightFormat format) { return kGroupRows * kScalesOf(format) * (kHasMinimum(format) ? 2 : 1); }

}  // namespace latte::kernels
