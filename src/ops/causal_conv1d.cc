// latte::causal_conv1d: the public operator, which brings weights to float32 (float64 for float64 inputs), and the core one with
// checks, the CPU's kernels, meta functions and autograd.
#include <torch/library.h>

#include "kernels/conv1d.h"
#include "ops/autocast.h"
#include "ops/check.h"
#include "ops/composed.h"
#include "ops/core.h"
#include "ops/cpu.h"

namespace latte {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<at::Tensor, at::Tensor>;                           // out, final_state
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // of x, weight, bias, initial_state

constexpr const char* kName = "causal_conv1d_core";
constexpr const char* kBackwardName = "causal_conv1d_core_backward";

#define LATTE_CONV1D_PARAMETERS                                                                              \
  const at::Tensor &x, const at::Tensor &weight, const OptionalTensor &bias, const OptionalTensor &key_mask, \
      const OptionalTensor &initial_state, const OptionalTensor &cu_seqlens
#define LATTE_CONV1D_INPUTS \
  Conv1dInputs { x, weight, bias, key_mask, initial_state, cu_seqlens }

at::Tensor StateLike(const Conv1dInputs& in, bool output_final_state) {
  if (!output_final_state) return AbsentOutput(in.x, in.weight.scalar_type());
  return at::empty_symint({SequenceCount(in.x, in.cu_seqlens), in.weight.sym_size(1) - 1, in.x.sym_size(2)}, in.weight.options());
}

Forward ForwardMeta(LATTE_CONV1D_PARAMETERS, bool output_final_state) {
  const Conv1dInputs in = LATTE_CONV1D_INPUTS;
  CheckConv1d(kName, in);
  return {at::empty_symint(x.sym_sizes(), x.options()), StateLike(in, output_final_state)};
}

Forward ForwardComposed(LATTE_CONV1D_PARAMETERS, bool output_final_state) {
  const Conv1dInputs in = LATTE_CONV1D_INPUTS;
  CheckConv1d(kName, in);
  const auto outputs = composed::CausalConv1d(in);
  return {outputs.out.contiguous(), output_final_state ? outputs.final_state : StateLike(in, false)};
}

// Copies of the inputs where their layout isn't the kernels', kept alive beside the arguments that point at them.
struct CpuCall {
  Conv1dInputs in;
  kernels::Conv1dArgs args;
  int64_t slices = 0;
  int64_t work = 0;  // multiplications of a slice, about

