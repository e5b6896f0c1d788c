// Backward pass of latent attention; contract in latent.h, derivation in docs/mathematics.md. Inside a stretch, with W = p / z, A
// = tril(W eᵀ), y = A v + W S: everything is recomputed from the states that the forward pass kept, so that memory stays linear
// and small.
#include "kernels/latent.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/latent_backward.cc"
#include "hwy/foreach_target.h"
// clang-format off
#include "hwy/highway.h"
#include "kernels/latent_chunk-inl.h"
#include "kernels/latent_gradient-inl.h"
#include "kernels/latent_pairs-inl.h"
// clang-format on
#include <optional>
#include <vector>

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

// A stretch of a segment, and the state before it.
struct Stretch {
  int64_t token;
  size_t count;
};

// The backward pass of several slices on one thread, causal. kPaired: bfloat16 inputs, with weights and shares rounded to it, and
// multiplied as pairs where that loses nothing, or only digits of the gradient of values. Gradients of logits are differences of
// what the latents give: the products they come from are float32.
template <bool kPaired>
class CausalBackward {
 public:
  CausalBackward(const LatentArgs& args, const LatentGradients& gradients, int64_t first, int64_t last)
      : args_(args),
        gradients_(gradients),
        first_(first),
        last_(last),
        dims_(args),
        scratch_(Chunk::Floats(dims_) + QueryChunk::Floats(dims_) + (kPaired ? PairedBackward::Floats(dims_) : 0) +
                 static_cast<size_t>(last - first) * StateGradient::Floats(dims_) + 2 * Scratch::Rounded(dims_.StateFloats()) +
                 2 * Scratch::Rounded(kChunk * kChunk) + 2 * Scratch::Rounded(kChunk * dims_.latents_padded) +
                 2 * Scratch::Rounded(kChunk * dims_.head_dim_padded) +
                 Scratch::Rounded(std::max(dims_.latents_padded, dims_.head_dim_padded))),
        state_(SnapshotOf(0)),
        chunk_(dims_, scratch_),
        query_(dims_, scratch_),
        sum_transposed_(scratch_.Take(dims_.StateFloats())),
        grad_sum_transposed_(scratch_.Take(dims_.StateFloats())),
        scores_(scratch_.Take(kChunk * kChunk)),
        grad_scores_(scratch_.Take(kChunk * kChunk)),
        grad_weights_(scratch_.Take(kChunk * dims_.latents_padded)),
        grad_normalisers_(scratch_.Take(kChunk * dims_.latents_padded)),
        values_transposed_(scratch_.Take(kChunk * dims_.head_dim_padded)),
        grad_values_(scratch_.Take(kChunk * dims_.head_dim_padded)),
        row_(scratch_.Take(std::max(dims_.latents_padded, dims_.head_dim_padded))) {
    if constexpr (kPaired) paired_.emplace(dims_, scratch_);
    carried_.reserve(static_cast<size_t>(last - first));
    for (int64_t slice = first; slice < last; ++slice) carried_.push_back(Start(Slice(args, slice)));
  }

  void Run() {
    ForEachTurn(args_, first_, last_, kSegmentTokens, true, [this](const Turn& turn, const Turn* next) HWY_ATTR {
      ReplaySegment(turn);
      for (size_t i = stretches_.size(); i-- > 0;) {
        prefetch_.Clear();
        if (i > 0) {
          FetchQueries(turn.slice, stretches_[i - 1].token, stretches_[i - 1].count);
        } else if (next != nullptr) {
          FetchKeys(next->slice, next->begin, std::min<size_t>(kChunk, static_cast<size_t>(next->end - next->begin)));
        }
        state_ = SnapshotOf(i);
        StretchBackward(turn.slice, stretches_[i], carried_[static_cast<size_t>(turn.index)]);
      }
    });
    for (int64_t slice = first_; slice < last_; ++slice)
      Finish(Slice(args_, slice), carried_[static_cast<size_t>(slice - first_)]);
  }

 private:
  // The state before a segment's stretch i.
  State SnapshotOf(size_t i) {
    const size_t size = State::Floats(dims_);
    while (snapshots_.size() <= i) {
      snapshots_.push_back(hwy::AllocateAligned<float>(size));
      if (!snapshots_.back()) throw std::bad_alloc();
    }
    return {dims_, snapshots_[i].get()};
  }

