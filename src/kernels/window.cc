// Forward pass of window.h. A block of queries meets the tiles of its band one group at a time: scores, softmax with a running
// maximum, product with the values.
#include "kernels/window.h"

#include <cmath>

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

class ForwardSlice {
 public:
  using D = hn::ScalableTag<float>;

  ForwardSlice(const Band& band, const WindowOutputs& outputs)
      : args_(band.args),
        outputs_(outputs),
        band_(band),
        widths_(D(), args_),
        block_tokens_(band_.BlockTokens(band_.behind <= kNarrow ? 24 : 48)),
        window_({band_, widths_, KeyRows::Kind::kWindow}, widths_, std::min(band_.BlockTiles(block_tokens_), kMaxTiles), false),
        sinks_({band_, widths_, KeyRows::Kind::kSinks}, widths_, std::min(band_.SinkTiles(), kMaxTiles), false) {}

  void Run() {
    const size_t rows = block_tokens_ * band_.group;
    const auto carve = [&](ScratchLayout& layout) {
      window_.Carve(layout);
      if (band_.sinks > 0) sinks_.Carve(layout);
      query_ = layout.Take(rows, widths_.key_stride);
      sink_query_ = band_.sinks > 0 && args_.sink_query ? layout.Take(rows, widths_.key_stride) : query_;
      scores_ = layout.Take(rows, kScoreStride);
      sum_values_ = layout.Take(rows, widths_.value_stride);
      max_ = layout.Take(1, rows);
      sum_ = layout.Take(1, rows);
    };
    ScratchLayout counted(nullptr);
    carve(counted);
    const WindowScratch memory(counted.used());
    ScratchLayout layout(memory.data());
    carve(layout);

    const int64_t step = static_cast<int64_t>(block_tokens_);
    for (int64_t t = band_.position; t < band_.end; t += step) Block(t, static_cast<size_t>(std::min(step, band_.end - t)));
  }

 private:
  // Few rows waste little work at the band's slanted edges and keep the scores in the first-level cache; a wide band has small
  // edges, and wants each tile used by many rows.
  static constexpr int64_t kNarrow = 256;
  static constexpr size_t kMaxTiles = 32;  // beyond it, the tiles of a wide band are loaded again by each block
  static constexpr size_t kGroupColumns = 512;
  static constexpr size_t kGroupSegments = 8;  // fewer than kMaxTiles: a group's tiles are all in their slots
  static constexpr size_t kScoreStride = RowStride(kGroupColumns);

  struct Scored {
    const Tile* tile;
    Segment segment;
    size_t offset;  // of segment.column among the group's columns
    bool ragged;    // some token of the block doesn't read all of it
  };

  void Block(int64_t t0, size_t tokens) {
    t0_ = t0;
    tokens_ = tokens;
    const size_t rows = tokens * band_.group;
    const int64_t last = t0 + static_cast<int64_t>(tokens) - 1;
    std::fill_n(max_, rows, kMinusInfinity);
    std::fill_n(sum_, rows, 0.0f);
    fresh_ = true;
    LoadQueries(d_, band_, widths_, args_.query, t0, tokens, query_);
    const Span far = band_.FarSinks(last);
    if (far.begin < far.end) {
      if (args_.sink_query) LoadQueries(d_, band_, widths_, args_.sink_query, t0, tokens, sink_query_);
      Score(sinks_, far, sink_query_, true);
    }
    Score(window_, {band_.Window(t0).begin, band_.Window(last).end}, query_, false);
    FinishGroup(true);
    Store();
  }

  void Score(TileRing& ring, Span keys, const float* query, bool far) {
    for (int64_t k = ring.TileOf(keys.begin); k <= ring.TileOf(keys.end - 1); ++k) {
      const Segment segment(d_, ring, k, keys, far);
      if (group_.size() == kGroupSegments || columns_ + segment.columns > kGroupColumns) FinishGroup(false);
      const Tile& tile = ring.Load(d_, k, segment.end);
      MatMul<false>(d_, tokens_ * band_.group, segment.columns, static_cast<size_t>(args_.key_dim),
                    Left{query, widths_.key_stride, 1}, tile.keys_t + segment.column, kTileStride, scores_ + columns_,
                    kScoreStride);
      const bool ragged = segment.Ragged(band_.Common(t0_, tokens_, far));
      group_.push_back({&tile, segment, columns_, ragged});
      columns_ += segment.columns;
    }
  }

