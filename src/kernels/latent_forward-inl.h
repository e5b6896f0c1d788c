// The forward pass of latent attention over several slices; contract in latent.h, method in docs/mathematics.md. Included once
// per SIMD target.
#if defined(LATTE_KERNELS_LATENT_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_LATENT_FORWARD_INL_H_
#undef LATTE_KERNELS_LATENT_FORWARD_INL_H_
#else
#define LATTE_KERNELS_LATENT_FORWARD_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "hwy/highway.h"
#include "kernels/latent_chunk-inl.h"
#include "kernels/latent_pairs-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The forward pass of several slices on one thread. kPaired: bfloat16 inputs, multiplied as pairs: shares, weights, scores and
// the state that is read are rounded to bfloat16, sums and the state that is kept are float32.
template <bool kPaired>
class LatentForwardPass {
 public:
  // Scratch memory for so many slices.
  static size_t ScratchFloats(const LatentArgs& args, int64_t slices) {
    const Dims dims(args);
    return static_cast<size_t>(slices) * State::Floats(dims, kChunk) + Chunk::Floats(dims) +
           (kPaired ? PairedChunk::Floats(dims) : 0) + Scratch::Rounded(kChunk * SharesRow(dims)) +
           Scratch::Rounded(kChunk * dims.head_dim_padded);
  }

  LatentForwardPass(const LatentArgs& args, const LatentOutputs& outputs, int64_t first, int64_t last, Scratch& scratch)
      : args_(args),
        outputs_(outputs),
        first_(first),
        last_(last),
        dims_(args),
        shares_row_(SharesRow(dims_)),
        chunk_(dims_, scratch),
        shares_(scratch.Take(kChunk * shares_row_)),
        out_(scratch.Take(kChunk * dims_.head_dim_padded)),
        prefetch_(args.causal ? 1 : 2) {  // bidirectional passes multiply less and read as much
    if constexpr (kPaired) paired_.emplace(dims_, scratch);
    states_.reserve(static_cast<size_t>(last - first));
    for (int64_t slice = first; slice < last; ++slice) {
      states_.emplace_back(dims_, scratch, kChunk);
      ReadState(dims_, Slice(args, slice).PackedState(args.initial_state, dims_, args.kv_heads), states_.back());
    }
  }

  // All there is to do, with the window's outputs read from the call's arguments.
  void Run() {
    Start();
    ForEachTurn(args_, first_, last_, kTurnTokens, false, [this](const Turn& turn, const Turn* next) HWY_ATTR {
      if (args_.causal && outputs_.saved != nullptr && turn.begin % kSegmentTokens == 0) {
        WriteState(dims_, states_[static_cast<size_t>(turn.index)],
                   outputs_.saved + SavedOffset(args_, dims_, turn.slice, turn.begin / kSegmentTokens));
      }
      RunTurn(turn, [&](Prefetch& prefetch) {
        if (next != nullptr) LookAhead(*next, next->begin, prefetch);
      });
    });
    Finish();
  }

  // Before the first turn: a bidirectional pass reads all keys.
  void Start() {
    if (!args_.causal) ReadKeys();
  }

  // From the next turn on the window's outputs of the turn's slice are read here, those of token t at
  // rows + (t - first) * group * head_dim, and not in the call's arguments.
  void ReadWindow(const float* rows, int64_t first) {
    window_ = rows;
    window_first_ = first;
  }

  // The outputs of the tokens of a turn, which follow those of the slice's turn before it. Meanwhile the rows of the chunk after
  // the one at work are fetched, and those that ahead(prefetch) asks for during the last.
  template <class Ahead>
  void RunTurn(const Turn& turn, const Ahead& ahead) {
    const State& state = states_[static_cast<size_t>(turn.index)];
    ForEachChunk(turn, ahead, [&](int64_t token, size_t count) HWY_ATTR {
      if (!args_.causal) return BidirectionalChunk(turn.slice, state, token, count);
      for (size_t done = 0; done < count;) {
        done += CausalStretch(turn.slice, state, token + static_cast<int64_t>(done), count - done);
      }
    });
  }

  // After the last turn.
  void Finish() {
    if (args_.causal) WriteStates(outputs_.final_state);
  }

