#include "nn/linear_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "nn/module_utils.h"
#include "ops/ops.h"

namespace latte::nn {
namespace {

constexpr int64_t kChunk = 32;            // tokens: exponents inside stay below 16 · kFastestDecay
constexpr double kFastestDecay = 5.0;     // of a token, in nats
constexpr int64_t kDecayRank = 16;        // as published
constexpr double kDecayTemperature = 16;  // as published
constexpr double kNormEps = 1e-5;

// A sum over positions needs more bits than bfloat16 has.
at::Tensor wide(const at::Tensor& x) { return x.scalar_type() == torch::kFloat64 ? x : x.to(torch::kFloat32); }

// [B, T, n · D] -> [B, H, T, D], a key-value head for each query head.
at::Tensor heads_of(const at::Tensor& x, int64_t heads, int64_t repeat) {
  auto split = x.unflatten(-1, {heads, -1}).transpose(1, 2);
  return repeat == 1 ? split : split.repeat_interleave(repeat, 1);
}

// [B, T, n · D], each head's D turned by its position.
at::Tensor rotated(const at::Tensor& x, int64_t heads, const at::Tensor& positions, bool inverse) {
  return latte::vapor(x.unflatten(-1, {heads, -1}), positions, kVaporBase, inverse).flatten(2);
}

}  // namespace

at::Tensor decayed_linear_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& values,
                                    const at::Tensor& log_decay, at::Tensor& state) {
  const int64_t time = query.size(2);
  if (!state.defined()) state = torch::zeros({query.size(0), query.size(1), query.size(3), values.size(3)}, values.options());
  std::vector<at::Tensor> outs;
  if (time == 0) return torch::zeros({query.size(0), query.size(1), 0, values.size(3)}, values.options());
  for (int64_t begin = 0; begin < time; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, time);
    const auto q = query.slice(2, begin, end), k = key.slice(2, begin, end), v = values.slice(2, begin, end);
    if (!log_decay.defined()) {
      outs.push_back(at::matmul(at::matmul(q, k.transpose(2, 3)).tril(), v) + at::matmul(q, state));
      state = state + at::matmul(k.transpose(2, 3), v);
      continue;
    }
    const auto decay = log_decay.slice(2, begin, end).cumsum(2);  // since the chunk began, this token's included
    const auto total = decay.slice(2, -1);
    const auto middle = total / 2;  // halves the largest exponent
    const auto scores = at::matmul(q * (decay - middle).exp(), (k * (middle - decay).exp()).transpose(2, 3)).tril();
    outs.push_back(at::matmul(scores, v) + at::matmul(q * decay.exp(), state));
    state = total.transpose(2, 3).exp() * state + at::matmul((k * (total - decay).exp()).transpose(2, 3), v);
  }
  return torch::cat(outs, 2);
}

at::Tensor bidirectional_linear_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& values,
                                          const at::Tensor& log_decay) {
  at::Tensor past, future;
  const auto out = decayed_linear_attention(query, key, values, log_decay, past);
  const auto reversed = decayed_linear_attention(query.flip(2), key.flip(2), values.flip(2), log_decay.flip(2), future).flip(2);
  return out + reversed - (query * key).sum(-1, /*keepdim=*/true) * values;  // both have read the token itself
}

LinearAttentionImpl::LinearAttentionImpl(const LinearAttentionOptions& options)
    : AttentionImpl("LinearAttention", options.embed_dim, options.batch_first), options_(options) {
  num_kv_heads_ = options.num_kv_heads.value_or(options.num_heads);
  check_heads(class_name_, options.embed_dim, options.num_heads, num_kv_heads_);
  check_dropout(class_name_, options.dropout);
  head_dim_ = options.embed_dim / options.num_heads;
  if (options.position == LatentPosition::kVapor) check_rotation(class_name_, "position vapor", head_dim_, kVaporBase);
  const int64_t dim = options.embed_dim, kv_dim = num_kv_heads_ * head_dim_;
  query_proj = register_module("query_proj", make_linear(dim, dim, options.bias));
  key_proj = register_module("key_proj", make_linear(dim, kv_dim, options.bias));
  value_proj = register_module("value_proj", make_linear(dim, kv_dim, options.bias));
  out_proj = register_module("out_proj", make_linear(dim, dim, options.bias));
  if (options.kind == LinearKind::kGated) {
    decay_down = register_module("decay_down", make_linear(dim, kDecayRank, false));
    decay_up = register_module("decay_up", make_linear(kDecayRank, kv_dim, true));
    gate_proj = register_module("gate_proj", make_linear(dim, dim, options.bias));
    norm_weight = register_parameter("norm_weight", torch::ones({head_dim_}));
  }
  register_mixer(options.position, options.conv_width, options.bias);
  reset_parameters();
}

