// Small models of random weights for every architecture in the table, as GGUF files.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <string>
#include <vector>

#include "formats/decoder_config.h"
#include "formats/gguf.h"
#include "formats/test_files.h"

namespace latte {

constexpr int64_t kSmallVocabulary = 96;

// What all have in common; a test changes what it is about.
inline formats::GgufMetadata small_metadata(const std::string& architecture) {
  formats::GgufMetadata metadata;
  const auto number = [&](const std::string& key, uint32_t value) { metadata.set(architecture + "." + key, value); };
  metadata.set("general.architecture", architecture);
  number("vocab_size", kSmallVocabulary);
  number("block_count", 6);
  number("context_length", 64);
  number("embedding_length", 64);
  number("feed_forward_length", 96);
  number("attention.head_count", 4);
  number("attention.head_count_kv", 2);
  number("attention.key_length", 32);
  number("attention.value_length", 32);
  metadata.set(architecture + ".attention.layer_norm_rms_epsilon", 1e-5f);
  metadata.set(architecture + ".rope.freq_base", 10000.0f);
  if (architecture != "llama") number("attention.sliding_window", 16);
  metadata.set("tokenizer.ggml.model", std::string("none"));
  return metadata;
}

// Writes a model of these metadata, with an output projection of its own if `untied` and frequency divisors if `factors`.
inline void write_small_model(const std::string& path, const formats::GgufMetadata& metadata, bool untied = false,
                              bool factors = false) {
  std::vector<formats::GgufTensorSpec> hints = {{"token_embd.weight", formats::TensorType::kF32, {kSmallVocabulary, 64}}};
  if (untied) hints.push_back({"output.weight", formats::TensorType::kF32, {kSmallVocabulary, 64}});
  if (factors) hints.push_back({"rope_freqs.weight", formats::TensorType::kF32, {16}});
  const formats::DecoderConfig config = formats::decoder_config(metadata, hints);
  torch::manual_seed(1);
  std::vector<at::Tensor> values;
  std::vector<formats::GgufTensor> tensors;
  for (const auto& [name, shape] : formats::decoder_tensors(config)) {
    auto value = torch::randn(shape);
    // Queries and keys are large, so that attention isn't a plain mean.
    if (shape.size() == 2 && name != "token_embd.weight") value *= 2 / std::sqrt(static_cast<double>(shape[1]));
    if (shape.size() == 1) value = 1 + 0.3 * value;
    if (name == "rope_freqs.weight") value = torch::linspace(1, 8, shape[0]);
    values.push_back(value.contiguous());
    formats::GgufTensor tensor;
    tensor.name = name;
    tensor.shape = shape;
    tensor.data = {static_cast<const std::byte*>(values.back().data_ptr()), values.back().nbytes()};
    tensors.push_back(tensor);
  }
  formats::write_gguf(path, metadata, tensors);
}

inline std::vector<int64_t> small_tokens(int64_t count) {
  torch::manual_seed(2);
  const auto tokens = torch::randint(kSmallVocabulary, {count});
  return {tokens.data_ptr<int64_t>(), tokens.data_ptr<int64_t>() + count};
}

}  // namespace latte
