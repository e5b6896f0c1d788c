// latte::latent_attention: checks, the CPU's kernels, meta functions and autograd. causal_attention and
// bidirectional_attention are made of it, and macchiato_attention where gradients are wanted.
#include "kernels/latent.h"

#include <torch/library.h>

#include "ops/check.h"
#include "ops/composed.h"
#include "ops/core.h"
#include "ops/cpu_calls.h"

namespace latte {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;                                       // out, final_state, saved
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // LatentGradients' order

constexpr const char* kName = "latent_attention";
constexpr const char* kBackwardName = "latent_attention_backward";

Forward CallForward(const LatentInputs& in, bool output_final_state, bool save);

#define LATTE_LATENT_PARAMETERS                                                                                             \
  const at::Tensor &query_logits, const at::Tensor &key_logits, const at::Tensor &values, const OptionalTensor &window_out, \
      const OptionalTensor &log_decay, const OptionalTensor &key_mask, const OptionalTensor &initial_state,                 \
      const OptionalTensor &cu_seqlens, bool causal
#define LATTE_LATENT_INPUTS \
  LatentInputs { query_logits, key_logits, values, window_out, log_decay, key_mask, initial_state, cu_seqlens, causal }

// What the backward pass needs besides the inputs: the states at the start of each of the kernels' segments.
std::vector<c10::SymInt> SavedShape(const LatentInputs& in) {
  const auto time = in.query_logits.sym_size(1), kv_heads = in.key_logits.sym_size(2), latents = in.key_logits.sym_size(3);
  const auto sequences = SequenceCount(in.query_logits, in.cu_seqlens);
  const int64_t segment = kernels::kSegmentTokens;
  const auto slots = !in.causal               ? sequences
                     : Present(in.cu_seqlens) ? time / segment + sequences
                                              : sequences * ((time + segment - 1) / segment);
  return {slots * kv_heads, latents, in.values.sym_size(3) + kernels::kStateExtra};
}

std::vector<c10::SymInt> StateShape(const LatentInputs& in) {
  return {SequenceCount(in.query_logits, in.cu_seqlens), in.key_logits.sym_size(2), in.key_logits.sym_size(3),
          in.values.sym_size(3) + kernels::kStateExtra};
}

at::Tensor EmptySaved(const LatentInputs& in, bool save) {
  const auto options = in.query_logits.options().dtype(at::kFloat);
  // float64 saves nothing. Everyone else allocates the same, so that the meta function needn't know the device.
  if (!save || in.query_logits.scalar_type() == at::kDouble) return AbsentOutput(in.query_logits, at::kFloat);
  return at::empty_symint(SavedShape(in), options);
}

void CheckForward(const LatentInputs& in, bool output_final_state) {
  CheckLatent(kName, in);
  Checker(kName).Absent("output_final_state", output_final_state && !in.causal, "when causal is false");
}

Forward ForwardMeta(LATTE_LATENT_PARAMETERS, bool output_final_state, bool save) {
  const LatentInputs in = LATTE_LATENT_INPUTS;
  CheckForward(in, output_final_state);
  const auto dtype = AccumulateType(query_logits.scalar_type());
  const auto& q = query_logits;
  return {at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), values.sym_size(3)}, q.options()),
          output_final_state ? at::empty_symint(StateShape(in), q.options().dtype(dtype)) : AbsentOutput(q, dtype),
          EmptySaved(in, save)};
}

Forward ForwardComposed(LATTE_LATENT_PARAMETERS, bool output_final_state, bool save) {
  const LatentInputs in = LATTE_LATENT_INPUTS;
  CheckForward(in, output_final_state);
  const auto outputs = composed::LatentAttention(in);
  return {outputs.out.contiguous(),
          output_final_state ? outputs.final_state : AbsentOutput(query_logits, AccumulateType(query_logits.scalar_type())),
          EmptySaved(in, save)};
}

