// Sequence parallelism: a sequence is cut into equal stretches, one a rank, and what passes between them has a size that doesn't
// depend on their length. Latent states meet in an exclusive scan over ranks, windows and convolutions take their edge from the
// neighbour, and gradients travel the other way round (docs/distributed.md).
//
// Every function here is collective: all ranks call it, forward and backward, in the same order, and each result has to be part
// of what backward() starts from on every rank.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "ops/ops.h"

namespace latte::nn {

// How a rank reaches those that hold the other stretches.
class SequencePeers {
 public:
  virtual ~SequencePeers() = default;
  virtual int64_t rank() const = 0;  // of the stretch, counted from 0
  virtual int64_t size() const = 0;
  // Sends `out` to rank `to` and receives `in` from rank `from`, at once; a negative rank: nobody. Contiguous tensors.
  virtual void exchange(const at::Tensor& out, int64_t to, at::Tensor& in, int64_t from) = 0;
};

// The state of one stretch alone, [B, Hkv, L, D + 3] float32 (float64 for float64): what causal_attention would return without an
// initial state, by ATen operators. key_logits [B, T, Hkv, L], values [B, T, Hkv, D], log_decay as key_logits.
at::Tensor stretch_state(const at::Tensor& key_logits, const at::Tensor& values, const OptionalTensor& log_decay);

// The state before this rank's stretch, from each rank's state of its own, [N, H, L, D + 3]; the first rank's is empty. In
// log2(ranks) + 1 messages each way.
at::Tensor state_before(SequencePeers& peers, const at::Tensor& state);

// The last `count` rows of the rank before, x [B, T, …] -> [B, count, …]; zeros on the first rank. ValueError for T < count.
at::Tensor rows_before(SequencePeers& peers, const at::Tensor& x, int64_t count);

// The first `count` rows of the first rank, on every rank. ValueError for T < count.
at::Tensor first_rows(SequencePeers& peers, const at::Tensor& x, int64_t count);

// RG-LRU's state before this rank's stretch, [B, C]: x and the gates' logits [B, T, C], lambda [C].
at::Tensor rg_lru_before(SequencePeers& peers, const at::Tensor& x, const at::Tensor& recurrence_logits,
                         const at::Tensor& input_logits, const at::Tensor& lambda);

// The caches of a window of `window` tokens and `sinks` sinks before this rank's stretch, from its keys and values [B, T, Hkv,
// …]. `latents` [B, Hkv, L, D + 3] becomes the state's.
MacchiatoState window_before(SequencePeers& peers, const at::Tensor& key, const at::Tensor& values, const at::Tensor& latents,
                             int64_t window, int64_t sinks);

}  // namespace latte::nn
