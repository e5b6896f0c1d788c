// latte::linear: torch.nn.functional.linear, on the faster of the two matrix libraries that torch brings.
//
// torch multiplies float32 on MKL, whose kernels for processors that aren't Intel's stop at AVX2. oneDNN, which torch keeps for
// bfloat16 and for fused inference, has AVX-512 kernels for all of them and is about twice as fast there (512 x 512 weights on a
// Zen 5: 500 GFLOP/s and more beside 230).
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <torch/torch.h>

#include "ops/inputs.h"
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
    try {
      return op->typed<OneDnnLinear>();
    } catch (const c10::Error&) {  // another torch gave it other arguments
      return std::nullopt;
    }
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

// A plain tensor of the CPU: nothing that traces, maps, counts or casts it has to see the operators that it goes through.
bool Plain(const at::Tensor& x) {
  constexpr c10::DispatchKeySet plain{c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutocastCPU};
  return x.is_cpu() && x.scalar_type() == at::kFloat && !Transformed(x) &&
         (x.key_set() - plain).highestFunctionalityKey() == c10::DispatchKey::Undefined;
}
bool Plain(const OptionalTensor& x) { return !Present(x) || Plain(*x); }

bool Watched() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return at::autocast::is_autocast_enabled(at::kCPU) || included.has(c10::DispatchKey::Python) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool OnOneDnn(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  if (!ProcessorGains() || !at::globalContext().userEnabledMkldnn() || at::globalContext().deterministicMkldnn()) return false;
  if (!Plain(x) || !Plain(weight) || !Plain(bias) || Watched()) return false;
  if (x.dim() < 2 || weight.dim() != 2 || x.size(-1) != weight.size(1) || x.numel() == 0) return false;
  if (Present(bias) && (bias->dim() != 1 || bias->size(0) != weight.size(0))) return false;
  return x.numel() / x.size(-1) * weight.numel() >= kWorthIt && OneDnn().has_value();
}

at::Tensor Product(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = {}) {
  return OneDnn()->call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    // What no gradient needs isn't kept: a frozen weight's activations.
    context->save_for_backward({weight.requires_grad() ? x : at::Tensor(), x.requires_grad() ? weight : at::Tensor()});
    context->saved_data["sizes"] = x.sizes();
    context->saved_data["bias"] = Present(bias);
    return Product(x, weight, bias);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1];
    // x [N, K], dy [N, M].
    const auto rows = [](const at::Tensor& y) { return y.dim() == 2 ? y : y.reshape({-1, y.size(-1)}); };
    const at::Tensor grad = rows(grads[0]);
    // To be differentiated again, mapped or counted, it goes through operators that know how.
    const bool plain = !at::GradMode::is_enabled() && Plain(grads[0]) && !Watched() && OneDnn().has_value();
    at::Tensor grad_x, grad_weight, grad_bias;
    if (context->needs_input_grad(0)) {
      grad_x = (plain ? Product(grad, weight.t()) : at::mm(grad, weight)).reshape(context->saved_data["sizes"].toIntVector());
    }
    if (context->needs_input_grad(1)) grad_weight = plain ? Product(grad.t(), rows(x).t()) : at::mm(grad.t(), rows(x));
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) grad_bias = grad.sum(0);
    return {grad_x, grad_weight, grad_bias};
  }
};

TORCH_LIBRARY_FRAGMENT(latte, m) { m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", TORCH_FN(linear)); }

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  if (!OnOneDnn(x, weight, bias)) return at::linear(x, weight, bias);
  const bool grad = at::GradMode::is_enabled() && (NeedsGrad(x) || NeedsGrad(weight) || NeedsGrad(bias));
  if (grad) return LinearFunction::apply(x, weight, bias);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return Product(x, weight, bias);
}

}  // namespace latte
