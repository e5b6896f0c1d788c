// Backward pass of window.h. A block of queries meets the tiles of its band one by one: the weights are computed again from
// `lse`, and the gradients of a tile's keys and values stay in float32 until the band has left the tile.
#include <cstring>

#include "kernels/window.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/window_backward.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include "hwy/highway.h"
#include "kernels/window_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

class BackwardSlice {
 public:
  using D = hn::ScalableTag<float>;

  BackwardSlice(const WindowArgs& args, const WindowGradients& gradients, int64_t slice)
      : args_(args), gradients_(gradients), band_(args, slice), widths_(D(), args) {}

  void Run() {
    ZeroUnreadPast();
    if (band_.sequence.length == 0) return;
    // A key's gradient is a product over the block's rows: more of them than in the forward pass pay for its loads and stores.
    const size_t tokens = band_.BlockTokens(48);
    rows_ = tokens * band_.group;
    TileRing window({band_, widths_, KeyRows::Kind::kWindow}, widths_, band_.BlockTiles(tokens), true);
    // Any token may read a sink, so all of them keep their gradients to the end.
    TileRing sinks({band_, widths_, KeyRows::Kind::kSinks}, widths_, band_.SinkTiles(), true);
    const auto carve = [&](ScratchLayout& layout) {
      window.Carve(layout);
      if (band_.sinks > 0) sinks.Carve(layout);
      const bool far = band_.sinks > 0 && args_.sink_query;
      near_.query = layout.Take(rows_, widths_.key_stride);
      near_.grad = layout.Take(rows_, widths_.key_stride);
      far_ = near_;
      if (far) far_.query = layout.Take(rows_, widths_.key_stride);
      if (far) far_.grad = layout.Take(rows_, widths_.key_stride);
      grad_out_ = layout.Take(rows_, widths_.value_stride);
      weights_ = layout.Take(rows_, kTileStride);
      grad_scores_ = layout.Take(rows_, kTileStride);
      lse_ = layout.Take(1, rows_);
      delta_ = layout.Take(1, rows_);
      row_ = layout.Take(1, std::max(widths_.key, widths_.value));
    };
    ScratchLayout counted(nullptr);
    carve(counted);
    const WindowScratch memory(counted.used());
    ScratchLayout layout(memory.data());
    carve(layout);
    for (Tile& tile : sinks.tiles()) ZeroGradients(tile);

    for (int64_t t = band_.position; t < band_.end; t += static_cast<int64_t>(tokens)) {
      Block(window, sinks, t, static_cast<size_t>(std::min<int64_t>(static_cast<int64_t>(tokens), band_.end - t)));
    }
    for (int64_t k = 0; k < static_cast<int64_t>(band_.WindowTiles()); ++k) {
      if (window.Slot(k).index == k) FinishWindowTile(window, sinks, window.Slot(k));
    }
    for (int64_t s = 0; s < band_.sinks; ++s) FinishSink(sinks, s);
  }

 private:
  // One of the two queries of a block, [rows, key_stride]: the near one reads the window, the far one the sinks that left it.
  struct Queries {
    float* query;  // times the scale
    float* grad;   // without it
  };

  void Block(TileRing& window, TileRing& sinks, int64_t t0, size_t tokens) {
    t0_ = t0;
    tokens_ = tokens;
    rows_ = tokens * band_.group;
    const int64_t last = t0 + static_cast<int64_t>(tokens) - 1;
    LoadRows();
    const Span far = band_.FarSinks(last);
    const bool far_query = far_.query != near_.query;
    if (far_query) std::memset(far_.grad, 0, rows_ * widths_.key_stride * sizeof(float));
    if (far.begin < far.end) {
      if (far_query) LoadQueries(d_, band_, widths_, args_.sink_query, t0, tokens, far_.query);
      for (int64_t k = 0; k <= sinks.TileOf(far.end - 1); ++k) {
        const Segment segment(d_, sinks, k, far, true);
        Differentiate(sinks.Load(d_, k, segment.end), segment, far_, nullptr);
      }
    }
    const Span keys{band_.Window(t0).begin, band_.Window(last).end};
    for (int64_t k = window.TileOf(keys.begin); k <= window.TileOf(keys.end - 1); ++k) {
      Tile& tile = window.Slot(k);
      if (tile.index != k) {
        if (tile.index >= 0) FinishWindowTile(window, sinks, tile);
        ZeroGradients(tile);
      }
      const Segment segment(d_, window, k, keys, false);
      const bool last_tile = k == window.TileOf(keys.end - 1);
      Differentiate(window.Load(d_, k, segment.end), segment, near_, last_tile ? &window.rows() : nullptr);
    }
    StoreQueryGradients(gradients_.grad_query, near_.grad);
    if (gradients_.grad_sink_query) StoreQueryGradients(gradients_.grad_sink_query, far_query ? far_.grad : nullptr);
  }

