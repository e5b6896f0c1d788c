// latte::window_attention_core: softmax attention over a window and sinks, with the past given piece by piece. Checks, the CPU's
// kernels, meta functions and autograd; macchiato_attention.cc makes the public operators of it.
#include <torch/library.h>

#include "kernels/window.h"
#include "ops/check.h"
#include "ops/composed.h"
#include "ops/core.h"
#include "ops/cpu_calls.h"

namespace latte {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<at::Tensor, at::Tensor>;  // out, lse
// Of query, sink_query, key, values, past_key, past_values, sink_key, sink_values.
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kName = "window_attention_core";
constexpr const char* kBackwardName = "window_attention_core_backward";

Forward CallForward(const WindowInputs& in, bool save);

#define LATTE_WINDOW_PARAMETERS                                                                                             \
  const at::Tensor &query, const at::Tensor &key, const at::Tensor &values, const OptionalTensor &sink_query,               \
      const OptionalTensor &key_mask, const OptionalTensor &position, const OptionalTensor &past_key,                       \
      const OptionalTensor &past_values, const OptionalTensor &past_mask, const OptionalTensor &sink_key,                   \
      const OptionalTensor &sink_values, const OptionalTensor &sink_mask, const OptionalTensor &cu_seqlens, int64_t window, \
      int64_t sinks, double scale, bool causal
#define LATTE_WINDOW_INPUTS                                                                                                 \
  WindowInputs {                                                                                                            \
    query, key, values, sink_query, key_mask, position, past_key, past_values, past_mask, sink_key, sink_values, sink_mask, \
        cu_seqlens, window, sinks, scale, causal                                                                            \
  }

at::Tensor OutLike(const WindowInputs& in) {
  const auto& q = in.query;
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), in.values.sym_size(3)},
                          q.options().dtype(AccumulateType(q.scalar_type())));
}

at::Tensor LseLike(const WindowInputs& in, bool save) {
  const auto& q = in.query;
  const auto dtype = AccumulateType(q.scalar_type());
  if (!save) return AbsentOutput(q, dtype);
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2)}, q.options().dtype(dtype));
}

Forward ForwardMeta(LATTE_WINDOW_PARAMETERS, bool save) {
  const WindowInputs in = LATTE_WINDOW_INPUTS;
  CheckWindow(kName, in);
  return {OutLike(in), LseLike(in, save)};
}

void CheckPosition(const char* op, const WindowInputs& in) {
  if (Present(in.position)) Checker(op).PositionData(in.position->to(at::kCPU).contiguous());
}

Forward ForwardComposed(LATTE_WINDOW_PARAMETERS, bool save) {
  WindowInputs in = LATTE_WINDOW_INPUTS;
  CheckWindow(kName, in);
  CheckPosition(kName, in);
  // Sinks beyond the text are never read.
  if (!Present(position)) in.sinks = std::min(in.sinks, query.size(1));
  const auto outputs = composed::WindowAttention(in);
  return {outputs.out.contiguous(), save ? outputs.lse.contiguous() : LseLike(in, false)};
}

Forward ForwardCpu(LATTE_WINDOW_PARAMETERS, bool save) {
  if (!cpu::Fused(query)) {
    return ForwardComposed(query, key, values, sink_query, key_mask, position, past_key, past_values, past_mask, sink_key,
                           sink_values, sink_mask, cu_seqlens, window, sinks, scale, causal, save);
  }
  const WindowInputs given = LATTE_WINDOW_INPUTS;
  CheckWindow(kName, given);
  const cpu::WindowCall call(kName, given);
  const auto out = cpu::Empty({query.size(0), query.size(1), query.size(2), values.size(3)}, query.options().dtype(at::kFloat));
  const auto lse = LseLike(given, save);
  kernels::WindowOutputs outputs;
  outputs.out = out.mutable_data_ptr<float>();
  outputs.lse = save ? lse.mutable_data_ptr<float>() : nullptr;
  cpu::ForSlices(call.args, call.work,
                 [&](int64_t first, int64_t last) { kernels::WindowForward(call.args, outputs, first, last); });
  return {out, lse};
}

