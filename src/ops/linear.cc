// latte::linear: torch.nn.functional.linear, on the faster of the two matrix libraries that torch brings.
//
// torch multiplies float32 on MKL, whose kernels for processors that aren't Intel's stop at AVX2. oneDNN, which torch keeps for
// bfloat16 and for fused inference, has AVX-512 kernels for all of them and is about twice as fast there (512 x 512 weights on a
// Zen 5: 500 GFLOP/s and more beside 230).
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <torch/torch.h>

#include "ops/ops.h"

namespace latte {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x [N, K], weight [M, K], of any strides, bias [M] or none -> [N, M].
using OneDnnLinear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                                c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// torch's operator, or none in builds without oneDNN.
const std::optional<c10::TypedOperatorHandle<OneDnnLinear>>& OneDnn() {
  static const auto found = []() -> std::optional<c10::TypedOperatorHandle<OneDnnLinear>> {
    const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
    return op->typed<OneDnnLinear>();
  }();
  return found;
}

bool ProcessorGains() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const bool gains = !__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f");
  return gains;
#else
  return false;
#endif
}

// Multiplications below which the detour costs more than it saves, about.
constexpr int64_t kWorthIt = int64_t{1} << 20;

// A plain tensor of the CPU: nothing that traces, maps or casts it has to see the operators that it goes through.
bool Plain(const at::Tensor& x) {
  constexpr c10::DispatchKeySet plain{c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutocastCPU};
  return x.scalar_type() == at::kFloat && (x.key_set() - plain).highestFunctionalityKey() == c10::DispatchKey::Undefined;
}

bool OnOneDnn(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  if (!ProcessorGains() || !at::globalContext().userEnabledMkldnn() || at::globalContext().deterministicMkldnn()) return false;
  if (!Plain(x) || !Plain(weight) || (bias && bias->defined() && !Plain(*bias))) return false;
  if (x.dim() < 2 || weight.dim() != 2 || x.size(-1) != weight.size(1) || x.numel() == 0) return false;
  if (x.numel() / x.size(-1) * weight.numel() < kWorthIt) return false;
  if (bias && bias->defined() && (bias->dim() != 1 || bias->size(0) != weight.size(0))) return false;
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return !at::autocast::is_autocast_enabled(at::kCPU) && !included.has(c10::DispatchKey::Python) &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) && OneDnn().has_value();
}

at::Tensor Product(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = {}) {
  return OneDnn()->call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({x, weight});
    context->saved_data["bias"] = bias.has_value() && bias->defined();
    return Product(x, weight, bias);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1];
    // x [N, K], dy [N, M].
    const auto rows = x.flatten(0, -2), grad = grads[0].flatten(0, -2);
    at::Tensor grad_x, grad_weight, grad_bias;
    if (at::GradMode::is_enabled()) {  // to be differentiated again
      if (context->needs_input_grad(0)) grad_x = at::mm(grad, weight).view_as(x);
      if (context->needs_input_grad(1)) grad_weight = at::mm(grad.t(), rows);
    } else {
      if (context->needs_input_grad(0)) grad_x = Product(grad, weight.t()).view_as(x);
      if (context->needs_input_grad(1)) grad_weight = Product(grad.t(), rows.t());
    }
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) grad_bias = grad.sum(0);
    return {grad_x, grad_weight, grad_bias};
  }
};

TORCH_LIBRARY_FRAGMENT(latte, m) { m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", TORCH_FN(linear)); }

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  if (!OnOneDnn(x, weight, bias)) return at::linear(x, weight, bias);
  const bool grad = at::GradMode::is_enabled() &&
                    (x.requires_grad() || weight.requires_grad() || (bias && bias->defined() && bias->requires_grad()));
  if (grad) return LinearFunction::apply(x, weight, bias);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return Product(x, weight, bias);
}

}  // namespace latte
