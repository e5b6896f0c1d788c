// Modules over latte's two short-memory operators, which give latents a sense of position: a causal depthwise convolution and
// Griffin's real-gated linear recurrence. Both look back only, in bidirectional attention too.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <tuple>

#include "nn/module_utils.h"
#include "nn/sequence_peers.h"
#include "ops/ops.h"

namespace latte::nn {

// y[t, c] = bias[c] + Σ_j weight[c, j] x[t - K + 1 + j, c]. Parameters `weight` [C, K] and `bias` [C], initialised as
// torch.nn.Conv1d's.
class CausalConv1dImpl : public torch::nn::Module {
 public:
  CausalConv1dImpl(int64_t channels, int64_t width);
  void reset_parameters();
  // x [B, T, C], key_mask bool [B, T] (true = real), state [B, K - 1, C] or none -> out [B, T, C] and, if asked for, the new
  // state.
  std::tuple<at::Tensor, OptionalTensor> forward(const at::Tensor& x, const OptionalTensor& key_mask = {},
                                                 const OptionalTensor& state = {}, bool output_state = false);

  at::Tensor weight;
  at::Tensor bias;
};
TORCH_MODULE(CausalConv1d);

// RG-LRU (arXiv 2402.19427, equations 1 to 4) whose gates read x. Parameters: Linear(C, C) `recurrence_proj` and `input_proj`,
// and `lambda` [C], drawn so that the slowest decay a = sigmoid(-lambda)^8 of a channel has a² uniform in [0.81, 0.998].
class RgLruImpl : public torch::nn::Module {
 public:
  RgLruImpl(int64_t channels, bool bias);
  void reset_parameters();
  // x [B, T, C], key_mask bool [B, T] (true = real), state [B, C] or none -> out [B, T, C] and, if asked for, the new state.
  std::tuple<at::Tensor, OptionalTensor> forward(const at::Tensor& x, const OptionalTensor& key_mask = {},
                                                 const OptionalTensor& state = {}, bool output_state = false,
                                                 SequencePeers* peers = nullptr);

  Linear recurrence_proj{nullptr};
  Linear input_proj{nullptr};
  at::Tensor lambda;
};
TORCH_MODULE(RgLru);

}  // namespace latte::nn