void CheckBackward(const at::Tensor& grad_out, const at::Tensor& out, const at::Tensor& lse, const WindowInputs& in) {
  CheckWindow(kBackwardName, in);
  const Checker check(kBackwardName);
  const auto& q = in.query;
  const auto dtype = AccumulateType(q.scalar_type());
  const auto shape = [&](const char* argument, const at::Tensor& x) {
    check.Shape(argument, x, "[B, T, H, D]", {q.sym_size(0), q.sym_size(1), q.sym_size(2), in.values.sym_size(3)});
    check.Dtype(argument, x, dtype);
    check.Device(argument, x, q);
  };
  shape("grad_out", grad_out);
  shape("out", out);
  check.Shape("lse", lse, "[B, T, H]", {q.sym_size(0), q.sym_size(1), q.sym_size(2)});
  check.Dtype("lse", lse, dtype);
  check.Device("lse", lse, q);
}

Backward Tuple(const at::Tensor& like, const composed::WindowGradients& g) {
  const auto defined = [&](const at::Tensor& x) { return x.defined() ? x : AbsentOutput(like, like.scalar_type()); };
  return {defined(g.query),    defined(g.sink_query),  defined(g.key),      defined(g.values),
          defined(g.past_key), defined(g.past_values), defined(g.sink_key), defined(g.sink_values)};
}

#define LATTE_WINDOW_BACKWARD_PARAMETERS \
  const at::Tensor &grad_out, const at::Tensor &out, const at::Tensor &lse, LATTE_WINDOW_PARAMETERS

Backward BackwardMeta(LATTE_WINDOW_BACKWARD_PARAMETERS) {
  const WindowInputs in = LATTE_WINDOW_INPUTS;
  CheckBackward(grad_out, out, lse, in);
  const auto like = [](const OptionalTensor& x) {
    return Present(x) ? at::empty_symint(x->sym_sizes(), x->options()) : at::Tensor();
  };
  return Tuple(query, {like(query), like(sink_query), like(key), like(values), like(past_key), like(past_values), like(sink_key),
                       like(sink_values)});
}

Backward BackwardComposed(LATTE_WINDOW_BACKWARD_PARAMETERS) {
  const WindowInputs in = LATTE_WINDOW_INPUTS;
  CheckBackward(grad_out, out, lse, in);
  CheckPosition(kBackwardName, in);
  return Tuple(query, composed::WindowAttentionBackward(in, grad_out));
}

Backward BackwardCpu(LATTE_WINDOW_BACKWARD_PARAMETERS) {
  if (!cpu::Fused(query)) {
    return BackwardComposed(grad_out, out, lse, query, key, values, sink_query, key_mask, position, past_key, past_values,
                            past_mask, sink_key, sink_values, sink_mask, cu_seqlens, window, sinks, scale, causal);
  }
  const WindowInputs given = LATTE_WINDOW_INPUTS;
  CheckBackward(grad_out, out, lse, given);
  const cpu::WindowCall call(kBackwardName, given);
  const auto grad = cpu::Readable(grad_out), saved_out = out.contiguous(), saved_lse = lse.contiguous();
  composed::WindowGradients grads{cpu::Like(query),    cpu::Like(sink_query),  cpu::Like(key),      cpu::Like(values),
                                  cpu::Like(past_key), cpu::Like(past_values), cpu::Like(sink_key), cpu::Like(sink_values)};
  // Without sinks nothing reads sink_query, and the kernel isn't told of it.
  const bool sink_query_unread = grads.sink_query.defined() && sinks == 0;
  if (sink_query_unread) grads.sink_query.zero_();
  kernels::WindowGradients gradients;
  gradients.out = saved_out.const_data_ptr<float>();
  gradients.lse = saved_lse.const_data_ptr<float>();
  gradients.grad_out = cpu::ViewOf(grad);
  gradients.grad_query = cpu::WriteTo(grads.query);
  if (!sink_query_unread) gradients.grad_sink_query = cpu::WriteTo(grads.sink_query);
  gradients.grad_key = cpu::WriteTo(grads.key);
  gradients.grad_values = cpu::WriteTo(grads.values);
  if (Present(position)) {
    gradients.grad_past_key = cpu::WriteTo(grads.past_key);
    gradients.grad_past_values = cpu::WriteTo(grads.past_values);
    gradients.grad_sink_key = cpu::WriteTo(grads.sink_key);
    gradients.grad_sink_values = cpu::WriteTo(grads.sink_values);
  }
  cpu::ForSlices(call.args, call.work,
                 [&](int64_t first, int64_t last) { kernels::WindowBackward(call.args, gradients, first, last); });
  return Tuple(query, grads);
}

