// What the window's forward and backward passes share: which keys a token reads, and those keys as float32 tiles. Included once
// per SIMD target.
#if defined(LATTE_KERNELS_WINDOW_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_WINDOW_CHUNK_INL_H_
#undef LATTE_KERNELS_WINDOW_CHUNK_INL_H_
#else
#define LATTE_KERNELS_WINDOW_CHUNK_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "hwy/highway.h"
#include "kernels/load-inl.h"
#include "kernels/math-inl.h"
#include "kernels/prefetch-inl.h"
#include "kernels/scratch.h"
#include "kernels/tile_matmul-inl.h"
#include "kernels/window.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Keys of a tile. A multiple of every vector length.
constexpr size_t kTileKeys = 128;

// Distance of a matrix's rows: an odd number of cache lines, so that a column's elements don't compete for the same cache sets.
constexpr size_t RowStride(size_t columns) { return (columns + 15) / 16 * 16 + ((columns + 15) / 16 % 2 == 0 ? 16 : 0); }
constexpr size_t kTileStride = RowStride(kTileKeys);

constexpr size_t CeilDiv(size_t a, size_t b) { return a / b + (a % b != 0 ? 1 : 0); }

// Positions [begin, end).
struct Span {
  int64_t begin;
  int64_t end;
};

// The tokens of one slice and the keys they read, in positions that count from the sequence's true start.
struct Band {
  Band(const WindowArgs& args, int64_t slice)
      : args(args),
        index(slice / args.kv_heads),
        kv_head(slice % args.kv_heads),
        sequence(SequenceAt(index, args.time, args.cu_seqlens)),
        group(static_cast<size_t>(args.heads / args.kv_heads)),
        position(args.causal && args.position != nullptr ? args.position[index] : 0),
        end(position + sequence.length),
        behind(std::min(args.window - 1, end)),
        ahead(args.causal ? 0 : behind),
        first(std::max<int64_t>(0, position - std::min(args.past, behind))),
        sinks(args.causal ? std::min(args.sinks, std::max<int64_t>(0, end - 1 - behind)) : 0) {}

  // What token t's window holds; never empty, since t itself is in it.
  Span Window(int64_t t) const { return {std::max(first, t - behind), std::min(end, t + ahead + 1)}; }
  // The sinks that have left token t's window.
  Span FarSinks(int64_t t) const { return {0, std::min(sinks, std::max<int64_t>(0, t - behind))}; }
  // The keys of the windows, or the far sinks, that each token of a block reads.
  Span Common(int64_t t0, size_t tokens, bool far) const {
    if (far) return FarSinks(t0);
    return {Window(t0 + static_cast<int64_t>(tokens) - 1).begin, Window(t0).end};
  }
  // Row of the contiguous tensors [B * T * H, …] that holds token t's query head g of the slice.
  int64_t OutRow(int64_t t, size_t g) const {
    return (sequence.batch * args.time + Row(t)) * args.heads + kv_head * static_cast<int64_t>(group) + static_cast<int64_t>(g);
  }
  // Row of the tensors [B, T, …] that holds token t >= position.
  int64_t Row(int64_t t) const { return sequence.begin + (t - position); }

  // Tokens of a block whose queries make about `rows` rows.
  size_t BlockTokens(size_t rows) const {
    return std::min(static_cast<size_t>(sequence.length), std::max<size_t>(1, rows / group));
  }
  // Tiles that hold all keys of the windows, or all sinks; and the most that a block's windows touch.
  size_t WindowTiles() const { return CeilDiv(static_cast<size_t>(end - first), kTileKeys); }
  size_t SinkTiles() const { return CeilDiv(static_cast<size_t>(sinks), kTileKeys); }
  size_t BlockTiles(size_t tokens) const {
    return std::min(WindowTiles(), CeilDiv(static_cast<size_t>(behind) + static_cast<size_t>(ahead) + tokens, kTileKeys) + 1);
  }

  const WindowArgs& args;
  int64_t index;  // n
  int64_t kv_head;
  Sequence sequence;
  size_t group;      // query heads of the slice
  int64_t position;  // of the first token
  int64_t end;       // one past the last token's
  int64_t behind;    // keys before t in its window, at most
  int64_t ahead;     // and after it
  int64_t first;     // the oldest key that a window can reach
  int64_t sinks;     // those that leave some token's window
};

// Widths of a slice's matrices in scratch: rounded up to whole vectors, and the distance of their rows.
struct Widths {
  template <class D>
  Widths(D d, const WindowArgs& args)
      : key(hwy::RoundUpTo(static_cast<size_t>(args.key_dim), hn::Lanes(d))),
        value(hwy::RoundUpTo(static_cast<size_t>(args.head_dim), hn::Lanes(d))),
        key_stride(RowStride(key)),
        value_stride(RowStride(value)) {}

