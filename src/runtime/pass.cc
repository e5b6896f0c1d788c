#include "runtime/pass.h"

#include <algorithm>
#include <cmath>

#include "kernels/token_rows.h"

namespace latte::runtime {
namespace {

int64_t whole_groups(int64_t rows) { return (rows + kernels::kGroupRows - 1) / kernels::kGroupRows * kernels::kGroupRows; }

}  // namespace

Engine::Pass::Pass(const Model& model, const EngineOptions& options)
    : model_(model),
      shape_(model.shape()),
      pool_(options.threads > 0 ? options.threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency())),
            options.cpus),
      batch_tokens_(std::max<int64_t>(1, options.batch_tokens)),
      arena_("the engine's activations") {
  const ModelShape& s = shape_;
  const int64_t n = batch_tokens_;
  InputForms attention, output, down, query_head, key_head;
  bool columns = true;
  for (const LayerWeights& layer : model_.layers()) {
    attention.add(layer.attention_forms);
    attention.add(layer.mixed_forms);
    attention.add(layer.feed_forward_forms);
    output.add(layer.output_forms);
    down.add(layer.down_forms);
    query_head.add(layer.query_head_forms);
    key_head.add(layer.key_head_forms);
    columns &= layer.down_forms.by_columns();
  }
  attention.add(model_.head().forms());
  columns &= s.hidden_dim % kernels::kQuantBlock == 0;
  int64_t sinks = 0;
  int64_t latent_dim = s.head_dim;
  bool sums = false, decay = false, gated_output = false, key_conv = false;
  for (size_t i = 0; i < s.layers.size(); ++i) {
    most_latents_ = std::max(most_latents_, s.layers[i].latents);
    sinks = std::max(sinks, s.layers[i].sinks);
    sums |= s.layers[i].has_sums();
    key_conv |= s.layers[i].key_conv;
    latent_dim = std::max(latent_dim, s.latent_dim(s.layers[i]));
    decay |= static_cast<bool>(model_.layers()[i].sums.decay);
    gated_output |= static_cast<bool>(model_.layers()[i].sums.out_gate);
  }
  const int64_t threads = pool_.size();
  key_offset_ = whole_groups(s.num_heads * s.key_dim);
  value_offset_ = key_offset_ + whole_groups(s.num_kv_heads * s.key_dim);
  gate_offset_ = value_offset_ + whole_groups(s.num_kv_heads * s.head_dim);
  heads_stride_ = gate_offset_ + whole_groups(most_latents_ > 0 ? s.num_heads : 0);
  x_ = arena_.take_array<float>(n * s.embed_dim);
  y_ = arena_.take_array<float>(n * s.embed_dim);
  heads_ = arena_.take_array<float>(n * heads_stride_);
  if (!columns) hidden_ = arena_.take_array<float>(n * s.hidden_dim);
  parts_of_softmax_ = arena_.take_array<float>(n * threads * s.num_heads * (s.head_dim + kernels::kPartExtra));
  if (most_latents_ > 0) {
    query_logits_ = arena_.take_array<float>(n * s.num_heads * (most_latents_ + 1));
    key_logits_ = arena_.take_array<float>(n * s.num_kv_heads * most_latents_);
    final_latents_ = arena_.take_array<float>(s.num_kv_heads * most_latents_ * (latent_dim + kernels::kStateExtra));
  }
  if (sums) sums_out_ = arena_.take_array<float>(n * s.num_heads * latent_dim);
  if (decay) decay_ = arena_.take_array<float>(n * s.num_kv_heads * std::max(most_latents_, s.head_dim));
  if (gated_output) out_gate_ = arena_.take_array<float>(n * s.num_heads * s.head_dim);
  if (s.vapor >= 0 && sums) turned_values_ = arena_.take_array<float>(n * s.num_kv_heads * s.head_dim);
  if (s.mixer != Mixer::kNone) {
    normed_ = arena_.take_array<float>(n * s.embed_dim);
    mixed_ = arena_.take_array<float>(n * s.embed_dim);
  }
  if (s.mixer == Mixer::kConv) final_mixer_ = arena_.take_array<float>((s.conv_width - 1) * s.embed_dim);
  if (s.mixer == Mixer::kRgLru) {
    recurrence_ = arena_.take_array<float>(n * s.embed_dim);
    recurrence_input_ = arena_.take_array<float>(n * s.embed_dim);
    final_mixer_ = arena_.take_array<float>(s.embed_dim);
  }
  window_out_ = arena_.take_array<float>(n * s.num_heads * s.head_dim);
  zeros_ = arena_.take_array<float>(latent_dim);
  if (sinks > 0) {
    sink_queries_ = arena_.take_array<float>(n * s.num_heads * s.key_dim);
    sink_keys_ = arena_.take_array<float>(sinks * s.num_kv_heads * s.key_dim);
    sink_values_ = arena_.take_array<float>(sinks * s.num_kv_heads * s.head_dim);
  }
  const int64_t pairs = s.rotary_dims / 2;
  const auto take_turns = [&](int64_t rows) {
    return Turns{arena_.take_array<float>(rows * pairs), arena_.take_array<float>(rows * pairs)};
  };
  for (size_t i = 0; i < s.rotary.size(); ++i) turns_.push_back(take_turns(n));
  for (const LayerShape& layer : s.layers) {
    if (layer.evicted) evicted_window_ = layer.window;  // one for all: an adapter has one window
  }
  if (evicted_window_ > 0) {
    for (size_t i = 0; i < s.rotary.size(); ++i) {
      evicted_turns_.push_back(take_turns(n));
      evicted_turns_.back().back = arena_.take_array<float>(n * pairs);
    }
    evicted_keys_ = arena_.take_array<float>(n * s.num_kv_heads * s.key_dim);
    evicted_values_ = arena_.take_array<float>(n * s.num_kv_heads * latent_dim);
  }
  if (s.vapor >= 0) turns_[static_cast<size_t>(s.vapor)].back = arena_.take_array<float>(n * pairs);
  for (const LayerShape& layer : s.layers) {
    Turns& turns = sink_turns_.emplace_back();
    if (layer.sinks == 0) continue;
    turns = take_turns(1);
    turn(layer.rotary, layer.window + layer.sinks - 1, turns.cos, turns.sin);
  }
  inputs_ = Inputs(n, s.embed_dim, attention, arena_);
  output_inputs_ = Inputs(n, s.num_heads * s.head_dim, output, arena_);
  down_inputs_ = Inputs(n, s.hidden_dim, down, arena_);
  own_.resize(static_cast<size_t>(threads));
  for (Own& own : own_) {
    own.row = arena_.take_array<float>(s.embed_dim);
    own.sum = arena_.take_array<float>(s.embed_dim);
    own.heads = arena_.take_array<float>(s.num_heads * s.head_dim);
    own.query = arena_.take_array<float>(s.num_heads * s.key_dim);
    own.sink_query = arena_.take_array<float>(s.num_heads * s.key_dim);
    own.key = arena_.take_array<float>(s.key_dim);
    own.value = arena_.take_array<float>(latent_dim);
    if (key_conv) own.keys = arena_.take_array<float>((std::min(n, kBlockTokens) + formats::kKeyConvWidth - 1) * s.key_dim);
    own.gate = arena_.take_array<float>(std::min(n, kBlockTokens) * whole_groups(s.hidden_dim));
    own.up = arena_.take_array<float>(std::min(n, kBlockTokens) * whole_groups(s.hidden_dim));
    own.inputs = Inputs(1, s.embed_dim, attention, arena_);
    own.output_inputs = Inputs(1, s.num_heads * s.head_dim, output, arena_);
    own.down_inputs = Inputs(1, s.hidden_dim, down, arena_);
    own.query_inputs = Inputs(std::min(n, kBlockTokens), s.key_dim, query_head, arena_);
    own.key_inputs = Inputs(std::min(n, kBlockTokens), s.key_dim, key_head, arena_);
  }
}

