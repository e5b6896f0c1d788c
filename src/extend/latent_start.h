// Where latents start: from the original's own queries, in closed form.
//
// A latent is an average of values under weights exp(key_logits), and so is what one query reads under softmax attention. So each
// latent is given a typical query of those that look far, a centroid of k-means, and reads what that query would: its key logits
// are that query's scores, averaged over distances. A query then chooses among latents by its nearness to the centroids, which is
// linear in it. The gate is fitted to the share of probability that the original has beyond window and sinks.
#pragma once

#include <torch/torch.h>

#include <cstdint>

#include "extend/latent_logits.h"
#include "models/decoder_attention.h"

namespace latte::extend {

// Samples of one layer: N tokens that have something beyond the window, M tokens for the keys' spread.
struct LayerSamples {
  at::Tensor x;          // [N, E], the attention's input
  at::Tensor query;      // [N, H, Dk], not rotated
  at::Tensor far_share;  // [N, H], the original's probability beyond window and sinks
  at::Tensor far_count;  // [N], how many tokens are there
  at::Tensor key;        // [M, Hkv, Dk], not rotated, of tokens that latents read
};

// The share of softmax attention that tokens at `positions` [N] give to what lies beyond window and sinks: [N, H]. query
// [T, H, Dk] and key [T, Hkv, Dk], rotated.
at::Tensor far_shares(const at::Tensor& query, const at::Tensor& key, const at::Tensor& positions, double scale,
                      const FarOptions& far);

struct Clusters {
  at::Tensor centers;  // [K, D]
  at::Tensor member;   // int64 [N], whose each point is
};
// K-means of points [N, D] with weights [N] > 0 by Lloyd's method from k-means++'s start. N may be less than K.
Clusters k_means(const at::Tensor& points, const at::Tensor& weights, int64_t count, uint64_t seed);

// Sets all of the latents' parameters. `form`: what they shall have, of what their layer may have (for the sake of others in it).
void start_latents(LatentLogits& latents, const LayerSamples& samples, const models::Rope& rope, double scale, uint64_t seed,
                   const LatentForm& form);

}  // namespace latte::extend
