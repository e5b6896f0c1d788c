#include "kernels/training_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/training_rows.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include "hwy/highway.h"
#include "kernels/load-inl.h"
#include "kernels/math-inl.h"
#include "kernels/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

size_t Padded(size_t n) {
  const size_t lanes = hn::Lanes(DF());
  return (n + lanes - 1) / lanes * lanes;
}

// Sum over i of term(i), a vector each: four sums at a time, since each waits for its last.
template <class Term>
HWY_INLINE float SumOver(size_t padded, const Term& term) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  VF sums[4] = {hn::Zero(df), hn::Zero(df), hn::Zero(df), hn::Zero(df)};
  size_t i = 0;
  for (; i + 4 * lanes <= padded; i += 4 * lanes) {
    for (size_t j = 0; j < 4; ++j) sums[j] = hn::Add(sums[j], term(i + j * lanes));
  }
  for (; i < padded; i += lanes) sums[0] = hn::Add(sums[0], term(i));
  return hn::ReduceSum(df, hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3])));
}

void RmsForward(const RmsNormRows& args, float epsilon, int64_t begin, int64_t end, void* out, float* inverse) {
  const DF df;
  const size_t n = static_cast<size_t>(args.n), padded = Padded(n), lanes = hn::Lanes(df);
  Scratch scratch(2 * Scratch::Rounded(padded));
  float *weight = scratch.Take(padded), *x = scratch.Take(padded);
  LoadRow(df, args.dtype, args.weight, 0, n, weight, padded);
  for (int64_t row = begin; row < end; ++row) {
    LoadRow(df, args.dtype, args.x, row * args.n, n, x, padded);
    const float squares = SumOver(padded, [&](size_t i) HWY_ATTR {
      const VF v = hn::Load(df, x + i);
      return hn::Mul(v, v);
    });
    inverse[row] = 1.0f / std::sqrt(squares / static_cast<float>(n) + epsilon);
    const VF scale = hn::Set(df, inverse[row]);
    for (size_t i = 0; i < padded; i += lanes) {
      hn::Store(hn::Mul(hn::Mul(hn::Load(df, x + i), scale), hn::Load(df, weight + i)), df, x + i);
    }
    StoreRow(df, args.dtype, x, n, out, row * args.n);
  }
}

// With r = inverse and h = weight * grad_out: grad_x = r h − r³ mean(h x) x.
void RmsBackward(const RmsNormRows& args, const float* inverse, const void* grad_out, int64_t begin, int64_t end, void* grad_x) {
  const DF df;
  const size_t n = static_cast<size_t>(args.n), padded = Padded(n), lanes = hn::Lanes(df);
  Scratch scratch(3 * Scratch::Rounded(padded));
  float *weight = scratch.Take(padded), *x = scratch.Take(padded), *h = scratch.Take(padded);
  LoadRow(df, args.dtype, args.weight, 0, n, weight, padded);
  for (int64_t row = begin; row < end; ++row) {
    LoadRow(df, args.dtype, args.x, row * args.n, n, x, padded);
    LoadRow(df, args.dtype, grad_out, row * args.n, n, h, padded);
    const float product = SumOver(padded, [&](size_t i) HWY_ATTR {
      const VF v = hn::Mul(hn::Load(df, h + i), hn::Load(df, weight + i));
      hn::Store(v, df, h + i);
      return hn::Mul(v, hn::Load(df, x + i));
    });
    const float r = inverse[row];
    const VF scale = hn::Set(df, r), along = hn::Set(df, r * r * r * product / static_cast<float>(n));
    for (size_t i = 0; i < padded; i += lanes) {
      hn::Store(hn::NegMulAdd(along, hn::Load(df, x + i), hn::Mul(scale, hn::Load(df, h + i))), df, h + i);
    }
    StoreRow(df, args.dtype, h, n, grad_x, row * args.n);
  }
}

