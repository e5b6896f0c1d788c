#include "runtime/model.h"

#include <ggml-cpu.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <initializer_list>
#include <numbers>
#include <random>
#include <thread>
#include <utility>

#include "formats/hash.h"
#include "runtime/error.h"

namespace latte::runtime {
namespace {

std::string in_brackets(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

int loading_threads(int wanted) {
  return wanted > 0 ? wanted : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

bool is_checkpoint(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::is_directory(path, ignored) || path.ends_with(".safetensors");
}

std::shared_ptr<const Model> Model::open(const std::string& path, const ModelOptions& options) {
  ggml_cpu_init();  // its tables of half-precision numbers
  if (is_checkpoint(path)) {
    const std::shared_ptr<Model> model(new Model(formats::checkpoint_path(path), options));
    model->load_checkpoint();
    return model;
  }
  const std::shared_ptr<Model> model(new Model(path, options));
  model->file_.emplace(path);
  model->load();
  return model;
}

// The repacked weights take about the room of the file's.
void Model::require_memory(uint64_t file_bytes) const {
  if (file_bytes <= available_memory()) return;
  throw MemoryError(path_ + ": " + std::to_string(file_bytes >> 20) + " MB of weights, " +
                    std::to_string(available_memory() >> 20) + " MB of memory are free");
}

// The layers that an adapter, or a merged model, says are converted.
void Model::convert(const formats::AdapterSpec& spec) {
  for (size_t i = 0; i < shape_.layers.size(); ++i) {
    if (i >= spec.latents.size() || spec.latents[i] < 0) continue;
    shape_.layers[i].window = spec.window;
    shape_.layers[i].sinks = spec.sinks;
    shape_.layers[i].latents = spec.latents[i];
    shape_.layers[i].evicted = spec.evicted && spec.latents[i] > 0;
    const std::string block = "blk." + std::to_string(i) + ".latte_";
    shape_.layers[i].floor = shape_.layers[i].evicted && find(block + "floor") != nullptr;
    shape_.layers[i].key_conv = shape_.layers[i].evicted && find(block + "conv.weight") != nullptr;
  }
  shape_.far_limit = spec.far_limit;
}

void Model::load() {
  if (formats::is_adapter(file_->metadata())) throw ModelError(path_ + ": an adapter, not a model: it needs its base");
  shape_ = ModelShape::from(*file_);
  const AttentionChoice& choice = options_.attention;
  if (!options_.adapter.empty()) {
    adapter_.emplace(options_.adapter);
    adapter_->check_fits(*file_);
    convert(adapter_->spec());
  } else if (const auto spec = formats::merged_spec(*file_)) {
    convert(*spec);
  } else if (choice.window > 0) {
    for (LayerShape& layer : shape_.layers) {
      if (layer.window > 0) continue;
      layer.window = choice.window;
      layer.sinks = choice.sinks;
      layer.latents = choice.latents;
      layer.evicted = choice.latents > 0;
    }
    shape_.far_limit = choice.far_limit;
  }
  require_memory(file_->size());
  ThreadPool pool(loading_threads(options_.threads));
  const formats::GgufTensor& embedding = tensor("token_embd.weight", {shape_.vocab_size, shape_.embed_dim});
  if (!formats::can_dequantize(embedding.type)) {
    throw ModelError(path_ + ": token_embd.weight: type " + std::string(formats::name_of(embedding.type)) + " can't be read");
  }
  embedding_type_ = embedding.type;
  embedding_ = embedding.data;
  final_norm_.weight = floats("output_norm.weight", {shape_.embed_dim});
  const bool tied = find("output.weight") == nullptr;
  head_ = matrix(tied ? "token_embd.weight" : "output.weight", shape_.vocab_size, shape_.embed_dim, pool);
  weight_bytes_ = head_.bytes();
  layers_.resize(shape_.layers.size());
  for (size_t i = 0; i < layers_.size(); ++i) load_layer(static_cast<int64_t>(i), pool);

  const formats::GgufTensor* factors = file_->find("rope_freqs.weight");
  const int64_t pairs = shape_.rotary_dims / 2;
  set_frequencies(factors == nullptr ? nullptr : floats("rope_freqs.weight", {pairs}));
  formats::Hash hash;
  hash.add(file_->bytes());
  if (adapter_) hash.add(adapter_->file().bytes());
  hash.add(static_cast<uint64_t>(options_.adapter_in_base_type));
  hash.add(options_.type ? static_cast<uint64_t>(*options_.type) + 1 : 0);
  for (const LayerShape& layer : shape_.layers) {
    for (const int64_t number : {layer.window, layer.sinks, layer.latents}) hash.add(static_cast<uint64_t>(number));
    hash.add(static_cast<uint64_t>(layer.evicted));
  }
  state_hash_ = hash.digits();
  // What was repacked isn't read again: the pages of the file may go.
  const auto bytes = file_->bytes();
  ::madvise(const_cast<std::byte*>(bytes.data()), bytes.size(), MADV_DONTNEED);
}

// `factors` [rotary_dims / 2] divide them, or null.
void Model::set_frequencies(const float* factors) {
  const int64_t pairs = shape_.rotary_dims / 2;
  for (const Rotary& rotary : shape_.rotary) {
    std::vector<double>& frequencies = frequencies_.emplace_back(static_cast<size_t>(pairs));
    for (int64_t i = 0; i < pairs; ++i) {
      frequencies[static_cast<size_t>(i)] =
          rotary.scale * std::pow(rotary.base, -2.0 * static_cast<double>(i) / static_cast<double>(2 * pairs)) /
          (factors == nullptr ? 1.0 : static_cast<double>(factors[i]));
    }
  }
}

void Model::load_layer(int64_t index, ThreadPool& pool) {
  LayerWeights& layer = layers_[static_cast<size_t>(index)];
  const std::string block = "blk." + std::to_string(index) + ".";
  const ModelShape& s = shape_;
  layer.attention_norm.weight = floats(block + "attn_norm.weight", {s.embed_dim});
  layer.feed_forward_norm.weight = floats(block + "ffn_norm.weight", {s.embed_dim});
  if (s.post_norms) {
    layer.attention_post_norm.weight = floats(block + "post_attention_norm.weight", {s.embed_dim});
    layer.feed_forward_post_norm.weight = floats(block + "post_ffw_norm.weight", {s.embed_dim});
  }
  if (s.query_norms) {
    layer.query_norm = floats(block + "attn_q_norm.weight", {s.key_dim});
    layer.key_norm = floats(block + "attn_k_norm.weight", {s.key_dim});
  }
  layer.query = matrix(block + "attn_q.weight", s.num_heads * s.key_dim, s.embed_dim, pool);
  layer.key = matrix(block + "attn_k.weight", s.num_kv_heads * s.key_dim, s.embed_dim, pool);
  layer.value = matrix(block + "attn_v.weight", s.num_kv_heads * s.head_dim, s.embed_dim, pool);
  layer.output = matrix(block + "attn_output.weight", s.embed_dim, s.num_heads * s.head_dim, pool);
  layer.gate = matrix(block + "ffn_gate.weight", s.hidden_dim, s.embed_dim, pool);
  layer.up = matrix(block + "ffn_up.weight", s.hidden_dim, s.embed_dim, pool);
  layer.down = matrix(block + "ffn_down.weight", s.embed_dim, s.hidden_dim, pool);
  if (s.layers[static_cast<size_t>(index)].latents > 0) {
    if (find(block + "latte_query.weight") != nullptr) {
      load_latents(index, pool);
    } else {
      make_latents(index, pool);
    }
  }
  finish_layer(s.layers[static_cast<size_t>(index)], layer);
}

// Which forms of inputs a layer's products read, and how many bytes of weights.
void Model::finish_layer(const LayerShape& attends, LayerWeights& layer) {
  const auto add = [this](InputForms& forms, std::initializer_list<const Matrix*> matrices) {
    for (const Matrix* m : matrices) {
      forms.add(m->forms());
      weight_bytes_ += m->bytes();
    }
  };
  InputForms& of_latents = shape_.mixer == Mixer::kNone ? layer.attention_forms : layer.mixed_forms;
  InputForms& of_heads = shape_.mixes_heads(attends) ? layer.mixed_forms : layer.attention_forms;
  add(layer.attention_forms, {&layer.value, &layer.latent.gate, &layer.sums.decay, &layer.sums.out_gate, &layer.mixer.recurrence,
                              &layer.mixer.recurrence_input});
  add(of_heads, {&layer.query, &layer.key});
  add(of_latents, {&layer.sums.query, &layer.sums.key});
  add(layer.output_forms, {&layer.output});
  add(layer.feed_forward_forms, {&layer.gate, &layer.up});
  add(layer.down_forms, {&layer.down});
  for (const Matrix& m : layer.latent.query) layer.query_head_forms.add(m.forms());
  for (const Matrix& m : layer.latent.key) layer.key_head_forms.add(m.forms());
}

void Model::load_latents(int64_t index, ThreadPool& pool) {
  const ModelShape& s = shape_;
  const int64_t latents = s.layers[static_cast<size_t>(index)].latents;
  const std::string block = "blk." + std::to_string(index) + ".latte_";
  LatentWeights& weights = layers_[static_cast<size_t>(index)].latent;
  const auto heads = [&](const std::string& name, int64_t count, std::vector<Matrix>& to) {
    const formats::GgufTensor& found = tensor(name, {count, latents, s.key_dim});
    const size_t bytes = found.data.size() / static_cast<size_t>(count);
    for (int64_t h = 0; h < count; ++h) {
      to.emplace_back(found, found.data.data() + static_cast<size_t>(h) * bytes, latents, s.key_dim, arena_, pool);
    }
  };
  heads(block + "query.weight", s.num_heads, weights.query);
  heads(block + "key.weight", s.num_kv_heads, weights.key);
  const formats::GgufTensor& gate = tensor(block + "gate.weight", {s.num_heads, s.embed_dim});
  weights.gate = Matrix(gate, gate.data.data(), s.num_heads, s.embed_dim, arena_, pool);
  weights.query_bias = floats(block + "query.bias", {s.num_heads, latents});
  weights.key_bias = floats(block + "key.bias", {s.num_kv_heads, latents});
  weights.gate_bias = floats(block + "gate.bias", {s.num_heads});
  weights.gate_slope = floats(block + "gate.slope", {s.num_heads});
  if (s.layers[static_cast<size_t>(index)].floor) weights.floor = floats(block + "floor", {s.num_kv_heads, latents});
  if (s.layers[static_cast<size_t>(index)].key_conv) {
    weights.key_conv = floats(block + "conv.weight", {s.num_kv_heads, s.key_dim, formats::kKeyConvWidth});
  }
  if (find(block + "decay") == nullptr) return;
  const float* decay = floats(block + "decay", {s.num_kv_heads, latents});
  float* log_decay = arena_.take_array<float>(s.num_kv_heads * latents);
  for (int64_t i = 0; i < s.num_kv_heads * latents; ++i) log_decay[i] = -std::exp(decay[i]);
  weights.log_decay = log_decay;
}

// For a layer without trained latents: random ones, which cost what trained ones cost.
void Model::make_latents(int64_t index, ThreadPool& pool) {
  const ModelShape& s = shape_;
  const int64_t latents = s.layers[static_cast<size_t>(index)].latents;
  LatentWeights& weights = layers_[static_cast<size_t>(index)].latent;
  std::mt19937_64 random(static_cast<uint64_t>(index));
  std::normal_distribution<float> normal(0.0f, 1.0f);
  const auto random_floats = [&](int64_t count, float deviation) {
    float* out = arena_.take_array<float>(count);
    for (int64_t i = 0; i < count; ++i) out[i] = deviation * normal(random);
    return out;
  };
  const auto random_matrix = [&](int64_t rows, int64_t columns, float deviation) {
    std::vector<float> values(static_cast<size_t>(rows * columns));
    for (float& value : values) value = deviation * normal(random);
    const formats::TensorType type = columns % kernels::kQuantBlock == 0 ? formats::TensorType::kQ8_0 : formats::TensorType::kF32;
    const std::vector<std::byte> bytes = formats::quantize(type, values, columns);
    return Matrix({"random", type, {rows, columns}}, bytes.data(), rows, columns, arena_, pool);
  };
  for (int64_t h = 0; h < s.num_heads; ++h) weights.query.push_back(random_matrix(latents, s.key_dim, 0.05f));
  for (int64_t h = 0; h < s.num_kv_heads; ++h) weights.key.push_back(random_matrix(latents, s.key_dim, 0.05f));
  weights.gate = random_matrix(s.num_heads, s.embed_dim, 0.02f);
  weights.query_bias = random_floats(s.num_heads * latents, 0.1f);
  weights.key_bias = random_floats(s.num_kv_heads * latents, 0.1f);
  weights.gate_bias = random_floats(s.num_heads, 0.1f);
  weights.gate_slope = random_floats(s.num_heads, 0.1f);
  float* decay = random_floats(s.num_kv_heads * latents, 1.0f);
  for (int64_t i = 0; i < s.num_kv_heads * latents; ++i) decay[i] = -std::exp(decay[i] - 6.0f);
  weights.log_decay = decay;
}

const formats::GgufTensor* Model::find(const std::string& name) const {
  if (adapter_) {
    const formats::GgufTensor* found = adapter_->file().find(name);
    if (found != nullptr || formats::is_added_tensor(name)) return found;  // latents are all the adapter's
  }
  return file_->find(name);
}

const formats::GgufTensor& Model::tensor(const std::string& name, const std::vector<int64_t>& shape) const {
  const formats::GgufTensor* found = find(name);
  if (found == nullptr) throw ModelError(path_ + ": tensor " + name + " is missing, expected " + in_brackets(shape));
  if (!formats::same_shape(found->shape, shape)) {
    throw ModelError(path_ + ": tensor " + name + " is " + in_brackets(found->shape) + ", expected " + in_brackets(shape));
  }
  return *found;
}

Matrix Model::matrix(const std::string& name, int64_t rows, int64_t columns, ThreadPool& pool) {
  const formats::GgufTensor& found = tensor(name, {rows, columns});
  formats::TensorType type = options_.type.value_or(found.type);
  const formats::GgufTensor* base = file_->find(name);
  if (!options_.type && options_.adapter_in_base_type && base != nullptr) type = base->type;
  return converted(found, found.data, type, rows, columns, pool);
}

// [rows, columns] of `data`, which outlives the model, in `type` where that can be.
Matrix Model::converted(formats::GgufTensorSpec spec, std::span<const std::byte> data, formats::TensorType type, int64_t rows,
                        int64_t columns, ThreadPool& pool) {
  if (type == spec.type || !formats::can_quantize(type) || columns % formats::block_size(type) != 0) {
    return Matrix(spec, data.data(), rows, columns, arena_, pool);
  }
  std::vector<float> values(static_cast<size_t>(rows * columns));
  formats::dequantize(spec.type, data, values);
  const std::vector<std::byte> bytes = formats::quantize(type, values, columns);
  spec.type = type;
  Matrix converted(spec, bytes.data(), rows, columns, arena_, pool);
  if (!converted.is_mapped()) return converted;
  // The bytes are read where they lie: they get a place that lasts.
  std::byte* kept = arena_.take(bytes.size());
  std::copy(bytes.begin(), bytes.end(), kept);
  return Matrix(spec, kept, rows, columns, arena_, pool);
}

const float* Model::floats(const std::string& name, const std::vector<int64_t>& shape) {
  const formats::GgufTensor& found = tensor(name, shape);
  if (!formats::can_dequantize(found.type)) {
    throw ModelError(path_ + ": tensor " + name + ": type " + std::string(formats::name_of(found.type)) + " can't be read");
  }
  const int64_t count = found.elements();
  float* out = arena_.take_array<float>(count);
  formats::dequantize(found.type, found.data, {out, static_cast<size_t>(count)});
  return out;
}

void Model::embed(int32_t token, int64_t position, float* out) const {
  const size_t row_bytes = embedding_.size() / static_cast<size_t>(shape_.vocab_size);
  const std::span<float> row(out, static_cast<size_t>(shape_.embed_dim));
  formats::dequantize(embedding_type_, embedding_.subspan(static_cast<size_t>(token) * row_bytes, row_bytes), row);
  if (shape_.embedding_scale != 1.0f) {
    for (float& value : row) value *= shape_.embedding_scale;
  }
  if (position_embedding_ != nullptr) {
    const float* added = position_embedding_ + position * shape_.embed_dim;
    for (size_t i = 0; i < row.size(); ++i) row[i] += added[i];
  }
  for (size_t i = 0; i < sinusoid_rates_.size(); ++i) {
    constexpr double kAmplitude = 0.02 * std::numbers::sqrt2;  // models/parts.h: the deviation of fresh embeddings
    const double angle = static_cast<double>(position) * sinusoid_rates_[i];
    row[2 * i] += static_cast<float>(kAmplitude * std::sin(angle));
    if (2 * i + 1 < row.size()) row[2 * i + 1] += static_cast<float>(kAmplitude * std::cos(angle));
  }
}

}  // namespace latte::runtime
