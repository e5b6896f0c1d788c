#include "models/language_model.h"

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "nn/test_close.h"

namespace latte::models {
namespace {

using nlohmann::json;
using nn::close;

constexpr int64_t kBatch = 2, kTime = 29, kVocab = 23;

formats::LanguageModelConfig small_config(const std::string& attention, const std::string& position) {
  formats::LanguageModelConfig config;
  config.vocab_size = kVocab;
  config.num_layers = 2;
  config.embed_dim = 24;
  config.num_heads = 2;
  config.attention = attention;
  config.position = position;
  config.window = 5;
  config.max_positions = 64;
  return config;
}

struct Case {
  std::string name;
  formats::LanguageModelConfig config;
};

void PrintTo(const Case& one, std::ostream* out) { *out << one.name; }

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto& [attention, name] :
       {std::pair{"softmax", "Softmax"}, {"window", "Window"}, {"latte", "Latte"}, {"macchiato", "Macchiato"}}) {
    for (const auto& [position, where] : {std::pair{"none", "None"},
                                          {"learned", "Learned"},
                                          {"sinusoidal", "Sinusoidal"},
                                          {"rotary", "Rotary"},
                                          {"vapor", "Vapor"},
                                          {"conv", "Conv"},
                                          {"rg_lru", "RgLru"}}) {
      // Latents alone have no queries and keys of heads that could be rotated.
      if (std::string(attention) == "latte" && std::string(position) == "rotary") continue;
      all.push_back({std::string(name) + where, small_config(attention, position)});
    }
  }
  for (const auto& [position, name] : std::vector<std::pair<std::string, std::string>>{
           {"none", "None"}, {"sinusoidal", "Sinusoidal"}, {"vapor", "Vapor"}, {"conv", "Conv"}, {"rg_lru", "RgLru"}}) {
    all.push_back({"Linear" + name, small_config("linear", position)});
    if (position != "sinusoidal") all.push_back({"GatedLinear" + name, small_config("gated_linear", position)});
  }
  for (const std::string attention : {"latte", "macchiato"}) {
    auto keeping = small_config(attention, "conv");
    keeping.forget = false;
    all.push_back({(attention == "latte" ? "LatteKeepsAll" : "MacchiatoKeepsAll"), keeping});
  }
  auto rich = small_config("macchiato", "conv");
  rich.num_heads = 4;
  rich.num_kv_heads = 2;
  rich.num_latents = 7;
  rich.sinks = 2;
  rich.forget = true;
  rich.norm = "rms";
  rich.mlp = "gated";
  rich.bias = true;
  rich.tie_embeddings = false;
  all.push_back({"MacchiatoOfEverything", rich});
  auto whole = small_config("latte", "conv");
  whole.decay_rank = 0;
  all.push_back({"LatteDecaysOfAWholeMatrix", whole});
  auto shared = small_config("latte", "conv");
  shared.shared_latents = true;
  all.push_back({"LatteShared", shared});
  auto grouped = small_config("softmax", "rotary");
  grouped.num_heads = 4;
  grouped.num_kv_heads = 1;
  grouped.mlp = "gated";
  all.push_back({"SoftmaxGrouped", grouped});
  return all;
}

class Models : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    torch::manual_seed(2);
    model_ = LanguageModel(GetParam().config);
    // The initial model predicts close to nothing; larger weights make a mistake show.
    torch::NoGradGuard no_grad;
    for (auto& item : model_->named_parameters()) {
      if (item.value().dim() == 2 && item.key().find("conv") == std::string::npos) item.value().mul_(5.0);
    }
    tokens_ = torch::randint(kVocab, {kBatch, kTime}, torch::kInt64);
  }

  LanguageModel model_{nullptr};
  at::Tensor tokens_;
};

TEST_P(Models, NeverReadTheFuture) {
  torch::NoGradGuard no_grad;
  const auto expected = model_->forward(tokens_);
  ASSERT_EQ(expected.sizes(), (std::vector<int64_t>{kBatch, kTime, kVocab}));
  auto changed = tokens_.clone();
  changed.slice(1, 12) = (changed.slice(1, 12) + 1) % kVocab;
  const auto logits = model_->forward(changed);
  EXPECT_TRUE(close(logits.slice(1, 0, 12), expected.slice(1, 0, 12)));
  EXPECT_FALSE(close(logits.slice(1, 12), expected.slice(1, 12), 1e-2));
}

