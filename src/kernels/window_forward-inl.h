// The forward pass of a slice of window.h: a block of queries meets the tiles of its band one group at a time: scores, softmax
// with a running maximum, product with the values. Included once per SIMD target.
#if defined(LATTE_KERNELS_WINDOW_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_WINDOW_FORWARD_INL_H_
#undef LATTE_KERNELS_WINDOW_FORWARD_INL_H_
#else
#define LATTE_KERNELS_WINDOW_FORWARD_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "hwy/highway.h"
#include "kernels/window_chunk-inl.h"
#include "kernels/window_step-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// What the slices of a sequence share: arrays that live no longer than a block.
struct WindowWorkspace {
  void Carve(size_t rows, const Widths& widths, bool sink_query, ScratchLayout& layout) {
    query = layout.Take(rows, widths.key_stride);
    this->sink_query = sink_query ? layout.Take(rows, widths.key_stride) : query;
    scores = layout.Take(rows, kScoreStride);
    sum_values = layout.Take(rows, widths.value_stride);
    max = layout.Take(1, rows);
    sum = layout.Take(1, rows);
  }

  static constexpr size_t kGroupColumns = 512;
  static constexpr size_t kScoreStride = RowStride(kGroupColumns);

  float* query = nullptr;       // [rows, key_stride], times the scale
  float* sink_query = nullptr;  // likewise
  float* scores = nullptr;      // [rows, kScoreStride], then weights
  float* sum_values = nullptr;  // [rows, value_stride]
  float* max = nullptr;         // [rows]
  float* sum = nullptr;         // [rows]
  Prefetch prefetch{2};         // of the next block's rows
};

// kPaired: bfloat16 inputs, multiplied as pairs; the weights are rounded to bfloat16, for the values and for their own sum alike,
// so that the output is an average. Scores and sums are float32.
template <bool kPaired>
class WindowForwardSlice {
 public:
  using D = hn::ScalableTag<float>;

  // Without outputs.out, WriteTo comes before the first block.
  WindowForwardSlice(const WindowArgs& args, const WindowOutputs& outputs, int64_t slice)
      : args_(args),
        band_(args, slice),
        out_(outputs.out == nullptr ? nullptr : outputs.out + band_.OutRow(band_.position, 0) * args.head_dim),
        out_first_(band_.position),
        out_stride_(args.heads * args.head_dim),
        lse_(outputs.lse),
        fetch_out_(outputs.out != nullptr),
        widths_(D(), args_),
        scale_(args.scale, kPaired),
        block_tokens_(band_.BlockTokens(band_.behind <= kNarrow ? 16 : 48)),
        window_({band_, widths_, KeyRows::Kind::kWindow}, widths_, std::min(band_.BlockTiles(block_tokens_), kMaxTiles),
                TileRing::Use::kForward, kPaired),
        sinks_({band_, widths_, KeyRows::Kind::kSinks}, widths_, std::min(band_.SinkTiles(), kMaxTiles), TileRing::Use::kForward,
               kPaired) {}
  WindowForwardSlice(const WindowForwardSlice&) = delete;
  WindowForwardSlice& operator=(const WindowForwardSlice&) = delete;

  const Band& band() const { return band_; }
  int64_t block_tokens() const { return static_cast<int64_t>(block_tokens_); }

  void Carve(ScratchLayout& layout) {
    window_.Carve(layout);
    if (band_.sinks > 0) sinks_.Carve(layout);
  }
  void Carve(WindowWorkspace& work, ScratchLayout& layout) const {
    work.Carve(block_tokens_ * band_.group, widths_, band_.sinks > 0 && args_.sink_query, layout);
  }

  // From the next block on token t's output goes to out + (t - first) * group * head_dim, its heads one behind the other, and not
  // to the call's.
  void WriteTo(float* out, int64_t first) {
    out_ = out;
    out_first_ = first;
    out_stride_ = static_cast<int64_t>(band_.group) * args_.head_dim;
    fetch_out_ = false;
  }

  // One block, the queries of up to block_tokens() tokens from t0 on.
  void Block(int64_t t0, WindowWorkspace& work) {
    work_ = &work;
    t0_ = t0;
    tokens_ = TokensAt(t0);
    const size_t rows = tokens_ * band_.group;
    const int64_t last = t0 + static_cast<int64_t>(tokens_) - 1;
    std::fill_n(work.max, rows, kMinusInfinity);
    std::fill_n(work.sum, rows, 0.0f);
    fresh_ = true;
    Queries(args_.query, work.query);
    const Span far = band_.FarSinks(last);
    if (far.begin < far.end) {
      if (args_.sink_query) Queries(args_.sink_query, work.sink_query);
      Score(sinks_, far, work.sink_query, true);
    }
    Score(window_, {band_.Window(t0).begin, band_.Window(last).end}, work.query, false);
    FinishGroup();
    Store();
  }

