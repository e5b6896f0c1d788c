#include "extend/latent_start.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>

#include "formats/adapter.h"

namespace latte::extend {
namespace {

constexpr double kNearest = 128.0, kFarthest = 4096.0;  // distances that scores are averaged over, evenly in their logarithm
constexpr int64_t kDistances = 128;
constexpr double kFloorTokens = 32.0;  // a floor starts as heavy as so many tokens of mean weight
constexpr double kLeastWeight = 1e-4;  // of a query that doesn't look far
constexpr double kRidge = 0.02;        // of the gate's regression, relative to the inputs' variance

// [Dk, Dk]: q times this is the mean of the query rotated by the distances.
at::Tensor mean_rotation(const models::Rope& rope, int64_t head_dim) {
  const auto distances = torch::linspace(std::log(kNearest), std::log(kFarthest), kDistances).exp().round().to(torch::kLong);
  const auto basis = torch::eye(head_dim).expand({1, kDistances, head_dim, head_dim});
  return rope.rotate(basis, distances).mean(1).squeeze(0);
}

at::Tensor square_root(const at::Tensor& symmetric) {
  const auto [values, vectors] = at::linalg_eigh(symmetric.to(torch::kFloat64));
  return (vectors * values.clamp_min(0).sqrt()).to(torch::kFloat32);
}

at::Tensor nearest(const at::Tensor& points, const at::Tensor& centers) {
  return (at::matmul(points, centers.t()) - centers.square().sum(-1) / 2).argmax(-1);
}

// Sums of rows of `values` [N, …] by member: [K, …].
at::Tensor sums(const at::Tensor& values, const at::Tensor& member, int64_t count) {
  auto sizes = values.sizes().vec();
  sizes[0] = count;
  return torch::zeros(sizes, values.options()).index_add_(0, member, values);
}

}  // namespace

at::Tensor far_shares(const at::Tensor& query, const at::Tensor& key, const at::Tensor& positions, double scale,
                      const FarOptions& far) {
  const int64_t kv_heads = key.size(1), group = query.size(1) / kv_heads;
  const auto asked = query.index_select(0, positions).to(torch::kFloat32).unflatten(1, {kv_heads, group});  // [N, Hkv, R, Dk]
  const auto scores = at::matmul(asked.transpose(0, 1).flatten(1, 2), key.to(torch::kFloat32).permute({1, 2, 0}))
                          .mul_(scale)
                          .view({kv_heads, positions.size(0), group, key.size(0)});  // [Hkv, N, R, T]
  const auto at = positions.unsqueeze(1), from = torch::arange(key.size(0), torch::kLong);
  const auto future = (from > at).view({1, positions.size(0), 1, -1});
  const auto probabilities = scores.masked_fill(future, -INFINITY).softmax(-1);
  const auto is_far = (from >= far.sinks).logical_and(from <= at - far.window).view({1, positions.size(0), 1, -1});
  return (probabilities * is_far).sum(-1).transpose(0, 1).flatten(1);
}

Clusters k_means(const at::Tensor& points, const at::Tensor& weights, int64_t count, uint64_t seed) {
  constexpr int kRounds = 12;
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  auto centers = points.index_select(0, at::multinomial(weights, 1, false, generator));
  auto distances = (points - centers).square().sum(-1);
  for (int64_t k = 1; k < count; ++k) {
    const auto chosen = at::multinomial((weights * distances).clamp_min(1e-12), 1, false, generator);
    const auto center = points.index_select(0, chosen);
    centers = at::cat({centers, center});
    distances = at::minimum(distances, (points - center).square().sum(-1));
  }
  for (int round = 0; round < kRounds; ++round) {
    const auto member = nearest(points, centers);
    const auto total = sums(weights, member, count).unsqueeze(-1);
    const auto means = sums(points * weights.unsqueeze(-1), member, count) / total.clamp_min(1e-9);
    centers = at::where(total > 1e-9, means, centers);
  }
  return {centers, nearest(points, centers)};
}

void start_latents(LatentLogits& latents, const LayerSamples& samples, const models::Rope& rope, double scale, uint64_t seed,
                   const LatentForm& form) {
  const torch::NoGradGuard no_grad;
  const auto [embed, heads, kv_heads, dim, count, of_layer] = latents->sizes();
  const int64_t group = heads / kv_heads;
  const auto rotation = mean_rotation(rope, dim) * scale;
  if (of_layer.conv) latents->reset_conv();
  if (form.decay) {
    latents->reset_decay();
  } else if (of_layer.decay) {
    latents->decay.fill_(formats::kAbsent);
  }
  if (of_layer.floor) latents->floor.fill_(formats::kAbsent);
  for (int64_t g = 0; g < kv_heads; ++g) {
    const auto query = samples.query.slice(1, g * group, (g + 1) * group).to(torch::kFloat32);  // [N, R, Dk]
    const auto weights = samples.far_share.slice(1, g * group, (g + 1) * group).flatten().to(torch::kFloat32) + kLeastWeight;
    const auto key = samples.key.select(1, g).to(torch::kFloat32);
    const auto centered = key - key.mean(0);
    // Queries are near each other when they give keys near scores.
    const auto metric = at::matmul(rotation, square_root(at::matmul(centered.t(), centered) / static_cast<double>(key.size(0))));
    const auto flat = query.flatten(0, 1);
    const Clusters clusters = k_means(at::matmul(flat, metric), weights, count, seed + static_cast<uint64_t>(g));
    const auto total = sums(weights, clusters.member, count).unsqueeze(-1).clamp_min(1e-9);
    const auto typical = sums(flat * weights.unsqueeze(-1), clusters.member, count) / total;  // [L, Dk]
    latents->key_weight[g].copy_(at::matmul(typical, rotation));
    latents->key_bias[g].zero_();
    if (form.floor) {
      const auto logits = at::matmul(key, latents->key_weight[g].t());  // [M, L]
      latents->floor[g].copy_(logits.logsumexp(0) - std::log(static_cast<double>(key.size(0)) / kFloorTokens));
    }
    const auto choice = at::matmul(clusters.centers, metric.t());                       // [L, Dk]
    const auto offset = clusters.centers.square().sum(-1).mul(-0.5);                    // [L]
    const auto level = (at::matmul(query, choice.t()) + offset).logsumexp(-1).mean(0);  // [R]: so that the gate compares with 0
    for (int64_t r = 0; r < group; ++r) {
      latents->query_weight[g * group + r].copy_(choice);
      latents->query_bias[g * group + r].copy_(offset - level[r]);
    }
  }

  // log of (window's share / latents' share), by ridge regression on the input.
  const auto share = samples.far_share.to(torch::kFloat64).clamp(1e-3, 1 - 1e-3);
  const auto growth = (samples.far_count.to(torch::kFloat64).clamp_min(1) / formats::kFarUnit).log().unsqueeze(-1);
  const auto target = (1 - share).log() - share.log() + growth;
  const auto x = samples.x.to(torch::kFloat64);
  const auto x_mean = x.mean(0), target_mean = target.mean(0);
  const auto centered = x - x_mean;
  auto normal = at::matmul(centered.t(), centered);
  normal.diagonal().add_(kRidge * static_cast<double>(x.size(0)) * std::max(1e-12, centered.square().mean().item<double>()));
  const auto weight = at::linalg_solve(normal, at::matmul(centered.t(), target - target_mean));  // [E, H]
  latents->gate_weight.copy_(weight.t());
  latents->gate_bias.copy_(target_mean - at::matmul(x_mean, weight));
  latents->gate_slope.fill_(1.0);
}

}  // namespace latte::extend
