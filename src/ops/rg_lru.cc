// latte::rg_lru: the public operator, which brings lambda to float32 (float64 for float64 inputs), and the core one with checks,
// the CPU's kernels, meta functions and autograd.
#include "kernels/rg_lru.h"

#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/check.h"
#include "ops/composed.h"
#include "ops/core.h"
#include "ops/cpu.h"

namespace latte {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // out, final_state, hidden
// Of x, recurrence_logits, input_logits, lambda, initial_state.
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kName = "rg_lru_core";
constexpr const char* kBackwardName = "rg_lru_core_backward";

#define LATTE_RG_LRU_PARAMETERS                                                                                       \
  const at::Tensor &x, const at::Tensor &recurrence_logits, const at::Tensor &input_logits, const at::Tensor &lambda, \
      const OptionalTensor &key_mask, const OptionalTensor &initial_state, const OptionalTensor &cu_seqlens
#define LATTE_RG_LRU_INPUTS \
  RgLruInputs { x, recurrence_logits, input_logits, lambda, key_mask, initial_state, cu_seqlens }

at::Tensor StateLike(const RgLruInputs& in, bool output_final_state) {
  if (!output_final_state) return AbsentOutput(in.x, in.lambda.scalar_type());
  return at::empty_symint({SequenceCount(in.x, in.cu_seqlens), in.x.sym_size(2)}, in.lambda.options());
}

// Every h in float32, for the backward pass; float64 recomputes.
at::Tensor HiddenLike(const at::Tensor& x, bool save) {
  if (!save || x.scalar_type() == at::kDouble) return AbsentOutput(x, at::kFloat);
  return at::empty_symint(x.sym_sizes(), x.options().dtype(at::kFloat));
}

Forward ForwardMeta(LATTE_RG_LRU_PARAMETERS, bool output_final_state, bool save) {
  const RgLruInputs in = LATTE_RG_LRU_INPUTS;
  CheckRgLru(kName, in);
  return {at::empty_symint(x.sym_sizes(), x.options()), StateLike(in, output_final_state), HiddenLike(x, save)};
}

Forward ForwardComposed(LATTE_RG_LRU_PARAMETERS, bool output_final_state, bool save) {
  const RgLruInputs in = LATTE_RG_LRU_INPUTS;
  CheckRgLru(kName, in);
  const auto outputs = composed::RgLru(in);
  return {outputs.out.contiguous(), output_final_state ? outputs.final_state.clone() : StateLike(in, false), HiddenLike(x, save)};
}

// Copies of the inputs where their layout isn't the kernels', kept alive beside the arguments that point at them.
struct CpuCall {
  RgLruInputs in;
  kernels::RgLruArgs args;
  int64_t slices = 0;
  int64_t work = 0;  // multiplications of a slice, about

