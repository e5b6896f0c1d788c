#include "nn/sequence_peers.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <vector>

#include "nn/test_close.h"
#include "nn/test_peers.h"

namespace latte::nn {
namespace {

constexpr double kExact = 1e-11;  // float64
constexpr int64_t kHeads = 2, kLatents = 3, kDim = 4;

// The state of a stretch of random tokens, some latents empty; decays strong enough to matter.
at::Tensor random_state(double spread) {
  auto state = torch::rand({2, kHeads, kLatents, kDim + 3}, torch::kFloat64);
  state.select(-1, kDim).add_(1);                                                  // z >= 1
  state.select(-1, kDim + 1).copy_(torch::randn({2, kHeads, kLatents}) * spread);  // m
  state.select(-1, kDim + 2).copy_(-torch::rand({2, kHeads, kLatents}) * spread);  // G
  auto empty = state.select(0, 0).select(0, 0).select(0, 1);
  empty.narrow(0, 0, kDim + 1).zero_();
  empty.select(0, kDim + 1).fill_(-std::numeric_limits<double>::infinity());
  return state;
}

at::Tensor no_token(const at::Tensor& state) {
  auto empty = torch::zeros_like(state);
  empty.select(-1, kDim + 1).fill_(-std::numeric_limits<double>::infinity());
  return empty;
}

class StateBefore : public testing::TestWithParam<int64_t> {};

// The scan and its gradient against merge_states, one rank after the other, and torch's own gradients of that.
TEST_P(StateBefore, IsTheProductOfAllStatesBefore) {
  torch::manual_seed(3);
  const int64_t ranks = GetParam();
  for (const double spread : {1.0, 40.0, 900.0}) {
    std::vector<at::Tensor> states, weights, expected, got(static_cast<size_t>(ranks)), expected_grads, got_grads(got.size());
    for (int64_t r = 0; r < ranks; ++r) {
      states.push_back(random_state(spread).requires_grad_());
      weights.push_back(torch::randn({2, kHeads, kLatents, kDim + 1}, torch::kFloat64));
    }
    auto before = no_token(states[0]);
    auto loss = torch::zeros({}, torch::kFloat64);
    for (size_t r = 0; r < states.size(); ++r) {
      expected.push_back(before);
      loss = loss + (before.narrow(-1, 0, kDim + 1) * weights[r]).sum();
      before = merge_states(before, states[r]);
    }
    expected_grads = torch::autograd::grad({loss}, {states.begin(), states.end() - 1}, {}, false, false, /*allow_unused=*/true);

    ThreadPeers peers(ranks);
    peers.run([&](SequencePeers& peer) {
      const auto rank = static_cast<size_t>(peer.rank());
      auto own = states[rank].detach().clone().requires_grad_();
      got[rank] = state_before(peer, own);
      (got[rank].narrow(-1, 0, kDim + 1) * weights[rank]).sum().backward();
      got_grads[rank] = own.grad();
    });
    EXPECT_TRUE(peers.idle());
    const auto finite = [](const at::Tensor& x) { return x.nan_to_num(0.0, 0.0, -1e9); };
    for (size_t r = 0; r < states.size(); ++r) {
      EXPECT_TRUE(close(finite(got[r]), finite(expected[r]), kExact)) << "rank " << r << " spread " << spread;
      const auto grad = r + 1 < states.size() ? expected_grads[r] : torch::zeros_like(states[r]);
      // All but the maximum's, which is a choice of unit.
      EXPECT_TRUE(close(got_grads[r].narrow(-1, 0, kDim + 1), grad.narrow(-1, 0, kDim + 1), kExact)) << "rank " << r;
      EXPECT_TRUE(close(got_grads[r].narrow(-1, kDim + 2, 1), grad.narrow(-1, kDim + 2, 1), kExact)) << "rank " << r;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, StateBefore, testing::Values(2, 3, 4, 5, 8, 9));

// Each rank sends at most log2(ranks) + 1 messages: 8 ranks shift once and join at distances 1, 2 and 4.
TEST(StateBefore, SendsFewMessages) {
  ThreadPeers peers(8);
  const auto state = random_state(1);
  peers.run([&](SequencePeers& peer) { state_before(peer, state); });
  EXPECT_EQ(peers.messages(), 7 + 6 + 5 + 3);
}

TEST(StretchState, IsCausalAttentionsFinalState) {
  torch::manual_seed(4);
  const int64_t time = 300;
  for (const double spread : {1.0, 30.0}) {
    for (const double decay : {0.0, 0.1, 8.0}) {
      const auto wide = torch::TensorOptions(torch::kFloat64);
      const auto keys = torch::randn({2, time, kHeads, kLatents}, wide) * spread;
      const auto values = torch::randn({2, time, kHeads, kDim}, wide);
      OptionalTensor log_decay;
      if (decay > 0) log_decay = -torch::rand({2, time, kHeads, kLatents}, wide) * decay;
      const auto [out, expected] = causal_attention(
          keys, keys, values,
          {.log_decay = log_decay, .key_mask = {}, .initial_state = {}, .output_final_state = true, .cu_seqlens = {}});
      // States are equal where joining something before them gives the same.
      const auto before = random_state(spread);
      const auto sums = [&](const at::Tensor& state) {
        const auto joined = merge_states(before, state);
        return joined.narrow(-1, 0, kDim) / joined.narrow(-1, kDim, 1);
      };
      EXPECT_TRUE(close(sums(stretch_state(keys, values, log_decay)), sums(*expected), 1e-10)) << spread << " " << decay;
    }
  }
}

TEST(SequencePeers, StretchesShorterThanAnEdgeAreRefused) {
  ThreadPeers edge(2), first(2);
  const auto x = torch::zeros({1, 3, 4});
  EXPECT_THROW(edge.run([&](SequencePeers& peer) { rows_before(peer, x, 4); }), c10::ValueError);
  EXPECT_THROW(first.run([&](SequencePeers& peer) { first_rows(peer, x, 4); }), c10::ValueError);
}

}  // namespace
}  // namespace latte::nn
