#include "models/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace latte::models {
namespace {

using formats::RopeScalingKind;

constexpr int64_t kFirstPositions = 1024;

// The pair, counted from the fastest, that turns `turns` times within `context` tokens.
double pair_of_turns(double turns, double dims, double context, double base) {
  return dims * std::log(context / (turns * 2 * std::numbers::pi)) / (2 * std::log(base));
}

}  // namespace

Rope::Rope(const formats::RopeConfig& config, int64_t context_length, const at::Tensor& frequency_divisors) : config_(config) {
  const formats::RopeScaling& scaling = config.scaling;
  TORCH_CHECK_VALUE(config.dims >= 2 && config.dims % 2 == 0, "Rope: dims must be even and positive, got ", config.dims);
  TORCH_CHECK_VALUE(std::isfinite(config.base) && config.base > 0, "Rope: base must be positive, got ", config.base);
  TORCH_CHECK_VALUE(std::isfinite(scaling.factor) && scaling.factor > 0, "Rope: factor must be positive, got ", scaling.factor);
  const int64_t pairs = config.dims / 2;
  const auto dims = static_cast<double>(config.dims);
  double base = config.base;
  if (scaling.kind == RopeScalingKind::kNtk) {
    TORCH_CHECK_VALUE(config.dims > 2, "Rope: ntk needs more than one pair");
    base *= std::pow(scaling.factor, dims / (dims - 2));
  }
  const auto pair = torch::arange(pairs, torch::kFloat64);
  frequencies_ = (pair * (-2 / dims * std::log(base))).exp();
  if (frequency_divisors.defined()) frequencies_ = frequencies_ / frequency_divisors.to(torch::kFloat64);
  if (scaling.kind == RopeScalingKind::kLinear) frequencies_ = frequencies_ / scaling.factor;
  if (scaling.kind == RopeScalingKind::kYarn) {
    const auto context = static_cast<double>(scaling.original_context > 0 ? scaling.original_context : context_length);
    TORCH_CHECK_VALUE(context > 0 && base > 1, "Rope: yarn needs the trained context and a base above 1, got ", context, " and ",
                      base);
    const double first = std::max(0.0, std::floor(pair_of_turns(scaling.beta_fast, dims, context, base)));
    const double last = std::min(dims - 1, std::ceil(pair_of_turns(scaling.beta_slow, dims, context, base)));
    const auto kept = 1 - ((pair - first) / std::max(0.001, last - first)).clamp(0, 1);
    frequencies_ = frequencies_ * (kept + (1 - kept) / scaling.factor);
    magnitude_ = scaling.attention_factor * (1 + 0.1 * std::log(scaling.factor));
  }
}

at::Tensor Rope::rotate(const at::Tensor& x, const at::Tensor& positions) const {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(3) == config_.dims, "Rope: expected [B, T, H, ", config_.dims, "], got ", x.sizes());
  TORCH_CHECK_VALUE(positions.dim() == 1 && positions.size(0) == x.size(1), "Rope: expected ", x.size(1), " positions, got ",
                    positions.sizes());
  if (x.numel() == 0) return x;
  const int64_t end = positions.max().item<int64_t>() + 1;
  if (!cosines_.defined() || cosines_.size(0) < end) {
    const torch::NoGradGuard no_grad;
    const int64_t known = cosines_.defined() ? cosines_.size(0) : kFirstPositions;
    const auto angles = torch::outer(torch::arange(std::max(end, 2 * known), torch::kFloat64), frequencies_);
    cosines_ = (angles.cos() * magnitude_).to(torch::kFloat32);
    sines_ = (angles.sin() * magnitude_).to(torch::kFloat32);
  }
  const auto cosine = cosines_.index_select(0, positions).unsqueeze(1);  // [T, 1, D/2]
  const auto sine = sines_.index_select(0, positions).unsqueeze(1);

  const auto wide = x.to(torch::kFloat32);
  at::Tensor rotated;
  if (config_.pairs == formats::RopePairs::kNeighbours) {
    const auto pairs = wide.unflatten(-1, {config_.dims / 2, 2});
    const auto left = pairs.select(-1, 0), right = pairs.select(-1, 1);
    rotated = torch::stack({left * cosine - right * sine, left * sine + right * cosine}, -1).flatten(-2);
  } else {
    const auto left = wide.slice(-1, 0, config_.dims / 2), right = wide.slice(-1, config_.dims / 2);
    rotated = torch::cat({left * cosine - right * sine, left * sine + right * cosine}, -1);
  }
  return rotated.to(x.scalar_type());
}

}  // namespace latte::models
