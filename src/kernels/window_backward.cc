// Backward pass of window.h. A block of queries meets the tiles of its band one by one: the weights are computed again from
// `lse`, and the gradients of a tile's keys and values stay in float32 until the band has left the tile.
#include <cstring>
#include <deque>
#include <type_traits>

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

constexpr int64_t kTurnBlocks = 4;  // blocks of one slice before the next slice's turn

// What the slices of a sequence share: arrays that live no longer than a block.
struct BackwardWorkspace {
  // One of the two queries of a block, [rows, key_stride]: the near one reads the window, the far one the sinks that left it.
  struct Queries {
    float* query;        // times the scale; or pairs of rows, [rows / 2, 2 key_stride]
    float* query_pairs;  // pairs along the key's dimension, [rows, key_stride]; null if not paired
    float* grad;         // without the scale
  };

  void Carve(size_t rows, const Widths& widths, bool sink_query, bool paired, ScratchLayout& layout) {
    rows = hwy::RoundUpTo(rows, 2);
    near = CarveQueries(rows, widths, paired, layout);
    far = sink_query ? CarveQueries(rows, widths, paired, layout) : near;
    if (paired) grad_out_pairs = layout.Take(rows, widths.value_stride);
    if (paired) grad_score_pairs = layout.Take(rows, kTileStride);
    grad_out = layout.Take(rows, widths.value_stride);
    weights = layout.Take(rows, kTileStride);
    grad_scores = layout.Take(rows, kTileStride);
    lse = layout.Take(1, rows);
    delta = layout.Take(1, rows);
    row = layout.Take(1, std::max(widths.key, widths.value));
  }
  static Queries CarveQueries(size_t rows, const Widths& widths, bool paired, ScratchLayout& layout) {
    Queries queries{};
    queries.query = layout.Take(rows, widths.key_stride);
    if (paired) queries.query_pairs = layout.Take(rows, widths.key_stride);
    queries.grad = layout.Take(rows, widths.key_stride);
    return queries;
  }

  Queries near{};
  Queries far{};  // near itself without sink_query
  // Paired, each of the next three becomes pairs of rows once it is complete, [rows / 2, 2 …].
  float* grad_out = nullptr;          // [rows, value_stride]
  float* weights = nullptr;           // [rows, kTileStride], scores first
  float* grad_scores = nullptr;       // [rows, kTileStride], the weights' gradients first
  float* grad_out_pairs = nullptr;    // pairs along the value's dimension, [rows, value_stride]; null if not paired
  float* grad_score_pairs = nullptr;  // pairs of keys, [rows, kTileStride]; null if not paired
  float* lse = nullptr;               // [rows]
  float* delta = nullptr;             // [rows]: Σ grad_out · out
  float* row = nullptr;               // [max(key, value)]
  Prefetch prefetch;                  // of the next block's rows
};

// kPaired: bfloat16 inputs, multiplied as pairs: output gradients, weights and scores' gradients are rounded to bfloat16, sums
// are float32.
template <bool kPaired>
class BackwardSlice {
 public:
  using D = hn::ScalableTag<float>;

  // A key's gradient is a product over the block's rows: more of them than in the forward pass pay for its loads and stores.
  BackwardSlice(const WindowArgs& args, const WindowGradients& gradients, int64_t slice)
      : args_(args),
        gradients_(gradients),
        band_(args, slice),
        widths_(D(), args),
        scale_(args.scale, kPaired),
        block_tokens_(band_.BlockTokens(48)),
        window_({band_, widths_, KeyRows::Kind::kWindow}, widths_, band_.BlockTiles(block_tokens_), TileRing::Use::kBackward,
                kPaired),
        // Any token may read a sink, so all of them keep their gradients to the end.
        sinks_({band_, widths_, KeyRows::Kind::kSinks}, widths_, band_.SinkTiles(), TileRing::Use::kBackward, kPaired) {}
  BackwardSlice(const BackwardSlice&) = delete;
  BackwardSlice& operator=(const BackwardSlice&) = delete;

