// The inference engine against the libtorch model of latte train, for small random models of every attention and position.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine_compare.h"
#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/test_files.h"
#include "formats/vocabulary.h"
#include "models/language_model.h"
#include "runtime/error.h"
#include "train/training_checkpoint.h"

namespace latte {
namespace {

using formats::LanguageModelConfig;
using runtime::Engine;
using runtime::Model;
using runtime::Session;

constexpr int64_t kVocabulary = 61;

LanguageModelConfig config_of(const std::string& attention, const std::string& position) {
  LanguageModelConfig config;
  config.vocab_size = kVocabulary;
  config.num_layers = 3;
  config.embed_dim = 72;  // no multiple of a block's 32 columns, nor of a channel block's 64
  config.num_heads = 6;
  config.num_kv_heads = 3;
  config.attention = attention;
  config.position = position;
  config.window = 9;
  config.max_positions = 256;
  if (attention == "window" || attention == "macchiato") config.sinks = 3;
  if (attention == "latte" || attention == "macchiato") config.num_latents = 5;
  return config;
}

// Weights large enough for every part to carry.
models::LanguageModel random_model(const LanguageModelConfig& config) {
  torch::manual_seed(3);
  models::LanguageModel model(config);
  const torch::NoGradGuard no_grad;
  for (const auto& item : model->named_parameters()) {
    at::Tensor values = item.value();
    const bool norm = item.key().find("norm") != std::string::npos;
    if (values.dim() == 2 && item.key().find("embedding") == std::string::npos) {
      values.normal_(0.0, 1.5 / std::sqrt(static_cast<double>(values.size(1))));
    } else if (norm && item.key().ends_with("weight")) {
      values.normal_(1.0, 0.3);
    } else if (!item.key().ends_with("lambda")) {
      values.normal_(0.0, 0.5);
    }
  }
  model->eval();
  return model;
}

void write(const std::string& path, const models::LanguageModel& model) {
  std::vector<formats::TensorView> tensors;
  for (const auto& item : model->named_parameters()) tensors.push_back(train::view_of("model." + item.key(), item.value()));
  const auto vocabulary = formats::Vocabulary::tokens(model->config().vocab_size, std::string(32, '0'));
  const nlohmann::json config = {{"model", model->config().to_json()}, {"vocabulary", vocabulary.description()}};
  formats::write_checkpoint(path, {config.dump(), 1}, tensors);
}

std::vector<int32_t> random_tokens(int64_t count) {
  torch::manual_seed(4);
  const auto tokens = torch::randint(kVocabulary, {count}, torch::kInt32);
  return {tokens.data_ptr<int32_t>(), tokens.data_ptr<int32_t>() + count};
}

at::Tensor logits_of(models::LanguageModel model, const std::vector<int32_t>& tokens) {
  const torch::NoGradGuard no_grad;
  const auto input = torch::tensor(std::vector<int64_t>(tokens.begin(), tokens.end())).unsqueeze(0);
  return model->forward(input)[0].to(torch::kFloat64);
}

void expect_equals_libtorch(const LanguageModelConfig& config) {
  const formats::TestFolder folder;
  const auto model = random_model(config);
  write(folder / "checkpoint.safetensors", model);
  const auto tokens = random_tokens(150);
  expect_the_same_on_every_way(Model::open(folder / "checkpoint.safetensors"), tokens, logits_of(model, tokens), {150, 37, 1});
}

TEST(TrainedModelsInTheEngine, EveryAttentionAndPosition) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> all = {
      {"softmax", {"none", "learned", "sinusoidal", "rotary", "vapor", "conv", "rg_lru"}},
      {"window", {"none", "learned", "sinusoidal", "rotary", "vapor", "conv", "rg_lru"}},
      {"latte", {"none", "learned", "sinusoidal", "vapor", "conv", "rg_lru"}},
      {"macchiato", {"none", "learned", "sinusoidal", "rotary", "vapor", "conv", "rg_lru"}},
      {"linear", {"none", "learned", "sinusoidal", "vapor", "conv", "rg_lru"}},
      {"gated_linear", {"none", "learned", "sinusoidal", "vapor", "conv", "rg_lru"}},
  };
  for (const auto& [attention, positions] : all) {
    for (const std::string& position : positions) {
      SCOPED_TRACE(attention + ", " + position);
      expect_equals_libtorch(config_of(attention, position));
      if (HasFatalFailure()) return;
    }
  }
}

TEST(TrainedModelsInTheEngine, EveryOtherField) {
  const std::vector<std::pair<std::string, std::function<void(LanguageModelConfig&)>>> all = {
      {"bias", [](auto& c) { c.bias = true; }},
      {"rms", [](auto& c) { c.norm = "rms"; }},
      {"gated", [](auto& c) { c.mlp = "gated"; }},
      {"untied", [](auto& c) { c.tie_embeddings = false; }},
      {"remembers", [](auto& c) { c.forget = false; }},
      {"decays of a whole matrix", [](auto& c) { c.decay_rank = 0; }},
      {"decays of rank 3", [](auto& c) { c.decay_rank = 3; }},
      {"shared latents", [](auto& c) { c.shared_latents = true; }},
      {"one key-value head a head", [](auto& c) { c.num_kv_heads = {}; }},
      {"width 1", [](auto& c) { c.conv_width = 1; }},
      {"rope base", [](auto& c) { c.rope_base = 100.0; }},
  };
  for (const auto& [name, change] : all) {
    for (const char* position : {"conv", "rg_lru", "vapor"}) {
      for (const std::string attention : {"macchiato", "window"}) {
        LanguageModelConfig config = config_of(attention, position);
        change(config);
        if (attention == "window" && (config.forget || config.shared_latents)) continue;  // of latents
        SCOPED_TRACE(name + ", " + attention + ", " + position);
        expect_equals_libtorch(config);
        if (HasFatalFailure()) return;
      }
    }
  }
  for (const char* attention : {"linear", "gated_linear", "softmax"}) {
    LanguageModelConfig config = config_of(attention, "none");
    config.bias = true;
    config.num_kv_heads = {};
    expect_equals_libtorch(config);
    if (HasFatalFailure()) return;
  }
}

TEST(TrainedModelsInTheEngine, RandomSchedulesEqualEachSessionAlone) {
  const std::vector<std::pair<std::string, std::string>> all = {
      {"softmax", "rotary"},     {"window", "sinusoidal"},   {"latte", "conv"},   {"latte", "rg_lru"},      {"macchiato", "conv"},
      {"macchiato", "vapor"},    {"macchiato", "rg_lru"},    {"linear", "none"},  {"gated_linear", "none"}, {"softmax", "conv"},
      {"softmax", "vapor"},      {"window", "rg_lru"},       {"window", "vapor"}, {"linear", "vapor"},      {"linear", "conv"},
      {"gated_linear", "vapor"}, {"gated_linear", "rg_lru"},
  };
  for (const auto& [attention, position] : all) {
    SCOPED_TRACE(attention + ", " + position);
    const formats::TestFolder folder;
    const auto reference = random_model(config_of(attention, position));
    write(folder / "checkpoint.safetensors", reference);
    expect_random_schedules_to_equal_each_alone(Model::open(folder / "."), random_tokens(1500),
                                                [&](const auto& tokens) { return logits_of(reference, tokens); });
    if (HasFatalFailure()) return;
  }
}

// Which of them can go back, and how much a state takes.
TEST(TrainedModelsInTheEngine, StatesSayWhatTheyCanAndTake) {
  const formats::TestFolder folder;
  const auto tokens = random_tokens(40);
  for (const char* attention : {"softmax", "window", "latte", "macchiato", "linear", "gated_linear"}) {
    SCOPED_TRACE(attention);
    const auto reference = random_model(config_of(attention, "none"));
    write(folder / "checkpoint.safetensors", reference);
    const auto model = Model::open(folder / ".");  // as a run's folder
    Engine engine(model, {2, {}, 16});
    Session session(model, exact());
    engine.prefill(session, tokens);
    EXPECT_EQ(session.bytes(), Session::bytes_needed(*model, exact()));
    const bool grows = std::string(attention) == "softmax";
    EXPECT_EQ(model->shape().constant_state(), !grows);
    EXPECT_EQ(session.can_truncate(5), grows);
    session.truncate(grows ? 5 : 0);
    const auto rest = std::span(tokens).subspan(static_cast<size_t>(session.position()));
    EXPECT_LT(distance(engine.prefill(session, rest), logits_of(reference, tokens)[-1]), kFloat32);
  }
}

// What a convolution or RG-LRU remembers of the last tokens can't be taken back.
TEST(TrainedModelsInTheEngine, AMixerCannotGoBack) {
  const formats::TestFolder folder;
  const auto tokens = random_tokens(6);
  for (const char* position : {"conv", "rg_lru"}) {
    SCOPED_TRACE(position);
    const auto reference = random_model(config_of("softmax", position));
    write(folder / "checkpoint.safetensors", reference);
    const auto model = Model::open(folder / ".");
    Engine engine(model, {1, {}, 16});
    Session session(model, exact());
    engine.prefill(session, tokens);
    EXPECT_FALSE(session.can_truncate(5));
    session.truncate(0);
    EXPECT_LT(distance(engine.prefill(session, tokens), logits_of(reference, tokens)[-1]), kFloat32);
  }
}

TEST(TrainedModelsInTheEngine, QuantisedStaysClose) {
  LanguageModelConfig config = config_of("macchiato", "conv");
  config.embed_dim = 96;
  const formats::TestFolder folder;
  const auto reference = random_model(config);
  write(folder / "checkpoint.safetensors", reference);
  runtime::ModelOptions options;
  options.type = formats::TensorType::kQ8_0;
  const auto model = Model::open(folder / ".", options);
  EXPECT_NE(model->state_hash(), Model::open(folder / ".")->state_hash());
  Engine engine(model, {2, {}, 64});
  Session session(model);
  const auto tokens = random_tokens(60);
  const auto expected = logits_of(reference, tokens)[-1].log_softmax(-1);
  const auto got = engine.prefill(session, tokens);
  const auto logits = torch::from_blob(const_cast<float*>(got.data()), {kVocabulary}).to(torch::kFloat64).log_softmax(-1);
  EXPECT_LT((expected.exp() * (expected - logits)).sum().item<double>(), 1e-2);
}

TEST(TrainedModelsInTheEngine, LearnedPositionsEnd) {
  LanguageModelConfig config = config_of("latte", "learned");
  config.max_positions = 20;
  const formats::TestFolder folder;
  write(folder / "checkpoint.safetensors", random_model(config));
  const auto model = Model::open(folder / ".");
  Engine engine(model, {1});
  Session session(model, exact());
  EXPECT_EQ(session.room(), 20);
  EXPECT_THROW(engine.prefill(session, random_tokens(21)), runtime::SessionError);
  engine.prefill(session, random_tokens(20));
  EXPECT_EQ(session.room(), 0);
}

TEST(TrainedModelsInTheEngine, RefusesWhatIsNoneOrAnother) {
  const formats::TestFolder folder;
  const std::string path = folder / "checkpoint.safetensors";
  const auto one = random_model(config_of("latte", "conv"));
  write(path, one);
  runtime::ModelOptions options;
  options.adapter = path;
  EXPECT_THROW(Model::open(path, options), runtime::ModelError);
  const auto model = Model::open(path);
  Session(model).save(folder / "state");
  EXPECT_NO_THROW(Session::load(folder / "state", model));
  write(path, random_model(config_of("latte", "none")));
  EXPECT_THROW(Session::load(folder / "state", Model::open(path)), runtime::StateError);

  // A config that asks for other tensors than there are.
  std::vector<formats::TensorView> tensors;
  for (const auto& item : one->named_parameters()) tensors.push_back(train::view_of("model." + item.key(), item.value()));
  for (const auto& [attention, position] : {std::pair{"latte", "rg_lru"}, {"macchiato", "conv"}, {"softmax", "none"}}) {
    const auto config = config_of(attention, position);
    const auto vocabulary = formats::Vocabulary::tokens(kVocabulary, std::string(32, '0'));
    const nlohmann::json json = {{"model", config.to_json()}, {"vocabulary", vocabulary.description()}};
    formats::write_checkpoint(path, {json.dump(), 1}, tensors);
    EXPECT_THROW(Model::open(path), formats::FormatError) << attention;
  }
  formats::write_checkpoint(path, {R"({"task": "listops"})", 1}, tensors);
  EXPECT_THROW(Model::open(path), formats::FormatError);
  formats::write_checkpoint(path, {"{}", 1}, tensors);
  EXPECT_THROW(Model::open(path), formats::FormatError);
}

}  // namespace
}  // namespace latte
