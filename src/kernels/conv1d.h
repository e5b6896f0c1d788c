// Causal depthwise convolution over time: y[t, c] = bias[c] + Σ_j weight[c, j] x[t - K + 1 + j, c], as the short convolution of
// Mamba and Griffin (weight layout of causal-conv1d). Tokens before the sequence are zero, or come from the initial state.
//
// Masked tokens enter as zero. Slices: one per sequence and block of channels; see Conv1dSlices.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace latte::kernels {

struct Conv1dArgs {
  DType dtype = DType::kFloat32;
  int64_t sequences = 0;                // N
  int64_t time = 0;                     // T
  int64_t channels = 0;                 // C
  int64_t width = 0;                    // K >= 1
  const int64_t* cu_seqlens = nullptr;  // [N + 1] or null

  View x;                                // [B, T, C] (head_stride unused)
  const float* weight = nullptr;         // [C, K], contiguous
  const float* bias = nullptr;           // [C] or null
  MaskView key_mask;                     // [B, T], optional
  const float* initial_state = nullptr;  // [N, K - 1, C]: the last K - 1 inputs, oldest first; or null
};

struct Conv1dOutputs {
  MutableView out;               // [B, T, C], dtype
  float* final_state = nullptr;  // [N, K - 1, C] or null
};

struct Conv1dGradients {
  View grad_out;                            // [B, T, C], dtype
  const float* grad_final_state = nullptr;  // [N, K - 1, C] or null
  MutableView grad_x;                       // [B, T, C], dtype
  // Each slice adds to these of its sequence's row alone, so that slices never share memory; the caller sums over N.
  float* grad_weight = nullptr;         // [N, C, K], zeroed by the kernel
  float* grad_bias = nullptr;           // [N, C] or null
  float* grad_initial_state = nullptr;  // [N, K - 1, C] or null
};

int64_t Conv1dSlices(const Conv1dArgs& args);
void Conv1dForward(const Conv1dArgs& args, const Conv1dOutputs& outputs, int64_t slice);
void Conv1dBackward(const Conv1dArgs& args, const Conv1dGradients& gradients, int64_t slice);
// One token (T = 1), all sequences of a slice; `state` [N, K - 1, C] is shifted in place. `args.initial_state` is not read.
void Conv1dStep(const Conv1dArgs& args, const Conv1dOutputs& outputs, float* state, int64_t slice);

}  // namespace latte::kernels