  explicit CpuCall(const RgLruInputs& given) : in(given) {
    in.x = cpu::Readable(in.x);
    in.recurrence_logits = cpu::Readable(in.recurrence_logits);
    in.input_logits = cpu::Readable(in.input_logits);
    in.lambda = in.lambda.contiguous();
    in.initial_state = cpu::Contiguous(in.initial_state);
    in.cu_seqlens = cpu::Contiguous(in.cu_seqlens);
    args.dtype = cpu::DTypeOf(in.x);
    args.sequences = Present(in.cu_seqlens) ? in.cu_seqlens->numel() - 1 : in.x.size(0);
    args.time = in.x.size(1);
    args.channels = in.x.size(2);
    if (Present(in.cu_seqlens)) {
      Checker(kName).CuSeqlensData(*in.cu_seqlens, args.time);
      args.cu_seqlens = in.cu_seqlens->const_data_ptr<int64_t>();
    }
    args.x = cpu::ViewOf(in.x);
    args.recurrence_logits = cpu::ViewOf(in.recurrence_logits);
    args.input_logits = cpu::ViewOf(in.input_logits);
    args.lambda = in.lambda.const_data_ptr<float>();
    args.key_mask = cpu::MaskOf(in.key_mask);
    args.initial_state = cpu::FloatsOf(in.initial_state);
    slices = kernels::RgLruSlices(args);
    // Its exponentials cost about thirty multiplications each.
    work = args.sequences * args.time * args.channels * 100 / std::max<int64_t>(1, slices);
  }
};

Forward ForwardCpu(LATTE_RG_LRU_PARAMETERS, bool output_final_state, bool save) {
  if (!cpu::Fused(x)) {
    return ForwardComposed(x, recurrence_logits, input_logits, lambda, key_mask, initial_state, cu_seqlens, output_final_state,
                           save);
  }
  const RgLruInputs given = LATTE_RG_LRU_INPUTS;
  CheckRgLru(kName, given);
  const CpuCall call(given);
  const auto out = cpu::Like(x), state = StateLike(given, output_final_state), hidden = HiddenLike(x, save);
  kernels::RgLruOutputs outputs;
  outputs.out = cpu::WriteTo(out);
  outputs.final_state = output_final_state ? state.mutable_data_ptr<float>() : nullptr;
  outputs.hidden = save ? hidden.mutable_data_ptr<float>() : nullptr;
  cpu::ForEachSlice(call.slices, call.work, [&](int64_t slice) { kernels::RgLruForward(call.args, outputs, slice); });
  return {out, state, hidden};
}

void CheckBackward(const at::Tensor& grad_out, const OptionalTensor& grad_final_state, const at::Tensor& hidden,
                   const RgLruInputs& in) {
  CheckRgLru(kBackwardName, in);
  const Checker check(kBackwardName);
  const auto shape = [&](const char* argument, const at::Tensor& tensor, at::ScalarType dtype) {
    check.Shape(argument, tensor, "[B, T, C]", {in.x.sym_size(0), in.x.sym_size(1), in.x.sym_size(2)});
    check.Dtype(argument, tensor, dtype);
    check.Device(argument, tensor, in.x);
  };
  shape("grad_out", grad_out, in.x.scalar_type());
  if (in.x.scalar_type() != at::kDouble) shape("hidden", hidden, at::kFloat);
  if (!Present(grad_final_state)) return;
  check.Shape("grad_final_state", *grad_final_state, "[N, C]", {SequenceCount(in.x, in.cu_seqlens), in.x.sym_size(2)});
  check.Dtype("grad_final_state", *grad_final_state, in.lambda.scalar_type());
  check.Device("grad_final_state", *grad_final_state, in.x);
}

Backward Tuple(const at::Tensor& like, const std::vector<at::Tensor>& g) {
  const auto defined = [&](const at::Tensor& y) { return y.defined() ? y.contiguous() : AbsentOutput(like, like.scalar_type()); };
  return {defined(g[0]), defined(g[1]), defined(g[2]), defined(g[3]), defined(g[4])};
}

#define LATTE_RG_LRU_BACKWARD_PARAMETERS \
  const at::Tensor &grad_out, const OptionalTensor &grad_final_state, const at::Tensor &hidden, LATTE_RG_LRU_PARAMETERS

Backward BackwardMeta(LATTE_RG_LRU_BACKWARD_PARAMETERS) {
  CheckBackward(grad_out, grad_final_state, hidden, LATTE_RG_LRU_INPUTS);
  const auto like = [](const OptionalTensor& y) {
    return Present(y) ? at::empty_symint(y->sym_sizes(), y->options()) : at::Tensor();
  };
  return Tuple(lambda, {like(x), like(recurrence_logits), like(input_logits), like(lambda), like(initial_state)});
}

std::vector<at::Tensor> ComposedOutputs(const RgLruInputs& in, const std::vector<at::Tensor>& y) {
  const auto outputs = composed::RgLru({y[0], y[1], y[2], y[3], in.key_mask, OrAbsent(y[4]), in.cu_seqlens});
  return {outputs.out, outputs.final_state};
}

Backward BackwardComposed(LATTE_RG_LRU_BACKWARD_PARAMETERS) {
  const RgLruInputs in = LATTE_RG_LRU_INPUTS;
  CheckBackward(grad_out, grad_final_state, hidden, in);
  return Tuple(lambda, composed::Gradients([&](const std::vector<at::Tensor>& y) { return ComposedOutputs(in, y); },
                                           {x, recurrence_logits, input_logits, lambda, OrUndefined(initial_state)},
                                           {grad_out, OrUndefined(grad_final_state)}));
}

Backward BackwardCpu(LATTE_RG_LRU_BACKWARD_PARAMETERS) {
  if (!cpu::Fused(x)) {
    return BackwardComposed(grad_out, grad_final_state, hidden, x, recurrence_logits, input_logits, lambda, key_mask,
                            initial_state, cu_seqlens);
  }
  const RgLruInputs given = LATTE_RG_LRU_INPUTS;
  CheckBackward(grad_out, grad_final_state, hidden, given);
  const CpuCall call(given);
  const auto grad = cpu::Readable(grad_out), saved_hidden = hidden.contiguous();
  const auto grad_state = cpu::Contiguous(grad_final_state);
  const std::vector<at::Tensor> grads{cpu::Like(x), cpu::Like(recurrence_logits), cpu::Like(input_logits), at::Tensor(),
                                      cpu::Like(initial_state)};
  const auto grad_lambda = at::empty({call.args.sequences, call.args.channels}, lambda.options());
  kernels::RgLruGradients gradients;
  gradients.grad_out = cpu::ViewOf(grad);
  gradients.grad_final_state = cpu::FloatsOf(grad_state);
  gradients.hidden = saved_hidden.const_data_ptr<float>();
  gradients.grad_x = cpu::WriteTo(grads[0]);
  gradients.grad_recurrence_logits = cpu::WriteTo(grads[1]);
  gradients.grad_input_logits = cpu::WriteTo(grads[2]);
  gradients.grad_lambda = grad_lambda.mutable_data_ptr<float>();
  gradients.grad_initial_state = cpu::FloatsToWrite(grads[4]);
  cpu::ForEachSlice(call.slices, call.work, [&](int64_t slice) { kernels::RgLruBackward(call.args, gradients, slice); });
  return Tuple(lambda, {grads[0], grads[1], grads[2], grad_lambda.sum(0), grads[4]});
}

Forward CallForward(const RgLruInputs& in, bool output_final_state, bool save) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("latte::rg_lru_core", "").typed<decltype(ForwardMeta)>();
  return op.call(in.x, in.recurrence_logits, in.input_logits, in.lambda, in.key_mask, in.initial_state, in.cu_seqlens,
                 output_final_state, save);
}

