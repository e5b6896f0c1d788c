// config.json of a Hugging Face folder as GGUF metadata.
#include <algorithm>
#include <cmath>
#include <string>

#include "formats/error.h"
#include "formats/hugging_face.h"
#include "formats/json_file.h"

namespace latte::formats {
namespace {

constexpr int64_t kLargest = int64_t{1} << 31;
constexpr uint64_t kLargestConfig = 4'000'000;  // bytes

// Fields with a name of their own in each format.
void copy_sizes(const JsonFields& config, const std::string& prefix, GgufMetadata& metadata) {
  const auto copy = [&](const char* from, const char* to) {
    metadata.set(prefix + to, static_cast<uint32_t>(config.integer(from, 1, kLargest)));
  };
  copy("vocab_size", "vocab_size");
  copy("num_hidden_layers", "block_count");
  copy("max_position_embeddings", "context_length");
  copy("hidden_size", "embedding_length");
  copy("intermediate_size", "feed_forward_length");
  copy("num_attention_heads", "attention.head_count");
  if (config.has("num_key_value_heads")) copy("num_key_value_heads", "attention.head_count_kv");
  if (config.has("head_dim")) {
    copy("head_dim", "attention.key_length");
    copy("head_dim", "attention.value_length");
  }
  metadata.set(prefix + "attention.layer_norm_rms_epsilon", config.positive_or("rms_norm_eps", 1e-6));
}

// What transformers writes about scaling: {"rope_type": "yarn", "factor": 4.0, …}, older files "type".
void copy_scaling(const JsonFields& scaling, const std::string& prefix, GgufMetadata& metadata) {
  const char* key = scaling.has("rope_type") ? "rope_type" : "type";
  const std::string kind = scaling.string_or(key, "default");
  if (kind == "default") return;
  const double factor = scaling.positive("factor");
  const auto set = [&](const char* name, GgufValue value) { metadata.set(prefix + "rope.scaling." + name, std::move(value)); };
  if (scaling.has("original_max_position_embeddings")) {
    set("original_context_length", static_cast<uint32_t>(scaling.integer("original_max_position_embeddings", 1, kLargest)));
  }
  if (kind == "llama3") {
    // As divisors of the frequencies: see llama3_divisors().
    set("llama3.factor", factor);
    set("llama3.low_freq_factor", scaling.positive("low_freq_factor"));
    set("llama3.high_freq_factor", scaling.positive("high_freq_factor"));
    if (!scaling.has("original_max_position_embeddings"))
      scaling.refuse("original_max_position_embeddings", "the trained context");
    return;
  }
  if (kind != "linear" && kind != "yarn") scaling.refuse(key, "\"default\", \"linear\", \"yarn\" or \"llama3\"");
  set("type", kind);
  set("factor", factor);
  if (kind == "linear") return;
  set("yarn_beta_fast", scaling.positive_or("beta_fast", 32.0));
  set("yarn_beta_slow", scaling.positive_or("beta_slow", 1.0));
  // Here it stands in the place of what GGUF's factor multiplies.
  const double usual = 1 + 0.1 * std::log(factor);
  if (usual > 0) set("attn_factor", scaling.positive_or("attention_factor", usual) / usual);
}

// "rope_parameters" of transformers 5, or "rope_theta" and "rope_scaling" before.
void copy_rope(const JsonFields& config, const char* theta_key, const std::string& prefix, GgufMetadata& metadata,
               const JsonFields* parameters) {
  if (parameters != nullptr) {
    metadata.set(prefix + "rope.freq_base", parameters->positive_or("rope_theta", 10000.0));
    copy_scaling(*parameters, prefix, metadata);
    return;
  }
  metadata.set(prefix + "rope.freq_base", config.positive_or(theta_key, 10000.0));
  if (config.has("rope_scaling")) copy_scaling(config.object("rope_scaling"), prefix, metadata);
}

void refuse_unless(const JsonFields& config, const char* key, bool fine, const std::string& expected) {
  if (!fine) config.refuse(key, expected);
}

void read_llama(const JsonFields& config, GgufMetadata& metadata) {
  const std::string prefix = "llama.";
  copy_sizes(config, prefix, metadata);
  const std::string activation = config.string_or("hidden_act", "silu");
  refuse_unless(config, "hidden_act", activation == "silu", "\"silu\"");
  for (const char* bias : {"attention_bias", "mlp_bias"}) refuse_unless(config, bias, !config.boolean_or(bias, false), "false");
  if (config.has("rope_parameters")) {
    const JsonFields parameters = config.object("rope_parameters");
    copy_rope(config, "rope_theta", prefix, metadata, &parameters);
  } else {
    copy_rope(config, "rope_theta", prefix, metadata, nullptr);
  }
}

// Every how many layers one is global, from a number or from the list of layers.
int64_t global_every(const JsonFields& config) {
  for (const char* key : {"sliding_window_pattern", "_sliding_window_pattern"}) {
    if (config.has(key)) return config.integer(key, 1, kLargest);
  }
  if (!config.has("layer_types")) return 6;
  const auto& types = config.at("layer_types");
  const int64_t layers = config.integer("num_hidden_layers", 1, kLargest);
  if (!types.is_array() || static_cast<int64_t>(types.size()) != layers) config.refuse("layer_types", "one for each layer");
  const auto first = std::find(types.begin(), types.end(), "full_attention");
  const int64_t every = first - types.begin() + 1;
  for (int64_t i = 0; i < layers; ++i) {
    const char* expected = (i + 1) % every == 0 ? "full_attention" : "sliding_attention";
    if (types[static_cast<size_t>(i)] != expected) {
      config.refuse("layer_types", "\"full_attention\" at every so many layers, \"sliding_attention\" between");
    }
  }
  return every;
}

void read_gemma3(const JsonFields& config, GgufMetadata& metadata) {
  const std::string prefix = "gemma3.";
  copy_sizes(config, prefix, metadata);
  if (!config.has("head_dim")) {
    for (const char* key : {"attention.key_length", "attention.value_length"}) metadata.set(prefix + key, uint32_t{256});
  }
  const std::string activation = config.string_or("hidden_activation", "gelu_pytorch_tanh");
  refuse_unless(config, "hidden_activation", activation == "gelu_pytorch_tanh", "\"gelu_pytorch_tanh\"");
  refuse_unless(config, "attention_bias", !config.boolean_or("attention_bias", false), "false");
  refuse_unless(config, "attn_logit_softcapping", !config.has("attn_logit_softcapping"), "null");
  if (config.has("final_logit_softcapping")) {
    metadata.set(prefix + "final_logit_softcapping", config.positive("final_logit_softcapping"));
  }
  metadata.set(prefix + "attention.scale", 1 / std::sqrt(config.positive_or("query_pre_attn_scalar", 256.0)));
  metadata.set(prefix + "attention.sliding_window",
               static_cast<uint32_t>(config.integer_or("sliding_window", 4096, 1, kLargest)));
  metadata.set(prefix + "attention.sliding_window_pattern", static_cast<uint32_t>(global_every(config)));
  if (config.has("rope_parameters")) {
    const JsonFields all = config.object("rope_parameters");
    const JsonFields full = all.has("full_attention") ? all.object("full_attention") : all;
    copy_rope(config, "rope_theta", prefix, metadata, &full);
    if (all.has("sliding_attention")) {
      metadata.set(prefix + "rope.freq_base_swa", all.object("sliding_attention").positive_or("rope_theta", 10000.0));
    }
    return;
  }
  metadata.set(prefix + "rope.freq_base", config.positive_or("rope_theta", 1e6));
  if (config.has("rope_scaling")) copy_scaling(config.object("rope_scaling"), prefix, metadata);
  metadata.set(prefix + "rope.freq_base_swa", config.positive_or("rope_local_base_freq", 10000.0));
}

}  // namespace

GgufMetadata hugging_face_metadata(const std::string& config_path) {
  const nlohmann::json json = read_json_object(config_path, kLargestConfig);
  const JsonFields config(config_path, json);
  std::string name;
  if (config.has("architectures")) {
    const auto& names = config.at("architectures");
    if (!names.is_array() || names.size() != 1 || !names[0].is_string()) config.refuse("architectures", "a list of one name");
    name = names[0].get<std::string>();
  } else {
    const std::string type = config.string("model_type");
    name = type == "llama" ? "LlamaForCausalLM" : type == "gemma3_text" ? "Gemma3ForCausalLM" : type;
  }
  GgufMetadata metadata(config_path);
  if (name == "LlamaForCausalLM") {
    metadata.set("general.architecture", std::string("llama"));
    read_llama(config, metadata);
  } else if (name == "Gemma3ForCausalLM") {
    metadata.set("general.architecture", std::string("gemma3"));
    read_gemma3(config, metadata);
  } else {
    throw FormatError(config_path, "architecture " + quote(name) + ", expected \"LlamaForCausalLM\" or \"Gemma3ForCausalLM\"");
  }
  metadata.set("hugging_face.tie_word_embeddings", config.boolean_or("tie_word_embeddings", name == "Gemma3ForCausalLM"));
  return metadata;
}

}  // namespace latte::formats
