// Pretrained decoders: every architecture of formats/decoder_config.h as one libtorch model, whose attention can be replaced
// layer by layer. Its parameters are named as GGUF names them: token_embd.weight, blk.0.attn_q.weight, output_norm.weight.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "formats/decoder_config.h"
#include "models/decoder_attention.h"

namespace latte::models {

struct DecoderOptions {
  at::ScalarType dtype = torch::kFloat32;  // of weights and activations: float32 or bfloat16 (float64 for tests)
  // Instead of the file's, for layers that read everything: to stretch a model without training.
  std::optional<formats::RopeScaling> rope_scaling;
  at::Tensor rope_factors;  // of config.rope_factors: [rope.dims / 2]
};

// x + attention(norm(x)), then x + mlp(norm(x)); with norms of what is added where the architecture has them.
class DecoderLayerImpl : public torch::nn::Module {
 public:
  DecoderLayerImpl(const formats::DecoderConfig& config, DecoderAttention attention);

  // x [B, T, E].
  DecoderAttentionResult forward(const at::Tensor& x, const DecoderAttentionOptions& options = {});
  // Its two halves, for matching attention layer by layer: norm and attention of x, not yet added, and what follows it.
  DecoderAttentionResult attend(const at::Tensor& x, const DecoderAttentionOptions& options = {});
  at::Tensor finish(const at::Tensor& x, const at::Tensor& attended);

  const DecoderAttention& attention() const { return attention_; }
  void set_attention(DecoderAttention attention);
  const AttentionWeights& attention_weights() const { return weights_; }
  AttentionWeights& attention_weights() { return weights_; }

 private:
  DecoderAttention attention_;
  AttentionWeights weights_;
  RmsNorm attention_norm_{nullptr}, mlp_norm_{nullptr};
  RmsNorm post_attention_norm_{nullptr}, post_mlp_norm_{nullptr};
  torch::nn::Linear gate_{nullptr}, up_{nullptr}, down_{nullptr};
  formats::Activation activation_;
};
TORCH_MODULE(DecoderLayer);

struct DecoderState {
  std::vector<DecoderAttentionState> layers;

  int64_t position() const { return layers.empty() ? 0 : layers.front().position; }  // tokens seen
};

struct DecoderForwardOptions {
  const DecoderState* state = nullptr;  // of the tokens before; none: a start
  bool output_state = false;
  // Logits of the last so many tokens, at most T; all, or none at all: a vocabulary makes them the largest tensor by far.
  static constexpr int64_t kAllLogits = -1, kNoLogits = 0;
  int64_t logits = kAllLogits;
  // Called after every layer's attention: its number, x before it [B, T, E], and what attention gave, not yet added.
  std::function<void(int64_t, const at::Tensor&, const at::Tensor&)> on_attention;
};

struct DecoderResult {
  at::Tensor hidden;                  // [B, T, E], after the last norm: what logits() takes
  at::Tensor logits;                  // [B, T or fewer, vocab_size]; undefined where none were asked for
  std::optional<DecoderState> state;  // if asked for
};

class DecoderImpl : public torch::nn::Module {
 public:
  // Weights are undefined numbers until they are loaded; none requires a gradient until it is told to.
  explicit DecoderImpl(const formats::DecoderConfig& config, const DecoderOptions& options = {});

  // tokens int64 [B, T], T >= 1, each in 0 … vocab_size − 1. Pieces with states between them give what the whole gives.
  DecoderResult forward(const at::Tensor& tokens, const DecoderForwardOptions& options = {});

  // The parts of forward(), for a caller that takes its own way through the layers.
  at::Tensor embed(const at::Tensor& tokens) const;   // -> [B, T, E]
  at::Tensor final_norm(const at::Tensor& x) const;   // -> hidden
  at::Tensor logits(const at::Tensor& hidden) const;  // [..., E] -> [..., vocab_size]; capped ones are float32 at least
  DecoderLayerImpl& layer(int64_t index);

  // The pretrained model's own attention for a layer, and putting it (or another one) in place. set_attention() registers its
  // parameters as blk.N.attention.NAME.
  DecoderAttention make_attention(int64_t layer) const;
  void set_attention(int64_t layer, DecoderAttention attention);
  // Stretches the rotary positions of layers that read everything; their attention becomes the pretrained model's own.
  void set_rope_scaling(const formats::RopeScaling& scaling);

  const formats::DecoderConfig& config() const { return config_; }
  at::ScalarType dtype() const { return dtype_; }
  const std::shared_ptr<const Rope>& rope(int64_t layer) const { return config_.is_local(layer) ? local_rope_ : rope_; }
  const at::Tensor& rope_factors() const { return rope_factors_; }  // undefined where the file has none

 private:
  void make_ropes();

  formats::DecoderConfig config_;
  at::ScalarType dtype_;
  at::Tensor rope_factors_;
  std::shared_ptr<const Rope> rope_, local_rope_;
  torch::nn::Embedding token_embd_{nullptr};
  torch::nn::ModuleList blk_{nullptr};
  RmsNorm output_norm_{nullptr};
  torch::nn::Linear output_{nullptr};  // without tied embeddings only
};
TORCH_MODULE(Decoder);

// Reads a model: a GGUF file. Throws formats::FileError and formats::FormatError.
Decoder load_decoder(const std::string& path, const DecoderOptions& options = {});

}  // namespace latte::models