  const Band& band() const { return band_; }
  int64_t block_tokens() const { return static_cast<int64_t>(block_tokens_); }

  void Carve(ScratchLayout& layout) {
    window_.Carve(layout);
    if (band_.sinks > 0) sinks_.Carve(layout);
  }
  void Carve(BackwardWorkspace& work, ScratchLayout& layout) const {
    work.Carve(block_tokens_ * band_.group, widths_, band_.sinks > 0 && args_.sink_query, kPaired, layout);
  }

  // Before the first block; all there is to do for an empty sequence, which needs no scratch memory.
  void Start() {
    ZeroUnreadPast();
    if (band_.sequence.length == 0) return;
    for (Tile& tile : sinks_.tiles()) ZeroGradients(tile);
  }

  // The queries of up to block_tokens() tokens from t0 on.
  void Block(int64_t t0, BackwardWorkspace& work) {
    work_ = &work;
    t0_ = t0;
    tokens_ = TokensAt(t0);
    rows_ = tokens_ * band_.group;
    const int64_t last = t0 + static_cast<int64_t>(tokens_) - 1;
    LoadRows();
    const Span far = band_.FarSinks(last);
    const bool far_query = work.far.query != work.near.query;
    if (far_query) std::memset(work.far.grad, 0, rows_ * widths_.key_stride * sizeof(float));
    if (far.begin < far.end) {
      if (far_query) LoadQueryRows(args_.sink_query, work.far);
      for (int64_t k = 0; k <= sinks_.TileOf(far.end - 1); ++k) {
        const Segment segment(d_, sinks_, k, far, true);
        Differentiate(sinks_.Load(d_, k, segment.end), segment, work.far);
      }
    }
    const Span keys{band_.Window(t0).begin, band_.Window(last).end};
    for (int64_t k = window_.TileOf(keys.begin); k <= window_.TileOf(keys.end - 1); ++k) {
      Tile& tile = window_.Slot(k);
      if (tile.index != k) {
        if (tile.index >= 0) FinishWindowTile(tile);
        ZeroGradients(tile);
      }
      const Segment segment(d_, window_, k, keys, false);
      Differentiate(window_.Load(d_, k, segment.end), segment, work.near);
    }
    StoreQueryGradients(gradients_.grad_query, work.near.grad);
    if (gradients_.grad_sink_query) StoreQueryGradients(gradients_.grad_sink_query, far_query ? work.far.grad : nullptr);
  }

  // After the last block.
  void Finish() {
    for (int64_t k = 0; k < static_cast<int64_t>(band_.WindowTiles()); ++k) {
      if (window_.Slot(k).index == k) FinishWindowTile(window_.Slot(k));
    }
    for (int64_t s = 0; s < band_.sinks; ++s) FinishSink(s);
  }

  // Has the rows fetched that the block at t0 reads and writes; t0 may lie behind the last one.
  void Fetch(int64_t t0, Prefetch& prefetch) const {
    if (t0 >= band_.end) return;
    const size_t tokens = TokensAt(t0);
    const int64_t keys = t0 + band_.ahead;
    window_.rows().Fetch(keys, std::min(band_.end, keys + static_cast<int64_t>(tokens)), prefetch);
    const auto fetch = [&](const auto& view, int64_t item, int64_t width, size_t g) {
      prefetch.Add(static_cast<const char*>(view.data) + QueryOffset(band_, view, t0, g) * item, view.time_stride * item,
                   static_cast<size_t>(width * item), tokens);
    };
    for (size_t g = 0; g < band_.group; ++g) {
      fetch(args_.query, SizeOf(args_.dtype), args_.key_dim, g);
      fetch(gradients_.grad_query, SizeOf(args_.dtype), args_.key_dim, g);
      fetch(gradients_.grad_out, 4, args_.head_dim, g);
      prefetch.Add(gradients_.out + band_.OutRow(t0, g) * args_.head_dim, args_.heads * args_.head_dim * 4,
                   static_cast<size_t>(args_.head_dim) * 4, tokens);
    }
  }

