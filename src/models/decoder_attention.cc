#include "models/decoder_attention.h"

#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "nn/attention.h"

namespace latte::models {
namespace {

// Scores that are capped, c · tanh(score / c), are out of reach of torch's and latte's fused attention: they are formed, a block
// of queries at a time. query [B, T, H, D], key and value [B, P + T, Hkv, D]; window 0 reads everything.
at::Tensor capped_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale, double cap,
                            int64_t window) {
  constexpr int64_t kBlock = 512;
  const int64_t time = query.size(1), past = key.size(1) - time, group = query.size(2) / key.size(2);
  const auto keys = key.permute({0, 2, 3, 1}).repeat_interleave(group, 1);      // [B, H, D, P + T]
  const auto values = value.permute({0, 2, 1, 3}).repeat_interleave(group, 1);  // [B, H, P + T, D]
  std::vector<at::Tensor> blocks;
  for (int64_t begin = 0; begin < time; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, time);
    const int64_t first = window > 0 ? std::max<int64_t>(0, past + begin - window + 1) : 0;
    const auto at = nn::positions_from(past + begin, end - begin, query.device()).unsqueeze(1);
    const auto from = nn::positions_from(first, past + end - first, query.device());
    auto hidden = from > at;
    if (window > 0) hidden = hidden.logical_or(from <= at - window);
    auto scores = torch::matmul(query.slice(1, begin, end).transpose(1, 2) * scale, keys.slice(3, first, past + end));
    scores = (scores / cap).tanh() * cap;
    const auto probabilities = scores.masked_fill(hidden, -std::numeric_limits<double>::infinity()).softmax(-1);
    blocks.push_back(torch::matmul(probabilities, values.slice(2, first, past + end)).transpose(1, 2));
  }
  return torch::cat(blocks, 1);
}

struct Rotated {
  at::Tensor query, key, value;
};

Rotated rotated_heads(const at::Tensor& x, const AttentionWeights& weights, const Rope& rope, int64_t head_dim,
                      int64_t position) {
  const auto heads = weights.project(x, head_dim);
  const auto positions = nn::positions_from(position, x.size(1), x.device());
  return {rope.rotate(heads.query, positions), rope.rotate(heads.key, positions), heads.value};
}

// A window's state that holds `past` tokens and has room for `time` more.
MacchiatoState window_of(const Rotated& heads, int64_t past) {
  const int64_t batch = heads.query.size(0), time = heads.key.size(1) - past;
  const auto rows = [&](const at::Tensor& x) {
    return torch::cat({torch::zeros({batch, time, x.size(2), x.size(3)}, x.options()), x.slice(1, 0, past)}, 1);
  };
  const auto none = [&](const at::Tensor& x) { return torch::empty({batch, 0, x.size(2), x.size(3)}, x.options()); };
  MacchiatoState state;
  state.keys = rows(heads.key);
  state.values = rows(heads.value);
  state.mask = (nn::positions_from(0, time + past, heads.key.device()) >= time).expand({batch, -1}).contiguous();
  state.sink_keys = none(heads.key);
  state.sink_values = none(heads.value);
  state.sink_mask = torch::empty({batch, 0}, heads.key.options().dtype(torch::kBool));
  state.position = torch::full({batch}, past, heads.key.options().dtype(torch::kLong));
  return state;
}

bool has_tiles() {
  static const bool has = at::cpu::init_amx();  // asks the system for them, as torch's own operators do
  return has;
}

// Whether the window operator, with a window that holds everything, is the faster one: on a thread it takes half the time of
// torch's, forward and backward, but twice where that one multiplies bfloat16 in AMX's tiles; and it has a thread for each
// key-value head at most, where torch's has one for every few queries.
bool window_is_faster(const Rotated& heads, int64_t past) {
  const at::Tensor& query = heads.query;
  if (!query.is_cpu() || query.scalar_type() == torch::kFloat64) return false;
  if (past == 0 && query.scalar_type() == torch::kBFloat16 && has_tiles()) return false;
  return 2 * heads.key.size(0) * heads.key.size(2) >= at::get_num_threads();
}

