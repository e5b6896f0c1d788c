// torch.nn.MultiheadAttention's key_padding_mask: bool, true = padding, or floating, -inf = padding and what is finite added to
// what a token's keys score. Python's latte._masks does the same.
#pragma once

#include <torch/torch.h>

#include "ops/ops.h"

namespace latte::nn {

// Bool, true = a real token; padding's shape.
at::Tensor real_tokens(const at::Tensor& padding);
// Finite floats of padding's shape, 0 at padding, with gradients; nothing where all are 0. ValueError for NaN and +inf.
OptionalTensor key_bias_of(const OptionalTensor& padding);

// key_logits [B, T, Hkv, L] with key_bias [B, T] added for every latent, in key_logits' dtype.
at::Tensor bias_key_logits(const at::Tensor& key_logits, const OptionalTensor& key_bias);
// query [B, T, H, Dk], key [B, T, Hkv, Dk] and sink_query with one feature more, through which query · key · scale has key_bias
// [B, T] (none: 0) added.
void bias_window(at::Tensor& query, at::Tensor& key, OptionalTensor& sink_query, const OptionalTensor& key_bias, double scale);
// The state with keys of head_dim + 1 features, where they have head_dim: those of before came without a bias.
MacchiatoState widen_keys(MacchiatoState state, int64_t head_dim);

}  // namespace latte::nn
