#include "kernels/token_rows.h"

#include <gtest/gtest.h>

#include "kernels/recurrent_test_util.h"

namespace latte::kernels {
namespace {

using namespace testing;

constexpr int64_t kSizes[] = {1, 7, 16, 33, 64, 576};

std::vector<float> RandomRow(int64_t n, Random& random, float spread = 1.0f) {
  std::normal_distribution<float> normal(0.3f, spread);
  std::vector<float> x(static_cast<size_t>(n) + 1);  // one behind the row, which must stay
  for (float& value : x) value = normal(random);
  return x;
}

TEST(TokenRows, Norms) {
  ForEachTarget([] {
    for (const int64_t n : kSizes) {
      Random random(1);
      const std::vector<float> x = RandomRow(n, random), weight = RandomRow(n, random), bias = RandomRow(n, random);
      double squares = 0.0, sum = 0.0, variance = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        squares += static_cast<double>(x[static_cast<size_t>(i)]) * x[static_cast<size_t>(i)];
        sum += x[static_cast<size_t>(i)];
      }
      const double mean = sum / static_cast<double>(n);
      for (int64_t i = 0; i < n; ++i) variance += std::pow(x[static_cast<size_t>(i)] - mean, 2) / static_cast<double>(n);
      std::vector<float> rms = x, layer = x, plain = x;
      RmsNormRow(rms.data(), weight.data(), 1e-5f, n, rms.data());
      LayerNormRow(layer.data(), weight.data(), bias.data(), 1e-5f, n, layer.data());
      LayerNormRow(plain.data(), weight.data(), nullptr, 1e-5f, n, plain.data());
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
        const double scaled = (x[i] - mean) / std::sqrt(variance + 1e-5) * weight[i];
        EXPECT_NEAR(rms[i], x[i] / std::sqrt(squares / static_cast<double>(n) + 1e-5) * weight[i], 1e-5);
        EXPECT_NEAR(plain[i], scaled, 3e-5);
        EXPECT_NEAR(layer[i], scaled + bias[i], 3e-5);
      }
      EXPECT_EQ(rms.back(), x.back());
      EXPECT_EQ(layer.back(), x.back());
    }
  });
}

TEST(TokenRows, Gates) {
  ForEachTarget([] {
    for (const int64_t n : kSizes) {
      for (const float spread : {1.0f, 100.0f}) {
        Random random(2);
        const std::vector<float> x = RandomRow(n, random, spread), up = RandomRow(n, random);
        for (const bool gated : {true, false}) {
          std::vector<float> silu = x, gelu = x, exact = x;
          GateRow(Gate::kSilu, x.data(), gated ? up.data() : nullptr, n, silu.data());
          GateRow(Gate::kGeluTanh, gelu.data(), gated ? up.data() : nullptr, n, gelu.data());
          GateRow(Gate::kGelu, exact.data(), gated ? up.data() : nullptr, n, exact.data());
          for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
            const double v = x[i], factor = gated ? up[i] : 1.0;
            const double tanh = std::tanh(0.79788456080286535588 * (v + 0.044715 * v * v * v));
            EXPECT_NEAR(silu[i], v / (1.0 + std::exp(-v)) * factor, 1e-5 * (1.0 + std::abs(v * factor)));
            EXPECT_NEAR(exact[i], v * 0.5 * std::erfc(-v / std::sqrt(2.0)) * factor, 1e-6 * (1.0 + std::abs(v * factor)));
            EXPECT_NEAR(gelu[i], 0.5 * v * (1.0 + tanh) * factor, 1e-5 * (1.0 + std::abs(v * factor)));
          }
          EXPECT_EQ(silu.back(), x.back());
        }
      }
    }
  });
}

TEST(TokenRows, Rotations) {
  ForEachTarget([] {
    for (const int64_t pairs : {1, 5, 16, 32, 128}) {
      Random random(3);
      const std::vector<float> x = RandomRow(2 * pairs, random);
      std::vector<float> cos(static_cast<size_t>(pairs)), sin(cos);
      for (int64_t i = 0; i < pairs; ++i) {
        cos[static_cast<size_t>(i)] = std::cos(static_cast<float>(i));
        sin[static_cast<size_t>(i)] = std::sin(static_cast<float>(i));
      }
      for (const RotaryPairs layout : {RotaryPairs::kNeighbours, RotaryPairs::kHalves}) {
        std::vector<float> turned = x;
        RotateRow(layout, pairs, cos.data(), sin.data(), turned.data());
        for (size_t i = 0; i < static_cast<size_t>(pairs); ++i) {
          const size_t a = layout == RotaryPairs::kHalves ? i : 2 * i;
          const size_t b = layout == RotaryPairs::kHalves ? i + static_cast<size_t>(pairs) : 2 * i + 1;
          EXPECT_NEAR(turned[a], x[a] * cos[i] - x[b] * sin[i], 1e-6);
          EXPECT_NEAR(turned[b], x[a] * sin[i] + x[b] * cos[i], 1e-6);
        }
        EXPECT_EQ(turned.back(), x.back());
      }
    }
  });
}

TEST(TokenRows, LogSigmoid) {
  ForEachTarget([] {
    for (const int64_t n : kSizes) {
      for (const float spread : {1.0f, 100.0f}) {
        Random random(5);
        const std::vector<float> x = RandomRow(n, random, spread);
        std::vector<float> y = x;
        LogSigmoidRow(0.25f, n, y.data());
        for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
          const double v = x[i], expected = 0.25 * (std::min(v, 0.0) - std::log1p(std::exp(-std::abs(v))));
          EXPECT_NEAR(y[i], expected, 1e-6 * (1.0 + std::abs(expected)));
        }
        EXPECT_EQ(y.back(), x.back());
      }
    }
  });
}

TEST(TokenRows, Softmax) {
  ForEachTarget([] {
    const float none_of_it = -std::numeric_limits<float>::infinity();
    for (const int64_t n : kSizes) {
      Random random(4);
      std::vector<float> x = RandomRow(n, random, 10.0f);
      if (n > 2) x[1] = none_of_it;
      std::vector<float> y = x;
      SoftmaxRow(n, y.data());
      double sum = 0.0;
      for (int64_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(x[static_cast<size_t>(i)]));
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) EXPECT_NEAR(y[i], std::exp(static_cast<double>(x[i])) / sum, 1e-5);
      EXPECT_EQ(y.back(), x.back());
      std::vector<float> none(static_cast<size_t>(n), none_of_it);
      SoftmaxRow(n, none.data());
      for (const float value : none) EXPECT_EQ(value, 0.0f);
    }
  });
}

}  // namespace
}  // namespace latte::kernels
