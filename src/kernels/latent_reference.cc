#include "kernels/latent_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace latte::kernels {

std::vector<double> LatentReference::Forward() const {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  const int64_t gates = window_out.empty() ? 0 : 1;
  std::vector<double> out(static_cast<size_t>(time * head_dim), 0.0);
  for (int64_t t = 0; t < time; ++t) {
    const double* q = query_logits.data() + t * (latents + gates);
    const double high = *std::max_element(q, q + latents + gates);
    if (high == kNone) continue;
    double total = 0.0;
    for (int64_t l = 0; l < latents + gates; ++l) total += std::exp(q[l] - high);
    double* y = out.data() + t * head_dim;
    if (gates == 1) {
      for (int64_t j = 0; j < head_dim; ++j) y[j] += std::exp(q[0] - high) / total * window_out[t * head_dim + j];
    }
    for (int64_t l = 0; l < latents; ++l) {
      const double p = std::exp(q[l + gates] - high) / total;
      const int64_t end = causal ? t + 1 : time;
      std::vector<double> logits(static_cast<size_t>(end), kNone);
      double decay = 0.0;  // Σ_{s < r <= t} g[r]
      for (int64_t s = end - 1; s >= 0; --s) {
        const bool masked = !key_mask.empty() && !key_mask[s];
        if (!masked) logits[s] = key_logits[s * latents + l] + decay;
        if (!log_decay.empty() && !masked) decay += log_decay[s * latents + l];
      }
      const double top = *std::max_element(logits.begin(), logits.end());
      if (top == kNone) continue;
      double z = 0.0;
      for (double logit : logits) z += std::exp(logit - top);
      for (int64_t s = 0; s < end; ++s) {
        const double weight = logits[s] == kNone ? 0.0 : p * std::exp(logits[s] - top) / z;
        if (weight == 0.0) continue;
        for (int64_t j = 0; j < head_dim; ++j) y[j] += weight * values[s * head_dim + j];
      }
    }
  }
  return out;
}

}  // namespace latte::kernels
