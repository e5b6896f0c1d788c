#include "runtime/model_shape.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "formats/error.h"
#include "runtime/error.h"

namespace latte::runtime {
namespace {

constexpr int64_t kLargest = int64_t{1} << 24;  // of any size here: products of two fit easily
constexpr int64_t kLargestHead = 4096;

// What all architectures have in common.
ModelShape common(const formats::GgufFile& file, const std::string& name) {
  const formats::GgufMetadata& metadata = file.metadata();
  const auto key = [&](std::string_view rest) { return name + "." + std::string(rest); };
  const auto size = [&](std::string_view rest) { return metadata.integer(key(rest), 1, kLargest); };
  ModelShape shape;
  shape.architecture = name;
  shape.embed_dim = size("embedding_length");
  shape.num_heads = metadata.integer(key("attention.head_count"), 1, 4096);
  shape.num_kv_heads = metadata.integer_or(key("attention.head_count_kv"), shape.num_heads, 1, 4096);
  if (shape.num_heads % shape.num_kv_heads != 0) {
    metadata.refuse(key("attention.head_count_kv"), "a divisor of " + std::to_string(shape.num_heads) + " heads");
  }
  const int64_t default_dim = std::max<int64_t>(1, shape.embed_dim / shape.num_heads);
  shape.key_dim = metadata.integer_or(key("attention.key_length"), default_dim, 1, kLargestHead);
  shape.head_dim = metadata.integer_or(key("attention.value_length"), default_dim, 1, kLargestHead);
  shape.hidden_dim = size("feed_forward_length");
  shape.context = size("context_length");
  shape.epsilon = static_cast<float>(metadata.number(key("attention.layer_norm_rms_epsilon")));
  shape.attention_scale = 1.0f / std::sqrt(static_cast<float>(shape.key_dim));
  shape.rotary_dims = metadata.integer_or(key("rope.dimension_count"), shape.key_dim, 2, shape.key_dim) / 2 * 2;
  shape.layers.resize(static_cast<size_t>(metadata.integer(key("block_count"), 1, 1024)));
  const std::string scaling = metadata.string_or(key("rope.scaling.type"), "none");
  if (scaling != "none" && scaling != "linear") metadata.refuse(key("rope.scaling.type"), "none or linear");
  Rotary rotary;
  rotary.base = metadata.number_or(key("rope.freq_base"), 10000.0);
  if (!(rotary.base > 0.0)) metadata.refuse(key("rope.freq_base"), "a number above 0");
  if (scaling == "linear") {
    const double factor = metadata.number_or(key("rope.scaling.factor"), 1.0);
    if (!(factor > 0.0)) metadata.refuse(key("rope.scaling.factor"), "a number above 0");
    rotary.scale = 1.0 / factor;
  }
  shape.rotary = {rotary};
  const formats::GgufTensor& embedding = file.at("token_embd.weight");
  if (embedding.shape.size() != 2) throw ModelError(file.path() + ": token_embd.weight isn't a matrix");
  shape.vocab_size = embedding.shape[0];
  return shape;
}

ModelShape llama(const formats::GgufFile& file) {
  ModelShape shape = common(file, "llama");
  if (file.metadata().integer_or("llama.expert_count", 0, 0, kLargest) > 0) {
    throw ModelError(file.path() + ": mixtures of experts aren't known here");
  }
  return shape;
}

ModelShape gemma3(const formats::GgufFile& file) {
  constexpr size_t kPattern = 6;  // the last of so many layers reads every token
  ModelShape shape = common(file, "gemma3");
  shape.gate = kernels::Gate::kGeluTanh;
  shape.post_norms = true;
  shape.query_norms = true;
  shape.pairs = kernels::RotaryPairs::kHalves;
  shape.embedding_scale = std::sqrt(static_cast<float>(shape.embed_dim));
  const int64_t window = file.metadata().integer("gemma3.attention.sliding_window", 0, kLargest);
  shape.rotary.push_back({10000.0, 1.0});
  for (size_t i = 0; i < shape.layers.size(); ++i) {
    if (window == 0 || i % kPattern == kPattern - 1) continue;
    shape.layers[i].window = window;
    shape.layers[i].rotary = 1;
  }
  return shape;
}

struct Architecture {
  std::string_view name;
  ModelShape (*read)(const formats::GgufFile&);
};
constexpr std::array kArchitectures = {Architecture{"llama", llama}, Architecture{"gemma3", gemma3}};

}  // namespace

bool ModelShape::constant_state() const {
  return std::all_of(layers.begin(), layers.end(), [](const LayerShape& layer) { return layer.window > 0 || !layer.tokens; });
}

ModelShape ModelShape::from(const formats::LanguageModelConfig& config) {
  const std::string position = config.position_name();
  const bool macchiato = config.attention == "macchiato", latte = config.attention == "latte";
  const bool absolute = position == "none" || position == "learned" || position == "sinusoidal";
  ModelShape shape;
  shape.architecture = "latte";
  shape.embed_dim = config.embed_dim;
  shape.num_heads = config.num_heads;
  shape.num_kv_heads = config.kv_heads();
  shape.key_dim = shape.head_dim = config.embed_dim / config.num_heads;
  if (shape.head_dim > kLargestHead) {
    throw ModelError("heads of " + std::to_string(shape.head_dim) + " channels, at most " + std::to_string(kLargestHead) +
                     " are run here");
  }
  shape.hidden_dim = config.hidden_dim();
  shape.vocab_size = config.vocab_size;
  shape.context = config.max_positions;
  shape.attention_scale = 1.0f / std::sqrt(static_cast<float>(shape.key_dim));
  shape.norm = config.norm == "rms" ? Norm::kRms : Norm::kLayer;
  shape.gated = config.mlp == "gated";
  shape.gate = shape.gated ? kernels::Gate::kSilu : kernels::Gate::kGelu;
  shape.pairs = kernels::RotaryPairs::kHalves;
  const bool rotates = position == "rotary" || (macchiato && !absolute);
  shape.rotary = {{config.rope_base, rotates ? 1.0 : 0.0}};
  if (position == "vapor") {
    shape.vapor = static_cast<int64_t>(shape.rotary.size());
    shape.rotary.push_back({10000.0, 1.0});
  }
  shape.rotary_dims = rotates || shape.vapor >= 0 ? shape.key_dim : 0;
  shape.latents_of_input = true;
  shape.mixer = position == "conv" ? Mixer::kConv : position == "rg_lru" ? Mixer::kRgLru : Mixer::kNone;
  shape.conv_width = config.conv_width;
  shape.sinusoidal = position == "sinusoidal";
  shape.learned_positions = position == "learned" ? config.max_positions : 0;
  LayerShape layer;
  if (macchiato || latte) layer.latents = config.num_latents.value_or(shape.head_dim);
  if (macchiato || config.attention == "window") {
    layer.window = config.window;
    layer.sinks = config.sinks;
  }
  if (config.attention == "linear") layer.linear = Linear::kNormalised;
  if (config.attention == "gated_linear") layer.linear = Linear::kGated;
  layer.tokens = !latte && layer.linear == Linear::kNone;
  shape.layers.assign(static_cast<size_t>(config.num_layers), layer);
  return shape;
}

ModelShape ModelShape::from(const formats::GgufFile& file) {
  const std::string& name = file.metadata().string("general.architecture");
  std::string known;
  for (const Architecture& architecture : kArchitectures) {
    if (name == architecture.name) return architecture.read(file);
    known += (known.empty() ? "" : ", ") + std::string(architecture.name);
  }
  throw ModelError(file.path() + ": architecture " + formats::quote(name) + " isn't known here; these are: " + known);
}

}  // namespace latte::runtime
