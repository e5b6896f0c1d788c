// latte::macchiato_attention and latte::window_attention: the window's output is what latent 0 reads. The state's caches are
// moved on with plain ATen, so that they carry gradients.
#include <torch/library.h>

#include <cmath>

#include "ops/autocast.h"
#include "ops/check.h"
#include "ops/core.h"

namespace latte {
namespace {

using State = std::vector<at::Tensor>;  // in the order of MacchiatoState
enum StateIndex : int64_t { kLatents, kKeys, kValues, kMask, kSinkKeys, kSinkValues, kSinkMask, kPosition, kStateSize };

struct WindowOptions {
  int64_t window = 1;
  int64_t sinks = 0;
  OptionalTensor sink_query;
  bool causal = true;
  std::optional<double> scale;
  OptionalTensor key_mask;
  std::optional<State> initial_state;
  bool output_final_state = false;
  OptionalTensor cu_seqlens;
};

double DefaultScale(const at::Tensor& query) {
  const auto key_dim = query.sym_size(-1).guard_int(__FILE__, __LINE__);
  return 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(1, key_dim)));
}

WindowInputs MakeWindowInputs(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& values,
                              const WindowOptions& options) {
  WindowInputs in;
  in.query = Autocast(query);
  in.key = Autocast(key);
  in.values = Autocast(values);
  in.sink_query = Autocast(options.sink_query);
  in.key_mask = options.key_mask;
  in.cu_seqlens = options.cu_seqlens;
  in.window = options.window;
  in.sinks = options.sinks;
  in.causal = options.causal;
  const Checker check(op);
  check.Rank("query", query, 4, "[B, T, H, Dk]");
  check.AtLeast("window", in.window, 1);
  check.AtLeast("sinks", in.sinks, 0);
  in.scale = options.scale.has_value() ? *options.scale : DefaultScale(query);
  const bool wide = query.scalar_type() == at::kDouble;  // kernels take a float
  TORCH_CHECK_VALUE(std::isfinite(wide ? in.scale : static_cast<float>(in.scale)), "[latte.", op, "] scale: got ", in.scale,
                    ", expected a finite number", wide ? "" : " of float32");
  check.Absent("output_final_state", options.output_final_state && !options.causal, "when causal is false");
  check.Absent("initial_state", options.initial_state.has_value() && !options.causal, "when causal is false");
  if (options.initial_state.has_value()) {
    const auto& state = *options.initial_state;
    TORCH_CHECK_VALUE(static_cast<int64_t>(state.size()) == kStateSize, "[latte.", op, "] initial_state: got ", state.size(),
                      " tensors, expected the ", static_cast<int64_t>(kStateSize), " of a MacchiatoState");
    check.Rank("initial_state's keys", state[kKeys], 4, "[N, W, Hkv, Dk]");
    check.Rank("initial_state's sink_keys", state[kSinkKeys], 4, "[N, S, Hkv, Dk]");
    TORCH_CHECK_VALUE(state[kKeys].sym_size(1) == in.window && state[kSinkKeys].sym_size(1) == in.sinks, "[latte.", op,
                      "] initial_state: got one of window = ", state[kKeys].sym_size(1),
                      " and sinks = ", state[kSinkKeys].sym_size(1), ", expected ", in.window, " and ", in.sinks);
    in.position = state[kPosition];
    in.past_key = Autocast(state[kKeys]);
    in.past_values = Autocast(state[kValues]);
    in.past_mask = state[kMask];
    in.sink_key = Autocast(state[kSinkKeys]);
    in.sink_values = Autocast(state[kSinkValues]);
    in.sink_mask = state[kSinkMask];
  }
  CheckWindow(op, in);
  return in;
}

State JoinState(const at::Tensor& latents, std::vector<at::Tensor> caches) {
  caches.insert(caches.begin(), latents);
  return caches;
}

std::tuple<at::Tensor, State> Macchiato(const at::Tensor& query, const at::Tensor& key, const at::Tensor& values,
                                        const at::Tensor& query_logits, const at::Tensor& key_logits,
                                        const OptionalTensor& log_decay, const WindowOptions& options) {
  constexpr const char* kName = "macchiato_attention";
  const auto window = MakeWindowInputs(kName, query, key, values, options);
  const Checker check(kName);
  check.Rank("query_logits", query_logits, 4, "[B, T, H, L + 1]");
  check.Rank("key_logits", key_logits, 4, "[B, T, Hkv, L]");
  const auto batch = window.query.sym_size(0), time = window.query.sym_size(1);
  check.Shape("query_logits", query_logits, "[B, T, H, L + 1]",
              {batch, time, window.query.sym_size(2), key_logits.sym_size(3) + 1});
  check.Shape("key_logits", key_logits, "[B, T, Hkv, L]", {batch, time, window.key.sym_size(2), key_logits.sym_size(3)});
  LatentInputs latent{Autocast(query_logits), Autocast(key_logits), window.values, {}, Autocast(log_decay), options.key_mask, {},
                      options.cu_seqlens,     options.causal,       /*gated=*/true};
  check.Dtype("query_logits", latent.query_logits, window.query.scalar_type());
  check.Device("query_logits", latent.query_logits, window.query);
  if (options.initial_state.has_value()) latent.initial_state = (*options.initial_state)[kLatents];
  CheckLatent(kName, latent);
  auto [out, latents] = CallMacchiatoAttention(window, latent, options.output_final_state);
  if (!options.output_final_state) return {out, {}};
  return {out, JoinState(latents, NextWindowState(window))};
}

