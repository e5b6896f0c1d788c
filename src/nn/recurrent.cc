#include "nn/recurrent.h"

#include <cmath>

namespace latte::nn {

CausalConv1dImpl::CausalConv1dImpl(int64_t channels, int64_t width) {
  TORCH_CHECK_VALUE(channels > 0 && width > 0, "CausalConv1d: channels and width must be positive, got ", channels, " and ",
                    width);
  weight = register_parameter("weight", torch::empty({channels, width}));
  bias = register_parameter("bias", torch::empty({channels}));
  reset_parameters();
}

void CausalConv1dImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  const double bound = 1.0 / std::sqrt(static_cast<double>(weight.size(1)));
  weight.uniform_(-bound, bound);
  bias.uniform_(-bound, bound);
}

std::tuple<at::Tensor, OptionalTensor> CausalConv1dImpl::forward(const at::Tensor& x, const OptionalTensor& key_mask,
                                                                 const OptionalTensor& state, bool output_state) {
  return causal_conv1d(
      x, weight,
      {.bias = bias, .key_mask = key_mask, .initial_state = state, .output_final_state = output_state, .cu_seqlens = {}});
}

RgLruImpl::RgLruImpl(int64_t channels, bool bias) {
  TORCH_CHECK_VALUE(channels > 0, "RgLru: channels must be positive, got ", channels);
  const auto linear = torch::nn::LinearOptions(channels, channels).bias(bias);
  recurrence_proj = register_module("recurrence_proj", Linear(linear));
  input_proj = register_module("input_proj", Linear(linear));
  lambda = register_parameter("lambda", torch::empty({channels}));
  reset_parameters();
}

void RgLruImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  for (auto& linear : {recurrence_proj, input_proj}) {
    torch::nn::init::xavier_uniform_(linear->weight);
    if (linear->bias.defined()) linear->bias.zero_();
  }
  // log a = -8 softplus(lambda), so lambda is softplus's inverse at -log(a²) / 16.
  const auto squared = torch::empty(lambda.sizes(), torch::kFloat64).uniform_(0.81, 0.998);
  lambda.copy_(torch::log(torch::expm1(-torch::log(squared) / 16)));
}

std::tuple<at::Tensor, OptionalTensor> RgLruImpl::forward(const at::Tensor& x, const OptionalTensor& key_mask,
                                                          const OptionalTensor& state, bool output_state, SequencePeers* peers) {
  const auto recurrence_logits = recurrence_proj(x), input_logits = input_proj(x);
  const auto before = peers ? rg_lru_before(*peers, x, recurrence_logits, input_logits, lambda) : state;
  return rg_lru(x, recurrence_logits, input_logits, lambda,
                {.key_mask = key_mask, .initial_state = before, .output_final_state = output_state, .cu_seqlens = {}});
}

}  // namespace latte::nn