Forward ForwardCpu(LATTE_LATENT_PARAMETERS, bool output_final_state, bool save) {
  if (!cpu::Fused(query_logits)) {
    return ForwardComposed(query_logits, key_logits, values, window_out, log_decay, key_mask, initial_state, cu_seqlens, causal,
                           output_final_state, save);
  }
  const LatentInputs given = LATTE_LATENT_INPUTS;
  CheckForward(given, output_final_state);
  const cpu::LatentCall call(kName, given);
  const auto& args = call.args;
  const auto out = cpu::Empty({query_logits.size(0), args.time, args.heads, args.head_dim}, query_logits.options());
  const auto saved = EmptySaved(given, save);
  kernels::LatentOutputs outputs;
  outputs.out = cpu::WriteTo(out);
  const int64_t slices = kernels::LatentSlices(args);
  const bool step = args.time == 1 && causal && !save && args.cu_seqlens == nullptr && args.initial_state != nullptr;
  if (step) {
    const auto state = at::empty(call.in.initial_state->sizes(), call.in.initial_state->options());
    auto* states = state.mutable_data_ptr<float>();
    const int64_t size = args.latents * (args.head_dim + kernels::kStateExtra);
    cpu::ForEachSlice(slices, call.work, [&](int64_t slice) {
      std::copy_n(args.initial_state + slice * size, size, states + slice * size);
      kernels::LatentStep(args, outputs, states + slice * size, slice);
    });
    return {out, output_final_state ? state : AbsentOutput(query_logits, at::kFloat), saved};
  }
  const auto state = output_final_state ? at::empty({args.sequences, args.kv_heads, args.latents, args.head_dim + 3},
                                                    query_logits.options().dtype(at::kFloat))
                                        : AbsentOutput(query_logits, at::kFloat);
  if (output_final_state) outputs.final_state = state.mutable_data_ptr<float>();
  if (save) {
    TORCH_INTERNAL_ASSERT(kernels::LatentSavedFloats(args) <= saved.numel());
    outputs.saved = saved.mutable_data_ptr<float>();
  }
  cpu::ForSlices(args, call.work, [&](int64_t first, int64_t last) { kernels::LatentForward(args, outputs, first, last); });
  return {out, state, saved};
}

void CheckBackward(const at::Tensor& grad_out, const OptionalTensor& grad_final_state, const LatentInputs& in,
                   const OptionalTensor& final_state, const at::Tensor& saved) {
  const Checker check(kBackwardName);
  CheckLatent(kBackwardName, in);
  const auto& q = in.query_logits;
  const auto dtype = AccumulateType(q.scalar_type());
  check.Shape("grad_out", grad_out, "[B, T, H, D]", {q.sym_size(0), q.sym_size(1), q.sym_size(2), in.values.sym_size(3)});
  check.Dtype("grad_out", grad_out, q.scalar_type());
  check.Device("grad_out", grad_out, q);
  const auto state = [&](const char* argument, const OptionalTensor& x) {
    if (!Present(x)) return;
    check.Absent(argument, !in.causal, "when causal is false");
    const auto shape = StateShape(in);
    check.Shape(argument, *x, "[N, Hkv, L, D + 3]", {shape[0], shape[1], shape[2], shape[3]});
    check.Dtype(argument, *x, dtype);
    check.Device(argument, *x, q);
  };
  state("grad_final_state", grad_final_state);
  state("final_state", final_state);
  TORCH_CHECK_VALUE(!Present(grad_final_state) || !Present(in.log_decay) || Present(final_state), "[latte.", kBackwardName,
                    "] final_state: got none, expected one with grad_final_state and log_decay");
  if (q.scalar_type() == at::kDouble) return;
  const auto shape = SavedShape(in);
  check.Shape("saved", saved, "the forward pass's", {shape[0], shape[1], shape[2]});
  check.Dtype("saved", saved, at::kFloat);
  check.Device("saved", saved, q);
}

at::Tensor Defined(const at::Tensor& grad, const at::Tensor& like) {
  return grad.defined() ? grad : AbsentOutput(like, like.scalar_type());
}

Backward Tuple(const at::Tensor& like, const composed::LatentGradients& g) {
  return {Defined(g.query_logits, like), Defined(g.key_logits, like), Defined(g.values, like),
          Defined(g.window_out, like),   Defined(g.log_decay, like),  Defined(g.initial_state, like)};
}

#define LATTE_LATENT_BACKWARD_PARAMETERS                                                       \
  const at::Tensor &grad_out, const OptionalTensor &grad_final_state, LATTE_LATENT_PARAMETERS, \
      const OptionalTensor &final_state, const at::Tensor &saved

Backward BackwardMeta(LATTE_LATENT_BACKWARD_PARAMETERS) {
  const LatentInputs in = LATTE_LATENT_INPUTS;
  CheckBackward(grad_out, grad_final_state, in, final_state, saved);
  const auto like = [](const OptionalTensor& x) {
    return Present(x) ? at::empty_symint(x->sym_sizes(), x->options()) : at::Tensor();
  };
  return Tuple(query_logits,
               {like(query_logits), like(key_logits), like(values), like(window_out), like(log_decay), like(initial_state)});
}

Backward BackwardComposed(LATTE_LATENT_BACKWARD_PARAMETERS) {
  const LatentInputs in = LATTE_LATENT_INPUTS;
  CheckBackward(grad_out, grad_final_state, in, final_state, saved);
  return Tuple(query_logits, composed::LatentAttentionBackward(in, grad_out, grad_final_state));
}