  explicit CpuCall(const Conv1dInputs& given) : in(given) {
    in.x = cpu::Readable(in.x);
    in.weight = in.weight.contiguous();
    in.bias = cpu::Contiguous(in.bias);
    in.initial_state = cpu::Contiguous(in.initial_state);
    in.cu_seqlens = cpu::Contiguous(in.cu_seqlens);
    args.dtype = cpu::DTypeOf(in.x);
    args.sequences = Present(in.cu_seqlens) ? in.cu_seqlens->numel() - 1 : in.x.size(0);
    args.time = in.x.size(1);
    args.channels = in.x.size(2);
    args.width = in.weight.size(1);
    if (Present(in.cu_seqlens)) {
      Checker(kName).CuSeqlensData(*in.cu_seqlens, args.time);
      args.cu_seqlens = in.cu_seqlens->const_data_ptr<int64_t>();
    }
    args.x = cpu::ViewOf(in.x);
    args.weight = in.weight.const_data_ptr<float>();
    args.bias = cpu::FloatsOf(in.bias);
    args.key_mask = cpu::MaskOf(in.key_mask);
    args.initial_state = cpu::FloatsOf(in.initial_state);
    slices = kernels::Conv1dSlices(args);
    work = args.sequences * args.time * args.channels * args.width / std::max<int64_t>(1, slices);
  }
};

Forward ForwardCpu(LATTE_CONV1D_PARAMETERS, bool output_final_state) {
  if (!cpu::Fused(x)) return ForwardComposed(x, weight, bias, key_mask, initial_state, cu_seqlens, output_final_state);
  const Conv1dInputs given = LATTE_CONV1D_INPUTS;
  CheckConv1d(kName, given);
  const CpuCall call(given);
  const auto out = cpu::Like(x), state = StateLike(given, output_final_state);
  const kernels::Conv1dOutputs outputs{cpu::WriteTo(out), output_final_state ? state.mutable_data_ptr<float>() : nullptr};
  cpu::ForEachSlice(call.slices, call.work, [&](int64_t slice) { kernels::Conv1dForward(call.args, outputs, slice); });
  return {out, state};
}

void CheckBackward(const at::Tensor& grad_out, const OptionalTensor& grad_final_state, const Conv1dInputs& in) {
  CheckConv1d(kBackwardName, in);
  const Checker check(kBackwardName);
  check.Shape("grad_out", grad_out, "[B, T, C]", {in.x.sym_size(0), in.x.sym_size(1), in.x.sym_size(2)});
  check.Dtype("grad_out", grad_out, in.x.scalar_type());
  check.Device("grad_out", grad_out, in.x);
  if (!Present(grad_final_state)) return;
  check.Shape("grad_final_state", *grad_final_state, "[N, K - 1, C]",
              {SequenceCount(in.x, in.cu_seqlens), in.weight.sym_size(1) - 1, in.x.sym_size(2)});
  check.Dtype("grad_final_state", *grad_final_state, in.weight.scalar_type());
  check.Device("grad_final_state", *grad_final_state, in.x);
}

Backward Tuple(const at::Tensor& like, const std::vector<at::Tensor>& g) {
  const auto defined = [&](const at::Tensor& x) { return x.defined() ? x.contiguous() : AbsentOutput(like, like.scalar_type()); };
  return {defined(g[0]), defined(g[1]), defined(g[2]), defined(g[3])};
}

#define LATTE_CONV1D_BACKWARD_PARAMETERS \
  const at::Tensor &grad_out, const OptionalTensor &grad_final_state, LATTE_CONV1D_PARAMETERS

Backward BackwardMeta(LATTE_CONV1D_BACKWARD_PARAMETERS) {
  CheckBackward(grad_out, grad_final_state, LATTE_CONV1D_INPUTS);
  const auto like = [](const OptionalTensor& x) {
    return Present(x) ? at::empty_symint(x->sym_sizes(), x->options()) : at::Tensor();
  };
  return Tuple(weight, {like(x), like(weight), like(bias), like(initial_state)});
}

std::vector<at::Tensor> ComposedOutputs(const Conv1dInputs& in, const std::vector<at::Tensor>& y) {
  const auto outputs = composed::CausalConv1d({y[0], y[1], OrAbsent(y[2]), in.key_mask, OrAbsent(y[3]), in.cu_seqlens});
  return {outputs.out, outputs.final_state};
}

Backward BackwardComposed(LATTE_CONV1D_BACKWARD_PARAMETERS) {
  const Conv1dInputs in = LATTE_CONV1D_INPUTS;
  CheckBackward(grad_out, grad_final_state, in);
  return Tuple(weight, composed::Gradients([&](const std::vector<at::Tensor>& y) { return ComposedOutputs(in, y); },
                                           {x, weight, OrUndefined(bias), OrUndefined(initial_state)},
                                           {grad_out, OrUndefined(grad_final_state)}));
}

Backward BackwardCpu(LATTE_CONV1D_BACKWARD_PARAMETERS) {
  if (!cpu::Fused(x)) {
    return BackwardComposed(grad_out, grad_final_state, x, weight, bias, key_mask, initial_state, cu_seqlens);
  }
  const Conv1dInputs given = LATTE_CONV1D_INPUTS;
  CheckBackward(grad_out, grad_final_state, given);
  const CpuCall call(given);
  const auto& args = call.args;
  const auto grad = cpu::Readable(grad_out);
  const auto grad_state = cpu::Contiguous(grad_final_state);
  const auto grad_x = cpu::Like(x), grad_initial_state = cpu::Like(initial_state);
  const auto grad_weight = at::empty({args.sequences, args.channels, args.width}, weight.options());
  const auto grad_bias = Present(bias) ? at::empty({args.sequences, args.channels}, weight.options()) : at::Tensor();
  kernels::Conv1dGradients gradients;
  gradients.grad_out = cpu::ViewOf(grad);
  gradients.grad_final_state = cpu::FloatsOf(grad_state);
  gradients.grad_x = cpu::WriteTo(grad_x);
  gradients.grad_weight = grad_weight.mutable_data_ptr<float>();
  gradients.grad_bias = cpu::FloatsToWrite(grad_bias);
  gradients.grad_initial_state = cpu::FloatsToWrite(grad_initial_state);
  cpu::ForEachSlice(call.slices, call.work, [&](int64_t slice) { kernels::Conv1dBackward(args, gradients, slice); });
  return Tuple(weight, {grad_x, grad_weight.sum(0), grad_bias.defined() ? grad_bias.sum(0) : grad_bias, grad_initial_state});
}

Forward CallForward(const Conv1dInputs& in, bool output_final_state) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("latte::causal_conv1d_core", "").typed<decltype(ForwardMeta)>();
  return op.call(in.x, in.weight, in.bias, in.key_mask, in.initial_state, in.cu_seqlens, output_final_state);
}

