// The part of a layer's attention that sums up the past: latents, and linear attention. A key-value head's sums belong to one
// thread.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/channels.h"
#include "kernels/conv1d.h"
#include "kernels/latent.h"
#include "kernels/rg_lru.h"
#include "kernels/token_rows.h"
#include "runtime/pass.h"

namespace latte::runtime {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr double kFarUnit = 1024.0;           // formats/adapter.h
constexpr float kDecayTemperature = 16.0f;    // nn/attention.cc, nn/linear_attention.cc
constexpr float kFastestLinearDecay = -5.0f;  // nn/linear_attention.cc

}  // namespace

// The input of the latents' logits, or of queries and keys: a convolution or RG-LRU over time, whose channels the threads share
// out.
void Engine::Pass::mix(int thread, int64_t layer) {
  const int64_t dim = shape_.embed_dim;
  const MixerWeights& weights = model_.layers()[static_cast<size_t>(layer)].mixer;
  const bool convolves = shape_.mixer == Mixer::kConv;
  const int64_t remembered = convolves ? shape_.conv_width - 1 : 1;
  const Share share = share_of(kernels::ChannelSlices(1, dim), thread, pool_.size());
  for (const Part& part : parts_) {
    const auto rows = [&](const float* x) { return kernels::View{x + part.first * dim, 0, dim, 0}; };
    const kernels::MutableView out = {mixed_ + part.first * dim, 0, dim, 0};
    float* state = part.session->mixer(layer);
    const bool step = part.count == 1;
    for (int64_t slice = share.begin; slice < share.end; ++slice) {
      if (convolves) {
        kernels::Conv1dArgs args;
        args.sequences = 1;
        args.time = part.count;
        args.channels = dim;
        args.width = shape_.conv_width;
        args.x = rows(normed_);
        args.weight = weights.conv;
        args.bias = weights.conv_bias;
        if (step) {
          kernels::Conv1dStep(args, {out, nullptr}, state, slice);
        } else {
          args.initial_state = state;
          kernels::Conv1dForward(args, {out, final_mixer_}, slice);
        }
      } else {
        kernels::RgLruArgs args;
        args.sequences = 1;
        args.time = part.count;
        args.channels = dim;
        args.x = rows(normed_);
        args.recurrence_logits = rows(recurrence_);
        args.input_logits = rows(recurrence_input_);
        args.lambda = weights.lambda;
        if (step) {
          kernels::RgLruStep(args, {out, nullptr, nullptr}, state, slice);
        } else {
          args.initial_state = state;
          kernels::RgLruForward(args, {out, final_mixer_, nullptr}, slice);
        }
      }
      if (step) continue;
      const kernels::ChannelSlice channels = kernels::ChannelSliceAt(slice, dim);
      for (int64_t i = 0; i < remembered; ++i) {
        std::copy_n(final_mixer_ + i * dim + channels.channel, channels.count, state + i * dim + channels.channel);
      }
    }
  }
}

// Key and value that leave the window as a part's token t comes, as the cache holds them, whether they have been there or came in
// the same piece. Of sinks and before the text zeros.
void Engine::Pass::read_evicted(int64_t layer, const Part& part, int64_t t, int64_t kv_head, float* key, float* value) const {
  const ModelShape& s = shape_;
  const LayerShape& attention = layer_shape(layer);
  const int64_t position = part.position + t - attention.window;
  if (attention.floor) value[s.head_dim] = 1.0f;
  if (position < attention.sinks) {
    std::fill_n(key, s.key_dim, 0.0f);
    std::fill_n(value, s.head_dim, 0.0f);
    return;
  }
  const kernels::KeyValueCache ring = part.session->ring(layer, kv_head);
  if (position < part.position) {
    const int64_t slot = position % attention.window;
    kernels::LoadSlots(ring, slot, slot + 1, key, s.key_dim, value, s.head_dim);
    return;
  }
  const int64_t pairs = s.rotary_dims / 2, row = part.first + t - attention.window;
  const Turns& turns = turns_[static_cast<size_t>(attention.rotary)];
  const float* heads = heads_ + row * heads_stride_;
  copy_head(heads + key_offset_ + kv_head * s.key_dim, model_.layers()[static_cast<size_t>(layer)].key_norm, key);
  kernels::RotateRow(s.pairs, pairs, turns.cos + row * pairs, turns.sin + row * pairs, key);
  kernels::RoundRow(ring.dtype, s.key_dim, key);
  std::copy_n(heads + value_offset_ + kv_head * s.head_dim, s.head_dim, value);
  kernels::RoundRow(ring.dtype, s.head_dim, value);
}

