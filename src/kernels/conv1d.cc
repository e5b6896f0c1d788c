// The sequence of a slice is laid out with its past in front: extended row e is row e of the initial state for e < K - 1 and
// token e - (K - 1) after that, so y[t] = Σ_j w[j] extended[t + j] and the final state is extended rows T … T + K - 2. Chunks of
// it are widened to float32 in a small buffer, where masks, states and types no longer matter.
#include "kernels/conv1d.h"

#include <algorithm>
#include <cstring>

#include "kernels/channels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/conv1d.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/load-inl.h"
#include "kernels/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace {

using FloatTag = hn::CappedTag<float, kChannelBlock>;

constexpr int64_t kChunk = 64;  // tokens; with the outputs' half of the buffer it stays inside a 32 KiB L1

class Slice {
 public:
  Slice(const Conv1dArgs& args, int64_t slice)
      : args_(args),
        at_(ChannelSliceAt(slice, args.channels)),
        sequence_(SequenceAt(at_.sequence, args.time, args.cu_seqlens)),
        padded_(static_cast<int64_t>(hwy::RoundUpTo(static_cast<size_t>(at_.count), hn::Lanes(FloatTag())))) {}

  int64_t length() const { return sequence_.length; }
  int64_t count() const { return at_.count; }
  int64_t padded() const { return padded_; }  // floats in a row of the buffers
  int64_t past() const { return args_.width - 1; }
  int64_t channel() const { return at_.channel; }
  int64_t sequence() const { return at_.sequence; }

  // Element of row `row` of a state [N, K - 1, C], or null where the state is absent.
  template <class T>
  T* StateRow(T* state, int64_t row) const {
    return state == nullptr ? nullptr : state + (at_.sequence * past() + row) * args_.channels + at_.channel;
  }

  template <class AnyView>
  int64_t Offset(const AnyView& view, int64_t token) const {
    return sequence_.batch * view.batch_stride + (sequence_.begin + token) * view.time_stride + at_.channel;
  }

  bool IsReal(int64_t token) const {
    const MaskView& mask = args_.key_mask;
    return !mask || mask.data[sequence_.batch * mask.batch_stride + (sequence_.begin + token) * mask.time_stride];
  }

  void Load(const View& view, int64_t token, float* row) const {
    LoadRow(FloatTag(), args_.dtype, view.data, Offset(view, token), static_cast<size_t>(at_.count), row,
            static_cast<size_t>(padded_));
  }

  void Store(const float* row, const MutableView& view, int64_t token) const {
    StoreRow(FloatTag(), args_.dtype, row, static_cast<size_t>(at_.count), view.data, Offset(view, token));
  }

  void LoadExtended(int64_t extended, float* row) const {
    const float* initial = extended < past() ? StateRow(args_.initial_state, extended) : nullptr;
    if (initial != nullptr) {
      LoadFloatRow(FloatTag(), initial, static_cast<size_t>(at_.count), row, static_cast<size_t>(padded_), 0.0f);
    } else if (extended >= past() && IsReal(extended - past())) {
      Load(args_.x, extended - past(), row);
    } else {
      std::fill(row, row + padded_, 0.0f);
    }
  }

  // taps [K, padded] from weight [C, K]; reversed: last tap first.
  void LoadWeights(bool reversed, float* taps) const {
    for (int64_t j = 0; j < args_.width; ++j) {
      float* tap = taps + (reversed ? args_.width - 1 - j : j) * padded_;
      for (int64_t c = 0; c < at_.count; ++c) tap[c] = args_.weight[(at_.channel + c) * args_.width + j];
      std::fill(tap + at_.count, tap + padded_, 0.0f);
    }
  }

 private:
  const Conv1dArgs& args_;
  ChannelSlice at_;
  Sequence sequence_;
  int64_t padded_;
};

// out[i] = start + Σ_j taps[j] rows[i + j] for i < n: taps [K, padded], rows [n + K - 1, padded], start [padded], out [n,
// padded].
void Correlate(int64_t width, int64_t n, int64_t padded, const float* taps, const float* rows, const float* start, float* out) {
  const FloatTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t c = 0; c < padded; c += lanes) {
    const auto first = hn::Load(d, start + c);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      auto y0 = first, y1 = first, y2 = first, y3 = first;
      const float* row = rows + i * padded + c;
      for (int64_t j = 0; j < width; ++j, row += padded) {
        const auto tap = hn::Load(d, taps + j * padded + c);
        y0 = hn::MulAdd(tap, hn::Load(d, row), y0);
        y1 = hn::MulAdd(tap, hn::Load(d, row + padded), y1);
        y2 = hn::MulAdd(tap, hn::Load(d, row + 2 * padded), y2);
        y3 = hn::MulAdd(tap, hn::Load(d, row + 3 * padded), y3);
      }
      hn::Store(y0, d, out + i * padded + c);
      hn::Store(y1, d, out + (i + 1) * padded + c);
      hn::Store(y2, d, out + (i + 2) * padded + c);
      hn::Store(y3, d, out + (i + 3) * padded + c);
    }
    for (; i < n; ++i) {
      auto y = first;
      for (int64_t j = 0; j < width; ++j) {
        y = hn::MulAdd(hn::Load(d, taps + j * padded + c), hn::Load(d, rows + (i + j) * padded + c), y);
      }
      hn::Store(y, d, out + i * padded + c);
    }
  }
}