  StateGradient Start(const Slice& slice) {
    StateGradient carried(dims_, scratch_);
    const float* grad = slice.PackedState(gradients_.grad_final_state, dims_, args_.kv_heads);
    if (grad == nullptr) return carried;
    const float* final_state = slice.PackedState(gradients_.final_state, dims_, args_.kv_heads);
    const size_t packed_row = dims_.head_dim + kStateExtra;
    for (size_t l = 0; l < dims_.latents; ++l) {
      const float* row = grad + l * packed_row;
      std::copy_n(row, dims_.head_dim, carried.sum + l * dims_.head_dim_padded);
      carried.normaliser[l] = row[dims_.head_dim];
      carried.decay[l] = row[dims_.head_dim + 2];
      if (final_state == nullptr) continue;
      for (size_t j = 0; j <= dims_.head_dim; ++j) {
        carried.log_weight[l] += static_cast<double>(row[j]) * static_cast<double>(final_state[l * packed_row + j]);
      }
    }
    return carried;
  }

  void Finish(const Slice& slice, const StateGradient& carried) {
    float* grad = slice.PackedState(gradients_.grad_initial_state, dims_, args_.kv_heads);
    if (grad == nullptr) return;
    const float* initial = slice.PackedState(args_.initial_state, dims_, args_.kv_heads);
    const size_t packed_row = dims_.head_dim + kStateExtra;
    for (size_t l = 0; l < dims_.latents; ++l) {
      float* row = grad + l * packed_row;
      std::copy_n(carried.sum + l * dims_.head_dim_padded, dims_.head_dim, row);
      row[dims_.head_dim] = carried.normaliser[l];
      double grad_maximum = 0.0;
      for (size_t j = 0; initial != nullptr && j <= dims_.head_dim; ++j) {
        grad_maximum += static_cast<double>(row[j]) * static_cast<double>(initial[l * packed_row + j]);
      }
      row[dims_.head_dim + 1] = static_cast<float>(grad_maximum);
      row[dims_.head_dim + 2] = carried.decay[l];
    }
  }

  void FetchKeys(const Slice& slice, int64_t token, size_t count) {
    const auto fetch = [&](const View& view, int64_t elements) {
      FetchRows(slice, view, token, count, slice.kv_head, args_.dtype, elements, prefetch_);
    };
    fetch(args_.key_logits, args_.latents);
    fetch(args_.values, args_.head_dim);
    fetch(args_.log_decay, args_.latents);
  }

  // What a stretch reads and writes besides keys and values, which its segment's replay has read before.
  void FetchQueries(const Slice& slice, int64_t token, size_t count) {
    const auto fetch = [&](const auto& view, int64_t head, DType dtype, int64_t elements) {
      FetchRows(slice, view, token, count, head, dtype, elements, prefetch_);
    };
    const int64_t gate = args_.window_out ? 1 : 0;
    for (int64_t head = slice.first_head; head < slice.first_head + static_cast<int64_t>(dims_.group); ++head) {
      fetch(args_.query_logits, head, args_.dtype, args_.latents + gate);
      fetch(args_.window_out, head, DType::kFloat32, args_.head_dim);
      fetch(gradients_.grad_out, head, args_.dtype, args_.head_dim);
      fetch(gradients_.grad_query_logits, head, args_.dtype, args_.latents + gate);
      fetch(gradients_.grad_window_out, head, DType::kFloat32, args_.head_dim);
    }
    fetch(gradients_.grad_key_logits, slice.kv_head, args_.dtype, args_.latents);
    fetch(gradients_.grad_values, slice.kv_head, args_.dtype, args_.head_dim);
    fetch(gradients_.grad_log_decay, slice.kv_head, args_.dtype, args_.latents);
  }

