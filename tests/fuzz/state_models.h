// The models whose states are fuzzed: of a GGUF file, one whose states have a constant size, one whose states grow and one with
// an adapter; of latte train, one of each kind of sums and of what a mixer remembers.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "formats/checkpoint.h"
#include "formats/language_model_config.h"
#include "formats/vocabulary.h"
#include "input_file.h"
#include "runtime/engine.h"
#include "small_model.h"

namespace latte::fuzz {

struct StateModel {
  std::string name;
  std::shared_ptr<const runtime::Model> model;
};

// A checkpoint of a few numbers, with the attention and position given.
inline void write_trained_model(const std::string& path, const std::string& attention, const std::string& position) {
  LanguageModelConfig config;
  config.vocab_size = 4;
  config.num_layers = 2;
  config.embed_dim = 8;
  config.num_heads = 2;
  config.attention = attention;
  config.position = position;
  config.window = 5;
  config.max_positions = 32;
  const bool latents = attention == "latte" || attention == "macchiato";
  if (latents) config.num_latents = 3;
  if (position == "vapor") config.decay_rank = 0;  // as in checkpoints from before it
  const int64_t dim = config.embed_dim, hidden = config.hidden_dim();
  std::vector<TensorView> tensors;
  const std::vector<float> values(static_cast<size_t>(dim * hidden), 0.25f);
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    TensorView& tensor = tensors.emplace_back();
    tensor.name = "model." + name;
    tensor.shape = std::move(shape);
    tensor.data = std::as_bytes(std::span(values).first(static_cast<size_t>(count)));
  };
  add("token_embedding.weight", {config.vocab_size, dim});
  add("final_norm.weight", {dim});
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".", of = block + "attention.";
    add(block + "attention_norm.weight", {dim});
    add(block + "mlp_norm.weight", {dim});
    add(block + "mlp.up_proj.weight", {hidden, dim});
    add(block + "mlp.down_proj.weight", {dim, hidden});
    for (const char* name : {"value_proj", "out_proj"}) add(of + name + ".weight", {dim, dim});
    if (attention != "latte") {
      for (const char* name : {"query_proj", "key_proj"}) add(of + name + ".weight", {dim, dim});
    }
    if (latents) {
      const int64_t rows = config.num_heads * *config.num_latents;
      add(of + "query_logits_proj.weight", {rows + (attention == "macchiato" ? config.num_heads : 0), dim});
      add(of + "key_logits_proj.weight", {rows, dim});
      if (config.decay_rank == 0) {
        add(of + "decay_proj.weight", {rows, dim});
      } else {
        add(of + "decay_down.weight", {config.decay_rank, dim});
        add(of + "decay_up.weight", {rows, config.decay_rank});
        add(of + "decay_up.bias", {rows});
      }
    }
    if (position == "conv") {
      add(of + "conv.weight", {dim, config.conv_width});
      add(of + "conv.bias", {dim});
    }
    if (position == "rg_lru") {
      for (const char* name : {"recurrence_proj", "input_proj"}) add(of + "rg_lru." + name + ".weight", {dim, dim});
      add(of + "rg_lru.lambda", {dim});
    }
    if (attention == "gated_linear") {
      constexpr int64_t kRank = 16;  // nn/linear_attention.cc
      add(of + "decay_down.weight", {kRank, dim});
      add(of + "decay_up.weight", {dim, kRank});
      add(of + "decay_up.bias", {dim});
      add(of + "gate_proj.weight", {dim, dim});
      add(of + "norm_weight", {dim / config.num_heads});
    }
  }
  const auto vocabulary = Vocabulary::tokens(config.vocab_size, std::string(32, '0'));
  nlohmann::json json = {{"model", config.to_json()}, {"vocabulary", vocabulary.description()}};
  if (config.decay_rank == 0) json["model"].erase("decay_rank");
  write_checkpoint(path, {json.dump(), 1}, tensors);
}

inline std::vector<StateModel> state_models() {
  const TemporaryFolder folder;  // what is mapped outlives it
  const std::string path = folder / "model.gguf";
  GgufMetadata metadata = small_model("llama");
  metadata.set("llama.rope.scaling.type", std::string("none"));
  write_model(path, metadata, TensorType::kQ8_0);
  runtime::ModelOptions constant, growing;
  constant.threads = growing.threads = 1;
  constant.attention = {5, 2, 3};
  runtime::ModelOptions converted = growing;
  converted.adapter = folder / "adapter.gguf";
  write_small_adapter(converted.adapter, path);
  std::vector<StateModel> models = {{"constant", runtime::Model::open(path, constant)},
                                    {"growing", runtime::Model::open(path, growing)},
                                    {"converted", runtime::Model::open(path, converted)}};
  constexpr const char* kTrained[][2] = {{"softmax", "rotary"},  {"latte", "rg_lru"},      {"macchiato", "conv"},
                                         {"macchiato", "vapor"}, {"gated_linear", "none"}, {"softmax", "conv"},
                                         {"window", "vapor"},    {"linear", "conv"}};
  for (const auto& [attention, position] : kTrained) {
    const std::string checkpoint = folder / "checkpoint.safetensors";
    write_trained_model(checkpoint, attention, position);
    models.push_back({std::string(attention) + "-" + position, runtime::Model::open(checkpoint, growing)});
  }
  return models;
}

}  // namespace latte::fuzz
