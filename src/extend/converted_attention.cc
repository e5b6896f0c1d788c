#include "extend/converted_attention.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "nn/attention.h"
#include "ops/core.h"

namespace latte::extend {
namespace {

constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();
// In DecoderAttentionState::more: of the window's tokens, which the latents haven't read yet; [B, W, Hkv, L] and [B, W, Hkv, D],
// with a floor D + 1.
constexpr const char* kWaitingLogits = "waiting_logits";
constexpr const char* kWaitingValues = "waiting_values";
constexpr const char* kRecentKeys = "recent_keys";  // LatentInputs::recent_keys, where the latents have a convolution

// The rows of T tokens, of which the last `waiting` are kept back and the ones in front of them, kept back before, are given.
struct Delayed {
  Delayed(const at::Tensor& before, const at::Tensor& rows) {
    const auto all = at::cat({before, rows}, 1);
    given = all.slice(1, 0, rows.size(1));
    waiting = all.slice(1, rows.size(1));
  }
  at::Tensor given, waiting;
};

// The state of latents that have read one value of zeros with these key logits [Hkv, L]: [B, Hkv, L, head_dim + 3].
at::Tensor floor_state(const at::Tensor& floor, int64_t batch, int64_t head_dim) {
  const auto level = floor.detach();
  auto state = at::constant_pad_nd((floor - level).exp().unsqueeze(-1), {head_dim, 0});  // z = 1, with floor's gradient
  state = at::cat({state, level.unsqueeze(-1), at::zeros_like(level).unsqueeze(-1)}, -1);
  return state.unsqueeze(0).expand({batch, -1, -1, -1});
}

}  // namespace

bool is_convertible(const formats::DecoderConfig& config) { return config.attention_softcap == 0.0; }

ConvertedAttentionImpl::ConvertedAttentionImpl(const formats::DecoderConfig& config, std::shared_ptr<const models::Rope> rope,
                                               const FarOptions& far, LatentLogits latents)
    : config_(config), rope_(std::move(rope)), far_(far) {
  TORCH_CHECK_VALUE(is_convertible(config), "a model whose attention scores are capped can't be converted: its architecture is ",
                    config.architecture);
  if (latents) latents_ = register_module("latents", std::move(latents));
  share_sum_ = torch::zeros({config.num_heads}, torch::kFloat64);
}

at::Tensor ConvertedAttentionImpl::mix(const at::Tensor& x, const models::AttentionWeights::Heads& heads,
                                       const models::DecoderAttentionOptions& options, models::DecoderAttentionState* next) {
  const bool mixed = latents_ && !latents_off_;
  // The operators compute in float32 whatever comes; logits shouldn't be rounded to less, and all inputs share one dtype.
  const auto dtype = x.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  const auto wide = [&](const at::Tensor& tensor) { return mixed ? tensor.to(dtype) : tensor; };
  const auto query = wide(heads.query), key = wide(heads.key), value = wide(heads.value);
  const auto positions = nn::positions_from(options.position(), x.size(1), x.device());

  latte::MacchiatoAttentionOptions attention;
  attention.window = far_.window;
  attention.sinks = far_.sinks;
  attention.scale = config_.attention_scale;
  if (far_.sinks > 0) attention.sink_query = rope_->rotate(query, positions.clamp_max(far_.window + far_.sinks - 1));
  attention.output_final_state = next != nullptr;
  if (options.state) {
    TORCH_CHECK_VALUE(options.state->macchiato.has_value(),
                      "converted attention: the state comes from attention of another kind");
    attention.initial_state = options.state->macchiato;
  }
  const auto rotated_query = rope_->rotate(query, positions), rotated_key = rope_->rotate(key, positions);
  at::Tensor out;
  std::optional<MacchiatoState> after;
  if (mixed) {
    OptionalTensor recent_keys;
    if (options.state && latents_->conv_weight.defined()) recent_keys = options.state->more.at(kRecentKeys);
    LatentInputs inputs = latents_->forward(x, query, key, options.position(), far_, recent_keys);
    if (recording_ && !inputs.floor) record(1.0 - inputs.query_logits.softmax(-1).select(-1, 0), options.position());
    if (far_.evicted) {
      std::tie(out, after) = window_attention(rotated_query, rotated_key, value, attention);
      out = read_evicted(value, std::move(inputs), out, options, after ? &*after : nullptr, next);
    } else {
      attention.log_decay = std::move(inputs.log_decay);
      std::tie(out, after) =
          macchiato_attention(rotated_query, rotated_key, value, inputs.query_logits, inputs.key_logits, attention);
    }
  } else {
    std::tie(out, after) = window_attention(rotated_query, rotated_key, value, attention);
  }
  if (next) {
    next->macchiato = std::move(after);
    next->position = options.position() + x.size(1);
  }
  return out.to(x.scalar_type());
}

at::Tensor ConvertedAttentionImpl::read_evicted(const at::Tensor& value, LatentInputs inputs, const at::Tensor& window_out,
                                                const models::DecoderAttentionOptions& options, MacchiatoState* after,
                                                models::DecoderAttentionState* next) {
  at::Tensor logits = inputs.key_logits;
  const int64_t sinks_here = std::clamp<int64_t>(far_.sinks - options.position(), 0, logits.size(1));
  if (sinks_here > 0) {
    logits = at::cat({at::full_like(logits.slice(1, 0, sinks_here), kNegativeInfinity), logits.slice(1, sinks_here)}, 1);
  }
  at::Tensor logits_before, values_before, latents_before;
  // With a floor the values have a column of ones: its average is what the latents keep of their shares.
  const at::Tensor read = inputs.floor ? at::constant_pad_nd(value, {0, 1}, 1.0) : value;
  if (options.state) {
    logits_before = options.state->more.at(kWaitingLogits);
    values_before = options.state->more.at(kWaitingValues);
    latents_before = options.state->macchiato->latents;
  } else {
    const int64_t batch = value.size(0);
    logits_before = at::full({batch, far_.window, logits.size(2), logits.size(3)}, kNegativeInfinity, logits.options());
    values_before = at::zeros({batch, far_.window, read.size(2), read.size(3)}, value.options());
    if (inputs.floor) latents_before = floor_state(*inputs.floor, batch, read.size(3));
  }
  const Delayed key_logits(logits_before, logits), values(values_before, read);
  at::Tensor window_share;
  if (inputs.floor) window_share = inputs.query_logits.softmax(-1).select(-1, 0);
  auto [out, latents] =
      CallLatentAttention({.query_logits = std::move(inputs.query_logits),
                           .key_logits = key_logits.given,
                           .values = values.given,
                           .window_out = inputs.floor ? at::constant_pad_nd(window_out, {0, 1}) : window_out,
                           .log_decay = std::move(inputs.log_decay),
                           .initial_state = latents_before.defined() ? OptionalTensor(latents_before) : std::nullopt},
                          next != nullptr);
  if (next) {
    after->latents = latents;
    next->more = {{kWaitingLogits, key_logits.waiting}, {kWaitingValues, values.waiting}};
    if (inputs.recent_keys) next->more.emplace(kRecentKeys, *inputs.recent_keys);
  }
  if (!inputs.floor) return out;
  const auto kept = out.select(-1, value.size(3));  // [B, T, H]
  if (recording_) record(kept, options.position());
  return out.slice(-1, 0, value.size(3)) + (1.0 - window_share - kept).unsqueeze(-1) * window_out;
}

void ConvertedAttentionImpl::record(const at::Tensor& shares, int64_t position) {
  const auto has_far = nn::positions_from(position, shares.size(1), shares.device()) >= far_.window + far_.sinks;
  share_sum_ += (shares.detach().to(torch::kFloat64) * has_far.view({1, -1, 1})).sum({0, 1});
  share_count_ += has_far.sum().item<int64_t>() * shares.size(0);
}

models::DecoderAttentionResult ConvertedAttentionImpl::forward(const at::Tensor& x, const models::AttentionWeights& weights,
                                                               const models::DecoderAttentionOptions& options) {
  models::DecoderAttentionResult result;
  if (options.output_state) result.state.emplace();
  const auto heads = weights.project(x, config_.head_dim);
  const auto out = mix(x, heads, options, options.output_state ? &*result.state : nullptr);
  auto output = weights.output;  // forward() isn't const
  result.out = output(out.flatten(2));
  return result;
}

void ConvertedAttentionImpl::record_shares(bool on) {
  recording_ = on;
  if (!on) return;
  share_sum_.zero_();
  share_count_ = 0;
}

at::Tensor ConvertedAttentionImpl::mean_shares() const {
  return share_sum_ / static_cast<double>(std::max<int64_t>(1, share_count_));
}

FarOptions far_options(const formats::AdapterSpec& spec) { return {spec.window, spec.sinks, spec.far_limit, spec.evicted}; }

std::vector<ConvertedAttention> convert(models::Decoder& model, const formats::AdapterSpec& spec,
                                        const std::vector<LatentForm>& forms) {
  const auto& config = model->config();
  TORCH_CHECK_VALUE(static_cast<int64_t>(spec.latents.size()) == config.num_layers, "convert: ", spec.latents.size(),
                    " blocks, expected ", config.num_layers);
  TORCH_CHECK_VALUE(forms.size() == spec.latents.size(), "convert: ", forms.size(), " forms for ", spec.latents.size(),
                    " blocks");
  std::vector<ConvertedAttention> converted(spec.latents.size());
  for (size_t i = 0; i < spec.latents.size(); ++i) {
    if (spec.latents[i] < 0) continue;
    const auto block = static_cast<int64_t>(i);
    LatentLogits latents(nullptr);
    if (spec.latents[i] > 0) {
      TORCH_CHECK_VALUE((!forms[i].floor && !forms[i].conv) || spec.evicted,
                        "convert: latents with a floor or a convolution read what left the window");
      latents = LatentLogits(
          LatentSizes{config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, spec.latents[i], forms[i]});
      if (model->dtype() == torch::kFloat64) latents->to(torch::kFloat64);  // of tests
    }
    converted[i] = std::make_shared<ConvertedAttentionImpl>(config, model->rope(block), far_options(spec), std::move(latents));
    model->set_attention(block, converted[i]);
  }
  return converted;
}

}  // namespace latte::extend
