// Forward pass of window.h. A block of queries meets the tiles of its band one group at a time: scores, softmax with a running
// maximum, product with the values.
#include "kernels/window.h"

#include <cmath>
#include <deque>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/window.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include "hwy/highway.h"
#include "kernels/window_chunk-inl.h"
#include "kernels/window_step-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kTurnBlocks = 16;  // blocks of one slice before the next slice's turn

// What the slices of a sequence share: arrays that live no longer than a block.
struct Workspace {
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
  Prefetch prefetch;            // of the next block's rows
};

// kPaired: bfloat16 inputs, multiplied as pairs; the weights are rounded to bfloat16, for the values and for their own sum alike,
// so that the output is an average. Scores and sums are float32.
template <bool kPaired>
class ForwardSlice {
 public:
  using D = hn::ScalableTag<float>;

  ForwardSlice(const WindowArgs& args, const WindowOutputs& outputs, int64_t slice)
      : args_(args),
        outputs_(outputs),
        band_(args, slice),
        widths_(D(), args_),
        scale_(args.scale, kPaired),
        block_tokens_(band_.BlockTokens(band_.behind <= kNarrow ? 12 : 48)),
        window_({band_, widths_, KeyRows::Kind::kWindow}, widths_, std::min(band_.BlockTiles(block_tokens_), kMaxTiles),
                TileRing::Use::kForward, kPaired),
        sinks_({band_, widths_, KeyRows::Kind::kSinks}, widths_, std::min(band_.SinkTiles(), kMaxTiles), TileRing::Use::kForward,
               kPaired) {}
  ForwardSlice(const ForwardSlice&) = delete;
  ForwardSlice& operator=(const ForwardSlice&) = delete;

  const Band& band() const { return band_; }
  int64_t block_tokens() const { return static_cast<int64_t>(block_tokens_); }

  void Carve(ScratchLayout& layout) {
    window_.Carve(layout);
    if (band_.sinks > 0) sinks_.Carve(layout);
  }
  void Carve(Workspace& work, ScratchLayout& layout) const {
    work.Carve(block_tokens_ * band_.group, widths_, band_.sinks > 0 && args_.sink_query, layout);
  }