Backward CallBackward(const at::Tensor& grad_out, const OptionalTensor& grad_final_state, const Conv1dInputs& in) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("latte::causal_conv1d_core_backward", "").typed<decltype(BackwardMeta)>();
  return op.call(grad_out, grad_final_state, in.x, in.weight, in.bias, in.key_mask, in.initial_state, in.cu_seqlens);
}

bool AnyNeedsGrad(const Conv1dInputs& in) {
  return NeedsGrad(in.x) || NeedsGrad(in.weight) || NeedsGrad(in.bias) || NeedsGrad(in.initial_state);
}

class Conv1dFunction : public torch::autograd::Function<Conv1dFunction> {
 public:
  static variable_list forward(AutogradContext* context, LATTE_CONV1D_PARAMETERS, bool output_final_state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, final_state] = CallForward(LATTE_CONV1D_INPUTS, output_final_state);
    context->save_for_backward(
        {x, weight, OrUndefined(bias), OrUndefined(key_mask), OrUndefined(initial_state), OrUndefined(cu_seqlens)});
    context->set_materialize_grads(false);
    if (!output_final_state) context->mark_non_differentiable({final_state});
    return {out, final_state};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto y = context->get_saved_variables();
    const Conv1dInputs in{y[0], y[1], OrAbsent(y[2]), OrAbsent(y[3]), OrAbsent(y[4]), OrAbsent(y[5])};
    variable_list result(7);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto grad_out = grads[0].defined() ? grads[0] : at::zeros({1}, in.x.options()).expand_symint(in.x.sym_sizes());
    auto [x, weight, bias, initial_state] = CallBackward(grad_out, OrAbsent(grads[1]), in);
    result[0] = x;
    result[1] = weight;
    if (Present(in.bias)) result[2] = bias;
    if (Present(in.initial_state)) result[4] = initial_state;
    return result;
  }
};

Forward ForwardAutograd(LATTE_CONV1D_PARAMETERS, bool output_final_state) {
  const Conv1dInputs in = LATTE_CONV1D_INPUTS;
  if (AnyTransformed(x, weight, bias, initial_state)) {
    return ForwardComposed(x, weight, bias, key_mask, initial_state, cu_seqlens, output_final_state);
  }
  if (!at::GradMode::is_enabled() || !AnyNeedsGrad(in)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return CallForward(in, output_final_state);
  }
  const auto outputs = Conv1dFunction::apply(x, weight, bias, key_mask, initial_state, cu_seqlens, output_final_state);
  return {outputs[0], outputs[1]};
}

