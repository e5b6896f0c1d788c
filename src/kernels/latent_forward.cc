// Forward pass and decoding step of latent attention; contract in latent.h, method in docs/mathematics.md.
#include "kernels/latent.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/latent_forward.cc"
#include "hwy/foreach_target.h"
// clang-format off
#include "hwy/highway.h"
#include "kernels/latent_chunk-inl.h"
#include "kernels/latent_pairs-inl.h"
// clang-format on
#include <optional>
#include <vector>

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

// Adds the window's share and stores `rows` tokens of output.
void StoreOutput(const LatentArgs& args, const Dims& dims, const Slice& slice, const LatentOutputs& outputs, int64_t token,
                 size_t rows, int64_t head, const float* gates, float* out) {
  const F d;
  const size_t lanes = hn::Lanes(d);
  for (size_t i = 0; i < rows; ++i) {
    float* row = out + i * dims.head_dim_padded;
    const int64_t t = token + static_cast<int64_t>(i);
    if (args.window_out) {
      const float* window = static_cast<const float*>(args.window_out.data) + slice.Offset(args.window_out, t, head);
      const VF gate = hn::Set(d, gates[i]);
      for (size_t j = 0; j < dims.head_dim; j += lanes) {
        const VF share = hn::LoadN(d, window + j, dims.head_dim - j);
        hn::Store(hn::MulAdd(gate, share, hn::Load(d, row + j)), d, row + j);
      }
    }
    StoreRow(d, args.dtype, row, dims.head_dim, outputs.out.data, slice.Offset(outputs.out, t, head));
  }
}

// The forward pass of several slices on one thread. kPaired: bfloat16 inputs, multiplied as pairs: shares, weights, scores and
// the state that is read are rounded to bfloat16, sums and the state that is kept are float32.
template <bool kPaired>
class ForwardPass {
 public:
  ForwardPass(const LatentArgs& args, const LatentOutputs& outputs, int64_t first, int64_t last)
      : args_(args),
        outputs_(outputs),
        first_(first),
        last_(last),
        dims_(args),
        shares_row_(dims_.latents_padded + kChunk),
        scratch_(static_cast<size_t>(last - first) * State::Floats(dims_, kChunk) + Chunk::Floats(dims_) +
                 (kPaired ? PairedChunk::Floats(dims_) : 0) + Scratch::Rounded(kChunk * shares_row_) +
                 Scratch::Rounded(kChunk * dims_.head_dim_padded)),
        chunk_(dims_, scratch_),
        shares_(scratch_.Take(kChunk * shares_row_)),
        out_(scratch_.Take(kChunk * dims_.head_dim_padded)),
        prefetch_(args.causal ? 1 : 2) {  // bidirectional passes multiply less and read as much
    if constexpr (kPaired) paired_.emplace(dims_, scratch_);
    states_.reserve(static_cast<size_t>(last - first));
    for (int64_t slice = first; slice < last; ++slice) {
      states_.emplace_back(dims_, scratch_, kChunk);
      ReadState(dims_, Slice(args, slice).PackedState(args.initial_state, dims_, args.kv_heads), states_.back());
    }
  }

  void Causal() {
    ForEachTurn(args_, first_, last_, kTurnTokens, false, [this](const Turn& turn, const Turn* next) HWY_ATTR {
      const State& state = states_[static_cast<size_t>(turn.index)];
      if (outputs_.saved != nullptr && turn.begin % kSegmentTokens == 0) {
        WriteState(dims_, state, outputs_.saved + SavedOffset(args_, dims_, turn.slice, turn.begin / kSegmentTokens));
      }
      ForEachChunk(turn, next, [&](int64_t token, size_t count) HWY_ATTR {
        for (size_t done = 0; done < count;) {
          done += CausalStretch(turn.slice, state, token + static_cast<int64_t>(done), count - done);
        }
      });
    });
    WriteStates(outputs_.final_state);
  }

