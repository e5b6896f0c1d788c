// One token of window.h: nothing is worth transposing for a single row, so each key is read where it lies. Included once per SIMD
// target.
#if defined(LATTE_KERNELS_WINDOW_STEP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_WINDOW_STEP_INL_H_
#undef LATTE_KERNELS_WINDOW_STEP_INL_H_
#else
#define LATTE_KERNELS_WINDOW_STEP_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/window_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Writes token t's output to `out`, given the sum of its weighted values [value], which is overwritten, the maximum of its scores
// and the sum of its weights; `lse` is the call's, or null.
template <class D>
HWY_INLINE void StoreOut(D d, const Band& band, const Widths& widths, float* out, float* lse, int64_t t, size_t g,
                         float* sum_values, float max, float sum) {
  // A token that read nothing has weights of zero: its sum of values is zero already.
  ScaleRow(d, sum > 0.0f ? 1.0f / sum : 1.0f, widths.value, sum_values);
  StoreRow(d, DType::kFloat32, sum_values, static_cast<size_t>(band.args.head_dim), out, 0);
  if (lse != nullptr) lse[band.OutRow(t, g)] = sum > 0.0f ? max + std::log(sum) : kMinusInfinity;
}

// Scores of keys [keys.begin, keys.end) by the slice's query heads: head g's lie at scores + g * stride.
template <class D>
HWY_INLINE void StepScores(D d, const Band& band, const Widths& widths, const KeyRows& rows, Span keys, const float* queries,
                           float* spare, float* scores, size_t stride) {
  for (int64_t s = keys.begin; s < keys.end; ++s, ++scores) {
    if (rows.Masked(s)) {
      for (size_t g = 0; g < band.group; ++g) scores[g * stride] = kMinusInfinity;
      continue;
    }
    const float* key = rows.Key(d, s, spare);
    const size_t lanes = hn::Lanes(d);
    for (size_t g = 0; g < band.group; ++g) {
      const float* query = queries + g * widths.key_stride;
      auto even = hn::Zero(d);
      auto odd = hn::Zero(d);
      size_t i = 0;
      for (; i + 2 * lanes <= widths.key; i += 2 * lanes) {
        even = hn::MulAdd(hn::Load(d, query + i), hn::LoadU(d, key + i), even);
        odd = hn::MulAdd(hn::Load(d, query + i + lanes), hn::LoadU(d, key + i + lanes), odd);
      }
      if (i < widths.key) even = hn::MulAdd(hn::Load(d, query + i), hn::LoadU(d, key + i), even);
      scores[g * stride] = hn::ReduceSum(d, hn::Add(even, odd));
    }
  }
}

// sums[g] += the values of keys [keys.begin, keys.end) by their weights, four keys at a time. `spare` is [4, value_stride].
template <class D>
HWY_INLINE void StepValues(D d, const Band& band, const Widths& widths, const KeyRows& rows, Span keys, const float* weights,
                           size_t stride, float* spare, const float* zeros, float* sums) {
  for (int64_t s = keys.begin; s < keys.end; s += 4, weights += 4) {
    const int64_t count = std::min<int64_t>(4, keys.end - s);
    const float* values[4];
    for (int64_t i = 0; i < 4; ++i) {
      const bool real = i < count && !rows.Masked(s + i);
      values[i] = real ? rows.Value(d, s + i, spare + static_cast<size_t>(i) * widths.value_stride) : zeros;
    }
    for (size_t g = 0; g < band.group; ++g) {
      // Behind the last key lie the next span's weights or padding; they meet zeros.
      const float* w = weights + g * stride;
      const auto w0 = hn::Set(d, w[0]);
      const auto w1 = hn::Set(d, count > 1 ? w[1] : 0.0f);
      const auto w2 = hn::Set(d, count > 2 ? w[2] : 0.0f);
      const auto w3 = hn::Set(d, count > 3 ? w[3] : 0.0f);
      float* sum = sums + g * widths.value_stride;
      for (size_t i = 0; i < widths.value; i += hn::Lanes(d)) {
        auto v = hn::MulAdd(w0, hn::LoadU(d, values[0] + i), hn::Load(d, sum + i));
        auto u = hn::Mul(w1, hn::LoadU(d, values[1] + i));
        v = hn::MulAdd(w2, hn::LoadU(d, values[2] + i), v);
        u = hn::MulAdd(w3, hn::LoadU(d, values[3] + i), u);
        hn::Store(hn::Add(v, u), d, sum + i);
      }
    }
  }
}

// The forward pass of a sequence of one token, a decoding step: `out` [group, D], and `lse` is the call's, or null.
HWY_INLINE void WindowStep(const Band& band, float* out, float* lse = nullptr) {
  const hn::ScalableTag<float> d;
  const WindowArgs& args = band.args;
  const Widths widths(d, args);
  const KeyRows window(band, widths, KeyRows::Kind::kWindow);
  const KeyRows sinks(band, widths, KeyRows::Kind::kSinks);
  const int64_t t = band.position;
  const Span near = band.Window(t);
  const Span far = band.FarSinks(t);
  const size_t far_keys = static_cast<size_t>(far.end - far.begin);
  const size_t keys = far_keys + static_cast<size_t>(near.end - near.begin);
  const size_t columns = hwy::RoundUpTo(keys, hn::Lanes(d));

  float *query, *scores, *sums, *spare, *zeros;
  const auto carve = [&](ScratchLayout& layout) {
    query = layout.Take(band.group, widths.key_stride);
    scores = layout.Take(band.group, columns);
    sums = layout.Take(band.group, widths.value_stride);
    spare = layout.Take(4, std::max(widths.key_stride, widths.value_stride));
    zeros = layout.Take(1, widths.value);
  };
  ScratchLayout counted(nullptr);
  carve(counted);
  const WindowScratch memory(counted.used());
  ScratchLayout layout(memory.data());
  carve(layout);
  std::fill_n(sums, band.group * widths.value_stride, 0.0f);
  std::fill_n(zeros, widths.value, 0.0f);

  if (far_keys > 0) {
    LoadQueries(d, band, widths, args.sink_query ? args.sink_query : args.query, t, 1, args.scale, query);
    StepScores(d, band, widths, sinks, far, query, spare, scores, columns);
  }
  LoadQueries(d, band, widths, args.query, t, 1, args.scale, query);
  StepScores(d, band, widths, window, near, query, spare, scores + far_keys, columns);

  float* max_and_sum = query;  // the queries are done with: two floats of each row
  for (size_t g = 0; g < band.group; ++g) {
    float* row = scores + g * columns;
    std::fill(row + keys, row + columns, kMinusInfinity);
    const float max = MaxOfRow(d, row, columns, kMinusInfinity);
    max_and_sum[g * widths.key_stride] = max;
    max_and_sum[g * widths.key_stride + 1] = WeighRow(d, max, columns, row);
  }
  StepValues(d, band, widths, sinks, far, scores, columns, spare, zeros, sums);
  StepValues(d, band, widths, window, near, scores + far_keys, columns, spare, zeros, sums);
  for (size_t g = 0; g < band.group; ++g) {
    StoreOut(d, band, widths, out + static_cast<int64_t>(g) * args.head_dim, lse, t, g, sums + g * widths.value_stride,
             max_and_sum[g * widths.key_stride], max_and_sum[g * widths.key_stride + 1]);
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
