#include "formats/language_model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <string_view>
#include <vector>

namespace latte::formats {
namespace {

using nlohmann::json;

// Limits far beyond use, within which no product of sizes in here or in a module overflows.
constexpr int64_t kLargestDim = int64_t{1} << 16;
constexpr int64_t kLargestCount = int64_t{1} << 24;
constexpr double kLargestRatio = 64.0;

// ASCII on one line, cut short: the text may come from a hostile file.
std::string shown(const json& value) {
  constexpr size_t kLongest = 64;
  auto text = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "…";
  return text;
}

[[noreturn]] void fail(std::string_view field, const json& got, const std::string& expected) {
  throw ConfigError("model config: " + std::string(field) + " is " + shown(got) + ", expected " + expected);
}

std::string joined(std::span<const std::string_view> names) {
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) text += i + 1 == names.size() ? " or " : ", ";
    text += names[i];
  }
  return text;
}

void check_range(std::string_view field, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) fail(field, value, "an integer in " + std::to_string(least) + " … " + std::to_string(most));
}

void check_divides(std::string_view field, int64_t value, std::string_view of, int64_t whole) {
  if (whole % value != 0) fail(field, value, "a divisor of " + std::string(of) + " (" + std::to_string(whole) + ")");
}

void check_name(std::string_view field, const std::string& value, std::span<const std::string_view> allowed,
                const std::string& where = "") {
  if (std::find(allowed.begin(), allowed.end(), value) == allowed.end()) fail(field, value, joined(allowed) + where);
}

constexpr std::array<std::string_view, 7> kAttentions{"softmax", "window",       "latte",    "macchiato",
                                                      "linear",  "gated_linear", "linformer"};
constexpr std::array<std::string_view, 3> kNorms{"layer", "rms", "batch"};
// What language models have of these: all but the last.
template <size_t N>
std::span<const std::string_view> choices(const std::array<std::string_view, N>& all, LanguageModelConfig::Role role) {
  return std::span(all).first(role == LanguageModelConfig::Role::kEncoder ? N : N - 1);
}

constexpr int64_t kDecayRank = 16;  // of gated_linear
constexpr std::array<std::string_view, 2> kMlps{"gelu", "gated"};

bool HasRotaryPositions(std::string_view attention) {
  return attention == "softmax" || attention == "window" || attention == "macchiato";
}

bool HasLatents(std::string_view attention) { return attention == "latte" || attention == "macchiato"; }

std::vector<std::string_view> positions_of(std::string_view attention) {
  std::vector<std::string_view> positions = {"none", "learned", "sinusoidal", "vapor", "conv", "rg_lru"};
  if (HasRotaryPositions(attention)) positions.insert(positions.begin() + 3, "rotary");
  return positions;
}

// One place that lists the fields, for reading and writing.
template <typename Config, typename Visit>
void for_each_field(Config& config, const Visit& visit) {
  visit("vocab_size", config.vocab_size);
  visit("num_layers", config.num_layers);
  visit("embed_dim", config.embed_dim);
  visit("num_heads", config.num_heads);
  visit("num_kv_heads", config.num_kv_heads);
  visit("attention", config.attention);
  visit("position", config.position);
  visit("num_latents", config.num_latents);
  visit("window", config.window);
  visit("sinks", config.sinks);
  visit("conv_width", config.conv_width);
  visit("forget", config.forget);
  visit("decay_rank", config.decay_rank);
  visit("shared_latents", config.shared_latents);
  visit("projected", config.projected);
  visit("rope_base", config.rope_base);
  visit("norm", config.norm);
  visit("mlp", config.mlp);
  visit("mlp_ratio", config.mlp_ratio);
  visit("dropout", config.dropout);
  visit("bias", config.bias);
  visit("max_positions", config.max_positions);
  visit("tie_embeddings", config.tie_embeddings);
}

void read(std::string_view field, const json& value, int64_t& into) {
  if (!value.is_number_integer()) fail(field, value, "an integer");
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    fail(field, value, "an integer that fits in 64 bits");
  }
  into = value.get<int64_t>();
}

