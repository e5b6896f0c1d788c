#include "formats/decoder_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "formats/adapter.h"
#include "formats/error.h"

namespace latte::formats {
namespace {

// Limits far beyond use, within which no product of sizes overflows.
constexpr int64_t kLargestDim = int64_t{1} << 20;
constexpr int64_t kLargestLayers = 1024;
constexpr int64_t kLargestContext = int64_t{1} << 32;
constexpr double kLargestNumber = 1e12;

// Reads the keys of one architecture, "llama.block_count" and so on.
class Keys {
 public:
  Keys(const GgufMetadata& metadata, std::string architecture) : metadata_(metadata), prefix_(std::move(architecture) + ".") {}

  bool has(const char* key) const { return metadata_.has(prefix_ + key); }
  int64_t integer(const char* key, int64_t most) const { return metadata_.integer(prefix_ + key, 1, most); }
  int64_t count_or(const char* key, int64_t otherwise, int64_t most) const {
    return metadata_.integer_or(prefix_ + key, otherwise, 0, most);
  }
  int64_t integer_or(const char* key, int64_t otherwise, int64_t most) const { return has(key) ? integer(key, most) : otherwise; }
  double positive(const char* key) const {
    const double value = metadata_.number(prefix_ + key);
    if (!(value > 0) || value > kLargestNumber) metadata_.refuse(prefix_ + key, "a positive number");
    return value;
  }
  double positive_or(const char* key, double otherwise) const { return has(key) ? positive(key) : otherwise; }
  std::string string_or(const char* key, std::string otherwise) const {
    return metadata_.string_or(prefix_ + key, std::move(otherwise));
  }
  [[noreturn]] void refuse(const char* key, const std::string& expected) const { metadata_.refuse(prefix_ + key, expected); }

 private:
  const GgufMetadata& metadata_;
  std::string prefix_;
};

RopeScaling read_scaling(const Keys& keys) {
  RopeScaling scaling;
  const std::string kind = keys.string_or("rope.scaling.type", "none");
  const auto named = rope_scaling_named(kind);
  if (!named || *named == RopeScalingKind::kNtk) keys.refuse("rope.scaling.type", "\"none\", \"linear\" or \"yarn\"");
  scaling.kind = *named;
  if (scaling.kind == RopeScalingKind::kNone) return scaling;
  scaling.factor = keys.positive("rope.scaling.factor");
  scaling.original_context = keys.integer_or("rope.scaling.original_context_length", 0, kLargestContext);
  scaling.attention_factor = keys.positive_or("rope.scaling.attn_factor", 1.0);
  scaling.beta_fast = keys.positive_or("rope.scaling.yarn_beta_fast", 32.0);
  scaling.beta_slow = keys.positive_or("rope.scaling.yarn_beta_slow", 1.0);
  return scaling;
}

// What every architecture says in the same way.
void read_common(const Keys& keys, DecoderConfig& config) {
  config.num_layers = keys.integer("block_count", kLargestLayers);
  config.embed_dim = keys.integer("embedding_length", kLargestDim);
  config.hidden_dim = keys.integer("feed_forward_length", kLargestDim);
  config.context_length = keys.integer("context_length", kLargestContext);
  config.num_heads = keys.integer("attention.head_count", kLargestDim);
  config.num_kv_heads = keys.integer_or("attention.head_count_kv", config.num_heads, kLargestDim);
  if (config.num_heads % config.num_kv_heads != 0) {
    keys.refuse("attention.head_count_kv", "a divisor of " + std::to_string(config.num_heads) + " heads");
  }
  if (!keys.has("attention.key_length") && config.embed_dim % config.num_heads != 0) {
    keys.refuse("attention.head_count", "a divisor of the embedding length, " + std::to_string(config.embed_dim));
  }
  config.head_dim = keys.integer_or("attention.key_length", config.embed_dim / config.num_heads, kLargestDim);
  if (config.head_dim < 2 || config.head_dim % 2 != 0 || config.num_heads > kLargestDim / config.head_dim) {
    keys.refuse("attention.key_length", "an even head size of all heads within " + std::to_string(kLargestDim));
  }
  if (keys.integer_or("attention.value_length", config.head_dim, kLargestDim) != config.head_dim) {
    keys.refuse("attention.value_length", "the key length, " + std::to_string(config.head_dim));
  }
  config.norm_eps = keys.positive("attention.layer_norm_rms_epsilon");
  config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  config.rope.dims = config.head_dim;
  if (keys.integer_or("rope.dimension_count", config.head_dim, kLargestDim) != config.head_dim) {
    keys.refuse("rope.dimension_count", "the head's size, " + std::to_string(config.head_dim));
  }
  config.rope.base = keys.positive_or("rope.freq_base", 10000.0);
  config.rope.scaling = read_scaling(keys);
}

void read_llama(const Keys& keys, DecoderConfig& config) {
  config.rope.pairs = RopePairs::kNeighbours;
  if (keys.count_or("expert_count", 0, kLargestDim) > 1) keys.refuse("expert_count", "no mixture of experts");
}

// What Gemma's generations share: scaled embeddings, norms around everything, layers that read a window.
void read_gemma(const Keys& keys, DecoderConfig& config, int64_t default_window) {
  config.activation = Activation::kGelu;
  config.embedding_scale = std::sqrt(static_cast<double>(config.embed_dim));
  config.post_norms = true;
  config.rope.pairs = RopePairs::kHalves;
  config.logit_softcap = keys.positive_or("final_logit_softcapping", 0.0);
  config.attention_scale = keys.positive_or("attention.scale", config.attention_scale);
  config.window = keys.count_or("attention.sliding_window", default_window, kLargestDim);
  config.local_rope = config.rope;
}

void read_gemma2(const Keys& keys, DecoderConfig& config) {
  read_gemma(keys, config, /*default_window=*/4096);
  constexpr int64_t kLayersOf27B = 46;
  if (config.num_layers == kLayersOf27B && !keys.has("attention.scale")) {
    config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.embed_dim) / static_cast<double>(config.num_heads));
  }
  config.attention_softcap = keys.positive_or("attn_logit_softcapping", 50.0);
  config.logit_softcap = keys.positive_or("final_logit_softcapping", 30.0);
  config.global_every = 2;
}

