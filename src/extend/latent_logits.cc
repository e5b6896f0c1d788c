#include "extend/latent_logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "formats/adapter.h"

namespace latte::extend {
namespace {

constexpr double kClosed = 30.0;  // e^-30 is less than float32 can add to 1, for any number of latents below 10^5
// Latents start with half-lives from here to there, in tokens, so that some are recent and some are long.
constexpr double kShortestHalfLife = 512.0, kLongestHalfLife = 16384.0;

// heads [B, T, H, D] times weight [H, L, D] -> [B, T, H, L]: one product a head.
at::Tensor per_head(const at::Tensor& heads, const at::Tensor& weight, const at::Tensor& bias) {
  const auto by_head = heads.to(weight.scalar_type()).permute({2, 0, 1, 3}).flatten(1, 2);  // [H, B T, D]
  const auto logits = at::baddbmm(bias.unsqueeze(1), by_head, weight.transpose(1, 2));      // [H, B T, L]
  return logits.view({heads.size(2), heads.size(0), heads.size(1), weight.size(1)}).permute({1, 2, 0, 3});
}

}  // namespace

LatentLogitsImpl::LatentLogitsImpl(const LatentSizes& sizes) : sizes_(sizes) {
  const auto [embed, heads, kv_heads, dim, latents, form] = sizes;
  query_weight = register_parameter("query_weight", torch::zeros({heads, latents, dim}));
  query_bias = register_parameter("query_bias", torch::zeros({heads, latents}));
  key_weight = register_parameter("key_weight", torch::zeros({kv_heads, latents, dim}));
  key_bias = register_parameter("key_bias", torch::zeros({kv_heads, latents}));
  gate_weight = register_parameter("gate_weight", torch::zeros({heads, embed}));
  gate_bias = register_parameter("gate_bias", torch::full({heads}, kClosed));
  gate_slope = register_parameter("gate_slope", torch::zeros({heads}));
  if (form.decay) {
    decay = register_parameter("decay", torch::empty({kv_heads, latents}));
    reset_decay();
  }
  if (form.floor) floor = register_parameter("floor", torch::full({kv_heads, latents}, formats::kAbsent));
  if (form.conv) {
    conv_weight = register_parameter("conv_weight", torch::empty({kv_heads, dim, formats::kKeyConvWidth}));
    reset_conv();
  }
}

void LatentLogitsImpl::reset_decay() {
  const torch::NoGradGuard no_grad;
  const auto half_lives = torch::linspace(std::log(kShortestHalfLife), std::log(kLongestHalfLife), decay.size(1)).exp();
  decay.copy_((std::log(2.0) / half_lives).log().expand_as(decay));
}

void LatentLogitsImpl::reset_conv() {
  const torch::NoGradGuard no_grad;
  conv_weight.zero_();
  conv_weight.select(-1, formats::kKeyConvWidth - 1).fill_(1.0);
}

std::pair<at::Tensor, OptionalTensor> LatentLogitsImpl::convolved(const at::Tensor& key, int64_t sinks_here,
                                                                  const OptionalTensor& recent_keys) {
  at::Tensor read = key.to(conv_weight.scalar_type()).flatten(2);
  if (sinks_here > 0) read = at::constant_pad_nd(read.slice(1, sinks_here), {0, 0, sinks_here, 0});
  CausalConv1dOptions options;
  options.initial_state = recent_keys;
  options.output_final_state = true;
  auto [out, recent] = causal_conv1d(read, conv_weight.flatten(0, 1), options);
  return {out.view_as(key), std::move(recent)};
}

LatentInputs LatentLogitsImpl::forward(const at::Tensor& x, const at::Tensor& query, const at::Tensor& key, int64_t position,
                                       const FarOptions& far, const OptionalTensor& recent_keys) {
  const auto dtype = query_weight.scalar_type();
  const int64_t first = position + 1 - far.window - far.sinks;
  const auto count = torch::arange(first, first + x.size(1), torch::kLong).clamp(0, far.far_limit);
  const auto growth = (count.clamp_min(1).to(dtype) / formats::kFarUnit).log();  // [T]
  const auto gate = at::linear(x.to(dtype), gate_weight, gate_bias) - gate_slope * growth.unsqueeze(-1);

  LatentInputs inputs;
  auto query_logits = per_head(query, query_weight, query_bias);
  if (first <= 0) {
    query_logits = query_logits.masked_fill((count == 0).view({1, -1, 1, 1}), -std::numeric_limits<double>::infinity());
  }
  inputs.query_logits = at::cat({gate.unsqueeze(-1), query_logits}, -1);
  at::Tensor read = key;
  if (conv_weight.defined()) {
    const int64_t sinks_here = std::clamp<int64_t>(far.sinks - position, 0, key.size(1));
    std::tie(read, inputs.recent_keys) = convolved(key, sinks_here, recent_keys);
  }
  inputs.key_logits = per_head(read, key_weight, key_bias);
  if (decay.defined()) {
    inputs.log_decay = decay.exp().neg().expand({x.size(0), x.size(1), sizes_.num_kv_heads, sizes_.latents});
  }
  if (floor.defined()) inputs.floor = floor;
  return inputs;
}

std::vector<std::pair<std::string, at::Tensor>> LatentLogitsImpl::named_tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> tensors = {
      {"query.weight", query_weight}, {"query.bias", query_bias}, {"key.weight", key_weight}, {"key.bias", key_bias},
      {"gate.weight", gate_weight},   {"gate.bias", gate_bias},   {"gate.slope", gate_slope}};
  if (decay.defined()) tensors.emplace_back("decay", decay);
  if (floor.defined()) tensors.emplace_back("floor", floor);
  if (conv_weight.defined()) tensors.emplace_back("conv.weight", conv_weight);
  return tensors;
}

}  // namespace latte::extend
