// The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, equations 1 to 4), from its gates' logits:
//   r = sigmoid(recurrence_logits), i = sigmoid(input_logits), log a = -8 softplus(lambda) r,
//   h[t] = a h[t - 1] + sqrt(1 - a²) (i x[t]).
// The state h is float32. A masked token leaves h as it was and outputs h. Slices: one per sequence and block of channels.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace latte::kernels {

struct RgLruArgs {
  DType dtype = DType::kFloat32;
  int64_t sequences = 0;                // N
  int64_t time = 0;                     // T
  int64_t channels = 0;                 // C
  const int64_t* cu_seqlens = nullptr;  // [N + 1] or null

  View x;                                // [B, T, C]
  View recurrence_logits;                // [B, T, C]
  View input_logits;                     // [B, T, C]
  const float* lambda = nullptr;         // [C]: a = sigmoid(-lambda)^(8 r), that is log a = -8 softplus(lambda) r
  MaskView key_mask;                     // [B, T], optional
  const float* initial_state = nullptr;  // [N, C] or null (zero)
};

struct RgLruOutputs {
  MutableView out;               // [B, T, C], dtype
  float* final_state = nullptr;  // [N, C] or null
  float* hidden = nullptr;       // [B, T, C] float32, contiguous: every h, for the backward pass; null in inference
};

struct RgLruGradients {
  View grad_out;                            // [B, T, C], dtype
  const float* grad_final_state = nullptr;  // [N, C] or null
  const float* hidden = nullptr;            // from the forward pass
  MutableView grad_x;
  MutableView grad_recurrence_logits;
  MutableView grad_input_logits;
  float* grad_lambda = nullptr;         // [N, C]: the caller sums over N
  float* grad_initial_state = nullptr;  // [N, C] or null
};

int64_t RgLruSlices(const RgLruArgs& args);
void RgLruForward(const RgLruArgs& args, const RgLruOutputs& outputs, int64_t slice);
void RgLruBackward(const RgLruArgs& args, const RgLruGradients& gradients, int64_t slice);
// One token (T = 1); `state` [N, C] is advanced in place. `args.initial_state` is not read.
void RgLruStep(const RgLruArgs& args, const RgLruOutputs& outputs, float* state, int64_t slice);

}  // namespace latte::kernels
