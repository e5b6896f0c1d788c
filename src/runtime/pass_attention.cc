// Attention of a pass. One token of a session: threads share out its keys. Several: keys and values, old and new, are laid out as
// rows, and threads take blocks of queries, one key-value head each.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cached_attention.h"
#include "kernels/token_rows.h"
#include "kernels/window.h"
#include "runtime/pass.h"

namespace latte::runtime {
namespace {

constexpr int64_t kUnitTokens = 128;  // queries of one piece of work

}  // namespace

void Engine::Pass::attend(int thread, int64_t layer) {
  const LayerShape& attention = layer_shape(layer);
  for (const Part& part : parts_) {
    if (part.count == 1) {
      if (attention.tokens) attend_token(thread, layer, part);
      for (int64_t h = 0; h < shape_.num_kv_heads && attention.has_sums(); ++h) {
        if ((h + part.first) % pool_.size() == thread) sum_token(own_[static_cast<size_t>(thread)], layer, part, h);
      }
    } else {
      attend_tokens(thread, layer, part);
    }
  }
}

void Engine::Pass::copy_head(const float* head, const float* norm, float* out) const {
  if (norm != nullptr) {
    kernels::RmsNormRow(head, norm, shape_.epsilon, shape_.key_dim, out);
  } else {
    std::copy_n(head, shape_.key_dim, out);
  }
}

// A row's value as the layer's tokens are read, of one head.
void Engine::Pass::copy_value(const LayerShape& layer, const float* value, int64_t row, float* out) const {
  std::copy_n(value, shape_.head_dim, out);
  if (!shape_.turns_tokens(layer)) return;
  const int64_t pairs = shape_.rotary_dims / 2;
  const Turns& turns = turns_[static_cast<size_t>(shape_.vapor)];
  kernels::RotateRow(shape_.pairs, pairs, turns.cos + row * pairs, turns.sin + row * pairs, out);
}

void Engine::Pass::attend_token(int thread, int64_t layer, const Part& part) {
  const ModelShape& s = shape_;
  const LayerShape& attention = layer_shape(layer);
  const LayerWeights& weights = model_.layers()[static_cast<size_t>(layer)];
  const Own& own = own_[static_cast<size_t>(thread)];
  const float* row = heads_ + part.first * heads_stride_;
  const int64_t pairs = s.rotary_dims / 2;
  const Turns& turns = turns_[static_cast<size_t>(attention.rotary)];
  const float* cos = turns.cos + part.first * pairs;
  const float* sin = turns.sin + part.first * pairs;

  // Sinks that have left the window.
  const int64_t window = part.session->window(layer);
  const int64_t far = std::clamp(part.position + 1 - window, int64_t{0}, attention.sinks);
  const bool stays = part.position > window + attention.sinks - 1;  // their queries, at one position
  for (int64_t h = 0; h < s.num_heads; ++h) {
    float* query = own.query + h * s.key_dim;
    copy_head(row + h * s.key_dim, weights.query_norm, query);
    for (int64_t i = 0; i < s.key_dim; ++i) query[i] *= s.attention_scale;
    if (far > 0 && stays) {
      const Turns& sink = sink_turns_[static_cast<size_t>(layer)];
      float* sink_query = own.sink_query + h * s.key_dim;
      std::copy_n(query, s.key_dim, sink_query);
      kernels::RotateRow(s.pairs, pairs, sink.cos, sink.sin, sink_query);
    }
    kernels::RotateRow(s.pairs, pairs, cos, sin, query);
  }

  const int64_t slot = part.position % window;
  const int64_t used = std::min(part.position + 1, window);
  const Share blocks = share_of((used + kernels::kCacheBlock - 1) / kernels::kCacheBlock, thread, pool_.size());
  const int64_t begin = blocks.begin * kernels::kCacheBlock;
  const int64_t end = std::min(used, blocks.end * kernels::kCacheBlock);
  const int64_t part_size = s.head_dim + kernels::kPartExtra;
  float* parts = parts_of_softmax_ + (part.first * pool_.size() + thread) * s.num_heads * part_size;
  for (int64_t h = 0; h < s.num_kv_heads; ++h) {
    const kernels::KeyValueCache ring = part.session->ring(layer, h);
    if (slot >= begin && slot < end) {
      copy_value(attention, row + value_offset_ + h * s.head_dim, part.first, own.value);
      copy_head(row + key_offset_ + h * s.key_dim, weights.key_norm, own.key);
      kernels::RotateRow(s.pairs, pairs, cos, sin, own.key);
      kernels::StoreSlot(ring, slot, own.key, own.value);
      if (part.position < attention.sinks) kernels::StoreSlot(part.session->sinks(layer, h), part.position, own.key, own.value);
    }
    float* head_parts = parts + h * s.group() * part_size;
    for (int64_t g = 0; g < s.group(); ++g) kernels::ClearPart(s.head_dim, head_parts + g * part_size);
    kernels::AttendSlots(ring, begin, end, s.group(), own.query + h * s.group() * s.key_dim, head_parts);
    if (far > 0 && thread == 0) {
      const float* queries = (stays ? own.sink_query : own.query) + h * s.group() * s.key_dim;
      kernels::AttendSlots(part.session->sinks(layer, h), 0, far, s.group(), queries, head_parts);
    }
  }
}

// What the output matrix reads of a row, [H, D].
void Engine::Pass::read_heads(int64_t layer, int64_t row, float* out) const {
  const ModelShape& s = shape_;
  const Part& part = *part_of_[static_cast<size_t>(row)];
  const LayerShape& attention = layer_shape(layer);
  const bool sums = attention.has_sums();
  const int64_t part_size = s.head_dim + kernels::kPartExtra;
  if (sums) {
    const int64_t dim = s.latent_dim(attention);
    const float* from = sums_out_ + row * s.num_heads * dim;
    for (int64_t h = 0; h < s.num_heads; ++h) std::copy_n(from + h * dim, s.head_dim, out + h * s.head_dim);
  }
  for (int64_t h = 0; h < s.num_heads && attention.tokens; ++h) {
    float* head = out + h * s.head_dim;
    const float share = sums ? query_logits_[(row * s.num_heads + h) * query_logits(attention)] : 1.0f;
    if (part.count == 1) {
      float* sum = parts_of_softmax_ + row * pool_.size() * s.num_heads * part_size + h * part_size;
      // Every thread may be reading these parts: they are joined in a copy.
      float joined[4096 + kernels::kPartExtra];
      std::copy_n(sum, part_size, joined);
      for (int t = 1; t < pool_.size(); ++t) kernels::JoinParts(s.head_dim, sum + t * s.num_heads * part_size, joined);
      kernels::ReadPart(s.head_dim, joined, share, sums, head);
    } else {
      const float* window = window_out_ + ((h / s.group() * batch_tokens_ + row) * s.group() + h % s.group()) * s.head_dim;
      for (int64_t i = 0; i < s.head_dim; ++i) head[i] = share * window[i] + (sums ? head[i] : 0.0f);
    }
    if (!s.turns_tokens(attention)) continue;
    const int64_t pairs = s.rotary_dims / 2;
    const Turns& turns = turns_[static_cast<size_t>(s.vapor)];
    kernels::RotateRow(s.pairs, pairs, turns.cos + row * pairs, turns.back + row * pairs, head);
  }
}

// Tokens in front of a part that its queries read in the ring.
int64_t Engine::Pass::past_rows(int64_t layer, const Part& part) const {
  return std::min(part.position, part.session->window(layer) - 1);
}

void Engine::Pass::attend_tokens(int thread, int64_t layer, const Part& part) {
  const ModelShape& s = shape_;
  const LayerShape& attention = layer_shape(layer);
  if (attention.tokens) {
    gather_past(thread, layer, part);
    gather_new(thread, layer, part);
    pool_.barrier();
  }

  // Sums first: the longest pieces. A ring is written by one thread, and was read before.
  const int64_t sums = attention.has_sums() ? s.num_kv_heads : 0;
  const int64_t rings = attention.tokens ? s.num_kv_heads : 0;
  const int64_t blocks = (part.count + kUnitTokens - 1) / kUnitTokens;
  const int64_t windows = rings * blocks;
  std::atomic<int64_t>& next = next_unit_[static_cast<size_t>(layer * prompts_ + part.prompt)];
  for (;;) {
    int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
    if (unit < sums) {
      sum_tokens(layer, part, unit);
    } else if ((unit -= sums) < windows) {
      const int64_t first = (blocks - 1 - unit / s.num_kv_heads) * kUnitTokens;  // those that read most come first
      attend_window(layer, part, unit % s.num_kv_heads, first, std::min(part.count, first + kUnitTokens));
    } else if ((unit -= windows) < rings) {
      keep_new(layer, part, unit);
    } else {
      break;
    }
  }
  if (parts_.size() > 1) pool_.barrier();  // the rows are the next part's now
}

void Engine::Pass::gather_past(int thread, int64_t layer, const Part& part) {
  const ModelShape& s = shape_;
  const int64_t past = past_rows(layer, part);
  const int64_t window = part.session->window(layer);
  const Share share = share_of(past, thread, pool_.size());
  for (int64_t h = 0; h < s.num_kv_heads; ++h) {
    const kernels::KeyValueCache ring = part.session->ring(layer, h);
    for (int64_t r = share.begin; r < share.end;) {
      const int64_t slot = (part.position - past + r) % window;
      const int64_t count = std::min(share.end - r, window - slot);
      kernels::LoadSlots(ring, slot, slot + count, past_keys_ + (h * past_capacity_ + r) * s.key_dim, s.key_dim,
                         past_values_ + (h * past_capacity_ + r) * s.head_dim, s.head_dim);
      r += count;
    }
    const int64_t sinks = layer_shape(layer).sinks;
    const int64_t kept = std::min(sinks, part.position);
    if (thread == 0 && kept > 0) {
      kernels::LoadSlots(part.session->sinks(layer, h), 0, kept, sink_keys_ + h * sinks * s.key_dim, s.key_dim,
                         sink_values_ + h * sinks * s.head_dim, s.head_dim);
    }
  }
}

// Puts this thread's share of the new tokens behind the past, rotated; rotates their queries where they lie.
void Engine::Pass::gather_new(int thread, int64_t layer, const Part& part) {
  const ModelShape& s = shape_;
  const LayerShape& attention = layer_shape(layer);
  const LayerWeights& weights = model_.layers()[static_cast<size_t>(layer)];
  const Own& own = own_[static_cast<size_t>(thread)];
  const int64_t past = past_rows(layer, part);
  const int64_t pairs = s.rotary_dims / 2;
  const Turns& turns = turns_[static_cast<size_t>(attention.rotary)];
  const int64_t sinks = attention.sinks;
  const Share share = share_of(part.count, thread, pool_.size());
  for (int64_t block = share.begin; block < share.end; block += kBlockTokens) {
    const int64_t end = std::min(share.end, block + kBlockTokens);
    if (attention.latents > 0 && !s.latents_of_input) {
      for (int64_t h = 0; h < s.num_kv_heads; ++h) {
        if (attention.evicted) gather_evicted(layer, part, block, end, h);
        latent_logits(own, layer, part, block, end, h);
      }
    }
    for (int64_t t = block; t < end; ++t) {
      float* row = heads_ + (part.first + t) * heads_stride_;
      const int64_t position = part.position + t;
      const float* cos = turns.cos + (part.first + t) * pairs;
      const float* sin = turns.sin + (part.first + t) * pairs;
      for (int64_t h = 0; h < s.num_heads; ++h) {
        float* query = row + h * s.key_dim;
        if (weights.query_norm != nullptr) copy_head(query, weights.query_norm, query);
        if (sinks > 0) {
          float* sink_query = sink_queries_ + ((part.first + t) * s.num_heads + h) * s.key_dim;
          const bool stays = position > attention.window + sinks - 1;
          const Turns& sink = sink_turns_[static_cast<size_t>(layer)];
          std::copy_n(query, s.key_dim, sink_query);
          kernels::RotateRow(s.pairs, pairs, stays ? sink.cos : cos, stays ? sink.sin : sin, sink_query);
        }
        kernels::RotateRow(s.pairs, pairs, cos, sin, query);
      }
      for (int64_t h = 0; h < s.num_kv_heads; ++h) {
        const kernels::KeyValueCache ring = part.session->ring(layer, h);
        float* key = past_keys_ + (h * past_capacity_ + past + t) * s.key_dim;
        copy_head(row + key_offset_ + h * s.key_dim, weights.key_norm, key);
        kernels::RotateRow(s.pairs, pairs, cos, sin, key);
        float* value = past_values_ + (h * past_capacity_ + past + t) * s.head_dim;
        copy_value(attention, row + value_offset_ + h * s.head_dim, part.first + t, value);
        // As they'll be read from the cache: a token sees the same whichever tokens came in one piece with it.
        kernels::RoundRow(ring.dtype, s.key_dim, key);
        kernels::RoundRow(ring.dtype, s.head_dim, value);
        if (position < sinks) {
          std::copy_n(key, s.key_dim, sink_keys_ + (h * sinks + position) * s.key_dim);
          std::copy_n(value, s.head_dim, sink_values_ + (h * sinks + position) * s.head_dim);
        }
      }
    }
  }
}

void Engine::Pass::attend_window(int64_t layer, const Part& part, int64_t kv_head, int64_t first, int64_t last) {
  const ModelShape& s = shape_;
  const LayerShape& attention = layer_shape(layer);
  const int64_t window = part.session->window(layer);
  const int64_t behind = past_rows(layer, part) + first;  // rows in front of the first query
  const int64_t position = part.position + first;
  kernels::WindowArgs args;
  args.sequences = 1;
  args.time = last - first;
  args.heads = s.group();
  args.kv_heads = 1;
  args.key_dim = s.key_dim;
  args.head_dim = s.head_dim;
  args.window = window;
  args.sinks = attention.sinks;
  args.scale = s.attention_scale;
  const int64_t query = (part.first + first) * heads_stride_ + kv_head * s.group() * s.key_dim;
  args.query = {heads_ + query, 0, heads_stride_, s.key_dim};
  const float* keys = past_keys_ + kv_head * past_capacity_ * s.key_dim;
  const float* values = past_values_ + kv_head * past_capacity_ * s.head_dim;
  args.key = {keys + behind * s.key_dim, 0, s.key_dim, 0};
  args.values = {values + behind * s.head_dim, 0, s.head_dim, 0};
  args.position = &position;
  args.past = std::min(behind, window - 1);
  args.past_key = {keys + (behind - args.past) * s.key_dim, 0, s.key_dim, 0};
  args.past_values = {values + (behind - args.past) * s.head_dim, 0, s.head_dim, 0};
  if (attention.sinks > 0) {
    args.sink_query = {sink_queries_ + ((part.first + first) * s.num_heads + kv_head * s.group()) * s.key_dim, 0,
                       s.num_heads * s.key_dim, s.key_dim};
    args.sink_key = {sink_keys_ + kv_head * attention.sinks * s.key_dim, 0, s.key_dim, 0};
    args.sink_values = {sink_values_ + kv_head * attention.sinks * s.head_dim, 0, s.head_dim, 0};
  }
  kernels::WindowOutputs outputs;
  outputs.out = window_out_ + (kv_head * batch_tokens_ + part.first + first) * s.group() * s.head_dim;
  kernels::WindowForward(args, outputs, 0, 1);
}

// Writes the new tokens to the ring, and the first to the sinks.
void Engine::Pass::keep_new(int64_t layer, const Part& part, int64_t kv_head) {
  const ModelShape& s = shape_;
  const int64_t past = past_rows(layer, part);
  const int64_t window = part.session->window(layer);
  const kernels::KeyValueCache ring = part.session->ring(layer, kv_head);
  const float* keys = past_keys_ + (kv_head * past_capacity_ + past) * s.key_dim;
  const float* values = past_values_ + (kv_head * past_capacity_ + past) * s.head_dim;
  for (int64_t t = std::max<int64_t>(0, part.count - window); t < part.count; ++t) {
    kernels::StoreSlot(ring, (part.position + t) % window, keys + t * s.key_dim, values + t * s.head_dim);
  }
  const int64_t sinks = std::min(part.count, layer_shape(layer).sinks - part.position);
  for (int64_t t = 0; t < sinks; ++t) {
    kernels::StoreSlot(part.session->sinks(layer, kv_head), part.position + t, keys + t * s.key_dim, values + t * s.head_dim);
  }
}

}  // namespace latte::runtime