TEST_P(Models, WholeIsPrefillIsSteps) {
  torch::NoGradGuard no_grad;
  const auto expected = model_->forward(tokens_);
  for (const auto& lengths : {std::vector<int64_t>{kTime}, std::vector<int64_t>{11, 1, 1, 16}, std::vector<int64_t>(kTime, 1)}) {
    std::optional<LanguageModelState> state;
    std::vector<at::Tensor> pieces;
    int64_t begin = 0;
    for (const int64_t length : lengths) {
      const auto piece = tokens_.slice(1, begin, begin + length);
      const auto last = std::get<0>(model_->forward_with_state(piece, state, /*last_only=*/true));
      auto [logits, after] = model_->forward_with_state(piece, state);
      EXPECT_TRUE(close(last, logits.slice(1, -1)));
      pieces.push_back(logits);
      state = std::move(after);
      begin += length;
      EXPECT_EQ(state->position(), begin);
    }
    EXPECT_TRUE(close(torch::cat(pieces, 1), expected)) << lengths.size() << " pieces";
  }
}

int64_t elements(const LanguageModelState& state) {
  int64_t total = 0;
  const auto add = [&](const at::Tensor& x) { total += x.defined() ? x.numel() : 0; };
  for (const auto& layer : state.layers) {
    for (const auto& x : {layer.latents, layer.keys, layer.values, layer.mask, layer.conv, layer.rg_lru}) add(x);
    if (!layer.macchiato) continue;
    const auto& m = *layer.macchiato;
    for (const auto& x : {m.latents, m.keys, m.values, m.mask, m.sink_keys, m.sink_values, m.sink_mask, m.position}) add(x);
  }
  return total;
}

TEST_P(Models, StateIsOfConstantSizeUnlessSoftmax) {
  torch::NoGradGuard no_grad;
  const auto size = [&](int64_t time) {
    return elements(std::get<1>(model_->forward_with_state(tokens_.slice(1, 0, time), std::nullopt, true)));
  };
  EXPECT_GT(size(1), 0);
  EXPECT_EQ(size(1) == size(kTime), GetParam().config.attention != "softmax");
}

TEST_P(Models, ParameterCountIsTheModels) {
  int64_t total = 0;
  for (const auto& parameter : model_->parameters()) total += parameter.numel();
  EXPECT_EQ(GetParam().config.parameter_count(), total);
}

TEST_P(Models, Learn) {
  torch::manual_seed(4);
  LanguageModel model(GetParam().config);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-2));
  const auto inputs = tokens_.slice(1, 0, -1), targets = tokens_.slice(1, 1).flatten();
  const auto loss = [&] { return torch::nn::functional::cross_entropy(model->forward(inputs).flatten(0, 1), targets); };
  EXPECT_NEAR(loss().item<double>(), std::log(static_cast<double>(kVocab)), 0.1);
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    loss().backward();
    for (const auto& item : model->named_parameters()) {
      // A shift of all key logits changes nothing, so this bias has no gradient but rounding's.
      if (step > 0 || item.key().ends_with("key_logits_proj.bias")) continue;
      ASSERT_TRUE(item.value().grad().defined()) << item.key();
      EXPECT_GT(item.value().grad().norm().item<double>(), 0.0) << item.key();
    }
    optimizer.step();
  }
  EXPECT_LT(loss().item<double>(), 1.0);  // random tokens: learnt by heart
}

// Mixed precision as the trainer's: float32 parameters, bfloat16 arithmetic.
TEST_P(Models, AutocastIsNearFloat32) {
  const auto run = [&] {
    model_->zero_grad();
    const auto logits = model_->forward(tokens_);
    torch::nn::functional::cross_entropy(logits.flatten(0, 1), tokens_.flatten()).backward();
    std::vector<at::Tensor> gradients;
    for (const auto& parameter : model_->parameters()) gradients.push_back(parameter.grad().clone());
    return std::pair{logits.detach(), gradients};
  };
  const auto [expected, gradients] = run();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto [logits, cast_gradients] = run();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_TRUE(close(logits, expected, 0.05));
  for (size_t i = 0; i < gradients.size(); ++i) EXPECT_TRUE(close(cast_gradients[i], gradients[i], 0.15)) << i;
}

