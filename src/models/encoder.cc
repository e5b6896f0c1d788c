#include "models/encoder.h"

#include <nlohmann/json.hpp>

#include "models/parts.h"

namespace latte::models {
namespace {

using nlohmann::json;

[[noreturn]] void fail(const std::string& field, const std::string& got, const std::string& expected) {
  throw formats::ConfigError("model config: " + field + " is " + got + ", expected " + expected);
}

std::string shown(const json& value) { return value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace); }

void check_name(const std::string& field, const std::string& value, std::initializer_list<const char*> choices) {
  std::string all;
  for (const char* choice : choices) {
    if (value == choice) return;
    all += (all.empty() ? "" : ", ") + std::string(choice);
  }
  fail(field, shown(value), "one of " + all);
}

}  // namespace

EncoderConfig::EncoderConfig() {
  position = "sinusoidal";
  bias = true;
}

int64_t EncoderConfig::parameter_count() const {
  formats::LanguageModelConfig body = *this;
  body.tie_embeddings = true;
  if (!causal && !forget) body.forget = false;
  const int64_t bias_size = bias ? 1 : 0;
  int64_t total = body.parameter_count() + num_outputs * (embed_dim + bias_size);
  if (pooled_norm != "none") total += embed_dim * (1 + bias_size);
  if (head == "pairs") total += embed_dim * (4 * embed_dim + bias_size);
  return total;
}

void EncoderConfig::validate() const {
  formats::LanguageModelConfig body = *this;
  if (!causal && !forget) body.forget = false;
  body.validate(Role::kEncoder);
  check_name("head", head, {"classify", "pairs", "tokens"});
  check_name("pooling", pooling, {"mean", "first", "last"});
  check_name("pooled_norm", pooled_norm, {"none", "batch"});
  if (pooled_norm != "none" && head == "tokens") fail("pooled_norm", shown(pooled_norm), "none where tokens are answered");
  if (num_outputs < 1 || num_outputs > (1 << 24)) fail("num_outputs", std::to_string(num_outputs), "an integer in 1 … 16777216");
  if (!causal && body.forgets()) fail("forget", "true", "false unless causal: a bidirectional reader has no past to forget");
  if (!causal && attention == "macchiato" && sinks > 0)
    fail("sinks", std::to_string(sinks), "0 unless causal: latents read the start");
  if (causal && attention == "linformer") fail("attention", "linformer", "another where causal: it reads the whole sequence");
  if (causal && norm == "batch") fail("norm", "batch", "layer or rms where causal: a batch's statistics see the future");
  if (causal && head != "tokens" && pooling == "first") fail("pooling", "first", "mean or last where causal");
}

json EncoderConfig::to_json() const {
  formats::LanguageModelConfig body = *this;
  if (!causal && !forget) body.forget = false;
  json object = body.to_json();
  object["head"] = head;
  object["pooling"] = pooling;
  object["pooled_norm"] = pooled_norm;
  object["causal"] = causal;
  object["num_outputs"] = num_outputs;
  return object;
}

EncoderConfig EncoderConfig::from_json(const json& object) {
  if (!object.is_object()) throw formats::ConfigError("model config: expected a JSON object, got " + shown(object));
  EncoderConfig config;
  json body = object;
  const auto take = [&]<typename T>(const char* field, T& into, bool right, const char* expected) {
    if (!body.contains(field)) return;
    if (!right) fail(field, shown(body.at(field)), expected);
    into = body.at(field).get<T>();
    body.erase(field);
  };
  const auto found = [&](const char* field) { return body.value(field, json()); };
  take("head", config.head, found("head").is_string(), "a string");
  take("pooling", config.pooling, found("pooling").is_string(), "a string");
  take("pooled_norm", config.pooled_norm, found("pooled_norm").is_string(), "a string");
  take("causal", config.causal, found("causal").is_boolean(), "true or false");
  take("num_outputs", config.num_outputs, found("num_outputs").is_number_integer(), "an integer");
  if (!config.causal && !body.contains("forget")) body["forget"] = false;
  if (!body.contains("position")) body["position"] = "sinusoidal";
  if (!body.contains("bias")) body["bias"] = true;
  static_cast<formats::LanguageModelConfig&>(config) = formats::LanguageModelConfig::from_json(body, Role::kEncoder);
  config.validate();
  return config;
}