  // Runs the state through a segment again and keeps it before each stretch.
  void ReplaySegment(const Turn& turn) {
    const auto& [slice, index, begin, end] = turn;
    stretches_.clear();
    state_ = SnapshotOf(0);
    ReadState(dims_, gradients_.saved + SavedOffset(args_, dims_, slice, begin / kSegmentTokens), state_);
    for (int64_t token = begin; token < end;) {
      const int64_t next_chunk = (token / static_cast<int64_t>(kChunk) + 1) * static_cast<int64_t>(kChunk);
      const size_t left = static_cast<size_t>(std::min(end, next_chunk) - token);
      LoadChunk(args_, dims_, slice, token, left, chunk_);
      if (args_.log_decay) DecayState(dims_, chunk_.log_decay, state_);
      const size_t count = MeasureStretch(args_, dims_, chunk_, left, state_.maximum);
      stretches_.push_back({token, count});
      token += static_cast<int64_t>(count);
      if (token == end) break;
      const State before = state_;
      state_ = SnapshotOf(stretches_.size());
      std::copy_n(before.sum, State::Floats(dims_), state_.sum);
      prefetch_.Clear();
      FetchKeys(slice, token, std::min<size_t>(kChunk, static_cast<size_t>(end - token)));
      WeighStretch<false, kPaired>(dims_, chunk_, count, state_);
      if constexpr (kPaired) {
        PairNeighbours(count, chunk_.weights, dims_.latents_padded, paired_->weights_of_tokens);
        PairNeighbours(count, chunk_.values, dims_.head_dim_padded, paired_->values_of_tokens);
        AddProduct<Pairs>(args_, dims_, chunk_, (count + 1) / 2, paired_->weights_of_tokens,
                          {paired_->values_of_tokens, dims_.head_dim_padded}, state_, prefetch_);
      } else {
        AddValues(args_, dims_, chunk_, count, {chunk_.values, dims_.head_dim_padded}, state_, prefetch_);
      }
    }
  }

  void StretchBackward(const Slice& slice, const Stretch& stretch, StateGradient& carried) {
    const F d;
    const size_t lanes = hn::Lanes(d);
    const size_t row = dims_.latents_padded;
    const size_t columns = dims_.head_dim_padded;
    const size_t count = stretch.count;
    LoadChunk(args_, dims_, slice, stretch.token, count, chunk_);
    MeasureStretch(args_, dims_, chunk_, count, state_.maximum);
    WeighStretch<true, kPaired>(dims_, chunk_, count, state_);
    // What the state after the stretch asks of its keys and values.
    const size_t rounded = RoundUp(count, std::max<size_t>(4, lanes));
    if constexpr (kPaired) {
      PairedBackward& paired = *paired_;
      PairEachRow(count, chunk_.weights, row, paired.weights);
      PairEachRow(count, chunk_.values, columns, paired.values);
      Transpose(rounded, paired.latents, paired.weights, paired.latents, chunk_.weights_transposed, kChunk);
      Transpose(rounded, paired.columns, paired.values, paired.columns, values_transposed_, kChunk);
      PairNeighbours(row, carried.sum, columns, paired.grad_sum);
      MatMul<false, Pairs>(d, count, columns, paired.latents, Left{paired.weights, paired.latents, 1}, paired.grad_sum, columns,
                           grad_values_, columns, prefetch_);
    } else {
      TransposeWeights(dims_, chunk_, count);
      std::fill(chunk_.values + count * columns, chunk_.values + rounded * columns, 0.0f);
      Transpose(rounded, columns, chunk_.values, columns, values_transposed_, kChunk);
      MatMul<false>(d, count, columns, dims_.latents, Left{chunk_.weights, row, 1}, carried.sum, columns, grad_values_, columns,
                    prefetch_);
    }
    Transpose(row, columns, state_.sum, columns, sum_transposed_, row);
    Transpose(row, columns, carried.sum, columns, grad_sum_transposed_, row);
    MatMul<false>(d, count, row, dims_.head_dim, Left{chunk_.values, columns, 1}, grad_sum_transposed_, row, grad_weights_, row,
                  prefetch_);
    std::fill_n(grad_normalisers_, count * row, 0.0f);
    for (size_t g = 0; g < dims_.group; ++g) {
      QueryBackward(slice, stretch, slice.first_head + static_cast<int64_t>(g), carried);
    }

    // z[t] sums the weights up to t: a weight's gradient sums those of z from its token on.
    for (size_t l = 0; l < row; l += lanes) {
      VF sum = hn::Load(d, carried.normaliser + l);
      for (size_t i = count; i-- > 0;) {
        float* grad = grad_weights_ + i * row + l;
        sum = hn::Add(sum, hn::Load(d, grad_normalisers_ + i * row + l));
        hn::Store(hn::Mul(hn::Add(hn::Load(d, grad), sum), hn::Load(d, chunk_.weights + i * row + l)), d, grad);
      }
      hn::Store(hn::Mul(sum, hn::Load(d, chunk_.carry + l)), d, carried.normaliser + l);
    }
    for (size_t i = count; i-- > 0;) {
      StoreKeyGradients(args_, dims_, slice, gradients_, stretch.token + static_cast<int64_t>(i), grad_weights_ + i * row,
                        grad_values_ + i * columns, carried, row_);
    }
    for (size_t l = 0; l < dims_.latents; ++l) {
      if (chunk_.carry[l] == 1.0f) continue;
      const VF carry = hn::Set(d, chunk_.carry[l]);
      float* sum = carried.sum + l * columns;
      for (size_t j = 0; j < columns; j += lanes) hn::Store(hn::Mul(hn::Load(d, sum + j), carry), d, sum + j);
    }
  }