  // Has the rows fetched that the block at t0 reads and writes; t0 may lie behind the last one.
  void Fetch(int64_t t0, Prefetch& prefetch) const {
    if (t0 >= band_.end) return;
    const size_t tokens = TokensAt(t0);
    const int64_t item = SizeOf(args_.dtype);
    const int64_t keys = t0 + band_.ahead;
    window_.rows().Fetch(keys, std::min(band_.end, keys + static_cast<int64_t>(tokens)), prefetch);
    for (size_t g = 0; g < band_.group; ++g) {
      prefetch.Add(static_cast<const char*>(args_.query.data) + QueryOffset(band_, args_.query, t0, g) * item,
                   args_.query.time_stride * item, static_cast<size_t>(args_.key_dim * item), tokens);
      if (fetch_out_) prefetch.Add(OutOf(t0, g), out_stride_ * 4, static_cast<size_t>(args_.head_dim) * 4, tokens);
    }
  }

 private:
  // Few rows waste little work at the band's slanted edges and keep the scores in the first-level cache; a wide band has small
  // edges, and wants each tile used by many rows.
  static constexpr int64_t kNarrow = 256;
  static constexpr size_t kMaxTiles = 32;      // beyond it, the tiles of a wide band are loaded again by each block
  static constexpr size_t kGroupSegments = 8;  // fewer than kMaxTiles: a group's tiles are all in their slots
  static constexpr size_t kScoreStride = WindowWorkspace::kScoreStride;

  struct Scored {
    const Tile* tile;
    Segment segment;
    size_t offset;  // of segment.column among the group's columns
    bool ragged;    // some token of the block doesn't read all of it
  };

  using Product = std::conditional_t<kPaired, Pairs, Floats>;
  static constexpr size_t kElements = kPaired ? 2 : 1;  // of a row that lie in the place of a float

  void Queries(const View& view, float* rows) {
    LoadQueries(d_, band_, widths_, view, t0_, tokens_, scale_.query, rows);
    if constexpr (kPaired) {
      for (size_t r = 0; r < tokens_ * band_.group; ++r) {
        PairColumns(d_, rows + r * widths_.key_stride, widths_.key, rows + r * widths_.key_stride);
      }
    }
  }

  float* OutOf(int64_t t, size_t g) const {
    return out_ + (t - out_first_) * out_stride_ + static_cast<int64_t>(g) * args_.head_dim;
  }
  size_t TokensAt(int64_t t0) const { return static_cast<size_t>(std::min(block_tokens(), band_.end - t0)); }

  void Score(TileRing& ring, Span keys, const float* query, bool far) {
    for (int64_t k = ring.TileOf(keys.begin); k <= ring.TileOf(keys.end - 1); ++k) {
      const Segment segment(d_, ring, k, keys, far);
      if (group_.size() == kGroupSegments || columns_ + segment.columns > WindowWorkspace::kGroupColumns) FinishGroup();
      const Tile& tile = ring.Load(d_, k, segment.end);
      const size_t inner = kPaired ? widths_.key / 2 : static_cast<size_t>(args_.key_dim);
      MatMul<false, Product>(d_, tokens_ * band_.group, segment.columns, inner, Left{query, widths_.key_stride, 1},
                             tile.keys_t + segment.column, kTileStride, work_->scores + columns_, kScoreStride, work_->prefetch);
      const bool ragged = segment.Ragged(band_.Common(t0_, tokens_, far));
      group_.push_back({&tile, segment, columns_, ragged});
      columns_ += segment.columns;
    }
  }

  // Turns the group's scores into weights and adds the weighted values. Each pass is over all rows, so that none waits for the
  // end of the one before.
  void FinishGroup() {
    const size_t rows = tokens_ * band_.group;
    for (size_t r = 0; r < rows; ++r) FinishScores(t0_ + static_cast<int64_t>(r / band_.group), r);
    for (size_t r = 0; r < rows; ++r) {
      float* row = work_->scores + r * kScoreStride;
      work_->sum[r] += WeighRow<kPaired>(d_, work_->max[r], columns_, row);
      if constexpr (kPaired) PairColumns(d_, row, columns_, row);
    }
    // Few rows at a time read little more than what each of them has weights for.
    const bool ragged = std::any_of(group_.begin(), group_.end(), [](const Scored& scored) { return scored.ragged; });
    size_t strips = ragged ? CeilDiv(rows, kBlockRows) : 1;
    for (size_t r = 0; r < rows; --strips) {
      const size_t count = CeilDiv(rows - r, strips);
      AddValues(r, count);
      r += count;
    }
    fresh_ = false;
    group_.clear();
    columns_ = 0;
  }

