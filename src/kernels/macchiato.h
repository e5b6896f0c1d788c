// Latte-Macchiato's forward pass in one go: latent.h with window.h's output as what latent 0 reads. The window's output of a few
// tokens at a time stays in the cache, where the latents find it, and the values that both read come from memory once.
#pragma once

#include <cstdint>

#include "kernels/latent.h"
#include "kernels/window.h"

namespace latte::kernels {

// A sequence of one token is a step of decoding, of the window (window.h says what the caller moves) and of the latents (their
// state in, their state out).
//
// Runs the slices [first, last), numbered as LatentSlices() and WindowSlices() are. `window` and `latent` describe the same
// tensors and sequences; latent.query_logits is [B, T, H, L + 1], latent.window_out is not read. Nothing is kept for a backward
// pass: outputs.saved is null. A thread does best with neighbouring slices in one call.
void MacchiatoForward(const WindowArgs& window, const LatentArgs& latent, const LatentOutputs& outputs, int64_t first,
                      int64_t last);

}  // namespace latte::kernels