  // Asks for the rows that the chunk of `turn` at `token` reads and writes.
  void LookAhead(const Turn& turn, int64_t token, Prefetch& prefetch) const {
    const Slice& slice = turn.slice;
    const size_t count = static_cast<size_t>(std::min<int64_t>(turn.end - token, kChunk));
    const auto fetch = [&](const auto& view, int64_t head, DType dtype, int64_t elements) {
      FetchRows(slice, view, token, count, head, dtype, elements, prefetch);
    };
    // What is used first comes last: it is still in the first-level cache then.
    for (int64_t head = slice.first_head; read_queries_ && head < slice.first_head + static_cast<int64_t>(dims_.group); ++head) {
      fetch(outputs_.out, head, args_.dtype, args_.head_dim);
      if (window_ == nullptr) fetch(args_.window_out, head, DType::kFloat32, args_.head_dim);
      fetch(args_.query_logits, head, args_.dtype, args_.latents + (args_.window_out ? 1 : 0));
    }
    if (read_keys_) {
      fetch(args_.values, slice.kv_head, args_.dtype, args_.head_dim);
      fetch(args_.log_decay, slice.kv_head, args_.dtype, args_.latents);
      fetch(args_.key_logits, slice.kv_head, args_.dtype, args_.latents);
    }
  }

 private:
  static size_t SharesRow(const Dims& dims) { return dims.latents_padded + kChunk; }

  // Sums over all tokens, and their averages.
  void ReadKeys() {
    const F d;
    const size_t lanes = hn::Lanes(d);
    read_queries_ = false;
    ForEachTurn(args_, first_, last_, kTurnTokens, false, [this](const Turn& turn, const Turn* next) HWY_ATTR {
      const State& state = states_[static_cast<size_t>(turn.index)];
      const auto ahead = [&](Prefetch& prefetch) {
        if (next != nullptr) LookAhead(*next, next->begin, prefetch);
      };
      ForEachChunk(turn, ahead, [&](int64_t token, size_t count) HWY_ATTR {
        // Values that are read once are read where they lie, unless some are masked: those may be anything, NaN included.
        Rows values{chunk_.values, dims_.head_dim_padded};
        if (!args_.key_mask)
          values = RowsInPlace(args_, dims_, turn.slice, args_.values, token, turn.slice.kv_head, chunk_.values);
        if (values.data == chunk_.values) {
          LoadChunk(args_, dims_, turn.slice, token, count, chunk_);
        } else {
          LoadChunk<false>(args_, dims_, turn.slice, token, count, chunk_);
        }
        FindReference(dims_, chunk_, count, state.maximum);
        WeighStretch<false, kPaired>(dims_, chunk_, count, state);
        if constexpr (kPaired) PairTokens(count);
        Add(count, values, state);
      });
    });
    WriteStates(outputs_.saved);
    for (const State& state : states_) {  // averages: S / z
      for (size_t l = 0; l < dims_.latents; ++l) {
        const VF inverse = hn::Set(d, state.normaliser[l] > 0.0f ? 1.0f / state.normaliser[l] : 0.0f);
        float* sum = state.sum + l * dims_.head_dim_padded;
        for (size_t j = 0; j < dims_.head_dim_padded; j += lanes) {
          hn::Store(hn::Mul(hn::Load(d, sum + j), inverse), d, sum + j);
        }
      }
      if constexpr (kPaired) PairNeighbours(dims_.latents_padded, state.sum, dims_.head_dim_padded, state.sum);
    }
    read_queries_ = true;
    read_keys_ = false;
  }

  // The outputs of the tokens [token, token + count), given the averages of the latents.
  void BidirectionalChunk(const Slice& slice, const State& state, int64_t token, size_t count) {
    for (size_t g = 0; g < dims_.group; ++g) {
      LoadShares<false>(slice, token, count, g);
      const int64_t head = slice.first_head + static_cast<int64_t>(g);
      const Rows out = RowsInPlace(args_, dims_, slice, outputs_.out, token, head, out_);
      if constexpr (kPaired) {
        const Left shares{paired_->shares, paired_->row, 1};
        Read(slice, token, head, 0, count, dims_.latents_padded / 2, shares, state.sum, out);
      } else {
        Read(slice, token, head, 0, count, dims_.latents, {shares_, shares_row_, 1}, state.sum, out);
      }
      StoreOutput(slice, token, count, head, out);
    }
  }

