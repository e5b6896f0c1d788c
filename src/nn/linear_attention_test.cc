#include "nn/linear_attention.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/ops.h"

namespace latte::nn {
namespace {

at::Tensor randn(const std::vector<int64_t>& shape) { return torch::randn(shape, torch::kFloat64); }

// The recurrence, a token at a time.
at::Tensor by_recurrence(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& log_decay) {
  auto state = torch::zeros({q.size(0), q.size(1), q.size(3), v.size(3)}, q.options());
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < q.size(2); ++t) {
    if (log_decay.defined()) state = state * log_decay.select(2, t).exp().unsqueeze(-1);
    state = state + k.select(2, t).unsqueeze(-1) * v.select(2, t).unsqueeze(-2);
    outs.push_back(at::matmul(q.select(2, t).unsqueeze(-2), state).squeeze(-2));
  }
  return torch::stack(outs, 2);
}

TEST(LinearAttention, ChunksAreTheRecurrenceWithAndWithoutDecay) {
  torch::manual_seed(1);
  for (const int64_t time : {1, 31, 32, 33, 100}) {
    const auto q = randn({2, 3, time, 4}), k = randn({2, 3, time, 4}), v = randn({2, 3, time, 5});
    const at::Tensor gentle = -torch::rand({2, 3, time, 4}, torch::kFloat64) * 0.1, strong = gentle * 40;
    for (const at::Tensor& decay : {at::Tensor(), gentle, strong}) {
      at::Tensor state;
      const auto out = decayed_linear_attention(q, k, v, decay, state);
      EXPECT_TRUE(torch::allclose(out, by_recurrence(q, k, v, decay), 1e-9, 1e-9)) << time;
    }
  }
}

TEST(LinearAttention, TheFastestDecayStaysFinite) {
  const auto q = torch::ones({1, 1, 64, 2}), k = torch::ones({1, 1, 64, 2}), v = torch::ones({1, 1, 64, 2});
  at::Tensor state;
  const auto out = decayed_linear_attention(q, k, v, torch::full({1, 1, 64, 2}, -5.0), state);
  // 2 Σ e^(-5 n): the last token, almost alone.
  EXPECT_TRUE(torch::allclose(out.select(2, 63), torch::full({1, 1, 2}, 2.0 / (1.0 - std::exp(-5.0))), 1e-5));
}

constexpr std::array kPositions = {LatentPosition::kNone, LatentPosition::kVapor, LatentPosition::kConv, LatentPosition::kRgLru};

// What queries and keys are made of: x behind the convolution or the recurrence that the module has.
template <class Attention>
at::Tensor mixed(Attention& attention, const at::Tensor& x) {
  if (attention->conv) return std::get<0>(attention->conv->forward(x, {}, {}, false));
  if (attention->rg_lru) return std::get<0>(attention->rg_lru->forward(x, {}, {}, false));
  return x;
}

TEST(LinearAttention, NormalisedIsAWeightedMeanOverWhatIsThere) {
  torch::manual_seed(2);
  for (const LatentPosition position : kPositions) {
    LinearAttentionOptions options;
    options.embed_dim = 8;
    options.num_heads = 2;
    options.batch_first = true;
    options.position = position;
    LinearAttention attention(options);
    attention->to(torch::kFloat64);
    const auto x = randn({2, 9, 8});
    const auto padding = torch::zeros({2, 9}, torch::kBool);
    padding.slice(1, 6).fill_(true);
    for (const bool causal : {false, true}) {
      const auto got = attention->forward(x, {.key_padding_mask = padding, .is_causal = causal}).out;
      const auto read = mixed(attention, x);
      const auto phi = [&](Linear& proj) { return 1 + torch::elu(proj(read)).view({2, 9, 2, 4}).transpose(1, 2); };
      auto weights = at::matmul(phi(attention->query_proj), phi(attention->key_proj).transpose(2, 3));
      weights = weights.masked_fill(padding.view({2, 1, 1, 9}), 0);
      if (causal) weights = weights.tril();
      weights = weights / weights.sum(-1, true);
      const bool vapor = position == LatentPosition::kVapor;
      auto v = attention->value_proj(x).view({2, 9, 2, 4});
      if (vapor) v = latte::vapor(v);
      auto out = at::matmul(weights, v.transpose(1, 2)).transpose(1, 2);
      if (vapor) out = latte::vapor(out, {}, kVaporBase, /*inverse=*/true);
      const auto expected = attention->out_proj(out.flatten(2));
      // What padding reads through the recurrence is nobody's.
      EXPECT_TRUE(torch::allclose(got.slice(1, 0, 6), expected.slice(1, 0, 6), 1e-9, 1e-9)) << to_string(position) << causal;
      // The same without the padding there.
      const auto shorter = attention->forward(x.slice(1, 0, 6), {.is_causal = causal}).out;
      EXPECT_TRUE(torch::allclose(got.slice(1, 0, 6), shorter, 1e-9, 1e-9)) << to_string(position) << causal;
    }
  }
}

TEST(LinearAttention, NothingInIsNothingOut) {
  for (const auto kind : {LinearKind::kNormalised, LinearKind::kGated}) {
    LinearAttention attention(LinearAttentionOptions{.embed_dim = 8, .num_heads = 2, .batch_first = true, .kind = kind});
    for (const auto& [batch, time] : {std::pair<int64_t, int64_t>{0, 5}, {2, 0}}) {
      const auto x = torch::zeros({batch, time, 8});
      EXPECT_EQ(attention->forward(x, {.is_causal = true}).out.sizes(), x.sizes());
    }
  }
}

TEST(LinearAttention, PiecesGiveTheWhole) {
  torch::manual_seed(3);
  for (const auto& [kind, position] : [] {
         std::vector<std::pair<LinearKind, LatentPosition>> all;
         for (const auto position : kPositions)
           all.insert(all.end(), {{LinearKind::kNormalised, position}, {LinearKind::kGated, position}});
         return all;
       }()) {
    LinearAttentionOptions options;
    options.embed_dim = 8;
    options.num_heads = 4;
    options.num_kv_heads = 2;
    options.batch_first = true;
    options.kind = kind;
    options.position = position;
    LinearAttention attention(options);
    attention->to(torch::kFloat64);
    const auto x = randn({2, 40, 8});
    const auto whole = attention->forward(x, {.is_causal = true}).out;
    AttentionForwardOptions next{.is_causal = true, .output_state = true};
    std::vector<at::Tensor> pieces;
    for (const auto& piece : {x.slice(1, 0, 7), x.slice(1, 7, 8), x.slice(1, 8)}) {
      auto result = attention->forward(piece, next);
      pieces.push_back(result.out);
      next.state = result.state;
    }
    EXPECT_TRUE(torch::allclose(torch::cat(pieces, 1), whole, 1e-9, 1e-9));
    EXPECT_EQ(next.state->position, 40);
  }
}

TEST(LinearAttention, BothDirectionsAreTheWeightedSumOverAllTokens) {
  torch::manual_seed(5);
  const int64_t time = 70;
  const auto q = randn({2, 3, time, 4}), k = randn({2, 3, time, 4}), v = randn({2, 3, time, 5});
  const auto log_decay = -torch::rand({2, 3, time, 4}, torch::kFloat64) * 0.5;
  const auto sums = log_decay.cumsum(2);
  std::vector<at::Tensor> expected;
  for (int64_t t = 0; t < time; ++t) {
    // From s up to t decays s + 1 … t, from s down to t decays t … s - 1.
    const auto past = sums.slice(2, t, t + 1) - sums.slice(2, 0, t + 1);
    const auto before = sums - log_decay;
    const auto future = before.slice(2, t + 1) - before.slice(2, t, t + 1);
    const auto weights = (q.slice(2, t, t + 1) * k * at::cat({past, future}, 2).exp()).sum(-1, true);
    expected.push_back((weights * v).sum(2));
  }
  EXPECT_TRUE(torch::allclose(bidirectional_linear_attention(q, k, v, log_decay), torch::stack(expected, 2), 1e-9, 1e-9));
}

TEST(LinearAttention, BothDirectionsLeavePaddingOut) {
  torch::manual_seed(6);
  LinearAttention gated(LinearAttentionOptions{.embed_dim = 8, .num_heads = 2, .batch_first = true, .kind = LinearKind::kGated});
  gated->to(torch::kFloat64);
  const auto x = randn({2, 9, 8});
  const auto padding = torch::zeros({2, 9}, torch::kBool);
  padding.slice(1, 6).fill_(true);
  const auto padded = gated->forward(x, {.key_padding_mask = padding}).out.slice(1, 0, 6);
  EXPECT_TRUE(torch::allclose(padded, gated->forward(x.slice(1, 0, 6)).out, 1e-9, 1e-9));
  EXPECT_FALSE(torch::allclose(padded, gated->forward(x).out.slice(1, 0, 6), 1e-3, 1e-3));
}

TEST(Linformer, ReadsProjectedKeysAndNoPadding) {
  for (const LatentPosition position : kPositions) {
    torch::manual_seed(4);
    LinformerAttentionOptions options;
    options.position = position;
    options.embed_dim = 8;
    options.num_heads = 2;
    options.batch_first = true;
    options.max_positions = 10;
    options.projected = 3;
    LinformerAttention attention(options);
    attention->to(torch::kFloat64);
    const auto x = randn({2, 10, 8});
    const auto padding = torch::zeros({2, 10}, torch::kBool);
    padding.slice(1, 7).fill_(true);
    const auto padded = attention->forward(x, {.key_padding_mask = padding}).out;
    const auto shorter = attention->forward(x.slice(1, 0, 7)).out;
    EXPECT_TRUE(torch::allclose(padded.slice(1, 0, 7), shorter, 1e-9, 1e-9));

    const auto heads = [](const at::Tensor& y) { return y.view({2, -1, 2, 4}).transpose(1, 2); };
    const auto map = attention->position_proj;
    const auto read = mixed(attention, x);
    const bool vapor = position == LatentPosition::kVapor;
    auto values = attention->value_proj(x).view({2, 10, 2, 4});
    if (vapor) values = latte::vapor(values);
    const auto k = heads(at::matmul(map, attention->key_proj(read))), v = heads(at::matmul(map, values.flatten(2)));
    const auto weights = (at::matmul(heads(attention->query_proj(read)), k.transpose(2, 3)) / 2.0).softmax(-1);
    auto out = at::matmul(weights, v).transpose(1, 2);
    if (vapor) out = latte::vapor(out, {}, kVaporBase, /*inverse=*/true);
    const auto expected = attention->out_proj(out.flatten(2));
    EXPECT_TRUE(torch::allclose(attention->forward(x).out, expected, 1e-9, 1e-9));
    EXPECT_THROW(attention->forward(x, {.is_causal = true}), c10::ValueError);
    EXPECT_THROW(attention->forward(randn({1, 11, 8})), c10::ValueError);
  }
}

}  // namespace
}  // namespace latte::nn