  size_t key;
  size_t value;
  size_t key_stride;
  size_t value_stride;
};

// The keys and values of a slice in memory, by position: those that windows hold, or the sinks that have left them. Those from
// before this call lie in the tensors of the past.
class KeyRows {
 public:
  enum class Kind { kWindow, kSinks };

  KeyRows(const Band& band, const Widths& widths, Kind kind) : band_(band), widths_(widths), kind_(kind) {}

  int64_t origin() const { return kind_ == Kind::kWindow ? band_.first : 0; }
  int64_t limit() const { return kind_ == Kind::kWindow ? band_.end : band_.sinks; }

  bool Masked(int64_t s) const {
    const Place place = Find(s);
    return place.mask && !place.mask.data[place.batch * place.mask.batch_stride + place.time * place.mask.time_stride];
  }
  template <class D>
  void LoadKey(D d, int64_t s, float* row) const {
    const Place place = Find(s);
    LoadRow(d, band_.args.dtype, place.key.data, Offset(place.key, place), KeyDim(), row, widths_.key);
  }
  template <class D>
  void LoadValue(D d, int64_t s, float* row) const {
    const Place place = Find(s);
    LoadRow(d, band_.args.dtype, place.values.data, Offset(place.values, place), HeadDim(), row, widths_.value);
  }
  // The same rows where they lie, if whole vectors of float32 can be read there; else loaded into `spare`.
  template <class D>
  const float* Key(D d, int64_t s, float* spare) const {
    const Place place = Find(s);
    return RowOf(d, place.key, Offset(place.key, place), KeyDim(), widths_.key, spare);
  }
  template <class D>
  const float* Value(D d, int64_t s, float* spare) const {
    const Place place = Find(s);
    return RowOf(d, place.values, Offset(place.values, place), HeadDim(), widths_.value, spare);
  }
  // Has the keys and values of [begin, end) fetched, those that this call has.
  void Fetch(int64_t begin, int64_t end, Prefetch& prefetch) const {
    begin = std::max(begin, band_.position);
    end = std::min(end, limit());
    if (begin >= end) return;
    const WindowArgs& args = band_.args;
    const int64_t item = SizeOf(args.dtype);
    const Place place = Find(begin);
    const size_t count = static_cast<size_t>(end - begin);
    prefetch.Add(static_cast<const char*>(args.key.data) + Offset(args.key, place) * item, args.key.time_stride * item,
                 KeyDim() * static_cast<size_t>(item), count);
    prefetch.Add(static_cast<const char*>(args.values.data) + Offset(args.values, place) * item, args.values.time_stride * item,
                 HeadDim() * static_cast<size_t>(item), count);
  }

 private:
  // Views of keys, values and mask, and the batch and time indices within them.
  struct Place {
    const View& key;
    const View& values;
    const MaskView& mask;
    int64_t batch;
    int64_t time;
  };

  Place Find(int64_t s) const {
    const WindowArgs& args = band_.args;
    if (s >= band_.position) return {args.key, args.values, args.key_mask, band_.sequence.batch, band_.Row(s)};
    if (kind_ == Kind::kSinks) return {args.sink_key, args.sink_values, args.sink_mask, band_.index, s};
    return {args.past_key, args.past_values, args.past_mask, band_.index, args.past - (band_.position - s)};
  }

  int64_t Offset(const View& view, const Place& place) const {
    return place.batch * view.batch_stride + place.time * view.time_stride + band_.kv_head * view.head_stride;
  }

  template <class D>
  const float* RowOf(D d, const View& view, int64_t offset, size_t n, size_t padded, float* spare) const {
    if (band_.args.dtype == DType::kFloat32 && n == padded) return static_cast<const float*>(view.data) + offset;
    LoadRow(d, band_.args.dtype, view.data, offset, n, spare, padded);
    return spare;
  }

  size_t KeyDim() const { return static_cast<size_t>(band_.args.key_dim); }
  size_t HeadDim() const { return static_cast<size_t>(band_.args.head_dim); }

  const Band& band_;
  const Widths& widths_;
  Kind kind_;
};

