// Gates are computed where they are used, forward and backward: recomputing them is cheaper than storing them. With
// q = -log a >= 0, the input's share sqrt(1 - a²) is sqrt(-e (2 + e)) with e = expm1(-q) = a - 1: 1 - a² itself would lose every
// digit where a is near 1.
#include "kernels/rg_lru.h"

#include <algorithm>
#include <cstring>

#include "kernels/channels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rg_lru.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// After highway.h, which defines this target's namespace.
#include "hwy/contrib/math/math-inl.h"
#include "kernels/load-inl.h"
#include "kernels/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace {

using FloatTag = hn::CappedTag<float, kChannelBlock>;
using Floats = hn::Vec<FloatTag>;

// Exp is ours, named with its namespace: Highway's takes NaN to 0, which would hide a diverged model.

struct Sigmoid {
  Floats value;
  Floats complement;  // 1 - value, exact where value is near 1

  HWY_INLINE explicit Sigmoid(Floats x) {
    const FloatTag d;
    const auto one = hn::Set(d, 1.0f);
    const auto e = HWY_NAMESPACE::Exp(d, hn::Neg(hn::Abs(x)));
    const auto above_half = hn::Div(one, hn::Add(one, e));
    const auto below_half = hn::Mul(e, above_half);
    const auto negative = hn::Lt(x, hn::Zero(d));
    value = hn::IfThenElse(negative, below_half, above_half);
    complement = hn::IfThenElse(negative, above_half, below_half);
  }
};

// log(1 + exp(x)).
HWY_INLINE Floats Softplus(Floats x) {
  const FloatTag d;
  const auto tail = hn::Log1p(d, HWY_NAMESPACE::Exp(d, hn::Neg(hn::Abs(x))));
  return hn::Add(hn::IfThenElse(hn::Gt(x, hn::Zero(d)), x, hn::Zero(d)), tail);
}

// Smaller of the two, but NaN where x is: hn::Min differs between targets there.
HWY_INLINE Floats Cap(Floats x, float bound) {
  const auto limit = hn::Set(FloatTag(), bound);
  return hn::IfThenElse(hn::Gt(x, limit), limit, x);
}

struct Gates {
  Sigmoid recurrence;
  Sigmoid input;
  Floats decay;  // q = -log a
  Floats keep;   // a
  Floats loss;   // a - 1
  Floats share;  // sqrt(1 - a²)

  HWY_INLINE Gates(Floats rate, Floats recurrence_logits, Floats input_logits)
      : recurrence(recurrence_logits), input(input_logits) {
    const FloatTag d;
    // Beyond 200 a is 0 in float32 and so is all that follows from q.
    decay = Cap(hn::Mul(rate, recurrence.value), 200.0f);
    keep = HWY_NAMESPACE::Exp(d, hn::Neg(decay));
    loss = hn::Expm1(d, hn::Neg(decay));
    share = hn::Sqrt(hn::Mul(hn::Neg(loss), hn::Add(hn::Set(d, 2.0f), loss)));
  }

  // a v + w. Near a = 1 as v + (a - 1) v: the rounding of a itself would be the same at every token, and with a memory of 1 / (1
  // - a) tokens it adds up to that many ulp.
  HWY_INLINE Floats Keep(Floats v, Floats w) const {
    const auto near_one = hn::Gt(loss, hn::Set(FloatTag(), -0.5f));
    return hn::Add(hn::IfThenElse(near_one, hn::MulAdd(loss, v, v), hn::Mul(keep, v)), w);
  }
};

// Where a slice lies, and its per-channel rate 8 softplus(lambda).
class Slice {
 public:
  Slice(const RgLruArgs& args, int64_t index)
      : args_(args), at_(ChannelSliceAt(index, args.channels)), sequence_(SequenceAt(at_.sequence, args.time, args.cu_seqlens)) {}

  int64_t length() const { return sequence_.length; }
  size_t count() const { return static_cast<size_t>(at_.count); }
  size_t padded() const { return hwy::RoundUpTo(count(), hn::Lanes(FloatTag())); }

  void Load(const View& view, int64_t token, float* row) const {
    LoadRow(FloatTag(), args_.dtype, view.data, Offset(view, token), count(), row, padded());
  }

  void Store(const float* row, const MutableView& view, int64_t token) const {
    StoreRow(FloatTag(), args_.dtype, row, count(), view.data, Offset(view, token));
  }

  // From [N, C]; zeros where it is absent.
  void LoadState(const float* state, float* row) const {
    if (state == nullptr) {
      std::fill_n(row, padded(), 0.0f);
    } else {
      LoadFloatRow(FloatTag(), state + at_.sequence * args_.channels + at_.channel, count(), row, padded(), 0.0f);
    }
  }

