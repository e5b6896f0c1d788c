// Encoders for labelled sequences: a classifier, a classifier of pairs (dual encoder), or an answer at each token; of any
// attention, causal or bidirectional.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "formats/language_model_config.h"
#include "nn/blocks.h"
#include "nn/module_utils.h"

namespace latte::models {

// vocab_size is of the tokens that come in. position: sinusoidal unless given. tie_embeddings has no meaning here.
struct EncoderConfig : formats::LanguageModelConfig {
  std::string head = "classify";  // classify | pairs | tokens
  std::string pooling = "mean";   // mean | first | last: what a classifier reads; last is the last real token
  // none | batch: batch norm over the examples, of what a classifier has pooled. The mean over a long sequence is nearly the same
  // for all of them (of T tokens they differ by 1 / sqrt(T)); what they have in common then drowns the difference, and training
  // stays at chance.
  std::string pooled_norm = "none";
  bool causal = false;
  int64_t num_outputs = 0;  // classes, or for tokens the vocabulary of answers

  EncoderConfig();
  int64_t parameter_count() const;
  void validate() const;  // throws formats::ConfigError
  nlohmann::json to_json() const;
  // Takes an object of these fields and LanguageModelConfig's, of which vocab_size and num_outputs must be there. Throws
  // ConfigError.
  static EncoderConfig from_json(const nlohmann::json& json);

  bool operator==(const EncoderConfig&) const = default;
};

class EncoderImpl : public torch::nn::Module {
 public:
  // Throws ConfigError.
  explicit EncoderImpl(const EncoderConfig& config);
  void reset_parameters();

  // tokens int64 [B, T] (pairs: [2 B, T], the two of a pair one after the other); padding bool [B, T], true = padding, which adds
  // to nothing -> logits [B, num_outputs], with head tokens [B, T, num_outputs].
  at::Tensor forward(const at::Tensor& tokens, const OptionalTensor& padding = {});

  // What a classifier has pooled of each sequence, before pooled_norm: [B, embed_dim].
  at::Tensor pooled(const at::Tensor& tokens, const OptionalTensor& padding = {});

  // Batch norms take their statistics over all ranks' examples (nn::NormImpl::peers).
  void set_batch_peers(nn::BatchPeers* peers);

  const EncoderConfig& config() const { return config_; }

  torch::nn::Embedding token_embedding{nullptr};
  torch::nn::Embedding position_embedding{nullptr};  // position learned only
  torch::nn::ModuleList blocks{nullptr};             // of nn::Block
  nn::Norm final_norm{nullptr};
  nn::Norm pooled_norm{nullptr};  // with config().pooled_norm
  nn::Linear pair_proj{nullptr};  // pairs: 4 E -> E
  nn::Linear output_proj{nullptr};

 private:
  at::Tensor encode(const at::Tensor& tokens, const OptionalTensor& padding);
  at::Tensor pool(const at::Tensor& x, const OptionalTensor& padding) const;

  EncoderConfig config_;
};
TORCH_MODULE(Encoder);

}  // namespace latte::models