// kTileKeys keys and their values in float32. A masked key is a row of zeros with a bias of -inf, so whatever the masked memory
// holds reaches nothing.
struct Tile {
  int64_t index = -1;       // which of the ring's tiles is loaded, or -1
  size_t loaded = 0;        // keys that are set, a multiple of the vector length
  bool masked = false;      // whether any of them is masked
  float* bias = nullptr;    // [kTileKeys]
  float* keys_t = nullptr;  // [key, kTileStride], transposed; or [key / 2, kTileStride] of pairs along the key's dimension
  float* values = nullptr;  // [kTileKeys, value_stride], forward only; or [kTileKeys / 2, value_stride] of pairs of keys
  float* keys = nullptr;    // [kTileKeys, key_stride], or [kTileKeys / 2, key_stride] of pairs of keys; this and the rest
                            // backward only
  float* values_t =
      nullptr;  // [value, kTileStride], transposed; or [value / 2, kTileStride] of pairs along the value's dimension
  float* grad_keys = nullptr;    // [kTileKeys, key_stride]
  float* grad_values = nullptr;  // [kTileKeys, value_stride]
};

// The most recently used tiles of a run of keys: tile k holds positions [origin + k * kTileKeys, …) below `limit`, and lives in
// slot k % slots. As the band slides over a long sequence each key is converted and transposed once.
class TileRing {
 public:
  enum class Use { kForward, kBackward };

  // `paired`: matrices are pairs of bfloat16, for Product Pairs.
  TileRing(const KeyRows& rows, const Widths& widths, size_t slots, Use use, bool paired)
      : rows_(rows), widths_(widths), backward_(use == Use::kBackward), paired_(kHasPairs && paired), tiles_(slots) {}

  void Carve(ScratchLayout& layout) {
    const size_t elements = paired_ ? 2 : 1;  // in the place of a float
    for (Tile& tile : tiles_) {
      tile.bias = layout.Take(1, kTileKeys);
      tile.keys_t = layout.Take(widths_.key / elements, kTileStride);
      if (backward_) {
        tile.keys = layout.Take(kTileKeys / elements, widths_.key_stride);
        tile.values_t = layout.Take(widths_.value / elements, kTileStride);
        tile.grad_keys = layout.Take(kTileKeys, widths_.key_stride);
        tile.grad_values = layout.Take(kTileKeys, widths_.value_stride);
      } else {
        tile.values = layout.Take(kTileKeys / elements, widths_.value_stride);
      }
    }
    staging_ = layout.Take(kTileKeys, std::max(widths_.key_stride, widths_.value_stride));
  }

  int64_t Origin(int64_t k) const { return rows_.origin() + k * static_cast<int64_t>(kTileKeys); }
  int64_t TileOf(int64_t position) const { return (position - rows_.origin()) / static_cast<int64_t>(kTileKeys); }
  size_t Keys(int64_t k) const {
    return static_cast<size_t>(std::min<int64_t>(rows_.limit() - Origin(k), static_cast<int64_t>(kTileKeys)));
  }
  const KeyRows& rows() const { return rows_; }
  Tile& Slot(int64_t k) { return tiles_[static_cast<size_t>(k) % tiles_.size()]; }
  std::vector<Tile>& tiles() { return tiles_; }

  // Tile k with at least its first `end` keys in it. They are loaded no earlier than asked for: rows of one head lie so far apart
  // that they share few cache sets, and a whole tile's would push each other out before they are used.
  template <class D>
  Tile& Load(D d, int64_t k, size_t end) {
    Tile& tile = Slot(k);
    if (tile.index != k) {
      tile.index = k;
      tile.loaded = 0;
      tile.masked = false;
    }
    const size_t keys = Keys(k);
    const size_t begin = tile.loaded;
    const size_t padded = hwy::RoundUpTo(end, hn::Lanes(d));
    if (padded <= begin) return tile;
    tile.loaded = padded;
    // What is kept in another form passes through the same few rows, which stay in the first-level cache.
    const size_t count = padded - begin;
    float* key_rows = backward_ && !paired_ ? tile.keys + begin * widths_.key_stride : staging_;
    for (size_t i = 0; i < count; ++i) {
      const int64_t s = Origin(k) + static_cast<int64_t>(begin + i);
      float* row = key_rows + i * widths_.key_stride;
      const bool real = begin + i < keys && !rows_.Masked(s);
      tile.bias[begin + i] = real ? 0.0f : kMinusInfinity;
      tile.masked |= begin + i < keys && !real;
      if (real) {
        rows_.LoadKey(d, s, row);
      } else {
        std::fill_n(row, widths_.key, 0.0f);
      }
    }
    if (backward_ && paired_) {
      PairKeys(d, key_rows, widths_.key, widths_.key_stride, count, tile.keys + begin / 2 * widths_.key_stride);
    }
    TransposeRows(d, key_rows, widths_.key, widths_.key_stride, count, tile.keys_t + begin);
    float* value_rows = backward_ || paired_ ? staging_ : tile.values + begin * widths_.value_stride;
    for (size_t i = 0; i < count; ++i) {
      float* row = value_rows + i * widths_.value_stride;
      if (tile.bias[begin + i] == 0.0f) {
        rows_.LoadValue(d, Origin(k) + static_cast<int64_t>(begin + i), row);
      } else {
        std::fill_n(row, widths_.value, 0.0f);
      }
    }
    if (backward_) {
      TransposeRows(d, value_rows, widths_.value, widths_.value_stride, count, tile.values_t + begin);
    } else if (paired_) {
      PairKeys(d, value_rows, widths_.value, widths_.value_stride, count, tile.values + begin / 2 * widths_.value_stride);
    }
    return tile;
  }