  void StoreState(const float* row, float* state) const {
    if (state != nullptr) std::copy_n(row, count(), state + at_.sequence * args_.channels + at_.channel);
  }

  // Of hidden [B, T, C].
  int64_t HiddenOffset(int64_t token) const {
    return (sequence_.batch * args_.time + sequence_.begin + token) * args_.channels + at_.channel;
  }

  bool IsReal(int64_t token) const {
    const MaskView& mask = args_.key_mask;
    return !mask || mask.data[sequence_.batch * mask.batch_stride + (sequence_.begin + token) * mask.time_stride];
  }

  void LoadRates(float* rates) const {
    const FloatTag d;
    LoadLambda(rates);
    for (size_t c = 0; c < padded(); c += hn::Lanes(d)) {
      // The cap keeps an infinite lambda from becoming inf · 0 where a recurrence gate is shut.
      hn::Store(Cap(hn::Mul(hn::Set(d, 8.0f), Softplus(hn::Load(d, rates + c))), 1e30f), d, rates + c);
    }
  }

  void LoadLambda(float* lambda) const { LoadFloatRow(FloatTag(), args_.lambda + at_.channel, count(), lambda, padded(), 0.0f); }

 private:
  template <class AnyView>
  int64_t Offset(const AnyView& view, int64_t token) const {
    return sequence_.batch * view.batch_stride + (sequence_.begin + token) * view.time_stride + at_.channel;
  }

  const RgLruArgs& args_;
  ChannelSlice at_;
  Sequence sequence_;
};

void RgLruForwardSlice(const RgLruArgs& args, const RgLruOutputs& outputs, int64_t index) {
  const FloatTag d;
  const Slice slice(args, index);
  HWY_ALIGN float rates[kChannelBlock], hidden[kChannelBlock];
  HWY_ALIGN float x[kChannelBlock], recurrence_logits[kChannelBlock], input_logits[kChannelBlock];
  slice.LoadRates(rates);
  slice.LoadState(args.initial_state, hidden);
  for (int64_t t = 0; t < slice.length(); ++t) {
    if (slice.IsReal(t)) {
      slice.Load(args.x, t, x);
      slice.Load(args.recurrence_logits, t, recurrence_logits);
      slice.Load(args.input_logits, t, input_logits);
      for (size_t c = 0; c < slice.padded(); c += hn::Lanes(d)) {
        const Gates gates(hn::Load(d, rates + c), hn::Load(d, recurrence_logits + c), hn::Load(d, input_logits + c));
        const auto input = hn::Mul(gates.share, hn::Mul(gates.input.value, hn::Load(d, x + c)));
        hn::Store(gates.Keep(hn::Load(d, hidden + c), input), d, hidden + c);
      }
    }
    slice.Store(hidden, outputs.out, t);
    if (outputs.hidden != nullptr) std::copy_n(hidden, slice.count(), outputs.hidden + slice.HiddenOffset(t));
  }
  slice.StoreState(hidden, outputs.final_state);
}