Backward CallBackward(const at::Tensor& grad_out, const OptionalTensor& grad_final_state, const at::Tensor& hidden,
                      const RgLruInputs& in) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("latte::rg_lru_core_backward", "").typed<decltype(BackwardMeta)>();
  return op.call(grad_out, grad_final_state, hidden, in.x, in.recurrence_logits, in.input_logits, in.lambda, in.key_mask,
                 in.initial_state, in.cu_seqlens);
}

bool AnyNeedsGrad(const RgLruInputs& in) {
  return NeedsGrad(in.x) || NeedsGrad(in.recurrence_logits) || NeedsGrad(in.input_logits) || NeedsGrad(in.lambda) ||
         NeedsGrad(in.initial_state);
}

class RgLruFunction : public torch::autograd::Function<RgLruFunction> {
 public:
  static variable_list forward(AutogradContext* context, LATTE_RG_LRU_PARAMETERS, bool output_final_state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, final_state, hidden] = CallForward(LATTE_RG_LRU_INPUTS, output_final_state, /*save=*/true);
    context->save_for_backward({x, recurrence_logits, input_logits, lambda, OrUndefined(key_mask), OrUndefined(initial_state),
                                OrUndefined(cu_seqlens), hidden});
    context->set_materialize_grads(false);
    context->mark_non_differentiable(output_final_state ? variable_list{hidden} : variable_list{final_state, hidden});
    return {out, final_state, hidden};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto y = context->get_saved_variables();
    const RgLruInputs in{y[0], y[1], y[2], y[3], OrAbsent(y[4]), OrAbsent(y[5]), OrAbsent(y[6])};
    variable_list result(8);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto grad_out = grads[0].defined() ? grads[0] : at::zeros({1}, in.x.options()).expand_symint(in.x.sym_sizes());
    auto [x, recurrence_logits, input_logits, lambda, initial_state] = CallBackward(grad_out, OrAbsent(grads[1]), y[7], in);
    result[0] = x;
    result[1] = recurrence_logits;
    result[2] = input_logits;
    result[3] = lambda;
    if (Present(in.initial_state)) result[5] = initial_state;
    return result;
  }
};

Forward ForwardAutograd(LATTE_RG_LRU_PARAMETERS, bool output_final_state, bool save) {
  const RgLruInputs in = LATTE_RG_LRU_INPUTS;
  if (AnyTransformed(x, recurrence_logits, input_logits, lambda, initial_state)) {
    return ForwardComposed(x, recurrence_logits, input_logits, lambda, key_mask, initial_state, cu_seqlens, output_final_state,
                           save);
  }
  if (!at::GradMode::is_enabled() || !AnyNeedsGrad(in)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return CallForward(in, output_final_state, save);
  }
  const auto outputs =
      RgLruFunction::apply(x, recurrence_logits, input_logits, lambda, key_mask, initial_state, cu_seqlens, output_final_state);
  return {outputs[0], outputs[1], outputs[2]};
}

