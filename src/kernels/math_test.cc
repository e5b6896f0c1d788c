// math-inl.h against the standard library in float64, on every target.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/math_test.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "hwy/highway.h"
#include "kernels/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

// x[0, n) = exp(x), in groups of every size that ForEachExp has; n is a multiple of all of them and of every vector length.
void ExpOfAll(float* x, size_t n) {
  const hn::ScalableTag<float> d;
  size_t vectors = 1;
  for (size_t begin = 0; begin < n; vectors = vectors % 7 + 1) {
    const size_t count = std::min(n - begin, vectors * hn::Lanes(d));
    float* part = x + begin;
    ForEachExp(
        d, count, [&](size_t i) HWY_ATTR { return hn::LoadU(d, part + i); },
        [&](size_t i, hn::Vec<decltype(d)> e) HWY_ATTR { hn::StoreU(e, d, part + i); });
    begin += count;
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <gtest/gtest.h>

namespace latte::kernels {
namespace {

HWY_EXPORT(ExpOfAll);

template <class Test>
void OnEveryTarget(const Test& test) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    SCOPED_TRACE(hwy::TargetName(target));
    test();
  }
  hwy::SetSupportedTargetsForTest(0);
}

float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

TEST(Exp, IsExactToAFewUlpsOverItsWholeRange) {
  std::vector<float> x;
  for (double at = -87.33; at <= 88.0; at += 0.00037) x.push_back(static_cast<float>(at));
  x.insert(x.end(), {-87.33f, -73.647f, -52.162f, 88.0f});
  for (float small = 1.0f; small > 1e-30f; small *= 0.37f) x.insert(x.end(), {small, -small});
  x.resize((x.size() + 63) / 64 * 64);
  OnEveryTarget([&] {
    std::vector<float> actual = x;
    HWY_DYNAMIC_DISPATCH(ExpOfAll)(actual.data(), actual.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = std::exp(static_cast<double>(x[i]));
      const double ulp = std::ldexp(1.0, std::ilogb(expected) - 23);
      ASSERT_LE(std::abs(actual[i] - expected), 2.5 * ulp) << x[i];  // false for NaN
    }
  });
}

TEST(Exp, OfWhatIsNoOrdinaryNumber) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kLargest = std::numeric_limits<float>::max();
  OnEveryTarget([&] {
    std::vector<float> x(64, 0.0f);
    std::copy_n(std::vector<float>{-kInfinity, -kLargest, -1e4f, -87.3301f, -0.0f, 0.0f}.data(), 6, x.data());
    // Whatever else a NaN's bits say.
    const uint32_t nans[] = {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0x7fc00001u, 0x7fffffffu, 0xffc00101u};
    for (size_t i = 0; i < std::size(nans); ++i) x[16 + i] = FloatOf(nans[i]);
    HWY_DYNAMIC_DISPATCH(ExpOfAll)(x.data(), x.size());
    for (size_t i = 0; i < 4; ++i) EXPECT_EQ(x[i], 0.0f) << i;
    for (size_t i = 4; i < 16; ++i) EXPECT_EQ(x[i], 1.0f) << i;
    for (size_t i = 0; i < std::size(nans); ++i) EXPECT_TRUE(std::isnan(x[16 + i])) << i;
  });
}

}  // namespace
}  // namespace latte::kernels
#endif
