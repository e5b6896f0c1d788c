// The attention of pretrained layers against torch's own operator, forward and backward.
#include "models/decoder_attention.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "nn/test_close.h"

namespace latte::models {
namespace {

using nn::close;

struct FullAttentionCase {
  int64_t num_kv_heads;
  at::ScalarType dtype;
  double tolerance;
  int threads;
};

class FullAttentionTest : public ::testing::TestWithParam<FullAttentionCase> {
 protected:
  FullAttentionTest() {
    at::set_num_threads(GetParam().threads);  // decides which operator is used
    torch::manual_seed(3);
    config_.embed_dim = 24;
    config_.num_heads = 4;
    config_.num_kv_heads = GetParam().num_kv_heads;
    config_.head_dim = 8;
    config_.attention_scale = 0.3;
    config_.rope.pairs = formats::RopePairs::kNeighbours;
    config_.rope.dims = 8;
    config_.rope.base = 100.0;
    rope_ = std::make_shared<Rope>(config_.rope, 64);
    const auto linear = [](int64_t in, int64_t out) {
      torch::nn::Linear made(torch::nn::LinearOptions(in, out).bias(false));
      made->to(GetParam().dtype);
      return made;
    };
    weights_.query = linear(24, 32);
    weights_.key = linear(24, 8 * config_.num_kv_heads);
    weights_.value = linear(24, 8 * config_.num_kv_heads);
    weights_.output = linear(32, 24);
  }

  ~FullAttentionTest() override { at::set_num_threads(threads_before_); }

  at::Tensor expected(const at::Tensor& x) {
    const auto heads = weights_.project(x, config_.head_dim);
    const auto positions = torch::arange(x.size(1));
    const auto first = [](const at::Tensor& each) { return each.transpose(1, 2); };
    const auto out = at::scaled_dot_product_attention(first(rope_->rotate(heads.query, positions)),
                                                      first(rope_->rotate(heads.key, positions)), first(heads.value), {}, 0.0,
                                                      /*is_causal=*/true, config_.attention_scale, /*enable_gqa=*/true);
    return weights_.output(first(out).flatten(2));
  }

  // Of a weighted sum of `out`: with respect to x and the four matrices.
  std::vector<at::Tensor> gradients(const at::Tensor& out, const at::Tensor& x) {
    torch::manual_seed(4);
    return torch::autograd::grad({(out * torch::randn_like(out)).sum()}, {x, weights_.query->weight, weights_.key->weight,
                                                                          weights_.value->weight, weights_.output->weight});
  }

  void expect_same(const at::Tensor& actual, const at::Tensor& x) {
    const auto wanted = expected(x);
    EXPECT_TRUE(close(actual, wanted, GetParam().tolerance));
    const auto got = gradients(actual, x), correct = gradients(wanted, x);
    for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(close(got[i], correct[i], GetParam().tolerance)) << "gradient " << i;
  }

  const int threads_before_ = at::get_num_threads();
  formats::DecoderConfig config_;
  std::shared_ptr<const Rope> rope_;
  AttentionWeights weights_;
};

TEST_P(FullAttentionTest, IsTorchsWithItsGradients) {
  FullAttentionImpl attention(config_, rope_);
  const auto x = torch::randn({2, 37, 24}).to(GetParam().dtype).requires_grad_();
  expect_same(attention.forward(x, weights_, {}).out, x);
}

TEST_P(FullAttentionTest, PiecesGiveTheWholesGradients) {
  FullAttentionImpl attention(config_, rope_);
  const auto x = torch::randn({2, 37, 24}).to(GetParam().dtype).requires_grad_();
  std::vector<at::Tensor> pieces;
  std::optional<DecoderAttentionState> state;
  int64_t begin = 0;
  for (const int64_t end : {20, 21, 37}) {
    DecoderAttentionOptions options;
    options.state = state ? &*state : nullptr;
    options.output_state = true;
    auto result = attention.forward(x.slice(1, begin, end), weights_, options);
    pieces.push_back(result.out);
    state = std::move(result.state);
    begin = end;
  }
  expect_same(torch::cat(pieces, 1), x);
}

INSTANTIATE_TEST_SUITE_P(Kinds, FullAttentionTest,
                         testing::Values(FullAttentionCase{2, torch::kFloat32, 1e-5, 1},
                                         FullAttentionCase{1, torch::kFloat32, 1e-5, 4},
                                         FullAttentionCase{1, torch::kFloat32, 1e-5, 5},
                                         FullAttentionCase{4, torch::kBFloat16, 0.02, 1},
                                         FullAttentionCase{2, torch::kFloat64, 1e-12, 1}),
                         [](const auto& info) {
                           return std::string(c10::toString(info.param.dtype)) + "KvHeads" +
                                  std::to_string(info.param.num_kv_heads) + "Threads" + std::to_string(info.param.threads);
                         });

}  // namespace
}  // namespace latte::models
