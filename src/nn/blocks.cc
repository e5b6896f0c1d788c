#include "nn/blocks.h"

#include <algorithm>
#include <utility>

#include "nn/key_padding.h"
#include "nn/module_utils.h"

namespace latte::nn {

namespace {

// The sum over ranks. Every rank's loss depends on it, and so its gradient is the sum of theirs.
class SumOverPeers : public torch::autograd::Function<SumOverPeers> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& values, BatchPeers* peers) {
    context->saved_data["peers"] = reinterpret_cast<int64_t>(peers);
    at::Tensor sum = values.contiguous().clone();
    peers->sum(sum);
    return sum;
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               const torch::autograd::tensor_list& gradients) {
    at::Tensor sum = gradients[0].contiguous().clone();
    reinterpret_cast<BatchPeers*>(context->saved_data["peers"].toInt())->sum(sum);
    return {sum, at::Tensor()};
  }
};

constexpr double kMomentum = 0.1;  // of batch norm's running statistics

}  // namespace

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
  const auto rows = x.flatten(0, -2);
  if (!is_training()) {
    return at::batch_norm(rows, weight, bias, running_mean, running_var, /*training=*/false, kMomentum, eps_,
                          /*cudnn_enabled=*/true)
        .view(x.sizes());
  }
  if (!padding) return normalise(rows).view(x.sizes());
  const auto real = real_tokens(*padding).flatten();
  const auto normed = normalise(rows.index({real}));
  return torch::zeros_like(rows, normed.options()).index_put({real}, normed).view(x.sizes());
}

at::Tensor NormImpl::normalise(const at::Tensor& rows) {
  if (peers) return normalise_with_peers(rows);
  return at::batch_norm(rows, weight, bias, running_mean, running_var, /*training=*/true, kMomentum, eps_,
                        /*cudnn_enabled=*/true);
}

at::Tensor NormImpl::normalise_with_peers(const at::Tensor& rows) {
  const auto x = rows.to(torch::promoteTypes(rows.scalar_type(), torch::kFloat32));
  auto all = torch::full({1}, static_cast<double>(x.size(0)), x.options().dtype(torch::kFloat64));
  peers->sum(all);
  const double count = all.item<double>();
  const auto mean = SumOverPeers::apply(x.sum(0), peers) / count;
  const auto centred = x - mean;
  const auto variance = SumOverPeers::apply(centred.square().sum(0), peers) / count;
  {
    const torch::NoGradGuard no_grad;
    running_mean.lerp_(mean.to(running_mean.scalar_type()), kMomentum);
    running_var.lerp_((variance * (count / std::max(count - 1.0, 1.0))).to(running_var.scalar_type()), kMomentum);
  }
  const auto normed = centred * (variance + eps_).rsqrt() * weight;
  return (bias.defined() ? normed + bias : normed).to(rows.scalar_type());
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