// With G the gradient of h[t] and u = i x: h = a h' + m u, m = sqrt(1 - a²), q = -log a = 8 softplus(lambda) r, so
//   dq of the loss = G (u a² / m - a h'),
// where u a² / m is unbounded for r -> 0. Every parameter reaches q through a factor of q itself (dr = r (1 - r), and lambda's
// factor is q sigmoid / softplus), so only q / m is ever formed, which tends to 0.
void RgLruBackwardSlice(const RgLruArgs& args, const RgLruGradients& gradients, int64_t index) {
  const FloatTag d;
  const Slice slice(args, index);
  HWY_ALIGN float rates[kChannelBlock], carried[kChannelBlock];
  HWY_ALIGN float x[kChannelBlock], recurrence_logits[kChannelBlock], input_logits[kChannelBlock];
  HWY_ALIGN float grad_out[kChannelBlock], before[kChannelBlock];
  // Summed apart over a stretch before it joins the total, which keeps rounding small over long sequences.
  HWY_ALIGN float stretch_sum[kChannelBlock] = {}, rate_sum[kChannelBlock] = {};
  constexpr int64_t kStretch = 128;
  const auto end_stretch = [&]() HWY_ATTR {
    for (size_t c = 0; c < slice.padded(); c += hn::Lanes(d)) {
      hn::Store(hn::Add(hn::Load(d, rate_sum + c), hn::Load(d, stretch_sum + c)), d, rate_sum + c);
      hn::Store(hn::Zero(d), d, stretch_sum + c);
    }
  };
  slice.LoadRates(rates);
  slice.LoadState(gradients.grad_final_state, carried);
  for (int64_t t = slice.length() - 1; t >= 0; --t) {
    slice.Load(gradients.grad_out, t, grad_out);
    if (slice.IsReal(t)) {
      slice.Load(args.x, t, x);
      slice.Load(args.recurrence_logits, t, recurrence_logits);
      slice.Load(args.input_logits, t, input_logits);
      if (t == 0) {
        slice.LoadState(args.initial_state, before);
      } else {
        LoadFloatRow(d, gradients.hidden + slice.HiddenOffset(t - 1), slice.count(), before, slice.padded(), 0.0f);
      }
      for (size_t c = 0; c < slice.padded(); c += hn::Lanes(d)) {
        const Gates gates(hn::Load(d, rates + c), hn::Load(d, recurrence_logits + c), hn::Load(d, input_logits + c));
        const auto v = hn::Load(d, x + c);
        const auto grad = hn::Add(hn::Load(d, carried + c), hn::Load(d, grad_out + c));
        const auto grad_gated = hn::Mul(grad, gates.share);
        const auto closed = hn::Eq(gates.share, hn::Zero(d));
        const auto q_over_share = hn::IfThenZeroElse(closed, hn::Div(gates.decay, gates.share));
        const auto gated = hn::Mul(gates.input.value, v);
        const auto through_share = hn::Mul(hn::Mul(gates.keep, q_over_share), gated);
        const auto through_keep = hn::Mul(gates.decay, hn::Load(d, before + c));
        const auto grad_log_decay = hn::Mul(hn::Mul(grad, gates.keep), hn::Sub(through_share, through_keep));  // q · dq

        hn::Store(gates.Keep(grad, hn::Zero(d)), d, carried + c);
        hn::Store(hn::Mul(grad_gated, gates.input.value), d, x + c);
        hn::Store(hn::Mul(grad_log_decay, gates.recurrence.complement), d, recurrence_logits + c);
        hn::Store(hn::Mul(hn::Mul(grad_gated, gated), gates.input.complement), d, input_logits + c);
        hn::Store(hn::Add(hn::Load(d, stretch_sum + c), grad_log_decay), d, stretch_sum + c);
      }
    } else {
      for (size_t c = 0; c < slice.padded(); c += hn::Lanes(d)) {
        hn::Store(hn::Add(hn::Load(d, carried + c), hn::Load(d, grad_out + c)), d, carried + c);
        for (float* row : {x, recurrence_logits, input_logits}) hn::Store(hn::Zero(d), d, row + c);
      }
    }
    slice.Store(x, gradients.grad_x, t);
    slice.Store(recurrence_logits, gradients.grad_recurrence_logits, t);
    slice.Store(input_logits, gradients.grad_input_logits, t);
    if (t % kStretch == 0) end_stretch();
  }
  slice.StoreState(carried, gradients.grad_initial_state);

  // d log softplus = sigmoid / softplus, which is 1 in the limit lambda -> -inf.
  float* lambda = x;
  slice.LoadLambda(lambda);
  for (size_t c = 0; c < slice.padded(); c += hn::Lanes(d)) {
    const auto v = hn::Load(d, lambda + c);
    const auto ratio = hn::IfThenElse(hn::Lt(v, hn::Set(d, -20.0f)), hn::Set(d, 1.0f), hn::Div(Sigmoid(v).value, Softplus(v)));
    hn::Store(hn::Mul(ratio, hn::Load(d, rate_sum + c)), d, rate_sum + c);
  }
  slice.StoreState(rate_sum, gradients.grad_lambda);
}

}  // namespace
}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(RgLruForwardSlice);
HWY_EXPORT(RgLruBackwardSlice);

int64_t RgLruSlices(const RgLruArgs& args) { return ChannelSlices(args.sequences, args.channels); }

void RgLruForward(const RgLruArgs& args, const RgLruOutputs& outputs, int64_t slice) {
  HWY_DYNAMIC_DISPATCH(RgLruForwardSlice)(args, outputs, slice);
}

void RgLruBackward(const RgLruArgs& args, const RgLruGradients& gradients, int64_t slice) {
  HWY_DYNAMIC_DISPATCH(RgLruBackwardSlice)(args, gradients, slice);
}

void RgLruStep(const RgLruArgs& args, const RgLruOutputs& outputs, float* state, int64_t slice) {
  // A slice reads its row of the old state before it writes the new one, so both may share memory.
  RgLruArgs step = args;
  step.initial_state = state;
  RgLruOutputs advanced = outputs;
  advanced.final_state = state;
  RgLruForward(step, advanced, slice);
}

}  // namespace latte::kernels
#endif
