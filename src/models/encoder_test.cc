#include "models/encoder.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "formats/test_files.h"

namespace latte::models {
namespace {

using nlohmann::json;

EncoderConfig small(const std::string& attention, const json& more = {}) {
  json fields = {{"vocab_size", 11},       {"num_outputs", 3},    {"num_layers", 2}, {"embed_dim", 16}, {"num_heads", 2},
                 {"attention", attention}, {"max_positions", 12}, {"window", 3},     {"projected", 4}};
  if (!more.is_null()) fields.update(more);
  return EncoderConfig::from_json(fields);
}

int64_t count(Encoder& model) {
  int64_t total = 0;
  for (const auto& parameter : model->parameters()) total += parameter.numel();
  return total;
}

TEST(Encoder, ParameterCountIsTheModels) {
  for (const json& fields :
       std::vector<json>{{{"attention", "softmax"}},
                         {{"attention", "window"}, {"position", "learned"}},
                         {{"attention", "window"}, {"position", "conv"}},
                         {{"attention", "softmax"}, {"position", "rg_lru"}},
                         {{"attention", "latte"}, {"num_latents", 5}},
                         {{"attention", "latte"}, {"shared_latents", true}, {"position", "conv"}},
                         {{"attention", "macchiato"}, {"norm", "batch"}, {"bias", false}},
                         {{"attention", "linear"}, {"head", "pairs"}},
                         {{"attention", "latte"}, {"pooled_norm", "batch"}},
                         {{"attention", "latte"}, {"head", "pairs"}, {"pooled_norm", "batch"}, {"bias", false}},
                         {{"attention", "linformer"}, {"norm", "rms"}},
                         {{"attention", "linformer"}, {"position", "conv"}},
                         {{"attention", "linear"}, {"position", "conv"}},
                         {{"attention", "gated_linear"}, {"position", "rg_lru"}},
                         {{"attention", "gated_linear"}, {"causal", true}, {"head", "tokens"}},
                         {{"attention", "gated_linear"}},
                         {{"attention", "window"}, {"sinks", 2}},
                         {{"attention", "latte"}, {"causal", true}}}) {
    const auto config = small(fields.at("attention"), fields);
    Encoder model(config);
    EXPECT_EQ(count(model), config.parameter_count()) << fields;
    EXPECT_EQ(EncoderConfig::from_json(config.to_json()).parameter_count(), config.parameter_count()) << fields;
  }
}

// A sequence gives the same logits alone and beside a longer one.
TEST(Encoder, PaddingAddsToNothing) {
  torch::manual_seed(1);
  for (const std::string attention : {"softmax", "window", "latte", "macchiato", "linear", "gated_linear", "linformer"}) {
    for (const std::string pooling : {"mean", "first", "last"}) {
      for (const auto& [norm, position] : {std::pair{"layer", "learned"}, {"batch", "learned"}, {"layer", "conv"}}) {
        Encoder model(small(attention, {{"pooling", pooling}, {"norm", norm}, {"position", position}}));
        model->to(torch::kFloat64);
        model->eval();
        const auto tokens = torch::randint(11, {2, 9});
        const auto padding = torch::zeros({2, 9}, torch::kBool);
        padding[1].slice(0, 5).fill_(true);
        const auto both = model(tokens, padding);
        const auto longer = model(tokens.slice(0, 0, 1)), shorter = model(tokens.slice(0, 1, 2).slice(1, 0, 5));
        EXPECT_TRUE(torch::allclose(both, torch::cat({longer, shorter}), 1e-9, 1e-9))
            << attention << ' ' << pooling << ' ' << norm << ' ' << position;
      }
    }
  }
}

TEST(Encoder, BatchNormTrainsOnRealTokensAlone) {
  torch::manual_seed(2);
  nn::Norm norm(nn::NormKind::kBatch, 4, /*bias=*/true);
  norm->to(torch::kFloat64);
  const auto x = torch::randn({2, 5, 4}, torch::kFloat64) * 3 + 1;
  const auto padding = torch::zeros({2, 5}, torch::kBool);
  padding[1].slice(0, 2).fill_(true);
  const auto real = torch::cat({x[0], x[1].slice(0, 0, 2)});  // [7, 4]
  const auto mean = real.mean(0), variance = real.var(0, /*unbiased=*/false);
  const auto expected = (real - mean) / (variance + 1e-5).sqrt();
  const auto out = norm(x, padding);
  EXPECT_TRUE(torch::allclose(torch::cat({out[0], out[1].slice(0, 0, 2)}), expected, 1e-9, 1e-9));
  EXPECT_TRUE(torch::allclose(norm->running_mean, 0.1 * mean, 1e-9, 1e-9));
  EXPECT_TRUE(torch::allclose(norm->running_var, 0.9 + 0.1 * real.var(0), 1e-9, 1e-9));
  norm->eval();
  EXPECT_TRUE(torch::allclose(norm(x), (x - norm->running_mean) / (norm->running_var + 1e-5).sqrt(), 1e-9, 1e-9));
}

TEST(Encoder, PooledNormIsOverTheExamples) {
  torch::manual_seed(5);
  Encoder plain(small("latte")), normed(small("latte", {{"pooled_norm", "batch"}}));
  {
    const torch::NoGradGuard no_grad;
    for (const auto& item : plain->named_parameters()) normed->named_parameters()[item.key()].copy_(item.value());
    for (auto model : {plain, normed}) {
      model->to(torch::kFloat64);
      model->output_proj->weight.zero_();
      for (int64_t i = 0; i < 3; ++i) model->output_proj->weight[i][i] = 1.0;  // logits are the first pooled features
    }
  }
  const auto tokens = torch::randint(11, {6, 9});
  const auto pooled = plain(tokens), out = normed(tokens);
  const auto expected = (pooled - pooled.mean(0)) / (pooled.var(0, /*unbiased=*/false) + 1e-5).sqrt();
  EXPECT_TRUE(torch::allclose(out, expected, 1e-9, 1e-9));
  EXPECT_THROW(normed(tokens.slice(0, 0, 1)), c10::ValueError);
  normed->eval();  // one by one as together
  EXPECT_TRUE(torch::allclose(normed(tokens.slice(0, 0, 1)), normed(tokens).slice(0, 0, 1), 1e-9, 1e-9));
}

TEST(Encoder, CausalTokensDontSeeTheFuture) {
  torch::manual_seed(3);
  for (const std::string attention : {"softmax", "latte", "macchiato", "linear", "gated_linear"}) {
    Encoder model(small(attention, {{"causal", true}, {"head", "tokens"}}));
    model->eval();
    const auto tokens = torch::randint(11, {1, 9});
    auto changed = tokens.clone();
    changed[0][6] = (tokens[0][6] + 1) % 11;
    const auto before = model(tokens), after = model(changed);
    EXPECT_TRUE(torch::allclose(before.slice(1, 0, 6), after.slice(1, 0, 6), 1e-5, 1e-6)) << attention;
    EXPECT_FALSE(torch::allclose(before.slice(1, 6), after.slice(1, 6), 1e-5, 1e-6)) << attention;
  }
}

TEST(Encoder, PairsAreReadByOneEncoder) {
  torch::manual_seed(4);
  Encoder model(small("latte", {{"head", "pairs"}}));
  model->eval();
  const auto a = torch::randint(11, {1, 6}), b = torch::randint(11, {1, 6});
  const auto logits = model(torch::cat({a, b, b, a}));
  EXPECT_EQ(logits.sizes(), (std::vector<int64_t>{2, 3}));
  EXPECT_FALSE(torch::allclose(logits[0], logits[1]));  // a - b has a sign
  EXPECT_TRUE(torch::allclose(model(torch::cat({b, a})), logits.slice(0, 1), 1e-5, 1e-6));
  EXPECT_THROW(model(a), c10::ValueError);
}

TEST(Encoder, ImpossibleConfigurationsNameTheField) {
  const auto error = [](const std::string& attention, const json& fields) {
    return formats::error_text<formats::ConfigError>([&] { small(attention, fields); });
  };
  EXPECT_CONTAINS(error("latte", {{"forget", true}}), "forget is true");
  EXPECT_CONTAINS(error("macchiato", {{"sinks", 2}}), "sinks is 2, expected 0 unless causal");
  EXPECT_CONTAINS(error("linformer", {{"causal", true}}), "attention is linformer");
  EXPECT_CONTAINS(error("softmax", {{"pooling", "max"}}), "pooling is \"max\", expected one of mean, first, last");
  EXPECT_CONTAINS(error("softmax", {{"pooled_norm", "layer"}}), "pooled_norm is \"layer\", expected one of none, batch");
  EXPECT_CONTAINS(error("softmax", {{"pooled_norm", "batch"}, {"head", "tokens"}}), "pooled_norm is \"batch\"");
  EXPECT_CONTAINS(error("softmax", {{"causal", 1}}), "causal is 1, expected true or false");
  EXPECT_CONTAINS(error("softmax", {{"num_heads", 3}}), "num_heads is 3, expected a divisor of embed_dim");
  EXPECT_CONTAINS(error("softmax", {{"head", "maps"}}), "head is \"maps\"");
  EXPECT_CONTAINS(error("softmax", {{"shared_latents", true}}), "shared_latents is true");
  EXPECT_CONTAINS(error("linear", {{"position", "rotary"}}), "position is \"rotary\"");
  EXPECT_CONTAINS(error("softmax", {{"colour", 1}}), "unknown field");
  Encoder model(small("softmax", {{"position", "learned"}}));
  EXPECT_THROW(model(torch::zeros({1, 13}, torch::kInt64)), c10::ValueError);
  EXPECT_THROW(model(torch::zeros({2, 4}, torch::kInt64), torch::zeros({2, 4})), c10::TypeError);  // padding is bool
  // A language model takes none of what needs a whole sequence.
  EXPECT_THROW(formats::LanguageModelConfig::from_json({{"vocab_size", 3}, {"attention", "linformer"}}), formats::ConfigError);
  EXPECT_THROW(formats::LanguageModelConfig::from_json({{"vocab_size", 3}, {"norm", "batch"}}), formats::ConfigError);
}

}  // namespace
}  // namespace latte::models
