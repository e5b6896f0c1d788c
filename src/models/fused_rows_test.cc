#include "models/fused_rows.h"

#include <gtest/gtest.h>

#include "nn/test_close.h"

namespace latte::models {
namespace {

using nn::close;

// ‖a − b‖ against ‖b‖, which for bfloat16 is a matter of how often each side rounds.
double relative_error(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(torch::kFloat64) - b.to(torch::kFloat64)).norm() / b.to(torch::kFloat64).norm()).item<double>();
}

TEST(FusedRows, RmsNormIsTorchs) {
  torch::manual_seed(1);
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
    // Not contiguous, and enough rows for more than one thread.
    const auto x = torch::randn({2, 300, 2, 33}).select(2, 1).to(dtype).requires_grad_(true);
    const auto weight = torch::randn({33}).to(dtype), grad = torch::randn({2, 300, 33}).to(dtype);
    const auto wide = x.detach().to(torch::kFloat64).requires_grad_(true);
    const auto wanted = at::rms_norm(wide, {33}, weight.to(torch::kFloat64), 1e-5), out = rms_norm(x, weight, 1e-5);
    const double tolerance = dtype == torch::kFloat32 ? 1e-6 : 4e-3;
    EXPECT_EQ(out.scalar_type(), dtype);
    EXPECT_LT(relative_error(out, wanted), tolerance);
    EXPECT_LT(relative_error(torch::autograd::grad({out}, {x}, {grad})[0],
                             torch::autograd::grad({wanted}, {wide}, {grad.to(torch::kFloat64)})[0]),
              tolerance);
  }
}

TEST(FusedRows, AWeightThatTrainsGetsItsGradient) {
  torch::manual_seed(2);
  const auto x = torch::randn({5, 8}), weight = torch::randn({8}).requires_grad_(true);
  const auto wanted = torch::autograd::grad({at::rms_norm(x, {8}, weight, 1e-5).sum()}, {weight})[0];
  EXPECT_TRUE(close(torch::autograd::grad({rms_norm(x, weight, 1e-5).sum()}, {weight})[0], wanted));
}

TEST(FusedRows, SwigluIsTorchs) {
  torch::manual_seed(3);
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
    const auto gate = torch::randn({7, 90, 50}).to(dtype).mul(3).transpose(0, 1).requires_grad_(true);
    const auto up = torch::randn({90, 7, 50}).to(dtype).requires_grad_(true), grad = torch::randn({90, 7, 50}).to(dtype);
    const auto wide_gate = gate.detach().to(torch::kFloat64).requires_grad_(true);
    const auto wide_up = up.detach().to(torch::kFloat64).requires_grad_(true);
    const auto wanted = torch::silu(wide_gate) * wide_up, out = swiglu(gate, up);
    const double tolerance = dtype == torch::kFloat32 ? 1e-6 : 4e-3;
    EXPECT_LT(relative_error(out, wanted), tolerance);
    const auto grads = torch::autograd::grad({out}, {gate, up}, {grad});
    const auto wanted_grads = torch::autograd::grad({wanted}, {wide_gate, wide_up}, {grad.to(torch::kFloat64)});
    for (size_t i = 0; i < 2; ++i) EXPECT_LT(relative_error(grads[i], wanted_grads[i]), tolerance);
  }
  EXPECT_EQ(swiglu(torch::randn({0, 3}), torch::randn({0, 3})).numel(), 0);
}

}  // namespace
}  // namespace latte::models
