// The probabilities p(s|t) behind an attention module's output as T x T matrices, for looking at: plain quadratic arithmetic in
// float64, which shares nothing with the linear-time kernels.
#pragma once

#include <torch/torch.h>

#include <cstdint>

#include "ops/ops.h"

namespace latte::nn {

struct LatentWeightsOptions {
  OptionalTensor log_decay;  // [B, T, Hkv, L]
  OptionalTensor key_mask;   // bool [B, T], true = a real token
  bool causal = true;
};

// Σ_l p(l|t) p(s|l, t), float64 [B, H, T, T]. log_shares [B, T, H, L] are log p(l|t), key_logits [B, T, Hkv, L].
at::Tensor latent_attention_weights(const at::Tensor& log_shares, const at::Tensor& key_logits,
                                    const LatentWeightsOptions& options);

struct WindowWeightsOptions {
  int64_t window = 0;  // 0: the whole sequence
  int64_t sinks = 0;
  OptionalTensor sink_query;  // [B, T, H, Dk]
  OptionalTensor key_mask;    // bool [B, T], true = a real token
  OptionalTensor key_bias;    // floating [B, T], added to the scores
  bool causal = true;
};

// Softmax attention's weights over a window and sinks, float64 [B, H, T, T]; a row that may read nothing is 0. query
// [B, T, H, Dk], key [B, T, Hkv, Dk]; scores are scaled by 1 / sqrt(Dk).
at::Tensor window_attention_weights(const at::Tensor& query, const at::Tensor& key, const WindowWeightsOptions& options);

}  // namespace latte::nn