HWY_INLINE VF Sigmoid(VF x) {
  const DF df;
  const VF one = hn::Set(df, 1.0f);
  // exp of -|x| can't overflow; the other half by symmetry.
  const VF e = HWY_NAMESPACE::Exp(df, hn::Neg(hn::Abs(x)));
  const VF small = hn::Div(e, hn::Add(one, e));
  return hn::IfThenElse(hn::Lt(x, hn::Zero(df)), small, hn::Sub(one, small));
}

constexpr int64_t kPiece = 1024;  // elements at a time: what lies between load and store stays in the first cache

void Swiglu(const SwigluRows& args, int64_t begin, int64_t end, void* out) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  Scratch scratch(2 * Scratch::Rounded(kPiece));
  float *gate = scratch.Take(kPiece), *up = scratch.Take(kPiece);
  for (int64_t at = begin; at < end; at += kPiece) {
    const size_t n = static_cast<size_t>(std::min(kPiece, end - at)), padded = Padded(n);
    LoadRow(df, args.dtype, args.gate, at, n, gate, padded);
    LoadRow(df, args.dtype, args.up, at, n, up, padded);
    for (size_t i = 0; i < padded; i += lanes) {
      const VF g = hn::Load(df, gate + i);
      hn::Store(hn::Mul(hn::Mul(g, Sigmoid(g)), hn::Load(df, up + i)), df, gate + i);
    }
    StoreRow(df, args.dtype, gate, n, out, at);
  }
}

void SwigluGrad(const SwigluRows& args, const void* grad_out, int64_t begin, int64_t end, void* grad_gate, void* grad_up) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  const VF one = hn::Set(df, 1.0f);
  Scratch scratch(3 * Scratch::Rounded(kPiece));
  float *gate = scratch.Take(kPiece), *up = scratch.Take(kPiece), *grad = scratch.Take(kPiece);
  for (int64_t at = begin; at < end; at += kPiece) {
    const size_t n = static_cast<size_t>(std::min(kPiece, end - at)), padded = Padded(n);
    LoadRow(df, args.dtype, args.gate, at, n, gate, padded);
    LoadRow(df, args.dtype, args.up, at, n, up, padded);
    LoadRow(df, args.dtype, grad_out, at, n, grad, padded);
    for (size_t i = 0; i < padded; i += lanes) {
      const VF g = hn::Load(df, gate + i), u = hn::Load(df, up + i), d = hn::Load(df, grad + i);
      const VF s = Sigmoid(g), silu = hn::Mul(g, s);
      // silu' = s + silu (1 − s)
      hn::Store(hn::Mul(hn::Mul(d, u), hn::MulAdd(silu, hn::Sub(one, s), s)), df, gate + i);
      hn::Store(hn::Mul(d, silu), df, up + i);
    }
    StoreRow(df, args.dtype, gate, n, grad_gate, at);
    StoreRow(df, args.dtype, up, n, grad_up, at);
  }
}

HWY_INLINE float MaxOf(const float* x, size_t padded) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  VF greatest = hn::Set(df, -std::numeric_limits<float>::infinity());
  for (size_t i = 0; i < padded; i += lanes) greatest = hn::Max(greatest, hn::Load(df, x + i));
  return hn::ReduceMax(df, greatest);
}