  // The block's queries, output gradients, and what the softmax's gradient needs of each row.
  void LoadRows() {
    LoadQueries(d_, band_, widths_, args_.query, t0_, tokens_, near_.query);
    std::memset(near_.grad, 0, rows_ * widths_.key_stride * sizeof(float));
    const size_t head_dim = static_cast<size_t>(args_.head_dim);
    for (size_t c = 0; c < tokens_; ++c) {
      const int64_t t = t0_ + static_cast<int64_t>(c);
      for (size_t g = 0; g < band_.group; ++g) {
        const size_t r = c * band_.group + g;
        float* grad = grad_out_ + r * widths_.value_stride;
        LoadRow(d_, DType::kFloat32, gradients_.grad_out.data, QueryOffset(band_, gradients_.grad_out, t, g), head_dim, grad,
                widths_.value);
        const int64_t out_row = band_.OutRow(t, g);
        LoadRow(d_, DType::kFloat32, gradients_.out, out_row * args_.head_dim, head_dim, row_, widths_.value);
        auto delta = hn::Zero(d_);
        for (size_t i = 0; i < widths_.value; i += hn::Lanes(d_)) {
          delta = hn::MulAdd(hn::Load(d_, grad + i), hn::Load(d_, row_ + i), delta);
        }
        delta_[r] = hn::ReduceSum(d_, delta);
        // A row that read nothing has scores of -inf only, which any finite lse turns to weights of zero.
        const float lse = gradients_.lse[out_row];
        lse_[r] = lse == kMinusInfinity ? 0.0f : lse;
      }
    }
  }

  // Asks for what the next block reads of token t's successor.
  void Prefetch(const KeyRows& keys, int64_t t) const {
    const int64_t next = t + static_cast<int64_t>(tokens_);
    keys.Prefetch(next + band_.ahead);
    if (next >= band_.end) return;
    const int64_t item = SizeOf(args_.dtype);
    const size_t value_bytes = static_cast<size_t>(args_.head_dim) * sizeof(float);
    for (size_t g = 0; g < band_.group; ++g) {
      PrefetchRow(static_cast<const char*>(args_.query.data) + QueryOffset(band_, args_.query, next, g) * item,
                  static_cast<size_t>(args_.key_dim * item));
      PrefetchRow(static_cast<const float*>(gradients_.grad_out.data) + QueryOffset(band_, gradients_.grad_out, next, g),
                  value_bytes);
      PrefetchRow(gradients_.out + band_.OutRow(next, g) * args_.head_dim, value_bytes);
    }
  }