Backward BackwardCpu(LATTE_LATENT_BACKWARD_PARAMETERS) {
  if (!cpu::Fused(query_logits)) {
    return BackwardComposed(grad_out, grad_final_state, query_logits, key_logits, values, window_out, log_decay, key_mask,
                            initial_state, cu_seqlens, causal, final_state, saved);
  }
  const LatentInputs given = LATTE_LATENT_INPUTS;
  CheckBackward(grad_out, grad_final_state, given, final_state, saved);
  const cpu::LatentCall call(kBackwardName, given);
  const auto grad = cpu::Readable(grad_out);
  const auto grad_state = cpu::Contiguous(grad_final_state), state = cpu::Contiguous(final_state);
  const auto saved_states = saved.contiguous();
  const composed::LatentGradients grads{cpu::Like(query_logits), cpu::Like(key_logits), cpu::Like(values),
                                        cpu::Like(window_out),   cpu::Like(log_decay),  cpu::Like(initial_state)};
  kernels::LatentGradients gradients;
  gradients.grad_out = cpu::ViewOf(grad);
  gradients.grad_final_state = cpu::FloatsOf(grad_state);
  gradients.final_state = cpu::FloatsOf(state);
  gradients.saved = saved_states.const_data_ptr<float>();
  gradients.grad_query_logits = cpu::WriteTo(grads.query_logits);
  gradients.grad_key_logits = cpu::WriteTo(grads.key_logits);
  gradients.grad_values = cpu::WriteTo(grads.values);
  gradients.grad_log_decay = cpu::WriteTo(grads.log_decay);
  gradients.grad_window_out = cpu::WriteTo(grads.window_out);
  gradients.grad_initial_state = cpu::FloatsToWrite(grads.initial_state);
  cpu::ForSlices(call.args, call.work,
                 [&](int64_t first, int64_t last) { kernels::LatentBackward(call.args, gradients, first, last); });
  return Tuple(query_logits, grads);
}

Forward CallForward(const LatentInputs& in, bool output_final_state, bool save) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("latte::latent_attention", "").typed<decltype(ForwardMeta)>();
  return op.call(in.query_logits, in.key_logits, in.values, in.window_out, in.log_decay, in.key_mask, in.initial_state,
                 in.cu_seqlens, in.causal, output_final_state, save);
}

Backward CallBackward(const at::Tensor& grad_out, const OptionalTensor& grad_final_state, const LatentInputs& in,
                      const OptionalTensor& final_state, const at::Tensor& saved) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("latte::latent_attention_backward", "").typed<decltype(BackwardMeta)>();
  return op.call(grad_out, grad_final_state, in.query_logits, in.key_logits, in.values, in.window_out, in.log_decay, in.key_mask,
                 in.initial_state, in.cu_seqlens, in.causal, final_state, saved);
}

class LatentFunction : public torch::autograd::Function<LatentFunction> {
 public:
  static variable_list forward(AutogradContext* context, LATTE_LATENT_PARAMETERS, bool output_final_state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, final_state, saved] = CallForward(LATTE_LATENT_INPUTS, output_final_state, /*save=*/true);
    context->save_for_backward({query_logits, key_logits, values, OrUndefined(window_out), OrUndefined(log_decay),
                                OrUndefined(key_mask), OrUndefined(initial_state), OrUndefined(cu_seqlens),
                                output_final_state ? final_state : at::Tensor(), saved});
    context->saved_data["causal"] = causal;
    context->set_materialize_grads(false);
    context->mark_non_differentiable(output_final_state ? variable_list{saved} : variable_list{final_state, saved});
    return {out, final_state, saved};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto x = context->get_saved_variables();
    const LatentInputs in{x[0],           x[1],           x[2],
                          OrAbsent(x[3]), OrAbsent(x[4]), OrAbsent(x[5]),
                          OrAbsent(x[6]), OrAbsent(x[7]), context->saved_data["causal"].toBool()};
    variable_list result(10);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto& q = in.query_logits;
    const auto grad_out =
        grads[0].defined()
            ? grads[0]
            : at::zeros({1}, q.options()).expand_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), in.values.sym_size(3)});
    const auto final_state = x[8].defined() && grads[1].defined() ? OptionalTensor(x[8]) : OptionalTensor();
    auto [query_logits, key_logits, values, window_out, log_decay, initial_state] =
        CallBackward(grad_out, OrAbsent(grads[1]), in, final_state, x[9]);
    result[0] = query_logits;
    result[1] = key_logits;
    result[2] = values;
    if (Present(in.window_out)) result[3] = window_out;
    if (Present(in.log_decay)) result[4] = log_decay;
    if (Present(in.initial_state)) result[6] = initial_state;
    return result;
  }
};