 private:
  using Queries = BackwardWorkspace::Queries;
  using Product = std::conditional_t<kPaired, Pairs, Floats>;
  static constexpr size_t kElements = kPaired ? 2 : 1;  // in the place of a float

  size_t TokensAt(int64_t t0) const { return static_cast<size_t>(std::min(block_tokens(), band_.end - t0)); }

  void LoadQueryRows(const View& view, const Queries& queries) {
    LoadQueries(d_, band_, widths_, view, t0_, tokens_, scale_.query, queries.query);
    if constexpr (kPaired) PairBoth(queries.query, widths_.key, widths_.key_stride, queries.query_pairs);
  }

  // The block's rows as pairs along their columns, `columns`, and in place as pairs of rows; an odd last one's other is zero.
  void PairBoth(float* rows, size_t width, size_t stride, float* columns) {
    for (size_t r = 0; r < rows_; ++r) PairColumns(d_, rows + r * stride, width, columns + r * stride);
    PairInPlace(rows, width, stride);
  }
  void PairInPlace(float* rows, size_t width, size_t stride) {
    if (rows_ % 2 == 1) std::fill_n(rows + rows_ * stride, width, 0.0f);
    for (size_t r = 0; r < rows_; r += 2) PairRows(d_, rows + r * stride, rows + (r + 1) * stride, width, rows + r * stride);
  }

  // The block's queries, output gradients, and what the softmax's gradient needs of each row.
  void LoadRows() {
    LoadQueryRows(args_.query, work_->near);
    std::memset(work_->near.grad, 0, rows_ * widths_.key_stride * sizeof(float));
    const size_t head_dim = static_cast<size_t>(args_.head_dim);
    for (size_t c = 0; c < tokens_; ++c) {
      const int64_t t = t0_ + static_cast<int64_t>(c);
      for (size_t g = 0; g < band_.group; ++g) {
        const size_t r = c * band_.group + g;
        float* grad = work_->grad_out + r * widths_.value_stride;
        LoadRow(d_, DType::kFloat32, gradients_.grad_out.data, QueryOffset(band_, gradients_.grad_out, t, g), head_dim, grad,
                widths_.value);
        if constexpr (kPaired) RoundToBFloat16(d_, widths_.value, grad);  // before delta: their difference is what counts
        const int64_t out_row = band_.OutRow(t, g);
        LoadRow(d_, DType::kFloat32, gradients_.out, out_row * args_.head_dim, head_dim, work_->row, widths_.value);
        auto delta = hn::Zero(d_);
        for (size_t i = 0; i < widths_.value; i += hn::Lanes(d_)) {
          delta = hn::MulAdd(hn::Load(d_, grad + i), hn::Load(d_, work_->row + i), delta);
        }
        work_->delta[r] = hn::ReduceSum(d_, delta);
        // A row that read nothing has scores of -inf only, which any finite lse turns to weights of zero.
        const float lse = gradients_.lse[out_row];
        work_->lse[r] = lse == kMinusInfinity ? 0.0f : lse;
      }
    }
    if constexpr (kPaired) PairBoth(work_->grad_out, widths_.value, widths_.value_stride, work_->grad_out_pairs);
  }