  // One block, the queries of up to block_tokens() tokens from t0 on.
  void Block(int64_t t0, Workspace& work) {
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
      prefetch.Add(outputs_.out + band_.OutRow(t0, g) * args_.head_dim, args_.heads * args_.head_dim * 4,
                   static_cast<size_t>(args_.head_dim) * 4, tokens);
    }
  }

 private:
  // Few rows waste little work at the band's slanted edges and keep the scores in the first-level cache; a wide band has small
  // edges, and wants each tile used by many rows.
  static constexpr int64_t kNarrow = 256;
  static constexpr size_t kMaxTiles = 32;      // beyond it, the tiles of a wide band are loaded again by each block
  static constexpr size_t kGroupSegments = 8;  // fewer than kMaxTiles: a group's tiles are all in their slots
  static constexpr size_t kScoreStride = Workspace::kScoreStride;

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

  size_t TokensAt(int64_t t0) const { return static_cast<size_t>(std::min(block_tokens(), band_.end - t0)); }

  void Score(TileRing& ring, Span keys, const float* query, bool far) {
    for (int64_t k = ring.TileOf(keys.begin); k <= ring.TileOf(keys.end - 1); ++k) {
      const Segment segment(d_, ring, k, keys, far);
      if (group_.size() == kGroupSegments || columns_ + segment.columns > Workspace::kGroupColumns) FinishGroup();
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
    for (const Scored& scored : group_) {
      const Segment& segment = scored.segment;
      // Of a pair half of which no token reads the weight is zero.
      const size_t begin = segment.begin / kElements;
      const size_t end = (segment.end + kElements - 1) / kElements;
      const Left weights{work_->scores + scored.offset / kElements + (begin - segment.column / kElements), kScoreStride, 1};
      const float* values = scored.tile->values + begin * widths_.value_stride;
      if (fresh_) {
        MatMul<false, Product>(d_, rows, widths_.value, end - begin, weights, values, widths_.value_stride, work_->sum_values,
                               widths_.value_stride, work_->prefetch);
      } else {
        MatMul<true, Product>(d_, rows, widths_.value, end - begin, weights, values, widths_.value_stride, work_->sum_values,
                              widths_.value_stride, work_->prefetch);
      }
      fresh_ = false;
    }
    group_.clear();
    columns_ = 0;
  }

  // Masks row r of the scores, which token t reads, and moves its sums to the row's new maximum.
  void FinishScores(int64_t t, size_t r) {
    float* row = work_->scores + r * kScoreStride;
    if (kPaired && scale_.score != 1.0f) ScaleRow(d_, scale_.score, columns_, row);
    for (const Scored& scored : group_) {
      if (scored.ragged) MaskRow(scored.segment, scored.segment.far ? band_.FarSinks(t) : band_.Window(t), row + scored.offset);
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
        StoreOut(d_, band_, widths_, outputs_, t0_ + static_cast<int64_t>(c), g, work_->sum_values + r * widths_.value_stride,
                 work_->max[r], work_->sum[r]);
      }
    }
  }

  const D d_;
  const WindowArgs& args_;
  const WindowOutputs& outputs_;
  const Band band_;
  const Widths widths_;
  const ScoreScale scale_;
  const size_t block_tokens_;
  TileRing window_;
  TileRing sinks_;
  Workspace* work_ = nullptr;

  int64_t t0_ = 0;
  size_t tokens_ = 0;
  bool fresh_ = true;  // no group of this block is finished yet
  std::vector<Scored> group_;
  size_t columns_ = 0;
};

// The slices [first, last) of one sequence, in turns: their rows share pages and lines, which then are still near.
template <bool kPaired>
void ForwardSequence(const WindowArgs& args, const WindowOutputs& outputs, int64_t first, int64_t last) {
  std::deque<ForwardSlice<kPaired>> slices;
  for (int64_t slice = first; slice < last; ++slice) slices.emplace_back(args, outputs, slice);
  Workspace work;
  const auto carve = [&](ScratchLayout& layout) {
    for (auto& slice : slices) slice.Carve(layout);
    slices.front().Carve(work, layout);
  };
  ScratchLayout counted(nullptr);
  carve(counted);
  if (counted.used() > WindowScratch::kKeptFloats && last - first > 1) {  // too much for a thread to keep: fewer at a time
    const int64_t middle = first + (last - first) / 2;
    ForwardSequence<kPaired>(args, outputs, first, middle);
    ForwardSequence<kPaired>(args, outputs, middle, last);
    return;
  }
  const WindowScratch memory(counted.used());
  ScratchLayout layout(memory.data());
  carve(layout);

  RunInTurns(slices, kTurnBlocks, work);
}

void WindowForwardSlices(const WindowArgs& args, const WindowOutputs& outputs, int64_t first, int64_t last) {
  while (first < last) {
    const Band band(args, first);
    const int64_t end = std::min(last, (band.index + 1) * args.kv_heads);
    if (band.sequence.length > 1) {
      if (kHasPairs && args.dtype == DType::kBFloat16) {
        ForwardSequence<kHasPairs>(args, outputs, first, end);
      } else {
        ForwardSequence<false>(args, outputs, first, end);
      }
    } else if (band.sequence.length == 1) {
      for (int64_t slice = first; slice < end; ++slice) WindowStep(Band(args, slice), outputs);
    }
    first = end;
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(WindowForwardSlices);

int64_t WindowSlices(const WindowArgs& args) { return args.sequences * args.kv_heads; }

void WindowForward(const WindowArgs& args, const WindowOutputs& outputs, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(WindowForwardSlices)(args, outputs, first, last);
}

}  // namespace latte::kernels
#endif