TEST_P(Models, ConfigSurvivesJson) {
  const auto& config = GetParam().config;
  const auto text = config.to_json().dump();
  const auto read = formats::LanguageModelConfig::from_json(json::parse(text));
  EXPECT_EQ(read.to_json().dump(), text);
  EXPECT_EQ(read.parameter_count(), config.parameter_count());
  EXPECT_EQ(read.position_name(), config.position_name());
}

INSTANTIATE_TEST_SUITE_P(Language, Models, testing::ValuesIn(cases()), [](const auto& param) { return param.param.name; });

// nanoGPT's GPT, written out from its description with torch's functions: learned positions, pre-norm blocks, one matrix for
// queries, keys and values, exact GELU, no biases, a tied output projection.
at::Tensor nano_gpt(const LanguageModel& model, const at::Tensor& tokens) {
  const auto p = model->named_parameters();
  const auto norm = [&](const at::Tensor& x, const std::string& name) {
    const auto centred = x - x.mean(-1, true);
    return centred / (centred.square().mean(-1, true) + 1e-5).sqrt() * p[name + ".weight"];
  };
  const int64_t batch = tokens.size(0), time = tokens.size(1), dim = model->config().embed_dim, heads = model->config().num_heads;
  auto x = p["token_embedding.weight"].index({tokens}) + p["position_embedding.weight"].slice(0, 0, time);
  for (int64_t i = 0; i < model->config().num_layers; ++i) {
    const auto block = "blocks." + std::to_string(i) + ".";
    const auto attention = block + "attention.";
    const auto c_attn =
        torch::cat({p[attention + "query_proj.weight"], p[attention + "key_proj.weight"], p[attention + "value_proj.weight"]});
    const auto qkv = torch::matmul(norm(x, block + "attention_norm"), c_attn.t()).split(dim, 2);
    const auto split = [&](const at::Tensor& y) { return y.view({batch, time, heads, dim / heads}).transpose(1, 2); };
    auto scores = torch::matmul(split(qkv[0]), split(qkv[1]).transpose(-2, -1)) /
                  std::sqrt(static_cast<double>(dim) / static_cast<double>(heads));
    scores = scores.masked_fill(torch::ones({time, time}, torch::kBool).triu(1), -INFINITY);
    const auto y = torch::matmul(scores.softmax(-1), split(qkv[2])).transpose(1, 2).reshape({batch, time, dim});
    x = x + torch::matmul(y, p[attention + "out_proj.weight"].t());
    const auto hidden = torch::matmul(norm(x, block + "mlp_norm"), p[block + "mlp.up_proj.weight"].t());
    const auto gelu = hidden * 0.5 * (1.0 + torch::erf(hidden / std::sqrt(2.0)));
    x = x + torch::matmul(gelu, p[block + "mlp.down_proj.weight"].t());
  }
  return torch::matmul(norm(x, "final_norm"), p["token_embedding.weight"].t());
}

TEST(NanoGpt, SameFunction) {
  torch::manual_seed(9);
  torch::NoGradGuard no_grad;
  LanguageModel model(small_config("softmax", "learned"));
  for (auto& parameter : model->parameters()) parameter.add_(0.1 * torch::randn_like(parameter));
  const auto tokens = torch::randint(kVocab, {kBatch, kTime}, torch::kInt64);
  EXPECT_TRUE(close(model->forward(tokens), nano_gpt(model, tokens), 3e-6));
}

