#include "nn/attention.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <limits>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "nn/attention_weights.h"
#include "nn/softmax_attention.h"
#include "nn/test_close.h"

namespace latte::nn {
namespace {

constexpr int64_t kBatch = 2, kTime = 37, kDim = 24, kHeads = 4;

struct Case {
  std::string name;
  std::function<std::shared_ptr<AttentionImpl>(bool batch_first)> make;
  bool has_sinks = false;
  bool bidirectional = true;
  bool plain_values = true;  // weights times values are the output
};

void PrintTo(const Case& one, std::ostream* out) { *out << one.name; }

template <typename Options>
Options common(bool batch_first) {
  Options options;
  options.embed_dim = kDim;
  options.num_heads = kHeads;
  options.bias = false;
  options.batch_first = batch_first;
  return options;
}

Case latte_case(std::string name, LatentPosition position, bool forget = false, int64_t kv_heads = kHeads, int64_t latents = 5) {
  Case one{std::move(name), [=](bool batch_first) {
             auto options = common<LatteAttentionOptions>(batch_first);
             options.position = position;
             options.forget = forget;
             options.num_kv_heads = kv_heads;
             options.num_latents = latents;
             return std::make_shared<LatteAttentionImpl>(options);
           }};
  one.bidirectional = !forget;
  one.plain_values = position != LatentPosition::kVapor;
  return one;
}

Case macchiato_case(std::string name, LatentPosition position, int64_t sinks = 0, bool rope = true, int64_t kv_heads = kHeads,
                    bool forget = false) {
  Case one{std::move(name), [=](bool batch_first) {
             auto options = common<MacchiatoAttentionOptions>(batch_first);
             options.position = position;
             options.sinks = sinks;
             options.rope = rope;
             options.num_kv_heads = kv_heads;
             options.forget = forget;
             options.window = 6;
             return std::make_shared<MacchiatoAttentionImpl>(options);
           }};
  one.has_sinks = sinks > 0;
  one.bidirectional = sinks == 0 && !forget;
  one.plain_values = position != LatentPosition::kVapor;
  return one;
}

Case softmax_case(std::string name, int64_t window, int64_t sinks = 0, bool rope = true, int64_t kv_heads = kHeads,
                  LatentPosition position = LatentPosition::kNone) {
  Case one{std::move(name), [=](bool batch_first) {
             auto options = common<SoftmaxAttentionOptions>(batch_first);
             options.window = window;
             options.sinks = sinks;
             options.rope = rope;
             options.num_kv_heads = kv_heads;
             options.position = position;
             return std::make_shared<SoftmaxAttentionImpl>(options);
           }};
  one.has_sinks = sinks > 0;
  one.plain_values = position != LatentPosition::kVapor;
  return one;
}

std::vector<Case> cases() {
  return {latte_case("Latte", LatentPosition::kNone),
          latte_case("LatteVapor", LatentPosition::kVapor),
          latte_case("LatteConv", LatentPosition::kConv),
          latte_case("LatteRgLru", LatentPosition::kRgLru),
          latte_case("LatteForget", LatentPosition::kNone, true),
          latte_case("LatteGrouped", LatentPosition::kConv, true, 2, 3),
          macchiato_case("Macchiato", LatentPosition::kNone),
          macchiato_case("MacchiatoVapor", LatentPosition::kVapor, 2, true, 2),
          macchiato_case("MacchiatoConv", LatentPosition::kConv, 0, false),
          macchiato_case("MacchiatoRgLru", LatentPosition::kRgLru, 3, true, 1, true),
          softmax_case("Softmax", 0),
          softmax_case("SoftmaxGrouped", 0, 0, false, 2),
          softmax_case("SoftmaxVapor", 0, 0, false, 2, LatentPosition::kVapor),
          softmax_case("SoftmaxConv", 0, 0, false, kHeads, LatentPosition::kConv),
          softmax_case("SoftmaxRgLru", 0, 0, true, 2, LatentPosition::kRgLru),
          softmax_case("Window", 6),
          softmax_case("WindowSinks", 6, 2, true, 2),
          softmax_case("WindowVapor", 6, 2, false, 2, LatentPosition::kVapor),
          softmax_case("WindowConv", 6, 0, false, 2, LatentPosition::kConv),
          softmax_case("WindowRgLru", 6, 2, true, kHeads, LatentPosition::kRgLru)};
}

class Attention : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    torch::manual_seed(7);
    module_ = GetParam().make(true);
    // Wider than the initial weights: probabilities far from uniform, so that a mistake shows.
    torch::NoGradGuard no_grad;
    for (auto& parameter : module_->parameters()) {
      if (parameter.dim() == 2 && parameter.size(1) == kDim) parameter.mul_(2.0);
    }
    x_ = torch::randn({kBatch, kTime, kDim});
  }

