// A pretrained model small enough for tests, as a GGUF file: two layers of llama, random weights, a vocabulary of letters.
#pragma once

#include <torch/torch.h>

#include <string>
#include <vector>

#include "formats/decoder_config.h"
#include "formats/gguf.h"

namespace latte::extend {

inline formats::GgufMetadata tiny_metadata(uint32_t kv_heads = 2) {
  formats::GgufMetadata metadata("tiny.gguf");
  std::vector<std::string> tokens = {"<|end|>"};
  for (char letter = '!'; letter <= '~'; ++letter) tokens.emplace_back(1, letter);
  tokens.emplace_back("\u0120");  // the blank
  tokens.emplace_back("\u010A");  // the new line
  tokens.emplace_back("ab");
  std::vector<int32_t> types(tokens.size(), 1);
  types[0] = 3;  // control
  metadata.set("general.architecture", std::string("llama"));
  metadata.set("general.name", std::string("Tiny"));
  metadata.set("llama.vocab_size", static_cast<uint32_t>(tokens.size()));
  metadata.set("llama.block_count", uint32_t{2});
  metadata.set("llama.context_length", uint32_t{256});
  metadata.set("llama.embedding_length", uint32_t{32});
  metadata.set("llama.feed_forward_length", uint32_t{48});
  metadata.set("llama.attention.head_count", uint32_t{4});
  metadata.set("llama.attention.head_count_kv", kv_heads);
  metadata.set("llama.attention.layer_norm_rms_epsilon", 1e-5F);
  metadata.set("llama.rope.freq_base", 10000.0F);
  metadata.set("llama.rope.dimension_count", uint32_t{8});
  metadata.set("tokenizer.ggml.model", std::string("gpt2"));
  metadata.set("tokenizer.ggml.pre", std::string("gpt-2"));
  metadata.set("tokenizer.ggml.tokens", formats::GgufArray(tokens));
  metadata.set("tokenizer.ggml.token_type", formats::GgufArray(types));
  metadata.set("tokenizer.ggml.merges", formats::GgufArray(std::vector<std::string>{"a b"}));
  metadata.set("tokenizer.ggml.eos_token_id", uint32_t{0});
  return metadata;
}

inline void write_tiny_model(const std::string& path, uint64_t seed = 3, uint32_t kv_heads = 2) {
  torch::manual_seed(seed);
  const formats::GgufMetadata metadata = tiny_metadata(kv_heads);
  formats::GgufTensorSpec embedding{"token_embd.weight", formats::TensorType::kF32, {98, 32}};
  const auto& tokens = metadata.strings("tokenizer.ggml.tokens");
  embedding.shape[0] = static_cast<int64_t>(tokens.size());
  const auto config = formats::decoder_config(metadata, std::vector<formats::GgufTensorSpec>{embedding});
  std::vector<at::Tensor> values;
  std::vector<formats::GgufTensor> tensors;
  for (const formats::NamedShape& shape : formats::decoder_tensors(config)) {
    const bool norm = shape.shape.size() == 1;
    values.push_back(norm ? torch::ones(shape.shape) : torch::randn(shape.shape) * 0.3);
    formats::GgufTensor tensor;
    tensor.name = shape.name;
    tensor.shape = shape.shape;
    tensor.data = {static_cast<const std::byte*>(values.back().const_data_ptr()), values.back().nbytes()};
    tensors.push_back(std::move(tensor));
  }
  formats::write_gguf(path, metadata, tensors);
}

}  // namespace latte::extend
