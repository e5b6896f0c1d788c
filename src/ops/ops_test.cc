// The C++ interface: options, optional states, exceptions, gradients. What the operators compute is held to its definition in
// python/tests/test_ops.py.
#include "ops/ops.h"

#include <gtest/gtest.h>

#include <mutex>
#include <set>
#include <thread>

#include "ops/cpu.h"

namespace latte {
namespace {

void ExpectClose(const at::Tensor& got, const at::Tensor& expected, double tolerance = 1e-5) {
  ASSERT_EQ(got.sizes(), expected.sizes());
  const double error = (got - expected).norm().item<double>();
  const double limit = tolerance * (expected.norm().item<double>() + std::sqrt(static_cast<double>(expected.numel())));
  EXPECT_LE(error, limit);
}

struct Inputs {
  at::Tensor query_logits, key_logits, values, query, key;

  explicit Inputs(int64_t time = 37, int64_t latents = 5)
      : query_logits(at::randn({2, time, 4, latents})),
        key_logits(at::randn({2, time, 2, latents})),
        values(at::randn({2, time, 2, 6})),
        query(at::randn({2, time, 4, 8})),
        key(at::randn({2, time, 2, 8})) {}

  Inputs Between(int64_t begin, int64_t end) const {
    Inputs part(0);
    const auto cut = [&](const at::Tensor& x) { return x.slice(1, begin, end); };
    part.query_logits = cut(query_logits);
    part.key_logits = cut(key_logits);
    part.values = cut(values);
    part.query = cut(query);
    part.key = cut(key);
    return part;
  }
};

TEST(Ops, CausalAttentionGoesOnFromItsState) {
  const Inputs all;
  const auto [whole, none] = causal_attention(all.query_logits, all.key_logits, all.values);
  EXPECT_FALSE(none.has_value());
  CausalAttentionOptions options;
  options.output_final_state = true;
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < 37; ++t) {
    const auto part = all.Between(t, t + 1);
    auto [out, state] = causal_attention(part.query_logits, part.key_logits, part.values, options);
    ASSERT_TRUE(state.has_value());
    EXPECT_EQ(state->sizes(), at::IntArrayRef({2, 2, 5, 9}));
    options.initial_state = state;
    outs.push_back(out);
  }
  ExpectClose(at::cat(outs, 1), whole);
}

TEST(Ops, MacchiatoAttentionGoesOnFromItsState) {
  Inputs all;
  all.query_logits = at::randn({2, 37, 4, 6});
  MacchiatoAttentionOptions options;
  options.window = 5;
  options.sinks = 2;
  const auto [whole, none] = macchiato_attention(all.query, all.key, all.values, all.query_logits, all.key_logits, options);
  EXPECT_FALSE(none.has_value());
  options.output_final_state = true;
  std::vector<at::Tensor> outs;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 1}, {1, 20}, {20, 37}}) {
    const auto part = all.Between(begin, end);
    auto [out, state] = macchiato_attention(part.query, part.key, part.values, part.query_logits, part.key_logits, options);
    ASSERT_TRUE(state.has_value());
    EXPECT_TRUE(state->position.eq(end).all().item<bool>());
    options.initial_state = state;
    outs.push_back(out);
  }
  ExpectClose(at::cat(outs, 1), whole);
}

TEST(Ops, WindowAttentionIsSoftmaxAttentionWhereTheWindowIsWide) {
  const Inputs all;
  MacchiatoAttentionOptions options;
  options.window = 64;
  const auto [out, state] = window_attention(all.query, all.key, all.values, options);
  const auto heads_first = [](const at::Tensor& x) { return x.transpose(1, 2).repeat_interleave(4 / x.size(2), 1); };
  const auto expected = at::scaled_dot_product_attention(heads_first(all.query), heads_first(all.key), heads_first(all.values),
                                                         {}, 0.0, /*is_causal=*/true);
  ExpectClose(out, expected.transpose(1, 2));
}

TEST(Ops, GradientsReachEveryInput) {
  Inputs x;
  for (auto* tensor : {&x.query_logits, &x.key_logits, &x.values}) tensor->requires_grad_(true);
  std::get<0>(causal_attention(x.query_logits, x.key_logits, x.values)).square().sum().backward();
  for (const auto* tensor : {&x.query_logits, &x.key_logits, &x.values}) {
    ASSERT_TRUE(tensor->grad().defined());
    EXPECT_GT(tensor->grad().norm().item<double>(), 0.0);
  }
}

