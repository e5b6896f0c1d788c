#include "nn/blocks.h"

#include <utility>

#include "nn/key_padding.h"
#include "nn/module_utils.h"

namespace latte::nn {

NormImpl::NormImpl(NormKind kind, int64_t dim, bool bias_, double eps) : kind_(kind), eps_(eps) {
  check_size("Norm", "dim", dim, 1);
  weight = register_parameter("weight", torch::ones({dim}));
  if (kind != NormKind::kRms && bias_) bias = register_parameter("bias", torch::zeros({dim}));
  if (kind == NormKind::kBatch) {
    running_mean = register_buffer("running_mean", torch::zeros({dim}));
    running_var = register_buffer("running_var", torch::ones({dim}));
  }
}

at::Tensor NormImpl::forward(const at::Tensor& x, const OptionalTensor& padding) {
  if (kind_ == NormKind::kBatch) return batch_norm(x, padding);
  if (kind_ == NormKind::kRms) return at::rms_norm(x, weight.sizes(), weight, eps_);
  return at::layer_norm(x, weight.sizes(), weight, bias, eps_);
}

at::Tensor NormImpl::batch_norm(const at::Tensor& x, const OptionalTensor& padding) {
  constexpr double kMomentum = 0.1;
  const auto rows = x.flatten(0, -2);
  if (!padding || !is_training()) {
    return at::batch_norm(rows, weight, bias, running_mean, running_var, is_training(), kMomentum, eps_, /*cudnn_enabled=*/true)
        .view(x.sizes());
  }
  const auto real = real_tokens(*padding).flatten();
  const auto normed =
      at::batch_norm(rows.index({real}), weight, bias, running_mean, running_var, /*training=*/true, kMomentum, eps_,
                     /*cudnn_enabled=*/true);
  return torch::zeros_like(rows, normed.options()).index_put({real}, normed).view(x.sizes());
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
  auto result = attention->forward(attention_norm(x, options.key_padding_mask), options);
  const auto attended = x + torch::dropout(result.out, dropout_, is_training());
  result.out = attended + torch::dropout(mlp(mlp_norm(attended, options.key_padding_mask)), dropout_, is_training());
  return result;
}

}  // namespace latte::nn
