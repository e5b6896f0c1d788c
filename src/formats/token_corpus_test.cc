#include "formats/token_corpus.h"

#include <gtest/gtest.h>

#include <vector>

#include "formats/error.h"
#include "formats/test_files.h"

namespace latte::formats {
namespace {

const std::string kId(32, 'a');

TEST(TokenCorpus, WhatIsWrittenIsRead) {
  const TestFolder folder;
  for (const int64_t vocab_size : {int64_t{10}, int64_t{65536}, int64_t{65537}, int64_t{151936}}) {
    const std::vector<int64_t> tokens = {0, 7, vocab_size - 1, 3};
    write_token_corpus(folder / "c", tokens, vocab_size, kId);
    const TokenCorpus corpus(folder / "c");
    EXPECT_EQ(corpus.size(), 4);
    EXPECT_EQ(corpus.vocabulary(), Vocabulary::tokens(vocab_size, kId));
    std::vector<int64_t> read(3);
    corpus.copy(1, 3, read.data());
    EXPECT_EQ(read, std::vector<int64_t>(tokens.begin() + 1, tokens.end()));
    EXPECT_THROW(corpus.copy(2, 3, read.data()), std::out_of_range);
    EXPECT_THROW(corpus.copy(-1, 1, read.data()), std::out_of_range);
  }
  EXPECT_THROW(write_token_corpus(folder / "c", std::vector<int64_t>{10}, 10, kId), std::invalid_argument);
}

TEST(TokenCorpus, DefectsAreErrors) {
  const TestFolder folder;
  write_token_corpus(folder / "good", std::vector<int64_t>{1, 2, 300}, 301, kId);
  const auto error = [&](const std::string& key, const std::string& value) {
    const SafetensorsFile file(folder / "good");
    auto metadata = file.metadata();
    metadata[key] = value;
    write_safetensors(folder / "bad", file.tensors(), metadata);
    return error_text<FormatError>([&] {
      const TokenCorpus corpus(folder / "bad");
      std::vector<int64_t> read(3);
      corpus.copy(0, 3, read.data());
    });
  };
  EXPECT_CONTAINS(error("format", "latte.task"), "format is \"latte.task\", expected latte.tokens");
  EXPECT_CONTAINS(error("version", "2"), "version is \"2\"");
  EXPECT_CONTAINS(error("vocab_size", "300"), "token 2 is 300, expected 0 to 299");
  EXPECT_CONTAINS(error("vocab_size", "70000"), "is I16 [3], expected a vector of I32");
  EXPECT_CONTAINS(error("vocab_size", "1e3"), "vocab_size is \"1e3\"");
  EXPECT_CONTAINS(error("tokenizer", "x"), "tokens:301:x");
}

TEST(TokenVocabulary, IsKnownByItsDescriptionAndReadsNoText) {
  const Vocabulary vocabulary = Vocabulary::tokens(50257, kId);
  EXPECT_EQ(vocabulary.size(), 50257);
  EXPECT_EQ(vocabulary.kind(), Vocabulary::Kind::kTokens);
  EXPECT_EQ(vocabulary.description(), "tokens:50257:" + kId);
  EXPECT_EQ(Vocabulary::from_description(vocabulary.description()), vocabulary);
  EXPECT_FALSE(Vocabulary::tokens(50258, kId) == vocabulary);
  EXPECT_THROW(vocabulary.encode("a"), TokenError);
  EXPECT_THROW(vocabulary.decode(std::vector<int64_t>{1}), TokenError);
  for (const std::string broken : {"tokens:", "tokens:0:", "tokens:5:zz", "tokens:-1:"}) {
    EXPECT_THROW(Vocabulary::from_description(broken + (broken.ends_with(':') ? kId : "")), std::invalid_argument) << broken;
  }
}

}  // namespace
}  // namespace latte::formats