  // The gradients that a tile's part has in a block. `next`: keys to ask for on the way, or null.
  void Differentiate(Tile& tile, const Segment& segment, const Queries& queries, const KeyRows* next) {
    const size_t key_dim = static_cast<size_t>(args_.key_dim);
    const size_t head_dim = static_cast<size_t>(args_.head_dim);
    MatMul<false>(d_, rows_, segment.columns, key_dim, Left{queries.query, widths_.key_stride, 1}, tile.keys_t + segment.column,
                  kTileStride, weights_, kTileStride);
    MatMul<false>(d_, rows_, segment.columns, head_dim, Left{grad_out_, widths_.value_stride, 1}, tile.values_t + segment.column,
                  kTileStride, grad_scores_, kTileStride);
    const bool ragged = segment.Ragged(band_.Common(t0_, tokens_, segment.far));
    for (size_t c = 0; c < tokens_; ++c) {
      if (next != nullptr) Prefetch(*next, t0_ + static_cast<int64_t>(c));
      const Span read = segment.far ? band_.FarSinks(t0_ + static_cast<int64_t>(c)) : band_.Window(t0_ + static_cast<int64_t>(c));
      for (size_t g = 0; g < band_.group; ++g) {
        const size_t r = c * band_.group + g;
        if (ragged) MaskRow(segment, read, weights_ + r * kTileStride);
        if (tile.masked) AddRow(d_, tile.bias + segment.column, segment.columns, weights_ + r * kTileStride);
        SoftmaxGradient(r, segment.columns);
      }
    }
    const size_t keys = segment.end - segment.begin;
    const size_t skipped = segment.begin - segment.column;
    MatMul<true>(d_, keys, widths_.value, rows_, Left{weights_ + skipped, 1, kTileStride}, grad_out_, widths_.value_stride,
                 tile.grad_values + segment.begin * widths_.value_stride, widths_.value_stride);
    MatMul<true>(d_, keys, widths_.key, rows_, Left{grad_scores_ + skipped, 1, kTileStride}, queries.query, widths_.key_stride,
                 tile.grad_keys + segment.begin * widths_.key_stride, widths_.key_stride);
    MatMul<true>(d_, rows_, widths_.key, keys, Left{grad_scores_ + skipped, kTileStride, 1},
                 tile.keys + segment.begin * widths_.key_stride, widths_.key_stride, queries.grad, widths_.key_stride);
  }

  // Scores to weights, and the weights' gradients to the scores'.
  void SoftmaxGradient(size_t r, size_t columns) {
    float* weights = weights_ + r * kTileStride;
    float* grads = grad_scores_ + r * kTileStride;
    const auto lse = hn::Set(d_, lse_[r]);
    const auto delta = hn::Set(d_, delta_[r]);
    for (size_t i = 0; i < columns; i += hn::Lanes(d_)) {
      const auto weight = Exp(d_, hn::Sub(hn::Load(d_, weights + i), lse));
      hn::Store(weight, d_, weights + i);
      hn::Store(hn::Mul(weight, hn::Sub(hn::Load(d_, grads + i), delta)), d_, grads + i);
    }
  }

  void ZeroGradients(Tile& tile) const {
    std::memset(tile.grad_keys, 0, kTileKeys * widths_.key_stride * sizeof(float));
    std::memset(tile.grad_values, 0, kTileKeys * widths_.value_stride * sizeof(float));
  }

  // Stores a block's gradients of queries, or zeros.
  void StoreQueryGradients(const MutableView& view, float* grads) {
    if (grads == nullptr) std::fill_n(row_, widths_.key, 0.0f);
    for (size_t c = 0; c < tokens_; ++c) {
      for (size_t g = 0; g < band_.group; ++g) {
        float* row = grads == nullptr ? row_ : grads + (c * band_.group + g) * widths_.key_stride;
        if (grads != nullptr) ScaleRow(d_, args_.scale, widths_.key, row);
        StoreRow(d_, args_.dtype, row, static_cast<size_t>(args_.key_dim), view.data,
                 QueryOffset(band_, view, t0_ + static_cast<int64_t>(c), g));
      }
    }
  }

  // Stores the gradients of a tile that no later token reads. Those of this call's own sinks wait for the sinks' readers.
  void FinishWindowTile(TileRing& window, TileRing& sinks, const Tile& tile) {
    const size_t keys = window.Keys(tile.index);
    for (size_t i = 0; i < keys; ++i) {
      const int64_t s = window.Origin(tile.index) + static_cast<int64_t>(i);
      const float* grad_key = tile.grad_keys + i * widths_.key_stride;
      const float* grad_value = tile.grad_values + i * widths_.value_stride;
      if (s < band_.position) {
        const int64_t row = args_.past - (band_.position - s);
        StoreKey(gradients_.grad_past_key, gradients_.grad_past_values, band_.index, row, grad_key, grad_value);
      } else if (s < band_.sinks) {
        const Tile& sink = sinks.Slot(sinks.TileOf(s));
        const size_t sink_row = static_cast<size_t>(s) % kTileKeys;
        AddRow(d_, grad_key, widths_.key, sink.grad_keys + sink_row * widths_.key_stride);
        AddRow(d_, grad_value, widths_.value, sink.grad_values + sink_row * widths_.value_stride);
      } else {
        StoreKey(gradients_.grad_key, gradients_.grad_values, band_.sequence.batch, band_.Row(s), grad_key, grad_value);
      }
    }
  }