  // Adds the group's values to the rows [first, first + count), by their weights.
  void AddValues(size_t first, size_t count) {
    const int64_t token = t0_ + static_cast<int64_t>(first / band_.group);
    const int64_t last = t0_ + static_cast<int64_t>((first + count - 1) / band_.group);
    const Span near{band_.Window(token).begin, band_.Window(last).end};
    const Span far = band_.FarSinks(last);
    float* sums = work_->sum_values + first * widths_.value_stride;
    bool fresh = fresh_;
    for (const Scored& scored : group_) {
      const Segment& segment = scored.segment;
      const Span read = segment.far ? far : near;
      const size_t from = std::max(segment.begin, static_cast<size_t>(std::max<int64_t>(0, read.begin - segment.origin)));
      const size_t to = std::min(segment.end, static_cast<size_t>(std::max<int64_t>(0, read.end - segment.origin)));
      if (from >= to) continue;
      // Of a pair half of which no token reads the weight is zero.
      const size_t begin = from / kElements;
      const size_t end = CeilDiv(to, kElements);
      const Left weights{work_->scores + first * kScoreStride + scored.offset / kElements + (begin - segment.column / kElements),
                         kScoreStride, 1};
      const float* values = scored.tile->values + begin * widths_.value_stride;
      if (fresh) {
        MatMul<false, Product>(d_, count, widths_.value, end - begin, weights, values, widths_.value_stride, sums,
                               widths_.value_stride, work_->prefetch);
      } else {
        MatMul<true, Product>(d_, count, widths_.value, end - begin, weights, values, widths_.value_stride, sums,
                              widths_.value_stride, work_->prefetch);
      }
      fresh = false;
    }
    if (fresh) std::fill_n(sums, count * widths_.value_stride, 0.0f);
  }

  // Masks row r of the scores, which token t reads, and moves its sums to the row's new maximum.
  void FinishScores(int64_t t, size_t r) {
    float* row = work_->scores + r * kScoreStride;
    if (kPaired && scale_.score != 1.0f) ScaleRow(d_, scale_.score, columns_, row);
    for (const Scored& scored : group_) {
      if (scored.ragged)
        MaskRow(d_, scored.segment, scored.segment.far ? band_.FarSinks(t) : band_.Window(t), row + scored.offset);
      if (scored.tile->masked) {
        AddRow(d_, scored.tile->bias + scored.segment.column, scored.segment.columns, row + scored.offset);
      }
    }
    const float old_max = work_->max[r];
    const float new_max = MaxOfRow(d_, row, columns_, old_max);
    if (!fresh_ && new_max != old_max) {
      const float factor = old_max == kMinusInfinity ? 0.0f : std::exp(old_max - new_max);
      work_->sum[r] *= factor;
      ScaleRow(d_, factor, widths_.value, work_->sum_values + r * widths_.value_stride);
    }
    work_->max[r] = new_max;
  }

  void Store() {
    for (size_t c = 0; c < tokens_; ++c) {
      for (size_t g = 0; g < band_.group; ++g) {
        const size_t r = c * band_.group + g;
        const int64_t t = t0_ + static_cast<int64_t>(c);
        StoreOut(d_, band_, widths_, OutOf(t, g), lse_, t, g, work_->sum_values + r * widths_.value_stride, work_->max[r],
                 work_->sum[r]);
      }
    }
  }

  const D d_;
  const WindowArgs& args_;
  const Band band_;
  float* out_;  // of token out_first_
  int64_t out_first_;
  int64_t out_stride_;  // from token to token
  float* const lse_;
  bool fetch_out_;  // out is the call's tensor, not a buffer that stays in the cache
  const Widths widths_;
  const ScoreScale scale_;
  const size_t block_tokens_;
  TileRing window_;
  TileRing sinks_;
  WindowWorkspace* work_ = nullptr;

  int64_t t0_ = 0;
  size_t tokens_ = 0;
  bool fresh_ = true;  // no group of this block is finished yet
  std::vector<Scored> group_;
  size_t columns_ = 0;
};

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
