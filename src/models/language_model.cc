#include "models/language_model.h"

#include <string>

#include "models/parts.h"

namespace latte::models {
LanguageModelImpl::LanguageModelImpl(const formats::LanguageModelConfig& config) : config_(config) {
  config.validate();
  const nn::BlockOptions block = block_options(config);
  token_embedding = register_module("token_embedding", torch::nn::Embedding(config.vocab_size, config.embed_dim));
  if (config.position_name() == "learned") {
    position_embedding = register_module("position_embedding", torch::nn::Embedding(config.max_positions, config.embed_dim));
  }
  blocks = register_module("blocks", torch::nn::ModuleList());
  for (int64_t i = 0; i < config.num_layers; ++i) blocks->push_back(nn::Block(block, make_attention(config)));
  final_norm = register_module("final_norm", nn::Norm(block.norm, config.embed_dim, config.bias));
  if (!config.tie_embeddings) {
    const auto options = torch::nn::LinearOptions(config.embed_dim, config.vocab_size).bias(false);
    output_proj = register_module("output_proj", nn::Linear(options));
  }
  reset_parameters();
}

void LanguageModelImpl::reset_parameters() { initialise(*this, config_.num_layers); }

at::Tensor LanguageModelImpl::forward(const at::Tensor& tokens) { return run(tokens, nullptr, nullptr, /*last_only=*/false); }

std::tuple<at::Tensor, LanguageModelState> LanguageModelImpl::forward_with_state(const at::Tensor& tokens,
                                                                                 const std::optional<LanguageModelState>& state,
                                                                                 bool last_only) {
  TORCH_CHECK_VALUE(!state || static_cast<int64_t>(state->layers.size()) == config_.num_layers, "LanguageModel: the state has ",
                    state ? state->layers.size() : 0, " layers, the model ", config_.num_layers);
  LanguageModelState after;
  const auto logits = run(tokens, state ? &*state : nullptr, &after, last_only);
  return {logits, std::move(after)};
}

at::Tensor LanguageModelImpl::run(const at::Tensor& tokens, const LanguageModelState* before, LanguageModelState* after,
                                  bool last_only) {
  TORCH_CHECK_VALUE(tokens.dim() == 2 && tokens.size(1) > 0, "LanguageModel: expected tokens [batch, time], got ",
                    tokens.sizes());
  TORCH_CHECK_TYPE(tokens.scalar_type() == torch::kInt64, "LanguageModel: expected int64 tokens, got ", tokens.scalar_type());
  TORCH_CHECK_VALUE(!sequence_peers || !(before || after), "LanguageModel: a sequence that ranks share gives no state");
  const int64_t begin = before ? before->position() : sequence_peers ? sequence_peers->rank() * tokens.size(1) : 0;
  const int64_t end = begin + tokens.size(1);
  auto x = token_embedding(tokens);
  if (position_embedding) {
    TORCH_CHECK_VALUE(end <= config_.max_positions, "LanguageModel: token ", end, " is beyond max_positions, ",
                      config_.max_positions, ", to which learned positions reach");
    x = x + position_embedding(nn::positions_from(begin, tokens.size(1), tokens.device()));
  }
  if (config_.position_name() == "sinusoidal") x = x + sinusoidal_positions(begin, tokens.size(1), x);
  x = torch::dropout(x, config_.dropout, is_training());

  nn::AttentionForwardOptions options;
  options.is_causal = true;
  options.output_state = after != nullptr;
  options.peers = sequence_peers;
  for (size_t i = 0; i < blocks->size(); ++i) {
    if (before) options.state = before->layers[i];
    auto result = blocks->at<nn::BlockImpl>(i).forward(x, options);
    x = result.out;
    if (after) after->layers.push_back(std::move(*result.state));
  }
  if (last_only) x = x.slice(1, -1);
  x = final_norm(x);
  return output_proj ? output_proj(x) : latte::linear(x, token_embedding->weight);
}

}  // namespace latte::models