// sums[j] += Σ_{i < n} x[i] rows[i + j]: x [n, padded], rows [n + K - 1, padded], sums [K, padded]. Each chunk is summed apart
// before it joins the total, which keeps rounding small over long sequences.
void CorrelateSums(int64_t width, int64_t n, int64_t padded, const float* x, const float* rows, float* sums) {
  const FloatTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto add = [&](hn::Vec<FloatTag> v, float* sum) HWY_ATTR { hn::Store(hn::Add(hn::Load(d, sum), v), d, sum); };
  for (int64_t c = 0; c < padded; c += lanes) {
    int64_t j = 0;
    for (; j + 4 <= width; j += 4) {
      auto s0 = hn::Zero(d), s1 = hn::Zero(d), s2 = hn::Zero(d), s3 = hn::Zero(d);
      const float* row = rows + j * padded + c;
      for (int64_t i = 0; i < n; ++i, row += padded) {
        const auto v = hn::Load(d, x + i * padded + c);
        s0 = hn::MulAdd(v, hn::Load(d, row), s0);
        s1 = hn::MulAdd(v, hn::Load(d, row + padded), s1);
        s2 = hn::MulAdd(v, hn::Load(d, row + 2 * padded), s2);
        s3 = hn::MulAdd(v, hn::Load(d, row + 3 * padded), s3);
      }
      add(s0, sums + j * padded + c);
      add(s1, sums + (j + 1) * padded + c);
      add(s2, sums + (j + 2) * padded + c);
      add(s3, sums + (j + 3) * padded + c);
    }
    for (; j < width; ++j) {
      auto s = hn::Zero(d);
      for (int64_t i = 0; i < n; ++i) {
        s = hn::MulAdd(hn::Load(d, x + i * padded + c), hn::Load(d, rows + (i + j) * padded + c), s);
      }
      add(s, sums + j * padded + c);
    }
  }
}

void SumRows(int64_t n, int64_t padded, const float* rows, float* sum) {
  const FloatTag d;
  for (int64_t c = 0; c < padded; c += static_cast<int64_t>(hn::Lanes(d))) {
    auto s = hn::Zero(d);
    for (int64_t i = 0; i < n; ++i) s = hn::Add(s, hn::Load(d, rows + i * padded + c));
    hn::Store(hn::Add(hn::Load(d, sum + c), s), d, sum + c);
  }
}

// The last K - 1 rows of a buffer [K - 1 + n, padded] become its first.
void KeepPast(int64_t past, int64_t n, int64_t padded, float* rows) {
  std::memmove(rows, rows + n * padded, static_cast<size_t>(past * padded) * sizeof(float));
}

void Conv1dForwardSlice(const Conv1dArgs& args, const Conv1dOutputs& outputs, int64_t index) {
  const Slice slice(args, index);
  const int64_t past = slice.past(), padded = slice.padded();
  const int64_t chunk = std::min(kChunk, std::max<int64_t>(slice.length(), 1));
  const size_t floats = static_cast<size_t>((args.width + 1 + (past + chunk) + chunk) * padded);
  Scratch scratch(Scratch::Rounded(floats));
  float* taps = scratch.Take(floats);
  float* bias = taps + args.width * padded;
  float* rows = bias + padded;
  float* out = rows + (past + chunk) * padded;

  slice.LoadWeights(/*reversed=*/false, taps);
  std::fill(bias, bias + padded, 0.0f);
  if (args.bias != nullptr) std::copy_n(args.bias + slice.channel(), slice.count(), bias);
  if (slice.length() > 0) {
    for (int64_t e = 0; e < past; ++e) slice.LoadExtended(e, rows + e * padded);
  }
  for (int64_t begin = 0; begin < slice.length(); begin += chunk) {
    const int64_t n = std::min(chunk, slice.length() - begin);
    for (int64_t i = 0; i < n; ++i) slice.LoadExtended(past + begin + i, rows + (past + i) * padded);
    Correlate(args.width, n, padded, taps, rows, bias, out);
    for (int64_t i = 0; i < n; ++i) slice.Store(out + i * padded, outputs.out, begin + i);
    KeepPast(past, n, padded, rows);
  }

  if (outputs.final_state == nullptr) return;
  if (slice.length() > 0) {  // the buffer's past now is the extended sequence's end
    for (int64_t r = 0; r < past; ++r) {
      std::copy_n(rows + r * padded, slice.count(), slice.StateRow(outputs.final_state, r));
    }
    return;
  }
  for (int64_t r = 0; r < past; ++r) {
    slice.LoadExtended(r, out);
    std::copy_n(out, slice.count(), slice.StateRow(outputs.final_state, r));
  }
}