// Of a part's tokens [first, last).
void Engine::Pass::gather_evicted(int64_t layer, const Part& part, int64_t first, int64_t last, int64_t kv_head) {
  const int64_t dim = shape_.latent_dim(layer_shape(layer));
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = (part.first + t) * shape_.num_kv_heads + kv_head;
    read_evicted(layer, part, t, kv_head, evicted_keys_ + row * shape_.key_dim, evicted_values_ + row * dim);
  }
}

// Rotates the key back that read_evicted() gave for token t.
void Engine::Pass::rotate_evicted_back(int64_t layer, const Part& part, int64_t t, float* key) const {
  const LayerShape& attention = layer_shape(layer);
  if (part.position + t - attention.window < attention.sinks) return;
  const int64_t pairs = shape_.rotary_dims / 2, row = part.first + t;
  const Turns& turns = evicted_turns_[static_cast<size_t>(attention.rotary)];
  kernels::RotateRow(shape_.pairs, pairs, turns.cos + row * pairs, turns.back + row * pairs, key);
}

// What key logits of a part's tokens [first, last) read, in own.keys [last - first, Dk]: a convolution over the keys that leave
// the window, of which those before the part are the session's.
void Engine::Pass::convolve_keys(const Own& own, int64_t layer, const Part& part, int64_t first, int64_t last, int64_t kv_head) {
  constexpr int64_t kBefore = formats::kKeyConvWidth - 1;
  const int64_t dim = shape_.key_dim;
  const float* weight = model_.layers()[static_cast<size_t>(layer)].latent.key_conv + kv_head * dim * formats::kKeyConvWidth;
  const float* recent = part.session->mixer(layer) + kv_head * kBefore * dim;
  for (int64_t t = first - kBefore; t < last; ++t) {
    float* key = own.keys + (t - first + kBefore) * dim;
    if (t < 0) {
      std::copy_n(recent + (kBefore + t) * dim, dim, key);
      continue;
    }
    if (t < first) {  // another thread may be at it
      read_evicted(layer, part, t, kv_head, key, own.value);
    } else {
      std::copy_n(evicted_keys_ + ((part.first + t) * shape_.num_kv_heads + kv_head) * dim, dim, key);
    }
    rotate_evicted_back(layer, part, t, key);
  }
  for (int64_t t = 0; t < last - first; ++t) {
    float* keys = own.keys + t * dim;  // the oldest that token t reads, whose place it takes
    for (int64_t i = 0; i < dim; ++i) {
      float sum = 0.0f;
      for (int64_t j = 0; j <= kBefore; ++j) sum += weight[i * formats::kKeyConvWidth + j] * keys[j * dim + i];
      keys[i] = sum;
    }
  }
}

// The last keys that left the window, for the next part's convolution.
void Engine::Pass::keep_recent_keys(int64_t layer, const Part& part, int64_t kv_head) {
  constexpr int64_t kBefore = formats::kKeyConvWidth - 1;
  const int64_t dim = shape_.key_dim;
  float* recent = part.session->mixer(layer) + kv_head * kBefore * dim;
  for (int64_t i = 0; i < kBefore; ++i) {
    const int64_t t = part.count - kBefore + i;
    if (t < 0) {
      std::copy_n(recent + (i + part.count) * dim, dim, recent + i * dim);
    } else {
      std::copy_n(evicted_keys_ + ((part.first + t) * shape_.num_kv_heads + kv_head) * dim, dim, recent + i * dim);
      rotate_evicted_back(layer, part, t, recent + i * dim);
    }
  }
}

// Before the new tokens take their places in the rings.
void Engine::Pass::gather_evicted_of_steps(int thread, int64_t layer) {
  if (!layer_shape(layer).evicted) return;
  for (const Part& part : parts_) {
    for (int64_t h = 0; part.count == 1 && h < shape_.num_kv_heads; ++h) {
      if ((h + part.first) % pool_.size() == thread) gather_evicted(layer, part, 0, 1, h);
    }
  }
}