  // Sets rows [first, first + rows) of a head's outputs from `token` on: the product with `right` [inner, D], and the window's
  // share.
  void Read(const Slice& slice, int64_t token, int64_t head, size_t first, size_t rows, size_t inner, const Left& left,
            const float* right, const Rows& out) {
    const F d;
    const size_t columns = dims_.head_dim_padded;
    using Product = std::conditional_t<kPaired, Pairs, Floats>;
    float* to = out.data + first * out.row;
    if (args_.window_out) {
      for (size_t i = 0; i < rows; ++i) {
        const float* window = WindowRow(slice, token + static_cast<int64_t>(first + i), head);
        const VF gate = hn::Set(d, gates_[first + i]);
        float* row = to + i * out.row;
        size_t j = 0;
        for (; j + hn::Lanes(d) <= dims_.head_dim; j += hn::Lanes(d))
          hn::StoreU(hn::Mul(gate, hn::LoadU(d, window + j)), d, row + j);
        if (j < columns) hn::StoreU(hn::Mul(gate, hn::LoadN(d, window + j, dims_.head_dim - j)), d, row + j);
      }
      MatMul<true, Product>(d, rows, columns, inner, left, right, columns, to, out.row, prefetch_);
    } else {
      MatMul<false, Product>(d, rows, columns, inner, left, right, columns, to, out.row, prefetch_);
    }
  }

  // What the window gives token t's query head: [D].
  const float* WindowRow(const Slice& slice, int64_t t, int64_t head) const {
    if (window_ == nullptr) return static_cast<const float*>(args_.window_out.data) + slice.Offset(args_.window_out, t, head);
    const int64_t row = (t - window_first_) * static_cast<int64_t>(dims_.group) + head - slice.first_head;
    return window_ + row * args_.head_dim;
  }

  // Stores outputs that weren't written in their place.
  void StoreOutput(const Slice& slice, int64_t token, size_t count, int64_t head, const Rows& out) const {
    if (out.data != out_) return;
    for (size_t i = 0; i < count; ++i) {
      StoreRow(F(), args_.dtype, out_ + i * dims_.head_dim_padded, dims_.head_dim, outputs_.out.data,
               slice.Offset(outputs_.out, token + static_cast<int64_t>(i), head));
    }
  }

  // Calls work(token, count) for the chunks of a turn; meanwhile the chunk after it is fetched, or what ahead(prefetch) asks for.
  template <class Ahead, class Work>
  void ForEachChunk(const Turn& turn, const Ahead& ahead, const Work& work) {
    constexpr int64_t kTokens = static_cast<int64_t>(kChunk);
    for (int64_t token = turn.begin; token < turn.end; token += kTokens) {
      const int64_t end = std::min(turn.end, token + kTokens);
      prefetch_.Clear();
      if (end < turn.end) {
        LookAhead(turn, end, prefetch_);
      } else {
        ahead(prefetch_);
      }
      work(token, static_cast<size_t>(end - token));
    }
  }

  // Reads and writes the tokens [token, token + left) that share a reference; returns how many these are.
  size_t CausalStretch(const Slice& slice, const State& state, int64_t token, size_t left) {
    const F d;
    const size_t columns = dims_.head_dim_padded;
    chunk_.values = state.sum + dims_.StateFloats();
    LoadChunk(args_, dims_, slice, token, left, chunk_);
    if (args_.log_decay) DecayState(dims_, chunk_.log_decay, state);
    const size_t count = MeasureStretch(args_, dims_, chunk_, left, state.maximum);
    WeighStretch<true, kPaired>(dims_, chunk_, count, state);
    if constexpr (kPaired) {
      PairTokens(count);
      PairNeighbours(dims_.latents_padded, state.sum, dims_.head_dim_padded, paired_->sum);
      PairEachRow(count, chunk_.weights, dims_.latents_padded, paired_->weights);
      const size_t rounded = RoundUp(count, std::max<size_t>(4, hn::Lanes(d)));
      Transpose(rounded, PairsOfLatents(), paired_->weights, PairsOfLatents(), chunk_.weights_transposed, kChunk);
    } else {
      TransposeWeights(dims_, chunk_, count);
    }
    for (size_t g = 0; g < dims_.group; ++g) {
      LoadShares<true>(slice, token, count, g);
      float* scores = shares_ + dims_.latents_padded;
      if constexpr (kPaired) {
        TriangularScores<Pairs>(count, PairsOfLatents(), paired_->shares, paired_->row, chunk_.weights_transposed, scores,
                                shares_row_, prefetch_);
        for (size_t i = 0; i < count; ++i) {
          // Up to a whole vector; what lies beyond the strip is not read.
          PairColumns(d, scores + i * shares_row_, RoundUp(i / kStrip * kStrip + kStrip, hn::Lanes(d)),
                      paired_->shares + i * paired_->row + PairsOfLatents());
        }
      } else {
        TriangularScores(count, dims_.latents, shares_, shares_row_, chunk_.weights_transposed, scores, shares_row_, prefetch_);
      }
      // [shares, scores] [S; v]: what the tokens read from the state and from each other.
      const int64_t head = slice.first_head + static_cast<int64_t>(g);
      const Rows out = RowsInPlace(args_, dims_, slice, outputs_.out, token, head, out_);
      for (size_t first = 0; first < count; first += kStrip) {
        const size_t rows = std::min(kStrip, count - first);
        if constexpr (kPaired) {
          const Left shares{paired_->shares + first * paired_->row, paired_->row, 1};
          Read(slice, token, head, first, rows, PairsOfLatents() + (first + rows + 1) / 2, shares, paired_->sum, out);
        } else {
          const Left shares{shares_ + first * shares_row_, shares_row_, 1};
          Read(slice, token, head, first, rows, dims_.latents_padded + first + rows, shares, state.sum, out);
        }
      }
      StoreOutput(slice, token, count, head, out);
    }
    Add(count, {chunk_.values, columns}, state);
    return count;
  }

