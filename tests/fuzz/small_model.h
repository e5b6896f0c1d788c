// A model of a few numbers, for seeds and for targets that need one.
#pragma once

#include <string>
#include <vector>

#include "formats/decoder_config.h"
#include "formats/gguf.h"

namespace latte::fuzz {

using namespace formats;

inline GgufMetadata small_model(const std::string& architecture) {
  GgufMetadata metadata;
  metadata.set("general.architecture", architecture);
  for (const char* key : {"block_count", "attention.head_count", "attention.head_count_kv", "attention.sliding_window"}) {
    metadata.set(architecture + "." + key, uint32_t{2});
  }
  for (const char* key : {"context_length", "embedding_length", "feed_forward_length", "attention.key_length"}) {
    metadata.set(architecture + "." + key, uint32_t{32});
  }
  metadata.set(architecture + ".attention.layer_norm_rms_epsilon", 1e-5f);
  metadata.set(architecture + ".rope.freq_base", 1e4f);
  metadata.set(architecture + ".rope.scaling.type", std::string("yarn"));
  metadata.set(architecture + ".rope.scaling.factor", 2.0f);
  metadata.set(architecture + ".attention.value_length", uint32_t{32});
  return metadata;
}

inline void write_model(const std::string& path, const GgufMetadata& metadata, TensorType type) {
  const std::vector<GgufTensorSpec> hint = {{"token_embd.weight", type, {4, 32}}};
  std::vector<GgufTensorSpec> specs;
  for (const auto& [name, shape] : decoder_tensors(decoder_config(metadata, hint))) specs.push_back({name, type, shape});
  write_gguf(path, metadata, specs, [&](size_t i, const WriteBytes& write) {
    const std::vector<float> values(static_cast<size_t>(specs[i].elements()), 0.5f);
    write(quantize(type, values, specs[i].shape.back()));
  });
}

}  // namespace latte::fuzz
