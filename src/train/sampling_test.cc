#include "train/sampling.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <set>

#include "train/decoder.h"

namespace latte::train {
namespace {

at::Tensor logs(std::vector<double> probabilities) { return torch::tensor(probabilities).log().to(at::kFloat); }

void expect_probabilities(const at::Tensor& got, std::vector<double> expected) {
  const auto want = torch::tensor(expected, at::kDouble);
  EXPECT_LE((got.to(at::kDouble) - want).norm().item<double>(), 1e-6 * want.norm().item<double>()) << got;
}

TEST(SamplingTest, ProbabilitiesFollowTemperatureTopKAndTopP) {
  const auto logits = logs({0.1, 0.4, 0.2, 0.3});
  expect_probabilities(sampling_probabilities(logits, {}), {0.1, 0.4, 0.2, 0.3});
  expect_probabilities(sampling_probabilities(logits, {.temperature = 0.5}), {1.0 / 30, 16.0 / 30, 4.0 / 30, 9.0 / 30});
  expect_probabilities(sampling_probabilities(logits, {.top_k = 2}), {0, 4.0 / 7, 0, 3.0 / 7});
  expect_probabilities(sampling_probabilities(logits, {.top_k = 9}), {0.1, 0.4, 0.2, 0.3});
  expect_probabilities(sampling_probabilities(logits, {.top_p = 0.65}), {0, 4.0 / 7, 0, 3.0 / 7});
  expect_probabilities(sampling_probabilities(logits, {.top_p = 0.75}), {0, 4.0 / 9, 2.0 / 9, 3.0 / 9});
  expect_probabilities(sampling_probabilities(logits, {.top_p = 1e-9}), {0, 1, 0, 0});
  expect_probabilities(sampling_probabilities(logits, {.temperature = 1e-300}), {0, 1, 0, 0});
  expect_probabilities(sampling_probabilities(logits, {.top_k = 3, .top_p = 0.5}), {0, 4.0 / 7, 0, 3.0 / 7});
}

TEST(SamplingTest, DrawsBySeedAndInProportion) {
  const auto logits = logs({0.0, 0.75, 0.25});
  Sampler first({}, 5), second({}, 5);
  int counts[3] = {};
  for (int i = 0; i < 2000; ++i) {
    const auto token = first.sample(logits);
    EXPECT_EQ(token, second.sample(logits));
    ++counts[token];
  }
  EXPECT_EQ(counts[0], 0);
  EXPECT_NEAR(counts[1], 1500, 100);  // more than five deviations
  EXPECT_EQ(Sampler({.temperature = 0}, 1).sample(logits), 1);
}

TEST(SamplingTest, RefusesWhatIsNoDistribution) {
  EXPECT_THROW(Sampler({.temperature = -1}, 1), std::invalid_argument);
  EXPECT_THROW(Sampler({.top_k = -1}, 1), std::invalid_argument);
  EXPECT_THROW(Sampler({.top_p = 0}, 1), std::invalid_argument);
  EXPECT_THROW(Sampler({.top_p = std::numeric_limits<double>::quiet_NaN()}, 1), std::invalid_argument);
  EXPECT_THROW(Sampler({}, 1).sample(torch::tensor({0.0f, NAN})), std::runtime_error);
}

TEST(DecoderTest, ReadsPiecesAsTheWholeInConstantMemory) {
  torch::manual_seed(3);
  models::LanguageModelConfig config;
  config.vocab_size = 7;
  config.num_layers = 2;
  config.embed_dim = 16;
  config.num_heads = 2;
  config.attention = "macchiato";
  config.window = 5;
  models::LanguageModel model(config);
  model->eval();
  const auto tokens = torch::randint(7, {1, 2500}, at::kLong);
  const std::span all(tokens.const_data_ptr<int64_t>(), 2500);
  Decoder pieces(model), steps(model);
  const auto whole = model->forward(tokens).select(1, -1).flatten();
  const auto got = pieces.read(all);
  EXPECT_LE((got - whole).norm().item<double>(), 1e-4 * whole.norm().item<double>());
  const auto bytes = pieces.state_bytes();
  steps.read(all.first(2400));
  for (size_t i = 2400; i < 2500; ++i) {
    const auto logits = steps.read(all.subspan(i, 1));
    if (i == 2499) EXPECT_LE((logits - whole).norm().item<double>(), 1e-4 * whole.norm().item<double>());
  }
  EXPECT_EQ(steps.position(), 2500);
  EXPECT_EQ(steps.state_bytes(), bytes);
  EXPECT_GT(bytes, 0);

  EXPECT_THROW(steps.read({}), std::invalid_argument);
  const int64_t outside = 7;
  EXPECT_THROW(steps.read({&outside, 1}), std::invalid_argument);
}

}  // namespace
}  // namespace latte::train