  size_t PairsOfLatents() const { return dims_.latents_padded / 2; }

  // The chunk's weights and values as pairs of tokens.
  void PairTokens(size_t count) {
    PairNeighbours(count, chunk_.weights, dims_.latents_padded, paired_->weights_of_tokens);
    PairNeighbours(count, chunk_.values, dims_.head_dim_padded, paired_->values);
  }

  void Add(size_t count, const Rows& values, const State& state) {
    if constexpr (kPaired) {
      AddProduct<Pairs>(args_, dims_, chunk_, (count + 1) / 2, paired_->weights_of_tokens,
                        {paired_->values, dims_.head_dim_padded}, state, prefetch_);
    } else {
      AddValues(args_, dims_, chunk_, count, values, state, prefetch_);
    }
  }

  // shares = p(l | t), divided by z with kNormalise.
  template <bool kNormalise>
  void LoadShares(const Slice& slice, int64_t token, size_t count, size_t g) {
    const F d;
    const size_t lanes = hn::Lanes(d);
    Softmax softmax;
    LoadSoftmax(args_, dims_, slice, token, count, slice.first_head + static_cast<int64_t>(g), shares_, shares_row_, softmax);
    for (size_t i = 0; i < count; ++i) {
      float* share = shares_ + i * shares_row_;
      gates_[i] = softmax.gates[i] * softmax.scales[i];
      const VF scale = hn::Set(d, softmax.scales[i]);
      const float* inverse = chunk_.inverse_normaliser + i * dims_.latents_padded;
      for (size_t l = 0; l < dims_.latents_padded; l += lanes) {
        VF factor = scale;
        if constexpr (kNormalise) factor = hn::Mul(scale, hn::Load(d, inverse + l));
        hn::Store(hn::Mul(hn::Load(d, share + l), factor), d, share + l);
      }
      if constexpr (kPaired) PairColumns(d, share, dims_.latents_padded, paired_->shares + i * paired_->row);
    }
  }

  void WriteStates(float* packed) const {
    if (packed == nullptr) return;
    for (int64_t slice = first_; slice < last_; ++slice) {
      WriteState(dims_, states_[static_cast<size_t>(slice - first_)],
                 Slice(args_, slice).PackedState(packed, dims_, args_.kv_heads));
    }
  }

  const LatentArgs& args_;
  const LatentOutputs& outputs_;
  const int64_t first_, last_;
  const Dims dims_;
  const size_t shares_row_;
  Chunk chunk_;
  float* shares_;  // p / z, or p [C, L], and the scores beside them [C, C]
  float* out_;     // [C, D]
  std::optional<PairedChunk> paired_;
  float gates_[kChunk];
  std::vector<State> states_;  // one a slice
  Prefetch prefetch_;
  const float* window_ = nullptr;  // where it isn't in the call's arguments: of token window_first_
  int64_t window_first_ = 0;
  bool read_keys_ = true, read_queries_ = true;  // by the chunks of this pass over the tokens
};

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