Forward CallForward(const WindowInputs& in, bool save) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("latte::window_attention_core", "").typed<decltype(ForwardMeta)>();
  return op.call(in.query, in.key, in.values, in.sink_query, in.key_mask, in.position, in.past_key, in.past_values, in.past_mask,
                 in.sink_key, in.sink_values, in.sink_mask, in.cu_seqlens, in.window, in.sinks, in.scale, in.causal, save);
}

Backward CallBackward(const at::Tensor& grad_out, const at::Tensor& out, const at::Tensor& lse, const WindowInputs& in) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("latte::window_attention_core_backward", "").typed<decltype(BackwardMeta)>();
  return op.call(grad_out, out, lse, in.query, in.key, in.values, in.sink_query, in.key_mask, in.position, in.past_key,
                 in.past_values, in.past_mask, in.sink_key, in.sink_values, in.sink_mask, in.cu_seqlens, in.window, in.sinks,
                 in.scale, in.causal);
}

bool AnyNeedsGrad(const WindowInputs& in) {
  return NeedsGrad(in.query) || NeedsGrad(in.key) || NeedsGrad(in.values) || NeedsGrad(in.sink_query) || NeedsGrad(in.past_key) ||
         NeedsGrad(in.past_values) || NeedsGrad(in.sink_key) || NeedsGrad(in.sink_values);
}

class WindowFunction : public torch::autograd::Function<WindowFunction> {
 public:
  static variable_list forward(AutogradContext* context, LATTE_WINDOW_PARAMETERS) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, lse] = CallForward(LATTE_WINDOW_INPUTS, /*save=*/true);
    context->save_for_backward({query, key, values, OrUndefined(sink_query), OrUndefined(key_mask), OrUndefined(position),
                                OrUndefined(past_key), OrUndefined(past_values), OrUndefined(past_mask), OrUndefined(sink_key),
                                OrUndefined(sink_values), OrUndefined(sink_mask), OrUndefined(cu_seqlens), out, lse});
    context->saved_data["window"] = window;
    context->saved_data["sinks"] = sinks;
    context->saved_data["scale"] = scale;
    context->saved_data["causal"] = causal;
    context->set_materialize_grads(false);
    context->mark_non_differentiable({lse});
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto x = context->get_saved_variables();
    auto& data = context->saved_data;
    const WindowInputs in{x[0],
                          x[1],
                          x[2],
                          OrAbsent(x[3]),
                          OrAbsent(x[4]),
                          OrAbsent(x[5]),
                          OrAbsent(x[6]),
                          OrAbsent(x[7]),
                          OrAbsent(x[8]),
                          OrAbsent(x[9]),
                          OrAbsent(x[10]),
                          OrAbsent(x[11]),
                          OrAbsent(x[12]),
                          data["window"].toInt(),
                          data["sinks"].toInt(),
                          data["scale"].toDouble(),
                          data["causal"].toBool()};
    variable_list result(17);
    if (!grads[0].defined()) return result;
    auto [query, sink_query, key, values, past_key, past_values, sink_key, sink_values] =
        CallBackward(grads[0], x[13], x[14], in);
    result[0] = query;
    result[1] = key;
    result[2] = values;
    if (Present(in.sink_query)) result[3] = sink_query;
    if (Present(in.past_key)) result[6] = past_key;
    if (Present(in.past_values)) result[7] = past_values;
    if (Present(in.sink_key)) result[9] = sink_key;
    if (Present(in.sink_values)) result[10] = sink_values;
    return result;
  }
};

