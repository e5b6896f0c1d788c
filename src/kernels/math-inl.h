// Vector functions shared by the kernels. Included once per SIMD target.
#if defined(LATTE_KERNELS_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_MATH_INL_H_
#undef LATTE_KERNELS_MATH_INL_H_
#else
#define LATTE_KERNELS_MATH_INL_H_
#endif

#include <cstddef>
#include <type_traits>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// x = exp(x) for x <= 88, to 2.5 ulp; 0 below -87.33 (nearly the smallest normal float), -inf included; NaN stays NaN. exp(0)
// is 1. Several vectors take each step together: the steps of one depend on each other, and a processor that had to look past
// them for independent work would wait.
template <size_t kVectors, class D, class V = hn::Vec<D>>
HWY_INLINE void ExpTogether(D d, V (&x)[kVectors]) {
  const hn::RebindToSigned<D> di;
  // x log2(e) = n + r with |r| <= 1/2. Adding `round` rounds to the integer n, and leaves n + 127, the exponent's bits, in the
  // lowest bits of the sum. The logarithm is given to more than a float's digits, and the product must not be rounded before n is
  // taken from it.
  const V log2e = hn::Set(d, 1.44269504088896341f);
  const V round = hn::Set(d, 12582912.0f + 127.0f);
  V sum[kVectors], n[kVectors], r[kVectors], p[kVectors];
  for (size_t i = 0; i < kVectors; ++i) sum[i] = hn::MulAdd(x[i], log2e, round);
  for (size_t i = 0; i < kVectors; ++i) n[i] = hn::Sub(sum[i], round);
#if HWY_NATIVE_FMA
  for (size_t i = 0; i < kVectors; ++i) r[i] = hn::MulSub(x[i], log2e, n[i]);
  for (size_t i = 0; i < kVectors; ++i) r[i] = hn::MulAdd(x[i], hn::Set(d, 1.925963033e-8f), r[i]);
#else
  for (size_t i = 0; i < kVectors; ++i) r[i] = hn::NegMulAdd(n[i], hn::Set(d, 0.693359375f), x[i]);
  for (size_t i = 0; i < kVectors; ++i) r[i] = hn::Mul(hn::NegMulAdd(n[i], hn::Set(d, -2.12194440e-4f), r[i]), log2e);
#endif
  // 2^r to 1.1e-7: the polynomial of this degree, with 1 at 0, whose greatest relative error is least, its coefficients rounded.
  for (size_t i = 0; i < kVectors; ++i) p[i] = hn::MulAdd(hn::Set(d, 1.326472731e-3f), r[i], hn::Set(d, 9.671512991e-3f));
  for (size_t i = 0; i < kVectors; ++i) p[i] = hn::MulAdd(p[i], r[i], hn::Set(d, 5.550733581e-2f));
  for (size_t i = 0; i < kVectors; ++i) p[i] = hn::MulAdd(p[i], r[i], hn::Set(d, 2.402224243e-1f));
  for (size_t i = 0; i < kVectors; ++i) p[i] = hn::MulAdd(p[i], r[i], hn::Set(d, 6.931470037e-1f));
  for (size_t i = 0; i < kVectors; ++i) p[i] = hn::MulAdd(p[i], r[i], hn::Set(d, 1.0f));
  for (size_t i = 0; i < kVectors; ++i) p[i] = hn::Mul(p[i], hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(di, sum[i]))));
  for (size_t i = 0; i < kVectors; ++i) x[i] = hn::IfThenZeroElse(hn::Lt(x[i], hn::Set(d, -87.33f)), p[i]);
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
  V one[1] = {x};
  ExpTogether(d, one);
  return one[0];
}

// use(i, exp(x(i))) for each vector i = 0, lanes, … of [0, n), in order; n is a multiple of the vector length.
template <class D, class X, class Use>
HWY_INLINE void ForEachExp(D d, size_t n, const X& x, const Use& use) {
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  const auto together = [&](auto vectors) HWY_ATTR {
    hn::Vec<D> e[vectors];
    for (size_t j = 0; j < vectors; ++j) e[j] = x(i + j * lanes);
    ExpTogether(d, e);
    for (size_t j = 0; j < vectors; ++j) use(i + j * lanes, e[j]);
    i += vectors * lanes;
  };
  size_t left = n / lanes;
  for (; left >= 4 && left != 5; left -= 4) together(std::integral_constant<size_t, 4>());
  for (; left >= 3; left -= 3) together(std::integral_constant<size_t, 3>());
  if (left == 2) return together(std::integral_constant<size_t, 2>());
  if (left == 1) together(std::integral_constant<size_t, 1>());
}

// 1 / x to about 3 ulp for normal x below 2^126, without the division's latency where an estimate of 12 bits is to be had.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Reciprocal(D d, V x) {
#if HWY_ARCH_X86
  const V estimate = hn::ApproximateReciprocal(x);
  return hn::Mul(estimate, hn::NegMulAdd(estimate, x, hn::Set(d, 2.0f)));
#else
  return hn::Div(hn::Set(d, 1.0f), x);
#endif
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