std::span<const float> Engine::Pass::run(std::span<const StepPart> parts) {
  start(parts);
  pool_.run([this](int thread) { work(thread); });
  for (const Part& part : parts_) part.session->advance(part.count);
  return logits_;
}

void Engine::Pass::start(std::span<const StepPart> parts) {
  parts_.clear();
  tokens_.clear();
  wanted_.clear();
  part_of_.clear();
  int64_t most_past = 0, prompts = 0;
  parts_.reserve(parts.size());
  for (const StepPart& part : parts) {
    const auto first = static_cast<int64_t>(tokens_.size());
    const auto count = static_cast<int64_t>(part.tokens.size());
    parts_.push_back({part.session, first, count, part.session->position(), count > 1 ? prompts : 0});
    part_of_.insert(part_of_.end(), part.tokens.size(), &parts_.back());
    tokens_.insert(tokens_.end(), part.tokens.begin(), part.tokens.end());
    if (!part.no_logits) {
      for (int64_t t = part.all_logits ? 0 : count - 1; t < count; ++t) wanted_.push_back(first + t);
    }
    if (count == 1) continue;
    ++prompts;
    for (size_t i = 0; i < shape_.layers.size(); ++i) {
      if (!shape_.layers[i].tokens) continue;
      most_past = std::max(most_past, past_rows(static_cast<int64_t>(i), parts_.back()) + count);
    }
  }
  rows_ = static_cast<int64_t>(tokens_.size());
  alone_ = rows_ == 1;
  logits_.resize(wanted_.size() * static_cast<size_t>(shape_.vocab_size));
  if (most_past > past_capacity_) {
    past_ = Buffer();
    past_capacity_ = 0;
    const int64_t capacity = std::max(most_past, std::min(most_past + most_past / 2, shape_.context));
    past_ = Buffer(static_cast<size_t>(shape_.num_kv_heads * capacity * (shape_.key_dim + shape_.head_dim)) * sizeof(float),
                   "the prompt's attention");
    past_capacity_ = capacity;
    past_keys_ = past_.as<float>();
    past_values_ = past_keys_ + shape_.num_kv_heads * capacity * shape_.key_dim;
  }
  const int64_t counters = prompts * static_cast<int64_t>(shape_.layers.size());
  prompts_ = prompts;
  if (counters > 0) next_unit_ = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(counters));
}