  void QueryBackward(const Slice& slice, const Stretch& stretch, int64_t head, StateGradient& carried) {
    const F d;
    const size_t lanes = hn::Lanes(d);
    const size_t row = dims_.latents_padded;
    const size_t columns = dims_.head_dim_padded;
    const size_t count = stretch.count;
    LoadGradOut(args_, dims_, slice, gradients_, stretch.token, count, head, query_.grad_out);
    LoadProbabilities(args_, dims_, slice, stretch.token, count, head, query_.probabilities, query_.gates);
    for (size_t i = 0; i < count * row; i += lanes) {
      VF share = hn::Mul(hn::Load(d, query_.probabilities + i), hn::Load(d, chunk_.inverse_normaliser + i));
      if constexpr (kPaired) share = RoundToBFloat16(d, share);
      hn::Store(share, d, query_.shares + i);
    }
    QueryProducts(count, carried);
    for (size_t i = 0; i < count; ++i) {
      float* grad = query_.grad_shares + i * row;
      for (size_t l = 0; l < row; l += lanes) {
        const VF grad_p = hn::Mul(hn::Load(d, grad + l), hn::Load(d, chunk_.inverse_normaliser + i * row + l));
        float* grad_z = grad_normalisers_ + i * row + l;
        hn::Store(hn::NegMulAdd(grad_p, hn::Load(d, query_.shares + i * row + l), hn::Load(d, grad_z)), d, grad_z);
        hn::Store(grad_p, d, grad + l);
      }
      StoreQueryGradient(args_, dims_, slice, gradients_, stretch.token + static_cast<int64_t>(i), head,
                         query_.probabilities + i * row, query_.gates[i], query_.grad_out + i * columns, grad);
    }
  }

  // From a head's shares and output gradients: its part of the gradients of weights, values and state, and those of its shares.
  void QueryProducts(size_t count, StateGradient& carried) {
    const F d;
    const size_t row = dims_.latents_padded;
    const size_t columns = dims_.head_dim_padded;
    if constexpr (kPaired) {
      PairedQueryProducts(count, carried);
    } else {
      TriangularScores(count, dims_.latents, query_.shares, row, chunk_.weights_transposed, scores_, kChunk, prefetch_);
      TriangularScores(count, dims_.head_dim, query_.grad_out, columns, values_transposed_, grad_scores_, kChunk, prefetch_);
      AddUpperProduct(count, columns, scores_, query_.grad_out, grad_values_, prefetch_);
      MatMul<true>(d, dims_.latents, columns, count, Left{query_.shares, 1, row}, query_.grad_out, columns, carried.sum, columns,
                   prefetch_);
    }
    AddUpperProduct(count, row, grad_scores_, query_.shares, grad_weights_, prefetch_);
    MatMul<false>(d, count, row, dims_.head_dim, Left{query_.grad_out, columns, 1}, sum_transposed_, row, query_.grad_shares, row,
                  prefetch_);
    AddLowerProduct(count, row, grad_scores_, chunk_.weights, query_.grad_shares, prefetch_);
  }

