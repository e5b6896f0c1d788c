// The new weights of a converted layer: latent logits read from the pretrained query and key heads (formats/adapter.h has the
// formulas). Shapes: B batch, T tokens, E embedding, H query heads, Hkv key-value heads, Dk size of a head, L latents.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "formats/adapter.h"
#include "ops/ops.h"

namespace latte::extend {

using formats::LatentForm;

struct LatentSizes {
  int64_t embed_dim = 0;     // E
  int64_t num_heads = 0;     // H
  int64_t num_kv_heads = 0;  // Hkv
  int64_t head_dim = 0;      // Dk
  int64_t latents = 0;       // L
  LatentForm form;
};

// Inputs of macchiato_attention and the floor, float32 (or float64 where the weights are).
struct LatentInputs {
  at::Tensor query_logits;   // [B, T, H, L + 1]
  at::Tensor key_logits;     // [B, T, Hkv, L]
  OptionalTensor log_decay;  // [B, T, Hkv, L], expanded
  OptionalTensor floor;      // [Hkv, L]
  // With a convolution: the last keys that it has read, [B, kKeyConvWidth - 1, Hkv Dk], for the tokens that come next.
  OptionalTensor recent_keys;
};

// What a token's far[t] depends on, and whether latents read what left the window (formats/adapter.h).
struct FarOptions {
  int64_t window = 128;
  int64_t sinks = 4;
  int64_t far_limit = 8192;
  bool evicted = false;
};

class LatentLogitsImpl : public torch::nn::Module {
 public:
  // Closed: every query reads its window alone, to rounding, whatever the other weights are.
  explicit LatentLogitsImpl(const LatentSizes& sizes);

  // x [B, T, E] the attention's input, query [B, T, H, Dk] and key [B, T, Hkv, Dk] before rotation; `position` of the first
  // token; `recent_keys` as the tokens before left them.
  LatentInputs forward(const at::Tensor& x, const at::Tensor& query, const at::Tensor& key, int64_t position,
                       const FarOptions& far, const OptionalTensor& recent_keys = {});

  const LatentSizes& sizes() const { return sizes_; }
  // Names in an adapter behind "blk.N.latte_", with the parameters.
  std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;

  at::Tensor query_weight;  // [H, L, Dk]
  at::Tensor query_bias;    // [H, L]
  at::Tensor key_weight;    // [Hkv, L, Dk]
  at::Tensor key_bias;      // [Hkv, L]
  at::Tensor gate_weight;   // [H, E]
  at::Tensor gate_bias;     // [H]
  at::Tensor gate_slope;    // [H]
  at::Tensor decay;         // [Hkv, L]; undefined unless sizes.form.decay
  at::Tensor floor;         // [Hkv, L]; undefined unless sizes.form.floor
  at::Tensor conv_weight;   // [Hkv, Dk, kKeyConvWidth]; undefined unless sizes.form.conv

  // Half-lives as a new layer has them. As if there were no convolution: every key by itself.
  void reset_decay();
  void reset_conv();

 private:
  // What key logits read, [B, T, Hkv, Dk], and what LatentInputs::recent_keys is.
  std::pair<at::Tensor, OptionalTensor> convolved(const at::Tensor& key, int64_t sinks_here, const OptionalTensor& recent_keys);

  LatentSizes sizes_;
};
TORCH_MODULE(LatentLogits);

}  // namespace latte::extend