// Calls row(t, inputs) for the rows that are this thread's, and returns the inputs that the next product reads.
template <class Row>
const Inputs& Engine::Pass::rows(int thread, const Inputs& shared, const Inputs& own, const Row& row) {
  if (alone_) {
    row(0, own);
    return own;
  }
  const Share share = share_of(rows_, thread, pool_.size());
  for (int64_t t = share.begin; t < share.end; ++t) row(t, shared);
  pool_.barrier();
  return shared;
}

void Engine::Pass::work(int thread) {
  Own& own = own_[static_cast<size_t>(thread)];
  turn_rows(thread);
  const auto row_of = [&](int64_t t) { return alone_ ? own.row : x_ + t * shape_.embed_dim; };
  NormWeights post_norm;  // of what is added next
  for (size_t i = 0; i < model_.layers().size(); ++i) {
    const LayerWeights& layer = model_.layers()[i];
    const auto index = static_cast<int64_t>(i);
    const Inputs& inputs = rows(thread, inputs_, own.inputs, [&](int64_t t, const Inputs& to) {
      float* x = row_of(t);
      if (i == 0) {
        const Part& part = *part_of_[static_cast<size_t>(t)];
        model_.embed(tokens_[static_cast<size_t>(t)], part.position + t - part.first, x);
      } else {
        add_residual(post_norm, t, x, own.sum);
      }
      norm_row(layer.attention_norm, x, own.sum);
      to.put(layer.attention_forms, own.sum, t);
      if (normed_ != nullptr && (!alone_ || thread == 0)) {
        std::copy_n(own.sum, shape_.embed_dim, normed_ + t * shape_.embed_dim);
      }
    });
    attention_products(thread, index, inputs);
    gather_evicted_of_steps(thread, index);
    pool_.barrier();
    if (shape_.mixer != Mixer::kNone) {
      mix(thread, index);
      pool_.barrier();
      const Inputs& mixed = rows(thread, inputs_, own.inputs, [&](int64_t t, const Inputs& to) {
        to.put(layer.mixed_forms, mixed_ + t * shape_.embed_dim, t);
      });
      mixed_products(thread, index, mixed);
      pool_.barrier();
    }
    attend(thread, index);
    pool_.barrier();
    const Inputs& output_inputs = rows(thread, output_inputs_, own.output_inputs, [&](int64_t t, const Inputs& to) {
      read_heads(index, t, own.heads);
      to.put(layer.output_forms, own.heads, t);
    });
    product(thread, layer.output, output_inputs, rows_, y_, shape_.embed_dim);
    pool_.barrier();
    const Inputs& feed_forward_inputs = rows(thread, inputs_, own.inputs, [&](int64_t t, const Inputs& to) {
      float* x = row_of(t);
      add_residual(layer.attention_post_norm, t, x, own.sum);
      norm_row(layer.feed_forward_norm, x, own.sum);
      to.put(layer.feed_forward_forms, own.sum, t);
    });
    feed_forward(thread, layer, feed_forward_inputs);
    pool_.barrier();
    const Inputs* down_inputs = &down_inputs_;
    if (hidden_ != nullptr) {
      down_inputs = &rows(thread, down_inputs_, own.down_inputs,
                          [&](int64_t t, const Inputs& to) { to.put(layer.down_forms, hidden_ + t * shape_.hidden_dim, t); });
    }
    product(thread, layer.down, *down_inputs, rows_, y_, shape_.embed_dim);
    pool_.barrier();
    post_norm = layer.feed_forward_post_norm;
  }
  if (wanted_.empty()) return;

  const auto finish = [&](int64_t row, int64_t place, const Inputs& to) {
    float* x = row_of(row);
    add_residual(post_norm, row, x, own.sum);
    norm_row(model_.final_norm(), x, own.sum);
    to.put(model_.head().forms(), own.sum, place);
  };
  const auto wanted = static_cast<int64_t>(wanted_.size());
  if (alone_) {
    finish(0, 0, own.inputs);
  } else {
    const Share share = share_of(wanted, thread, pool_.size());
    for (int64_t i = share.begin; i < share.end; ++i) finish(wanted_[static_cast<size_t>(i)], i, inputs_);
    pool_.barrier();
  }
  product(thread, model_.head(), alone_ ? own.inputs : inputs_, wanted, logits_.data(), shape_.vocab_size);
}

