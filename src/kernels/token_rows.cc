#include "kernels/token_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/token_rows.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// use(vector at i) for all of x[0, n); lanes behind n are `rest`.
template <class Use>
HWY_INLINE void ForEach(const float* x, int64_t n, float rest, const Use& use) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) use(i, hn::LoadU(df, x + i));
  if (i < n) use(i, hn::LoadNOr(hn::Set(df, rest), df, x + i, static_cast<size_t>(n - i)));
}

HWY_INLINE VF LoadUpTo(const float* x, int64_t i, int64_t n) {
  const DF df;
  return i + static_cast<int64_t>(hn::Lanes(df)) <= n ? hn::LoadU(df, x + i) : hn::LoadN(df, x + i, static_cast<size_t>(n - i));
}

HWY_INLINE void StoreUpTo(VF v, int64_t i, int64_t n, float* out) {
  const DF df;
  if (i + static_cast<int64_t>(hn::Lanes(df)) <= n) {
    hn::StoreU(v, df, out + i);
  } else {
    hn::StoreN(v, df, out + i, static_cast<size_t>(n - i));
  }
}

void RmsNorm(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
  const DF df;
  VF squares = hn::Zero(df);
  ForEach(x, n, 0.0f, [&](int64_t, VF v) HWY_ATTR { squares = hn::MulAdd(v, v, squares); });
  const float mean = hn::ReduceSum(df, squares) / static_cast<float>(n);
  const VF scale = hn::Set(df, 1.0f / std::sqrt(mean + epsilon));
  ForEach(x, n, 0.0f,
          [&](int64_t i, VF v) HWY_ATTR { StoreUpTo(hn::Mul(hn::Mul(v, scale), LoadUpTo(weight, i, n)), i, n, out); });
}

void LayerNorm(const float* x, const float* weight, const float* bias, float epsilon, int64_t n, float* out) {
  const DF df;
  VF sum = hn::Zero(df);
  ForEach(x, n, 0.0f, [&](int64_t, VF v) HWY_ATTR { sum = hn::Add(sum, v); });
  const float mean = hn::ReduceSum(df, sum) / static_cast<float>(n);
  const VF means = hn::Set(df, mean);
  VF squares = hn::Zero(df);
  ForEach(x, n, mean, [&](int64_t, VF v) HWY_ATTR {
    const VF centred = hn::Sub(v, means);
    squares = hn::MulAdd(centred, centred, squares);
  });
  const float variance = hn::ReduceSum(df, squares) / static_cast<float>(n);
  const VF scale = hn::Set(df, 1.0f / std::sqrt(variance + epsilon));
  ForEach(x, n, mean, [&](int64_t i, VF v) HWY_ATTR {
    const VF scaled = hn::Mul(hn::Mul(hn::Sub(v, means), scale), LoadUpTo(weight, i, n));
    StoreUpTo(bias == nullptr ? scaled : hn::Add(scaled, LoadUpTo(bias, i, n)), i, n, out);
  });
}

// 1 / (1 + exp(-x)); exp would overflow its range for x below -88.
HWY_INLINE VF Sigmoid(VF x) {
  const DF df;
  const VF e = HWY_NAMESPACE::Exp(df, hn::Min(hn::Neg(x), hn::Set(df, 88.0f)));
  return hn::Div(hn::Set(df, 1.0f), hn::Add(hn::Set(df, 1.0f), e));
}