// First derivatives go on to the kernels; where they are to be differentiated again, the composed path has the graph.
Backward BackwardAutograd(LATTE_CONV1D_BACKWARD_PARAMETERS) {
  const Conv1dInputs in = LATTE_CONV1D_INPUTS;
  if (!at::GradMode::is_enabled() || !(AnyNeedsGrad(in) || NeedsGrad(grad_out) || NeedsGrad(grad_final_state))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return CallBackward(grad_out, grad_final_state, in);
  }
  CheckBackward(grad_out, grad_final_state, in);
  return Tuple(weight, composed::DifferentiableGradients([&](const std::vector<at::Tensor>& y) { return ComposedOutputs(in, y); },
                                                         {x, weight, OrUndefined(bias), OrUndefined(initial_state)},
                                                         {grad_out, OrUndefined(grad_final_state)}));
}

Forward Public(LATTE_CONV1D_PARAMETERS, bool output_final_state) {
  const auto dtype = AccumulateType(x.scalar_type());
  const auto widened = [&](const at::Tensor& y) { return at::isFloatingType(y.scalar_type()) ? y.to(dtype) : y; };
  const Conv1dInputs in{Autocast(x), widened(weight), Present(bias) ? OptionalTensor(widened(*bias)) : bias,
                        key_mask,    initial_state,   cu_seqlens};
  CheckConv1d("causal_conv1d", in);
  return CallForward(in, output_final_state);
}

TORCH_LIBRARY_FRAGMENT(latte, m) {
  m.def(
      "causal_conv1d_core(Tensor x, Tensor weight, Tensor? bias, Tensor? key_mask, Tensor? initial_state, Tensor? cu_seqlens, "
      "bool output_final_state) -> (Tensor out, Tensor final_state)");
  m.def(
      "causal_conv1d_core_backward(Tensor grad_out, Tensor? grad_final_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? key_mask, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, *, Tensor? bias=None, Tensor? key_mask=None, Tensor? initial_state=None, "
      "bool output_final_state=False, Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
      [](const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& key_mask,
         const OptionalTensor& initial_state, bool output_final_state, const OptionalTensor& cu_seqlens) {
        return Public(x, weight, bias, key_mask, initial_state, cu_seqlens, output_final_state);
      });
}
TORCH_LIBRARY_IMPL(latte, CompositeExplicitAutograd, m) {
  m.impl("causal_conv1d_core", TORCH_FN(ForwardComposed));
  m.impl("causal_conv1d_core_backward", TORCH_FN(BackwardComposed));
}
TORCH_LIBRARY_IMPL(latte, CPU, m) {
  m.impl("causal_conv1d_core", TORCH_FN(ForwardCpu));
  m.impl("causal_conv1d_core_backward", TORCH_FN(BackwardCpu));
}
TORCH_LIBRARY_IMPL(latte, Meta, m) {
  m.impl("causal_conv1d_core", TORCH_FN(ForwardMeta));
  m.impl("causal_conv1d_core_backward", TORCH_FN(BackwardMeta));
}
TORCH_LIBRARY_IMPL(latte, Autograd, m) {
  m.impl("causal_conv1d_core", TORCH_FN(ForwardAutograd));
  m.impl("causal_conv1d_core_backward", TORCH_FN(BackwardAutograd));
}

}  // namespace

std::tuple<at::Tensor, OptionalTensor> causal_conv1d(const at::Tensor& x, const at::Tensor& weight,
                                                     const CausalConv1dOptions& options) {
  auto [out, state] =
      Public(x, weight, options.bias, options.key_mask, options.initial_state, options.cu_seqlens, options.output_final_state);
  return {out, options.output_final_state ? OptionalTensor(state) : OptionalTensor()};
}

}  // namespace latte
