// VAPOR (value rotation): relative positions for latent attention. Neighbouring halves of a vector are rotated by an angle that
// grows with the token's position, as rotary embeddings do for queries and keys (pairs (i, i + D/2), the "rotate half" layout).
// Values are rotated by +position before the latents average them and the latents' output by -position of the reader, so a
// latent's share depends on distances alone. Angles are computed in float64: exact at any position.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace latte::kernels {

struct VaporArgs {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;     // B
  int64_t time = 0;      // T
  int64_t heads = 0;     // H
  int64_t head_dim = 0;  // D, even
  double base = 10000.0;
  bool inverse = false;                // rotate by -position
  View x;                              // [B, T, H, D]
  const int64_t* positions = nullptr;  // [B, T] with the strides below, or null: 0 … T - 1 in every row
  int64_t positions_batch_stride = 0;
  int64_t positions_time_stride = 0;
};

// Rotates each vector; `out` [B, T, H, D] may be `x` itself. The backward pass is the same call with `inverse` flipped, and a
// step is a call with T = 1. Slices: one per batch row and block of tokens.
int64_t VaporSlices(const VaporArgs& args);
void VaporRotate(const VaporArgs& args, const MutableView& out, int64_t slice);

}  // namespace latte::kernels
