#include "nn/blocks.h"

#include <utility>

#include "nn/module_utils.h"

namespace latte::nn {

NormImpl::NormImpl(NormKind kind, int64_t dim, bool bias_, double eps) : kind_(kind), eps_(eps) {
  check_size("Norm", "dim", dim, 1);
  weight = register_parameter("weight", torch::ones({dim}));
  if (kind == NormKind::kLayer && bias_) bias = register_parameter("bias", torch::zeros({dim}));
}

at::Tensor NormImpl::forward(const at::Tensor& x) {
  if (kind_ == NormKind::kRms) return at::rms_norm(x, weight.sizes(), weight, eps_);
  return at::layer_norm(x, weight.sizes(), weight, bias, eps_);
}

MlpImpl::MlpImpl(MlpKind kind, int64_t dim, int64_t hidden_dim, bool bias) {
  check_size("Mlp", "dim", dim, 1);
  check_size("Mlp", "hidden_dim", hidden_dim, 1);
  if (kind == MlpKind::kGated) gate_proj = register_module("gate_proj", make_linear(dim, hidden_dim, bias));
  up_proj = register_module("up_proj", make_linear(dim, hidden_dim, bias));
  down_proj = register_module("down_proj", make_linear(hidden_dim, dim, bias));
}

at::Tensor MlpImpl::forward(const at::Tensor& x) {
  return down_proj(gate_proj ? torch::silu(gate_proj(x)) * up_proj(x) : torch::gelu(up_proj(x)));
}

BlockImpl::BlockImpl(const BlockOptions& options, std::shared_ptr<AttentionImpl> attention_) : dropout_(options.dropout) {
  check_dropout("Block", options.dropout);
  attention_norm = register_module("attention_norm", Norm(options.norm, options.embed_dim, options.bias));
  attention = register_module("attention", std::move(attention_));
  mlp_norm = register_module("mlp_norm", Norm(options.norm, options.embed_dim, options.bias));
  mlp = register_module("mlp", Mlp(options.mlp, options.embed_dim, options.hidden_dim, options.bias));
}

AttentionResult BlockImpl::forward(const at::Tensor& x, const AttentionForwardOptions& options) {
  auto result = attention->forward(attention_norm(x), options);
  const auto attended = x + torch::dropout(result.out, dropout_, is_training());
  result.out = attended + torch::dropout(mlp(mlp_norm(attended)), dropout_, is_training());
  return result;
}

}  // namespace latte::nn