TEST(NanoGpt, SameSizeAndStart) {
  formats::LanguageModelConfig config;  // its character-level Shakespeare model
  config.vocab_size = 65;
  config.position = "learned";
  config.max_positions = 256;
  EXPECT_EQ(config.parameter_count(), 10646784 + 256 * 384);  // it prints 10.65M, position embeddings not counted

  torch::manual_seed(1);
  LanguageModel model(config);
  const auto parameters = model->named_parameters();
  const auto deviation = [&](const std::string& name) { return parameters[name].std().item<double>(); };
  EXPECT_NEAR(deviation("token_embedding.weight"), 0.02, 0.0005);
  EXPECT_NEAR(deviation("position_embedding.weight"), 0.02, 0.0005);
  EXPECT_NEAR(deviation("blocks.3.attention.query_proj.weight"), 0.02, 0.0005);
  EXPECT_NEAR(deviation("blocks.3.attention.out_proj.weight"), 0.02 / std::sqrt(12.0), 0.0001);
  EXPECT_NEAR(deviation("blocks.5.mlp.down_proj.weight"), 0.02 / std::sqrt(12.0), 0.0001);
}

TEST(LowRankDecays, StartSpreadAndAsLargeAsAWholeMatrixs) {
  torch::manual_seed(1);
  auto config = small_config("latte", "conv");
  config.embed_dim = 256;
  config.num_latents = 64;
  LanguageModel model(config);
  const auto parameters = model->named_parameters();
  const auto& bias = parameters["blocks.1.attention.decay_up.bias"];
  EXPECT_TRUE(at::equal(bias.view({-1, 64})[0], torch::linspace(-3, 3, 64)));
  const auto product = parameters["blocks.1.attention.decay_up.weight"].mm(parameters["blocks.1.attention.decay_down.weight"]);
  EXPECT_NEAR(product.std().item<double>(), 0.02, 0.003);
}

TEST(SavedModelConfig, DecaysWereAWholeMatrixBeforeTheyHadARank) {
  auto saved = small_config("latte", "conv").to_json();
  EXPECT_EQ(formats::saved_model_config(saved), saved);
  saved.erase("decay_rank");
  EXPECT_EQ(formats::LanguageModelConfig::from_json(formats::saved_model_config(saved)).decay_rank, 0);
  EXPECT_EQ(formats::LanguageModelConfig::from_json(saved).decay_rank, 16);
  EXPECT_EQ(formats::saved_model_config("text"), "text");
}

TEST(LanguageModelErrors, InputsAreChecked) {
  torch::NoGradGuard no_grad;
  LanguageModel model(small_config("softmax", "learned"));
  EXPECT_THROW(model->forward(torch::zeros({kTime}, torch::kInt64)), c10::ValueError);
  EXPECT_THROW(model->forward(torch::zeros({1, 0}, torch::kInt64)), c10::ValueError);
  EXPECT_THROW(model->forward(torch::zeros({1, 4})), c10::TypeError);
  EXPECT_THROW(model->forward(torch::full({1, 4}, kVocab, torch::kInt64)), c10::Error);
  EXPECT_THROW(model->forward(torch::full({1, 4}, -1, torch::kInt64)), c10::Error);
  EXPECT_THROW(model->forward(torch::zeros({1, 65}, torch::kInt64)), c10::ValueError);
  const auto state = std::get<1>(model->forward_with_state(torch::zeros({1, 64}, torch::kInt64)));
  EXPECT_THROW(model->forward_with_state(torch::zeros({1, 1}, torch::kInt64), state), c10::ValueError);
  EXPECT_THROW(model->forward_with_state(torch::zeros({1, 1}, torch::kInt64), LanguageModelState{}), c10::ValueError);
  LanguageModel other(small_config("latte", "none"));
  EXPECT_THROW(other->forward_with_state(torch::zeros({1, 1}, torch::kInt64), state), c10::ValueError);
}

TEST(LanguageModelConfigJson, DefaultsAreFilledIn) {
  const auto config = formats::LanguageModelConfig::from_json(json{{"vocab_size", 65}});
  EXPECT_EQ(config.position_name(), "rotary");
  EXPECT_EQ(config.to_json().at("num_kv_heads"), 6);
  const auto latte = formats::LanguageModelConfig::from_json(json{{"vocab_size", 65}, {"attention", "latte"}});
  EXPECT_EQ(latte.position_name(), "conv");
  EXPECT_EQ(latte.to_json().at("num_latents"), 64);
}

