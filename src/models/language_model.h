// A decoder-only language model: pre-norm transformer blocks over softmax, windowed or latent attention.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "formats/language_model_config.h"
#include "nn/blocks.h"
#include "nn/module_utils.h"

namespace latte::models {

// What decoding carries from one stretch of tokens to the next: of constant size unless attention is softmax.
struct LanguageModelState {
  std::vector<nn::AttentionState> layers;

  int64_t position() const { return layers.empty() ? 0 : layers.front().position; }  // tokens seen
};

// With attention softmax, position learned, norm layer and mlp gelu this computes nanoGPT's GPT, whose c_attn is the rows of
// query_proj, key_proj and value_proj, and is initialised alike: normal with deviation 0.02, what writes to the residual stream
// (out_proj and down_proj) 0.02 / sqrt(2 num_layers), biases zero. Convolutions and RG-LRU's lambda keep their own rules.
class LanguageModelImpl : public torch::nn::Module {
 public:
  // Throws ConfigError.
  explicit LanguageModelImpl(const formats::LanguageModelConfig& config);
  void reset_parameters();

  // tokens int64 [B, T], each in 0 … vocab_size - 1, of sequences that start here -> logits [B, T, vocab_size].
  at::Tensor forward(const at::Tensor& tokens);
  // The same for a stretch of T >= 1 tokens that follows those of `state` (none: a start): a prompt, a part of one, or a token.
  // `last_only` computes the logits of the last token alone, [B, 1, vocab_size]. Pieces give what the whole gives.
  std::tuple<at::Tensor, LanguageModelState> forward_with_state(const at::Tensor& tokens,
                                                                const std::optional<LanguageModelState>& state = {},
                                                                bool last_only = false);

  const formats::LanguageModelConfig& config() const { return config_; }

  // Where `tokens` are one rank's stretch of sequences that others share; null: whole sequences. Outlives the model's use of it.
  nn::SequencePeers* sequence_peers = nullptr;

  torch::nn::Embedding token_embedding{nullptr};
  torch::nn::Embedding position_embedding{nullptr};  // position learned only
  torch::nn::ModuleList blocks{nullptr};             // of nn::Block
  nn::Norm final_norm{nullptr};
  nn::Linear output_proj{nullptr};  // without tie_embeddings only

 private:
  at::Tensor run(const at::Tensor& tokens, const LanguageModelState* before, LanguageModelState* after, bool last_only);

  formats::LanguageModelConfig config_;
};
TORCH_MODULE(LanguageModel);

}  // namespace latte::models