void read_gemma3(const Keys& keys, DecoderConfig& config) {
  read_gemma(keys, config, /*default_window=*/0);
  constexpr int64_t kLayersOf27B = 62;
  if (config.num_layers == kLayersOf27B && !keys.has("attention.scale")) {
    config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.embed_dim) / static_cast<double>(config.num_heads));
  }
  config.qk_norm = true;
  config.global_every = keys.integer_or("attention.sliding_window_pattern", 6, kLargestLayers);
  config.local_rope.base = keys.positive_or("rope.freq_base_swa", 10000.0);
  config.local_rope.scaling = {};
}

struct Architecture {
  std::string_view name;
  void (*read)(const Keys& keys, DecoderConfig& config);
};

// The table.
constexpr std::array<Architecture, 3> kArchitectures = {{
    {"llama", read_llama},
    {"gemma2", read_gemma2},
    {"gemma3", read_gemma3},
}};

template <typename Range, typename Name>
std::string joined(const Range& range, const Name& name) {
  constexpr size_t kShown = 1000;  // all of any honest mistake
  std::string text;
  size_t count = 0;
  for (const auto& item : range) {
    if (count < kShown) text += (count == 0 ? "" : ", ") + std::string(name(item));
    ++count;
  }
  if (count > kShown) text += " and " + std::to_string(count - kShown) + " more";
  return text;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

const GgufTensorSpec* find(std::span<const GgufTensorSpec> tensors, std::string_view name) {
  const auto it = std::find_if(tensors.begin(), tensors.end(), [&](const GgufTensorSpec& spec) { return spec.name == name; });
  return it == tensors.end() ? nullptr : &*it;
}

}  // namespace

std::optional<RopeScalingKind> rope_scaling_named(std::string_view name) {
  if (name == "none") return RopeScalingKind::kNone;
  if (name == "linear") return RopeScalingKind::kLinear;
  if (name == "ntk") return RopeScalingKind::kNtk;
  if (name == "yarn") return RopeScalingKind::kYarn;
  return std::nullopt;
}

std::vector<std::string_view> decoder_architectures() {
  std::vector<std::string_view> names;
  for (const Architecture& architecture : kArchitectures) names.push_back(architecture.name);
  return names;
}