  std::vector<bool> directions() const { return GetParam().bidirectional ? std::vector{true, false} : std::vector{true}; }

  std::shared_ptr<AttentionImpl> module_;
  at::Tensor x_;
};

TEST_P(Attention, TakesEveryLayout) {
  for (const bool causal : directions()) {
    const auto expected = module_->forward(x_, {.is_causal = causal}).out;
    ASSERT_EQ(expected.sizes(), x_.sizes());
    const auto time_first = GetParam().make(false);
    torch::NoGradGuard no_grad;
    for (auto& item : time_first->named_parameters()) item.value().copy_(module_->named_parameters()[item.key()]);
    EXPECT_TRUE(close(time_first->forward(x_.transpose(0, 1), {.is_causal = causal}).out.transpose(0, 1), expected));
    EXPECT_TRUE(close(module_->forward(x_[1], {.is_causal = causal}).out, expected[1]));
  }
}

TEST_P(Attention, NothingInIsNothingOut) {
  for (const bool causal : directions()) {
    for (const auto& [batch, time] : {std::pair<int64_t, int64_t>{0, 5}, {2, 0}, {0, 0}}) {
      const auto x = torch::zeros({batch, time, kDim}).requires_grad_();
      const auto out = module_->forward(x, {.is_causal = causal}).out;
      ASSERT_EQ(out.sizes(), x.sizes());
      out.sum().backward();
      EXPECT_EQ(x.grad().sizes(), x.sizes());
    }
  }
}

TEST_P(Attention, NeverReadsTheFuture) {
  const auto expected = module_->forward(x_, {.is_causal = true}).out;
  for (const int64_t t : {int64_t{1}, kTime / 2, kTime - 1}) {
    auto changed = x_.clone();
    changed.slice(1, t).normal_();
    const auto out = module_->forward(changed, {.is_causal = true}).out;
    EXPECT_TRUE(close(out.slice(1, 0, t), expected.slice(1, 0, t)));
    EXPECT_FALSE(close(out.slice(1, t), expected.slice(1, t)));
  }
}

TEST_P(Attention, BidirectionalReadsTheFuture) {
  if (!GetParam().bidirectional) return;
  auto changed = x_.clone();
  changed.slice(1, kTime / 2).normal_();
  const auto half = [](const at::Tensor& x) { return x.slice(1, 0, kTime / 2); };
  EXPECT_FALSE(close(half(module_->forward(changed).out), half(module_->forward(x_).out)));
}

TEST_P(Attention, PaddingIsNotThere) {
  const int64_t length = kTime - 9;
  for (const bool causal : directions()) {
    const auto expected = module_->forward(x_.slice(1, 0, length), {.is_causal = causal}).out;
    auto padding = torch::zeros({kBatch, kTime}, torch::kBool);
    padding.slice(1, length) = true;
    EXPECT_TRUE(
        close(module_->forward(x_, {.key_padding_mask = padding, .is_causal = causal}).out.slice(1, 0, length), expected));
    if (GetParam().has_sinks) continue;  // the first S positions, padding or not, are the sinks
    const auto shifted = torch::cat({x_.slice(1, length), x_.slice(1, 0, length)}, 1);
    padding = torch::zeros({kBatch, kTime}, torch::kBool);
    padding.slice(1, 0, kTime - length) = true;
    EXPECT_TRUE(close(module_->forward(shifted, {.key_padding_mask = padding, .is_causal = causal}).out.slice(1, kTime - length),
                      expected));
  }
}