  // Those of its products whose operands are bfloat16 as they are, and the one of the scores, rounded.
  void PairedQueryProducts(size_t count, StateGradient& carried) {
    const F d;
    const size_t row = dims_.latents_padded;
    const size_t columns = dims_.head_dim_padded;
    PairedBackward& paired = *paired_;
    PairEachRow(count, query_.shares, row, paired.shares);
    PairNeighbours(count, query_.shares, row, paired.shares_of_tokens);
    PairEachRow(count, query_.grad_out, columns, paired.grad_out);
    PairNeighbours(count, query_.grad_out, columns, paired.grad_out_of_tokens);
    TriangularScores<Pairs>(count, paired.latents, paired.shares, paired.latents, chunk_.weights_transposed, scores_, kChunk,
                            prefetch_);
    TriangularScores<Pairs>(count, paired.columns, paired.grad_out, paired.columns, values_transposed_, grad_scores_, kChunk,
                            prefetch_);
    // Beyond a strip's end scores are whatever was there; no product reads them.
    PairNeighbours(count, scores_, kChunk, paired.scores_of_tokens);
    const size_t pairs = (count + 1) / 2;
    for (size_t first = 0; first < count; first += kStrip) {
      const size_t pair = first / 2;
      MatMul<true, Pairs>(d, std::min(kStrip, count - first), columns, pairs - pair,
                          Left{paired.scores_of_tokens + pair * kChunk + first, 1, kChunk},
                          paired.grad_out_of_tokens + pair * columns, columns, grad_values_ + first * columns, columns,
                          prefetch_);
    }
    MatMul<true, Pairs>(d, dims_.latents, columns, pairs, Left{paired.shares_of_tokens, 1, row}, paired.grad_out_of_tokens,
                        columns, carried.sum, columns, prefetch_);
  }

  const LatentArgs& args_;
  const LatentGradients& gradients_;
  const int64_t first_, last_;
  const Dims dims_;
  Scratch scratch_;
  std::optional<PairedBackward> paired_;
  std::vector<hwy::AlignedFreeUniquePtr<float[]>> snapshots_;  // the states before a segment's stretches
  State state_;                                                // one of them
  const Chunk chunk_;
  QueryChunk query_;
  float* sum_transposed_;       // Sᵀ [D, L]
  float* grad_sum_transposed_;  // dSᵀ [D, L]
  float* scores_;               // A [C, C]
  float* grad_scores_;          // [C, C]
  float* grad_weights_;         // de [C, L]
  float* grad_normalisers_;     // dz [C, L]
  float* values_transposed_;    // vᵀ [D, C], or pairs [D / 2, C]
  float* grad_values_;          // dv [C, D]
  float* row_;
  std::vector<StateGradient> carried_;  // one a slice
  std::vector<Stretch> stretches_;
  Prefetch prefetch_;
};

