// A language model whose sequences several ranks share, here threads, against one that has them whole: logits and all gradients.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <ostream>
#include <string>
#include <vector>

#include "models/language_model.h"
#include "nn/test_close.h"
#include "nn/test_peers.h"

namespace latte::models {
namespace {

constexpr int64_t kBatch = 2, kVocabulary = 11;
constexpr double kExact = 1e-10;  // float64, through two layers

struct Case {
  std::string name, attention;
  std::optional<std::string> position;
  std::optional<bool> forget;
  int64_t window = 4, sinks = 0;
};

void PrintTo(const Case& one, std::ostream* out) { *out << one.name; }

class SequenceParallel : public testing::TestWithParam<std::tuple<Case, int64_t>> {};

formats::LanguageModelConfig config_of(const Case& one) {
  formats::LanguageModelConfig config;
  config.vocab_size = kVocabulary;
  config.num_layers = 2;
  config.embed_dim = 16;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.attention = one.attention;
  config.position = one.position;
  config.forget = one.forget;
  config.window = one.window;
  config.sinks = one.sinks;
  config.bias = true;
  return config;
}

at::Tensor loss_of(LanguageModel& model, const at::Tensor& tokens, const at::Tensor& targets) {
  return torch::nn::functional::cross_entropy(model(tokens).flatten(0, 1), targets.flatten());
}

TEST_P(SequenceParallel, GivesWhatTheWholeSequenceGives) {
  const auto& one = std::get<0>(GetParam());
  const int64_t ranks = std::get<1>(GetParam());
  const int64_t stretch = 6, time = ranks * stretch;
  torch::manual_seed(5);
  LanguageModel whole(config_of(one));
  whole->to(torch::kFloat64);
  {
    // Far from the start of training: logits that differ, decays that bite.
    const torch::NoGradGuard no_grad;
    for (auto& parameter : whole->parameters()) parameter.add_(torch::randn_like(parameter) * 0.3);
  }
  const auto tokens = torch::randint(kVocabulary, {kBatch, time}), targets = torch::randint(kVocabulary, {kBatch, time});
  const auto expected = loss_of(whole, tokens, targets);
  expected.backward();

  std::vector<LanguageModel> models;
  std::vector<double> losses(static_cast<size_t>(ranks));
  for (int64_t rank = 0; rank < ranks; ++rank) {
    models.emplace_back(config_of(one));
    models.back()->to(torch::kFloat64);
    const torch::NoGradGuard no_grad;
    const auto from = whole->parameters(), to = models.back()->parameters();
    for (size_t i = 0; i < from.size(); ++i) at::Tensor(to[i]).copy_(from[i]);
  }
  nn::ThreadPeers peers(ranks);
  peers.run([&](nn::SequencePeers& peer) {
    LanguageModel& model = models[static_cast<size_t>(peer.rank())];
    model->sequence_peers = &peer;
    const auto cut = [&](const at::Tensor& x) { return x.narrow(1, peer.rank() * stretch, stretch); };
    const auto loss = loss_of(model, cut(tokens), cut(targets)) / static_cast<double>(ranks);
    loss.backward();
    losses[static_cast<size_t>(peer.rank())] = loss.item<double>();
  });
  EXPECT_TRUE(peers.idle());
  double loss = 0;
  for (const double part : losses) loss += part;
  EXPECT_NEAR(loss, expected.item<double>(), 1e-12);
  const auto names = whole->named_parameters();
  for (const auto& item : names) {
    auto sum = torch::zeros_like(item.value());
    for (auto& model : models) sum += model->named_parameters()[item.key()].grad();
    EXPECT_TRUE(nn::close(sum, item.value().grad(), kExact)) << item.key();
  }
}

const Case kCases[] = {
    {"latte", "latte", "conv", true},
    {"latte_keeps", "latte", "conv", false},
    {"latte_vapor", "latte", "vapor", true},
    {"latte_rg_lru", "latte", "rg_lru", false},
    {"latte_learned", "latte", "learned", true},
    {"macchiato", "macchiato", "conv", true},
    {"macchiato_sinks", "macchiato", "conv", true, 3, 2},
    {"macchiato_vapor", "macchiato", "vapor", true, 6, 1},
    {"macchiato_rotary", "macchiato", "rotary", false, 1, 0},
    {"window", "window", "rotary", std::nullopt, 5, 0},
    {"window_sinks", "window", "rotary", std::nullopt, 3, 6},
    {"window_vapor", "window", "vapor", std::nullopt, 4, 2},
    {"window_conv", "window", "conv", std::nullopt, 4, 0},
    {"window_rg_lru", "window", "rg_lru", std::nullopt, 3, 2},
};

INSTANTIATE_TEST_SUITE_P(Models, SequenceParallel, testing::Combine(testing::ValuesIn(kCases), testing::Values(2, 3, 5)),
                         [](const auto& info) {
                           return std::get<0>(info.param).name + "_" + std::to_string(std::get<1>(info.param));
                         });

TEST(SequenceParallel, SoftmaxRefuses) {
  formats::LanguageModelConfig config = config_of({"softmax", "softmax", "rotary", std::nullopt});
  LanguageModel model(config);
  nn::ThreadPeers peers(1);
  peers.run([&](nn::SequencePeers& peer) {
    model->sequence_peers = &peer;
    EXPECT_THROW(model(torch::zeros({1, 4}, torch::kInt64)), c10::ValueError);
  });
}

}  // namespace
}  // namespace latte::models