Forward ForwardAutograd(LATTE_LATENT_PARAMETERS, bool output_final_state, bool save) {
  if (AnyTransformed(query_logits, key_logits, values, window_out, log_decay, initial_state)) {
    return ForwardComposed(query_logits, key_logits, values, window_out, log_decay, key_mask, initial_state, cu_seqlens, causal,
                           output_final_state, save);
  }
  const bool needs_grad =
      at::GradMode::is_enabled() && (NeedsGrad(query_logits) || NeedsGrad(key_logits) || NeedsGrad(values) ||
                                     NeedsGrad(window_out) || NeedsGrad(log_decay) || NeedsGrad(initial_state));
  if (!needs_grad) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return CallForward(LATTE_LATENT_INPUTS, output_final_state, save);
  }
  const auto outputs = LatentFunction::apply(query_logits, key_logits, values, window_out, log_decay, key_mask, initial_state,
                                             cu_seqlens, causal, output_final_state);
  return {outputs[0], outputs[1], outputs[2]};
}

// First derivatives go on to the kernels; where they are to be differentiated again, the composed path has the graph.
Backward BackwardAutograd(LATTE_LATENT_BACKWARD_PARAMETERS) {
  const LatentInputs in = LATTE_LATENT_INPUTS;
  const bool needs_grad =
      at::GradMode::is_enabled() &&
      (NeedsGrad(grad_out) || NeedsGrad(grad_final_state) || NeedsGrad(query_logits) || NeedsGrad(key_logits) ||
       NeedsGrad(values) || NeedsGrad(window_out) || NeedsGrad(log_decay) || NeedsGrad(initial_state));
  if (!needs_grad) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return CallBackward(grad_out, grad_final_state, in, final_state, saved);
  }
  CheckBackward(grad_out, grad_final_state, in, final_state, saved);
  const auto function = [&](const std::vector<at::Tensor>& x) {
    LatentInputs followed = in;
    followed.query_logits = x[0];
    followed.key_logits = x[1];
    followed.values = x[2];
    followed.window_out = OrAbsent(x[3]);
    followed.log_decay = OrAbsent(x[4]);
    followed.initial_state = OrAbsent(x[5]);
    const auto outputs = composed::LatentAttention(followed);
    return std::vector<at::Tensor>{outputs.out, outputs.final_state};
  };
  const auto g = composed::DifferentiableGradients(
      function, {query_logits, key_logits, values, OrUndefined(window_out), OrUndefined(log_decay), OrUndefined(initial_state)},
      {grad_out, OrUndefined(grad_final_state)});
  return Tuple(query_logits, {g[0], g[1], g[2], g[3], g[4], g[5]});
}

TORCH_LIBRARY_FRAGMENT(latte, m) {
  m.def(
      "latent_attention(Tensor query_logits, Tensor key_logits, Tensor values, Tensor? window_out, Tensor? log_decay, "
      "Tensor? key_mask, Tensor? initial_state, Tensor? cu_seqlens, bool causal, bool output_final_state, bool save) "
      "-> (Tensor out, Tensor final_state, Tensor saved)");
  m.def(
      "latent_attention_backward(Tensor grad_out, Tensor? grad_final_state, Tensor query_logits, Tensor key_logits, "
      "Tensor values, Tensor? window_out, Tensor? log_decay, Tensor? key_mask, Tensor? initial_state, Tensor? cu_seqlens, "
      "bool causal, Tensor? final_state, Tensor saved) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(latte, CompositeExplicitAutograd, m) {
  m.impl("latent_attention", TORCH_FN(ForwardComposed));
  m.impl("latent_attention_backward", TORCH_FN(BackwardComposed));
}
TORCH_LIBRARY_IMPL(latte, CPU, m) {
  m.impl("latent_attention", TORCH_FN(ForwardCpu));
  m.impl("latent_attention_backward", TORCH_FN(BackwardCpu));
}
TORCH_LIBRARY_IMPL(latte, Meta, m) {
  m.impl("latent_attention", TORCH_FN(ForwardMeta));
  m.impl("latent_attention_backward", TORCH_FN(BackwardMeta));
}
TORCH_LIBRARY_IMPL(latte, Autograd, m) {
  m.impl("latent_attention", TORCH_FN(ForwardAutograd));
  m.impl("latent_attention_backward", TORCH_FN(BackwardAutograd));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> CallLatentAttention(const LatentInputs& inputs, bool output_final_state) {
  auto [out, final_state, saved] = CallForward(inputs, output_final_state, /*save=*/false);
  return {out, final_state};
}

}  // namespace latte
