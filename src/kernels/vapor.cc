// An angle is position · base^(-2 i / D). Sine and cosine cost more than the rotation itself, so they are computed once a token
// for all heads, and from scratch only where a slice starts or positions jump: from one position to the next the pair (cos, sin)
// is turned by the frequency, in float64, where 64 turns add about 1e-14.
#include "kernels/vapor.h"

#include <algorithm>
#include <cmath>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/vapor.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/load-inl.h"

#ifndef LATTE_KERNELS_VAPOR_BLOCK_
#define LATTE_KERNELS_VAPOR_BLOCK_
namespace latte::kernels {
constexpr int64_t kVaporTokens = 64;  // of a slice
}
#endif

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace {

// Cosines and sines of one position's angles.
class Rotation {
 public:
  Rotation(int64_t head_dim, double base, bool inverse)
      : sign_(inverse ? -1.0 : 1.0),
        frequencies_(static_cast<size_t>(head_dim / 2)),
        cos_(frequencies_.size()),
        sin_(frequencies_.size()),
        float_cos_(frequencies_.size()),
        float_sin_(frequencies_.size()) {
    for (size_t i = 0; i < frequencies_.size(); ++i) {
      frequencies_[i] = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    }
  }

  void MoveTo(int64_t position) {
    // Unsigned: positions are a caller's data, and their difference may overflow.
    const uint64_t step = static_cast<uint64_t>(position) - static_cast<uint64_t>(position_);
    if (started_ && step == 0) return;
    if (started_ && step == 1) {
      Turn();
    } else {
      for (size_t i = 0; i < frequencies_.size(); ++i) {
        const double angle = static_cast<double>(position) * frequencies_[i];
        cos_[i] = std::cos(angle);
        sin_[i] = sign_ * std::sin(angle);
      }
    }
    started_ = true;
    position_ = position;
    std::copy(cos_.begin(), cos_.end(), float_cos_.begin());
    std::copy(sin_.begin(), sin_.end(), float_sin_.begin());
  }

  const float* cos() const { return float_cos_.data(); }
  const float* sin() const { return float_sin_.data(); }

 private:
  void Turn() {
    if (turn_cos_.empty()) {  // a single token, as in decoding, never comes here
      turn_cos_.resize(frequencies_.size());
      turn_sin_.resize(frequencies_.size());
      for (size_t i = 0; i < frequencies_.size(); ++i) {
        turn_cos_[i] = std::cos(frequencies_[i]);
        turn_sin_[i] = sign_ * std::sin(frequencies_[i]);
      }
    }
    for (size_t i = 0; i < frequencies_.size(); ++i) {
      const double c = cos_[i], s = sin_[i];
      cos_[i] = c * turn_cos_[i] - s * turn_sin_[i];
      sin_[i] = s * turn_cos_[i] + c * turn_sin_[i];
    }
  }

  const double sign_;
  bool started_ = false;
  int64_t position_ = 0;
  std::vector<double> frequencies_, cos_, sin_, turn_cos_, turn_sin_;
  std::vector<float> float_cos_, float_sin_;
};

void VaporRotateSlice(const VaporArgs& args, const MutableView& out, int64_t slice) {
  constexpr int64_t kPairs = 64;
  const hn::CappedTag<float, kPairs> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  HWY_ALIGN float low[kPairs], high[kPairs], cos[kPairs], sin[kPairs];

  const int64_t blocks = (args.time + kVaporTokens - 1) / kVaporTokens;
  const int64_t batch = slice / blocks;
  const int64_t begin = slice % blocks * kVaporTokens;
  const int64_t end = std::min(begin + kVaporTokens, args.time);
  const int64_t half = args.head_dim / 2;
  Rotation rotation(args.head_dim, args.base, args.inverse);
  for (int64_t t = begin; t < end; ++t) {
    rotation.MoveTo(
        args.positions == nullptr ? t : args.positions[batch * args.positions_batch_stride + t * args.positions_time_stride]);
    for (int64_t first = 0; first < half; first += kPairs) {
      const int64_t pairs = std::min(kPairs, half - first);
      const size_t n = static_cast<size_t>(pairs);
      const size_t padded = hwy::RoundUpTo(n, static_cast<size_t>(lanes));
      LoadFloatRow(d, rotation.cos() + first, n, cos, padded, 0.0f);
      LoadFloatRow(d, rotation.sin() + first, n, sin, padded, 0.0f);
      for (int64_t h = 0; h < args.heads; ++h) {
        const int64_t from = batch * args.x.batch_stride + t * args.x.time_stride + h * args.x.head_stride + first;
        const int64_t to = batch * out.batch_stride + t * out.time_stride + h * out.head_stride + first;
        LoadRow(d, args.dtype, args.x.data, from, n, low, padded);
        LoadRow(d, args.dtype, args.x.data, from + half, n, high, padded);
        for (int64_t i = 0; i < pairs; i += lanes) {
          const auto c = hn::Load(d, cos + i), s = hn::Load(d, sin + i);
          const auto x = hn::Load(d, low + i), y = hn::Load(d, high + i);
          hn::Store(hn::NegMulAdd(y, s, hn::Mul(x, c)), d, low + i);
          hn::Store(hn::MulAdd(x, s, hn::Mul(y, c)), d, high + i);
        }
        StoreRow(d, args.dtype, low, n, out.data, to);
        StoreRow(d, args.dtype, high, n, out.data, to + half);
      }
    }
  }
}

}  // namespace
}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(VaporRotateSlice);

int64_t VaporSlices(const VaporArgs& args) { return args.batch * ((args.time + kVaporTokens - 1) / kVaporTokens); }

void VaporRotate(const VaporArgs& args, const MutableView& out, int64_t slice) {
  HWY_DYNAMIC_DISPATCH(VaporRotateSlice)(args, out, slice);
}

}  // namespace latte::kernels
#endif