void Divergence(const DivergenceRows& args, int64_t begin, int64_t end, void* student, float* losses) {
  const DF df;
  const size_t n = static_cast<size_t>(args.n), padded = Padded(n), lanes = hn::Lanes(df);
  const bool taught = args.teacher != nullptr, told = args.targets != nullptr;
  const float share = !taught ? 1.0f : told ? args.share : 0.0f;
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  Scratch scratch(4 * Scratch::Rounded(padded));
  float *a = scratch.Take(padded), *b = scratch.Take(padded), *p = scratch.Take(padded), *q = scratch.Take(padded);
  for (int64_t row = begin; row < end; ++row) {
    LoadRow(df, args.dtype, student, row * args.n, n, a, padded, kNone);
    const float a_max = MaxOf(a, padded);
    const VF a_shift = hn::Set(df, a_max);
    VF sum = hn::Zero(df);
    ForEachExp(
        df, padded, [&](size_t i) HWY_ATTR { return hn::Sub(hn::Load(df, a + i), a_shift); },
        [&](size_t i, VF e) HWY_ATTR {
          hn::Store(e, df, p + i);
          sum = hn::Add(sum, e);
        });
    const float p_sum = hn::ReduceSum(df, sum), a_log = a_max + std::log(p_sum);
    float loss = 0.0f;
    if (told && share > 0.0f) loss -= share * (a[args.targets[row]] - a_log);
    const VF p_scale = hn::Set(df, args.scale / p_sum);
    if (taught && share < 1.0f) {
      LoadRow(df, args.dtype, args.teacher, row * args.n, n, b, padded, kNone);
      const float b_max = MaxOf(b, padded);
      const VF b_shift = hn::Set(df, b_max);
      VF mass = hn::Zero(df), gap = hn::Zero(df);
      ForEachExp(
          df, padded, [&](size_t i) HWY_ATTR { return hn::Sub(hn::Load(df, b + i), b_shift); },
          [&](size_t i, VF e) HWY_ATTR {
            hn::Store(e, df, q + i);
            mass = hn::Add(mass, e);
            // Where the teacher gives nothing, −inf − −inf included, nothing is added.
            const VF apart = hn::Sub(hn::Load(df, b + i), hn::Load(df, a + i));
            gap = hn::Add(gap, hn::IfThenZeroElse(hn::Eq(e, hn::Zero(df)), hn::Mul(e, apart)));
          });
      const float q_sum = hn::ReduceSum(df, mass), b_log = b_max + std::log(q_sum);
      loss += (1.0f - share) * (hn::ReduceSum(df, gap) / q_sum - b_log + a_log);
      const VF q_scale = hn::Set(df, args.scale * (1.0f - share) / q_sum);
      for (size_t i = 0; i < padded; i += lanes) {
        hn::Store(hn::NegMulAdd(hn::Load(df, q + i), q_scale, hn::Mul(hn::Load(df, p + i), p_scale)), df, p + i);
      }
    } else {
      for (size_t i = 0; i < padded; i += lanes) hn::Store(hn::Mul(hn::Load(df, p + i), p_scale), df, p + i);
    }
    if (told) p[args.targets[row]] -= share * args.scale;
    StoreRow(df, args.dtype, p, n, student, row * args.n);
    losses[row] = loss;
  }
}

}  // namespace
}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(RmsForward);
HWY_EXPORT(RmsBackward);
HWY_EXPORT(Swiglu);
HWY_EXPORT(SwigluGrad);
HWY_EXPORT(Divergence);

void RmsNormRowsForward(const RmsNormRows& args, float epsilon, int64_t begin, int64_t end, void* out, float* inverse) {
  HWY_DYNAMIC_DISPATCH(RmsForward)(args, epsilon, begin, end, out, inverse);
}

void RmsNormRowsBackward(const RmsNormRows& args, const float* inverse, const void* grad_out, int64_t begin, int64_t end,
                         void* grad_x) {
  HWY_DYNAMIC_DISPATCH(RmsBackward)(args, inverse, grad_out, begin, end, grad_x);
}

void SwigluForward(const SwigluRows& args, int64_t begin, int64_t end, void* out) {
  HWY_DYNAMIC_DISPATCH(Swiglu)(args, begin, end, out);
}

void SwigluBackward(const SwigluRows& args, const void* grad_out, int64_t begin, int64_t end, void* grad_gate, void* grad_up) {
  HWY_DYNAMIC_DISPATCH(SwigluGrad)(args, grad_out, begin, end, grad_gate, grad_up);
}

void DivergenceRowsForward(const DivergenceRows& args, int64_t begin, int64_t end, void* student, float* losses) {
  HWY_DYNAMIC_DISPATCH(Divergence)(args, begin, end, student, losses);
}

}  // namespace latte::kernels
#endif
