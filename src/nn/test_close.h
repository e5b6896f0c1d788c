// How tests of modules and models compare tensors.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>

namespace latte::nn {

// ‖got − expected‖ ≤ tolerance (‖expected‖ + 0.01 √n), in float64; the same shape.
inline testing::AssertionResult close(const at::Tensor& got, const at::Tensor& expected, double tolerance = 1e-5) {
  if (got.sizes() != expected.sizes()) {
    return testing::AssertionFailure() << "shape " << got.sizes() << ", expected " << expected.sizes();
  }
  const auto reference = expected.detach().to(torch::kFloat64);
  const double error = (got.detach().to(torch::kFloat64) - reference).norm().item<double>();
  const double allowed = tolerance * (reference.norm().item<double>() + 0.01 * std::sqrt(static_cast<double>(reference.numel())));
  if (error <= allowed) return testing::AssertionSuccess();  // false for NaN
  return testing::AssertionFailure() << "‖a − b‖ = " << error << ", allowed " << allowed
                                     << ", ‖b‖ = " << reference.norm().item<double>();
}

}  // namespace latte::nn
