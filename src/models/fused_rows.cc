#include "models/fused_rows.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels/training_rows.h"

namespace latte::models {
namespace {

constexpr int64_t kGrain = 16384;  // elements: less isn't worth another thread

bool fuses(const at::Tensor& x, const at::Tensor& other) {
  return x.device().is_cpu() && other.device().is_cpu() && x.scalar_type() == other.scalar_type() && x.numel() > 0 &&
         (x.scalar_type() == torch::kFloat32 || x.scalar_type() == torch::kBFloat16);
}

kernels::DType dtype_of(const at::Tensor& x) {
  return x.scalar_type() == torch::kFloat32 ? kernels::DType::kFloat32 : kernels::DType::kBFloat16;
}

class FusedRmsNorm : public torch::autograd::Function<FusedRmsNorm> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            double eps) {
    const auto x = input.contiguous();
    const int64_t n = weight.size(0), rows = x.numel() / n;
    auto out = at::empty_like(x), inverse = at::empty({rows}, x.options().dtype(at::kFloat));
    const kernels::RmsNormRows args{dtype_of(x), n, x.const_data_ptr(), weight.const_data_ptr()};
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      kernels::RmsNormRowsForward(args, static_cast<float>(eps), begin, end, out.mutable_data_ptr(),
                                  inverse.mutable_data_ptr<float>());
    });
    ctx->save_for_backward({x, weight, inverse});
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], &inverse = saved[2];
    const auto grad_out = grads[0].contiguous();
    const int64_t n = weight.size(0), rows = x.numel() / n;
    auto grad_x = at::empty_like(x);
    const kernels::RmsNormRows args{dtype_of(x), n, x.const_data_ptr(), weight.const_data_ptr()};
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      kernels::RmsNormRowsBackward(args, inverse.const_data_ptr<float>(), grad_out.const_data_ptr(), begin, end,
                                   grad_x.mutable_data_ptr());
    });
    return {grad_x, {}, {}};
  }
};

class FusedSwiglu : public torch::autograd::Function<FusedSwiglu> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gate_in, const at::Tensor& up_in) {
    const auto gate = gate_in.contiguous(), up = up_in.contiguous();
    auto out = at::empty_like(gate);
    const kernels::SwigluRows args{dtype_of(gate), gate.const_data_ptr(), up.const_data_ptr()};
    at::parallel_for(0, gate.numel(), kGrain,
                     [&](int64_t begin, int64_t end) { kernels::SwigluForward(args, begin, end, out.mutable_data_ptr()); });
    ctx->save_for_backward({gate, up});
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &gate = saved[0], &up = saved[1];
    const auto grad_out = grads[0].contiguous();
    auto grad_gate = at::empty_like(gate), grad_up = at::empty_like(up);
    const kernels::SwigluRows args{dtype_of(gate), gate.const_data_ptr(), up.const_data_ptr()};
    at::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels::SwigluBackward(args, grad_out.const_data_ptr(), begin, end, grad_gate.mutable_data_ptr(),
                              grad_up.mutable_data_ptr());
    });
    return {grad_gate, grad_up};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const bool trains = at::GradMode::is_enabled() && weight.requires_grad();
  if (!fuses(x, weight) || trains) return at::rms_norm(x, weight.sizes(), weight, eps);
  return FusedRmsNorm::apply(x, weight, eps);
}

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  return fuses(gate, up) ? FusedSwiglu::apply(gate, up) : torch::silu(gate) * up;
}

}  // namespace latte::models