TEST_P(Attention, WholeIsPiecesIsSteps) {
  auto padding = torch::zeros({kBatch, kTime}, torch::kBool);
  padding[1].slice(0, 10, 20) = true;
  for (const bool padded : {false, true}) {
    AttentionForwardOptions options{.is_causal = true, .output_state = true};
    if (padded) options.key_padding_mask = padding;
    const auto whole = module_->forward(x_, options);
    for (const auto& lengths : {std::vector<int64_t>{20, 1, 16}, std::vector<int64_t>{3, 34}, std::vector<int64_t>(kTime, 1)}) {
      std::vector<at::Tensor> pieces;
      std::optional<AttentionState> state;
      int64_t begin = 0;
      for (const int64_t length : lengths) {
        AttentionForwardOptions piece{.is_causal = true, .state = state, .output_state = true};
        if (padded) piece.key_padding_mask = padding.slice(1, begin, begin + length);
        const auto result = module_->forward(x_.slice(1, begin, begin + length), piece);
        ASSERT_TRUE(result.state);
        pieces.push_back(result.out);
        state = result.state;
        begin += length;
      }
      EXPECT_TRUE(close(torch::cat(pieces, 1), whole.out)) << lengths.size() << " pieces, padded " << padded;
      EXPECT_EQ(state->position, kTime);
      EXPECT_EQ(whole.state->position, kTime);
    }
  }
}

// Through the state, the loss of a second piece reaches the first.
TEST_P(Attention, GradientsFlowThroughTheState) {
  const auto gradient = [&](const std::function<at::Tensor(const at::Tensor&)>& run) {
    const auto x = x_.clone().requires_grad_();
    run(x).slice(1, kTime - 5).square().sum().backward();
    return x.grad();
  };
  const auto whole = gradient([&](const at::Tensor& x) { return module_->forward(x, {.is_causal = true}).out; });
  const auto pieces = gradient([&](const at::Tensor& x) {
    const auto first = module_->forward(x.slice(1, 0, kTime - 5), {.is_causal = true, .output_state = true});
    return torch::cat({first.out, module_->forward(x.slice(1, kTime - 5), {.is_causal = true, .state = first.state}).out}, 1);
  });
  EXPECT_TRUE(close(pieces, whole));
}

TEST_P(Attention, WeightsAreTheProbabilitiesBehindTheOutput) {
  auto padding = torch::zeros({kBatch, kTime}, torch::kBool);
  padding[0].slice(0, 30) = true;
  padding[1].slice(0, 7, 11) = true;
  for (const bool causal : directions()) {
    for (const bool padded : {false, true}) {
      AttentionForwardOptions options{.is_causal = causal, .need_weights = true, .average_attn_weights = false};
      if (padded) options.key_padding_mask = padding;
      const auto result = module_->forward(x_, options);
      ASSERT_EQ(result.weights.sizes(), (std::vector<int64_t>{kBatch, kHeads, kTime, kTime}));
      EXPECT_GE(result.weights.min().item<double>(), 0.0);
      if (causal) {
        EXPECT_EQ(result.weights.triu(1).abs().max().item<double>(), 0.0);
      }
      if (padded) {
        EXPECT_EQ(result.weights.masked_select(padding.unsqueeze(1).unsqueeze(1)).abs().max().item<double>(), 0.0);
      } else {
        EXPECT_TRUE(close(result.weights.sum(-1), torch::ones({kBatch, kHeads, kTime})));
      }
      options.average_attn_weights = true;
      EXPECT_TRUE(close(module_->forward(x_, options).weights, result.weights.mean(1)));

      if (!GetParam().plain_values) continue;
      const auto parameters = module_->named_parameters();
      auto values = torch::linear(x_, parameters["value_proj.weight"]).view({kBatch, kTime, -1, kDim / kHeads}).transpose(1, 2);
      values = values.repeat_interleave(kHeads / values.size(1), 1);
      const auto heads_out = torch::matmul(result.weights, values).transpose(1, 2).flatten(2);
      EXPECT_TRUE(close(result.out, torch::linear(heads_out, parameters["out_proj.weight"]))) << causal << padded;
    }
  }
  EXPECT_FALSE(module_->forward(x_, {.is_causal = true}).weights.defined());
}