  // Asks for what the next block reads of token t's successor and what this one writes of t.
  void Prefetch(int64_t t) const {
    const int64_t item = SizeOf(args_.dtype);
    const int64_t next = t + static_cast<int64_t>(tokens_);
    window_.rows().Prefetch(next + band_.ahead);
    for (size_t g = 0; g < band_.group; ++g) {
      PrefetchRow(outputs_.out + band_.OutRow(t, g) * args_.head_dim, static_cast<size_t>(args_.head_dim) * sizeof(float));
      if (next >= band_.end) continue;
      PrefetchRow(static_cast<const char*>(args_.query.data) + QueryOffset(band_, args_.query, next, g) * item,
                  static_cast<size_t>(args_.key_dim * item));
    }
  }

  // Turns the group's scores into weights and adds the weighted values. `last`: the block has no further group.
  void FinishGroup(bool last) {
    for (size_t c = 0; c < tokens_; ++c) {
      const int64_t t = t0_ + static_cast<int64_t>(c);
      if (last) Prefetch(t);  // one token at a time, while there is arithmetic to hide it behind
      for (size_t g = 0; g < band_.group; ++g) {
        const size_t r = c * band_.group + g;
        float* row = scores_ + r * kScoreStride;
        for (const Scored& scored : group_) {
          if (scored.ragged) {
            MaskRow(scored.segment, scored.segment.far ? band_.FarSinks(t) : band_.Window(t), row + scored.offset);
          }
          if (scored.tile->masked) {
            AddRow(d_, scored.tile->bias + scored.segment.column, scored.segment.columns, row + scored.offset);
          }
        }
        SoftmaxRow(r, row);
      }
    }
    const size_t rows = tokens_ * band_.group;
    for (const Scored& scored : group_) {
      const Segment& segment = scored.segment;
      const Left weights{scores_ + scored.offset + (segment.begin - segment.column), kScoreStride, 1};
      const float* values = scored.tile->values + segment.begin * widths_.value_stride;
      const size_t keys = segment.end - segment.begin;
      if (fresh_) {
        MatMul<false>(d_, rows, widths_.value, keys, weights, values, widths_.value_stride, sum_values_, widths_.value_stride);
      } else {
        MatMul<true>(d_, rows, widths_.value, keys, weights, values, widths_.value_stride, sum_values_, widths_.value_stride);
      }
      fresh_ = false;
    }
    group_.clear();
    columns_ = 0;
  }

  void SoftmaxRow(size_t r, float* row) {
    const float old_max = max_[r];
    const float new_max = MaxOfRow(d_, row, columns_, old_max);
    if (!fresh_ && new_max != old_max) {
      const float factor = old_max == kMinusInfinity ? 0.0f : std::exp(old_max - new_max);
      sum_[r] *= factor;
      ScaleRow(d_, factor, widths_.value, sum_values_ + r * widths_.value_stride);
    }
    max_[r] = new_max;
    sum_[r] += WeighRow(d_, new_max, columns_, row);
  }

  void Store() {
    for (size_t c = 0; c < tokens_; ++c) {
      for (size_t g = 0; g < band_.group; ++g) {
        const size_t r = c * band_.group + g;
        StoreOut(d_, band_, widths_, outputs_, t0_ + static_cast<int64_t>(c), g, sum_values_ + r * widths_.value_stride, max_[r],
                 sum_[r]);
      }
    }
  }

  const D d_;
  const WindowArgs& args_;
  const WindowOutputs& outputs_;
  const Band& band_;
  const Widths widths_;
  const size_t block_tokens_;
  TileRing window_;
  TileRing sinks_;

  float* query_ = nullptr;       // [rows, key_stride], times the scale
  float* sink_query_ = nullptr;  // likewise
  float* scores_ = nullptr;      // [rows, kScoreStride], then weights
  float* sum_values_ = nullptr;  // [rows, value_stride]
  float* max_ = nullptr;         // [rows]
  float* sum_ = nullptr;         // [rows]

  int64_t t0_ = 0;
  size_t tokens_ = 0;
  bool fresh_ = true;  // no group of this block is finished yet
  std::vector<Scored> group_;
  size_t columns_ = 0;
};

void WindowForwardSlice(const WindowArgs& args, const WindowOutputs& outputs, int64_t slice) {
  const Band band(args, slice);
  if (band.sequence.length == 1) {
    WindowStep(band, outputs);
  } else if (band.sequence.length > 1) {
    ForwardSlice(band, outputs).Run();
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(WindowForwardSlice);

int64_t WindowSlices(const WindowArgs& args) { return args.sequences * args.kv_heads; }

void WindowForward(const WindowArgs& args, const WindowOutputs& outputs, int64_t slice) {
  HWY_DYNAMIC_DISPATCH(WindowForwardSlice)(args, outputs, slice);
}

}  // namespace latte::kernels
#endif
