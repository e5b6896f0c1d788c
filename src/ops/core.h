// The core operators: what has kernels, autograd and meta functions of its own. The public operators are made of these. Calls go
// through torch's dispatcher; shapes in inputs.h. Absent outputs are tensors of no element.
#pragma once

#include <torch/torch.h>

#include <tuple>

#include "ops/inputs.h"

namespace latte {

// {out [B, T, H, D], final_state [N, Hkv, L, D + 3] if asked for}.
std::tuple<at::Tensor, at::Tensor> CallLatentAttention(const LatentInputs& inputs, bool output_final_state);
// out [B, T, H, D] in AccumulateType.
at::Tensor CallWindowAttention(const WindowInputs& inputs);
// Both at once, which is faster where no gradient is wanted: latent attention with the window's output as its window_out.
// `latent` is gated, without a window_out; the two describe the same tokens.
std::tuple<at::Tensor, at::Tensor> CallMacchiatoAttention(const WindowInputs& window, const LatentInputs& latent,
                                                          bool output_final_state);
// The caches after these tokens: MacchiatoState's tensors behind `latents`. past_key has `window` rows where present.
std::vector<at::Tensor> NextWindowState(const WindowInputs& inputs);

}  // namespace latte