// Runs along the extended rows e = 0 … T + K - 2, whose gradients are Σ_j w[j] grad_out[e - j]: the gradients of tokens and of
// the initial state alike.
void Conv1dBackwardSlice(const Conv1dArgs& args, const Conv1dGradients& gradients, int64_t index) {
  const Slice slice(args, index);
  const int64_t past = slice.past(), padded = slice.padded();
  const int64_t extended_length = slice.length() + past;
  const int64_t chunk = std::min(kChunk, std::max<int64_t>(extended_length, 1));
  const size_t floats = static_cast<size_t>((2 * args.width + 2 + (past + chunk) + 2 * chunk) * padded);
  Scratch scratch(Scratch::Rounded(floats));
  float* taps = scratch.Take(floats);
  float* tap_sums = taps + args.width * padded;
  float* bias_sum = tap_sums + args.width * padded;
  float* zero = bias_sum + padded;
  float* grad_out = zero + padded;
  float* extended = grad_out + (past + chunk) * padded;
  float* grad_extended = extended + chunk * padded;

  slice.LoadWeights(/*reversed=*/true, taps);
  // Sums, the row of zeros and the outputs before the first one, which don't exist.
  std::fill(tap_sums, grad_out + past * padded, 0.0f);
  for (int64_t begin = 0; begin < extended_length; begin += chunk) {
    const int64_t n = std::min(chunk, extended_length - begin);
    float* grad_chunk = grad_out + past * padded;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t e = begin + i;
      slice.LoadExtended(e, extended + i * padded);
      if (e < slice.length()) {
        slice.Load(gradients.grad_out, e, grad_chunk + i * padded);
      } else {
        std::fill_n(grad_chunk + i * padded, padded, 0.0f);
      }
    }
    Correlate(args.width, n, padded, taps, grad_out, zero, grad_extended);
    CorrelateSums(args.width, n, padded, extended, grad_out, tap_sums);
    SumRows(n, padded, grad_chunk, bias_sum);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t e = begin + i;
      float* row = grad_extended + i * padded;
      if (e >= slice.length()) {
        const float* final_row = slice.StateRow(gradients.grad_final_state, e - slice.length());
        if (final_row != nullptr) {
          for (int64_t c = 0; c < slice.count(); ++c) row[c] += final_row[c];
        }
      }
      if (e < past) {
        float* initial_row = slice.StateRow(gradients.grad_initial_state, e);
        if (initial_row != nullptr) std::copy_n(row, slice.count(), initial_row);
        continue;
      }
      if (!slice.IsReal(e - past)) std::fill_n(row, padded, 0.0f);
      slice.Store(row, gradients.grad_x, e - past);
    }
    KeepPast(past, n, padded, grad_out);
  }

  for (int64_t c = 0; c < slice.count(); ++c) {
    const int64_t channel = slice.sequence() * args.channels + slice.channel() + c;
    float* grad_weight = gradients.grad_weight + channel * args.width;
    for (int64_t j = 0; j < args.width; ++j) grad_weight[j] = tap_sums[(args.width - 1 - j) * padded + c];
    if (gradients.grad_bias != nullptr) gradients.grad_bias[channel] = bias_sum[c];
  }
}

}  // namespace
}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(Conv1dForwardSlice);
HWY_EXPORT(Conv1dBackwardSlice);

int64_t Conv1dSlices(const Conv1dArgs& args) { return ChannelSlices(args.sequences, args.channels); }

void Conv1dForward(const Conv1dArgs& args, const Conv1dOutputs& outputs, int64_t slice) {
  HWY_DYNAMIC_DISPATCH(Conv1dForwardSlice)(args, outputs, slice);
}

void Conv1dBackward(const Conv1dArgs& args, const Conv1dGradients& gradients, int64_t slice) {
  HWY_DYNAMIC_DISPATCH(Conv1dBackwardSlice)(args, gradients, slice);
}

void Conv1dStep(const Conv1dArgs& args, const Conv1dOutputs& outputs, float* state, int64_t slice) {
  // A slice reads all it needs of the old state before it writes the new one, so both may share memory.
  Conv1dArgs step = args;
  step.initial_state = state;
  Conv1dOutputs advanced = outputs;
  advanced.final_state = state;
  Conv1dForward(step, advanced, slice);
}

}  // namespace latte::kernels
#endif
