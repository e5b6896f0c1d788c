#include "extend/converted_attention.h"

#include <gtest/gtest.h>

#include "nn/attention_weights.h"
#include "nn/test_close.h"

namespace latte::extend {
namespace {

using nn::close;

constexpr int64_t kTime = 40;
const std::vector<LatentForm> kPlain(2);  // of two blocks

formats::DecoderConfig tiny_config() {
  formats::DecoderConfig config;
  config.architecture = "llama";
  config.vocab_size = 17;
  config.num_layers = 2;
  config.embed_dim = 16;
  config.hidden_dim = 20;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 4;
  config.context_length = 64;
  config.attention_scale = 0.5;
  config.rope.dims = 4;
  config.local_rope.dims = 4;
  return config;
}

models::Decoder tiny_model(at::ScalarType dtype = torch::kFloat64) {
  torch::manual_seed(4);
  models::Decoder model(tiny_config(), models::DecoderOptions{.dtype = dtype});
  const torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters()) parameter.dim() == 1 ? parameter.fill_(1.0) : parameter.normal_(0.0, 0.4);
  return model;
}

formats::AdapterSpec spec_of(int32_t latents, int64_t window = 8, int64_t sinks = 2, bool evicted = false) {
  formats::AdapterSpec spec;
  spec.window = window;
  spec.sinks = sinks;
  spec.evicted = evicted;
  spec.latents = {latents, latents};
  return spec;
}

// Latents that are open and random.
void open_latents(const std::vector<ConvertedAttention>& converted) {
  const torch::NoGradGuard no_grad;
  for (const auto& attention : converted) {
    auto& latents = attention->latents();
    latents->to(torch::kFloat64);
    for (auto& parameter : latents->parameters()) parameter.normal_(0.0, 0.7);
    if (latents->decay.defined()) latents->decay.fill_(-3.0);
  }
}

at::Tensor some_tokens() { return torch::randint(17, {2, kTime}, torch::kInt64); }

TEST(ConvertedAttention, ClosedLatentsEqualWindowAndSinks) {
  const auto tokens = some_tokens();
  auto control = tiny_model(), macchiato = tiny_model();
  convert(control, spec_of(0), kPlain);
  convert(macchiato, spec_of(3), kPlain);
  EXPECT_TRUE(close(macchiato->forward(tokens).logits, control->forward(tokens).logits, 1e-9));
}

TEST(ConvertedAttention, EqualsTheOriginalWhereTheWindowSeesAll) {
  const auto tokens = some_tokens();
  auto original = tiny_model(), converted = tiny_model();
  open_latents(convert(converted, spec_of(3, kTime), kPlain));
  EXPECT_TRUE(close(converted->forward(tokens).logits, original->forward(tokens).logits, 1e-9));
}

TEST(ConvertedAttention, LatentsOffEqualWindowAndSinks) {
  const auto tokens = some_tokens();
  auto control = tiny_model(), macchiato = tiny_model();
  convert(control, spec_of(0), kPlain);
  const auto converted = convert(macchiato, spec_of(3), kPlain);
  open_latents(converted);
  const auto expected = control->forward(tokens).logits;
  EXPECT_FALSE(close(macchiato->forward(tokens).logits, expected, 1e-3));
  for (const auto& attention : converted) attention->set_latents_off(true);
  EXPECT_TRUE(close(macchiato->forward(tokens).logits, expected, 1e-9));
}

// What latents read: every token as it comes, or what left the window, without and with a floor, one by one or several in a row.
struct Read {
  const char* name;
  bool evicted;
  bool floor;
  bool conv;
};
class LatentsOfConvertedAttention : public ::testing::TestWithParam<Read> {
 protected:
  std::vector<ConvertedAttention> converted(models::Decoder& model) const {
    const LatentForm form = {.decay = !GetParam().floor, .floor = GetParam().floor, .conv = GetParam().conv};
    auto attentions = convert(model, spec_of(3, 8, 2, GetParam().evicted), {form, form});
    open_latents(attentions);
    return attentions;
  }
};
INSTANTIATE_TEST_SUITE_P(, LatentsOfConvertedAttention,
                         ::testing::Values(Read{"All", false, false, false}, Read{"Evicted", true, false, false},
                                           Read{"Floor", true, true, false}, Read{"Conv", true, false, true},
                                           Read{"FloorAndConv", true, true, true}),
                         [](const auto& read) { return read.param.name; });

TEST_P(LatentsOfConvertedAttention, AreTheMixtureOfTheirDefinition) {
  auto model = tiny_model();
  const auto converted = this->converted(model);
  auto& latents = converted[0]->latents();
  const auto x = torch::randn({1, kTime, 16}, torch::kFloat64);
  const auto heads = model->layer(0).attention_weights().project(x, 4);
  const auto got = converted[0]->mix(x, heads, {});

  const auto positions = torch::arange(kTime);
  const auto& rope = *model->rope(0);
  const auto window = nn::window_attention_weights(rope.rotate(heads.query, positions), rope.rotate(heads.key, positions),
                                                   {.window = 8,
                                                    .sinks = 2,
                                                    .sink_query = rope.rotate(heads.query, positions.clamp_max(9)),
                                                    .key_mask = {},
                                                    .causal = true});  // [1, H, T, T]
  at::Tensor query_logits = torch::empty({1, kTime, 4, 4}, torch::kFloat64),
             key_logits = torch::empty({1, kTime, 2, 3}, torch::kFloat64);
  for (int64_t t = 0; t < kTime; ++t) {
    const double far = static_cast<double>(t + 1 - 8 - 2);
    for (int64_t h = 0; h < 4; ++h) {
      query_logits[0][t][h][0] = latents->gate_weight[h].dot(x[0][t]) + latents->gate_bias[h] -
                                 latents->gate_slope[h] * std::log(std::max(far, 1.0) / 1024.0);
      for (int64_t l = 0; l < 3; ++l) {
        query_logits[0][t][h][l + 1] = far <= 0
                                           ? torch::full({}, -INFINITY, torch::kFloat64)
                                           : latents->query_weight[h][l].dot(heads.query[0][t][h]) + latents->query_bias[h][l];
      }
    }
    for (int64_t g = 0; g < 2; ++g) {
      for (int64_t l = 0; l < 3; ++l) {
        const int64_t from = GetParam().evicted ? t - 8 : t;
        if (GetParam().evicted && from < 2) {
          key_logits[0][t][g][l] = -INFINITY;
          continue;
        }
        at::Tensor key = heads.key[0][from][g];
        if (GetParam().conv) {
          key = torch::zeros_like(key);
          for (int64_t s = std::max<int64_t>(2, from - 3); s <= from; ++s) {
            key = key + latents->conv_weight[g].select(-1, 3 - from + s) * heads.key[0][s][g];
          }
        }
        key_logits[0][t][g][l] = latents->key_weight[g][l].dot(key) + latents->key_bias[g][l];
      }
    }
  }
  const auto log_shares = query_logits.log_softmax(-1);
  at::Tensor decay, kept = log_shares.slice(-1, 1);
  if (GetParam().floor) {
    const auto z = key_logits.exp().cumsum(1);
    kept = kept + (z / (z + latents->floor.exp())).log().repeat_interleave(2, 2);
  } else {
    decay = latents->decay.exp().neg().expand({1, kTime, 2, 3});
  }
  auto of_latents = nn::latent_attention_weights(
      kept, key_logits, {.log_decay = decay.defined() ? OptionalTensor(decay) : std::nullopt, .key_mask = {}, .causal = true});
  const auto window_share = 1.0 - kept.exp().sum(-1);                                            // [1, T, H]
  if (GetParam().evicted) of_latents = torch::constant_pad_nd(of_latents.slice(-1, 8), {0, 8});  // column s is token s - 8's
  const auto weights = window_share.transpose(1, 2).unsqueeze(-1) * window + of_latents;
  const auto values = heads.value.repeat_interleave(2, 2).transpose(1, 2);  // [1, H, T, D]
  EXPECT_TRUE(close(got, torch::matmul(weights, values).transpose(1, 2), 1e-9));

  converted[0]->record_shares(true);
  converted[0]->mix(x, heads, {});
  EXPECT_TRUE(close(converted[0]->mean_shares(), (1.0 - window_share).slice(1, 10).mean(1)[0], 1e-9));
}

TEST(ConvertedAttention, FloorsAndConvolutionsTrain) {
  auto model = tiny_model();
  const LatentForm form = {.decay = false, .floor = true, .conv = true};
  const auto converted = convert(model, spec_of(3, 8, 2, true), {form, form});
  open_latents(converted);
  const auto& latents = converted[0]->latents();
  const auto tokens = some_tokens();
  const auto loss = [&] { return model->forward(tokens).logits.square().mean(); };
  const auto gradients = torch::autograd::grad({loss()}, {latents->floor, latents->conv_weight});
  const torch::NoGradGuard no_grad;
  constexpr double kStep = 1e-5;
  for (const size_t which : {0, 1}) {
    at::Tensor trained = which == 0 ? latents->floor : latents->conv_weight;
    for (int64_t i = 0; i < trained.numel(); ++i) {
      auto entry = trained.view(-1)[i];
      entry += kStep;
      const double above = loss().item<double>();
      entry -= 2 * kStep;
      const double below = loss().item<double>();
      entry += kStep;
      EXPECT_NEAR(gradients[which].view(-1)[i].item<double>(), (above - below) / (2 * kStep), 1e-8);
    }
    EXPECT_GT(gradients[which].abs().min().item<double>(), 1e-7);
  }
}

TEST(ConvertedAttention, AFreshConvolutionChangesNothing) {
  auto plain = tiny_model(), convolved = tiny_model();
  const LatentForm with_conv = {.decay = true, .floor = false, .conv = true};
  const auto one = convert(plain, spec_of(3, 8, 2, true), kPlain);
  const auto two = convert(convolved, spec_of(3, 8, 2, true), {with_conv, with_conv});
  open_latents(one);
  const torch::NoGradGuard no_grad;
  for (size_t block = 0; block < 2; ++block) {
    const auto from = one[block]->latents()->named_tensors(), to = two[block]->latents()->named_tensors();
    for (size_t i = 0; i < from.size(); ++i) {
      ASSERT_EQ(from[i].first, to[i].first);
      to[i].second.copy_(from[i].second);
    }
    two[block]->latents()->to(torch::kFloat64);
  }
  const auto tokens = some_tokens();
  EXPECT_TRUE(close(convolved->forward(tokens).logits, plain->forward(tokens).logits, 1e-9));
}

TEST_P(LatentsOfConvertedAttention, ReadPiecesAsTheyReadTheWhole) {
  const auto tokens = some_tokens();
  auto model = tiny_model();
  converted(model);
  const auto whole = model->forward(tokens).logits;
  std::optional<models::DecoderState> state;
  std::vector<at::Tensor> pieces;
  for (int64_t begin = 0, length = 1; begin < kTime; begin += length, length = length * 2 - length / 4) {  // 1, 2, 4, 7, 13 …
    auto result = model->forward(tokens.slice(1, begin, std::min(kTime, begin + length)),
                                 {.state = state ? &*state : nullptr, .output_state = true, .on_attention = {}});
    pieces.push_back(result.logits);
    state = std::move(result.state);
  }
  EXPECT_TRUE(close(torch::cat(pieces, 1), whole, 1e-8));
}

TEST(ConvertedAttention, SharesAreThoseOfTokensThatHaveSomethingFar) {
  auto model = tiny_model();
  const auto converted = convert(model, spec_of(3), kPlain);
  const torch::NoGradGuard no_grad;
  auto& latents = converted[0]->latents();
  for (auto& parameter : latents->parameters()) parameter.zero_();  // three latents and a window, alike
  converted[0]->record_shares(true);
  model->forward(some_tokens());
  EXPECT_TRUE(close(converted[0]->mean_shares(), torch::full({4}, 0.75, torch::kFloat64)));
}

}  // namespace
}  // namespace latte::extend
