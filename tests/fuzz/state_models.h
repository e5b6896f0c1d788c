// The models whose states are fuzzed: one whose states have a constant size, one whose states grow.
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/engine.h"
#include "small_model.h"

namespace latte::fuzz {

inline std::vector<std::shared_ptr<const runtime::Model>> state_models() {
  std::string folder = (std::filesystem::temp_directory_path() / "latte-fuzz-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) throw std::runtime_error("cannot make " + folder);
  const std::string path = folder + "/model.gguf";
  GgufMetadata metadata = small_model("llama");
  metadata.set("llama.rope.scaling.type", std::string("none"));
  write_model(path, metadata, TensorType::kQ8_0);
  runtime::ModelOptions constant, growing;
  constant.threads = growing.threads = 1;
  constant.attention = {5, 2, 3};
  std::vector<std::shared_ptr<const runtime::Model>> models = {runtime::Model::open(path, constant),
                                                               runtime::Model::open(path, growing)};
  std::filesystem::remove_all(folder);  // what is mapped stays
  return models;
}

}  // namespace latte::fuzz
