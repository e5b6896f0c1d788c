// Distances between latte's and llama.cpp's predictions for the same file and text.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "llama_reference.h"
#include "models/decoder.h"

namespace latte {

// KL(llama.cpp || latte) in nats, of logits [vocabulary].
inline double kl_divergence(const at::Tensor& reference, const at::Tensor& logits) {
  const auto p = reference.to(torch::kFloat64).log_softmax(-1);
  const auto q = logits.to(torch::kFloat64).log_softmax(-1);
  return (p.exp() * (p - q)).sum().item<double>();
}

// The mean over tokens. latte reads the text in stretches with states between them, so that no table of all logits is needed and
// decoding in pieces is tested along.
inline double mean_kl(const LlamaReference& reference, models::Decoder& model, std::span<const int64_t> tokens, int64_t stretch) {
  const torch::NoGradGuard no_grad;
  const auto input = torch::tensor(std::vector<int64_t>(tokens.begin(), tokens.end())).unsqueeze(0);
  models::DecoderState state;
  at::Tensor logits;
  int64_t begin = 0, end = 0;
  double total = 0;
  reference.logits(tokens, [&](int64_t i, std::span<const float> expected) {
    if (i >= end) {
      begin = end;
      end = std::min(begin + stretch, input.size(1));
      models::DecoderForwardOptions options;
      options.state = begin > 0 ? &state : nullptr;
      options.output_state = true;
      auto result = model->forward(input.slice(1, begin, end), options);
      logits = result.logits[0];
      state = std::move(*result.state);
    }
    total += kl_divergence(torch::from_blob(const_cast<float*>(expected.data()), {static_cast<int64_t>(expected.size())}),
                           logits[i - begin]);
  });
  return total / static_cast<double>(tokens.size());
}

}  // namespace latte