// Logits of a part's tokens [first, last), at most kBlockTokens, for one key-value head and its queries: read from heads that
// aren't rotated yet, or from keys that leave the window, rotated back.
void Engine::Pass::latent_logits(const Own& own, int64_t layer, const Part& part, int64_t first, int64_t last, int64_t kv_head) {
  const ModelShape& s = shape_;
  const LayerShape& attention = layer_shape(layer);
  const LayerWeights& weights = model_.layers()[static_cast<size_t>(layer)];
  const LatentWeights& latent = weights.latent;
  const int64_t latents = attention.latents;
  const int64_t row = part.first + first;
  const int64_t count = last - first;
  const auto has_key = [&](int64_t t) {
    return !attention.evicted || part.position + first + t - attention.window >= attention.sinks;
  };

  const Matrix& key = latent.key[static_cast<size_t>(kv_head)];
  if (attention.key_conv) convolve_keys(own, layer, part, first, last, kv_head);
  for (int64_t t = 0; t < count; ++t) {
    if (attention.key_conv) {
      std::copy_n(own.keys + t * s.key_dim, s.key_dim, own.key);
    } else if (attention.evicted) {
      std::copy_n(evicted_keys_ + ((row + t) * s.num_kv_heads + kv_head) * s.key_dim, s.key_dim, own.key);
      rotate_evicted_back(layer, part, first + t, own.key);
    } else {
      copy_head(heads_ + (row + t) * heads_stride_ + key_offset_ + kv_head * s.key_dim, weights.key_norm, own.key);
    }
    own.key_inputs.put(weights.key_head_forms, own.key, t);
  }
  float* key_logits = key_logits_ + (row * s.num_kv_heads + kv_head) * latents;
  const int64_t key_stride = s.num_kv_heads * latents;
  key.multiply(own.key_inputs, 0, count, 0, key.groups(), key_logits, key_stride);
  const float* key_bias = latent.key_bias + kv_head * latents;
  for (int64_t t = 0; t < count; ++t) {
    float* logits = key_logits + t * key_stride;
    for (int64_t l = 0; l < latents; ++l) logits[l] += key_bias[l];
    if (!has_key(t)) std::fill_n(logits, latents, kMinusInfinity);
  }

  const auto far = [&](int64_t t) { return part.position + first + t + 1 - attention.window - attention.sinks; };
  for (int64_t h = kv_head * s.group(); h < (kv_head + 1) * s.group(); ++h) {
    float* logits = query_logits_ + (row * s.num_heads + h) * (latents + 1);
    const int64_t stride = s.num_heads * (latents + 1);
    if (far(count - 1) > 0) {
      const Matrix& query = latent.query[static_cast<size_t>(h)];
      for (int64_t t = 0; t < count; ++t) {
        copy_head(heads_ + (row + t) * heads_stride_ + h * s.key_dim, weights.query_norm, own.key);
        own.query_inputs.put(weights.query_head_forms, own.key, t);
      }
      query.multiply(own.query_inputs, 0, count, 0, query.groups(), logits + 1, stride);
    }
    const float* query_bias = latent.query_bias + h * latents;
    for (int64_t t = 0; t < count; ++t, logits += stride) {
      const double distance = static_cast<double>(std::clamp<int64_t>(far(t), 1, std::max<int64_t>(1, shape_.far_limit)));
      logits[0] = heads_[(row + t) * heads_stride_ + gate_offset_ + h] + latent.gate_bias[h] -
                  latent.gate_slope[h] * static_cast<float>(std::log(distance / kFarUnit));
      if (far(t) > 0) {
        for (int64_t l = 0; l < latents; ++l) logits[1 + l] += query_bias[l];
      } else {
        std::fill_n(logits + 1, latents, kMinusInfinity);
      }
    }
  }
}

// What the kernels read of a part that the products didn't make: decays from their logits, values rotated.
void Engine::Pass::prepare_sums(int64_t layer, const Part& part, int64_t kv_head) {
  const ModelShape& s = shape_;
  const LayerShape& attention = layer_shape(layer);
  const int64_t decay_rows = model_.layers()[static_cast<size_t>(layer)].sums.decay.rows();
  const int64_t of_head = decay_rows / s.num_kv_heads;
  for (int64_t t = part.first; t < part.first + part.count; ++t) {
    if (decay_rows > 0) {
      float* decay = decay_ + t * decay_rows + kv_head * of_head;
      kernels::LogSigmoidRow(1.0f / kDecayTemperature, of_head, decay);
      for (int64_t i = 0; i < of_head && attention.linear != Linear::kNone; ++i)
        decay[i] = std::max(decay[i], kFastestLinearDecay);
    }
    if (s.vapor < 0) continue;
    const Turns& turns = turns_[static_cast<size_t>(s.vapor)];
    const int64_t pairs = s.rotary_dims / 2;
    float* value = turned_values_ + (t * s.num_kv_heads + kv_head) * s.head_dim;
    std::copy_n(heads_ + t * heads_stride_ + value_offset_ + kv_head * s.head_dim, s.head_dim, value);
    kernels::RotateRow(s.pairs, pairs, turns.cos + t * pairs, turns.sin + t * pairs, value);
  }
}

