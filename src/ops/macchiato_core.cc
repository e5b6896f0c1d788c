// latte::macchiato_attention_core: the window and the latents in one kernel where no gradient is wanted; elsewhere the two core
// operators, one after the other.
#include <torch/library.h>

#include "kernels/macchiato.h"
#include "ops/check.h"
#include "ops/core.h"
#include "ops/cpu_calls.h"

namespace latte {
namespace {

using Forward = std::tuple<at::Tensor, at::Tensor>;  // out, final_state

constexpr const char* kName = "macchiato_attention_core";

#define LATTE_MACCHIATO_PARAMETERS                                                                          \
  const at::Tensor &query, const at::Tensor &key, const at::Tensor &values, const at::Tensor &query_logits, \
      const at::Tensor &key_logits, const OptionalTensor &sink_query, const OptionalTensor &log_decay,      \
      const OptionalTensor &key_mask, const OptionalTensor &initial_state, const OptionalTensor &position,  \
      const OptionalTensor &past_key, const OptionalTensor &past_values, const OptionalTensor &past_mask,   \
      const OptionalTensor &sink_key, const OptionalTensor &sink_values, const OptionalTensor &sink_mask,   \
      const OptionalTensor &cu_seqlens, int64_t window, int64_t sinks, double scale, bool causal, bool output_final_state

struct Inputs {
  WindowInputs window;
  LatentInputs latent;
};

#define LATTE_MACCHIATO_INPUTS                                                                                     \
  Inputs {                                                                                                         \
    {query,    key,         values,    sink_query, key_mask, position, past_key, past_values, past_mask,           \
     sink_key, sink_values, sink_mask, cu_seqlens, window,   sinks,    scale,    causal},                          \
    {                                                                                                              \
      query_logits, key_logits, values, {}, log_decay, key_mask, initial_state, cu_seqlens, causal, /*gated=*/true \
    }                                                                                                              \
  }

void Check(const Inputs& in, bool output_final_state) {
  CheckWindow(kName, in.window);
  CheckLatent(kName, in.latent);
  const Checker check(kName);
  const auto& query = in.window.query;
  check.Shape("query_logits", in.latent.query_logits, "[B, T, H, L + 1]",
              {query.sym_size(0), query.sym_size(1), query.sym_size(2), in.latent.key_logits.sym_size(3) + 1});
  check.Shape("key_logits", in.latent.key_logits, "[B, T, Hkv, L]",
              {query.sym_size(0), query.sym_size(1), in.window.key.sym_size(2), in.latent.key_logits.sym_size(3)});
  check.Dtype("query_logits", in.latent.query_logits, query.scalar_type());
  check.Device("query_logits", in.latent.query_logits, query);
  check.Absent("output_final_state", output_final_state && !in.latent.causal, "when causal is false");
}

Forward OneAfterTheOther(const Inputs& in, bool output_final_state) {
  LatentInputs latent = in.latent;
  latent.window_out = CallWindowAttention(in.window);
  return CallLatentAttention(latent, output_final_state);
}

Forward ForwardMeta(LATTE_MACCHIATO_PARAMETERS) {
  const Inputs in = LATTE_MACCHIATO_INPUTS;
  Check(in, output_final_state);
  const auto dtype = AccumulateType(query.scalar_type());
  const auto heads = query.sym_size(2), kv_heads = key.sym_size(2), head_dim = values.sym_size(3);
  return {at::empty_symint({query.sym_size(0), query.sym_size(1), heads, head_dim}, query.options()),
          output_final_state ? at::empty_symint({SequenceCount(query, cu_seqlens), kv_heads, key_logits.sym_size(3),
                                                 head_dim + kernels::kStateExtra},
                                                query.options().dtype(dtype))
                             : AbsentOutput(query, dtype)};
}

Forward ForwardComposed(LATTE_MACCHIATO_PARAMETERS) {
  const Inputs in = LATTE_MACCHIATO_INPUTS;
  Check(in, output_final_state);
  return OneAfterTheOther(in, output_final_state);
}

Forward ForwardCpu(LATTE_MACCHIATO_PARAMETERS) {
  const Inputs in = LATTE_MACCHIATO_INPUTS;
  Check(in, output_final_state);
  // One token takes each kernel's own step.
  if (!cpu::Fused(query) || query.size(1) == 1) return OneAfterTheOther(in, output_final_state);
  Inputs once = in;  // what both read is copied once, if at all
  once.window.values = once.latent.values = cpu::Readable(in.window.values);
  const cpu::WindowCall window_call(kName, once.window);
  const cpu::LatentCall latent_call(kName, once.latent);
  const auto& args = latent_call.args;
  const auto out = cpu::Empty({query.size(0), args.time, args.heads, args.head_dim}, query.options());
  const auto float32 = query.options().dtype(at::kFloat);
  const auto state = output_final_state
                         ? at::empty({args.sequences, args.kv_heads, args.latents, args.head_dim + kernels::kStateExtra}, float32)
                         : AbsentOutput(query, at::kFloat);
  kernels::LatentOutputs outputs;
  outputs.out = cpu::WriteTo(out);
  if (output_final_state) outputs.final_state = state.mutable_data_ptr<float>();
  cpu::ForSlices(args, window_call.work + latent_call.work,
                 [&](int64_t first, int64_t last) { kernels::MacchiatoForward(window_call.args, args, outputs, first, last); });
  return {out, state};
}

Forward Call(const Inputs& in, bool output_final_state) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("latte::macchiato_attention_core", "").typed<decltype(ForwardMeta)>();
  const auto& [window, latent] = in;
  return op.call(window.query, window.key, window.values, latent.query_logits, latent.key_logits, window.sink_query,
                 latent.log_decay, window.key_mask, latent.initial_state, window.position, window.past_key, window.past_values,
                 window.past_mask, window.sink_key, window.sink_values, window.sink_mask, window.cu_seqlens, window.window,
                 window.sinks, window.scale, window.causal, output_final_state);
}

// Gradients and transforms are the two core operators' business.
Forward ForwardAutograd(LATTE_MACCHIATO_PARAMETERS) {
  const Inputs in = LATTE_MACCHIATO_INPUTS;
  const auto any = [&](const auto& is) {
    return is(query) || is(key) || is(values) || is(query_logits) || is(key_logits) || is(sink_query) || is(log_decay) ||
           is(initial_state) || is(past_key) || is(past_values) || is(sink_key) || is(sink_values);
  };
  const bool needs_grad = at::GradMode::is_enabled() && any([](const auto& x) { return NeedsGrad(x); });
  if (needs_grad || any([](const auto& x) { return Transformed(x); })) {
    Check(in, output_final_state);
    return OneAfterTheOther(in, output_final_state);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return Call(in, output_final_state);
}

TORCH_LIBRARY_FRAGMENT(latte, m) {
  m.def(
      "macchiato_attention_core(Tensor query, Tensor key, Tensor values, Tensor query_logits, Tensor key_logits, "
      "Tensor? sink_query, Tensor? log_decay, Tensor? key_mask, Tensor? initial_state, Tensor? position, Tensor? past_key, "
      "Tensor? past_values, Tensor? past_mask, Tensor? sink_key, Tensor? sink_values, Tensor? sink_mask, Tensor? cu_seqlens, "
      "int window, int sinks, float scale, bool causal, bool output_final_state) -> (Tensor out, Tensor final_state)");
}
TORCH_LIBRARY_IMPL(latte, CompositeExplicitAutograd, m) { m.impl("macchiato_attention_core", TORCH_FN(ForwardComposed)); }
TORCH_LIBRARY_IMPL(latte, CPU, m) { m.impl("macchiato_attention_core", TORCH_FN(ForwardCpu)); }
TORCH_LIBRARY_IMPL(latte, Meta, m) { m.impl("macchiato_attention_core", TORCH_FN(ForwardMeta)); }
TORCH_LIBRARY_IMPL(latte, Autograd, m) { m.impl("macchiato_attention_core", TORCH_FN(ForwardAutograd)); }

}  // namespace

std::tuple<at::Tensor, at::Tensor> CallMacchiatoAttention(const WindowInputs& window, const LatentInputs& latent,
                                                          bool output_final_state) {
  return Call({window, latent}, output_final_state);
}

}  // namespace latte