// Each text must name the field and say what is allowed, on one line.
TEST(LanguageModelConfigJson, WhatCannotBeIsRefused) {
  const auto refuses = [](const json& change, const std::string& field, const std::string& says) {
    json object{{"vocab_size", 65}};
    object.update(change);
    try {
      formats::LanguageModelConfig::from_json(object);
      ADD_FAILURE() << change << " was taken";
    } catch (const formats::ConfigError& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find(field), std::string::npos) << text;
      EXPECT_NE(text.find(says), std::string::npos) << text;
      EXPECT_EQ(text.find('\n'), std::string::npos) << text;
      EXPECT_LT(text.size(), 500u) << text;
    }
  };
  refuses({{"vocab_size", 0}}, "vocab_size is 0", "1 … ");
  refuses({{"vocab_size", "65"}}, "vocab_size is \"65\"", "an integer");
  refuses({{"vocab_size", 65.5}}, "vocab_size is 65.5", "an integer");
  refuses({{"embed_dim", 18446744073709551615u}}, "embed_dim", "64 bits");
  refuses({{"embed_dim", 1000000000000}}, "embed_dim", "integer in");
  refuses({{"num_layers", -1}}, "num_layers is -1", "1 … 4096");
  refuses({{"num_heads", 5}}, "num_heads is 5", "divisor of embed_dim (384)");
  refuses({{"num_kv_heads", 4}}, "num_kv_heads is 4", "divisor of num_heads (6)");
  refuses({{"num_kv_heads", 0}}, "num_kv_heads is 0", "1 … ");
  refuses({{"num_kv_heads", nullptr}}, "num_kv_heads is null", "an integer");
  refuses({{"attention", "linformer"}}, "attention is \"linformer\"",
          "softmax, window, latte, macchiato, linear or gated_linear");
  refuses({{"attention", "latte"}, {"position", "rotary"}}, "position is \"rotary\"",
          "none, learned, sinusoidal, vapor, conv or rg_lru with");
  refuses({{"position", "alibi"}}, "position is \"alibi\"",
          "none, learned, sinusoidal, rotary, vapor, conv or rg_lru with attention softmax");
  refuses({{"embed_dim", 18}, {"num_heads", 6}, {"position", "vapor"}}, "num_heads is 6", "even size with position vapor");
  refuses({{"attention", "linear"}, {"position", "rotary"}}, "position is \"rotary\"",
          "none, learned, sinusoidal, vapor, conv or rg_lru with attention linear");
  refuses({{"shared_latents", true}}, "shared_latents is true", "no latents");
  refuses({{"projected", 0}}, "projected is 0", "1 … ");
  refuses({{"embed_dim", 18}, {"num_heads", 6}}, "num_heads is 6", "even size");
  refuses({{"attention", "latte"}, {"num_latents", 0}}, "num_latents is 0", "1 … ");
  refuses({{"num_latents", 64}}, "num_latents is 64", "no latents");
  refuses({{"forget", true}}, "forget is true", "no latents");
  refuses({{"forget", 1}}, "forget is 1", "true or false");
  refuses({{"decay_rank", -1}}, "decay_rank is -1", "0");
  refuses({{"sinks", 4}}, "sinks is 4", "no window");
  refuses({{"window", 0}}, "window is 0", "1 … ");
  refuses({{"conv_width", 0}}, "conv_width is 0", "1 … ");
  refuses({{"norm", "batch"}}, "norm is \"batch\"", "layer or rms");
  refuses({{"mlp", "relu"}}, "mlp is \"relu\"", "gelu or gated");
  refuses({{"mlp_ratio", 0}}, "mlp_ratio is 0", "positive");
  refuses({{"mlp_ratio", 1e300}}, "mlp_ratio is 1e+300", "positive");
  refuses({{"dropout", 1.0}}, "dropout is 1.0", "[0, 1)");
  refuses({{"rope_base", -1}}, "rope_base is -1", "positive");
  refuses({{"attentoin", "latte"}}, "unknown field \"attentoin\"", "attention");
  refuses({{std::string(10000, 'x') + "\n", 1}}, "unknown field", "…");
  refuses({{"\x1b[31m\n\xff", 1}}, "unknown field \"\\u001b[31m\\n", "expected");
  for (const auto& object : {json::array(), json("text"), json(nullptr), json::object()}) {
    EXPECT_THROW(formats::LanguageModelConfig::from_json(object), formats::ConfigError);
  }
}

}  // namespace
}  // namespace latte::models
