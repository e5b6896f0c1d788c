#include "models/decoder.h"

#include <cstring>
#include <limits>
#include <utility>

#include "nn/module_utils.h"

namespace latte::models {
namespace {

// Uninitialised: a vocabulary's random numbers would take longer than reading them.
torch::nn::Linear make_linear(int64_t in, int64_t out) {
  torch::nn::LinearImpl* raw = new torch::nn::LinearImpl(torch::nn::LinearOptions(1, 1).bias(false));
  raw->options.in_features(in).out_features(out);
  raw->weight.set_data(torch::empty({out, in}));
  return torch::nn::Linear(std::shared_ptr<torch::nn::LinearImpl>(raw));
}

torch::nn::Embedding make_embedding(int64_t rows, int64_t dim) {
  return torch::nn::Embedding(torch::nn::EmbeddingOptions(rows, dim)._weight(torch::empty({rows, dim})));
}

}  // namespace

DecoderLayerImpl::DecoderLayerImpl(const formats::DecoderConfig& config, DecoderAttention attention)
    : activation_(config.activation) {
  const int64_t embed = config.embed_dim, hidden = config.hidden_dim;
  const auto linear = [&](const char* name, int64_t in, int64_t out) { return register_module(name, make_linear(in, out)); };
  const auto norm = [&](const char* name, int64_t dim) { return register_module(name, RmsNorm(dim, config.norm_eps)); };
  attention_norm_ = norm("attn_norm", embed);
  weights_.query = linear("attn_q", embed, config.num_heads * config.head_dim);
  weights_.key = linear("attn_k", embed, config.num_kv_heads * config.head_dim);
  weights_.value = linear("attn_v", embed, config.num_kv_heads * config.head_dim);
  if (config.qk_norm) {
    weights_.query_norm = norm("attn_q_norm", config.head_dim);
    weights_.key_norm = norm("attn_k_norm", config.head_dim);
  }
  weights_.output = linear("attn_output", config.num_heads * config.head_dim, embed);
  if (config.post_norms) post_attention_norm_ = norm("post_attention_norm", embed);
  mlp_norm_ = norm("ffn_norm", embed);
  gate_ = linear("ffn_gate", embed, hidden);
  up_ = linear("ffn_up", embed, hidden);
  down_ = linear("ffn_down", hidden, embed);
  if (config.post_norms) post_mlp_norm_ = norm("post_ffw_norm", embed);
  attention_ = register_module("attention", std::move(attention));
}

void DecoderLayerImpl::set_attention(DecoderAttention attention) {
  attention_ = replace_module("attention", std::move(attention));
}

DecoderAttentionResult DecoderLayerImpl::attend(const at::Tensor& x, const DecoderAttentionOptions& options) {
  auto result = attention_->forward(attention_norm_->forward(x), weights_, options);
  if (post_attention_norm_) result.out = post_attention_norm_->forward(result.out);
  return result;
}

at::Tensor DecoderLayerImpl::finish(const at::Tensor& x, const at::Tensor& attended) {
  const auto middle = x + attended;
  const auto normed = mlp_norm_->forward(middle);
  const auto gate = gate_(normed), up = up_(normed);
  auto out = down_(activation_ == formats::Activation::kSilu ? swiglu(gate, up) : torch::gelu(gate, "tanh") * up);
  if (post_mlp_norm_) out = post_mlp_norm_->forward(out);
  return middle + out;
}

DecoderAttentionResult DecoderLayerImpl::forward(const at::Tensor& x, const DecoderAttentionOptions& options) {
  auto result = attend(x, options);
  result.out = finish(x, result.out);
  return result;
}

DecoderImpl::DecoderImpl(const formats::DecoderConfig& config, const DecoderOptions& options)
    : config_(config), dtype_(options.dtype), rope_factors_(options.rope_factors) {
  TORCH_CHECK_VALUE(dtype_ == torch::kFloat32 || dtype_ == torch::kBFloat16 || dtype_ == torch::kFloat64,
                    "Decoder: dtype must be float32 or bfloat16, got ", dtype_);
  TORCH_CHECK_VALUE(config.rope_factors == rope_factors_.defined(), "Decoder: rope_factors come with config.rope_factors only");
  if (options.rope_scaling) config_.rope.scaling = *options.rope_scaling;
  token_embd_ = register_module("token_embd", make_embedding(config.vocab_size, config.embed_dim));
  blk_ = register_module("blk", torch::nn::ModuleList());
  make_ropes();
  for (int64_t i = 0; i < config.num_layers; ++i) blk_->push_back(DecoderLayer(config_, make_attention(i)));
  output_norm_ = register_module("output_norm", RmsNorm(config.embed_dim, config.norm_eps));
  if (!config.tie_embeddings) output_ = register_module("output", make_linear(config.embed_dim, config.vocab_size));
  to(dtype_);
  for (auto& parameter : parameters()) parameter.requires_grad_(false);
}

void DecoderImpl::make_ropes() {
  rope_ = std::make_shared<Rope>(config_.rope, config_.context_length, rope_factors_);
  if (config_.window > 0) local_rope_ = std::make_shared<Rope>(config_.local_rope, config_.context_length);
}

DecoderAttention DecoderImpl::make_attention(int64_t layer) const {
  if (config_.is_local(layer)) return std::make_shared<LocalAttentionImpl>(config_, local_rope_);
  return std::make_shared<FullAttentionImpl>(config_, rope_);
}

DecoderLayerImpl& DecoderImpl::layer(int64_t index) { return blk_->at<DecoderLayerImpl>(static_cast<size_t>(index)); }

void DecoderImpl::set_attention(int64_t index, DecoderAttention attention) { layer(index).set_attention(std::move(attention)); }

void DecoderImpl::set_rope_scaling(const formats::RopeScaling& scaling) {
  config_.rope.scaling = scaling;
  make_ropes();
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    if (!config_.is_local(i)) set_attention(i, make_attention(i));
  }
}

