// What a transformer does to a token's row between its matrix products, for inference.
#pragma once

#include <cstdint>

namespace latte::kernels {

// out[i] = x[i] / sqrt(mean(x²) + epsilon) * weight[i]; out may be x.
void RmsNormRow(const float* x, const float* weight, float epsilon, int64_t n, float* out);
// (x - mean) / sqrt(variance + epsilon) * weight + bias; bias may be null, out may be x.
void LayerNormRow(const float* x, const float* weight, const float* bias, float epsilon, int64_t n, float* out);

enum class Gate : uint8_t {
  kSilu,
  kGelu,      // x Φ(x), to 1e-7
  kGeluTanh,  // its approximation by tanh
};
// out[i] = gate(x[i]) * up[i]; without `up` (null) gate(x[i]). out may be either.
void GateRow(Gate gate, const float* x, const float* up, int64_t n, float* out);

// Rotates `pairs` pairs of channels in place; channels behind them stay. cos and sin are [pairs].
enum class RotaryPairs : uint8_t {
  kNeighbours,  // (2 i, 2 i + 1)
  kHalves,      // (i, i + pairs)
};
void RotateRow(RotaryPairs layout, int64_t pairs, const float* cos, const float* sin, float* x);

// x[i] = scale * ln(sigmoid(x[i])).
void LogSigmoidRow(float scale, int64_t n, float* x);

// x[0, n) = softmax(x), -inf everywhere gives zeros.
void SoftmaxRow(int64_t n, float* x);

}  // namespace latte::kernels
