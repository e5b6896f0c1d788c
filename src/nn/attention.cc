#include "nn/attention.h"

#include <cmath>
#include <limits>
#include <utility>

#include "nn/attention_weights.h"
#include "nn/key_padding.h"
#include "nn/module_utils.h"

namespace latte::nn {
namespace {

// Forgetting starts slow: sigmoid(0)^(1/16) is a half-life of 16 tokens, and training moves it from there (gated linear
// attention's temperature).
constexpr double kDecayTemperature = 16.0;
constexpr double kDecayBias = 3.0;

// [..., 1]: where every logit is -inf, so that no part of the mixture is read.
at::Tensor all_closed(const at::Tensor& query_logits) { return query_logits.isneginf().all(-1, /*keepdim=*/true); }

// log p(l|t) in float64, -inf where all logits are.
at::Tensor log_shares_of(const at::Tensor& query_logits) {
  const auto closed = all_closed(query_logits);
  return query_logits.to(torch::kFloat64)
      .masked_fill(closed, 0)
      .log_softmax(-1)
      .masked_fill(closed, -std::numeric_limits<double>::infinity());
}

}  // namespace

AttentionImpl::AttentionImpl(std::string name, int64_t embed_dim, bool batch_first)
    : class_name_(std::move(name)), embed_dim_(embed_dim), batch_first_(batch_first) {}

AttentionResult AttentionImpl::forward(const at::Tensor& x, const AttentionForwardOptions& given) {
  TORCH_CHECK_VALUE((x.dim() == 2 || x.dim() == 3) && x.size(-1) == embed_dim_, class_name_, ": expected an input [",
                    batch_first_ ? "batch, time" : "time, batch", ", ", embed_dim_, "] or [time, ", embed_dim_, "], got ",
                    x.sizes());
  auto options = given;
  options.output_state = given.output_state || given.state;
  check_causal(class_name_, options.is_causal, options.output_state, "a state");
  check_causal(class_name_, options.is_causal, options.peers != nullptr, "a sequence that ranks share");
  TORCH_CHECK_VALUE(!options.peers || !(options.output_state || options.need_weights || options.key_padding_mask), class_name_,
                    ": a sequence that ranks share takes and gives no state, weights or padding");
  TORCH_CHECK_VALUE(!(options.need_weights && options.state), class_name_,
                    ": need_weights shows a whole sequence's probabilities, so it can't continue from a state");
  const bool batched = x.dim() == 3;
  const auto rows = !batched ? x.unsqueeze(0) : batch_first_ ? x : x.transpose(0, 1);

  OptionalTensor key_mask;
  if (options.key_padding_mask) {
    auto& padding = *options.key_padding_mask;
    const auto expected = batched ? std::vector<int64_t>{rows.size(0), rows.size(1)} : std::vector<int64_t>{rows.size(1)};
    TORCH_CHECK_TYPE(padding.scalar_type() == torch::kBool || padding.is_floating_point(), class_name_,
                     ": expected a bool (true = padding) or floating key_padding_mask, got ", padding.scalar_type());
    TORCH_CHECK_VALUE(padding.sizes() == expected, class_name_, ": expected a key_padding_mask ", expected, ", got ",
                      padding.sizes());
    if (!batched) padding = padding.unsqueeze(0);
    key_mask = real_tokens(padding);
    TORCH_CHECK_VALUE(
        takes_key_bias() || !key_bias_of(padding), class_name_,
        ": key_padding_mask has floats that this attention doesn't add: expected a bool one, or 0 and -inf without gradients");
  }

  auto result = attend(rows, key_mask, options);
  result.out = !batched ? result.out.squeeze(0) : batch_first_ ? result.out : result.out.transpose(0, 1);
  if (options.need_weights) {
    if (options.average_attn_weights) result.weights = result.weights.mean(1);
    result.weights = result.weights.to(result.out.scalar_type());
    if (!batched) result.weights = result.weights.squeeze(0);
  }
  return result;
}

void AttentionImpl::register_mixer(LatentPosition position, int64_t conv_width, bool bias) {
  if (position == LatentPosition::kConv) {
    check_size(class_name_, "conv_width", conv_width, 1);
    conv = register_module("conv", CausalConv1d(embed_dim_, conv_width));
  }
  if (position == LatentPosition::kRgLru) rg_lru = register_module("rg_lru", RgLru(embed_dim_, bias));
}

void AttentionImpl::reset_mixer() {
  if (conv) conv->reset_parameters();
  if (rg_lru) rg_lru->reset_parameters();
}

at::Tensor AttentionImpl::mix(const at::Tensor& x, const OptionalTensor& key_mask, const AttentionForwardOptions& options,
                              AttentionState& next) {
  if (conv) {
    if (options.state) check_state(class_name_, options.state->conv.defined());
    auto state = options.state ? OptionalTensor(options.state->conv) : std::nullopt;
    if (options.peers && conv->weight.size(1) > 1) {
      state = rows_before(*options.peers, x, conv->weight.size(1) - 1).to(conv->weight.scalar_type());
    }
    const auto [out, after] = conv->forward(x, key_mask, state, options.output_state);
    if (after) next.conv = *after;
    return out;
  }
  if (rg_lru) {
    if (options.state) check_state(class_name_, options.state->rg_lru.defined());
    const auto state = options.state ? OptionalTensor(options.state->rg_lru) : std::nullopt;
    const auto [out, after] = rg_lru->forward(x, key_mask, state, options.output_state, options.peers);
    if (after) next.rg_lru = *after;
    return out;
  }
  return x;
}

LatentPosition parse_latent_position(std::string_view name) {
  for (const auto position : {LatentPosition::kNone, LatentPosition::kVapor, LatentPosition::kConv, LatentPosition::kRgLru}) {
    if (name == to_string(position)) return position;
  }
  TORCH_CHECK_VALUE(false, "position must be none, vapor, conv or rg_lru, got ", name);
}

std::string to_string(LatentPosition position) {
  switch (position) {
    case LatentPosition::kVapor:
      return "vapor";
    case LatentPosition::kConv:
      return "conv";
    case LatentPosition::kRgLru:
      return "rg_lru";
    case LatentPosition::kNone:
      break;
  }
  return "none";
}

LatentAttentionImpl::LatentAttentionImpl(const std::string& name, const LatteAttentionOptions& options, int64_t gates)
    : AttentionImpl(name, options.embed_dim, options.batch_first), latte_(options) {
  num_kv_heads_ = options.num_kv_heads.value_or(options.num_heads);
  check_heads(name, options.embed_dim, options.num_heads, num_kv_heads_);
  head_dim_ = options.embed_dim / options.num_heads;
  num_latents_ = options.num_latents.value_or(head_dim_);
  check_size(name, "num_latents", num_latents_, 1);
  check_dropout(name, options.dropout);
  if (options.position == LatentPosition::kVapor) check_rotation(name, "position vapor", head_dim_, kVaporBase);

  const int64_t dim = options.embed_dim;
  query_logits_proj =
      register_module("query_logits_proj", make_linear(dim, options.num_heads * (num_latents_ + gates), options.bias));
  key_logits_proj = register_module("key_logits_proj", make_linear(dim, num_kv_heads_ * num_latents_, options.bias));
  value_proj = register_module("value_proj", make_linear(dim, num_kv_heads_ * head_dim_, options.bias));
  out_proj = register_module("out_proj", make_linear(dim, dim, options.bias));
  if (options.forget) register_decay();
  register_mixer(options.position, options.conv_width, options.bias);
}

void LatentAttentionImpl::register_decay() {
  const int64_t dim = latte_.embed_dim, rank = latte_.decay_rank, decays = num_kv_heads_ * num_latents_;
  check_size(class_name_, "decay_rank", rank, 0);
  if (rank == 0) {
    decay_proj = register_module("decay_proj", make_linear(dim, decays, latte_.bias));
  } else {
    decay_down = register_module("decay_down", make_linear(dim, rank, false));
    decay_up = register_module("decay_up", make_linear(rank, decays, true));
  }
}

at::Tensor LatentAttentionImpl::log_decay(const at::Tensor& x) {
  const auto logits = decay_proj ? decay_proj(x) : decay_up(decay_down(x));
  return (torch::log_sigmoid(logits) / kDecayTemperature).view({x.size(0), x.size(1), num_kv_heads_, num_latents_});
}

void LatentAttentionImpl::reset_parameters() {
  for (const auto& child : children()) {
    if (auto* projection = child->as<torch::nn::Linear>()) reset_linear(*projection);
  }
  reset_decay();
  reset_mixer();
}

void LatentAttentionImpl::reset_decay() {
  if (!decay_up) return;
  const torch::NoGradGuard no_grad;
  decay_up->weight.normal_(0.0, 1.0 / std::sqrt(static_cast<double>(latte_.decay_rank)));
  auto biases = decay_up->bias.view({num_kv_heads_, num_latents_});
  if (num_latents_ == 1) {
    biases.zero_();
  } else {
    biases.copy_(torch::linspace(-kDecayBias, kDecayBias, num_latents_, biases.options()));
  }
}

LatentAttentionImpl::Latents LatentAttentionImpl::project(const at::Tensor& x, const OptionalTensor& key_mask,
                                                          const AttentionForwardOptions& options, AttentionState& next) {
  check_causal(class_name_, options.is_causal, latte_.forget, "forgetting");
  const int64_t batch = x.size(0), time = x.size(1);
  const int64_t begin = options.state ? options.state->position : options.peers ? options.peers->rank() * time : 0;
  next.position = begin + time;

  const auto mixed = mix(x, key_mask, options, next);
  Latents latents;
  latents.query_logits = query_logits_proj(mixed).unflatten(-1, {latte_.num_heads, -1});
  latents.key_bias = key_bias_of(options.key_padding_mask);
  latents.key_logits = bias_key_logits(key_logits_proj(mixed).view({batch, time, num_kv_heads_, num_latents_}), latents.key_bias);
  latents.values = value_proj(x).view({batch, time, num_kv_heads_, head_dim_});
  if (latte_.forget) latents.log_decay = log_decay(x);
  latents.positions = positions_from(begin, time, x.device());
  return latents;
}

at::Tensor LatentAttentionImpl::finish(const at::Tensor& heads_out) {
  return out_proj(torch::dropout(heads_out.flatten(2), latte_.dropout, is_training()));
}

LatteAttentionImpl::LatteAttentionImpl(const LatteAttentionOptions& options) : LatentAttentionImpl("LatteAttention", options, 0) {
  reset_parameters();
}

AttentionResult LatteAttentionImpl::attend(const at::Tensor& x, const OptionalTensor& key_mask,
                                           const AttentionForwardOptions& options) {
  AttentionState next;
  const auto latents = project(x, key_mask, options, next);
  const bool vapor = latte_.position == LatentPosition::kVapor;
  const auto values = vapor ? latte::vapor(latents.values, latents.positions, kVaporBase) : latents.values;

  at::Tensor heads_out;
  OptionalTensor before;
  if (options.state) {
    check_state(class_name_, options.state->latents.defined());
    before = options.state->latents;
  } else if (options.peers) {
    before = state_before(*options.peers, stretch_state(latents.key_logits, values, latents.log_decay));
  }
  if (options.is_causal) {
    OptionalTensor after;
    std::tie(heads_out, after) = causal_attention(latents.query_logits, latents.key_logits, values,
                                                  {.log_decay = latents.log_decay,
                                                   .key_mask = key_mask,
                                                   .initial_state = before,
                                                   .output_final_state = options.output_state,
                                                   .cu_seqlens = {}});
    if (after) next.latents = *after;
  } else {
    heads_out =
        bidirectional_attention(latents.query_logits, latents.key_logits, values, {.key_mask = key_mask, .cu_seqlens = {}});
  }
  if (vapor) heads_out = latte::vapor(heads_out, latents.positions, kVaporBase, /*inverse=*/true);

  AttentionResult result;
  result.out = finish(heads_out);
  if (options.need_weights) {
    result.weights =
        latent_attention_weights(log_shares_of(latents.query_logits), latents.key_logits,
                                 {.log_decay = latents.log_decay, .key_mask = key_mask, .causal = options.is_causal});
  }
  if (options.output_state) result.state = std::move(next);
  return result;
}

MacchiatoAttentionImpl::MacchiatoAttentionImpl(const MacchiatoAttentionOptions& options)
    : LatentAttentionImpl("MacchiatoAttention", options, 1), macchiato_(options) {
  check_size(class_name_, "window", options.window, 1);
  check_size(class_name_, "sinks", options.sinks, 0);
  if (options.rope) check_rotation(class_name_, "rope", head_dim_, options.rope_base);
  query_proj = register_module("query_proj", make_linear(options.embed_dim, options.embed_dim, options.bias));
  key_proj = register_module("key_proj", make_linear(options.embed_dim, num_kv_heads_ * head_dim_, options.bias));
  reset_parameters();
}

AttentionResult MacchiatoAttentionImpl::attend(const at::Tensor& x, const OptionalTensor& key_mask,
                                               const AttentionForwardOptions& options) {
  check_causal(class_name_, options.is_causal, macchiato_.sinks > 0, "a sink");
  AttentionState next;
  const auto latents = project(x, key_mask, options, next);
  RotatedWindow window{query_proj(x).view({x.size(0), x.size(1), latte_.num_heads, head_dim_}),
                       key_proj(x).view({x.size(0), x.size(1), num_kv_heads_, head_dim_}),
                       {}};
  if (macchiato_.rope) {
    window =
        rotate_window(window.query, window.key, latents.positions, macchiato_.rope_base, macchiato_.window, macchiato_.sinks);
  }

  at::Tensor window_weights;
  if (options.need_weights) {
    window_weights = window_attention_weights(window.query, window.key,
                                              {.window = macchiato_.window,
                                               .sinks = macchiato_.sinks,
                                               .sink_query = window.sink_query,
                                               .key_mask = key_mask,
                                               .key_bias = latents.key_bias,
                                               .causal = options.is_causal});
  }
  latte::MacchiatoAttentionOptions attention;
  attention.scale = 1.0 / std::sqrt(static_cast<double>(head_dim_));
  std::optional<MacchiatoState> before;
  if (options.state) {
    check_state(class_name_, options.state->macchiato.has_value());
    before = options.state->macchiato;
  }
  if (latents.key_bias || (before && before->keys.size(-1) == head_dim_ + 1)) {
    bias_window(window.query, window.key, window.sink_query, latents.key_bias, *attention.scale);
    if (before) before = widen_keys(*before, head_dim_);
  }
  attention.window = macchiato_.window;
  attention.sinks = macchiato_.sinks;
  attention.sink_query = window.sink_query;
  attention.causal = options.is_causal;
  attention.log_decay = latents.log_decay;
  attention.key_mask = key_mask;
  if (before) {
    attention.initial_state = before;
  } else if (options.peers) {
    const bool vapor = latte_.position == LatentPosition::kVapor;
    const auto values = vapor ? latte::vapor(latents.values, latents.positions, kVaporBase) : latents.values;
    const auto sums = state_before(*options.peers, stretch_state(latents.key_logits, values, latents.log_decay));
    attention.initial_state =
        window_before(*options.peers, window.key, latents.values, sums, macchiato_.window, macchiato_.sinks);
  }
  attention.output_final_state = options.output_state;

  at::Tensor heads_out;
  if (latte_.position == LatentPosition::kVapor) {
    std::tie(heads_out, next.macchiato) = attend_vapor(latents, window, attention);
  } else {
    std::tie(heads_out, next.macchiato) =
        macchiato_attention(window.query, window.key, latents.values, latents.query_logits, latents.key_logits, attention);
  }

  AttentionResult result;
  result.out = finish(heads_out);
  if (options.need_weights) {
    const auto log_shares = log_shares_of(latents.query_logits);
    const auto window_share = log_shares.select(-1, 0).exp().transpose(1, 2).unsqueeze(-1);  // [B, H, T, 1]
    result.weights =
        window_share * window_weights +
        latent_attention_weights(log_shares.slice(-1, 1), latents.key_logits,
                                 {.log_decay = latents.log_decay, .key_mask = key_mask, .causal = options.is_causal});
  }
  if (options.output_state) result.state = std::move(next);
  return result;
}

std::tuple<at::Tensor, std::optional<MacchiatoState>> MacchiatoAttentionImpl::attend_vapor(
    const Latents& latents, const RotatedWindow& window, const latte::MacchiatoAttentionOptions& options) {
  // The window reads the values as they are and the latents read them rotated, which macchiato_attention has no argument for. The
  // mixture is the same in two halves: window_share * window + (1 - window_share) * latents.
  auto window_options = options;
  OptionalTensor initial_latents;
  if (options.initial_state) {
    initial_latents = options.initial_state->latents;
    window_options.initial_state->latents = initial_latents->slice(2, 0, 0);
  }
  auto [window_out, after] = window_attention(window.query, window.key, latents.values, window_options);

  const auto query_logits = latents.query_logits.slice(-1, 1);
  const auto values = latte::vapor(latents.values, latents.positions, kVaporBase);
  at::Tensor latents_out;
  if (options.causal) {
    OptionalTensor after_latents;
    std::tie(latents_out, after_latents) = causal_attention(query_logits, latents.key_logits, values,
                                                            {.log_decay = options.log_decay,
                                                             .key_mask = options.key_mask,
                                                             .initial_state = initial_latents,
                                                             .output_final_state = options.output_final_state,
                                                             .cu_seqlens = {}});
    if (after) after->latents = *after_latents;
  } else {
    latents_out =
        bidirectional_attention(query_logits, latents.key_logits, values, {.key_mask = options.key_mask, .cu_seqlens = {}});
  }
  latents_out = latte::vapor(latents_out, latents.positions, kVaporBase, /*inverse=*/true);

  // p(0|t) = sigmoid(gate), which is exact at both ends; where logits are all -inf nothing is read, and gradients stay finite.
  const auto wide = latents.query_logits.to(latents_out.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32);
  const auto of_window = wide.slice(-1, 0, 1), of_latents = wide.slice(-1, 1);
  const auto no_window = of_window.isneginf(), no_latents = all_closed(of_latents);
  const auto gate = of_window.masked_fill(no_window, 0) -
                    of_latents.masked_fill(no_latents, 0).logsumexp(-1, /*keepdim=*/true);  // [B, T, H, 1]
  const auto heads_out = gate.sigmoid().masked_fill(no_latents, 1).masked_fill(no_window, 0) * window_out +
                         gate.neg().sigmoid().masked_fill(no_window, 1).masked_fill(no_latents, 0) * latents_out;
  return {heads_out.to(latents_out.scalar_type()), after};
}

at::Tensor positions_from(int64_t begin, int64_t count, const at::Device& device) {
  return torch::arange(begin, begin + count, torch::TensorOptions(torch::kInt64).device(device));
}

RotatedWindow rotate_window(const at::Tensor& query, const at::Tensor& key, const at::Tensor& positions, double base,
                            int64_t window, int64_t sinks) {
  RotatedWindow rotated{latte::vapor(query, positions, base), latte::vapor(key, positions, base), {}};
  if (sinks > 0) rotated.sink_query = latte::vapor(query, positions.clamp_max(window + sinks - 1), base);
  return rotated;
}

}  // namespace latte::nn
