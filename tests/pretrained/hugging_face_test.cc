// A GGUF model written as a Hugging Face folder and read back predicts the same: small models and the real ones.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/hugging_face.h"
#include "formats/safetensors.h"
#include "formats/test_files.h"
#include "formats/test_models.h"
#include "formats/tokenizer.h"
#include "models/decoder.h"
#include "runtime/quantize.h"
#include "small_model.h"

namespace latte {
namespace {

using formats::DecoderConfig;
using nlohmann::json;

json exported_config(const DecoderConfig& config) {
  const bool gemma = config.architecture == "gemma3";
  json out = {
      {"architectures", {gemma ? "Gemma3ForCausalLM" : "LlamaForCausalLM"}},
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.embed_dim},
      {"intermediate_size", config.hidden_dim},
      {"num_hidden_layers", config.num_layers},
      {"num_attention_heads", config.num_heads},
      {"num_key_value_heads", config.num_kv_heads},
      {"head_dim", config.head_dim},
      {"max_position_embeddings", config.context_length},
      {"rms_norm_eps", config.norm_eps},
      {"rope_theta", config.rope.base},
      {"rope_scaling", nullptr},
      {"tie_word_embeddings", config.tie_embeddings},
  };
  if (gemma) {
    out["sliding_window"] = config.window;
    out["query_pre_attn_scalar"] = 1 / (config.attention_scale * config.attention_scale);
    out["rope_local_base_freq"] = config.local_rope.base;
    for (int64_t i = 0; i < config.num_layers; ++i) {
      out["layer_types"].push_back(config.is_local(i) ? "sliding_attention" : "full_attention");
    }
  }
  return out;
}

std::string exported_name(const std::string& name, bool gemma) {
  static const std::map<std::string, std::string> kOutside = {{"token_embd.weight", "model.embed_tokens.weight"},
                                                              {"output_norm.weight", "model.norm.weight"},
                                                              {"output.weight", "lm_head.weight"}};
  if (const auto it = kOutside.find(name); it != kOutside.end()) return it->second;
  const std::map<std::string, std::string> inside = {
      {"attn_norm", "input_layernorm"},
      {"attn_q", "self_attn.q_proj"},
      {"attn_k", "self_attn.k_proj"},
      {"attn_v", "self_attn.v_proj"},
      {"attn_q_norm", "self_attn.q_norm"},
      {"attn_k_norm", "self_attn.k_norm"},
      {"attn_output", "self_attn.o_proj"},
      {"post_attention_norm", "post_attention_layernorm"},
      {"ffn_norm", gemma ? "pre_feedforward_layernorm" : "post_attention_layernorm"},
      {"post_ffw_norm", "post_feedforward_layernorm"},
      {"ffn_gate", "mlp.gate_proj"},
      {"ffn_up", "mlp.up_proj"},
      {"ffn_down", "mlp.down_proj"}};
  const size_t second = name.find('.', 4);
  return "model.layers." + name.substr(4, second - 4) + "." + inside.at(name.substr(second + 1, name.rfind('.') - second - 1)) +
         ".weight";
}

// Writes the model in so many shards; one needs no index.
void export_folder(const std::string& path, const std::string& folder, size_t shards) {
  const auto file = formats::open_pretrained(path);
  const DecoderConfig& config = file->config();
  const bool gemma = config.architecture == "gemma3";
  std::vector<std::vector<formats::TensorView>> views(shards);
  std::vector<at::Tensor> values;
  json map;
  for (const auto& spec : file->tensors()) {
    auto value = torch::tensor(file->read(spec.name)).view(spec.shape);
    const bool rotated = spec.name.ends_with("attn_q.weight") || spec.name.ends_with("attn_k.weight");
    if (rotated && !gemma) {
      value = value.unflatten(0, {-1, config.head_dim / 2, 2}).transpose(1, 2).reshape(spec.shape);
    }
    if (gemma && spec.shape.size() == 1) value = value - 1;
    values.push_back(value.contiguous());
    formats::TensorView view;
    view.name = exported_name(spec.name, gemma);
    view.dtype = formats::DType::kFloat32;
    view.shape = spec.shape;
    view.data = {static_cast<const std::byte*>(values.back().data_ptr()), values.back().nbytes()};
    const size_t shard = values.size() % shards;
    map[view.name] = "model-" + std::to_string(shard) + ".safetensors";
    views[shard].push_back(std::move(view));
  }
  const std::filesystem::path root = folder;
  for (size_t i = 0; i < shards; ++i) {
    const std::string name = shards == 1 ? "model.safetensors" : "model-" + std::to_string(i) + ".safetensors";
    formats::write_safetensors((root / name).string(), views[i]);
  }
  if (shards > 1) formats::write_bytes((root / "model.safetensors.index.json").string(), json{{"weight_map", map}}.dump());
  formats::write_bytes((root / "config.json").string(), exported_config(config).dump());
}

at::Tensor predictions(const std::string& path, int64_t vocabulary) {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(3);
  const auto tokens = torch::randint(vocabulary, {1, 40});
  return models::load_decoder(path)->forward(tokens).logits;
}

// The norms of Gemma lose a bit when 1 is taken off and added again.
void expect_same(const std::string& path, int64_t vocabulary, size_t shards, double tolerance) {
  formats::TestFolder folder;
  export_folder(path, folder / "", shards);
  const auto expected = predictions(path, vocabulary);
  const auto found = predictions(folder / "", vocabulary);
  EXPECT_LE((found - expected).norm().item<double>(), tolerance * expected.norm().item<double>());
}

TEST(HuggingFace, SmallModels) {
  formats::TestFolder folder;
  const std::string path = folder / "model.gguf";
  write_small_model(path, small_metadata("llama"));
  expect_same(path, kSmallVocabulary, 1, 0);
  write_small_model(path, small_metadata("llama"), /*untied=*/true);
  expect_same(path, kSmallVocabulary, 3, 0);
  auto metadata = small_metadata("gemma3");
  metadata.set("gemma3.attention.scale", 0.25f);
  write_small_model(path, metadata);
  expect_same(path, kSmallVocabulary, 1, 1e-5);
}

TEST(HuggingFace, BecomesAGgufFile) {
  formats::TestFolder folder;
  const std::string path = folder / "model.gguf", out = folder / "out.gguf";
  for (const bool untied : {false, true}) {
    write_small_model(path, small_metadata("llama"), untied);
    std::filesystem::remove_all(folder / "hf");
    std::filesystem::create_directory(folder / "hf");
    export_folder(path, folder / "hf", 2);
    runtime::quantize_folder(folder / "hf", out, formats::TensorType::kF32, "");
    EXPECT_TRUE(predictions(out, kSmallVocabulary).equal(predictions(path, kSmallVocabulary)));
  }
  EXPECT_CONTAINS(formats::error_text<formats::FormatError>([&] { formats::GgufFile file(folder / "hf"); }), "latte quantize");
  // The tokeniser of another model has more tokens than this vocabulary; what is no tokeniser is refused too. No file is left.
  std::filesystem::remove(out);
  const auto refuse = [&](const std::string& tokenizer) {
    return formats::error_text<formats::FormatError>(
        [&] { runtime::quantize_folder(folder / "hf", out, formats::TensorType::kF32, tokenizer); });
  };
  EXPECT_CONTAINS(refuse(path), "tokenizer.ggml.model");
  const std::string real = formats::smollm2_path();
  if (!real.empty()) EXPECT_CONTAINS(refuse(real), "49152 tokens");
  EXPECT_FALSE(std::filesystem::exists(out));
}

TEST(HuggingFace, SmolLM2KeepsItsTokens) {
  const std::string path = formats::smollm2_path();
  LATTE_SKIP_WITHOUT(path);
  formats::TestFolder folder;
  export_folder(path, folder / "", 1);
  runtime::quantize_folder(folder / "", folder / "out.gguf", formats::TensorType::kQ8_0, path);
  const formats::GgufFile out(folder / "out.gguf"), base(path);
  EXPECT_EQ(formats::Tokenizer(out.metadata()).encode("Hello, world"),
            formats::Tokenizer(base.metadata()).encode("Hello, world"));
  EXPECT_EQ(out.at("blk.0.attn_norm.weight").type, formats::TensorType::kF32);
  EXPECT_EQ(out.at("blk.0.attn_q.weight").type, formats::TensorType::kQ8_0);
  const auto expected = predictions(path, 49152);
  EXPECT_LE((predictions(folder / "out.gguf", 49152) - expected).norm().item<double>(), 0.05 * expected.norm().item<double>());
}

TEST(HuggingFace, SmolLM2) {
  const std::string path = formats::smollm2_path();
  LATTE_SKIP_WITHOUT(path);
  expect_same(path, 49152, 2, 0);
}

TEST(HuggingFace, Gemma3) {
  const std::string path = formats::gemma3_path();
  LATTE_SKIP_WITHOUT(path);
  expect_same(path, 262144, 1, 1e-5);
}

class HuggingFaceFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string path = folder_ / "model.gguf";
    write_small_model(path, small_metadata("llama"));
    std::filesystem::create_directory(root_);
    export_folder(path, root_, 2);
    config_ = json::parse(formats::read_bytes(root_ + "/config.json"));
    index_ = json::parse(formats::read_bytes(root_ + "/model.safetensors.index.json"));
  }

  std::string refuse() {
    formats::write_bytes(root_ + "/config.json", config_.dump());
    formats::write_bytes(root_ + "/model.safetensors.index.json", index_.dump());
    return formats::error_text<formats::FormatError>([&] { formats::open_pretrained(root_); });
  }
  std::string refuse(const char* key, json value) {
    const json before = config_;
    config_[key] = std::move(value);
    const std::string text = refuse();
    config_ = before;
    return text;
  }

  formats::TestFolder folder_;
  std::string root_ = folder_ / "model";
  json config_, index_;
};