  void FinishSink(TileRing& sinks, int64_t s) {
    const Tile& sink = sinks.Slot(sinks.TileOf(s));
    const float* grad_key = sink.grad_keys + static_cast<size_t>(s) % kTileKeys * widths_.key_stride;
    const float* grad_value = sink.grad_values + static_cast<size_t>(s) % kTileKeys * widths_.value_stride;
    if (s < band_.position) {
      StoreKey(gradients_.grad_sink_key, gradients_.grad_sink_values, band_.index, s, grad_key, grad_value);
    } else {
      StoreKey(gradients_.grad_key, gradients_.grad_values, band_.sequence.batch, band_.Row(s), grad_key, grad_value);
    }
  }

  // Views may be absent: a call whose past needs no gradient.
  void StoreKey(const MutableView& key, const MutableView& values, int64_t batch, int64_t time, const float* grad_key,
                const float* grad_value) {
    if (key) {
      StoreRow(d_, args_.dtype, grad_key, static_cast<size_t>(args_.key_dim), key.data,
               batch * key.batch_stride + time * key.time_stride + band_.kv_head * key.head_stride);
    }
    if (values) {
      StoreRow(d_, args_.dtype, grad_value, static_cast<size_t>(args_.head_dim), values.data,
               batch * values.batch_stride + time * values.time_stride + band_.kv_head * values.head_stride);
    }
  }

  // Gradients of rows of the past and of sinks that no token of this call reads.
  void ZeroUnreadPast() {
    const int64_t read = band_.sequence.length == 0 ? 0 : band_.position - band_.first;
    const int64_t sinks = band_.sequence.length == 0 ? 0 : std::min(band_.sinks, band_.position);
    ZeroRows(gradients_.grad_past_key, 0, args_.past - read, args_.key_dim);
    ZeroRows(gradients_.grad_past_values, 0, args_.past - read, args_.head_dim);
    ZeroRows(gradients_.grad_sink_key, sinks, args_.sinks, args_.key_dim);
    ZeroRows(gradients_.grad_sink_values, sinks, args_.sinks, args_.head_dim);
  }

  void ZeroRows(const MutableView& view, int64_t begin, int64_t end, int64_t width) {
    if (!view) return;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = band_.index * view.batch_stride + row * view.time_stride + band_.kv_head * view.head_stride;
      std::memset(static_cast<char*>(view.data) + offset * SizeOf(args_.dtype), 0,
                  static_cast<size_t>(width * SizeOf(args_.dtype)));
    }
  }

  const D d_;
  const WindowArgs& args_;
  const WindowGradients& gradients_;
  const Band band_;
  const Widths widths_;

  Queries near_{};
  Queries far_{};                 // near_ itself without sink_query
  float* grad_out_ = nullptr;     // [rows, value_stride]
  float* weights_ = nullptr;      // [rows, kTileStride], scores first
  float* grad_scores_ = nullptr;  // [rows, kTileStride], the weights' gradients first
  float* lse_ = nullptr;          // [rows]
  float* delta_ = nullptr;        // [rows]: Σ grad_out · out
  float* row_ = nullptr;          // [max(key, value)]

  int64_t t0_ = 0;
  size_t tokens_ = 0;
  size_t rows_ = 0;
};

void WindowBackwardSlice(const WindowArgs& args, const WindowGradients& gradients, int64_t slice) {
  BackwardSlice(args, gradients, slice).Run();
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(WindowBackwardSlice);

void WindowBackward(const WindowArgs& args, const WindowGradients& gradients, int64_t slice) {
  HWY_DYNAMIC_DISPATCH(WindowBackwardSlice)(args, gradients, slice);
}

}  // namespace latte::kernels
#endif
