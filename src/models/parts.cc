#include "models/parts.h"

#include <cmath>
#include <numbers>
#include <string>

#include "nn/linear_attention.h"
#include "nn/softmax_attention.h"

namespace latte::models {
namespace {

constexpr double kInitialDeviation = 0.02;

// With what every kind of attention is told.
template <typename Options>
Options attention_options(const formats::LanguageModelConfig& config) {
  Options options;
  options.embed_dim = config.embed_dim;
  options.num_heads = config.num_heads;
  options.dropout = config.dropout;
  options.bias = config.bias;
  options.batch_first = true;
  return options;
}

}  // namespace

std::shared_ptr<nn::AttentionImpl> make_attention(const formats::LanguageModelConfig& config) {
  const std::string position = config.position_name();
  const bool absolute = position == "none" || position == "learned" || position == "sinusoidal";
  const auto of_its_own = absolute || position == "rotary" ? nn::LatentPosition::kNone : nn::parse_latent_position(position);
  if (config.attention == "latte" || config.attention == "macchiato") {
    auto options = attention_options<nn::MacchiatoAttentionOptions>(config);
    options.num_latents = config.num_latents;
    options.num_kv_heads = config.kv_heads();
    options.position = of_its_own;
    options.conv_width = config.conv_width;
    options.forget = config.forgets();
    options.decay_rank = config.decay_rank;
    if (config.attention == "latte") return std::make_shared<nn::LatteAttentionImpl>(options);
    options.window = config.window;
    options.sinks = config.sinks;
    options.rope = !absolute;
    options.rope_base = config.rope_base;
    return std::make_shared<nn::MacchiatoAttentionImpl>(options);
  }
  if (config.attention == "linear" || config.attention == "gated_linear") {
    auto options = attention_options<nn::LinearAttentionOptions>(config);
    options.num_kv_heads = config.num_kv_heads;
    options.kind = config.attention == "linear" ? nn::LinearKind::kNormalised : nn::LinearKind::kGated;
    options.position = of_its_own;
    options.conv_width = config.conv_width;
    return std::make_shared<nn::LinearAttentionImpl>(options);
  }
  if (config.attention == "linformer") {
    auto options = attention_options<nn::LinformerAttentionOptions>(config);
    options.max_positions = config.max_positions;
    options.projected = config.projected;
    options.position = of_its_own;
    options.conv_width = config.conv_width;
    return std::make_shared<nn::LinformerAttentionImpl>(options);
  }
  auto options = attention_options<nn::SoftmaxAttentionOptions>(config);
  options.num_kv_heads = config.num_kv_heads;
  options.rope = position == "rotary";
  options.rope_base = config.rope_base;
  options.position = of_its_own;
  options.conv_width = config.conv_width;
  if (config.attention == "window") {
    options.window = config.window;
    options.sinks = config.sinks;
  }
  return std::make_shared<nn::SoftmaxAttentionImpl>(options);
}

nn::BlockOptions block_options(const formats::LanguageModelConfig& config) {
  nn::BlockOptions block;
  block.embed_dim = config.embed_dim;
  block.hidden_dim = config.hidden_dim();
  block.norm = config.norm == "batch" ? nn::NormKind::kBatch : config.norm == "rms" ? nn::NormKind::kRms : nn::NormKind::kLayer;
  block.mlp = config.mlp == "gated" ? nn::MlpKind::kGated : nn::MlpKind::kGelu;
  block.bias = config.bias;
  block.dropout = config.dropout;
  return block;
}

void initialise(torch::nn::Module& model, int64_t num_layers) {
  torch::NoGradGuard no_grad;
  const double residual = kInitialDeviation / std::sqrt(2.0 * static_cast<double>(num_layers));
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto& name = item.key();
    if (auto* linear = item.value()->as<torch::nn::Linear>()) {
      const bool writes_residual = name.ends_with(".out_proj") || name.ends_with(".down_proj");
      linear->weight.normal_(0.0, writes_residual ? residual : kInitialDeviation);
      if (linear->bias.defined()) linear->bias.zero_();
    } else if (auto* embedding = item.value()->as<torch::nn::Embedding>()) {
      embedding->weight.normal_(0.0, kInitialDeviation);
    }
  }
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (auto* attention = module->as<nn::LatentAttentionImpl>()) attention->reset_decay();
  }
}

at::Tensor sinusoidal_positions(int64_t begin, int64_t time, const at::Tensor& like) {
  const int64_t dim = like.size(-1), pairs = (dim + 1) / 2;
  const auto rates = torch::exp(torch::arange(pairs, torch::kFloat64) * (-2.0 * std::log(10000.0) / static_cast<double>(dim)));
  const auto angles = torch::arange(begin, begin + time, torch::kFloat64).unsqueeze(1) * rates;
  // Waves of amplitude 1 would drown the tokens.
  const auto waves = torch::stack({angles.sin(), angles.cos()}, -1).flatten(1).slice(1, 0, dim);
  return (waves * (kInitialDeviation * std::numbers::sqrt2)).to(like.options());
}

}  // namespace latte::models