EncoderImpl::EncoderImpl(const EncoderConfig& config) : config_(config) {
  config.validate();
  if (!config_.causal && !config_.forget) config_.forget = false;
  const nn::BlockOptions block = block_options(config);
  token_embedding = register_module("token_embedding", torch::nn::Embedding(config.vocab_size, config.embed_dim));
  if (config.position_name() == "learned") {
    position_embedding = register_module("position_embedding", torch::nn::Embedding(config.max_positions, config.embed_dim));
  }
  blocks = register_module("blocks", torch::nn::ModuleList());
  for (int64_t i = 0; i < config.num_layers; ++i) blocks->push_back(nn::Block(block, make_attention(config_)));
  final_norm = register_module("final_norm", nn::Norm(block.norm, config.embed_dim, config.bias));
  if (config.pooled_norm == "batch") {
    pooled_norm = register_module("pooled_norm", nn::Norm(nn::NormKind::kBatch, config.embed_dim, config.bias));
  }
  if (config.head == "pairs") {
    pair_proj = register_module("pair_proj", nn::make_linear(4 * config.embed_dim, config.embed_dim, config.bias));
  }
  output_proj = register_module("output_proj", nn::make_linear(config.embed_dim, config.num_outputs, config.bias));
  reset_parameters();
}

void EncoderImpl::reset_parameters() { initialise(*this, config_.num_layers); }

void EncoderImpl::set_batch_peers(nn::BatchPeers* peers) {
  for (const auto& module : modules(/*include_self=*/false)) {
    if (auto* norm = module->as<nn::NormImpl>()) norm->peers = peers;
  }
}

at::Tensor EncoderImpl::encode(const at::Tensor& tokens, const OptionalTensor& padding) {
  TORCH_CHECK_VALUE(tokens.dim() == 2 && tokens.size(1) > 0, "Encoder: expected tokens [batch, time], got ", tokens.sizes());
  TORCH_CHECK_TYPE(tokens.scalar_type() == torch::kInt64, "Encoder: expected int64 tokens, got ", tokens.scalar_type());
  TORCH_CHECK_TYPE(!padding || padding->scalar_type() == torch::kBool, "Encoder: expected a bool padding (true = padding), got ",
                   padding->scalar_type());
  const int64_t time = tokens.size(1);
  auto x = token_embedding(tokens);
  if (position_embedding) {
    TORCH_CHECK_VALUE(time <= config_.max_positions, "Encoder: ", time, " tokens, but learned positions reach to max_positions, ",
                      config_.max_positions);
    x = x + position_embedding(nn::positions_from(0, time, tokens.device()));
  } else if (config_.position_name() == "sinusoidal") {
    x = x + sinusoidal_positions(0, time, x);
  }
  x = torch::dropout(x, config_.dropout, is_training());
  nn::AttentionForwardOptions options;
  options.is_causal = config_.causal;
  options.key_padding_mask = padding;
  for (size_t i = 0; i < blocks->size(); ++i) x = blocks->at<nn::BlockImpl>(i).forward(x, options).out;
  return final_norm(x, padding);
}

at::Tensor EncoderImpl::pool(const at::Tensor& x, const OptionalTensor& padding) const {
  if (config_.pooling == "first") return x.select(1, 0);
  if (!padding) return config_.pooling == "last" ? x.select(1, -1) : x.mean(1);
  const auto real = padding->logical_not();
  const auto lengths = real.sum(1, /*keepdim=*/true);
  if (config_.pooling == "last") {
    return x.gather(1, (lengths - 1).clamp_min(0).unsqueeze(-1).expand({-1, 1, x.size(2)})).squeeze(1);
  }
  return x.masked_fill(padding->unsqueeze(-1), 0).sum(1) / lengths.clamp_min(1);
}

at::Tensor EncoderImpl::pooled(const at::Tensor& tokens, const OptionalTensor& padding) {
  return pool(encode(tokens, padding), padding);
}

at::Tensor EncoderImpl::forward(const at::Tensor& tokens, const OptionalTensor& padding) {
  const auto x = encode(tokens, padding);
  if (config_.head == "tokens") return output_proj(x);
  auto pooled = pool(x, padding);
  if (pooled_norm) {
    TORCH_CHECK_VALUE(!is_training() || pooled_norm->peers || pooled.size(0) > 1,
                      "Encoder: batch norm of what is pooled needs a batch of at least 2");
    pooled = pooled_norm(pooled);
  }
  if (config_.head == "pairs") {
    TORCH_CHECK_VALUE(tokens.size(0) % 2 == 0, "Encoder: expected pairs of sequences, got ", tokens.size(0), " sequences");
    const auto pairs = pooled.view({-1, 2, config_.embed_dim});
    const auto a = pairs.select(1, 0), b = pairs.select(1, 1);
    pooled = torch::gelu(pair_proj(torch::cat({a, b, a * b, a - b}, 1)));
  }
  return output_proj(pooled);
}

}  // namespace latte::models