// Rotates back what was read of rotated values, and leaves the window's share in the place of its logit.
void Engine::Pass::finish_sums(int64_t layer, const Part& part, int64_t kv_head) {
  const ModelShape& s = shape_;
  if (s.vapor >= 0) {
    const Turns& turns = turns_[static_cast<size_t>(s.vapor)];
    const int64_t pairs = s.rotary_dims / 2;
    for (int64_t t = part.first; t < part.first + part.count; ++t) {
      for (int64_t h = kv_head * s.group(); h < (kv_head + 1) * s.group(); ++h) {
        float* out = sums_out_ + (t * s.num_heads + h) * s.head_dim;
        kernels::RotateRow(s.pairs, pairs, turns.cos + t * pairs, turns.back + t * pairs, out);
      }
    }
  }
  if (layer_shape(layer).tokens) gates_to_shares(layer, part, kv_head);
}

// The latents' arguments for a part. What the window returned is added afterwards: here it reads as zero, and keeps its share.
kernels::LatentArgs Engine::Pass::latent_args(int64_t layer, const Part& part) const {
  const ModelShape& s = shape_;
  const LayerShape& attention = layer_shape(layer);
  const LayerWeights& weights = model_.layers()[static_cast<size_t>(layer)];
  const int64_t latents = attention.latents, logits = query_logits(attention);
  kernels::LatentArgs args;
  args.sequences = 1;
  args.time = part.count;
  args.heads = s.num_heads;
  args.kv_heads = s.num_kv_heads;
  args.latents = latents;
  args.head_dim = s.latent_dim(attention);
  args.query_logits = {query_logits_ + part.first * s.num_heads * logits, 0, s.num_heads * logits, logits};
  args.key_logits = {key_logits_ + part.first * s.num_kv_heads * latents, 0, s.num_kv_heads * latents, latents};
  if (s.vapor >= 0 || attention.evicted) {
    const int64_t stride = s.num_kv_heads * args.head_dim;
    args.values = {(attention.evicted ? evicted_values_ : turned_values_) + part.first * stride, 0, stride, args.head_dim};
  } else {
    args.values = {heads_ + part.first * heads_stride_ + value_offset_, 0, heads_stride_, s.head_dim};
  }
  if (weights.sums.decay) {
    args.log_decay = {decay_ + part.first * s.num_kv_heads * latents, 0, s.num_kv_heads * latents, latents};
  } else {
    args.log_decay = {weights.latent.log_decay, 0, 0, latents};
  }
  if (attention.tokens) args.window_out = {zeros_, 0, 0, 0};
  return args;
}

// One token of a session.
void Engine::Pass::sum_token(const Own& own, int64_t layer, const Part& part, int64_t kv_head) {
  const ModelShape& s = shape_;
  prepare_sums(layer, part, kv_head);
  if (layer_shape(layer).linear != Linear::kNone) return attend_linear(layer, part, kv_head);
  if (!s.latents_of_input) latent_logits(own, layer, part, 0, 1, kv_head);
  if (layer_shape(layer).key_conv) keep_recent_keys(layer, part, kv_head);
  const kernels::LatentArgs args = latent_args(layer, part);
  kernels::LatentOutputs outputs;
  outputs.out = {sums_out_ + part.first * s.num_heads * args.head_dim, 0, s.num_heads * args.head_dim, args.head_dim};
  float* state = part.session->sums(layer) + kv_head * args.latents * (args.head_dim + kernels::kStateExtra);
  kernels::LatentStep(args, outputs, state, kv_head);
  finish_sums(layer, part, kv_head);
}