std::tuple<at::Tensor, State> Window(const at::Tensor& query, const at::Tensor& key, const at::Tensor& values,
                                     const WindowOptions& options) {
  const auto window = MakeWindowInputs("window_attention", query, key, values, options);
  const auto out = CallWindowAttention(window).to(window.query.scalar_type());
  if (!options.output_final_state) return {out, {}};
  const auto no_latents = AbsentOutput(window.query, AccumulateType(window.query.scalar_type()));
  return {out, JoinState(no_latents, NextWindowState(window))};
}

WindowOptions OptionsOf(const MacchiatoAttentionOptions& options) {
  WindowOptions result{options.window,
                       options.sinks,
                       options.sink_query,
                       options.causal,
                       options.scale,
                       options.key_mask,
                       {},
                       options.output_final_state,
                       options.cu_seqlens};
  if (options.initial_state.has_value()) {
    const auto& s = *options.initial_state;
    result.initial_state = State{s.latents, s.keys, s.values, s.mask, s.sink_keys, s.sink_values, s.sink_mask, s.position};
  }
  return result;
}

std::optional<MacchiatoState> StateOf(const State& s) {
  if (s.empty()) return {};
  return MacchiatoState{s[kLatents], s[kKeys], s[kValues], s[kMask], s[kSinkKeys], s[kSinkValues], s[kSinkMask], s[kPosition]};
}

std::optional<State> ListOf(const std::optional<at::TensorList>& list) {
  return list.has_value() ? std::optional<State>(list->vec()) : std::nullopt;
}

TORCH_LIBRARY_FRAGMENT(latte, m) {
  m.def(
      "macchiato_attention(Tensor query, Tensor key, Tensor values, Tensor query_logits, Tensor key_logits, *, int window, "
      "int sinks=0, Tensor? sink_query=None, bool causal=True, float? scale=None, Tensor? log_decay=None, "
      "Tensor? key_mask=None, Tensor[]? initial_state=None, bool output_final_state=False, Tensor? cu_seqlens=None) "
      "-> (Tensor, Tensor[])",
      [](const at::Tensor& query, const at::Tensor& key, const at::Tensor& values, const at::Tensor& query_logits,
         const at::Tensor& key_logits, int64_t window, int64_t sinks, const OptionalTensor& sink_query, bool causal,
         std::optional<double> scale, const OptionalTensor& log_decay, const OptionalTensor& key_mask,
         const std::optional<at::TensorList>& initial_state, bool output_final_state, const OptionalTensor& cu_seqlens) {
        return Macchiato(
            query, key, values, query_logits, key_logits, log_decay,
            {window, sinks, sink_query, causal, scale, key_mask, ListOf(initial_state), output_final_state, cu_seqlens});
      });
  m.def(
      "window_attention(Tensor query, Tensor key, Tensor values, *, int window, int sinks=0, Tensor? sink_query=None, "
      "bool causal=True, float? scale=None, Tensor? key_mask=None, Tensor[]? initial_state=None, "
      "bool output_final_state=False, Tensor? cu_seqlens=None) -> (Tensor, Tensor[])",
      [](const at::Tensor& query, const at::Tensor& key, const at::Tensor& values, int64_t window, int64_t sinks,
         const OptionalTensor& sink_query, bool causal, std::optional<double> scale, const OptionalTensor& key_mask,
         const std::optional<at::TensorList>& initial_state, bool output_final_state, const OptionalTensor& cu_seqlens) {
        return Window(
            query, key, values,
            {window, sinks, sink_query, causal, scale, key_mask, ListOf(initial_state), output_final_state, cu_seqlens});
      });
}

}  // namespace

std::tuple<at::Tensor, std::optional<MacchiatoState>> macchiato_attention(const at::Tensor& query, const at::Tensor& key,
                                                                          const at::Tensor& values,
                                                                          const at::Tensor& query_logits,
                                                                          const at::Tensor& key_logits,
                                                                          const MacchiatoAttentionOptions& options) {
  auto [out, state] = Macchiato(query, key, values, query_logits, key_logits, options.log_decay, OptionsOf(options));
  return {out, StateOf(state)};
}

std::tuple<at::Tensor, std::optional<MacchiatoState>> window_attention(const at::Tensor& query, const at::Tensor& key,
                                                                       const at::Tensor& values,
                                                                       const MacchiatoAttentionOptions& options) {
  auto [out, state] = Window(query, key, values, OptionsOf(options));
  return {out, StateOf(state)};
}

}  // namespace latte