void LinearAttentionImpl::reset_parameters() {
  for (auto linear : {query_proj, key_proj, value_proj, out_proj, decay_down, decay_up, gate_proj}) {
    if (linear) reset_linear(*linear);
  }
  reset_mixer();
}

AttentionResult LinearAttentionImpl::attend(const at::Tensor& x, const OptionalTensor& key_mask,
                                            const AttentionForwardOptions& options) {
  const bool gated = options_.kind == LinearKind::kGated;
  TORCH_CHECK_VALUE(!options.need_weights, class_name_, ": need_weights isn't offered by linear attention");
  TORCH_CHECK_VALUE(!options.peers, class_name_, " can't share a sequence among ranks");
  AttentionState next;
  const int64_t begin = options.state ? options.state->position : 0;
  next.position = begin + x.size(1);
  const auto positions = positions_from(begin, x.size(1), x.device());
  const bool vapor = options_.position == LatentPosition::kVapor;
  const auto mixed = mix(x, key_mask, options, next);
  const auto projected_query = query_proj(mixed), projected_key = key_proj(mixed);
  auto projected_values = value_proj(x);
  if (vapor) projected_values = rotated(projected_values, num_kv_heads_, positions, /*inverse=*/false);
  const auto projected_decay = gated ? decay_up(decay_down(x)) : at::Tensor();
  const auto gate = gated ? torch::silu(gate_proj(x)) : at::Tensor();
  std::optional<c10::impl::ExcludeDispatchKeyGuard> no_autocast(at::autocast_dispatch_keyset);
  const int64_t repeat = options_.num_heads / num_kv_heads_;
  auto query = heads_of(wide(projected_query), options_.num_heads, 1);
  auto key = heads_of(wide(projected_key), num_kv_heads_, repeat);
  auto values = heads_of(wide(projected_values), num_kv_heads_, repeat);
  at::Tensor log_decay;
  if (gated) {
    query = query / std::sqrt(static_cast<double>(head_dim_));
    log_decay = heads_of((torch::log_sigmoid(wide(projected_decay)) / kDecayTemperature).clamp_min(-kFastestDecay), num_kv_heads_,
                         repeat);
  } else {
    query = 1 + torch::elu(query);
    key = 1 + torch::elu(key);
    // The normaliser is the sum that the values 1 give.
    values = torch::cat({values, torch::ones_like(values.slice(3, 0, 1))}, 3);
  }
  if (key_mask) {
    const auto padded = key_mask->logical_not().view({x.size(0), 1, x.size(1), 1});
    key = key.masked_fill(padded, 0);
    if (gated) log_decay = log_decay.masked_fill(padded, 0);
  }

  at::Tensor out;
  if (options.is_causal) {
    if (options.state) {
      check_state(class_name_, options.state->latents.defined());
      next.latents = options.state->latents;
    }
    out = decayed_linear_attention(query, key, values, log_decay, next.latents);
  } else if (gated) {
    out = bidirectional_linear_attention(query, key, values, log_decay);
  } else {
    out = at::matmul(query, at::matmul(key.transpose(2, 3), values));
  }
  if (!gated) {
    // A sequence of padding alone has nothing to read: 0, as in every attention here.
    const auto normaliser = out.slice(3, head_dim_);
    out = out.slice(3, 0, head_dim_) / normaliser.masked_fill(normaliser == 0, 1);
  }
  if (vapor) out = latte::vapor(out.transpose(1, 2), positions, kVaporBase, /*inverse=*/true).transpose(1, 2);
  if (gated) out = at::rms_norm(out, {head_dim_}, norm_weight.to(out.scalar_type()), kNormEps);
  out = out.transpose(1, 2).flatten(2).to(projected_values.scalar_type());
  if (gated) out = out * gate;
  no_autocast.reset();
  AttentionResult result;
  result.out = out_proj(torch::dropout(out, options_.dropout, is_training()));
  if (options.output_state) result.state = std::move(next);
  return result;
}

