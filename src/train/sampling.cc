#include "train/sampling.h"

#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace latte::train {

void SamplingOptions::validate() const {
  if (!(temperature >= 0) || !std::isfinite(temperature)) {
    throw std::invalid_argument("temperature is " + std::to_string(temperature) + ", expected a number >= 0");
  }
  if (top_k < 0) throw std::invalid_argument("top-k is " + std::to_string(top_k) + ", expected an integer >= 0");
  if (!(top_p > 0 && top_p <= 1)) {
    throw std::invalid_argument("top-p is " + std::to_string(top_p) + ", expected a number in (0, 1]");
  }
}

Sampler::Sampler(const SamplingOptions& options, uint64_t seed)
    : options_(options), generator_(at::detail::createCPUGenerator(seed)) {
  options.validate();
}

int64_t Sampler::sample(const at::Tensor& logits) {
  // The arg max of a NaN would print as text.
  if (logits.isnan().any().item<bool>()) throw std::runtime_error("the model's logits aren't numbers");
  if (options_.temperature == 0) return logits.argmax().item<int64_t>();
  return at::multinomial(sampling_probabilities(logits, options_), 1, /*replacement=*/false, generator_).item<int64_t>();
}

at::Tensor sampling_probabilities(const at::Tensor& logits, const SamplingOptions& options) {
  constexpr double kNever = -std::numeric_limits<double>::infinity();
  // The greatest becomes 0, and float64 holds any temperature: however low, it makes nothing but zeros and -inf.
  at::Tensor scores = logits.to(at::kDouble);
  scores = (scores - scores.max()) / options.temperature;
  if (options.top_k > 0 && options.top_k < scores.size(0)) {
    const auto [kept, places] = scores.topk(options.top_k);
    scores = at::full_like(scores, kNever).scatter(0, places, kept);
  }
  if (options.top_p >= 1.0) return scores.softmax(0);
  auto [sorted, order] = scores.softmax(0).sort(/*dim=*/0, /*descending=*/true);
  // What comes before a token must leave something of top_p: the first always stays.
  const at::Tensor dropped = sorted.cumsum(0) - sorted >= options.top_p;
  sorted.masked_fill_(dropped, 0.0);
  return at::zeros_like(sorted).scatter(0, order, sorted / sorted.sum());
}

}  // namespace latte::train
