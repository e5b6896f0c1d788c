#include "nn/softmax_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "nn/attention_weights.h"
#include "nn/module_utils.h"

namespace latte::nn {
namespace {

constexpr int64_t kQueries = 128;  // a block of bidirectional_window reads their windows together
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// [B, T, Hkv, D] -> [B, H, T, D], a key-value head for each query head.
at::Tensor per_query_head(const at::Tensor& x, int64_t heads) {
  return x.transpose(1, 2).repeat_interleave(heads / x.size(2), 1);
}

// [B or 1, 1, C, n], true where key s of [begin, end) is real and its distance |t - s| to a query t is below `window` (near), or
// not.
at::Tensor readable(const at::Tensor& queries, int64_t begin, int64_t end, int64_t window, bool near,
                    const OptionalTensor& key_mask) {
  const auto distance = (queries.unsqueeze(1) - torch::arange(begin, end, queries.options())).abs();
  const auto allowed = (near ? distance < window : distance >= window).view({1, 1, queries.size(0), end - begin});
  return key_mask ? allowed.logical_and(key_mask->slice(1, begin, end).unsqueeze(1).unsqueeze(1)) : allowed;
}

}  // namespace

at::Tensor bidirectional_window(const RotatedWindow& rotated, const at::Tensor& values, int64_t window, int64_t sinks,
                                const OptionalTensor& key_mask) {
  const int64_t time = rotated.query.size(1), heads = rotated.query.size(2), first = std::min(sinks, time);
  const auto query = rotated.query.transpose(1, 2);
  const auto sink_query = rotated.sink_query ? rotated.sink_query->transpose(1, 2) : query;
  const auto keys = per_query_head(rotated.key, heads), all_values = per_query_head(values, heads);
  const double scale = 1.0 / std::sqrt(static_cast<double>(query.size(3)));
  std::vector<at::Tensor> outs;
  for (int64_t begin = 0; begin < time; begin += kQueries) {
    const int64_t end = std::min(begin + kQueries, time);
    const int64_t from = std::max<int64_t>(0, begin - window + 1), to = std::min(time, end + window - 1);
    const auto queries = torch::arange(begin, end, torch::TensorOptions().device(query.device()).dtype(torch::kLong));
    const auto scores_of = [&](const at::Tensor& readers, int64_t low, int64_t high, bool near) {
      const auto scores = at::matmul(readers.slice(2, begin, end) * scale, keys.slice(2, low, high).transpose(2, 3));
      return scores.masked_fill(readable(queries, low, high, window, near, key_mask).logical_not(), kMinusInfinity);
    };
    const auto scores = at::cat({scores_of(sink_query, 0, first, false), scores_of(query, from, to, true)}, -1);
    const auto nothing = (scores == kMinusInfinity).all(-1, /*keepdim=*/true);  // a query with padding alone around it reads 0
    const auto weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0).to(values.scalar_type());
    outs.push_back(at::matmul(weights.slice(3, 0, first), all_values.slice(2, 0, first)) +
                   at::matmul(weights.slice(3, first), all_values.slice(2, from, to)));
  }
  return outs.empty() ? rotated.query : at::cat(outs, 2).transpose(1, 2);  // no token: as empty as its query
}

SoftmaxAttentionImpl::SoftmaxAttentionImpl(const SoftmaxAttentionOptions& options)
    : AttentionImpl("SoftmaxAttention", options.embed_dim, options.batch_first), options_(options) {
  num_kv_heads_ = options.num_kv_heads.value_or(options.num_heads);
  check_heads(class_name_, options.embed_dim, options.num_heads, num_kv_heads_);
  check_size(class_name_, "window", options.window, 0);
  check_size(class_name_, "sinks", options.sinks, 0);
  TORCH_CHECK_VALUE(options.window > 0 || options.sinks == 0, class_name_, ": sinks need a window, got ", options.sinks);
  check_dropout(class_name_, options.dropout);
  head_dim_ = options.embed_dim / options.num_heads;
  if (options.rope) check_rotation(class_name_, "rope", head_dim_, options.rope_base);
  if (options.position == LatentPosition::kVapor) check_rotation(class_name_, "position vapor", head_dim_, kVaporBase);

  const int64_t dim = options.embed_dim;
  query_proj = register_module("query_proj", make_linear(dim, dim, options.bias));
  key_proj = register_module("key_proj", make_linear(dim, num_kv_heads_ * head_dim_, options.bias));
  value_proj = register_module("value_proj", make_linear(dim, num_kv_heads_ * head_dim_, options.bias));
  out_proj = register_module("out_proj", make_linear(dim, dim, options.bias));
  register_mixer(options.position, options.conv_width, options.bias);
  reset_parameters();
}

void SoftmaxAttentionImpl::reset_parameters() {
  for (auto linear : {query_proj, key_proj, value_proj, out_proj}) reset_linear(*linear);
  reset_mixer();
}