  // The gradients that a tile's part has in a block.
  void Differentiate(Tile& tile, const Segment& segment, const Queries& queries) {
    const size_t key_dim = kPaired ? widths_.key / 2 : static_cast<size_t>(args_.key_dim);
    const size_t head_dim = kPaired ? widths_.value / 2 : static_cast<size_t>(args_.head_dim);
    const float* query = kPaired ? queries.query_pairs : queries.query;
    const float* grad_out = kPaired ? work_->grad_out_pairs : work_->grad_out;
    MatMul<false, Product>(d_, rows_, segment.columns, key_dim, Left{query, widths_.key_stride, 1}, tile.keys_t + segment.column,
                           kTileStride, work_->weights, kTileStride, work_->prefetch);
    MatMul<false, Product>(d_, rows_, segment.columns, head_dim, Left{grad_out, widths_.value_stride, 1},
                           tile.values_t + segment.column, kTileStride, work_->grad_scores, kTileStride, work_->prefetch);
    const bool ragged = segment.Ragged(band_.Common(t0_, tokens_, segment.far));
    for (size_t c = 0; c < tokens_; ++c) {
      const Span read = segment.far ? band_.FarSinks(t0_ + static_cast<int64_t>(c)) : band_.Window(t0_ + static_cast<int64_t>(c));
      for (size_t g = 0; g < band_.group; ++g) {
        const size_t r = c * band_.group + g;
        if (kPaired && scale_.score != 1.0f) ScaleRow(d_, scale_.score, segment.columns, work_->weights + r * kTileStride);
        if (ragged) MaskRow(d_, segment, read, work_->weights + r * kTileStride);
        if (tile.masked) AddRow(d_, tile.bias + segment.column, segment.columns, work_->weights + r * kTileStride);
        SoftmaxGradient(r, segment.columns);
      }
    }
    const size_t keys = segment.end - segment.begin;
    const size_t skipped = segment.begin - segment.column;
    // A column of weights, over rows or pairs of them, by the rows that read that key.
    const size_t rows = (rows_ + kElements - 1) / kElements;
    const float* grad_scores = work_->grad_scores;
    if constexpr (kPaired) {
      PairInPlace(work_->weights, segment.columns, kTileStride);
      PairBoth(work_->grad_scores, segment.columns, kTileStride, work_->grad_score_pairs);
      grad_scores = work_->grad_score_pairs;
    }
    MatMul<true, Product>(d_, keys, widths_.value, rows, Left{work_->weights + skipped, 1, kElements * kTileStride},
                          work_->grad_out, kElements * widths_.value_stride,
                          tile.grad_values + segment.begin * widths_.value_stride, widths_.value_stride, work_->prefetch);
    MatMul<true, Product>(d_, keys, widths_.key, rows, Left{work_->grad_scores + skipped, 1, kElements * kTileStride},
                          queries.query, kElements * widths_.key_stride, tile.grad_keys + segment.begin * widths_.key_stride,
                          widths_.key_stride, work_->prefetch);
    // Of a pair half of which no token reads the gradient is zero.
    const size_t begin = segment.begin / kElements, end = (segment.end + kElements - 1) / kElements;
    MatMul<true, Product>(
        d_, rows_, widths_.key, end - begin, Left{grad_scores + (begin - segment.column / kElements), kTileStride, 1},
        tile.keys + begin * widths_.key_stride, widths_.key_stride, queries.grad, widths_.key_stride, work_->prefetch);
  }

  // Scores to weights, and the weights' gradients to the scores'.
  void SoftmaxGradient(size_t r, size_t columns) {
    float* weights = work_->weights + r * kTileStride;
    float* grads = work_->grad_scores + r * kTileStride;
    const auto lse = hn::Set(d_, work_->lse[r]);
    const auto delta = hn::Set(d_, work_->delta[r]);
    const auto scale = hn::Set(d_, scale_.score);
    for (size_t i = 0; i < columns; i += hn::Lanes(d_)) {
      const auto weight = Exp(d_, hn::Sub(hn::Load(d_, weights + i), lse));
      hn::Store(weight, d_, weights + i);
      hn::Store(hn::Mul(hn::Mul(weight, scale), hn::Sub(hn::Load(d_, grads + i), delta)), d_, grads + i);
    }
  }

  void ZeroGradients(Tile& tile) const {
    std::memset(tile.grad_keys, 0, kTileKeys * widths_.key_stride * sizeof(float));
    std::memset(tile.grad_values, 0, kTileKeys * widths_.value_stride * sizeof(float));
  }

  // Stores a block's gradients of queries, or zeros.
  void StoreQueryGradients(const MutableView& view, float* grads) {
    if (grads == nullptr) std::fill_n(work_->row, widths_.key, 0.0f);
    for (size_t c = 0; c < tokens_; ++c) {
      for (size_t g = 0; g < band_.group; ++g) {
        float* row = grads == nullptr ? work_->row : grads + (c * band_.group + g) * widths_.key_stride;
        if (grads != nullptr) ScaleRow(d_, scale_.query, widths_.key, row);
        StoreRow(d_, args_.dtype, row, static_cast<size_t>(args_.key_dim), view.data,
                 QueryOffset(band_, view, t0_ + static_cast<int64_t>(c), g));
      }
    }
  }