// Several, whose logits are there.
void Engine::Pass::sum_tokens(int64_t layer, const Part& part, int64_t kv_head) {
  const ModelShape& s = shape_;
  prepare_sums(layer, part, kv_head);
  if (layer_shape(layer).linear != Linear::kNone) return attend_linear(layer, part, kv_head);
  if (layer_shape(layer).key_conv) keep_recent_keys(layer, part, kv_head);
  kernels::LatentArgs args = latent_args(layer, part);
  args.initial_state = part.session->sums(layer);
  kernels::LatentOutputs outputs;
  outputs.out = {sums_out_ + part.first * s.num_heads * args.head_dim, 0, s.num_heads * args.head_dim, args.head_dim};
  outputs.final_state = final_latents_;
  kernels::LatentForward(args, outputs, kv_head, kv_head + 1);
  const int64_t size = args.latents * (args.head_dim + kernels::kStateExtra);
  std::copy_n(final_latents_ + kv_head * size, size, part.session->sums(layer) + kv_head * size);
  finish_sums(layer, part, kv_head);
}

// Linear attention, token by token (nn/linear_attention.h). Row i of the state [D, D + 1] is what key channel i has gathered, and
// behind it its normaliser.
void Engine::Pass::attend_linear(int64_t layer, const Part& part, int64_t kv_head) {
  const ModelShape& s = shape_;
  const int64_t dim = s.head_dim;
  const SumWeights& weights = model_.layers()[static_cast<size_t>(layer)].sums;
  const bool gated = layer_shape(layer).linear == Linear::kGated;
  const auto feature = [&](float x) { return gated ? x : x > 0.0f ? 1.0f + x : std::exp(x); };
  const float query_scale = gated ? 1.0f / std::sqrt(static_cast<float>(dim)) : 1.0f;
  float* state = part.session->sums(layer) + kv_head * dim * (dim + 1);
  const Turns* turns = s.vapor >= 0 ? &turns_[static_cast<size_t>(s.vapor)] : nullptr;
  const int64_t pairs = s.rotary_dims / 2;
  for (int64_t t = part.first; t < part.first + part.count; ++t) {
    const float* row = heads_ + t * heads_stride_;
    const float* key = row + key_offset_ + kv_head * dim;
    const float* value = turns ? turned_values_ + (t * s.num_kv_heads + kv_head) * dim : row + value_offset_ + kv_head * dim;
    const float* decay = gated ? decay_ + (t * s.num_kv_heads + kv_head) * dim : nullptr;
    for (int64_t i = 0; i < dim; ++i) {
      float* sums = state + i * (dim + 1);
      const float kept = gated ? std::exp(decay[i]) : 1.0f, k = feature(key[i]);
      for (int64_t j = 0; j < dim; ++j) sums[j] = kept * sums[j] + k * value[j];
      sums[dim] += k;
    }
    for (int64_t h = kv_head * s.group(); h < (kv_head + 1) * s.group(); ++h) {
      const float* query = row + h * dim;
      float* out = sums_out_ + (t * s.num_heads + h) * dim;
      std::fill_n(out, dim, 0.0f);
      float normaliser = 0.0f;
      for (int64_t i = 0; i < dim; ++i) {
        const float* sums = state + i * (dim + 1);
        const float q = query_scale * feature(query[i]);
        for (int64_t j = 0; j < dim; ++j) out[j] += q * sums[j];
        normaliser += q * sums[dim];
      }
      if (!gated && normaliser != 0.0f) {
        for (int64_t j = 0; j < dim; ++j) out[j] /= normaliser;
      }
      if (turns != nullptr) kernels::RotateRow(s.pairs, pairs, turns->cos + t * pairs, turns->back + t * pairs, out);
      if (gated) {
        float* gate = out_gate_ + (t * s.num_heads + h) * dim;
        kernels::RmsNormRow(out, weights.out_norm, 1e-5f, dim, out);
        kernels::GateRow(kernels::Gate::kSilu, gate, out, dim, out);
      }
    }
  }
}

// Leaves the window's share in the place of its logit: with a floor, what latents don't keep.
void Engine::Pass::gates_to_shares(int64_t layer, const Part& part, int64_t kv_head) {
  const LayerShape& attention = layer_shape(layer);
  const int64_t logits = query_logits(attention), dim = shape_.latent_dim(attention);
  for (int64_t t = part.first; t < part.first + part.count; ++t) {
    for (int64_t h = kv_head * shape_.group(); h < (kv_head + 1) * shape_.group(); ++h) {
      const int64_t row = t * shape_.num_heads + h;
      if (attention.floor) {
        query_logits_[row * logits] = 1.0f - sums_out_[row * dim + shape_.head_dim];
      } else {
        kernels::SoftmaxRow(logits, query_logits_ + row * logits);
      }
    }
  }
}

}  // namespace latte::runtime