AttentionResult SoftmaxAttentionImpl::attend(const at::Tensor& x, const OptionalTensor& key_mask,
                                             const AttentionForwardOptions& options) {
  const int64_t batch = x.size(0), time = x.size(1);
  TORCH_CHECK_VALUE(!options.peers || options_.window > 0, class_name_,
                    " without a window reads every earlier token: it can't share a sequence among ranks");
  const int64_t begin = options.state ? options.state->position : options.peers ? options.peers->rank() * time : 0;
  AttentionState next;
  next.position = begin + time;

  const auto mixed = mix(x, key_mask, options, next);
  RotatedWindow rotated{query_proj(mixed).view({batch, time, options_.num_heads, head_dim_}),
                        key_proj(mixed).view({batch, time, num_kv_heads_, head_dim_}),
                        {}};
  auto values = value_proj(x).view({batch, time, num_kv_heads_, head_dim_});
  const auto positions = positions_from(begin, time, x.device());
  if (options_.rope) {
    rotated = rotate_window(rotated.query, rotated.key, positions, options_.rope_base, options_.window, options_.sinks);
  }
  const bool vapor = options_.position == LatentPosition::kVapor;
  if (vapor) values = latte::vapor(values, positions, kVaporBase);

  at::Tensor heads_out;
  if (options_.sinks > 0 && !options.is_causal) {
    heads_out = bidirectional_window(rotated, values, options_.window, options_.sinks, key_mask);
    heads_out = torch::dropout(heads_out, options_.dropout, is_training());
  } else if (options_.window > 0) {
    latte::MacchiatoAttentionOptions window;
    window.window = options_.window;
    window.sinks = options_.sinks;
    window.sink_query = rotated.sink_query;
    window.causal = options.is_causal;
    window.key_mask = key_mask;
    if (options.state) {
      check_state(class_name_, options.state->macchiato.has_value());
      window.initial_state = options.state->macchiato;
    } else if (options.peers) {
      const auto no_latents = torch::empty({batch, num_kv_heads_, 0, head_dim_ + 3}, values.options().dtype(torch::kFloat32));
      window.initial_state = window_before(*options.peers, rotated.key, values, no_latents, options_.window, options_.sinks);
    }
    window.output_final_state = options.output_state;
    std::tie(heads_out, next.macchiato) = window_attention(rotated.query, rotated.key, values, window);
    heads_out = torch::dropout(heads_out, options_.dropout, is_training());
  } else {
    heads_out = attend_all(rotated.query, rotated.key, values, key_mask, options, next);
  }
  if (vapor) heads_out = latte::vapor(heads_out, positions, kVaporBase, /*inverse=*/true);

  AttentionResult result;
  result.out = out_proj(heads_out.flatten(2));
  if (options.need_weights) {
    result.weights = window_attention_weights(rotated.query, rotated.key,
                                              {.window = options_.window,
                                               .sinks = options_.sinks,
                                               .sink_query = rotated.sink_query,
                                               .key_mask = key_mask,
                                               .causal = options.is_causal});
  }
  if (options.output_state) result.state = std::move(next);
  return result;
}

at::Tensor SoftmaxAttentionImpl::attend_all(const at::Tensor& query, at::Tensor key, at::Tensor values, OptionalTensor key_mask,
                                            const AttentionForwardOptions& options, AttentionState& next) {
  const int64_t batch = query.size(0), time = query.size(1);
  if (options.state) {
    const auto& past = *options.state;
    check_state(class_name_, past.keys.defined() && past.values.defined());
    if (key_mask || past.mask.defined()) {
      const auto real = torch::ones({1, 1}, query.options().dtype(torch::kBool));
      key_mask = torch::cat({past.mask.defined() ? past.mask : real.expand({batch, past.keys.size(1)}),
                             key_mask ? *key_mask : real.expand({batch, time})},
                            1);
    }
    key = torch::cat({past.keys, key}, 1);
    values = torch::cat({past.values, values}, 1);
  }
  if (options.output_state) {
    next.keys = key;
    next.values = values;
    if (key_mask) next.mask = *key_mask;
  }

  // One new token reads everything; a first stretch is what is_causal means to torch; a later one needs its mask spelled out.
  const int64_t past = key.size(1) - time;
  const bool plain = !key_mask && (past == 0 || time == 1 || !options.is_causal);
  OptionalTensor mask;
  if (!plain) {
    auto allowed = torch::ones({time, past + time}, query.options().dtype(torch::kBool));
    if (options.is_causal) allowed = allowed.tril(past);
    mask = key_mask ? allowed.logical_and(key_mask->unsqueeze(1).unsqueeze(1)) : allowed;
  }
  const auto out = at::scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), values.transpose(1, 2), mask,
                                                    is_training() ? options_.dropout : 0.0,
                                                    /*is_causal=*/plain && options.is_causal && past == 0, /*scale=*/std::nullopt,
                                                    /*enable_gqa=*/num_kv_heads_ != options_.num_heads);
  return out.transpose(1, 2);
}

}  // namespace latte::nn
