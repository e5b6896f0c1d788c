#include "formats/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/test_files.h"
#include "formats/test_models.h"
#include "formats/vocabulary.h"

namespace latte::formats {
namespace {

constexpr std::string_view kTexts[] = {
    "First Citizen:\nBefore we proceed any further, hear me speak.",
    "  two  blanks, a\ttab, 12345 + 67.8 = ?",
    "größer, 日本語, emoji 🦊 and \xF0\x9F\x8F\xBD",
    "",
};

TEST(Tokenizer, SmolLM2ReadsAndWritesText) {
  const std::string path = smollm2_path();
  LATTE_SKIP_WITHOUT(path);
  const Tokenizer tokenizer(GgufFile(path).metadata());
  EXPECT_EQ(tokenizer.size(), 49152);
  EXPECT_EQ(tokenizer.bos(), 1);
  EXPECT_EQ(tokenizer.eos(), 2);
  EXPECT_FALSE(tokenizer.adds_bos());
  EXPECT_TRUE(tokenizer.ends_generation(2));
  EXPECT_FALSE(tokenizer.ends_generation(100));
  EXPECT_FALSE(tokenizer.ends_generation(-1));
  for (std::string_view text : kTexts) {
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
  // A control token is one only where it is asked for.
  EXPECT_EQ(tokenizer.encode("<|im_end|>", true, true), std::vector<int64_t>{2});
  EXPECT_GT(tokenizer.encode("<|im_end|>").size(), 1u);
  EXPECT_EQ(tokenizer.decode(std::vector<int64_t>{2}), "");
  EXPECT_EQ(tokenizer.decode(std::vector<int64_t>{2}, true), "<|im_end|>");
  const auto out_of_range = [&](int64_t token) {
    return error_text<TokenError>([&] { tokenizer.decode(std::vector<int64_t>{token}); });
  };
  EXPECT_EQ(out_of_range(49152), "invalid token 49152: expected 0 to 49151");
  EXPECT_EQ(out_of_range(-1), "invalid token -1: expected 0 to 49151");
}

TEST(Tokenizer, SmolLM2HasAChatTemplate) {
  const std::string path = smollm2_path();
  LATTE_SKIP_WITHOUT(path);
  const Tokenizer tokenizer(GgufFile(path).metadata());
  const std::vector<ChatMessage> messages = {{"system", "Be brief."}, {"user", "Hello"}, {"assistant", "Hi"}, {"user", "Bye"}};
  const std::string expected =
      "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
      "<|im_start|>user\nBye<|im_end|>\n";
  EXPECT_EQ(tokenizer.apply_chat(messages, false), expected);
  EXPECT_EQ(tokenizer.apply_chat(messages), expected + "<|im_start|>assistant\n");
}

TEST(Tokenizer, Gemma3ReadsAndWritesText) {
  const std::string path = gemma3_path();
  LATTE_SKIP_WITHOUT(path);
  const Tokenizer tokenizer(GgufFile(path).metadata());
  EXPECT_EQ(tokenizer.size(), 262144);
  EXPECT_TRUE(tokenizer.adds_bos());
  EXPECT_EQ(tokenizer.encode("").front(), 2);
  for (std::string_view text : kTexts) {
    const auto tokens = tokenizer.encode(text);
    EXPECT_EQ(tokens.front(), 2);
    EXPECT_EQ(tokenizer.decode(tokens), text);
    EXPECT_EQ(tokenizer.encode(text, false).size() + 1, tokens.size());
  }
  const std::vector<ChatMessage> messages = {{"user", "Hello"}};
  EXPECT_EQ(tokenizer.apply_chat(messages), "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n");
}

// The smallest vocabulary of byte pairs that libllama takes: the bytes' letters and one merge.
GgufMetadata small_vocabulary() {
  GgufMetadata metadata("small.gguf");
  std::vector<std::string> tokens = {"<|end|>"};
  for (char letter = '!'; letter <= '~'; ++letter) tokens.emplace_back(1, letter);
  tokens.emplace_back("\u0120");  // the blank
  tokens.emplace_back("\u010A");  // the new line
  tokens.emplace_back("ab");
  std::vector<int32_t> types(tokens.size(), 1);
  types[0] = 3;  // control
  metadata.set("tokenizer.ggml.model", std::string("gpt2"));
  metadata.set("tokenizer.ggml.pre", std::string("gpt-2"));
  metadata.set("tokenizer.ggml.tokens", GgufArray(tokens));
  metadata.set("tokenizer.ggml.token_type", GgufArray(types));
  metadata.set("tokenizer.ggml.merges", GgufArray(std::vector<std::string>{"a b"}));
  metadata.set("tokenizer.ggml.eos_token_id", uint32_t{0});
  return metadata;
}

TEST(Tokenizer, SmallVocabularies) {
  const Tokenizer tokenizer(small_vocabulary());
  EXPECT_EQ(tokenizer.encode("ab").size(), 1u);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("cab ab\nba")), "cab ab\nba");
  const std::vector<ChatMessage> messages = {{"user", "Hello"}};
  EXPECT_EQ(error_text<TokenError>([&] { tokenizer.apply_chat(messages); }), "the model has no chat template");
  GgufMetadata odd = small_vocabulary();
  odd.set("tokenizer.chat_template", std::string("{% hello %}"));
  const Tokenizer with_template(odd);
  EXPECT_CONTAINS(error_text<TokenError>([&] { with_template.apply_chat(messages); }), "none that libllama knows");
}

TEST(Tokenizer, RefusesWhatLibllamaWouldDieOf) {
  const auto refuse = [](const char* key, std::optional<GgufValue> value) {
    GgufMetadata metadata = small_vocabulary();
    metadata.remove(key);
    if (value) metadata.set(key, *value);
    return error_text<FormatError>([&] { Tokenizer tokenizer(metadata); });
  };
  const auto strings = [](std::vector<std::string> list) { return GgufArray(std::move(list)); };
  EXPECT_CONTAINS(refuse("tokenizer.ggml.model", {}), "metadata \"tokenizer.ggml.model\" is missing");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.model", std::string("bert")), "is string \"bert\", expected \"gpt2\"");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.pre", std::string("no-such")), "libllama refuses the vocabulary");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.tokens", {}), "is missing");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.tokens", strings({})), "expected 12 …");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.tokens", GgufArray(std::vector<int32_t>{1})), "expected an array of strings");
  const auto twelve = [&](std::string first, std::string second) {
    std::vector<std::string> list = {std::move(first), std::move(second)};
    for (char letter = 'a'; list.size() < 12; ++letter) list.emplace_back(1, letter);
    return strings(list);
  };
  EXPECT_CONTAINS(refuse("tokenizer.ggml.tokens", twelve("x", "a")), "token 2, \"a\", is in the vocabulary twice");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.tokens", twelve("[EMPTY_1]", "")), "token 1, \"[EMPTY_1]\", is in the vocabulary twice");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.tokens", twelve("x", std::string("b\0c", 3))), "holds a NUL");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.add_sep_token", true), "adds its separator token to texts and has none");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.token_type", GgufArray(std::vector<int32_t>{1})), "one for each token");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.token_type", uint32_t{1}), "one for each token");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.scores", GgufArray(std::vector<float>{1})), "one for each token");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.merges", {}), "is missing");
  for (const char* merge : {"", "ab", "a ", " b"}) {
    EXPECT_CONTAINS(refuse("tokenizer.ggml.merges", strings({"a b", merge})), "expected two pieces with a blank between them");
  }
  EXPECT_CONTAINS(refuse("tokenizer.ggml.eos_token_id", uint32_t{4000}), "expected an integer in 0 …");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.bos_token_id", std::string("1")), "expected an integer in 0 …");
  EXPECT_CONTAINS(refuse("tokenizer.ggml.add_bos_token", uint32_t{1}), "expected a bool");
  EXPECT_CONTAINS(refuse("tokenizer.chat_template", uint32_t{1}), "expected a string");
  GgufMetadata sentencepiece = small_vocabulary();
  sentencepiece.set("tokenizer.ggml.model", std::string("llama"));
  EXPECT_CONTAINS(error_text<FormatError>([&] { Tokenizer tokenizer(sentencepiece); }), "tokenizer.ggml.scores");
}

}  // namespace
}  // namespace latte::formats