// First derivatives go on to the kernels; where they are to be differentiated again, the composed path has the graph.
Backward BackwardAutograd(LATTE_RG_LRU_BACKWARD_PARAMETERS) {
  const RgLruInputs in = LATTE_RG_LRU_INPUTS;
  if (!at::GradMode::is_enabled() || !(AnyNeedsGrad(in) || NeedsGrad(grad_out) || NeedsGrad(grad_final_state))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return CallBackward(grad_out, grad_final_state, hidden, in);
  }
  CheckBackward(grad_out, grad_final_state, hidden, in);
  return Tuple(lambda, composed::DifferentiableGradients([&](const std::vector<at::Tensor>& y) { return ComposedOutputs(in, y); },
                                                         {x, recurrence_logits, input_logits, lambda, OrUndefined(initial_state)},
                                                         {grad_out, OrUndefined(grad_final_state)}));
}

std::tuple<at::Tensor, at::Tensor> Public(LATTE_RG_LRU_PARAMETERS, bool output_final_state) {
  const auto dtype = AccumulateType(x.scalar_type());
  const RgLruInputs in{Autocast(x),
                       Autocast(recurrence_logits),
                       Autocast(input_logits),
                       at::isFloatingType(lambda.scalar_type()) ? lambda.to(dtype) : lambda,
                       key_mask,
                       initial_state,
                       cu_seqlens};
  CheckRgLru("rg_lru", in);
  auto [out, final_state, hidden] = CallForward(in, output_final_state, /*save=*/false);
  return {out, final_state};
}

TORCH_LIBRARY_FRAGMENT(latte, m) {
  m.def(
      "rg_lru_core(Tensor x, Tensor recurrence_logits, Tensor input_logits, Tensor lambda_, Tensor? key_mask, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool output_final_state, bool save) "
      "-> (Tensor out, Tensor final_state, Tensor hidden)");
  m.def(
      "rg_lru_core_backward(Tensor grad_out, Tensor? grad_final_state, Tensor hidden, Tensor x, Tensor recurrence_logits, "
      "Tensor input_logits, Tensor lambda_, Tensor? key_mask, Tensor? initial_state, Tensor? cu_seqlens) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rg_lru(Tensor x, Tensor recurrence_logits, Tensor input_logits, Tensor lambda_, *, Tensor? key_mask=None, "
      "Tensor? initial_state=None, bool output_final_state=False, Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
      [](const at::Tensor& x, const at::Tensor& recurrence_logits, const at::Tensor& input_logits, const at::Tensor& lambda,
         const OptionalTensor& key_mask, const OptionalTensor& initial_state, bool output_final_state,
         const OptionalTensor& cu_seqlens) {
        return Public(x, recurrence_logits, input_logits, lambda, key_mask, initial_state, cu_seqlens, output_final_state);
      });
}
TORCH_LIBRARY_IMPL(latte, CompositeExplicitAutograd, m) {
  m.impl("rg_lru_core", TORCH_FN(ForwardComposed));
  m.impl("rg_lru_core_backward", TORCH_FN(BackwardComposed));
}
TORCH_LIBRARY_IMPL(latte, CPU, m) {
  m.impl("rg_lru_core", TORCH_FN(ForwardCpu));
  m.impl("rg_lru_core_backward", TORCH_FN(BackwardCpu));
}
TORCH_LIBRARY_IMPL(latte, Meta, m) {
  m.impl("rg_lru_core", TORCH_FN(ForwardMeta));
  m.impl("rg_lru_core_backward", TORCH_FN(BackwardMeta));
}
TORCH_LIBRARY_IMPL(latte, Autograd, m) {
  m.impl("rg_lru_core", TORCH_FN(ForwardAutograd));
  m.impl("rg_lru_core_backward", TORCH_FN(BackwardAutograd));
}

}  // namespace

std::tuple<at::Tensor, OptionalTensor> rg_lru(const at::Tensor& x, const at::Tensor& recurrence_logits,
                                              const at::Tensor& input_logits, const at::Tensor& lambda,
                                              const RgLruOptions& options) {
  auto [out, state] = Public(x, recurrence_logits, input_logits, lambda, options.key_mask, options.initial_state,
                             options.cu_seqlens, options.output_final_state);
  return {out, options.output_final_state ? OptionalTensor(state) : OptionalTensor()};
}

}  // namespace latte
