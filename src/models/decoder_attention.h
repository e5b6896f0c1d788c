// The attention of a pretrained decoder's layer, which can be replaced: an implementation gets the layer's normed input and its
// pretrained projections, and adds parameters of its own where it has any.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "formats/decoder_config.h"
#include "models/fused_rows.h"
#include "models/rope.h"
#include "ops/ops.h"

namespace latte::models {

// RMSNorm over the last dimension; of bfloat16 computed in float32.
class RmsNormImpl : public torch::nn::Module {
 public:
  RmsNormImpl(int64_t dim, double eps);
  at::Tensor forward(const at::Tensor& x) const { return rms_norm(x, weight, eps_); }

  at::Tensor weight;  // [dim]

 private:
  double eps_;
};
TORCH_MODULE(RmsNorm);

// What a layer has of attention in its file. E embed_dim, H heads, Hkv key-value heads, D head_dim.
struct AttentionWeights {
  torch::nn::Linear query{nullptr};   // attn_q [H * D, E]
  torch::nn::Linear key{nullptr};     // attn_k [Hkv * D, E]
  torch::nn::Linear value{nullptr};   // attn_v [Hkv * D, E]
  torch::nn::Linear output{nullptr};  // attn_output [E, H * D]
  RmsNorm query_norm{nullptr};        // attn_q_norm, attn_k_norm [D]; some architectures only
  RmsNorm key_norm{nullptr};

  // x [B, T, E] -> query [B, T, H, D], key [B, T, Hkv, D], normed where the architecture has such norms, not rotated, and value
  // [B, T, Hkv, D].
  struct Heads {
    at::Tensor query, key, value;
  };
  Heads project(const at::Tensor& x, int64_t head_dim) const;
};

// What attention carries from one stretch of tokens to the next. An implementation fills what it needs.
struct DecoderAttentionState {
  at::Tensor keys;                          // FullAttention: [B, position, Hkv, D], rotated
  at::Tensor values;                        // FullAttention: [B, position, Hkv, D]
  std::optional<MacchiatoState> macchiato;  // LocalAttention, and others that have a window
  std::map<std::string, at::Tensor> more;   // whatever else an implementation needs, by its own names
  int64_t position = 0;                     // tokens seen
};

struct DecoderAttentionOptions {
  const DecoderAttentionState* state = nullptr;  // of the tokens before; none: x begins the sequence
  bool output_state = false;

  int64_t position() const { return state ? state->position : 0; }  // of x's first token
};

struct DecoderAttentionResult {
  at::Tensor out;                              // [B, T, E], after the output projection
  std::optional<DecoderAttentionState> state;  // if asked for
};

// Causal self-attention of one layer. Parameters that an implementation registers are named blk.N.attention.NAME in the model.
class DecoderAttentionImpl : public torch::nn::Module {
 public:
  // x [B, T, E], T >= 1, normed. Pieces of a sequence with states between them give what the whole gives.
  virtual DecoderAttentionResult forward(const at::Tensor& x, const AttentionWeights& weights,
                                         const DecoderAttentionOptions& options) = 0;
};
using DecoderAttention = std::shared_ptr<DecoderAttentionImpl>;

// The pretrained model's own: over everything. Latte's window operator or torch's scaled_dot_product_attention, whichever is
// faster.
class FullAttentionImpl : public DecoderAttentionImpl {
 public:
  FullAttentionImpl(const formats::DecoderConfig& config, std::shared_ptr<const Rope> rope);
  DecoderAttentionResult forward(const at::Tensor& x, const AttentionWeights& weights,
                                 const DecoderAttentionOptions& options) override;

 private:
  formats::DecoderConfig config_;
  std::shared_ptr<const Rope> rope_;
};

// The pretrained model's own in local layers: over the last config.window tokens (latte's window operator).
class LocalAttentionImpl : public DecoderAttentionImpl {
 public:
  LocalAttentionImpl(const formats::DecoderConfig& config, std::shared_ptr<const Rope> rope);
  DecoderAttentionResult forward(const at::Tensor& x, const AttentionWeights& weights,
                                 const DecoderAttentionOptions& options) override;

 private:
  formats::DecoderConfig config_;
  std::shared_ptr<const Rope> rope_;
};

}  // namespace latte::models
