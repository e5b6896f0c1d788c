// Linear attentions that latent attention is compared with, under the same interface.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>

#include "nn/attention.h"
#include "nn/module_utils.h"

namespace latte::nn {

enum class LinearKind : uint8_t {
  // y[t] = Σ_s φ(q[t])ᵀφ(k[s]) v[s] / Σ_s φ(q[t])ᵀφ(k[s]) with φ = 1 + elu (arXiv 2006.16236).
  kNormalised,
  // S[t] = diag(α[t]) S[t-1] + k[t] v[t]ᵀ, y[t] = norm(S[t]ᵀ q[t] / √D), gated by silu: gated linear attention (arXiv
  // 2312.06635), with the decay α = sigmoid(W x)^(1/16) of each token and channel, W of rank 16. Bidirectional: the sum of
  // this over s ≤ t and of its mirror image over s > t, under the same decays.
  kGated,
};

struct LinearAttentionOptions {
  int64_t embed_dim = 0;
  int64_t num_heads = 0;
  double dropout = 0.0;  // of the heads' output
  bool bias = true;
  bool batch_first = false;
  std::optional<int64_t> num_kv_heads;  // H unless given
  LinearKind kind = LinearKind::kNormalised;
  LatentPosition position = LatentPosition::kNone;  // of queries and keys, or (vapor) of values
  int64_t conv_width = 4;                           // K of position kConv
};

// Linear in T, in chunks. Its state [B, H, D, D] (normalised: [B, H, D, D + 1]) is in AttentionState's `latents`.
class LinearAttentionImpl : public AttentionImpl {
 public:
  explicit LinearAttentionImpl(const LinearAttentionOptions& options);
  void reset_parameters();

  Linear query_proj{nullptr};  // E -> H * D
  Linear key_proj{nullptr};    // E -> Hkv * D
  Linear value_proj{nullptr};  // E -> Hkv * D
  Linear out_proj{nullptr};    // H * D -> E
  Linear decay_down{nullptr};  // kGated: E -> 16 -> Hkv * D
  Linear decay_up{nullptr};
  Linear gate_proj{nullptr};  // kGated: E -> H * D
  at::Tensor norm_weight;     // kGated: [D]

 private:
  AttentionResult attend(const at::Tensor& x, const OptionalTensor& key_mask, const AttentionForwardOptions& options) override;

  LinearAttentionOptions options_;
  int64_t head_dim_;
  int64_t num_kv_heads_;
};
TORCH_MODULE(LinearAttention);

// Σ_s≤t Π_{s<r≤t} e^{g[r]} (q[t]ᵀ (e^{…} k[s])) v[s] in chunks, of float32 or float64: query, key, log_decay [B, H, T, K]
// (log_decay undefined: none), values [B, H, T, V] -> out [B, H, T, V]; `state` [B, H, K, V] in (undefined: zeros) and out.
at::Tensor decayed_linear_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& values,
                                    const at::Tensor& log_decay, at::Tensor& state);

// The same in both directions: decayed_linear_attention over s ≤ t, and from the end over s > t, Π_{t≤r<s} e^{g[r]} between them.
at::Tensor bidirectional_linear_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& values,
                                          const at::Tensor& log_decay);

struct LinformerAttentionOptions {
  int64_t embed_dim = 0;
  int64_t num_heads = 0;
  double dropout = 0.0;  // of the probabilities
  bool bias = true;
  bool batch_first = false;
  int64_t max_positions = 0;                        // the longest sequence
  int64_t projected = 0;                            // keys and values that are left of them
  LatentPosition position = LatentPosition::kNone;  // of queries and keys, or (vapor) of values, before the map
  int64_t conv_width = 4;                           // K of position kConv
};

// Softmax attention over keys and values that a learnt map brings from T positions to a fixed number (arXiv 2006.04768), the same
// map for keys, values and all heads. Bidirectional only. Padding adds to nothing; a sequence of T < max_positions reads the
// map's first T columns.
class LinformerAttentionImpl : public AttentionImpl {
 public:
  explicit LinformerAttentionImpl(const LinformerAttentionOptions& options);
  void reset_parameters();

  Linear query_proj{nullptr};
  Linear key_proj{nullptr};
  Linear value_proj{nullptr};
  Linear out_proj{nullptr};
  at::Tensor position_proj;  // [projected, max_positions]

 private:
  AttentionResult attend(const at::Tensor& x, const OptionalTensor& key_mask, const AttentionForwardOptions& options) override;

  LinformerAttentionOptions options_;
  int64_t head_dim_;
};
TORCH_MODULE(LinformerAttention);

}  // namespace latte::nn
