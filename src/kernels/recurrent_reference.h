// Naive forward passes, in float64, of the kernels that run along time: convolution, RG-LRU and VAPOR. They follow the equations
// in conv1d.h, rg_lru.h and vapor.h one token at a time. Every array is contiguous, shaped as in those headers; optional ones
// may be null.
#pragma once

#include <cstdint>

namespace latte::kernels {

struct Conv1dReferenceArgs {
  int64_t sequences = 0;  // N
  int64_t time = 0;       // T
  int64_t channels = 0;   // C
  int64_t width = 0;      // K
  const int64_t* cu_seqlens = nullptr;
  const double* x = nullptr;              // [B, T, C]
  const double* weight = nullptr;         // [C, K]
  const double* bias = nullptr;           // [C], optional
  const bool* key_mask = nullptr;         // [B, T], optional
  const double* initial_state = nullptr;  // [N, K - 1, C], optional
};

// out [B, T, C]; final_state [N, K - 1, C], optional.
void Conv1dReference(const Conv1dReferenceArgs& args, double* out, double* final_state);

struct RgLruReferenceArgs {
  int64_t sequences = 0;  // N
  int64_t time = 0;       // T
  int64_t channels = 0;   // C
  const int64_t* cu_seqlens = nullptr;
  const double* x = nullptr;                  // [B, T, C]
  const double* recurrence_logits = nullptr;  // [B, T, C]
  const double* input_logits = nullptr;       // [B, T, C]
  const double* lambda = nullptr;             // [C]
  const bool* key_mask = nullptr;             // [B, T], optional
  const double* initial_state = nullptr;      // [N, C], optional
};

// out [B, T, C]; final_state [N, C], optional.
void RgLruReference(const RgLruReferenceArgs& args, double* out, double* final_state);

struct VaporReferenceArgs {
  int64_t batch = 0;     // B
  int64_t time = 0;      // T
  int64_t heads = 0;     // H
  int64_t head_dim = 0;  // D, even
  double base = 10000.0;
  bool inverse = false;
  const double* x = nullptr;           // [B, T, H, D]
  const int64_t* positions = nullptr;  // [B, T], optional
};

// out [B, T, H, D]. Angles are formed in long double, so that they can judge float64 ones.
void VaporReference(const VaporReferenceArgs& args, double* out);

}  // namespace latte::kernels