TEST_P(Attention, GradientsReachEveryParameter) {
  for (const bool causal : directions()) {
    module_->zero_grad();
    module_->forward(x_, {.is_causal = causal}).out.square().sum().backward();
    for (const auto& item : module_->named_parameters()) {
      const auto& grad = item.value().grad();
      ASSERT_TRUE(grad.defined()) << item.key();
      EXPECT_TRUE(grad.isfinite().all().item<bool>()) << item.key();
      EXPECT_GT(grad.norm().item<double>(), 0.0) << item.key();
    }
  }
}

TEST_P(Attention, BFloat16IsNearFloat32) {
  torch::NoGradGuard no_grad;
  module_->to(torch::kBFloat16);
  const auto x = x_.to(torch::kBFloat16);
  const auto out = module_->forward(x, {.is_causal = true}).out;
  ASSERT_EQ(out.scalar_type(), torch::kBFloat16);
  module_->to(torch::kFloat32);
  EXPECT_TRUE(close(out, module_->forward(x.to(torch::kFloat32), {.is_causal = true}).out, 0.05));
}

TEST_P(Attention, RefusesWhatItCannotDo) {
  EXPECT_THROW(module_->forward(x_.slice(2, 1)), c10::ValueError);
  EXPECT_THROW(module_->forward(x_.unsqueeze(0)), c10::ValueError);
  EXPECT_THROW(module_->forward(x_, {.key_padding_mask = torch::zeros({kTime, kBatch}, torch::kBool)}), c10::ValueError);
  EXPECT_THROW(module_->forward(x_, {.key_padding_mask = torch::zeros({kBatch, kTime}, torch::kInt64)}), c10::TypeError);
  EXPECT_THROW(module_->forward(x_, {.is_causal = false, .output_state = true}), c10::ValueError);
  EXPECT_THROW(module_->forward(x_, {.is_causal = true, .state = AttentionState{}}), c10::ValueError);
  const auto state = module_->forward(x_, {.is_causal = true, .output_state = true}).state;
  EXPECT_THROW(module_->forward(x_, {.is_causal = true, .need_weights = true, .state = state}), c10::ValueError);
  if (!GetParam().bidirectional) {
    EXPECT_THROW(module_->forward(x_), c10::ValueError);
  }
}

INSTANTIATE_TEST_SUITE_P(Modules, Attention, testing::ValuesIn(cases()), [](const auto& param) { return param.param.name; });

// Several blocks of queries, sinks in the window of some of them, and padding.
TEST(SoftmaxAttention, SinksAreReadFromBothSides) {
  torch::manual_seed(8);
  const int64_t time = 300;
  auto options = common<SoftmaxAttentionOptions>(true);
  options.window = 20;
  options.sinks = 3;
  options.num_kv_heads = 1;
  SoftmaxAttention module(options);
  module->to(torch::kFloat64);
  const auto x = torch::randn({kBatch, time, kDim}, torch::kFloat64);
  auto padding = torch::zeros({kBatch, time}, torch::kBool);
  padding[1].slice(0, 250) = true;
  const auto result = module->forward(x, {.key_padding_mask = padding, .need_weights = true, .average_attn_weights = false});
  const auto& weights = result.weights;  // [B, H, T, T]
  const auto distance = (torch::arange(time).unsqueeze(1) - torch::arange(time)).abs();
  const auto readable = (distance < 20).logical_or(torch::arange(time) < 3);
  EXPECT_TRUE(weights.gt(0).logical_and(readable.logical_not()).sum().item<int64_t>() == 0);
  EXPECT_TRUE(weights[0].gt(0).eq(readable).all().item<bool>());
  const auto values = module->value_proj(x).unsqueeze(1);  // one key-value head
  const auto heads = at::matmul(weights, values).transpose(1, 2).flatten(2);
  EXPECT_TRUE(close(result.out, module->out_proj(heads)));
}