TEST_F(HuggingFaceFolder, ConfigsThatAreRefused) {
  EXPECT_CONTAINS(refuse("architectures", {"MambaForCausalLM"}), "architecture \"MambaForCausalLM\", expected");
  EXPECT_CONTAINS(refuse("architectures", 3), "architectures is 3, expected a list of one name");
  EXPECT_CONTAINS(refuse("vocab_size", -5), "vocab_size is -5, expected an integer in 1 …");
  EXPECT_CONTAINS(refuse("vocab_size", 1e300), "vocab_size is 1e+300");
  EXPECT_CONTAINS(refuse("vocab_size", uint64_t{1} << 63), "vocab_size is 9223372036854775808");
  EXPECT_CONTAINS(refuse("vocab_size", 97), "expected 96, the rows of \"token_embd.weight\"");
  EXPECT_CONTAINS(refuse("hidden_size", "64"), "hidden_size is \"64\"");
  EXPECT_CONTAINS(refuse("hidden_size", nullptr), "hidden_size is missing");
  EXPECT_CONTAINS(refuse("num_key_value_heads", 3), "expected a divisor of 4 heads");
  EXPECT_CONTAINS(refuse("rms_norm_eps", "small"), "rms_norm_eps is \"small\", expected a positive number");
  EXPECT_CONTAINS(refuse("hidden_act", "relu"), "expected \"silu\"");
  EXPECT_CONTAINS(refuse("attention_bias", true), "attention_bias is true, expected false");
  EXPECT_CONTAINS(refuse("rope_scaling", {{"rope_type", "dynamic"}, {"factor", 2.0}}), "rope_scaling.rope_type is \"dynamic\"");
  EXPECT_CONTAINS(refuse("rope_scaling", {{"rope_type", "yarn"}}), "rope_scaling.factor is missing");
  EXPECT_CONTAINS(refuse("rope_scaling", 7), "rope_scaling is 7, expected an object");
  EXPECT_CONTAINS(refuse("num_hidden_layers", 7), "missing tensors: \"blk.6.attn_norm.weight\"");
  EXPECT_CONTAINS(refuse("num_hidden_layers", 5), "unexpected tensors: \"blk.5.attn_k.weight\"");
  EXPECT_CONTAINS(refuse("tie_word_embeddings", "no"), "expected true or false");
  EXPECT_CONTAINS(refuse("tie_word_embeddings", false), "tensor \"lm_head.weight\" is missing");

  const auto refuse_text = [&](const std::string& text) {
    formats::write_bytes(root_ + "/config.json", text);
    return formats::error_text<formats::FormatError>([&] { formats::open_pretrained(root_); });
  };
  EXPECT_CONTAINS(refuse_text("{\"vocab_size\": 1, \"vocab_size\": 2}"), "the key \"vocab_size\" is there twice");
  EXPECT_CONTAINS(refuse_text("{"), "no valid JSON at byte");
  EXPECT_CONTAINS(refuse_text(""), "no valid JSON");
  EXPECT_CONTAINS(refuse_text("[]"), "holds an array of 0, expected a JSON object");
  EXPECT_CONTAINS(refuse_text("{\"a\":" + std::string(100000, '[')), "nested deeper");
  EXPECT_CONTAINS(refuse_text("{\"a\": \"" + std::string(5000000, 'x') + "\"}"), "bytes, expected at most");
}

