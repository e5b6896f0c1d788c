// Rotary positions of pretrained decoders, with the ways to stretch them.
#pragma once

#include <torch/torch.h>

#include <cstdint>

#include "formats/decoder_config.h"

namespace latte::models {

// Rotates queries and keys. Cosines and sines are computed in float64 once for each position that was ever asked for; the table
// grows in rotate(), so one thread at a time.
class Rope {
 public:
  // `frequency_divisors` float32 [dims / 2], or undefined: the file's rope_freqs. `context_length` stands in for a scaling's
  // original context where that is 0.
  Rope(const formats::RopeConfig& config, int64_t context_length, const at::Tensor& frequency_divisors = {});

  // x [B, T, H, D], positions int64 [T] of values >= 0 -> as x. With gradient.
  at::Tensor rotate(const at::Tensor& x, const at::Tensor& positions) const;

  const formats::RopeConfig& config() const { return config_; }
  const at::Tensor& frequencies() const { return frequencies_; }  // float64 [dims / 2], radians a token
  double magnitude() const { return magnitude_; }                 // multiplies what is rotated

 private:
  formats::RopeConfig config_;
  at::Tensor frequencies_;
  double magnitude_ = 1.0;
  mutable at::Tensor cosines_, sines_;  // float32 [positions, dims / 2]
};

}  // namespace latte::models
