// A model of a few numbers, for seeds and for targets that need one.
#pragma once

#include <string>
#include <vector>

#include "formats/adapter.h"
#include "formats/decoder_config.h"
#include "formats/gguf.h"
#include "formats/hash.h"

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

// Of that base, a llama: latents that forget in its first block, with floors and a convolution in its second.
inline void write_small_adapter(const std::string& path, const std::string& base_path) {
  const GgufFile base(base_path);
  AdapterSpec spec;
  spec.window = 5;
  spec.sinks = 2;
  spec.evicted = true;
  spec.latents = {3, 3};
  spec.base_hash = hash_of_file(base_path);
  const BaseShape shape = BaseShape::from(base.metadata());
  std::vector<GgufTensor> tensors;
  std::vector<std::vector<std::byte>> data;
  for (int64_t block = 0; block < shape.blocks; ++block) {
    const LatentForm form = {.decay = block == 0, .floor = block == 1, .conv = block == 1};
    for (const GgufTensorSpec& wanted : adapter_tensors(spec, shape, block, form)) {
      GgufTensor& tensor = tensors.emplace_back();
      static_cast<GgufTensorSpec&>(tensor) = wanted;
      const std::vector<float> values(static_cast<size_t>(wanted.elements()), 0.25f);
      data.push_back(quantize(wanted.type, values, wanted.shape.back()));
      tensor.data = data.back();
    }
  }
  write_adapter(path, spec, base, tensors);
}

}  // namespace latte::fuzz