  void Bidirectional() {
    const F d;
    const size_t lanes = hn::Lanes(d);
    read_queries_ = false;
    ForEachTurn(args_, first_, last_, kTurnTokens, false, [this](const Turn& turn, const Turn* next) HWY_ATTR {
      const State& state = states_[static_cast<size_t>(turn.index)];
      ForEachChunk(turn, next, [&](int64_t token, size_t count) HWY_ATTR {
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
    ForEachTurn(args_, first_, last_, kTurnTokens, false, [&, this](const Turn& turn, const Turn* next) HWY_ATTR {
      ForEachChunk(turn, next, [&](int64_t token, size_t count) HWY_ATTR {
        for (size_t g = 0; g < dims_.group; ++g) {
          LoadShares<false>(turn.slice, token, count, g);
          const int64_t head = turn.slice.first_head + static_cast<int64_t>(g);
          const Rows out = OutputRows(turn.slice, token, head);
          const float* sum = states_[static_cast<size_t>(turn.index)].sum;
          if constexpr (kPaired) {
            MatMul<false, Pairs>(d, count, dims_.head_dim_padded, dims_.latents_padded / 2,
                                 Left{paired_->shares, paired_->row, 1}, sum, dims_.head_dim_padded, out.data, out.row,
                                 prefetch_);
          } else {
            MatMul<false>(d, count, dims_.head_dim_padded, dims_.latents, Left{shares_, shares_row_, 1}, sum,
                          dims_.head_dim_padded, out.data, out.row, prefetch_);
          }
          if (out.data == out_) StoreOutput(args_, dims_, turn.slice, outputs_, token, count, head, gates_, out_);
        }
      });
    });
  }

 private:
  // Where the output of a head goes: its place, or out_ on the way to StoreOutput.
  Rows OutputRows(const Slice& slice, int64_t token, int64_t head) {
    if (args_.window_out) return {out_, dims_.head_dim_padded};
    return RowsInPlace(args_, dims_, slice, outputs_.out, token, head, out_);
  }

  // Asks for the rows that the chunk of `turn` at `token` reads and writes.
  void LookAhead(const Turn& turn, int64_t token) {
    const Slice& slice = turn.slice;
    const size_t count = static_cast<size_t>(std::min<int64_t>(turn.end - token, kChunk));
    const auto fetch = [&](const auto& view, int64_t head, DType dtype, int64_t elements) {
      FetchRows(slice, view, token, count, head, dtype, elements, prefetch_);
    };
    prefetch_.Clear();
    if (read_keys_) {
      fetch(args_.key_logits, slice.kv_head, args_.dtype, args_.latents);
      fetch(args_.values, slice.kv_head, args_.dtype, args_.head_dim);
      fetch(args_.log_decay, slice.kv_head, args_.dtype, args_.latents);
    }
    for (int64_t head = slice.first_head; read_queries_ && head < slice.first_head + static_cast<int64_t>(dims_.group); ++head) {
      fetch(args_.query_logits, head, args_.dtype, args_.latents + (args_.window_out ? 1 : 0));
      fetch(args_.window_out, head, DType::kFloat32, args_.head_dim);
      fetch(outputs_.out, head, args_.dtype, args_.head_dim);
    }
  }

  // Calls work(token, count) for the chunks of a turn; meanwhile the chunk after it is fetched.
  template <class Work>
  void ForEachChunk(const Turn& turn, const Turn* next, const Work& work) {
    constexpr int64_t kTokens = static_cast<int64_t>(kChunk);
    for (int64_t token = turn.begin; token < turn.end; token += kTokens) {
      const int64_t end = std::min(turn.end, token + kTokens);
      if (end < turn.end) {
        LookAhead(turn, end);
      } else if (next != nullptr) {
        LookAhead(*next, next->begin);
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
      const Rows out = OutputRows(slice, token, head);
      for (size_t first = 0; first < count; first += kStrip) {
        const size_t rows = std::min(kStrip, count - first);
        float* to = out.data + first * out.row;
        if constexpr (kPaired) {
          MatMul<false, Pairs>(d, rows, columns, PairsOfLatents() + (first + rows + 1) / 2,
                               Left{paired_->shares + first * paired_->row, paired_->row, 1}, paired_->sum, columns, to, out.row,
                               prefetch_);
        } else {
          MatMul<false>(d, rows, columns, dims_.latents_padded + first + rows,
                        Left{shares_ + first * shares_row_, shares_row_, 1}, state.sum, columns, to, out.row, prefetch_);
        }
      }
      if (out.data == out_) StoreOutput(args_, dims_, slice, outputs_, token, count, head, gates_, out_);
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
  Scratch scratch_;
  Chunk chunk_;
  float* shares_;  // p / z, or p [C, L], and the scores beside them [C, C]
  float* out_;     // [C, D]
  std::optional<PairedChunk> paired_;
  float gates_[kChunk];
  std::vector<State> states_;  // one a slice
  Prefetch prefetch_;
  bool read_keys_ = true, read_queries_ = true;  // by the chunks of this pass over the tokens
};

template <bool kPaired>
void RunForward(const LatentArgs& args, const LatentOutputs& outputs, int64_t first, int64_t last) {
  ForEachRun(args, first, last, State::Floats(Dims(args), kChunk), [&](int64_t begin, int64_t end) HWY_ATTR {
    ForwardPass<kPaired> pass(args, outputs, begin, end);
    return args.causal ? pass.Causal() : pass.Bidirectional();
  });
}

void Forward(const LatentArgs& args, const LatentOutputs& outputs, int64_t first, int64_t last) {
  if (kHasPairs && args.dtype == DType::kBFloat16) return RunForward<kHasPairs>(args, outputs, first, last);
  RunForward<false>(args, outputs, first, last);
}

// One token: decays and rescales the state, adds the token's value, and reads the latents for each query head.
void Step(const LatentArgs& args, const LatentOutputs& outputs, float* packed, int64_t index) {
  const F d;
  const size_t lanes = hn::Lanes(d);
  const Dims dims(args);
  const Slice slice(args, index);
  const size_t row = dims.latents_padded;
  Scratch scratch(3 * Scratch::Rounded(row) + 2 * Scratch::Rounded(dims.head_dim_padded));
  float* logits = scratch.Take(row);
  float* decay = scratch.Take(row);
  float* share = scratch.Take(row);
  float* values = scratch.Take(dims.head_dim_padded);
  float* out = scratch.Take(dims.head_dim_padded);

  const bool masked = slice.Masked(args.key_mask, 0);
  std::fill_n(decay, row, 0.0f);
  if (masked) {
    std::fill_n(logits, row, kNegativeInfinity);
    std::fill_n(values, dims.head_dim_padded, 0.0f);
  } else {
    LoadRow(d, args.dtype, args.key_logits.data, slice.Offset(args.key_logits, 0, slice.kv_head), dims.latents, logits, row,
            kNegativeInfinity);
    LoadRow(d, args.dtype, args.values.data, slice.Offset(args.values, 0, slice.kv_head), dims.head_dim, values,
            dims.head_dim_padded);
    if (args.log_decay) {
      LoadRow(d, args.dtype, args.log_decay.data, slice.Offset(args.log_decay, 0, slice.kv_head), dims.latents, decay, row);
    }
  }
  // The per-latent numbers sit at a stride in the packed state: gather, work in vectors, put back.
  const size_t packed_row = dims.head_dim + kStateExtra;
  HWY_ALIGN float carry[hn::MaxLanes(F())];
  HWY_ALIGN float weight[hn::MaxLanes(F())];
  HWY_ALIGN float maximum[hn::MaxLanes(F())];
  for (size_t l = 0; l < dims.latents; l += lanes) {
    const size_t rows = std::min(lanes, dims.latents - l);
    for (size_t r = 0; r < lanes; ++r)
      maximum[r] = r < rows ? packed[(l + r) * packed_row + dims.head_dim + 1] : kNegativeInfinity;
    const VF before = hn::Add(hn::Load(d, maximum), hn::Load(d, decay + l));
    const VF high = hn::Max(before, hn::Load(d, logits + l));
    const VF reference = hn::IfThenZeroElse(hn::Eq(high, hn::Set(d, kNegativeInfinity)), high);
    hn::Store(Exp(d, hn::Sub(before, reference)), d, carry);
    hn::Store(Exp(d, hn::Sub(hn::Load(d, logits + l), reference)), d, weight);
    hn::Store(high, d, maximum);
    for (size_t r = 0; r < rows; ++r) {
      float* state = packed + (l + r) * packed_row;
      const VF keep = hn::Set(d, carry[r]);
      const VF add = hn::Set(d, weight[r]);
      size_t j = 0;
      for (; j + lanes <= dims.head_dim; j += lanes) {
        const VF sum = hn::MulAdd(add, hn::Load(d, values + j), hn::Mul(keep, hn::LoadU(d, state + j)));
        hn::StoreU(sum, d, state + j);
      }
      for (; j < dims.head_dim; ++j) state[j] = state[j] * carry[r] + weight[r] * values[j];
      state[dims.head_dim] = state[dims.head_dim] * carry[r] + weight[r];
      state[dims.head_dim + 1] = maximum[r];
      state[dims.head_dim + 2] += decay[l + r];
    }
  }
  for (size_t g = 0; g < dims.group; ++g) {
    const int64_t head = slice.first_head + static_cast<int64_t>(g);
    float gate;
    LoadProbabilities(args, dims, slice, 0, 1, head, share, &gate);
    for (size_t l = 0; l < dims.latents; ++l) {
      const float z = packed[l * packed_row + dims.head_dim];
      share[l] = z > 0.0f ? share[l] / z : 0.0f;
    }
    size_t j = 0;
    for (; j + lanes <= dims.head_dim; j += lanes) {
      VF total = hn::Zero(d);
      VF other = hn::Zero(d);
      size_t l = 0;
      for (; l + 2 <= dims.latents; l += 2) {
        total = hn::MulAdd(hn::Set(d, share[l]), hn::LoadU(d, packed + l * packed_row + j), total);
        other = hn::MulAdd(hn::Set(d, share[l + 1]), hn::LoadU(d, packed + (l + 1) * packed_row + j), other);
      }
      if (l < dims.latents) total = hn::MulAdd(hn::Set(d, share[l]), hn::LoadU(d, packed + l * packed_row + j), total);
      hn::Store(hn::Add(total, other), d, out + j);
    }
    for (; j < dims.head_dim_padded; ++j) {
      out[j] = 0.0f;
      for (size_t l = 0; l < dims.latents && j < dims.head_dim; ++l) out[j] += share[l] * packed[l * packed_row + j];
    }
    StoreOutput(args, dims, slice, outputs, 0, 1, head, &gate, out);
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(Forward);
HWY_EXPORT(Step);

int64_t LatentSlices(const LatentArgs& args) { return args.sequences * args.kv_heads; }

int64_t LatentSavedFloats(const LatentArgs& args) {
  const int64_t state = args.latents * (args.head_dim + kStateExtra);
  if (!args.causal) return args.sequences * args.kv_heads * state;
  const int64_t segments = (args.time + kSegmentTokens - 1) / kSegmentTokens;
  const int64_t slots = args.cu_seqlens == nullptr ? args.sequences * segments : args.time / kSegmentTokens + args.sequences;
  return args.kv_heads * slots * state;
}

void LatentForward(const LatentArgs& args, const LatentOutputs& outputs, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(Forward)(args, outputs, first, last);
}

void LatentStep(const LatentArgs& args, const LatentOutputs& outputs, float* state, int64_t slice) {
  HWY_DYNAMIC_DISPATCH(Step)(args, outputs, state, slice);
}

void MergeStates(int64_t latents, int64_t head_dim, const float* left, const float* right, float* out) {
  for (int64_t l = 0; l < latents;
       ++l, left += head_dim + kStateExtra, right += head_dim + kStateExtra, out += head_dim + kStateExtra) {
    const float left_maximum = left[head_dim + 1] + right[head_dim + 2];
    const float maximum = std::max(left_maximum, right[head_dim + 1]);
    const float decay = left[head_dim + 2] + right[head_dim + 2];
    const float reference = std::isinf(maximum) ? 0.0f : maximum;
    const float keep = std::exp(left_maximum - reference);
    const float add = std::exp(right[head_dim + 1] - reference);
    for (int64_t j = 0; j <= head_dim; ++j) out[j] = keep * left[j] + add * right[j];
    out[head_dim + 1] = maximum;
    out[head_dim + 2] = decay;
  }
}

}  // namespace latte::kernels
#endif
