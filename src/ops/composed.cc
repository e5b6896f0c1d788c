#include "ops/composed.h"

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <limits>

#include "ops/autocast.h"
#include "ops/check.h"

namespace latte::composed {
namespace {

// Turns autograd on inside a backend's kernel, which the dispatcher runs with autograd's keys excluded.
class AutogradGuard {
 public:
  AutogradGuard() : keys_(Keys()), grad_mode_(true) {}

 private:
  static c10::impl::LocalDispatchKeySet Keys() {
    auto keys = c10::impl::tls_local_dispatch_key_set();
    keys.excluded_ = keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
    return keys;
  }
  c10::impl::ForceDispatchKeyGuard keys_;
  at::AutoGradMode grad_mode_;
};

std::vector<at::Tensor> GradientsOf(const Function& function, const std::vector<at::Tensor>& inputs,
                                    const std::vector<at::Tensor>& grad_outputs, bool differentiable) {
  const NoAutocast no_autocast;
  const auto outputs = function(inputs);
  std::vector<at::Tensor> used_inputs, used_outputs, used_grads;
  for (const auto& input : inputs) {
    if (input.defined()) used_inputs.push_back(input);
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].defined() || !outputs[i].requires_grad() || !grad_outputs[i].defined()) continue;
    used_outputs.push_back(outputs[i]);
    used_grads.push_back(grad_outputs[i]);
  }
  std::vector<at::Tensor> grads(used_inputs.size());
  if (!used_outputs.empty()) {
    grads = torch::autograd::grad(used_outputs, used_inputs, used_grads, /*retain_graph=*/differentiable,
                                  /*create_graph=*/differentiable, /*allow_unused=*/true);
  }
  std::vector<at::Tensor> result;
  size_t next = 0;
  for (const auto& input : inputs) {
    if (!input.defined()) {
      result.emplace_back();
      continue;
    }
    auto& grad = grads[next++];
    result.push_back(grad.defined() ? grad : at::zeros_like(input));
  }
  return result;
}

}  // namespace

std::vector<at::Tensor> Gradients(const Function& function, const std::vector<at::Tensor>& inputs,
                                  const std::vector<at::Tensor>& grad_outputs) {
  const AutogradGuard guard;
  std::vector<at::Tensor> leaves;
  for (const auto& input : inputs) leaves.push_back(input.defined() ? input.detach().requires_grad_(true) : input);
  auto grads = GradientsOf(function, leaves, grad_outputs, /*differentiable=*/false);
  for (auto& grad : grads) {
    if (grad.defined()) grad = grad.detach();
  }
  return grads;
}

std::vector<at::Tensor> DifferentiableGradients(const Function& function, const std::vector<at::Tensor>& inputs,
                                                const std::vector<at::Tensor>& grad_outputs) {
  // Views, because one input may depend on another in the caller's graph: only the paths inside `function` count.
  std::vector<at::Tensor> views;
  for (const auto& input : inputs) {
    views.push_back(!input.defined()        ? input
                    : input.requires_grad() ? input.view_as(input)
                                            : input.detach().requires_grad_(true));
  }
  return GradientsOf(function, views, grad_outputs, /*differentiable=*/true);
}

std::vector<Piece> Pieces(const char* op, const at::Tensor& like, const OptionalTensor& cu_seqlens) {
  const int64_t time = like.size(1);
  if (!Present(cu_seqlens)) return {{0, time, 0, like.size(0)}};
  const auto ends = cu_seqlens->to(at::kCPU).contiguous();
  Checker(op).CuSeqlensData(ends, time);
  const auto* at = ends.const_data_ptr<int64_t>();
  std::vector<Piece> pieces;
  for (int64_t n = 0; n + 1 < ends.numel(); ++n) pieces.push_back({at[n], at[n + 1] - at[n], n, 1});
  return pieces;
}

at::Tensor Join(const std::vector<at::Tensor>& parts, int64_t dim, const std::function<at::Tensor()>& empty) {
  if (parts.empty()) return empty();
  return parts.size() == 1 ? parts[0] : at::cat(parts, dim);
}

at::Tensor FiniteOrZero(const at::Tensor& maximum) {
  return maximum.masked_fill(maximum == -std::numeric_limits<double>::infinity(), 0.0);
}

at::Tensor SoftmaxOrZero(const at::Tensor& logits) {
  const auto weights = (logits - FiniteOrZero(logits.detach().amax(-1, true))).exp();
  const auto sum = weights.sum(-1, true);
  return weights / sum.masked_fill(sum == 0, 1.0);
}

}  // namespace latte::composed
