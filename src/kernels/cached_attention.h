// Softmax attention of single tokens over keys and values that decoding keeps. A softmax doesn't care in which order it meets its
// keys, so a sliding window is a ring whose slots are read in memory's order.
//
// Slots come in blocks of kCacheBlock whose keys are stored transposed: a vector holds the same channel of neighbouring keys, and
// no score is ever summed across lanes. Values lie row by row.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace latte::kernels {

constexpr int64_t kCacheBlock = 16;

// The cache of one key-value head.
struct KeyValueCache {
  DType dtype = DType::kFloat16;
  int64_t key_dim = 0;     // Dk
  int64_t head_dim = 0;    // D
  int64_t slots = 0;       // a multiple of kCacheBlock
  void* keys = nullptr;    // [slots / kCacheBlock, Dk, kCacheBlock]
  void* values = nullptr;  // [slots, D]
};

// Writes one slot; key [Dk] and value [D] are float32.
void StoreSlot(const KeyValueCache& cache, int64_t slot, const float* key, const float* value);
// x[0, n) as a cache of this dtype would return it.
void RoundRow(DType dtype, int64_t n, float* x);
// Reads slots [first, last) as rows: keys [n, Dk] and values [n, D], strides counted in floats.
void LoadSlots(const KeyValueCache& cache, int64_t first, int64_t last, float* keys, int64_t key_stride, float* values,
               int64_t value_stride);

// Part of a softmax: of one query, over some keys. Floats [0, D) are Σ exp(score - m) v, then z = Σ exp(score - m), then m.
constexpr int64_t kPartExtra = 2;
void ClearPart(int64_t head_dim, float* part);

// Adds slots [first, last) to the parts [group, D + kPartExtra] of `group` queries [group, Dk], which carry the scores' scale.
// Slots of the first and last block outside of [first, last) may hold anything.
void AttendSlots(const KeyValueCache& cache, int64_t first, int64_t last, int64_t group, const float* queries, float* parts);

// part += other.
void JoinParts(int64_t head_dim, const float* other, float* part);
// out[0, D) (+)= share * the part's mean of values; a part that has seen nothing adds nothing.
void ReadPart(int64_t head_dim, const float* part, float share, bool add, float* out);

}  // namespace latte::kernels
