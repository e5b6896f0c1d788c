// Every architecture and every way to scale rotary positions, on small random models, against llama.cpp.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "compare.h"
#include "extend/evaluate.h"
#include "extend/kl_loss.h"
#include "formats/test_files.h"
#include "models/decoder.h"
#include "small_model.h"

namespace latte {
namespace {

using formats::RopeScaling;
using formats::RopeScalingKind;

// Logits of these models spread over several nats; float32 agrees to about 1e-9, and llama.cpp's GELU, a table in float16, to
// 1e-6.
constexpr double kBound = 1e-5;
constexpr int64_t kTokens = 150;  // beyond the trained context of 64 and the window of 16

class SmallModels : public ::testing::Test {
 protected:
  // KL of the model as latte reads it, whole and in stretches.
  void expect_faithful(const models::DecoderOptions& options = {}, const LlamaReference::Change& change = {}) {
    const LlamaReference reference(path_, 1, change);
    const auto tokens = small_tokens(kTokens);
    models::Decoder model = models::load_decoder(path_, options);
    for (int64_t stretch : {kTokens, int64_t{37}, int64_t{1}}) {
      EXPECT_LT(mean_kl(reference, model, tokens, stretch), kBound) << "stretch " << stretch;
    }
  }

  formats::TestFolder folder_;
  std::string path_ = folder_ / "model.gguf";
};

TEST_F(SmallModels, Llama) {
  write_small_model(path_, small_metadata("llama"));
  expect_faithful();
}

TEST_F(SmallModels, LlamaWithItsOwnOutputAndFrequencyDivisors) {
  write_small_model(path_, small_metadata("llama"), /*untied=*/true, /*factors=*/true);
  expect_faithful();
}

TEST_F(SmallModels, ScalingInTheFile) {
  for (const char* kind : {"linear", "yarn"}) {
    SCOPED_TRACE(kind);
    auto metadata = small_metadata("llama");
    metadata.set("llama.rope.scaling.type", std::string(kind));
    metadata.set("llama.rope.scaling.factor", 4.0f);
    metadata.set("llama.rope.scaling.original_context_length", uint32_t{32});
    write_small_model(path_, metadata);
    expect_faithful();
  }
}

TEST_F(SmallModels, ScalingChosenByTheCaller) {
  write_small_model(path_, small_metadata("llama"));
  models::DecoderOptions options;
  options.rope_scaling = RopeScaling{.kind = RopeScalingKind::kLinear, .factor = 3};
  expect_faithful(options, [](llama_context_params& params) { params.rope_freq_scale = 1.0f / 3; });
  options.rope_scaling = RopeScaling{.kind = RopeScalingKind::kNtk, .factor = 4};
  expect_faithful(options,
                  [](llama_context_params& params) { params.rope_freq_base = 10000.0f * std::pow(4.0f, 32.0f / 30.0f); });
  options.rope_scaling = RopeScaling{.kind = RopeScalingKind::kYarn, .factor = 4};
  expect_faithful(options, [](llama_context_params& params) {
    params.rope_scaling_type = LLAMA_ROPE_SCALING_TYPE_YARN;
    params.rope_freq_scale = 0.25f;
    params.yarn_orig_ctx = 64;
  });
  // The same after loading.
  models::Decoder loaded = models::load_decoder(path_, options), changed = models::load_decoder(path_);
  changed->set_rope_scaling(*options.rope_scaling);
  const torch::NoGradGuard no_grad;
  const auto tokens = torch::tensor(small_tokens(kTokens)).unsqueeze(0);
  EXPECT_TRUE(torch::equal(loaded->forward(tokens).logits, changed->forward(tokens).logits));
}

TEST_F(SmallModels, Gemma2WithSoftCaps) {
  auto metadata = small_metadata("gemma2");
  metadata.set("gemma2.attn_logit_softcapping", 5.0f);
  metadata.set("gemma2.final_logit_softcapping", 3.0f);
  write_small_model(path_, metadata);
  expect_faithful();

  // What evaluation and training read from hidden states is capped alike.
  const torch::NoGradGuard no_grad;
  models::Decoder model = models::load_decoder(path_);
  const auto tokens = torch::tensor(small_tokens(40));
  const auto result = model->forward(tokens.slice(0, 0, 39).unsqueeze(0));
  const auto losses = extend::token_losses(result.hidden[0], tokens.slice(0, 1), extend::head_of(model));
  const auto expected = torch::nn::functional::cross_entropy(result.logits[0], tokens.slice(0, 1));
  EXPECT_NEAR(losses.next_token.mean().item<double>(), expected.item<double>(), 1e-5);
}

TEST_F(SmallModels, Gemma3WithLocalLayers) {
  auto metadata = small_metadata("gemma3");
  metadata.set("gemma3.rope.freq_base", 1e6f);
  metadata.set("gemma3.rope.scaling.type", std::string("linear"));
  metadata.set("gemma3.rope.scaling.factor", 8.0f);
  write_small_model(path_, metadata);
  expect_faithful();
}

TEST_F(SmallModels, BFloat16IsCloseToFloat32) {
  for (const char* architecture : {"llama", "gemma3"}) {
    write_small_model(path_, small_metadata(architecture));
    const torch::NoGradGuard no_grad;
    const auto tokens = torch::tensor(small_tokens(kTokens)).unsqueeze(0);
    models::DecoderOptions options;
    const auto wide = models::load_decoder(path_, options)->forward(tokens).logits;
    options.dtype = torch::kBFloat16;
    auto model = models::load_decoder(path_, options);
    const auto narrow = model->forward(tokens).logits;
    EXPECT_EQ(narrow.scalar_type(), torch::kBFloat16);
    // Six layers of random weights, each of which rounds a few times at 2^-9.
    EXPECT_LT((narrow.to(torch::kFloat32) - wide).norm().item<double>(), 0.15 * wide.norm().item<double>()) << architecture;
  }
}

TEST_F(SmallModels, ForwardComputesNoMoreLogitsThanAskedFor) {
  write_small_model(path_, small_metadata("gemma3"));
  const torch::NoGradGuard no_grad;
  models::Decoder model = models::load_decoder(path_);
  const auto tokens = torch::tensor(small_tokens(40)).unsqueeze(0);
  const auto all = model->forward(tokens);
  EXPECT_EQ(all.logits.sizes(), (std::vector<int64_t>{1, 40, kSmallVocabulary}));
  EXPECT_FALSE(all.state.has_value());
  models::DecoderForwardOptions options;
  options.logits = 3;
  const auto last = all.logits.slice(1, -3);
  // Products of other shapes may sum in another order.
  EXPECT_LT((model->forward(tokens, options).logits - last).norm().item<double>(), 1e-5 * last.norm().item<double>());
  options.logits = models::DecoderForwardOptions::kNoLogits;
  int64_t calls = 0;
  options.on_attention = [&](int64_t layer, const at::Tensor&, const at::Tensor&) { EXPECT_EQ(layer, calls++); };
  const auto none = model->forward(tokens, options);
  EXPECT_FALSE(none.logits.defined());
  EXPECT_EQ(calls, 6);
  EXPECT_TRUE(torch::equal(none.hidden, all.hidden));
}

TEST_F(SmallModels, GradientsReachEveryParameter) {
  for (const char* architecture : {"llama", "gemma2", "gemma3"}) {
    write_small_model(path_, small_metadata(architecture));
    models::Decoder model = models::load_decoder(path_);
    for (auto& parameter : model->parameters()) parameter.requires_grad_(true);
    model->forward(torch::tensor(small_tokens(40)).unsqueeze(0)).logits.square().mean().backward();
    for (const auto& item : model->named_parameters()) {
      ASSERT_TRUE(item.value().grad().defined()) << item.key();
      EXPECT_GT(item.value().grad().norm().item<double>(), 0) << architecture << " " << item.key();
    }
  }
}

// An attention of one's own: its parameters are named after the layer, and the rest stays.
class ScaledAttention : public models::DecoderAttentionImpl {
 public:
  explicit ScaledAttention(models::DecoderAttention inner) : inner_(std::move(inner)) {
    scale = register_parameter("scale", torch::zeros({1}));
  }
  models::DecoderAttentionResult forward(const at::Tensor& x, const models::AttentionWeights& weights,
                                         const models::DecoderAttentionOptions& options) override {
    auto result = inner_->forward(x, weights, options);
    result.out = result.out * (1 + scale);
    return result;
  }
  at::Tensor scale;

 private:
  models::DecoderAttention inner_;
};

TEST_F(SmallModels, AttentionCanBeReplaced) {
  write_small_model(path_, small_metadata("llama"));
  const torch::NoGradGuard no_grad;
  models::Decoder model = models::load_decoder(path_);
  const auto tokens = torch::tensor(small_tokens(40)).unsqueeze(0);
  const auto before = model->forward(tokens).logits;
  const auto replaced = std::make_shared<ScaledAttention>(model->make_attention(2));
  model->set_attention(2, replaced);
  EXPECT_TRUE(torch::equal(model->forward(tokens).logits, before));
  ASSERT_TRUE(model->named_parameters().contains("blk.2.attention.scale"));
  replaced->scale.fill_(0.5);
  EXPECT_FALSE(torch::allclose(model->forward(tokens).logits, before));
  model->set_attention(2, model->make_attention(2));
  EXPECT_TRUE(torch::equal(model->forward(tokens).logits, before));
  EXPECT_FALSE(model->named_parameters().contains("blk.2.attention.scale"));
}

}  // namespace
}  // namespace latte