void Engine::Pass::norm_row(const NormWeights& norm, const float* x, float* out) const {
  if (shape_.norm == Norm::kLayer) {
    kernels::LayerNormRow(x, norm.weight, norm.bias, shape_.epsilon, shape_.embed_dim, out);
  } else {
    kernels::RmsNormRow(x, norm.weight, shape_.epsilon, shape_.embed_dim, out);
  }
}

// x += y, or the norm of y.
void Engine::Pass::add_residual(const NormWeights& post_norm, int64_t row, float* x, float* spare) const {
  const float* y = y_ + row * shape_.embed_dim;
  if (post_norm.weight != nullptr) {
    norm_row(post_norm, y, spare);
    y = spare;
  }
  for (int64_t i = 0; i < shape_.embed_dim; ++i) x[i] += y[i];
}

void Engine::Pass::product(int thread, const Matrix& matrix, const Inputs& inputs, int64_t tokens, float* out, int64_t stride) {
  const Share share = share_of(matrix.groups(), thread, pool_.size());
  for (int64_t t = 0; t < tokens; t += kBlockTokens) {
    matrix.multiply(inputs, t, std::min(tokens, t + kBlockTokens), share.begin, share.end, out + t * stride, stride);
  }
}

// What a layer's attention reads of its normed rows.
void Engine::Pass::attention_products(int thread, int64_t index, const Inputs& inputs) {
  const LayerWeights& layer = model_.layers()[static_cast<size_t>(index)];
  const SumWeights& sums = layer.sums;
  static const Matrix kLater;
  const bool heads_later = shape_.mixes_heads(layer_shape(index)), latents_later = shape_.mixer != Mixer::kNone;
  const Piece pieces[] = {{heads_later ? &kLater : &layer.query, heads_, heads_stride_},
                          {heads_later ? &kLater : &layer.key, heads_ + key_offset_, heads_stride_},
                          {&layer.value, heads_ + value_offset_, heads_stride_},
                          {&layer.latent.gate, heads_ + gate_offset_, heads_stride_},
                          {&sums.decay, decay_, sums.decay.rows()},
                          {&sums.out_gate, out_gate_, sums.out_gate.rows()},
                          {&layer.mixer.recurrence, recurrence_, shape_.embed_dim},
                          {&layer.mixer.recurrence_input, recurrence_input_, shape_.embed_dim},
                          {latents_later ? &kLater : &sums.query, query_logits_, sums.query.rows()},
                          {latents_later ? &kLater : &sums.key, key_logits_, sums.key.rows()}};
  products(thread, pieces, inputs);
}