// Query logits of -inf: of the latents, of the window, of all; with gradients that are finite.
TEST(MacchiatoAttention, WhatIsClosedGivesZero) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const LatentPosition position : {LatentPosition::kNone, LatentPosition::kVapor}) {
    for (const auto& [begin, end] : {std::pair{1, 4}, {0, 1}, {0, 4}}) {
      auto options = common<MacchiatoAttentionOptions>(/*batch_first=*/true);
      options.position = position;
      options.bias = true;
      options.num_latents = 3;
      options.window = 5;
      MacchiatoAttentionImpl module(options);
      {
        const torch::NoGradGuard no_grad;
        module.query_logits_proj->bias.view({kHeads, 4}).slice(1, begin, end).fill_(-infinity);
      }
      AttentionForwardOptions forward;
      forward.is_causal = forward.need_weights = true;
      const auto result = module.forward(torch::randn({kBatch, kTime, kDim}), forward);
      EXPECT_TRUE(result.out.isfinite().all().item<bool>());
      EXPECT_TRUE(result.weights.isfinite().all().item<bool>());
      const bool all = end - begin == 4;
      EXPECT_EQ(result.weights.eq(0).all().item<bool>(), all);
      EXPECT_EQ(result.out.equal(module.out_proj->bias.expand_as(result.out)), all);
      result.out.square().sum().backward();
      for (const auto& item : module.named_parameters()) {
        const auto& grad = item.value().grad();
        if (grad.defined()) EXPECT_TRUE(grad.isfinite().all().item<bool>()) << item.key();
      }
    }
  }
}

TEST(AttentionOptions, ImpossibleOnesAreRefused) {
  const auto refuses = [](const std::function<void(MacchiatoAttentionOptions&)>& change) {
    auto options = common<MacchiatoAttentionOptions>(true);
    change(options);
    EXPECT_THROW(MacchiatoAttentionImpl{options}, c10::ValueError);
  };
  refuses([](auto& options) { options.embed_dim = 0; });
  refuses([](auto& options) { options.num_heads = 5; });
  refuses([](auto& options) { options.num_kv_heads = 3; });
  refuses([](auto& options) { options.num_kv_heads = 0; });
  refuses([](auto& options) { options.num_latents = 0; });
  refuses([](auto& options) { options.num_latents = int64_t{1} << 40; });
  refuses([](auto& options) { options.dropout = 1.5; });
  refuses([](auto& options) { options.num_heads = 8; });  // heads of 3 can't be rotated
  refuses([](auto& options) { options.window = 0; });
  refuses([](auto& options) { options.sinks = -1; });
  refuses([](auto& options) { options.rope_base = 0.0; });
  refuses([](auto& options) {
    options.position = LatentPosition::kConv;
    options.conv_width = 0;
  });
  EXPECT_THROW(parse_latent_position("rotary"), c10::ValueError);
  EXPECT_EQ(parse_latent_position("rg_lru"), LatentPosition::kRgLru);
  auto softmax = common<SoftmaxAttentionOptions>(true);
  softmax.sinks = 1;
  EXPECT_THROW(SoftmaxAttentionImpl{softmax}, c10::ValueError);
}