// Keys and values begin with what was read before; single tokens are torch's.
at::Tensor full_attention(const Rotated& heads, const formats::DecoderConfig& config) {
  const int64_t time = heads.query.size(1), past = heads.key.size(1) - time;
  if (time > 1 && window_is_faster(heads, past)) {
    latte::MacchiatoAttentionOptions all;
    all.window = past + time;
    all.scale = config.attention_scale;
    if (past > 0) all.initial_state = window_of(heads, past);
    return std::get<0>(window_attention(heads.query, heads.key.slice(1, past), heads.value.slice(1, past), all));
  }
  // One new token reads everything; a first stretch is what is_causal means to torch; a later one needs its mask spelled out.
  OptionalTensor mask;
  if (past > 0 && time > 1) mask = torch::ones({time, past + time}, heads.query.options().dtype(torch::kBool)).tril(past);
  return at::scaled_dot_product_attention(heads.query.transpose(1, 2), heads.key.transpose(1, 2), heads.value.transpose(1, 2),
                                          mask, /*dropout_p=*/0.0, /*is_causal=*/past == 0 && time > 1, config.attention_scale,
                                          /*enable_gqa=*/config.num_kv_heads != config.num_heads)
      .transpose(1, 2);
}

}  // namespace

RmsNormImpl::RmsNormImpl(int64_t dim, double eps) : eps_(eps) { weight = register_parameter("weight", torch::ones({dim})); }

AttentionWeights::Heads AttentionWeights::project(const at::Tensor& x, int64_t head_dim) const {
  const auto split = [&](const torch::nn::Linear& linear) {
    auto linear_copy = linear;  // forward() isn't const
    return linear_copy(x).unflatten(-1, {-1, head_dim});
  };
  Heads heads{split(query), split(key), split(value)};
  if (query_norm) heads.query = query_norm->forward(heads.query);
  if (key_norm) heads.key = key_norm->forward(heads.key);
  return heads;
}

FullAttentionImpl::FullAttentionImpl(const formats::DecoderConfig& config, std::shared_ptr<const Rope> rope)
    : config_(config), rope_(std::move(rope)) {}

DecoderAttentionResult FullAttentionImpl::forward(const at::Tensor& x, const AttentionWeights& weights,
                                                  const DecoderAttentionOptions& options) {
  const int64_t time = x.size(1);
  auto heads = rotated_heads(x, weights, *rope_, config_.head_dim, options.position());
  if (options.state) {
    TORCH_CHECK_VALUE(options.state->keys.defined() && options.state->values.defined(),
                      "FullAttention: the state comes from attention of another kind");
    heads.key = torch::cat({options.state->keys, heads.key}, 1);
    heads.value = torch::cat({options.state->values, heads.value}, 1);
  }
  at::Tensor out;
  if (config_.attention_softcap > 0) {
    out = capped_attention(heads.query, heads.key, heads.value, config_.attention_scale, config_.attention_softcap, 0);
  } else {
    out = full_attention(heads, config_);
  }
  auto output = weights.output;
  DecoderAttentionResult result;
  result.out = output(out.flatten(2));
  if (options.output_state) {
    result.state.emplace();
    result.state->keys = heads.key;
    result.state->values = heads.value;
    result.state->position = options.position() + time;
  }
  return result;
}

LocalAttentionImpl::LocalAttentionImpl(const formats::DecoderConfig& config, std::shared_ptr<const Rope> rope)
    : config_(config), rope_(std::move(rope)) {}

DecoderAttentionResult LocalAttentionImpl::forward(const at::Tensor& x, const AttentionWeights& weights,
                                                   const DecoderAttentionOptions& options) {
  const int64_t time = x.size(1);
  auto heads = rotated_heads(x, weights, *rope_, config_.head_dim, options.position());
  DecoderAttentionResult result;
  if (options.output_state) result.state.emplace().position = options.position() + time;
  at::Tensor out;
  if (config_.attention_softcap > 0) {
    if (options.state) {
      TORCH_CHECK_VALUE(options.state->keys.defined(), "LocalAttention: the state comes from attention of another kind");
      heads.key = torch::cat({options.state->keys, heads.key}, 1);
      heads.value = torch::cat({options.state->values, heads.value}, 1);
    }
    out =
        capped_attention(heads.query, heads.key, heads.value, config_.attention_scale, config_.attention_softcap, config_.window);
    if (options.output_state) {
      result.state->keys = heads.key.slice(1, -config_.window);
      result.state->values = heads.value.slice(1, -config_.window);
    }
  } else {
    latte::MacchiatoAttentionOptions window;
    window.window = config_.window;
    window.scale = config_.attention_scale;
    window.output_final_state = options.output_state;
    if (options.state) {
      TORCH_CHECK_VALUE(options.state->macchiato.has_value(), "LocalAttention: the state comes from attention of another kind");
      window.initial_state = options.state->macchiato;
    }
    std::optional<MacchiatoState> after;
    std::tie(out, after) = window_attention(heads.query, heads.key, heads.value, window);
    if (options.output_state) result.state->macchiato = std::move(after);
  }
  auto output = weights.output;
  result.out = output(out.flatten(2));
  return result;
}

}  // namespace latte::models
