// Pieces of a decoder's layer that are one pass over memory, forward and backward (kernels/training_rows.h), where torch has a
// chain of operators.
#pragma once

#include <torch/torch.h>

namespace latte::models {

// at::rms_norm over the last dimension, weight [E]: fused on the CPU in float32 and bfloat16 where the weight has no gradient.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// silu(gate) * up, of one shape: fused on the CPU in float32 and bfloat16.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace latte::models