Forward ForwardAutograd(LATTE_WINDOW_PARAMETERS, bool save) {
  const WindowInputs in = LATTE_WINDOW_INPUTS;
  if (AnyTransformed(query, key, values, sink_query, past_key, past_values, sink_key, sink_values)) {
    return ForwardComposed(query, key, values, sink_query, key_mask, position, past_key, past_values, past_mask, sink_key,
                           sink_values, sink_mask, cu_seqlens, window, sinks, scale, causal, save);
  }
  if (!at::GradMode::is_enabled() || !AnyNeedsGrad(in)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return CallForward(in, save);
  }
  const auto outputs = WindowFunction::apply(query, key, values, sink_query, key_mask, position, past_key, past_values, past_mask,
                                             sink_key, sink_values, sink_mask, cu_seqlens, window, sinks, scale, causal);
  return {outputs[0], outputs[1]};
}

// First derivatives go on to the kernels; where they are to be differentiated again, the composed path has the graph.
Backward BackwardAutograd(LATTE_WINDOW_BACKWARD_PARAMETERS) {
  const WindowInputs in = LATTE_WINDOW_INPUTS;
  if (!at::GradMode::is_enabled() || !(AnyNeedsGrad(in) || NeedsGrad(grad_out))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return CallBackward(grad_out, out, lse, in);
  }
  CheckBackward(grad_out, out, lse, in);
  CheckPosition(kBackwardName, in);
  const auto function = [&](const std::vector<at::Tensor>& x) {
    WindowInputs followed = in;
    followed.query = x[0];
    followed.sink_query = OrAbsent(x[1]);
    followed.key = x[2];
    followed.values = x[3];
    followed.past_key = OrAbsent(x[4]);
    followed.past_values = OrAbsent(x[5]);
    followed.sink_key = OrAbsent(x[6]);
    followed.sink_values = OrAbsent(x[7]);
    return std::vector<at::Tensor>{composed::WindowAttention(followed).out};
  };
  const auto g = composed::DifferentiableGradients(function,
                                                   {query, OrUndefined(sink_query), key, values, OrUndefined(past_key),
                                                    OrUndefined(past_values), OrUndefined(sink_key), OrUndefined(sink_values)},
                                                   {grad_out});
  return Tuple(query, {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]});
}

TORCH_LIBRARY_FRAGMENT(latte, m) {
  m.def(
      "window_attention_core(Tensor query, Tensor key, Tensor values, Tensor? sink_query, Tensor? key_mask, Tensor? position, "
      "Tensor? past_key, Tensor? past_values, Tensor? past_mask, Tensor? sink_key, Tensor? sink_values, Tensor? sink_mask, "
      "Tensor? cu_seqlens, int window, int sinks, float scale, bool causal, bool save) -> (Tensor out, Tensor lse)");
  m.def(
      "window_attention_core_backward(Tensor grad_out, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor values, "
      "Tensor? sink_query, Tensor? key_mask, Tensor? position, Tensor? past_key, Tensor? past_values, Tensor? past_mask, "
      "Tensor? sink_key, Tensor? sink_values, Tensor? sink_mask, Tensor? cu_seqlens, int window, int sinks, float scale, "
      "bool causal) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(latte, CompositeExplicitAutograd, m) {
  m.impl("window_attention_core", TORCH_FN(ForwardComposed));
  m.impl("window_attention_core_backward", TORCH_FN(BackwardComposed));
}
TORCH_LIBRARY_IMPL(latte, CPU, m) {
  m.impl("window_attention_core", TORCH_FN(ForwardCpu));
  m.impl("window_attention_core_backward", TORCH_FN(BackwardCpu));
}
TORCH_LIBRARY_IMPL(latte, Meta, m) {
  m.impl("window_attention_core", TORCH_FN(ForwardMeta));
  m.impl("window_attention_core_backward", TORCH_FN(BackwardMeta));
}
TORCH_LIBRARY_IMPL(latte, Autograd, m) {
  m.impl("window_attention_core", TORCH_FN(ForwardAutograd));
  m.impl("window_attention_core_backward", TORCH_FN(BackwardAutograd));
}

}  // namespace

at::Tensor CallWindowAttention(const WindowInputs& inputs) { return std::get<0>(CallForward(inputs, /*save=*/false)); }

}  // namespace latte
