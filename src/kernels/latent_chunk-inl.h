// What the forward and backward passes of latent attention share: a chunk's keys and values in scratch memory, and the running
// state. Included once per SIMD target.
#if defined(LATTE_KERNELS_LATENT_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_LATENT_CHUNK_INL_H_
#undef LATTE_KERNELS_LATENT_CHUNK_INL_H_
#else
#define LATTE_KERNELS_LATENT_CHUNK_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/highway.h"
#include "kernels/latent.h"
#include "kernels/load-inl.h"
#include "kernels/math-inl.h"
#include "kernels/prefetch-inl.h"
#include "kernels/scratch.h"
#include "kernels/tile_matmul-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F = hn::ScalableTag<float>;
using VF = hn::Vec<F>;

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
// Tokens a chunk: the work that grows with the chunk (scores inside it) balances the work per chunk (reading and writing the
// state).
constexpr size_t kChunk = 32;
// Rows of the triangular products computed at a time: what lies above the diagonal is skipped in these steps.
constexpr size_t kStrip = 8;
// How far a latent's maximum (or its decay) may move within a stretch: weights stay above exp(-60), far from the smallest float,
// and those that vanish against a maximum of their own time (17 lower) still do not underflow.
constexpr float kMaxDrift = 60.0f;

// Tokens of one head that are worked on before the next head's turn.
constexpr int64_t kTurnTokens = 64;

static_assert(kSegmentTokens % kTurnTokens == 0 && kTurnTokens % kChunk == 0);