// x Φ(x). The normal distribution's tail is Abramowitz and Stegun's 7.1.26: to 1.5e-7.
HWY_INLINE VF Gelu(VF x) {
  const DF df;
  const VF z = hn::Mul(hn::Abs(x), hn::Set(df, 0.70710678118654752440f));
  const VF t = hn::Div(hn::Set(df, 1.0f), hn::MulAdd(z, hn::Set(df, 0.3275911f), hn::Set(df, 1.0f)));
  VF p = hn::Set(df, 1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = hn::MulAdd(p, t, hn::Set(df, c));
  const VF tail = hn::Mul(hn::Mul(hn::Set(df, 0.5f), hn::Mul(p, t)), HWY_NAMESPACE::Exp(df, hn::Neg(hn::Mul(z, z))));
  return hn::Mul(x, hn::IfThenElse(hn::Lt(x, hn::Zero(df)), tail, hn::Sub(hn::Set(df, 1.0f), tail)));
}

void GateAll(Gate gate, const float* x, const float* up, int64_t n, float* out) {
  const DF df;
  ForEach(x, n, 0.0f, [&](int64_t i, VF v) HWY_ATTR {
    VF inner = v;
    if (gate == Gate::kGeluTanh) {  // (1 + tanh(y)) / 2 is the logistic function of 2 y
      const VF cubic = hn::MulAdd(hn::Mul(hn::Set(df, 0.044715f), v), hn::Mul(v, v), v);
      inner = hn::Mul(cubic, hn::Set(df, 2.0f * 0.79788456080286535588f));
    }
    VF y = gate == Gate::kGelu ? Gelu(v) : hn::Mul(v, Sigmoid(inner));
    if (up != nullptr) y = hn::Mul(y, LoadUpTo(up, i, n));
    StoreUpTo(y, i, n, out);
  });
}

void Rotate(RotaryPairs layout, int64_t pairs, const float* cos, const float* sin, float* x) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  if (layout == RotaryPairs::kHalves) {
    for (; i + lanes <= pairs; i += lanes) {
      const VF a = hn::LoadU(df, x + i), b = hn::LoadU(df, x + pairs + i);
      const VF c = hn::LoadU(df, cos + i), s = hn::LoadU(df, sin + i);
      hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), df, x + i);
      hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), df, x + pairs + i);
    }
    for (; i < pairs; ++i) {
      const float a = x[i], b = x[pairs + i];
      x[i] = a * cos[i] - b * sin[i];
      x[pairs + i] = a * sin[i] + b * cos[i];
    }
    return;
  }
  for (; i + lanes <= pairs; i += lanes) {
    VF a, b;
    hn::LoadInterleaved2(df, x + 2 * i, a, b);
    const VF c = hn::LoadU(df, cos + i), s = hn::LoadU(df, sin + i);
    hn::StoreInterleaved2(hn::NegMulAdd(b, s, hn::Mul(a, c)), hn::MulAdd(a, s, hn::Mul(b, c)), df, x + 2 * i);
  }
  for (; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

void LogSigmoid(float scale, int64_t n, float* x) {
  const DF df;
  ForEach(x, n, 0.0f, [&](int64_t i, VF v) HWY_ATTR {  // min(v, 0) - ln(1 + exp(-|v|))
    const VF tail = hn::Log1p(df, HWY_NAMESPACE::Exp(df, hn::Neg(hn::Abs(v))));
    StoreUpTo(hn::Mul(hn::Set(df, scale), hn::Sub(hn::Min(v, hn::Zero(df)), tail)), i, n, x);
  });
}

void Softmax(int64_t n, float* x) {
  const DF df;
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  VF most = hn::Set(df, kMinusInf);
  ForEach(x, n, kMinusInf, [&](int64_t, VF v) HWY_ATTR { most = hn::Max(most, v); });
  const float max = hn::ReduceMax(df, most);
  if (max == kMinusInf) {
    std::fill_n(x, n, 0.0f);
    return;
  }
  VF sum = hn::Zero(df);
  ForEach(x, n, kMinusInf, [&](int64_t i, VF v) HWY_ATTR {
    const VF e = HWY_NAMESPACE::Exp(df, hn::Sub(v, hn::Set(df, max)));
    sum = hn::Add(sum, e);
    StoreUpTo(e, i, n, x);
  });
  const VF scale = hn::Set(df, 1.0f / hn::ReduceSum(df, sum));
  ForEach(x, n, 0.0f, [&](int64_t i, VF v) HWY_ATTR { StoreUpTo(hn::Mul(v, scale), i, n, x); });
}

}  // namespace
}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(RmsNorm);
HWY_EXPORT(LayerNorm);
HWY_EXPORT(GateAll);
HWY_EXPORT(Rotate);
HWY_EXPORT(LogSigmoid);
HWY_EXPORT(Softmax);

void RmsNormRow(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(RmsNorm)(x, weight, epsilon, n, out);
}

void LayerNormRow(const float* x, const float* weight, const float* bias, float epsilon, int64_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(LayerNorm)(x, weight, bias, epsilon, n, out);
}

void GateRow(Gate gate, const float* x, const float* up, int64_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(GateAll)(gate, x, up, n, out);
}

void RotateRow(RotaryPairs layout, int64_t pairs, const float* cos, const float* sin, float* x) {
  HWY_DYNAMIC_DISPATCH(Rotate)(layout, pairs, cos, sin, x);
}

void LogSigmoidRow(float scale, int64_t n, float* x) { HWY_DYNAMIC_DISPATCH(LogSigmoid)(scale, n, x); }

void SoftmaxRow(int64_t n, float* x) { HWY_DYNAMIC_DISPATCH(Softmax)(n, x); }

}  // namespace latte::kernels
#endif