TEST_F(HuggingFaceFolder, ScalingOfRotaryPositionsIsRead) {
  const auto with = [&](json scaling) {
    config_["rope_scaling"] = std::move(scaling);
    formats::write_bytes(root_ + "/config.json", config_.dump());
    return formats::open_pretrained(root_);
  };
  const auto yarn =
      with({{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32}, {"attention_factor", 1.5}});
  EXPECT_EQ(yarn->config().rope.scaling.kind, formats::RopeScalingKind::kYarn);
  EXPECT_EQ(yarn->config().rope.scaling.original_context, 32);
  EXPECT_NEAR(yarn->config().rope.scaling.attention_factor * (1 + 0.1 * std::log(4.0)), 1.5, 1e-12);
  EXPECT_EQ(with({{"type", "linear"}, {"factor", 2.0}})->config().rope.scaling.factor, 2.0);
  // Fast pairs stay, slow ones turn slower by the factor.
  const auto llama3 = with({{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 256}});
  EXPECT_EQ(llama3->config().rope.scaling.kind, formats::RopeScalingKind::kNone);
  const auto divisors = llama3->read("rope_freqs.weight");
  ASSERT_EQ(divisors.size(), 16u);
  EXPECT_EQ(divisors.front(), 1.0f);
  EXPECT_EQ(divisors.back(), 8.0f);
  EXPECT_TRUE(std::is_sorted(divisors.begin(), divisors.end()));
  EXPECT_NO_THROW(models::load_decoder(root_));
}