void read(std::string_view field, const json& value, double& into) {
  if (!value.is_number()) fail(field, value, "a number");
  into = value.get<double>();
}

void read(std::string_view field, const json& value, bool& into) {
  if (!value.is_boolean()) fail(field, value, "true or false");
  into = value.get<bool>();
}

void read(std::string_view field, const json& value, std::string& into) {
  if (!value.is_string()) fail(field, value, "a string");
  into = value.get<std::string>();
}

template <typename T>
void read(std::string_view field, const json& value, std::optional<T>& into) {
  read(field, value, into.emplace());
}

}  // namespace

std::string LanguageModelConfig::position_name() const {
  if (position) return *position;
  return HasLatents(attention) ? "conv" : HasRotaryPositions(attention) ? "rotary" : "none";
}

int64_t LanguageModelConfig::kv_heads() const { return shared_latents ? 1 : num_kv_heads.value_or(num_heads); }

bool LanguageModelConfig::forgets() const { return forget.value_or(HasLatents(attention)); }

int64_t LanguageModelConfig::hidden_dim() const {
  const double dense = static_cast<double>(embed_dim) * mlp_ratio;
  if (mlp != "gated") return std::llround(dense);
  return static_cast<int64_t>(std::ceil(dense * 2.0 / 3.0 / 8.0)) * 8;
}

int64_t LanguageModelConfig::parameter_count() const {
  const auto linear = [&](int64_t in, int64_t out) { return in * out + (bias ? out : 0); };
  const int64_t head_dim = embed_dim / num_heads, kv_heads = this->kv_heads();
  const int64_t latents = num_latents.value_or(head_dim), hidden = hidden_dim();
  const int64_t kv_dim = kv_heads * head_dim;

  int64_t layer = linear(embed_dim, kv_dim) + linear(embed_dim, embed_dim);                     // value_proj, out_proj
  if (attention != "latte") layer += linear(embed_dim, embed_dim) + linear(embed_dim, kv_dim);  // query_proj, key_proj
  if (HasLatents(attention)) {
    const int64_t gates = attention == "macchiato" ? 1 : 0;
    layer += linear(embed_dim, num_heads * (latents + gates)) + linear(embed_dim, kv_heads * latents);
    if (forgets() && decay_rank == 0) layer += linear(embed_dim, kv_heads * latents);
    if (forgets() && decay_rank > 0) layer += embed_dim * decay_rank + (decay_rank + 1) * kv_heads * latents;
  }
  if (position_name() == "conv") layer += embed_dim * (conv_width + 1);
  if (position_name() == "rg_lru") layer += 2 * linear(embed_dim, embed_dim) + embed_dim;
  if (attention == "gated_linear")
    layer += embed_dim * kDecayRank + (kDecayRank + 1) * kv_dim + linear(embed_dim, embed_dim) + head_dim;
  if (attention == "linformer") layer += projected * max_positions;
  layer += linear(embed_dim, hidden) * (mlp == "gated" ? 2 : 1) + linear(hidden, embed_dim);
  const int64_t norm_size = embed_dim * (bias && norm != "rms" ? 2 : 1);
  int64_t total = num_layers * (layer + 2 * norm_size) + norm_size + vocab_size * embed_dim;
  if (position_name() == "learned") total += max_positions * embed_dim;
  if (!tie_embeddings) total += vocab_size * embed_dim;
  return total;
}