LinformerAttentionImpl::LinformerAttentionImpl(const LinformerAttentionOptions& options)
    : AttentionImpl("LinformerAttention", options.embed_dim, options.batch_first), options_(options) {
  check_heads(class_name_, options.embed_dim, options.num_heads, options.num_heads);
  check_size(class_name_, "max_positions", options.max_positions, 1);
  check_size(class_name_, "projected", options.projected, 1);
  check_dropout(class_name_, options.dropout);
  head_dim_ = options.embed_dim / options.num_heads;
  if (options.position == LatentPosition::kVapor) check_rotation(class_name_, "position vapor", head_dim_, kVaporBase);
  const int64_t dim = options.embed_dim;
  query_proj = register_module("query_proj", make_linear(dim, dim, options.bias));
  key_proj = register_module("key_proj", make_linear(dim, dim, options.bias));
  value_proj = register_module("value_proj", make_linear(dim, dim, options.bias));
  out_proj = register_module("out_proj", make_linear(dim, dim, options.bias));
  position_proj = register_parameter("position_proj", torch::empty({options.projected, options.max_positions}));
  register_mixer(options.position, options.conv_width, options.bias);
  reset_parameters();
}

void LinformerAttentionImpl::reset_parameters() {
  for (auto linear : {query_proj, key_proj, value_proj, out_proj}) reset_linear(*linear);
  reset_mixer();
  torch::NoGradGuard no_grad;
  torch::nn::init::xavier_uniform_(position_proj);
}

AttentionResult LinformerAttentionImpl::attend(const at::Tensor& x, const OptionalTensor& key_mask,
                                               const AttentionForwardOptions& options) {
  TORCH_CHECK_VALUE(!options.is_causal, class_name_, ": reads the whole sequence, so it can't be causal");
  TORCH_CHECK_VALUE(!options.need_weights, class_name_, ": need_weights isn't offered: there is no weight a position");
  const int64_t time = x.size(1);
  TORCH_CHECK_VALUE(time <= options_.max_positions, class_name_, ": ", time, " tokens, expected at most max_positions, ",
                    options_.max_positions);
  const auto positions = positions_from(0, time, x.device());
  const bool vapor = options_.position == LatentPosition::kVapor;
  AttentionState none;
  const auto mixed = mix(x, key_mask, options, none);
  auto key = key_proj(mixed), values = value_proj(x);
  if (vapor) values = rotated(values, options_.num_heads, positions, /*inverse=*/false);
  if (key_mask) {
    const auto padded = key_mask->logical_not().unsqueeze(-1);
    key = key.masked_fill(padded, 0);
    values = values.masked_fill(padded, 0);
  }
  const auto map = position_proj.slice(1, 0, time).to(key.scalar_type());
  const auto query = heads_of(query_proj(mixed), options_.num_heads, 1);
  auto out = at::scaled_dot_product_attention(query, heads_of(at::matmul(map, key), options_.num_heads, 1),
                                              heads_of(at::matmul(map, values), options_.num_heads, 1), {},
                                              is_training() ? options_.dropout : 0.0);
  out = out.transpose(1, 2).flatten(2);
  if (vapor) out = rotated(out, options_.num_heads, positions, /*inverse=*/true);
  AttentionResult result;
  result.out = out_proj(out);
  return result;
}

}  // namespace latte::nn