inline size_t RoundUp(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Dims {
  explicit Dims(const LatentArgs& args)
      : latents(static_cast<size_t>(args.latents)),
        head_dim(static_cast<size_t>(args.head_dim)),
        group(static_cast<size_t>(args.heads / args.kv_heads)),
        latents_padded(RoundUp(latents, std::max<size_t>(4, hn::Lanes(F())))),
        head_dim_padded(RoundUp(head_dim, std::max<size_t>(4, hn::Lanes(F())))) {}
  size_t latents, head_dim, group, latents_padded, head_dim_padded;

  // Rows of an [L, D] matrix are padded to whole blocks of 4, for Transpose.
  size_t StateFloats() const { return latents_padded * head_dim_padded; }
};

// A key-value head's state, its rows padded to whole vectors (zeros) and to whole vectors of latents (m = -inf). Room for
// `more_rows` follows the sum: with a chunk's values there, one product reads both.
struct State {
  State(const Dims& dims, Scratch& scratch, size_t more_rows = 0)
      : sum(scratch.Take(dims.StateFloats() + more_rows * dims.head_dim_padded)),
        normaliser(scratch.Take(dims.latents_padded)),
        maximum(scratch.Take(dims.latents_padded)),
        decay(scratch.Take(dims.latents_padded)) {}
  // At `floats` in memory of Floats(dims).
  State(const Dims& dims, float* floats)
      : sum(floats),
        normaliser(sum + Scratch::Rounded(dims.StateFloats())),
        maximum(normaliser + Scratch::Rounded(dims.latents_padded)),
        decay(maximum + Scratch::Rounded(dims.latents_padded)) {}
  static size_t Floats(const Dims& dims, size_t more_rows = 0) {
    return Scratch::Rounded(dims.StateFloats() + more_rows * dims.head_dim_padded) + 3 * Scratch::Rounded(dims.latents_padded);
  }

  float* sum;         // [L, D]
  float* normaliser;  // [L]
  float* maximum;     // [L]
  float* decay;       // [L]
};

HWY_INLINE void ClearState(const Dims& dims, const State& state) {
  std::fill_n(state.sum, dims.StateFloats(), 0.0f);
  std::fill_n(state.normaliser, dims.latents_padded, 0.0f);
  std::fill_n(state.maximum, dims.latents_padded, kNegativeInfinity);
  std::fill_n(state.decay, dims.latents_padded, 0.0f);
}

// From and to the packed form [L, D + 3]; null stands for a state that has seen nothing.
HWY_INLINE void ReadState(const Dims& dims, const float* packed, const State& state) {
  ClearState(dims, state);
  if (packed == nullptr) return;
  for (size_t l = 0; l < dims.latents; ++l) {
    const float* row = packed + l * (dims.head_dim + kStateExtra);
    std::copy_n(row, dims.head_dim, state.sum + l * dims.head_dim_padded);
    state.normaliser[l] = row[dims.head_dim];
    state.maximum[l] = row[dims.head_dim + 1];
    state.decay[l] = row[dims.head_dim + 2];
  }
}

HWY_INLINE void WriteState(const Dims& dims, const State& state, float* packed) {
  for (size_t l = 0; l < dims.latents; ++l) {
    float* row = packed + l * (dims.head_dim + kStateExtra);
    std::copy_n(state.sum + l * dims.head_dim_padded, dims.head_dim, row);
    row[dims.head_dim] = state.normaliser[l];
    row[dims.head_dim + 1] = state.maximum[l];
    row[dims.head_dim + 2] = state.decay[l];
  }
}

// Where a slice's data lies.
struct Slice {
  Slice(const LatentArgs& args, int64_t index)
      : sequence_index(index / args.kv_heads),
        kv_head(index % args.kv_heads),
        first_head(kv_head * (args.heads / args.kv_heads)),
        sequence(SequenceAt(sequence_index, args.time, args.cu_seqlens)) {}
  int64_t sequence_index, kv_head, first_head;
  Sequence sequence;

  int64_t Offset(const View& view, int64_t token, int64_t head) const {
    return sequence.batch * view.batch_stride + (sequence.begin + token) * view.time_stride + head * view.head_stride;
  }
  int64_t Offset(const MutableView& view, int64_t token, int64_t head) const {
    return sequence.batch * view.batch_stride + (sequence.begin + token) * view.time_stride + head * view.head_stride;
  }
  bool Masked(const MaskView& mask, int64_t token) const {
    return mask && !mask.data[sequence.batch * mask.batch_stride + (sequence.begin + token) * mask.time_stride];
  }
  float* PackedState(float* states, const Dims& dims, int64_t kv_heads) const {
    return states == nullptr ? nullptr
                             : states + (sequence_index * kv_heads + kv_head) *
                                            static_cast<int64_t>(dims.latents * (dims.head_dim + kStateExtra));
  }
  const float* PackedState(const float* states, const Dims& dims, int64_t kv_heads) const {
    return PackedState(const_cast<float*>(states), dims, kv_heads);
  }
};

// Has the rows of tokens [token, token + count) of a tensor fetched.
template <class AnyView>
void FetchRows(const Slice& slice, const AnyView& view, int64_t token, size_t count, int64_t head, DType dtype, int64_t elements,
               Prefetch& prefetch) {
  if (!view) return;
  const int64_t item = SizeOf(dtype);
  prefetch.Add(static_cast<const char*>(view.data) + slice.Offset(view, token, head) * item, view.time_stride * item,
               static_cast<size_t>(elements * item), count);
}

// Tokens of a slice that are worked on in one turn.
struct Turn {
  Slice slice;
  int64_t index;  // of the slice, counted from the call's first
  int64_t begin, end;
};

// Calls work(turn, next) for the tokens of each slice in [first, last), `tokens` of them at a time; `next` is the turn after it,
// or null. Slices of one sequence take turns: their rows share pages and lines, which then are still near.
template <class Work>
HWY_INLINE void ForEachTurn(const LatentArgs& args, int64_t first, int64_t last, int64_t tokens, bool reversed,
                            const Work& work) {
  if (first >= last) return;
  const Turn* waiting = nullptr;
  Turn turns[2] = {{Slice(args, first), 0, 0, 0}, {Slice(args, first), 0, 0, 0}};
  for (int64_t begin = first; begin < last;) {
    const Slice front(args, begin);
    const int64_t end = std::min(last, (front.sequence_index + 1) * args.kv_heads);
    const int64_t rounds = (front.sequence.length + tokens - 1) / tokens;
    for (int64_t i = 0; i < rounds; ++i) {
      const int64_t token = (reversed ? rounds - 1 - i : i) * tokens;
      for (int64_t index = begin; index < end; ++index) {
        Turn& turn = turns[waiting == turns ? 1 : 0];
        turn = {Slice(args, index), index - first, token, std::min(front.sequence.length, token + tokens)};
        if (waiting != nullptr) work(*waiting, &turn);
        waiting = &turn;
      }
    }
    begin = end;
  }
  if (waiting != nullptr) work(*waiting, static_cast<const Turn*>(nullptr));
}

// Calls work(first, last) for runs of the slices [first, last) that together make do with the scratch memory that a thread keeps,
// if each takes `floats`: a batch of thousands of sequences has that many states, of which few are live at a time. Slices of one
// sequence stay together where they can, for ForEachTurn.
template <class Work>
HWY_INLINE void ForEachRun(const LatentArgs& args, int64_t first, int64_t last, size_t floats, const Work& work) {
  constexpr size_t kRunFloats = size_t{1} << 20;
  const int64_t fit = static_cast<int64_t>(std::max<size_t>(1, kRunFloats / floats));
  const int64_t pieces = (args.kv_heads + fit - 1) / fit;  // of a sequence, of nearly equal size
  const int64_t run = fit >= args.kv_heads ? fit / args.kv_heads * args.kv_heads : (args.kv_heads + pieces - 1) / pieces;
  while (first < last) {
    int64_t end = first + run;
    if (run >= args.kv_heads) end = end / args.kv_heads * args.kv_heads;  // a sequence's end, wherever `first` lies
    end = std::min(last, end);
    work(first, end);
    first = end;
  }
}

// Where the forward pass keeps the state that precedes a segment of kSegmentTokens tokens.
inline int64_t SavedSlots(const LatentArgs& args) {
  const int64_t segments = (args.time + kSegmentTokens - 1) / kSegmentTokens;
  return args.cu_seqlens == nullptr ? args.sequences * segments : args.time / kSegmentTokens + args.sequences;
}

inline size_t SavedOffset(const LatentArgs& args, const Dims& dims, const Slice& slice, int64_t segment) {
  const int64_t first = args.cu_seqlens == nullptr ? slice.sequence_index * ((args.time + kSegmentTokens - 1) / kSegmentTokens)
                                                   : slice.sequence.begin / kSegmentTokens + slice.sequence_index;
  return static_cast<size_t>(slice.kv_head * SavedSlots(args) + first + segment) * dims.latents * (dims.head_dim + kStateExtra);
}

// The keys and values of up to kChunk tokens, and the weights made of them.
struct Chunk {
  Chunk(const Dims& dims, Scratch& scratch)
      : logits(scratch.Take(kChunk * dims.latents_padded)),
        log_decay(scratch.Take(kChunk * dims.latents_padded)),
        values(scratch.Take(kChunk * dims.head_dim_padded)),
        reference(scratch.Take(dims.latents_padded)),
        total_decay(scratch.Take(dims.latents_padded)),
        carry(scratch.Take(dims.latents_padded)),
        weights(scratch.Take(kChunk * dims.latents_padded)),
        weights_transposed(scratch.Take(kChunk * dims.latents_padded)),
        inverse_normaliser(scratch.Take(kChunk * dims.latents_padded)) {}
  static size_t Floats(const Dims& dims) {
    return 5 * Scratch::Rounded(kChunk * dims.latents_padded) + Scratch::Rounded(kChunk * dims.head_dim_padded) +
           3 * Scratch::Rounded(dims.latents_padded);
  }

  float* logits;              // k [C, L]; -inf where masked and in the padding
  float* log_decay;           // g [C, L], 0 where masked
  float* values;              // v [C, D]; 0 where masked
  float* reference;           // [L]: the largest logit of the stretch or of the state before it; WeighStretch makes -inf 0
  float* total_decay;         // [L]: decay from the stretch's first token to its last, the first's own left out
  float* carry;               // [L]: exp(m_before - reference), what the earlier state is worth
  float* weights;             // e = exp(k - reference) [C, L]
  float* weights_transposed;  // [L, C]
  float* inverse_normaliser;  // 1 / z [C, L], 0 where a latent has seen nothing
};

// A matrix whose rows lie `row` elements apart.
struct Rows {
  float* data;
  size_t row;
};

// The rows of a head from `token` on where they lie, if a kernel can read and write whole vectors there; else `spare`.
template <class AnyView>
HWY_INLINE Rows RowsInPlace(const LatentArgs& args, const Dims& dims, const Slice& slice, const AnyView& view, int64_t token,
                            int64_t head, float* spare) {
  if (args.dtype != DType::kFloat32 || dims.head_dim != dims.head_dim_padded) return {spare, dims.head_dim_padded};
  // Of a View nobody writes through what this returns.
  float* data = static_cast<float*>(const_cast<void*>(static_cast<const void*>(view.data)));
  return {data + slice.Offset(view, token, head), static_cast<size_t>(view.time_stride)};
}

// Loads tokens [token, token + count); with kValues their values too.
template <bool kValues = true>
HWY_INLINE void LoadChunk(const LatentArgs& args, const Dims& dims, const Slice& slice, int64_t token, size_t count,
                          const Chunk& chunk) {
  const F d;
  for (size_t i = 0; i < count; ++i) {
    const int64_t t = token + static_cast<int64_t>(i);
    float* logits = chunk.logits + i * dims.latents_padded;
    float* values = chunk.values + i * dims.head_dim_padded;
    float* log_decay = chunk.log_decay + i * dims.latents_padded;
    if (slice.Masked(args.key_mask, t)) {
      std::fill_n(logits, dims.latents_padded, kNegativeInfinity);
      if constexpr (kValues) std::fill_n(values, dims.head_dim_padded, 0.0f);
      if (args.log_decay) std::fill_n(log_decay, dims.latents_padded, 0.0f);
      continue;
    }
    LoadRow(d, args.dtype, args.key_logits.data, slice.Offset(args.key_logits, t, slice.kv_head), dims.latents, logits,
            dims.latents_padded, kNegativeInfinity);
    if constexpr (kValues) {
      LoadRow(d, args.dtype, args.values.data, slice.Offset(args.values, t, slice.kv_head), dims.head_dim, values,
              dims.head_dim_padded);
    }
    if (args.log_decay) {
      LoadRow(d, args.dtype, args.log_decay.data, slice.Offset(args.log_decay, t, slice.kv_head), dims.latents, log_decay,
              dims.latents_padded);
    }
  }
}

// chunk.reference = the largest logit of the tokens [0, count) and of `maximum`; may be -inf.
HWY_INLINE void FindReference(const Dims& dims, const Chunk& chunk, size_t count, const float* maximum) {
  const F d;
  const size_t row = dims.latents_padded;
  for (size_t l = 0; l < row; l += hn::Lanes(d)) {
    VF high = hn::Load(d, maximum + l);
    for (size_t i = 0; i < count; ++i) high = hn::Max(high, hn::Load(d, chunk.logits + i * row + l));
    hn::Store(high, d, chunk.reference + l);
  }
}

// How many of the tokens [0, count), with `maximum` before them, can share one reference, found token by token; at least one.
inline HWY_NOINLINE size_t MeasureTokens(const LatentArgs& args, const Dims& dims, const Chunk& chunk, size_t count,
                                         const float* maximum) {
  const F d;
  const size_t row = dims.latents_padded;
  const VF drift = hn::Set(d, kMaxDrift);
  const VF none = hn::Set(d, kNegativeInfinity);
  size_t length = count;
  for (size_t l = 0; l < row; l += hn::Lanes(d)) {
    VF high = hn::Max(hn::Load(d, maximum + l), hn::Load(d, chunk.logits + l));
    VF low = high;  // the first maximum that is not -inf: the lowest a token of the stretch compares with
    VF sum = hn::Zero(d);
    for (size_t i = 1; i < length; ++i) {
      VF logit = hn::Load(d, chunk.logits + i * row + l);
      if (args.log_decay) {
        sum = hn::Add(sum, hn::Load(d, chunk.log_decay + i * row + l));
        logit = hn::Sub(logit, sum);
      }
      high = hn::Max(high, logit);
      low = hn::IfThenElse(hn::Eq(low, none), high, low);
      const auto far = hn::Or(hn::Gt(hn::Sub(high, low), drift), hn::Lt(sum, hn::Neg(drift)));
      if (HWY_UNLIKELY(!hn::AllFalse(d, far))) length = i;
    }
  }
  return length;
}

// Cuts a stretch: returns how many of the chunk's tokens [0, count), with `maximum` before them, can share one reference, at
// least one, and sets that reference. With a decay, turns their logits into k - Σ g (the first token's own decay has been given
// to `maximum`) and sets total_decay.
HWY_INLINE size_t MeasureStretch(const LatentArgs& args, const Dims& dims, const Chunk& chunk, size_t count,
                                 const float* maximum) {
  const F d;
  const size_t lanes = hn::Lanes(d);
  const size_t row = dims.latents_padded;
  size_t length = count;
  if (args.log_decay) {
    length = MeasureTokens(args, dims, chunk, count, maximum);
    for (size_t l = 0; l < row; l += lanes) {
      VF sum = hn::Zero(d);
      for (size_t i = 1; i < length; ++i) {
        float* logit = chunk.logits + i * row + l;
        sum = hn::Add(sum, hn::Load(d, chunk.log_decay + i * row + l));
        hn::Store(hn::Sub(hn::Load(d, logit), sum), d, logit);
      }
      hn::Store(sum, d, chunk.total_decay + l);
    }
    FindReference(dims, chunk, length, maximum);
    return length;
  }
  // Mostly no latent's maximum moves far over the whole chunk, which two comparisons a latent tell.
  FindReference(dims, chunk, count, maximum);
  auto far = hn::MaskFalse(d);
  for (size_t l = 0; l < row; l += lanes) {
    const VF first = hn::Max(hn::Load(d, maximum + l), hn::Load(d, chunk.logits + l));
    far = hn::Or(far, hn::Gt(hn::Sub(hn::Load(d, chunk.reference + l), first), hn::Set(d, kMaxDrift)));
  }
  if (HWY_LIKELY(hn::AllFalse(d, far))) return count;
  length = MeasureTokens(args, dims, chunk, count, maximum);
  FindReference(dims, chunk, length, maximum);
  return length;
}

// Gives the decay of the stretch's first token to the state: that is exact however strong it is.
HWY_INLINE void DecayState(const Dims& dims, const float* log_decay, const State& state) {
  for (size_t l = 0; l < dims.latents; ++l) {
    state.maximum[l] += log_decay[l];
    state.decay[l] += log_decay[l];
  }
}

// Sets the stretch's carry and weights, moves the state to the chunk's reference and adds the weights to its normaliser;
// kInverse: sets the inverse normalisers too. The state's maximum is left at the reference (or -inf) and its sum lacks the
// stretch's values: AddValues. kRounded: weights are rounded to bfloat16, for sums and normalisers alike, so that what a latent
// gives stays an average.
template <bool kInverse, bool kRounded = false>
HWY_INLINE void WeighStretch(const Dims& dims, const Chunk& chunk, size_t count, const State& state) {
  const F d;
  const size_t lanes = hn::Lanes(d);
  const size_t row = dims.latents_padded;
  const VF none = hn::Set(d, kNegativeInfinity);
  auto moved = hn::MaskFalse(d);
  for (size_t l = 0; l < row; l += lanes) {
    const VF high = hn::Load(d, chunk.reference + l);
    const VF reference = hn::IfThenZeroElse(hn::Eq(high, none), high);
    const VF carry = Exp(d, hn::Sub(hn::Load(d, state.maximum + l), reference));
    hn::Store(high, d, state.maximum + l);
    hn::Store(reference, d, chunk.reference + l);
    hn::Store(carry, d, chunk.carry + l);
    hn::Store(hn::Mul(hn::Load(d, state.normaliser + l), carry), d, state.normaliser + l);
    moved = hn::Or(moved, hn::Ne(carry, hn::Set(d, 1.0f)));
  }
  const float* HWY_RESTRICT reference = chunk.reference;
  float* HWY_RESTRICT normaliser = state.normaliser;
  for (size_t i = 0; i < count; ++i) {
    const float* HWY_RESTRICT logits = chunk.logits + i * row;
    float* HWY_RESTRICT weights = chunk.weights + i * row;
    float* HWY_RESTRICT inverse = chunk.inverse_normaliser + i * row;
    const auto distance = [&](size_t l) HWY_ATTR { return hn::Sub(hn::Load(d, logits + l), hn::Load(d, reference + l)); };
    ForEachExp(d, row, distance, [&](size_t l, VF weight) HWY_ATTR {
      if constexpr (kRounded) weight = RoundToBFloat16(d, weight);
      const VF z = hn::Add(hn::Load(d, normaliser + l), weight);
      hn::Store(weight, d, weights + l);
      hn::Store(z, d, normaliser + l);
      if constexpr (kInverse) hn::Store(hn::IfThenElseZero(hn::Gt(z, hn::Zero(d)), Reciprocal(d, z)), d, inverse + l);
    });
  }
  if (hn::AllFalse(d, moved)) return;
  for (size_t l = 0; l < dims.latents; ++l) {
    const VF carry = hn::Set(d, chunk.carry[l]);
    float* sum = state.sum + l * dims.head_dim_padded;
    for (size_t i = 0; i < dims.head_dim_padded; i += lanes) hn::Store(hn::Mul(hn::Load(d, sum + i), carry), d, sum + i);
  }
}

// [C, L] weights as [L, C].
HWY_INLINE void TransposeWeights(const Dims& dims, const Chunk& chunk, size_t count) {
  const size_t rounded = RoundUp(count, std::max<size_t>(4, hn::Lanes(F())));
  std::fill(chunk.weights + count * dims.latents_padded, chunk.weights + rounded * dims.latents_padded, 0.0f);
  Transpose(rounded, dims.latents_padded, chunk.weights, dims.latents_padded, chunk.weights_transposed, kChunk);
}

// S += eᵀ v, and the decay of the stretch after its first token. `rows` of weights [rows, L] and values: tokens, or pairs of
// them.
template <class Product>
HWY_INLINE void AddProduct(const LatentArgs& args, const Dims& dims, const Chunk& chunk, size_t rows, const float* weights,
                           const Rows& values, const State& state, Prefetch& prefetch) {
  const F d;
  MatMul<true, Product>(d, dims.latents, dims.head_dim_padded, rows, Left{weights, 1, dims.latents_padded}, values.data,
                        values.row, state.sum, dims.head_dim_padded, prefetch);
  if (!args.log_decay) return;
  for (size_t l = 0; l < dims.latents; ++l) {
    state.maximum[l] += chunk.total_decay[l];
    state.decay[l] += chunk.total_decay[l];
  }
}

HWY_INLINE void AddValues(const LatentArgs& args, const Dims& dims, const Chunk& chunk, size_t count, const Rows& values,
                          const State& state, Prefetch& prefetch) {
  AddProduct<Floats>(args, dims, chunk, count, chunk.weights, values, state, prefetch);
}

// The softmax of a chunk's query logits, before its division: p(l | t) = weights[t, l] scales[t], p(0 | t) = gates[t] scales[t]
// (0 without a window).
struct Softmax {
  HWY_ALIGN float gates[kChunk];
  HWY_ALIGN float scales[kChunk];
};

// Sets weights [count, L], their rows `weights_row` apart, and `softmax`; where all logits are -inf: all zero. Each pass is over
// all rows, so that none waits for the end of the one before.
HWY_INLINE void LoadSoftmax(const LatentArgs& args, const Dims& dims, const Slice& slice, int64_t token, size_t count,
                            int64_t head, float* weights, size_t weights_row, Softmax& softmax) {
  const F d;
  const size_t lanes = hn::Lanes(d);
  const size_t row = dims.latents_padded;
  const VF none = hn::Set(d, kNegativeInfinity);
  HWY_ALIGN float references[kChunk];
  for (size_t i = 0; i < count; ++i) {
    float* weight = weights + i * weights_row;
    int64_t offset = slice.Offset(args.query_logits, token + static_cast<int64_t>(i), head);
    VF high = none;
    softmax.gates[i] = kNegativeInfinity;
    if (args.window_out) {
      HWY_ALIGN float first[hn::MaxLanes(F())] = {};
      LoadRow(d, args.dtype, args.query_logits.data, offset, 1, first, lanes);
      softmax.gates[i] = first[0];
      high = hn::Set(d, first[0]);
      ++offset;
    }
    LoadRow(d, args.dtype, args.query_logits.data, offset, dims.latents, weight, row, kNegativeInfinity);
    for (size_t l = 0; l < row; l += lanes) high = hn::Max(high, hn::Load(d, weight + l));
    const VF maximum = hn::MaxOfLanes(d, high);
    references[i] = hn::GetLane(hn::IfThenZeroElse(hn::Eq(maximum, none), maximum));
  }
  for (size_t i = 0; i < count; ++i) {
    float* weight = weights + i * weights_row;
    const VF reference = hn::Set(d, references[i]);
    VF total = hn::Zero(d);
    const auto distance = [&](size_t l) HWY_ATTR { return hn::Sub(hn::Load(d, weight + l), reference); };
    ForEachExp(d, row, distance, [&](size_t l, VF exp) HWY_ATTR {
      total = hn::Add(total, exp);
      hn::Store(exp, d, weight + l);
    });
    softmax.scales[i] = hn::ReduceSum(d, total);
  }
  for (size_t i = 0; i < count; ++i) {
    softmax.gates[i] = args.window_out ? std::exp(softmax.gates[i] - references[i]) : 0.0f;
    const float total = softmax.scales[i] + softmax.gates[i];
    softmax.scales[i] = total > 0.0f ? 1.0f / total : 0.0f;
  }
}

// Probabilities p(l | t) of the tokens [token, token + count), `rows` [count, L], and p(0 | t), `gates` [count].
HWY_INLINE void LoadProbabilities(const LatentArgs& args, const Dims& dims, const Slice& slice, int64_t token, size_t count,
                                  int64_t head, float* rows, float* gates) {
  const F d;
  Softmax softmax;
  LoadSoftmax(args, dims, slice, token, count, head, rows, dims.latents_padded, softmax);
  for (size_t i = 0; i < count; ++i) {
    float* row = rows + i * dims.latents_padded;
    const VF scale = hn::Set(d, softmax.scales[i]);
    for (size_t l = 0; l < dims.latents_padded; l += hn::Lanes(d)) hn::Store(hn::Mul(hn::Load(d, row + l), scale), d, row + l);
    gates[i] = softmax.gates[i] * softmax.scales[i];
  }
}

// scores[t, s] = Σ_l left[t, l] transposed[l, s] for s <= t < count, 0 for s > t within the strip that t lies in. Rows of
// `transposed` lie kChunk apart.
template <class Product = Floats>
HWY_INLINE void TriangularScores(size_t count, size_t inner, const float* left, size_t left_row, const float* transposed,
                                 float* scores, size_t scores_row, Prefetch& prefetch) {
  const F d;
  const size_t lanes = hn::Lanes(d);
  for (size_t first = 0; first < count; first += kStrip) {
    const size_t rows = std::min(kStrip, count - first);
    const size_t end = first + rows;
    MatMul<false, Product>(d, rows, RoundUp(end, lanes), inner, Left{left + first * left_row, left_row, 1}, transposed, kChunk,
                           scores + first * scores_row, scores_row, prefetch);
    for (size_t t = first; t < end; ++t)
      std::fill(scores + t * scores_row + t + 1, scores + t * scores_row + first + kStrip, 0.0f);
  }
}

// out[t, :] += Σ_{s <= t} scores[t, s] right[s, :].
HWY_INLINE void AddLowerProduct(size_t count, size_t columns, const float* scores, const float* right, float* out,
                                Prefetch& prefetch) {
  const F d;
  for (size_t first = 0; first < count; first += kStrip) {
    const size_t rows = std::min(kStrip, count - first);
    MatMul<true>(d, rows, columns, first + rows, Left{scores + first * kChunk, kChunk, 1}, right, columns, out + first * columns,
                 columns, prefetch);
  }
}

// out[s, :] += Σ_{t >= s} scores[t, s] right[t, :].
HWY_INLINE void AddUpperProduct(size_t count, size_t columns, const float* scores, const float* right, float* out,
                                Prefetch& prefetch) {
  const F d;
  for (size_t first = 0; first < count; first += kStrip) {
    const size_t rows = std::min(kStrip, count - first);
    MatMul<true>(d, rows, columns, count - first, Left{scores + first * kChunk + first, 1, kChunk}, right + first * columns,
                 columns, out + first * columns, columns, prefetch);
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
