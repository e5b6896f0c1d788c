#include "models/rope.h"

#include <gtest/gtest.h>

#include <cmath>

#include "nn/test_close.h"

namespace latte::models {
namespace {

using nn::close;

class RopeTest : public ::testing::TestWithParam<formats::RopePairs> {
 protected:
  static formats::RopeConfig config() {
    formats::RopeConfig config;
    config.pairs = GetParam();
    config.dims = 8;
    config.base = 100.0;
    return config;
  }
};

TEST_P(RopeTest, TurnsEachPairByItsAngle) {
  torch::manual_seed(1);
  const auto x = torch::randn({2, 5, 3, 8}, torch::kFloat64);
  const auto positions = torch::tensor({0, 1, 7, 1000, 3});
  const auto got = Rope(config(), 64).rotate(x, positions);
  auto expected = torch::empty_like(x);
  for (int64_t t = 0; t < 5; ++t) {
    for (int64_t i = 0; i < 4; ++i) {
      const bool neighbours = GetParam() == formats::RopePairs::kNeighbours;
      const int64_t left = neighbours ? 2 * i : i, right = neighbours ? 2 * i + 1 : i + 4;
      const double angle = static_cast<double>(positions[t].item<int64_t>()) * std::pow(100.0, -2.0 * static_cast<double>(i) / 8);
      const auto a = x.select(1, t).select(-1, left), b = x.select(1, t).select(-1, right);
      expected.select(1, t).select(-1, left).copy_(a * std::cos(angle) - b * std::sin(angle));
      expected.select(1, t).select(-1, right).copy_(a * std::sin(angle) + b * std::cos(angle));
    }
  }
  EXPECT_TRUE(close(got, expected, 1e-6));  // cosines are float32
  EXPECT_TRUE(close(Rope(config(), 64).rotate(x.to(torch::kBFloat16), positions), expected, 1e-2));
  const auto strided = x.transpose(0, 1).contiguous().transpose(0, 1);
  EXPECT_TRUE(close(Rope(config(), 64).rotate(strided, positions), expected, 1e-6));
}

TEST_P(RopeTest, TheGradientIsTheAdjoint) {
  torch::manual_seed(2);
  auto config = RopeTest::config();
  config.scaling.kind = formats::RopeScalingKind::kYarn;  // which also scales
  config.scaling.factor = 4.0;
  const Rope rope(config, 64);
  const auto x = torch::randn({1, 6, 2, 8}).requires_grad_(), y = torch::randn({1, 6, 2, 8});
  const auto positions = torch::arange(6);
  const auto product = (rope.rotate(x, positions) * y).sum();
  const auto grad = torch::autograd::grad({product}, {x})[0];
  EXPECT_NEAR((x * grad).sum().item<double>(), product.item<double>(), 1e-4);
  const auto other = torch::randn({1, 6, 2, 8});
  EXPECT_NEAR((other * grad).sum().item<double>(), (rope.rotate(other, positions) * y).sum().item<double>(), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(Pairs, RopeTest, ::testing::Values(formats::RopePairs::kNeighbours, formats::RopePairs::kHalves));

}  // namespace
}  // namespace latte::models
