#include "formats/decoder_config.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/pretrained.h"
#include "formats/test_files.h"
#include "formats/test_models.h"

namespace latte::formats {
namespace {

GgufMetadata small_llama() {
  GgufMetadata metadata("small.gguf");
  metadata.set("general.architecture", std::string("llama"));
  for (const auto& [key, value] : std::vector<std::pair<std::string, uint32_t>>{{"block_count", 2},
                                                                                {"context_length", 64},
                                                                                {"embedding_length", 8},
                                                                                {"feed_forward_length", 12},
                                                                                {"attention.head_count", 4},
                                                                                {"attention.head_count_kv", 2}}) {
    metadata.set("llama." + key, value);
  }
  metadata.set("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  return metadata;
}

std::vector<GgufTensorSpec> specs_of(const DecoderConfig& config) {
  std::vector<GgufTensorSpec> specs;
  for (const auto& [name, shape] : decoder_tensors(config)) specs.push_back({name, TensorType::kF32, shape});
  return specs;
}

const std::vector<GgufTensorSpec> kEmbedding = {{"token_embd.weight", TensorType::kF32, {10, 8}}};

TEST(DecoderConfig, OfSmolLM2) {
  const std::string path = smollm2_path();
  LATTE_SKIP_WITHOUT(path);
  const auto file = open_pretrained(path);
  const DecoderConfig& config = file->config();
  EXPECT_EQ(config.architecture, "llama");
  EXPECT_EQ(config.vocab_size, 49152);
  EXPECT_EQ(config.num_layers, 30);
  EXPECT_EQ(config.embed_dim, 576);
  EXPECT_EQ(config.hidden_dim, 1536);
  EXPECT_EQ(config.num_heads, 9);
  EXPECT_EQ(config.num_kv_heads, 3);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.context_length, 8192);
  EXPECT_EQ(config.rope.base, 100000);
  EXPECT_EQ(config.rope.pairs, RopePairs::kNeighbours);
  EXPECT_TRUE(config.tie_embeddings);
  EXPECT_FALSE(config.is_local(0));
  EXPECT_EQ(file->tensors().size(), decoder_tensors(config).size());
  // Rows (of 576) are the same however they are read.
  const std::vector<float> whole = file->read("blk.3.attn_q.weight");
  std::vector<float> rows(1728);
  file->read_rows("blk.3.attn_q.weight", 100, rows);
  EXPECT_TRUE(std::equal(rows.begin(), rows.end(), whole.begin() + 57600));
  EXPECT_THROW(file->read_rows("blk.3.attn_q.weight", 574, rows), std::invalid_argument);
  EXPECT_THROW(file->read_rows("blk.3.attn_q.weight", -1, rows), std::invalid_argument);
  EXPECT_THROW(file->read_rows("blk.3.attn_q.weight", 0, std::span(rows).first(100)), std::invalid_argument);
  EXPECT_THROW(file->read_rows("absent", 0, rows), FormatError);
}

TEST(DecoderConfig, OfGemma3) {
  const std::string path = gemma3_path();
  LATTE_SKIP_WITHOUT(path);
  const DecoderConfig config = open_pretrained(path)->config();
  EXPECT_EQ(config.architecture, "gemma3");
  EXPECT_EQ(config.vocab_size, 262144);
  EXPECT_EQ(config.num_layers, 18);
  EXPECT_EQ(config.head_dim, 256);
  EXPECT_EQ(config.num_kv_heads, 1);
  EXPECT_EQ(config.window, 512);
  EXPECT_TRUE(config.qk_norm);
  EXPECT_TRUE(config.post_norms);
  EXPECT_EQ(config.rope_of(5).base, 1e6);
  EXPECT_EQ(config.rope_of(4).base, 1e4);
  for (int64_t layer = 0; layer < 18; ++layer) EXPECT_EQ(config.is_local(layer), layer % 6 != 5) << layer;
}

TEST(DecoderConfig, ListsEveryTensorThatIsWrong) {
  const DecoderConfig config = decoder_config(small_llama(), kEmbedding);
  auto specs = specs_of(config);
  EXPECT_NO_THROW(require_decoder_tensors("small.gguf", config, specs));
  specs[2].name = "blk.0.attn_qq.weight";
  specs[3].shape = {2, 8};
  specs.push_back({"blk.1.attn_q.bias", TensorType::kF32, {8}});
  EXPECT_EQ(error_text<FormatError>([&] { require_decoder_tensors("small.gguf", config, specs); }),
            "small.gguf: missing tensors: \"blk.0.attn_q.weight\"; unexpected tensors: \"blk.0.attn_qq.weight\", "
            "\"blk.1.attn_q.bias\"; \"blk.0.attn_k.weight\" is f32 [2, 8], expected [4, 8]");
}

TEST(DecoderConfig, RefusesWhatNoModelHas) {
  const auto refuse = [](const char* key, std::optional<GgufValue> value) {
    GgufMetadata metadata = small_llama();
    metadata.remove(key);
    if (value) metadata.set(key, *value);
    return error_text<FormatError>([&] { decoder_config(metadata, kEmbedding); });
  };
  EXPECT_CONTAINS(refuse("general.architecture", std::string("mamba")),
                  "\"general.architecture\" is string \"mamba\", expected one of \"llama\", \"gemma2\", \"gemma3\"");
  for (const char* key : {"llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
                          "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon"}) {
    EXPECT_CONTAINS(refuse(key, {}), std::string("metadata \"") + key + "\" is missing");
    EXPECT_CONTAINS(refuse(key, std::string("8")), "is string \"8\"");
    EXPECT_CONTAINS(refuse(key, int32_t{0}), "is int32 0");
    EXPECT_CONTAINS(refuse(key, int64_t{-1}), "is int64 -1");
    EXPECT_CONTAINS(refuse(key, uint64_t{1} << 63), "is uint64 9223372036854775808");
  }
  EXPECT_CONTAINS(refuse("llama.attention.head_count_kv", uint32_t{3}), "expected a divisor of 4 heads");
  EXPECT_CONTAINS(refuse("llama.attention.head_count", uint32_t{6}), "expected a divisor of the embedding length, 8");
  EXPECT_CONTAINS(refuse("llama.attention.key_length", uint32_t{3}), "expected an even head size");
  EXPECT_CONTAINS(refuse("llama.attention.value_length", uint32_t{4}), "expected the key length, 2");
  EXPECT_CONTAINS(refuse("llama.rope.dimension_count", uint32_t{4}), "expected the head's size, 2");
  EXPECT_CONTAINS(refuse("llama.rope.freq_base", -1.0f), "expected a positive number");
  EXPECT_CONTAINS(refuse("llama.rope.freq_base", std::numeric_limits<float>::quiet_NaN()), "expected a finite number");
  EXPECT_CONTAINS(refuse("llama.rope.scaling.type", std::string("longrope")), "expected \"none\", \"linear\" or \"yarn\"");
  EXPECT_CONTAINS(refuse("llama.rope.scaling.type", std::string("linear")), "\"llama.rope.scaling.factor\" is missing");
  EXPECT_CONTAINS(refuse("llama.expert_count", uint32_t{8}), "expected no mixture of experts");
  for (const uint32_t experts : {0U, 1U}) {
    GgufMetadata metadata = small_llama();
    metadata.set("llama.expert_count", experts);
    EXPECT_NO_THROW(decoder_config(metadata, kEmbedding)) << experts;
  }
  EXPECT_CONTAINS(refuse("llama.vocab_size", uint32_t{11}), "expected 10, the rows of \"token_embd.weight\"");
  EXPECT_CONTAINS(error_text<FormatError>([&] { decoder_config(small_llama(), {}); }), "\"token_embd.weight\" is missing");
  // A tokeniser's tokens all have a row; there may be more rows.
  EXPECT_CONTAINS(refuse("tokenizer.ggml.tokens", GgufArray(std::vector<std::string>(11, "a"))),
                  "expected 10 strings at most, the rows of \"token_embd.weight\"");
  GgufMetadata metadata = small_llama();
  metadata.set("tokenizer.ggml.tokens", GgufArray(std::vector<std::string>(9, "a")));
  EXPECT_NO_THROW(decoder_config(metadata, kEmbedding));
}

TEST(DecoderConfig, APieceOfAModelIsRefused) {
  const TestFolder folder;
  GgufMetadata metadata = small_llama();
  metadata.set("split.count", uint16_t{3});
  write_gguf(folder / "model.gguf", metadata, std::span<const GgufTensor>());
  EXPECT_CONTAINS(error_text<FormatError>([&] { open_pretrained(folder / "model.gguf"); }), "one of 3 pieces of a model");
}

TEST(DecoderConfig, NamesOfScaling) {
  EXPECT_EQ(rope_scaling_named("ntk"), RopeScalingKind::kNtk);
  EXPECT_EQ(rope_scaling_named("none"), RopeScalingKind::kNone);
  EXPECT_FALSE(rope_scaling_named("NTK").has_value());
}

}  // namespace
}  // namespace latte::formats