TEST_F(HuggingFaceFolder, ShardsThatDontFitTheirIndexAreRefused) {
  const json good = index_;
  index_["weight_map"].erase("model.norm.weight");
  EXPECT_CONTAINS(refuse(), "tensor \"model.norm.weight\" isn't in the index");
  index_ = good;
  index_["weight_map"]["model.extra.weight"] = "model-0.safetensors";
  EXPECT_CONTAINS(refuse(), "tensor \"model.extra.weight\" is missing");
  index_ = good;
  for (const char* name : {"../model-0.safetensors", "/etc/passwd", "model-0.bin", ""}) {
    index_["weight_map"]["model.norm.weight"] = name;
    EXPECT_CONTAINS(refuse(), "expected a .safetensors of this folder");
  }
  index_["weight_map"]["model.norm.weight"] = 1;
  EXPECT_CONTAINS(refuse(), "is 1, expected a file");
  index_ = {{"weights", 1}};
  EXPECT_CONTAINS(refuse(), "weight_map is missing, or no object");
  index_ = good;
  formats::write_bytes(root_ + "/model.safetensors.index.json", index_.dump());
  EXPECT_NO_THROW(formats::open_pretrained(root_));
  std::filesystem::remove(root_ + "/model-1.safetensors");
  EXPECT_THROW(formats::open_pretrained(root_), formats::FileError);
  std::filesystem::remove(root_ + "/config.json");
  EXPECT_THROW(formats::open_pretrained(root_), formats::FileError);
}

TEST_F(HuggingFaceFolder, HasAHashOfAllItsFiles) {
  const std::string before = formats::hash_of_pretrained(root_);
  EXPECT_EQ(formats::hash_of_pretrained(root_), before);
  config_["rope_theta"] = 20000.0;
  formats::write_bytes(root_ + "/config.json", config_.dump());
  EXPECT_NE(formats::hash_of_pretrained(root_), before);
}

}  // namespace
}  // namespace latte