TEST(Ops, MergedStatesAreTheWholesState) {
  const Inputs all;
  CausalAttentionOptions options;
  options.output_final_state = true;
  const auto state = [&](const Inputs& x) {
    return *std::get<1>(causal_attention(x.query_logits, x.key_logits, x.values, options));
  };
  ExpectClose(merge_states(state(all.Between(0, 11)), state(all.Between(11, 37))), state(all));
}

TEST(Ops, ChannelsGoOnFromTheirStates) {
  const auto x = at::randn({2, 37, 7}), weight = at::randn({7, 4}), logits = at::randn({2, 37, 7}), lambda = at::randn({7});
  CausalConv1dOptions conv;
  conv.output_final_state = true;
  const auto conv_whole = std::get<0>(causal_conv1d(x, weight));
  auto [conv_left, conv_state] = causal_conv1d(x.slice(1, 0, 2), weight, conv);
  conv.initial_state = conv_state;
  const auto conv_right = std::get<0>(causal_conv1d(x.slice(1, 2), weight, conv));
  ExpectClose(at::cat({conv_left, conv_right}, 1), conv_whole);

  RgLruOptions lru;
  lru.output_final_state = true;
  const auto lru_whole = std::get<0>(rg_lru(x, logits, logits, lambda));
  auto [lru_left, lru_state] = rg_lru(x.slice(1, 0, 9), logits.slice(1, 0, 9), logits.slice(1, 0, 9), lambda, lru);
  lru.initial_state = lru_state;
  const auto lru_right = std::get<0>(rg_lru(x.slice(1, 9), logits.slice(1, 9), logits.slice(1, 9), lambda, lru));
  ExpectClose(at::cat({lru_left, lru_right}, 1), lru_whole);
}

TEST(Ops, VaporAndItsInverseAreTheIdentity) {
  const auto x = at::randn({2, 9, 3, 8});
  const auto rotated = vapor(x);
  EXPECT_GT((rotated - x).norm().item<double>(), 1.0);
  ExpectClose(vapor(rotated, {}, 10000.0, /*inverse=*/true), x);
}

// Compiled without OpenMP, at::parallel_for runs everything on the calling thread.
TEST(Ops, SlicesRunOnAllThreads) {
  const int threads = at::get_num_threads();
  at::set_num_threads(2);
  std::mutex mutex;
  std::set<std::thread::id> seen;
  cpu::ForRanges(8, int64_t{1} << 20, [&](int64_t, int64_t) {
    const std::lock_guard lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  at::set_num_threads(threads);
  EXPECT_EQ(seen.size(), 2U);
}

TEST(Ops, PackedSequencesAreSharedOutByTokens) {
  const std::vector<int64_t> cu_seqlens = {0, 0, 1000, 1010, 1010, 1020, 2000, 2000};
  const int64_t sequences = static_cast<int64_t>(cu_seqlens.size()) - 1;
  for (const int64_t kv_heads : {1, 3}) {
    for (const int64_t shares : {1, 2, 4, 7}) {
      int64_t last = 0;
      for (int64_t i = 0; i < shares; ++i) {
        const int64_t first = cpu::FirstOfShare(cu_seqlens.data(), sequences, kv_heads, i, shares);
        EXPECT_EQ(first, last);
        last = cpu::FirstOfShare(cu_seqlens.data(), sequences, kv_heads, i + 1, shares);
        ASSERT_LE(first, last);
        int64_t tokens = 0;
        for (int64_t slice = first; slice < last; ++slice) {
          const auto n = static_cast<size_t>(slice / kv_heads);
          tokens += cu_seqlens[n + 1] - cu_seqlens[n];
        }
        EXPECT_LE(tokens, 2000 * kv_heads / shares + 1000);  // a share and what is left of its last slice
      }
      EXPECT_EQ(last, sequences * kv_heads);
    }
  }
}

TEST(Ops, WrongInputsThrowTypedErrors) {
  const Inputs x;
  EXPECT_THROW(causal_attention(x.query_logits, x.key_logits, x.values.slice(1, 1)), c10::ValueError);
  EXPECT_THROW(causal_attention(x.query_logits, x.key_logits, x.values.to(at::kDouble)), c10::TypeError);
  BidirectionalAttentionOptions options;
  options.cu_seqlens = at::tensor({0, 30}, at::kLong);
  EXPECT_THROW(
      bidirectional_attention(x.query_logits.narrow(0, 0, 1), x.key_logits.narrow(0, 0, 1), x.values.narrow(0, 0, 1), options),
      c10::ValueError);
}

}  // namespace
}  // namespace latte