 private:
  // `count` rows as pairs of neighbours, which lie `stride` apart too.
  template <class D>
  static void PairKeys(D d, const float* rows, size_t width, size_t stride, size_t count, float* pairs) {
    for (size_t i = 0; i < count; i += 2) {
      PairRows(d, rows + i * stride, rows + (i + 1) * stride, width, pairs + i / 2 * stride);
    }
  }
  // `count` rows as columns of `transposed`, of pairs where these are; rows are not kept then.
  template <class D>
  void TransposeRows(D d, float* rows, size_t width, size_t stride, size_t count, float* transposed) const {
    for (size_t i = 0; paired_ && i < count; ++i) PairColumns(d, rows + i * stride, width, rows + i * stride);
    Transpose(count, paired_ ? width / 2 : width, rows, stride, transposed, kTileStride);
  }

  const KeyRows rows_;
  const Widths& widths_;
  const bool backward_;
  const bool paired_;
  std::vector<Tile> tiles_;
  float* staging_ = nullptr;  // one tile's rows on their way to being transposed
};

// The part of a tile that some token of a block reads. Columns count within the tile.
struct Segment {
  template <class D>
  Segment(D d, const TileRing& ring, int64_t k, Span keys, bool far)
      : origin(ring.Origin(k)),
        begin(static_cast<size_t>(std::max<int64_t>(0, keys.begin - origin))),
        end(std::min(ring.Keys(k), static_cast<size_t>(keys.end - origin))),
        column(begin / hn::Lanes(d) * hn::Lanes(d)),
        columns(hwy::RoundUpTo(end, hn::Lanes(d)) - column),
        far(far) {}

  // Whether some token that reads no more than `common` of these columns doesn't read all of them.
  bool Ragged(Span common) const {
    const int64_t first = origin + static_cast<int64_t>(column);
    return first < common.begin || first + static_cast<int64_t>(columns) > common.end;
  }

  int64_t origin;  // position of the tile's first key
  size_t begin;
  size_t end;
  size_t column;   // begin, rounded down to a whole vector
  size_t columns;  // from there, rounded up
  bool far;        // sinks that have left the window
};

// Sets a token's scores of the keys that it doesn't read to -inf. `row` starts at segment.column.
template <class D>
HWY_INLINE void MaskRow(D d, const Segment& segment, Span read, float* row) {
  const int64_t columns = static_cast<int64_t>(segment.columns);
  const int64_t column = segment.origin + static_cast<int64_t>(segment.column);
  const int64_t begin = std::clamp<int64_t>(read.begin - column, 0, columns);
  const int64_t end = std::clamp<int64_t>(read.end - column, begin, columns);
  // Whole vectors, which are soon read again as such.
  const size_t lanes = hn::Lanes(d);
  const auto none = hn::Set(d, kMinusInfinity);
  const size_t first = static_cast<size_t>(begin);
  for (size_t i = 0; i < first; i += lanes) {
    hn::Store(hn::IfThenElse(hn::FirstN(d, first - i), none, hn::Load(d, row + i)), d, row + i);
  }
  const size_t last = static_cast<size_t>(end);
  for (size_t i = last / lanes * lanes; i < segment.columns; i += lanes) {
    const size_t keep = last > i ? last - i : 0;
    hn::Store(hn::IfThenElse(hn::FirstN(d, keep), hn::Load(d, row + i), none), d, row + i);
  }
}

// row[0, n) += other[0, n), n a multiple of the vector length.
template <class D>
HWY_INLINE void AddRow(D d, const float* other, size_t n, float* row) {
  for (size_t i = 0; i < n; i += hn::Lanes(d)) hn::StoreU(hn::Add(hn::LoadU(d, row + i), hn::LoadU(d, other + i)), d, row + i);
}

