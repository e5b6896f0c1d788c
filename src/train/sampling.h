// Drawing the next token from a model's logits.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace latte::train {

struct SamplingOptions {
  double temperature = 1.0;  // 0: the most likely token
  int64_t top_k = 0;         // draw from the k most likely; 0: from all
  double top_p = 1.0;        // draw from the fewest tokens whose probabilities reach this sum

  void validate() const;  // throws std::invalid_argument
};

class Sampler {
 public:
  Sampler(const SamplingOptions& options, uint64_t seed);
  // logits [V] of any floating dtype -> a token.
  int64_t sample(const at::Tensor& logits);

 private:
  SamplingOptions options_;
  at::Generator generator_;
};

// float64 [V], the probabilities to draw from: zero for tokens that the options rule out. Takes temperature > 0.
at::Tensor sampling_probabilities(const at::Tensor& logits, const SamplingOptions& options);

}  // namespace latte::train
