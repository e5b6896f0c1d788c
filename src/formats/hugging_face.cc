#include "formats/hugging_face.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <numbers>
#include <optional>
#include <set>
#include <stdexcept>

#include "formats/error.h"
#include "formats/json_file.h"
#include "formats/safetensors.h"

namespace latte::formats {
namespace {

namespace fs = std::filesystem;

// How rows of a tensor come about.
enum class Change : uint8_t {
  kNone,
  kPairHalves,  // of each head: elements (i, i + D/2), which rotate together here, become (2i, 2i + 1)
  kAddOne,      // Gemma's norms multiply by 1 + weight
};

struct Place {
  const TensorView* tensor = nullptr;
  Change change = Change::kNone;
};

struct Renamed {
  std::string_view from, to;
  Change change = Change::kNone;
};

constexpr Renamed kLlamaLayer[] = {
    {"input_layernorm", "attn_norm"},
    {"self_attn.q_proj", "attn_q", Change::kPairHalves},
    {"self_attn.k_proj", "attn_k", Change::kPairHalves},
    {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"},
    {"post_attention_layernorm", "ffn_norm"},
    {"mlp.gate_proj", "ffn_gate"},
    {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"},
};
constexpr Renamed kGemma3Layer[] = {
    {"input_layernorm", "attn_norm", Change::kAddOne},
    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},
    {"self_attn.v_proj", "attn_v"},
    {"self_attn.q_norm", "attn_q_norm", Change::kAddOne},
    {"self_attn.k_norm", "attn_k_norm", Change::kAddOne},
    {"self_attn.o_proj", "attn_output"},
    {"post_attention_layernorm", "post_attention_norm", Change::kAddOne},
    {"pre_feedforward_layernorm", "ffn_norm", Change::kAddOne},
    {"post_feedforward_layernorm", "post_ffw_norm", Change::kAddOne},
    {"mlp.gate_proj", "ffn_gate"},
    {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"},
};

// The GGUF name of a tensor; a name that is none of such a model's stays as it is, to be refused.
Renamed gguf_name(std::string_view name, bool gemma, std::string& storage) {
  constexpr std::string_view kLayers = "model.layers.", kWeight = ".weight";
  const Change norm = gemma ? Change::kAddOne : Change::kNone;
  if (name == "model.embed_tokens.weight") return {name, "token_embd.weight"};
  if (name == "model.norm.weight") return {name, "output_norm.weight", norm};
  if (name == "lm_head.weight") return {name, "output.weight"};
  if (name.starts_with(kLayers) && name.ends_with(kWeight)) {
    std::string_view rest = name.substr(kLayers.size());
    rest.remove_suffix(kWeight.size());
    const size_t dot = rest.find('.');
    const std::string_view number = rest.substr(0, dot);
    const bool digits = !number.empty() && std::all_of(number.begin(), number.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (digits && dot != rest.npos) {
      const std::span<const Renamed> table =
          gemma ? std::span<const Renamed>(kGemma3Layer) : std::span<const Renamed>(kLlamaLayer);
      for (const Renamed& entry : table) {
        if (entry.from != rest.substr(dot + 1)) continue;
        storage = "blk." + std::string(number) + "." + std::string(entry.to) + std::string(kWeight);
        return {name, storage, entry.change};
      }
    }
  }
  return {name, name};
}

// Computed by older versions of transformers, and written along.
bool is_buffer(std::string_view name) { return name.ends_with(".rotary_emb.inv_freq"); }

std::optional<TensorType> weight_type(DType dtype) {
  constexpr auto kFloat64 = static_cast<TensorType>(28);
  switch (dtype) {
    case DType::kFloat64:
      return kFloat64;
    case DType::kFloat32:
      return TensorType::kF32;
    case DType::kFloat16:
      return TensorType::kF16;
    case DType::kBFloat16:
      return TensorType::kBF16;
    default:
      return std::nullopt;
  }
}

// Llama 3's scaling as divisors of the frequencies: slow pairs turn slower by `factor`, fast ones stay, those between are mixed.
std::vector<float> llama3_divisors(const GgufMetadata& metadata, const RopeConfig& rope) {
  const std::string prefix = "llama.rope.scaling.";
  const double factor = metadata.number(prefix + "llama3.factor");
  const double low = metadata.number(prefix + "llama3.low_freq_factor"),
               high = metadata.number(prefix + "llama3.high_freq_factor");
  const double context = metadata.number(prefix + "original_context_length");
  if (!(high > low)) metadata.refuse(prefix + "llama3.high_freq_factor", "more than low_freq_factor");
  std::vector<float> divisors;
  for (int64_t i = 0; i < rope.dims / 2; ++i) {
    const double wavelength =
        2 * std::numbers::pi * std::pow(rope.base, 2.0 * static_cast<double>(i) / static_cast<double>(rope.dims));
    const double kept = std::clamp((context / wavelength - low) / (high - low), 0.0, 1.0);
    divisors.push_back(static_cast<float>(1 / ((1 - kept) / factor + kept)));
  }
  return divisors;
}

class HuggingFacePretrained : public PretrainedFile {
 public:
  explicit HuggingFacePretrained(const std::string& folder) : PretrainedFile(folder) {
    metadata_ = hugging_face_metadata((fs::path(folder) / "config.json").string());
    const bool gemma = metadata_.string("general.architecture") == "gemma3";
    const bool tied = metadata_.boolean("hugging_face.tie_word_embeddings");
    metadata_.remove("hugging_face.tie_word_embeddings");
    open_files();
    for (const SafetensorsFile& file : files_) {
      for (const TensorView& tensor : file.tensors()) add(file.path(), tensor, gemma, tied);
    }
    if (metadata_.has("llama.rope.scaling.llama3.factor")) {
      config_ = decoder_config(metadata_, tensors_);
      divisors_ = llama3_divisors(metadata_, config_.rope);
      tensors_.push_back({"rope_freqs.weight", TensorType::kF32, {static_cast<int64_t>(divisors_.size())}});
      for (const char* key : {"factor", "low_freq_factor", "high_freq_factor"}) {
        metadata_.remove(std::string("llama.rope.scaling.llama3.") + key);
      }
      metadata_.remove("llama.rope.scaling.original_context_length");
    }
    config_ = decoder_config(metadata_, tensors_);
    require_decoder_tensors(folder, config_, tensors_);
    if (config_.tie_embeddings && !tied) {
      throw FormatError(folder,
                        "tensor \"lm_head.weight\" is missing, and tie_word_embeddings is false or missing in config.json, "
                        "expected true without it");
    }
  }

  void read_rows(std::string_view name, int64_t first_row, std::span<float> out) const override {
    const GgufTensorSpec& spec = tensor(name);
    const Rows rows = checked_rows(spec, first_row, out.size());
    if (name == "rope_freqs.weight") {
      std::copy(divisors_.begin(), divisors_.end(), out.begin());
      return;
    }
    const Place& place = places_.find(name)->second;
    const auto read = [&](int64_t row, std::span<float> floats, int64_t count) {
      const uint64_t begin = tensor_bytes(spec.type, row, rows.columns).value();
      dequantize(spec.type, place.tensor->data.subspan(begin, tensor_bytes(spec.type, count, rows.columns).value()), floats);
    };
    if (place.change == Change::kPairHalves) {
      const int64_t dim = config_.head_dim;
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t row = first_row + i, head = row / dim, element = row % dim;
        const auto columns = static_cast<size_t>(rows.columns);
        read(head * dim + (element % 2) * (dim / 2) + element / 2, out.subspan(static_cast<size_t>(i) * columns, columns), 1);
      }
    } else {
      read(first_row, out, rows.count);
    }
    if (place.change == Change::kAddOne) {
      for (float& value : out) value += 1.0f;
    }
  }

 private:
  // One file, or what the index lists.
  void open_files() {
    const fs::path folder = path_;
    const std::string single = (folder / "model.safetensors").string(),
                      index = (folder / "model.safetensors.index.json").string();
    std::error_code error;
    if (fs::exists(single, error) || !fs::exists(index, error)) {
      files_.emplace_back(single);
      return;
    }
    const nlohmann::json json = read_json_object(index);
    const auto map = json.find("weight_map");
    if (map == json.end() || !map->is_object()) throw FormatError(index, "weight_map is missing, or no object");
    std::map<std::string, std::set<std::string, std::less<>>> names;  // by file
    for (const auto& [tensor, file] : map->items()) {
      if (!file.is_string())
        throw FormatError(index, "weight_map: " + quote(tensor) + " is " + shown(file) + ", expected a file");
      const auto name = file.get<std::string>();
      // Whatever a folder names lies in it.
      if (name.find('/') != name.npos || name.find('\0') != name.npos || !name.ends_with(".safetensors")) {
        throw FormatError(index,
                          "weight_map: " + quote(tensor) + " is in " + quote(name) + ", expected a .safetensors of this folder");
      }
      names[name].insert(tensor);
    }
    for (const auto& [name, tensors] : names) {
      files_.emplace_back((folder / name).string());
      const SafetensorsFile& file = files_.back();
      for (const std::string& tensor : tensors) file.at(tensor);
      for (const TensorView& tensor : file.tensors()) {
        if (!tensors.contains(tensor.name))
          throw FormatError(file.path(), "tensor " + quote(tensor.name) + " isn't in the index");
      }
    }
  }

  void add(const std::string& path, const TensorView& tensor, bool gemma, bool tied) {
    if (is_buffer(tensor.name) || (tied && tensor.name == "lm_head.weight")) return;
    std::string storage;
    const Renamed renamed = gguf_name(tensor.name, gemma, storage);
    const auto type = weight_type(tensor.dtype);
    if (!type)
      throw FormatError(path, "tensor " + quote(tensor.name) + " is " + describe(tensor) + ", expected F64, F32, F16 or BF16");
    if (std::any_of(tensor.shape.begin(), tensor.shape.end(), [](int64_t size) { return size < 1; })) {
      throw FormatError(path, "tensor " + quote(tensor.name) + " is " + describe(tensor) + ", which is empty");
    }
    if (!places_.emplace(std::string(renamed.to), Place{&tensor, renamed.change}).second) {
      throw FormatError(path, "tensor " + quote(tensor.name) + " is there twice");
    }
    tensors_.push_back({std::string(renamed.to), *type, tensor.shape});
  }

  std::vector<SafetensorsFile> files_;
  std::map<std::string, Place, std::less<>> places_;  // by GGUF's names
  std::vector<float> divisors_;                       // rope_freqs.weight
};

}  // namespace

std::unique_ptr<PretrainedFile> open_hugging_face(const std::string& folder) {
  return std::make_unique<HuggingFacePretrained>(folder);
}

}  // namespace latte::formats