  // Stores the gradients of a tile that no later token reads. Those of this call's own sinks wait for the sinks' readers.
  void FinishWindowTile(const Tile& tile) {
    const size_t keys = window_.Keys(tile.index);
    for (size_t i = 0; i < keys; ++i) {
      const int64_t s = window_.Origin(tile.index) + static_cast<int64_t>(i);
      const float* grad_key = tile.grad_keys + i * widths_.key_stride;
      const float* grad_value = tile.grad_values + i * widths_.value_stride;
      if (s < band_.position) {
        const int64_t row = args_.past - (band_.position - s);
        StoreKey(gradients_.grad_past_key, gradients_.grad_past_values, band_.index, row, grad_key, grad_value);
      } else if (s < band_.sinks) {
        const Tile& sink = sinks_.Slot(sinks_.TileOf(s));
        const size_t sink_row = static_cast<size_t>(s) % kTileKeys;
        AddRow(d_, grad_key, widths_.key, sink.grad_keys + sink_row * widths_.key_stride);
        AddRow(d_, grad_value, widths_.value, sink.grad_values + sink_row * widths_.value_stride);
      } else {
        StoreKey(gradients_.grad_key, gradients_.grad_values, band_.sequence.batch, band_.Row(s), grad_key, grad_value);
      }
    }
  }

  void FinishSink(int64_t s) {
    const Tile& sink = sinks_.Slot(sinks_.TileOf(s));
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
  const ScoreScale scale_;
  const size_t block_tokens_;
  TileRing window_;
  TileRing sinks_;
  BackwardWorkspace* work_ = nullptr;

  int64_t t0_ = 0;
  size_t tokens_ = 0;
  size_t rows_ = 0;
};

// The slices [first, last) of one sequence, in turns, as in the forward pass.
template <bool kPaired>
void BackwardSequence(const WindowArgs& args, const WindowGradients& gradients, int64_t first, int64_t last) {
  std::deque<BackwardSlice<kPaired>> slices;
  for (int64_t slice = first; slice < last; ++slice) slices.emplace_back(args, gradients, slice);
  if (slices.front().band().sequence.length == 0) {
    for (auto& slice : slices) slice.Start();
    return;
  }
  BackwardWorkspace work;
  const auto carve = [&](ScratchLayout& layout) {
    for (auto& slice : slices) slice.Carve(layout);
    slices.front().Carve(work, layout);
  };
  ScratchLayout counted(nullptr);
  carve(counted);
  if (counted.used() > WindowScratch::kKeptFloats && last - first > 1) {  // too much for a thread to keep: fewer at a time
    const int64_t middle = first + (last - first) / 2;
    BackwardSequence<kPaired>(args, gradients, first, middle);
    BackwardSequence<kPaired>(args, gradients, middle, last);
    return;
  }
  const WindowScratch memory(counted.used());
  ScratchLayout layout(memory.data());
  carve(layout);
  for (auto& slice : slices) slice.Start();
  RunInTurns(slices, kTurnBlocks, work);
  for (auto& slice : slices) slice.Finish();
}

void WindowBackwardSlices(const WindowArgs& args, const WindowGradients& gradients, int64_t first, int64_t last) {
  while (first < last) {
    const int64_t end = std::min(last, (first / args.kv_heads + 1) * args.kv_heads);
    if (kHasPairs && args.dtype == DType::kBFloat16) {
      BackwardSequence<kHasPairs>(args, gradients, first, end);
    } else {
      BackwardSequence<false>(args, gradients, first, end);
    }
    first = end;
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(WindowBackwardSlices);

void WindowBackward(const WindowArgs& args, const WindowGradients& gradients, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(WindowBackwardSlices)(args, gradients, first, last);
}

}  // namespace latte::kernels
#endif