void BidirectionalBackward(const LatentArgs& args, const LatentGradients& gradients, const Slice& slice) {
  const F d;
  const size_t lanes = hn::Lanes(d);
  const Dims dims(args);
  const size_t row = dims.latents_padded;
  const size_t columns = dims.head_dim_padded;
  Scratch scratch(State::Floats(dims) + Chunk::Floats(dims) + QueryChunk::Floats(dims) + StateGradient::Floats(dims) +
                  2 * Scratch::Rounded(dims.StateFloats()) + Scratch::Rounded(kChunk * row) + Scratch::Rounded(kChunk * columns) +
                  2 * Scratch::Rounded(std::max(row, columns)));
  const State state(dims, scratch);
  const Chunk chunk(dims, scratch);
  QueryChunk query(dims, scratch);
  StateGradient carried(dims, scratch);
  float* average_transposed = scratch.Take(dims.StateFloats());
  float* grad_sum_transposed = scratch.Take(dims.StateFloats());
  float* grad_weights = scratch.Take(kChunk * row);
  float* grad_values = scratch.Take(kChunk * columns);
  float* spare = scratch.Take(std::max(row, columns));
  float* inverse = scratch.Take(std::max(row, columns));

  ReadState(dims, slice.PackedState(gradients.saved, dims, args.kv_heads), state);
  for (size_t l = 0; l < row; ++l) inverse[l] = state.normaliser[l] > 0.0f ? 1.0f / state.normaliser[l] : 0.0f;
  for (size_t l = 0; l < dims.latents; ++l) {
    const VF scale = hn::Set(d, inverse[l]);
    float* sum = state.sum + l * columns;
    for (size_t j = 0; j < columns; j += lanes) hn::Store(hn::Mul(hn::Load(d, sum + j), scale), d, sum + j);
  }
  Transpose(row, columns, state.sum, columns, average_transposed, row);

  const int64_t length = slice.sequence.length;
  for (int64_t token = 0; token < length; token += static_cast<int64_t>(kChunk)) {
    const size_t count = static_cast<size_t>(std::min<int64_t>(kChunk, length - token));
    for (size_t g = 0; g < dims.group; ++g) {
      const int64_t head = slice.first_head + static_cast<int64_t>(g);
      LoadGradOut(args, dims, slice, gradients, token, count, head, query.grad_out);
      LoadProbabilities(args, dims, slice, token, count, head, query.probabilities, query.gates);
      MatMul<true>(d, dims.latents, columns, count, Left{query.probabilities, 1, row}, query.grad_out, columns, carried.sum,
                   columns);
      MatMul<false>(d, count, row, dims.head_dim, Left{query.grad_out, columns, 1}, average_transposed, row, query.grad_shares,
                    row);
      for (size_t i = 0; i < count; ++i) {
        StoreQueryGradient(args, dims, slice, gradients, token + static_cast<int64_t>(i), head, query.probabilities + i * row,
                           query.gates[i], query.grad_out + i * columns, query.grad_shares + i * row);
      }
    }
  }

  for (size_t l = 0; l < dims.latents; ++l) {
    const VF scale = hn::Set(d, inverse[l]);
    float* grad = carried.sum + l * columns;
    VF sum = hn::Zero(d);
    for (size_t j = 0; j < columns; j += lanes) {
      const VF scaled = hn::Mul(hn::Load(d, grad + j), scale);
      sum = hn::MulAdd(scaled, hn::Load(d, state.sum + l * columns + j), sum);
      hn::Store(scaled, d, grad + j);
    }
    carried.normaliser[l] = -hn::ReduceSum(d, sum);
  }
  Transpose(row, columns, carried.sum, columns, grad_sum_transposed, row);
  for (int64_t token = 0; token < length; token += static_cast<int64_t>(kChunk)) {
    const size_t count = static_cast<size_t>(std::min<int64_t>(kChunk, length - token));
    LoadChunk(args, dims, slice, token, count, chunk);
    for (size_t i = 0; i < count; ++i) {
      for (size_t l = 0; l < row; l += lanes) {
        const VF maximum = hn::Load(d, state.maximum + l);
        const VF reference = hn::IfThenZeroElse(hn::Eq(maximum, hn::Set(d, kNegativeInfinity)), maximum);
        hn::Store(Exp(d, hn::Sub(hn::Load(d, chunk.logits + i * row + l), reference)), d, chunk.weights + i * row + l);
      }
    }
    MatMul<false>(d, count, columns, dims.latents, Left{chunk.weights, row, 1}, carried.sum, columns, grad_values, columns);
    MatMul<false>(d, count, row, dims.head_dim, Left{chunk.values, columns, 1}, grad_sum_transposed, row, grad_weights, row);
    for (size_t i = 0; i < count; ++i) {
      for (size_t l = 0; l < row; l += lanes) {
        float* grad = grad_weights + i * row + l;
        const VF total = hn::Add(hn::Load(d, grad), hn::Load(d, carried.normaliser + l));
        hn::Store(hn::Mul(total, hn::Load(d, chunk.weights + i * row + l)), d, grad);
      }
      StoreKeyGradients(args, dims, slice, gradients, token + static_cast<int64_t>(i), grad_weights + i * row,
                        grad_values + i * columns, carried, spare);
    }
  }
}

template <bool kPaired>
void RunCausalBackward(const LatentArgs& args, const LatentGradients& gradients, int64_t first, int64_t last) {
  ForEachRun(args, first, last, StateGradient::Floats(Dims(args)),
             [&](int64_t begin, int64_t end) HWY_ATTR { CausalBackward<kPaired>(args, gradients, begin, end).Run(); });
}

void Backward(const LatentArgs& args, const LatentGradients& gradients, int64_t first, int64_t last) {
  if (args.causal) {
    if (kHasPairs && args.dtype == DType::kBFloat16) return RunCausalBackward<kHasPairs>(args, gradients, first, last);
    return RunCausalBackward<false>(args, gradients, first, last);
  }
  for (int64_t slice = first; slice < last; ++slice) BidirectionalBackward(args, gradients, Slice(args, slice));
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(Backward);

void LatentBackward(const LatentArgs& args, const LatentGradients& gradients, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(Backward)(args, gradients, first, last);
}

}  // namespace latte::kernels
#endif