DecoderConfig decoder_config(const GgufMetadata& metadata, std::span<const GgufTensorSpec> tensors) {
  DecoderConfig config;
  config.architecture = metadata.string("general.architecture");
  const auto it = std::find_if(kArchitectures.begin(), kArchitectures.end(),
                               [&](const Architecture& architecture) { return architecture.name == config.architecture; });
  if (it == kArchitectures.end()) {
    metadata.refuse("general.architecture", "one of " + joined(decoder_architectures(), [](auto name) { return quote(name); }));
  }
  const Keys keys(metadata, config.architecture);
  read_common(keys, config);
  it->read(keys, config);

  const GgufTensorSpec* embedding = find(tensors, "token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2) {
    throw FormatError(metadata.source(), "tensor \"token_embd.weight\" is " + (embedding ? describe(*embedding) : "missing") +
                                             ", expected [vocabulary, " + std::to_string(config.embed_dim) + "]");
  }
  config.vocab_size = embedding->shape[0];
  if (config.vocab_size > (int64_t{1} << 31) - 1) {
    throw FormatError(metadata.source(), "a vocabulary of " + std::to_string(config.vocab_size) + " tokens, expected fewer");
  }
  if (keys.has("vocab_size") && keys.integer("vocab_size", kLargestContext) != config.vocab_size) {
    keys.refuse("vocab_size", std::to_string(config.vocab_size) + ", the rows of \"token_embd.weight\"");
  }
  constexpr std::string_view kTokens = "tokenizer.ggml.tokens";
  if (metadata.has(kTokens) && static_cast<int64_t>(metadata.strings(kTokens).size()) > config.vocab_size) {
    metadata.refuse(kTokens, std::to_string(config.vocab_size) + " strings at most, the rows of \"token_embd.weight\"");
  }
  config.tie_embeddings = find(tensors, "output.weight") == nullptr;
  config.rope_factors = find(tensors, "rope_freqs.weight") != nullptr;
  return config;
}

DecoderConfig decoder_config(const GgufFile& file) {
  const std::vector<GgufTensorSpec> specs = base_tensors(file);
  DecoderConfig config = decoder_config(file.metadata(), specs);
  require_decoder_tensors(file.path(), config, specs);
  return config;
}

std::vector<NamedShape> decoder_tensors(const DecoderConfig& config) {
  const int64_t embed = config.embed_dim, hidden = config.hidden_dim;
  const int64_t queries = config.num_heads * config.head_dim, keys = config.num_kv_heads * config.head_dim;
  std::vector<NamedShape> tensors = {{"token_embd.weight", {config.vocab_size, embed}}};
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    const auto add = [&](const char* name, std::vector<int64_t> shape) { tensors.push_back({prefix + name, std::move(shape)}); };
    add("attn_norm.weight", {embed});
    add("attn_q.weight", {queries, embed});
    add("attn_k.weight", {keys, embed});
    add("attn_v.weight", {keys, embed});
    if (config.qk_norm) add("attn_q_norm.weight", {config.head_dim});
    if (config.qk_norm) add("attn_k_norm.weight", {config.head_dim});
    add("attn_output.weight", {embed, queries});
    if (config.post_norms) add("post_attention_norm.weight", {embed});
    add("ffn_norm.weight", {embed});
    add("ffn_gate.weight", {hidden, embed});
    add("ffn_up.weight", {hidden, embed});
    add("ffn_down.weight", {embed, hidden});
    if (config.post_norms) add("post_ffw_norm.weight", {embed});
  }
  tensors.push_back({"output_norm.weight", {embed}});
  if (!config.tie_embeddings) tensors.push_back({"output.weight", {config.vocab_size, embed}});
  if (config.rope_factors) tensors.push_back({"rope_freqs.weight", {config.rope.dims / 2}});
  return tensors;
}

void require_decoder_tensors(const std::string& source, const DecoderConfig& config, std::span<const GgufTensorSpec> tensors) {
  std::map<std::string_view, const GgufTensorSpec*> found;
  for (const GgufTensorSpec& spec : tensors) found.emplace(spec.name, &spec);
  std::vector<std::string> missing, different, unexpected;
  for (const NamedShape& expected : decoder_tensors(config)) {
    const auto it = found.find(expected.name);
    if (it == found.end()) {
      missing.push_back(quote(expected.name));
      continue;
    }
    if (it->second->shape != expected.shape) {
      different.push_back(quote(expected.name) + " is " + describe(*it->second) + ", expected " + shape_text(expected.shape));
    } else if (!can_dequantize(it->second->type)) {
      different.push_back(quote(expected.name) + " is " + describe(*it->second) + ", a type that no model's weights have");
    }
    found.erase(it);
  }
  for (const auto& [name, spec] : found) unexpected.push_back(quote(name));
  std::string problem;
  const auto add = [&](const std::string& label, const std::vector<std::string>& names) {
    if (!names.empty()) problem += (problem.empty() ? "" : "; ") + label + joined(names, [](const auto& name) { return name; });
  };
  add("missing tensors: ", missing);
  add("unexpected tensors: ", unexpected);
  add("", different);
  if (!problem.empty()) throw FormatError(source, problem);
}

}  // namespace latte::formats
