#include "runtime/model_shape.h"

#include <algorithm>
#include <cmath>

#include "formats/decoder_config.h"
#include "runtime/error.h"

namespace latte::runtime {
namespace {

constexpr int64_t kLargestHead = 4096;
constexpr int64_t kLargestContext = int64_t{1} << 24;  // so that sizes of sessions fit 63 bits

// The engine has no code for these, and would be silently wrong with them.
void require_known(const std::string& path, const formats::DecoderConfig& config) {
  const auto refuse = [&](const std::string& what) { throw ModelError(path + ": " + what + " isn't known here"); };
  if (config.attention_softcap > 0 || config.logit_softcap > 0)
    refuse("a soft cap on scores or logits (of " + config.architecture + ")");
  for (const formats::RopeConfig* rope : {&config.rope, &config.local_rope}) {
    const auto kind = rope->scaling.kind;
    if (kind == formats::RopeScalingKind::kNone || kind == formats::RopeScalingKind::kLinear) continue;
    refuse("rotary scaling other than none or linear");
  }
  if (config.rope_factors && config.window > 0) refuse("a divisor of frequencies beside local layers");
  if (config.context_length > kLargestContext) {
    refuse("a context of " + std::to_string(config.context_length) + " tokens, more than " + std::to_string(kLargestContext) +
           ",");
  }
  if (config.head_dim > kLargestHead) {
    refuse("heads of " + std::to_string(config.head_dim) + " channels, more than " + std::to_string(kLargestHead) + ",");
  }
}

Rotary rotary_of(const formats::RopeConfig& rope) {
  return {rope.base, rope.scaling.kind == formats::RopeScalingKind::kLinear ? 1.0 / rope.scaling.factor : 1.0};
}

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
  const formats::DecoderConfig config = formats::decoder_config(file);
  require_known(file.path(), config);
  ModelShape shape;
  shape.architecture = config.architecture;
  shape.embed_dim = config.embed_dim;
  shape.num_heads = config.num_heads;
  shape.num_kv_heads = config.num_kv_heads;
  shape.key_dim = shape.head_dim = config.head_dim;
  shape.hidden_dim = config.hidden_dim;
  shape.vocab_size = config.vocab_size;
  shape.context = config.context_length;
  shape.epsilon = static_cast<float>(config.norm_eps);
  shape.embedding_scale = static_cast<float>(config.embedding_scale);
  shape.attention_scale = static_cast<float>(config.attention_scale);
  shape.gate = config.activation == formats::Activation::kGelu ? kernels::Gate::kGeluTanh : kernels::Gate::kSilu;
  shape.post_norms = config.post_norms;
  shape.query_norms = config.qk_norm;
  shape.pairs =
      config.rope.pairs == formats::RopePairs::kHalves ? kernels::RotaryPairs::kHalves : kernels::RotaryPairs::kNeighbours;
  shape.rotary_dims = config.rope.dims;
  shape.rotary = {rotary_of(config.rope)};
  if (config.window > 0) shape.rotary.push_back(rotary_of(config.local_rope));
  shape.layers.resize(static_cast<size_t>(config.num_layers));
  for (int64_t i = 0; i < config.num_layers; ++i) {
    if (!config.is_local(i)) continue;
    shape.layers[static_cast<size_t>(i)].window = config.window;
    shape.layers[static_cast<size_t>(i)].rotary = 1;
  }
  return shape;
}

}  // namespace latte::runtime