template <class D>
HWY_INLINE void ScaleRow(D d, float factor, size_t n, float* row) {
  const auto f = hn::Set(d, factor);
  for (size_t i = 0; i < n; i += hn::Lanes(d)) hn::StoreU(hn::Mul(hn::LoadU(d, row + i), f), d, row + i);
}

// The largest of row[0, n) and `max`; n is a multiple of the vector length.
template <class D>
HWY_INLINE float MaxOfRow(D d, const float* row, size_t n, float max) {
  auto top = hn::Set(d, max);
  for (size_t i = 0; i < n; i += hn::Lanes(d)) top = hn::Max(top, hn::Load(d, row + i));
  return hn::ReduceMax(d, top);
}

// row[0, n) = exp(row - max), with kRounded to bfloat16, and their sum.
template <bool kRounded = false, class D>
HWY_INLINE float WeighRow(D d, float max, size_t n, float* row) {
  // While nothing has been read, any finite maximum gives weights of zero.
  const auto shift = hn::Set(d, max == kMinusInfinity ? 0.0f : max);
  auto sum = hn::Zero(d);
  const auto distance = [&](size_t i) HWY_ATTR { return hn::Sub(hn::Load(d, row + i), shift); };
  ForEachExp(d, n, distance, [&](size_t i, hn::Vec<D> weight) HWY_ATTR {
    if constexpr (kRounded) weight = RoundToBFloat16(d, weight);
    hn::Store(weight, d, row + i);
    sum = hn::Add(sum, weight);
  });
  return hn::ReduceSum(d, sum);
}

// Offset of query head g of the slice in a tensor [B, T, H, …], for token t.
template <class AnyView>
HWY_INLINE int64_t QueryOffset(const Band& band, const AnyView& view, int64_t t, size_t g) {
  const int64_t head = band.kv_head * static_cast<int64_t>(band.group) + static_cast<int64_t>(g);
  return band.sequence.batch * view.batch_stride + band.Row(t) * view.time_stride + head * view.head_stride;
}

// How a product of queries and keys takes its scale: of bfloat16 pairs queries take one that leaves them exact (a power of two);
// another one's rounding would grow with the scores, so that these take it.
struct ScoreScale {
  ScoreScale(float scale, bool paired) {
    int exponent = 0;
    const bool exact = !paired || std::abs(std::frexp(scale, &exponent)) == 0.5f;
    (exact ? query : score) = scale;
  }
  float query = 1.0f;  // before the product
  float score = 1.0f;  // after it
};

// Queries of a block, token by token and the slice's heads of each together, times `scale`.
template <class D>
HWY_INLINE void LoadQueries(D d, const Band& band, const Widths& widths, const View& query, int64_t t0, size_t tokens,
                            float scale, float* row) {
  const WindowArgs& args = band.args;
  for (size_t c = 0; c < tokens; ++c) {
    for (size_t g = 0; g < band.group; ++g, row += widths.key_stride) {
      const int64_t offset = QueryOffset(band, query, t0 + static_cast<int64_t>(c), g);
      LoadRow(d, args.dtype, query.data, offset, static_cast<size_t>(args.key_dim), row, widths.key);
      ScaleRow(d, scale, widths.key, row);
    }
  }
}

// Runs the blocks of the tokens [begin, end) of a slice. Meanwhile the rows of the block after it are fetched, and those that
// next(prefetch) asks for during the last.
template <class WindowSlice, class Work, class Next>
HWY_INLINE void RunBlocks(WindowSlice& slice, int64_t begin, int64_t end, Work& work, const Next& next) {
  const int64_t block = slice.block_tokens();
  for (int64_t t = begin; t < end; t += block) {
    work.prefetch.Clear();
    if (t + block < end) {
      slice.Fetch(t + block, work.prefetch);
    } else {
      next(work.prefetch);
    }
    slice.Block(t, work);
  }
}

// Runs the blocks of the slices of one sequence, `turn_blocks` of a slice before the next slice's turn: their rows share pages
// and lines, which then are still near.
template <class Slices, class Work>
HWY_INLINE void RunInTurns(Slices& slices, int64_t turn_blocks, Work& work) {
  const Band& band = slices.front().band();
  const int64_t turn = turn_blocks * slices.front().block_tokens();
  for (int64_t begin = band.position; begin < band.end; begin += turn) {
    const int64_t end = std::min(band.end, begin + turn);
    for (size_t i = 0; i < slices.size(); ++i) {
      RunBlocks(slices[i], begin, end, work, [&](Prefetch& prefetch) {
        if (i + 1 < slices.size()) {
          slices[i + 1].Fetch(begin, prefetch);
        } else {
          slices.front().Fetch(end, prefetch);
        }
      });
    }
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
