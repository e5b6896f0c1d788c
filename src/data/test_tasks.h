// What tests of tasks share.
#pragma once

#include <cstdint>
#include <vector>

#include "data/task_data.h"

namespace latte {

inline std::vector<int32_t> tokens_of(const TaskExamples& split, int64_t sequence) {
  const auto* offsets = split.offsets.const_data_ptr<int64_t>();
  std::vector<int32_t> tokens;
  for (int64_t i = offsets[sequence]; i < offsets[sequence + 1]; ++i) tokens.push_back(split.tokens[i].item<int32_t>());
  return tokens;
}

}  // namespace latte