at::Tensor DecoderImpl::embed(const at::Tensor& tokens) const {
  const auto x = torch::embedding(token_embd_->weight, tokens);
  return config_.embedding_scale == 1.0 ? x : x * config_.embedding_scale;
}

at::Tensor DecoderImpl::final_norm(const at::Tensor& x) const { return output_norm_->forward(x); }

at::Tensor DecoderImpl::logits(const at::Tensor& hidden) const {
  const auto logits = torch::linear(hidden, output_ ? output_->weight : token_embd_->weight);
  const double cap = config_.logit_softcap;
  if (cap <= 0) return logits;
  const auto wide = logits.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  return (logits.to(wide) / cap).tanh() * cap;
}

DecoderResult DecoderImpl::forward(const at::Tensor& tokens, const DecoderForwardOptions& options) {
  TORCH_CHECK_VALUE(tokens.dim() == 2 && tokens.size(1) > 0, "Decoder: expected tokens [batch, time], got ", tokens.sizes());
  TORCH_CHECK_TYPE(tokens.scalar_type() == torch::kInt64, "Decoder: expected int64 tokens, got ", tokens.scalar_type());
  TORCH_CHECK_VALUE(!options.state || static_cast<int64_t>(options.state->layers.size()) == config_.num_layers,
                    "Decoder: the state has ", options.state ? options.state->layers.size() : 0, " layers, the model ",
                    config_.num_layers);
  DecoderResult result;
  if (options.output_state) result.state.emplace();
  auto x = embed(tokens);
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    DecoderAttentionOptions attention;
    if (options.state) attention.state = &options.state->layers[static_cast<size_t>(i)];
    attention.output_state = options.output_state;
    auto attended = layer(i).attend(x, attention);
    if (options.on_attention) options.on_attention(i, x, attended.out);
    x = layer(i).finish(x, attended.out);
    if (options.output_state) {
      TORCH_CHECK(attended.state, "Decoder: the attention of layer ", i, " gave no state");
      result.state->layers.push_back(std::move(*attended.state));
    }
  }
  result.hidden = final_norm(x);
  if (options.logits != DecoderForwardOptions::kNoLogits) {
    const bool all = options.logits == DecoderForwardOptions::kAllLogits || options.logits >= tokens.size(1);
    result.logits = logits(all ? result.hidden : result.hidden.slice(1, -options.logits));
  }
  return result;
}

}  // namespace latte::models
