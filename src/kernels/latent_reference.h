// Latent attention as its definition reads, in double and quadratic time: the oracle of the tests and of nothing else.
#pragma once

#include <cstdint>
#include <vector>

namespace latte::kernels {

// One query head of one sequence. Row-major arrays; a missing optional array is empty.
struct LatentReference {
  int64_t time = 0;
  int64_t latents = 0;
  int64_t head_dim = 0;
  bool causal = true;
  std::vector<double> query_logits;  // [T, L], or [T, L + 1] with window_out
  std::vector<double> key_logits;    // [T, L]
  std::vector<double> values;        // [T, D]
  std::vector<double> log_decay;     // [T, L]
  std::vector<double> window_out;    // [T, D]
  std::vector<bool> key_mask;        // [T]

  std::vector<double> Forward() const;  // out [T, D]
};

}  // namespace latte::kernels