void LanguageModelConfig::validate(Role role) const {
  check_range("vocab_size", vocab_size, 1, kLargestCount);
  check_range("num_layers", num_layers, 1, 4096);
  check_range("embed_dim", embed_dim, 1, kLargestDim);
  check_range("num_heads", num_heads, 1, kLargestDim);
  check_divides("num_heads", num_heads, "embed_dim", embed_dim);
  const int64_t head_dim = embed_dim / num_heads;
  if (num_kv_heads) {
    check_range("num_kv_heads", *num_kv_heads, 1, kLargestDim);
    check_divides("num_kv_heads", *num_kv_heads, "num_heads", num_heads);
  }
  check_name("attention", attention, choices(kAttentions, role));
  if (attention == "linformer" && num_kv_heads.value_or(num_heads) != num_heads) {
    fail("num_kv_heads", *num_kv_heads, "num_heads, " + std::to_string(num_heads) + ", with attention linformer");
  }
  check_name("position", position_name(), positions_of(attention), " with attention " + attention);
  check_name("norm", norm, choices(kNorms, role));
  check_name("mlp", mlp, kMlps);

  const bool has_latents = HasLatents(attention);
  const std::string where = position_name();
  const bool absolute = where == "none" || where == "learned" || where == "sinusoidal";
  const bool rotates = where == "rotary" || where == "vapor" || (attention == "macchiato" && !absolute);
  if (rotates && head_dim % 2 != 0) {
    fail("num_heads", num_heads,
         "heads of an even size with position " + where + ", not embed_dim / num_heads = " + std::to_string(head_dim));
  }
  if (num_latents) check_range("num_latents", *num_latents, 1, kLargestDim);
  if (num_latents && !has_latents)
    fail("num_latents", *num_latents, "none with attention " + attention + ", which has no latents");
  if (forgets() && !has_latents) fail("forget", true, "false with attention " + attention + ", which has no latents");
  if (shared_latents && !has_latents)
    fail("shared_latents", true, "false with attention " + attention + ", which has no latents");
  check_range("decay_rank", decay_rank, 0, kLargestDim);
  check_range("projected", projected, 1, kLargestDim);
  check_range("window", window, 1, kLargestCount);
  check_range("sinks", sinks, 0, kLargestCount);
  if (sinks > 0 && attention != "window" && attention != "macchiato") {
    fail("sinks", sinks, "0 with attention " + attention + ", which has no window");
  }
  check_range("conv_width", conv_width, 1, 1024);
  check_range("max_positions", max_positions, 1, kLargestCount);
  if (!(mlp_ratio > 0.0 && mlp_ratio <= kLargestRatio) || hidden_dim() < 1)
    fail("mlp_ratio", mlp_ratio, "a positive number up to 64");
  if (!(dropout >= 0.0 && dropout < 1.0)) fail("dropout", dropout, "a number in [0, 1)");
  if (!(rope_base > 0.0) || !std::isfinite(rope_base)) fail("rope_base", rope_base, "a positive number");
}

json LanguageModelConfig::to_json() const {
  auto filled = *this;
  filled.num_kv_heads = num_kv_heads.value_or(num_heads);
  filled.position = position_name();
  filled.forget = forgets();
  if (HasLatents(attention)) filled.num_latents = num_latents.value_or(embed_dim / num_heads);
  json object = json::object();
  for_each_field(filled, [&]<typename T>(const char* field, const T& value) {
    if constexpr (requires { value.has_value(); }) {
      if (value) object[field] = *value;
    } else {
      object[field] = value;
    }
  });
  return object;
}

LanguageModelConfig LanguageModelConfig::from_json(const json& object, Role role) {
  if (!object.is_object()) throw ConfigError("model config: expected a JSON object, got " + shown(object));
  LanguageModelConfig config;
  std::vector<std::string_view> known;
  for_each_field(config, [&](const char* field, auto& into) {
    known.emplace_back(field);
    if (const auto found = object.find(field); found != object.end()) read(field, *found, into);
  });
  for (const auto& [field, value] : object.items()) {
    if (std::find(known.begin(), known.end(), field) == known.end()) {
      throw ConfigError("model config: unknown field " + shown(field) + ", expected " + joined(known));
    }
  }
  if (!object.contains("vocab_size")) throw ConfigError("model config: vocab_size is missing");
  config.validate(role);
  return config;
}

json saved_model_config(json model) {
  if (model.is_object() && !model.contains("decay_rank")) model["decay_rank"] = 0;
  return model;
}

bool takes_position(std::string_view attention, std::string_view position) {
  const auto positions = positions_of(attention);
  const bool known = std::find(kAttentions.begin(), kAttentions.end(), attention) != kAttentions.end();
  return known && std::find(positions.begin(), positions.end(), position) != positions.end();
}

}  // namespace latte::formats
