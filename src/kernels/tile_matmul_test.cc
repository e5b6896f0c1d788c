// tile_matmul-inl.h against plain loops in float64, for every remainder of its blocks and panels.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/tile_matmul_test.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "hwy/highway.h"
#include "kernels/prefetch-inl.h"
#include "kernels/tile_matmul-inl.h"

#ifndef LATTE_KERNELS_TILE_MATMUL_TEST_ONCE_
#define LATTE_KERNELS_TILE_MATMUL_TEST_ONCE_
namespace latte::kernels {

struct ProductShape {
  size_t rows, vectors, inner;
  bool accumulate, pairs, prefetch;
};

inline std::vector<float> RandomFloats(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// The upper half of a float's bits, and back: bfloat16 without rounding.
inline float Truncated(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// A float whose bits are a pair of bfloat16, the earlier in the low half.
inline float PairOf(float low, float high) {
  uint32_t low_bits, high_bits;
  std::memcpy(&low_bits, &low, sizeof(low_bits));
  std::memcpy(&high_bits, &high, sizeof(high_bits));
  const uint32_t bits = low_bits >> 16 | (high_bits & 0xffff0000u);
  float pair;
  std::memcpy(&pair, &bits, sizeof(pair));
  return pair;
}

}  // namespace latte::kernels
#endif

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

template <class Product, class Ahead>
void Multiply(const ProductShape& shape, size_t columns, Left a, const float* b, size_t b_row, float* c, size_t c_row,
              Ahead& ahead) {
  const hn::ScalableTag<float> d;
  if (shape.accumulate) {
    MatMul<true, Product>(d, shape.rows, columns, shape.inner, a, b, b_row, c, c_row, ahead);
  } else {
    MatMul<false, Product>(d, shape.rows, columns, shape.inner, a, b, b_row, c, c_row, ahead);
  }
}

// The largest error of a product, relative to the sum of its terms' magnitudes; infinite where it writes what isn't its own.
double ProductError(const ProductShape& shape) {
  constexpr float kUntouched = 12345.0f;
  constexpr size_t kGap = 3;  // floats between rows that belong to nobody
  if (shape.pairs && !kHasPairs) return 0.0;
  const size_t columns = shape.vectors * hn::Lanes(hn::ScalableTag<float>());
  const size_t depth = shape.inner * (shape.pairs ? 2 : 1);
  std::vector<float> a = RandomFloats(shape.rows * depth, 1), b = RandomFloats(depth * columns, 2);
  const std::vector<float> before = RandomFloats(shape.rows * columns, 3);
  if (shape.pairs) {
    for (float& x : a) x = Truncated(x);
    for (float& x : b) x = Truncated(x);
  }
  // a by columns, so that both of its strides count.
  const size_t a_column = shape.rows + kGap, b_row = columns + kGap, c_row = columns + kGap;
  std::vector<float> left(shape.inner * a_column), right(shape.inner * b_row), c(shape.rows * c_row, kUntouched);
  for (size_t k = 0; k < shape.inner; ++k) {
    for (size_t m = 0; m < shape.rows; ++m) {
      const float* row = a.data() + m * depth;
      left[k * a_column + m] = shape.pairs ? PairOf(row[2 * k], row[2 * k + 1]) : row[k];
    }
    for (size_t n = 0; n < columns; ++n) {
      right[k * b_row + n] = shape.pairs ? PairOf(b[2 * k * columns + n], b[(2 * k + 1) * columns + n]) : b[k * columns + n];
    }
  }
  for (size_t m = 0; m < shape.rows; ++m) std::copy_n(before.data() + m * columns, columns, c.data() + m * c_row);

  const Left view{left.data(), 1, a_column};
  Nothing nothing;
  Prefetch prefetch;  // of fewer lines than the product has steps
  prefetch.Add(right.data(), static_cast<int64_t>(b_row * sizeof(float)), columns * sizeof(float), 1);
  if (shape.pairs) {
    Multiply<Pairs>(shape, columns, view, right.data(), b_row, c.data(), c_row, nothing);
  } else if (shape.prefetch) {
    Multiply<Floats>(shape, columns, view, right.data(), b_row, c.data(), c_row, prefetch);
  } else {
    Multiply<Floats>(shape, columns, view, right.data(), b_row, c.data(), c_row, nothing);
  }

  double worst = 0.0;
  for (size_t m = 0; m < shape.rows; ++m) {
    for (size_t n = 0; n < columns; ++n) {
      double sum = shape.accumulate ? before[m * columns + n] : 0.0, magnitude = std::abs(sum);
      for (size_t k = 0; k < depth; ++k) {
        const double term = static_cast<double>(a[m * depth + k]) * b[k * columns + n];
        sum += term;
        magnitude += std::abs(term);
      }
      worst = std::max(worst, std::abs(c[m * c_row + n] - sum) / magnitude);
    }
    for (size_t n = columns; n < c_row; ++n) worst = c[m * c_row + n] == kUntouched ? worst : HUGE_VAL;
  }
  return worst;
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <gtest/gtest.h>

namespace latte::kernels {
namespace {

HWY_EXPORT(ProductError);

TEST(TileMatMul, EveryRemainderOnEveryTarget) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    for (size_t rows = 1; rows <= 13; ++rows) {
      for (size_t vectors = 1; vectors <= 20; ++vectors) {
        for (const size_t inner : {1, 2, 7, 33}) {
          for (int kind = 0; kind < 6; ++kind) {
            const ProductShape shape{rows, vectors, inner, kind % 2 == 1, kind / 2 == 1, kind / 2 == 2};
            // Each of the sum's roundings is half a unit at most of a partial sum; instructions for pairs round no more often.
            const double allowed = 0x1p-24 * static_cast<double>(2 * inner + 2);
            ASSERT_LE(HWY_DYNAMIC_DISPATCH(ProductError)(shape), allowed)
                << hwy::TargetName(target) << ": " << rows << " rows, " << vectors << " vectors, " << inner << " steps, kind "
                << kind;
          }
        }
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
}

}  // namespace
}  // namespace latte::kernels
#endif
