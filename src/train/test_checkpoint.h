// What tests compare of two runs.
#pragma once

#include <map>
#include <string>

#include "formats/checkpoint.h"

namespace latte::train {

// Every bit of the weights, the moments and the generator that a checkpoint holds. Verifies its checksum.
inline std::map<std::string, std::string> tensors_of(const std::string& path) {
  const formats::CheckpointFile checkpoint(path);
  std::map<std::string, std::string> tensors;
  for (const auto& tensor : checkpoint.file().tensors()) {
    tensors[tensor.name] = {reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size()};
  }
  return tensors;
}

}  // namespace latte::train