TEST(AttentionOptions, NamesAndShapesAreTheContract) {
  auto options = common<MacchiatoAttentionOptions>(true);
  options.bias = true;
  options.num_kv_heads = 2;
  options.num_latents = 5;
  options.position = LatentPosition::kConv;
  options.forget = true;
  const MacchiatoAttention module(options);
  const auto parameters = module->named_parameters();
  const std::vector<std::pair<std::string, std::vector<int64_t>>> expected{
      {"query_logits_proj.weight", {kHeads * 6, kDim}},
      {"query_logits_proj.bias", {kHeads * 6}},
      {"key_logits_proj.weight", {int64_t{2} * 5, kDim}},
      {"key_logits_proj.bias", {int64_t{2} * 5}},
      {"value_proj.weight", {int64_t{2} * 6, kDim}},
      {"value_proj.bias", {int64_t{2} * 6}},
      {"out_proj.weight", {kDim, kDim}},
      {"out_proj.bias", {kDim}},
      {"decay_proj.weight", {int64_t{2} * 5, kDim}},
      {"decay_proj.bias", {int64_t{2} * 5}},
      {"conv.weight", {kDim, 4}},
      {"conv.bias", {kDim}},
      {"query_proj.weight", {kDim, kDim}},
      {"query_proj.bias", {kDim}},
      {"key_proj.weight", {int64_t{2} * 6, kDim}},
      {"key_proj.bias", {int64_t{2} * 6}},
  };
  EXPECT_EQ(parameters.size(), expected.size());
  for (const auto& [name, shape] : expected) {
    ASSERT_TRUE(parameters.contains(name)) << name;
    EXPECT_EQ(parameters[name].sizes(), shape) << name;
  }
}

TEST(AttentionOptions, ADecayOfLowRankIsTwoMatrices) {
  auto options = common<LatteAttentionOptions>(true);
  options.num_kv_heads = 2;
  options.num_latents = 5;
  options.forget = true;
  options.decay_rank = 3;
  const LatteAttention module(options);
  const auto parameters = module->named_parameters();
  EXPECT_FALSE(parameters.contains("decay_proj.weight"));
  EXPECT_EQ(parameters["decay_down.weight"].sizes(), (std::vector<int64_t>{3, kDim}));
  EXPECT_FALSE(parameters.contains("decay_down.bias"));
  EXPECT_EQ(parameters["decay_up.weight"].sizes(), (std::vector<int64_t>{2 * 5, 3}));
  EXPECT_EQ(parameters["decay_up.bias"].sizes(), (std::vector<int64_t>{2 * 5}));
  options.decay_rank = -1;
  EXPECT_THROW(LatteAttention{options}, c10::ValueError);
}

TEST(Dropout, ActsInTrainingAlone) {
  torch::manual_seed(3);
  const auto x = torch::randn({kBatch, kTime, kDim});
  auto options = common<MacchiatoAttentionOptions>(true);
  options.dropout = 0.5;
  MacchiatoAttention module(options);
  EXPECT_FALSE(close(module(x).out, module(x).out));
  module->eval();
  EXPECT_TRUE(torch::equal(module(x).out, module(x).out));
}

TEST(RgLruModule, SlowestDecaysStartInGriffinsRange) {
  torch::manual_seed(5);
  const RgLru module(4096, false);
  const auto squared = torch::exp(-16.0 * torch::softplus(module->lambda.to(torch::kFloat64)));  // a², a = sigmoid(-lambda)^8
  EXPECT_GE(squared.min().item<double>(), 0.81 - 1e-5);
  EXPECT_LE(squared.max().item<double>(), 0.998 + 1e-5);
  EXPECT_NEAR(squared.mean().item<double>(), 0.904, 0.005);  // uniform: four standard errors of 4096 draws are 0.0034
}

// A latent whose keys jump by 10³ between neighbours, and one switched off: still probabilities.
TEST(LatentWeights, StandAnyLogits) {
  torch::manual_seed(11);
  auto keys = torch::randn({1, 9, 1, 3}, torch::kFloat64);
  keys[0][4] += 1000.0;
  const auto queries = torch::randn({1, 9, 1, 3}, torch::kFloat64).log_softmax(-1);
  const auto weights = latent_attention_weights(queries, keys, {});
  EXPECT_TRUE(close(weights.sum(-1), torch::ones({1, 1, 9}), 1e-12));
  const auto mask = torch::tensor({false, true, true, true, true, true, true, true, false}).unsqueeze(0);
  const auto masked = latent_attention_weights(queries, keys, {.log_decay = {}, .key_mask = mask});
  EXPECT_EQ(masked[0][0][0].abs().max().item<double>(), 0.0);  // its only token is padding
  EXPECT_TRUE(close(masked[0][0].slice(0, 1).sum(-1), torch::ones({8}), 1e-12));
}

}  // namespace
}  // namespace latte::nn