// Of mixed rows: the latents' logits, or without latents queries and keys.
void Engine::Pass::mixed_products(int thread, int64_t index, const Inputs& inputs) {
  const LayerWeights& layer = model_.layers()[static_cast<size_t>(index)];
  const SumWeights& sums = layer.sums;
  if (shape_.mixes_heads(layer_shape(index))) {
    const Piece pieces[] = {{&layer.query, heads_, heads_stride_}, {&layer.key, heads_ + key_offset_, heads_stride_}};
    products(thread, pieces, inputs);
  } else {
    const Piece pieces[] = {{&sums.query, query_logits_, sums.query.rows()}, {&sums.key, key_logits_, sums.key.rows()}};
    products(thread, pieces, inputs);
  }
}

void Engine::Pass::products(int thread, std::span<const Piece> pieces, const Inputs& inputs) {
  int64_t groups = 0;
  for (const Piece& piece : pieces) groups += piece.matrix->groups();
  const Share share = share_of(groups, thread, pool_.size());
  for (int64_t t = 0; t < rows_; t += kBlockTokens) {
    int64_t before = 0;
    for (const Piece& piece : pieces) {
      const int64_t begin = std::max(share.begin - before, int64_t{0});
      const int64_t end = std::min(share.end - before, piece.matrix->groups());
      if (begin < end) {
        piece.matrix->multiply(inputs, t, std::min(rows_, t + kBlockTokens), begin, end, piece.out + t * piece.stride,
                               piece.stride);
      }
      before += piece.matrix->groups();
    }
  }
}

// The first half: the same columns of both matrices (one, where it isn't gated) by one thread, which puts their product in its
// place.
void Engine::Pass::feed_forward(int thread, const LayerWeights& layer, const Inputs& inputs) {
  const Own& own = own_[static_cast<size_t>(thread)];
  constexpr int64_t kUnit = kernels::kQuantBlock;
  const int64_t stride = whole_groups(shape_.hidden_dim);
  const Share share = share_of((shape_.hidden_dim + kUnit - 1) / kUnit, thread, pool_.size());
  const int64_t first = share.begin * kUnit;
  const int64_t last = std::min(share.end * kUnit, shape_.hidden_dim);
  const int64_t first_group = first / kernels::kGroupRows;
  const int64_t last_group = (last + kernels::kGroupRows - 1) / kernels::kGroupRows;
  if (first == last) return;
  for (int64_t block = 0; block < rows_; block += kBlockTokens) {
    const int64_t end = std::min(rows_, block + kBlockTokens);
    const bool gated = static_cast<bool>(layer.gate);
    if (gated) layer.gate.multiply(inputs, block, end, first_group, last_group, own.gate, stride);
    layer.up.multiply(inputs, block, end, first_group, last_group, gated ? own.up : own.gate, stride);
    for (int64_t t = block; t < end; ++t) {
      float* gate = own.gate + (t - block) * stride + first;
      kernels::GateRow(shape_.gate, gate, gated ? own.up + (t - block) * stride + first : nullptr, last - first, gate);
      if (hidden_ != nullptr) {
        std::copy_n(gate, last - first, hidden_ + t * shape_.hidden_dim + first);
      } else {
        down_inputs_.put(layer.down_forms, gate, t, first, last);
      }
    }
  }
}

void Engine::Pass::turn(int64_t rotary, int64_t position, float* cos, float* sin) const {
  const std::vector<double>& frequencies = model_.frequencies()[static_cast<size_t>(rotary)];
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double angle = static_cast<double>(position) * frequencies[i];
    cos[i] = static_cast<float>(std::cos(angle));
    sin[i] = static_cast<float>(std::sin(angle));
  }
}

// Cosines and sines of every row's position.
void Engine::Pass::turn_rows(int thread) {
  const int64_t pairs = shape_.rotary_dims / 2;
  const Share share = share_of(rows_, thread, pool_.size());
  for (int64_t t = share.begin; t < share.end; ++t) {
    const Part& part = *part_of_[static_cast<size_t>(t)];
    const auto turn_row = [&](size_t rotary, int64_t position, const Turns& turns) {
      turn(static_cast<int64_t>(rotary), position, turns.cos + t * pairs, turns.sin + t * pairs);
      if (turns.back == nullptr) return;
      for (int64_t i = t * pairs; i < (t + 1) * pairs; ++i) turns.back[i] = -turns.sin[i];
    };
    const int64_t position = part.position + t - part.first;
    for (size_t r = 0; r < turns_.size(); ++r) turn_row(r, position, turns_[r]);
    for (size_t r = 0; r < evicted_turns_.size() && position >= evicted_window_; ++r) {
      turn_row(r, position - evicted_window_, evicted_turns_[r]);
    }
  }
}

}  // namespace latte::runtime
