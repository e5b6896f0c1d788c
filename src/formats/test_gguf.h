// Changed GGUF files, for tests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/gguf.h"

namespace latte::formats {

// `from` as ggml's writers leave it: without leading dimensions of 1. Returns how many tensors had some.
inline int64_t write_without_leading_ones(const std::string& from, const std::string& to) {
  const GgufFile file(from);
  std::vector<GgufTensor> tensors = file.tensors();
  int64_t changed = 0;
  for (GgufTensor& tensor : tensors) {
    if (tensor.shape.size() < 2 || tensor.shape[0] != 1) continue;
    tensor.shape.erase(tensor.shape.begin());
    ++changed;
  }
  write_gguf(to, file.metadata(), tensors);
  return changed;
}

}  // namespace latte::formats
