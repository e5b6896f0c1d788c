#include "nn/attention_weights.h"

#include <cmath>
#include <limits>

namespace latte::nn {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
constexpr double kStrongestDecay = -1e6;  // stands for -inf, whose sums couldn't be subtracted

// [B, T, Hkv, X] -> [B, H, T, X] in float64, each key-value head repeated for the query heads that read it.
at::Tensor per_query_head(const at::Tensor& x, int64_t heads) {
  return x.to(torch::kFloat64).repeat_interleave(heads / x.size(2), 2).transpose(1, 2);
}

// t - s, int64 [T, T].
at::Tensor distances(int64_t time, const at::Device& device) {
  const auto steps = torch::arange(time, torch::TensorOptions(torch::kInt64).device(device));
  return steps.unsqueeze(1) - steps.unsqueeze(0);
}

}  // namespace

at::Tensor latent_attention_weights(const at::Tensor& log_shares, const at::Tensor& key_logits,
                                    const LatentWeightsOptions& options) {
  const int64_t time = log_shares.size(1), heads = log_shares.size(2), latents = log_shares.size(3);
  auto keys = key_logits.to(torch::kFloat64);
  if (options.log_decay) {
    auto decay = options.log_decay->to(torch::kFloat64);
    if (options.key_mask) decay = decay.masked_fill(options.key_mask->logical_not().unsqueeze(-1).unsqueeze(-1), 0.0);
    decay = decay.clamp_min(kStrongestDecay);
    keys = keys - decay.cumsum(1);  // forgetting is the paper's attention with these keys (DESIGN, "Forgetting")
  }
  if (options.key_mask) keys = keys.masked_fill(options.key_mask->logical_not().unsqueeze(-1).unsqueeze(-1), kMinusInfinity);
  auto totals = options.causal ? keys.logcumsumexp(1) : keys.logsumexp(1, /*keepdim=*/true).expand_as(keys);
  totals = totals.masked_fill(totals == kMinusInfinity, 0.0);  // a latent that saw nothing: its keys are -inf, its weights 0
  keys = per_query_head(keys, heads);
  const auto readers = per_query_head(log_shares, heads) - per_query_head(totals, heads);  // [B, H, T, L]
  const auto future = distances(time, keys.device()) < 0;

  // One latent at a time: [B, H, T, T, L] at once would need L times the memory of the result.
  auto weights = torch::zeros({keys.size(0), heads, time, time}, keys.options());
  for (int64_t l = 0; l < latents; ++l) {
    auto log_weights = readers.select(-1, l).unsqueeze(-1) + keys.select(-1, l).unsqueeze(-2);
    if (options.causal) log_weights = log_weights.masked_fill(future, kMinusInfinity);
    weights = weights + log_weights.exp();
  }
  return weights;
}

at::Tensor window_attention_weights(const at::Tensor& query, const at::Tensor& key, const WindowWeightsOptions& options) {
  const int64_t time = query.size(1), heads = query.size(2);
  const double scale = 1.0 / std::sqrt(static_cast<double>(query.size(3)));
  const auto keys = per_query_head(key, heads).transpose(-2, -1);
  auto scores = torch::matmul(per_query_head(query, heads), keys) * scale;

  const auto distance = distances(time, query.device());
  auto readable = options.causal ? distance >= 0 : torch::ones_like(distance, torch::kBool);
  if (options.window > 0) {
    auto sinks = torch::zeros_like(readable);
    if (options.sinks > 0) {
      sinks = (options.causal ? distance : distance.abs()) >= options.window;
      if (options.sinks < time) sinks.slice(1, options.sinks) = false;
      if (options.sink_query) {
        scores = torch::where(sinks, torch::matmul(per_query_head(*options.sink_query, heads), keys) * scale, scores);
      }
    }
    readable = readable.logical_and(distance.abs() < options.window).logical_or(sinks);
  }
  if (options.key_bias) scores = scores + options.key_bias->to(torch::kFloat64).unsqueeze(1).unsqueeze(1);
  scores = scores.masked_fill(readable.logical_not(), kMinusInfinity);
  if (options.key_mask) {
    scores = scores.masked_fill(options.key_mask->logical_not().unsqueeze(1).unsqueeze(1), kMinusInfinity);
  }
  const auto empty = (scores == kMinusInfinity).all(-1, /*keepdim=*/true);
  return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0);
}

}  // namespace latte::nn
