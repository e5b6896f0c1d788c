// Floats in key_padding_mask: what they add, in one piece and in several. That Python's modules take them to mean the same is
// shown by parity_test.cc, and against torch's MultiheadAttention by python/tests/test_nn.py.
#include "nn/key_padding.h"

#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "nn/attention.h"
#include "nn/blocks.h"
#include "nn/softmax_attention.h"
#include "nn/test_close.h"

namespace latte::nn {
namespace {

constexpr int64_t kBatch = 2, kTime = 23, kDim = 24, kHeads = 4;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

MacchiatoAttentionOptions options_of(LatentPosition position, int64_t sinks) {
  MacchiatoAttentionOptions options;
  options.embed_dim = kDim;
  options.num_heads = kHeads;
  options.num_kv_heads = 2;
  options.batch_first = true;
  options.bias = false;
  options.position = position;
  options.window = 5;
  options.sinks = sinks;
  return options;
}

// The same options make both modules.
std::vector<std::shared_ptr<AttentionImpl>> modules(LatentPosition position = LatentPosition::kNone, int64_t sinks = 0) {
  torch::manual_seed(1);
  std::vector<std::shared_ptr<AttentionImpl>> made{std::make_shared<LatteAttentionImpl>(options_of(position, sinks)),
                                                   std::make_shared<MacchiatoAttentionImpl>(options_of(position, sinks))};
  for (const auto& module : made) module->to(torch::kFloat64);
  return made;
}

at::Tensor tokens() {
  torch::manual_seed(2);
  return torch::randn({kBatch, kTime, kDim}, torch::kFloat64);
}

// [B, T]: -inf at padding, other floats elsewhere.
at::Tensor floats() {
  auto mask = 2.0 * torch::sin(torch::arange(kBatch * kTime, torch::kFloat64)).view({kBatch, kTime});
  mask[1].slice(0, 0, 3) = -kInfinity;
  mask[1][9] = -kInfinity;
  return mask;
}

TEST(KeyPadding, ProbabilitiesReproduceTheOutput) {
  const auto x = tokens();
  for (const bool causal : {true, false}) {
    for (const auto& module : modules(LatentPosition::kConv, causal ? 2 : 0)) {
      const auto result = module->forward(
          x, {.key_padding_mask = floats(), .is_causal = causal, .need_weights = true, .average_attn_weights = false});
      const auto parameters = module->named_parameters();
      auto values = torch::linear(x, parameters["value_proj.weight"]).view({kBatch, kTime, 2, -1}).transpose(1, 2);
      values = values.repeat_interleave(kHeads / 2, 1);
      const auto heads_out = torch::matmul(result.weights, values).transpose(1, 2).flatten(2);
      EXPECT_TRUE(close(result.out, torch::linear(heads_out, parameters["out_proj.weight"]), 1e-12)) << causal;
      const auto bools = module->forward(x, {.key_padding_mask = floats() == -kInfinity, .is_causal = causal});
      EXPECT_FALSE(close(result.out, bools.out, 1e-2)) << causal;
      const auto alone = module->forward(x[1], {.key_padding_mask = floats()[1], .is_causal = causal}).out;
      EXPECT_TRUE(close(alone, result.out[1], 1e-12)) << causal;
    }
  }
}

// Stretches whose masks add something, hide something or are absent, in every order.
TEST(KeyPadding, WholeIsStretches) {
  torch::NoGradGuard no_grad;
  const auto x = tokens(), mask = floats(), hidden = torch::zeros_like(mask).masked_fill(mask == -kInfinity, -kInfinity);
  const auto masks = std::vector<at::Tensor>{mask, hidden, torch::zeros_like(mask)};
  for (const auto position : {LatentPosition::kNone, LatentPosition::kVapor}) {
    for (const auto& module : modules(position, 2)) {
      for (size_t first = 0; first < 3; ++first) {
        for (size_t second = 0; second < 3; ++second) {
          const auto joined = torch::cat({masks[first].slice(1, 0, 8), masks[second].slice(1, 8)}, 1);
          const auto whole = module->forward(x, {.key_padding_mask = joined, .is_causal = true}).out;
          AttentionForwardOptions options{.is_causal = true, .output_state = true};
          if (first < 2) options.key_padding_mask = masks[first].slice(1, 0, 8);
          const auto left = module->forward(x.slice(1, 0, 8), options);
          options.state = left.state;
          options.key_padding_mask = second < 2 ? OptionalTensor(masks[second].slice(1, 8)) : OptionalTensor();
          const auto right = module->forward(x.slice(1, 8), options);
          EXPECT_TRUE(close(torch::cat({left.out, right.out}, 1), whole, 1e-12)) << first << second;
        }
      }
    }
  }
}

TEST(KeyPadding, CarriesGradients) {
  const auto x = tokens(), direction = torch::cos(3.0 * floats().masked_fill(floats() == -kInfinity, 0.0));
  for (const auto& module : modules()) {
    const auto loss = [&](const at::Tensor& mask) {
      return module->forward(x, {.key_padding_mask = mask, .is_causal = true}).out.square().sum();
    };
    for (const auto& at : {floats(), torch::zeros({kBatch, kTime}, torch::kFloat64)}) {
      const auto mask = at.clone().requires_grad_(true);
      loss(mask).backward();
      constexpr double kStep = 1e-5;
      const double slope = ((loss(at + kStep * direction) - loss(at - kStep * direction)) / (2 * kStep)).item<double>();
      EXPECT_NEAR((mask.grad() * direction).sum().item<double>(), slope, 1e-7 * std::abs(slope) + 1e-8);
      EXPECT_GT(std::abs(slope), 1e-3);
    }
  }
}

TEST(KeyPadding, HalfPrecisionKeepsHugeBiasesFinite) {
  torch::NoGradGuard no_grad;
  const auto lowest = torch::full({kBatch, kTime}, std::numeric_limits<float>::lowest());
  for (const auto dtype : {torch::kHalf, torch::kBFloat16, torch::kFloat32}) {
    for (const auto& module : modules()) {
      module->to(dtype);
      const auto x = tokens().to(dtype);
      const auto out = module->forward(x, {.key_padding_mask = floats().to(torch::kFloat32), .is_causal = true}).out;
      EXPECT_EQ(out.scalar_type(), dtype);
      module->to(torch::kFloat64);
      const auto exact = module->forward(x.to(torch::kFloat64), {.key_padding_mask = floats(), .is_causal = true}).out;
      EXPECT_TRUE(close(out, exact, dtype == torch::kFloat32 ? 1e-5 : dtype == torch::kHalf ? 1e-2 : 5e-2));
      module->to(dtype);
      // A finite bias, however low, is no padding: where there is nothing else it is read.
      EXPECT_GT(module->forward(x, {.key_padding_mask = lowest, .is_causal = true}).out.norm().item<double>(), 1.0);
    }
  }
}

TEST(KeyPadding, RefusesWhatNoScoreCanTake) {
  const auto x = tokens();
  for (const double value : {kInfinity, std::numeric_limits<double>::quiet_NaN()}) {
    const auto mask = torch::full({kBatch, kTime}, value);
    EXPECT_THROW(modules()[0]->forward(x, {.key_padding_mask = mask}), c10::ValueError);
    EXPECT_THROW(modules()[1]->forward(x, {.key_padding_mask = mask}), c10::ValueError);
  }
  SoftmaxAttentionOptions options;
  options.embed_dim = kDim;
  options.num_heads = kHeads;
  options.batch_first = true;
  SoftmaxAttention softmax(options);
  softmax->to(torch::kFloat64);
  EXPECT_THROW(softmax(x, AttentionForwardOptions{.key_padding_mask = floats()}), c10::ValueError);
  const auto hidden = floats() == -kInfinity;
  const auto zeros = torch::zeros_like(x.select(2, 0)).masked_fill(hidden, -kInfinity);
  EXPECT_TRUE(torch::equal(softmax(x, AttentionForwardOptions{.key_padding_mask = zeros}).out,
                           softmax(x, AttentionForwardOptions{.key_padding_mask = hidden}).out));
}

TEST(KeyPadding, BatchNormLeavesPaddingOut) {
  const auto x = tokens().to(torch::kFloat32);
  Norm one(NormKind::kBatch, kDim, true), other(NormKind::kBatch, kDim, true);
  EXPECT_TRUE(torch::equal(one(x, floats()), other(x, floats() == -kInfinity)));
  EXPECT_TRUE(torch::equal(one->running_mean, other->running_mean));
}

}  // namespace
}  // namespace latte::nn
