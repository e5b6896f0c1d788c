// Standard softmax attention, over the whole sequence (torch's scaled_dot_product_attention) or over a window: the modules that
// latent attention is compared with, under the same interface.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>

#include "nn/attention.h"
#include "nn/module_utils.h"

namespace latte::nn {

struct SoftmaxAttentionOptions {
  int64_t embed_dim = 0;
  int64_t num_heads = 0;
  double dropout = 0.0;  // of the probabilities; with a window, of the heads' output, as LatteAttention's
  bool bias = true;
  bool batch_first = false;
  std::optional<int64_t> num_kv_heads;  // H unless given
  bool rope = true;                     // rotate queries and keys by their position
  double rope_base = 10000.0;
  // On the inputs of query_proj and key_proj, or of the values (kVapor); what values read is as ever.
  LatentPosition position = LatentPosition::kNone;
  int64_t conv_width = 4;  // K of position kConv
  int64_t window = 0;      // W; 0 reads the whole sequence
  int64_t sinks = 0;       // S, with a window only: first tokens that every token reads as well
};

// Its state holds the keys and values of all tokens so far; with a window, of the last W and the first S; and what the
// convolution or RG-LRU remembers.
class SoftmaxAttentionImpl : public AttentionImpl {
 public:
  explicit SoftmaxAttentionImpl(const SoftmaxAttentionOptions& options);
  void reset_parameters();

  Linear query_proj{nullptr};  // E -> H * D
  Linear key_proj{nullptr};    // E -> Hkv * D
  Linear value_proj{nullptr};  // E -> Hkv * D
  Linear out_proj{nullptr};    // H * D -> E

 private:
  AttentionResult attend(const at::Tensor& x, const OptionalTensor& key_mask, const AttentionForwardOptions& options) override;
  // Over the whole sequence. query [B, T, H, D], key and values [B, T, Hkv, D] -> [B, T, H, D].
  at::Tensor attend_all(const at::Tensor& query, at::Tensor key, at::Tensor values, OptionalTensor key_mask,
                        const AttentionForwardOptions& options, AttentionState& next);

  SoftmaxAttentionOptions options_;
  int64_t head_dim_;
  int64_t num_kv_heads_;
};
TORCH_MODULE(SoftmaxAttention);

// Softmax attention of each query over the tokens less than `window` away on either side and the first `sinks`, which those
// further away score by sink_query; a token counts once. In blocks of queries, linear in T: T · (2 W + S) scores a head are kept
// for backward. query [B, T, H, D], key and values [B, T, Hkv, D], key_mask [B, T] of bool, true: a real token -> [B, T, H, D].
at::Tensor bidirectional_window(const RotatedWindow& rotated, const at::Tensor& values, int64_t window, int64_t sinks,
                                const OptionalTensor& key_mask);

}  // namespace latte::nn
