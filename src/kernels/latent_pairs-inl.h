// Operands of latent attention as pairs of bfloat16, for Product Pairs (tile_matmul-inl.h). Included once per SIMD target.
#if defined(LATTE_KERNELS_LATENT_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_LATENT_PAIRS_INL_H_
#undef LATTE_KERNELS_LATENT_PAIRS_INL_H_
#else
#define LATTE_KERNELS_LATENT_PAIRS_INL_H_
#endif

#include <algorithm>

#include "hwy/highway.h"
#include "kernels/latent_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

// Pairs along the columns of `count` rows, `row` floats apart and as long; `rows` [count, row / 2].
HWY_INLINE void PairEachRow(size_t count, const float* from, size_t row, float* rows) {
  for (size_t i = 0; i < count; ++i) PairColumns(F(), from + i * row, row, rows + i * row / 2);
}

// Pairs of neighbours among `count` rows; an odd last one's other is made zero. `pairs` [(count + 1) / 2, row], may be `from`.
HWY_INLINE void PairNeighbours(size_t count, float* from, size_t row, float* pairs) {
  if (count % 2 == 1) std::fill_n(from + count * row, row, 0.0f);
  for (size_t i = 0; i < count; i += 2) PairRows(F(), from + i * row, from + (i + 1) * row, row, pairs + i / 2 * row);
}

// A chunk's operands as pairs of bfloat16 (Product Pairs), and the state's.
struct PairedChunk {
  PairedChunk(const Dims& dims, Scratch& scratch)
      : row((dims.latents_padded + kChunk) / 2),
        shares(scratch.Take(kChunk * row)),
        weights(scratch.Take(kChunk * dims.latents_padded / 2)),
        weights_of_tokens(scratch.Take(kChunk * dims.latents_padded / 2)),
        sum(scratch.Take(row * dims.head_dim_padded)),
        values(sum + dims.StateFloats() / 2) {}
  static size_t Floats(const Dims& dims) {
    const size_t row = (dims.latents_padded + kChunk) / 2;
    return Scratch::Rounded(kChunk * row) + 2 * Scratch::Rounded(kChunk * dims.latents_padded / 2) +
           Scratch::Rounded(row * dims.head_dim_padded);
  }

  size_t row;                // of shares
  float* shares;             // p / z and scores, pairs along latents and tokens [C, (L + C) / 2]
  float* weights;            // e, pairs along latents [C, L / 2]
  float* weights_of_tokens;  // e, pairs along tokens [C / 2, L]
  float* sum;                // S, pairs along latents [L / 2, D]
  float* values;             // v, pairs along tokens [C / 2, D], behind the sum
};

// A chunk's operands as pairs of bfloat16 (Product Pairs). Rows of kChunk tokens; "of tokens": pairs along tokens [C / 2, …].
struct PairedBackward {
  PairedBackward(const Dims& dims, Scratch& scratch)
      : latents(dims.latents_padded / 2),
        columns(dims.head_dim_padded / 2),
        weights(scratch.Take(kChunk * latents)),
        weights_of_tokens(scratch.Take(kChunk * latents)),
        values(scratch.Take(kChunk * columns)),
        values_of_tokens(scratch.Take(kChunk * columns)),
        grad_sum(scratch.Take(dims.StateFloats() / 2)),
        shares(scratch.Take(kChunk * latents)),
        shares_of_tokens(scratch.Take(kChunk * latents)),
        grad_out(scratch.Take(kChunk * columns)),
        grad_out_of_tokens(scratch.Take(kChunk * columns)),
        scores_of_tokens(scratch.Take(kChunk * kChunk / 2)) {}
  static size_t Floats(const Dims& dims) {
    return 4 * Scratch::Rounded(kChunk * dims.latents_padded / 2) + 4 * Scratch::Rounded(kChunk * dims.head_dim_padded / 2) +
           Scratch::Rounded(dims.StateFloats() / 2) + Scratch::Rounded(kChunk * kChunk / 2);
  }

  size_t latents, columns;    // L / 2, D / 2: the lengths of rows of pairs
  float* weights;             // e [C, L / 2]
  float* weights_of_tokens;   // [C / 2, L]
  float* values;              // v [C, D / 2]
  float* values_of_tokens;    // [C / 2, D]
  float* grad_sum;            // dS, pairs along latents [L / 2, D]
  float* shares;              // p / z [C, L / 2]
  float* shares_of_tokens;    // [C / 2, L]
  float* grad_out;            // dy [C, D / 2]
  float* grad_out_of_tokens;  // [C / 2, D]
  float* scores_of_tokens;    // A [C / 2, C]
};

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
