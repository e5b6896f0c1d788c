#include "data/text.h"

#include <gtest/gtest.h>

#include <cmath>

#include "formats/error.h"
#include "formats/test_files.h"
#include "formats/utf8.h"

namespace latte {
namespace {

using formats::error_text;
using formats::FileError;
using formats::FormatError;

class TextCorpusTest : public ::testing::Test {
 protected:
  TextCorpus load(const std::string& text, const TextCorpusOptions& options = {}) {
    formats::write_bytes(path_, text);
    return TextCorpus(path_, options);
  }

  static std::vector<int64_t> row(const at::Tensor& tokens, int64_t index) {
    const auto* data = tokens.const_data_ptr<int64_t>() + index * tokens.size(1);
    return {data, data + tokens.size(1)};
  }

  formats::TestFolder folder_;
  const std::string path_ = folder_ / "text.txt";
};

TEST_F(TextCorpusTest, Tinyshakespeare) {
  const TextCorpus corpus(LATTE_SOURCE_DIR "/data/tinyshakespeare.txt", {.context = 256});
  EXPECT_EQ(corpus.vocabulary().size(), 65);
  // nanoGPT's figures for this text.
  EXPECT_EQ(corpus.size(Split::kTrain), 1003854);
  EXPECT_EQ(corpus.size(Split::kValidation), 111540);
  const std::vector<int64_t> start = {0};
  const TokenBatch batch = corpus.batch_at(Split::kTrain, start, 14);
  EXPECT_EQ(corpus.vocabulary().decode(row(batch.x, 0)), "First Citizen:");
  EXPECT_EQ(corpus.vocabulary().decode(row(batch.y, 0)), "irst Citizen:\n");
}

TEST_F(TextCorpusTest, SplitsByPosition) {
  const TextCorpus corpus = load("abcdefghijklmnopqrst", {.validation_fraction = 0.25, .context = 4});
  EXPECT_EQ(corpus.size(Split::kTrain), 15);
  EXPECT_EQ(corpus.size(Split::kValidation), 5);
  const std::vector<int64_t> offsets = {0};
  const TokenBatch batch = corpus.batch_at(Split::kValidation, offsets, 4);
  EXPECT_EQ(corpus.vocabulary().decode(row(batch.x, 0)), "pqrs");
  EXPECT_EQ(corpus.vocabulary().decode(row(batch.y, 0)), "qrst");
  const TextCorpus whole = load("abcdefghij", {.validation_fraction = 0, .context = 9});
  EXPECT_EQ(whole.size(Split::kTrain), 10);
  EXPECT_EQ(whole.size(Split::kValidation), 0);
  EXPECT_THROW(whole.sample_batch(Split::kValidation, 1, 1, 0, 0), std::invalid_argument);
}

TEST_F(TextCorpusTest, BytesAndCharactersOfEveryWidth) {
  const std::string euro = "a€b€c€d€e€f€";
  const TextCorpus bytes = load(euro, {.kind = Vocabulary::Kind::kBytes});
  EXPECT_EQ(bytes.vocabulary().size(), 256);
  EXPECT_EQ(bytes.size(Split::kTrain) + bytes.size(Split::kValidation), 24);
  EXPECT_EQ(load(euro, {.validation_fraction = 0.2}).size(Split::kTrain), 9);

  for (char32_t characters : {256u, 257u, 65536u, 65537u}) {
    std::string text;
    for (char32_t i = 0; i < characters; ++i) formats::append_utf8(text, 0x10000 + i);
    const TextCorpus corpus = load(text, {.validation_fraction = 0});
    EXPECT_EQ(corpus.vocabulary().size(), characters);
    ASSERT_EQ(corpus.size(Split::kTrain), characters);
    const std::vector<int64_t> start = {0};
    const TokenBatch batch = corpus.batch_at(Split::kTrain, start, characters - 1);
    for (int64_t i = 0; i + 1 < characters; ++i) {
      ASSERT_EQ(batch.x.const_data_ptr<int64_t>()[i], i);
      ASSERT_EQ(batch.y.const_data_ptr<int64_t>()[i], i + 1);
    }
  }
}

TEST_F(TextCorpusTest, SampledBatchesDependOnSeedAndIndexAlone) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += std::to_string(i) + ",";
  const TextCorpus corpus = load(text, {.context = 32});
  const TokenBatch batch = corpus.sample_batch(Split::kTrain, 4, 32, 7, 100);
  EXPECT_EQ(batch.x.sizes(), (std::vector<int64_t>{4, 32}));
  EXPECT_EQ(batch.x.scalar_type(), at::kLong);
  EXPECT_TRUE(batch.x.slice(1, 1).equal(batch.y.slice(1, 0, 31)));
  corpus.sample_batch(Split::kValidation, 9, 8, 7, 99);
  EXPECT_TRUE(corpus.sample_batch(Split::kTrain, 4, 32, 7, 100).x.equal(batch.x));
  EXPECT_TRUE(load(text, {.context = 32}).sample_batch(Split::kTrain, 4, 32, 7, 100).x.equal(batch.x));
  EXPECT_FALSE(corpus.sample_batch(Split::kTrain, 4, 32, 7, 101).x.equal(batch.x));
  EXPECT_FALSE(corpus.sample_batch(Split::kTrain, 4, 32, 8, 100).x.equal(batch.x));
}

TEST_F(TextCorpusTest, SamplesEveryPlaceAboutEquallyOften) {
  std::string text;
  for (int i = 0; i < 60; ++i) text.push_back(static_cast<char>('0' + i));  // each place has a first token of its own
  const TextCorpus corpus = load(text, {.validation_fraction = 0.5});
  ASSERT_EQ(corpus.size(Split::kTrain), 30);
  constexpr int64_t kPlaces = 30 - 5, kBatches = 500, kRows = 20;
  std::vector<int64_t> counts(kPlaces);
  for (uint64_t index = 0; index < kBatches; ++index) {
    const TokenBatch batch = corpus.sample_batch(Split::kTrain, kRows, 5, 1, index);
    for (int64_t i = 0; i < kRows; ++i) counts.at(static_cast<size_t>(row(batch.x, i)[0]))++;
  }
  // 10,000 draws: 400 a place, standard deviation 19.6; the seed is fixed.
  for (int64_t count : counts) EXPECT_NEAR(static_cast<double>(count), 400.0, 5 * 19.6);
}

TEST_F(TextCorpusTest, WindowsCoverTheSplitOnce) {
  std::string text;
  for (int i = 0; i < 107; ++i) text.push_back(static_cast<char>(i));
  const TextCorpus corpus = load(text, {.validation_fraction = 0, .context = 10});
  const std::vector<int64_t> all = corpus.windows(Split::kTrain, 10);
  EXPECT_EQ(all, (std::vector<int64_t>{0, 10, 20, 30, 40, 50, 60, 70, 80, 90}));
  EXPECT_EQ(corpus.windows(Split::kTrain, 10, 4), (std::vector<int64_t>{0, 20, 50, 70}));
  EXPECT_EQ(corpus.windows(Split::kTrain, 106), std::vector<int64_t>{0});
  const TokenBatch batch = corpus.batch_at(Split::kTrain, all, 10);
  EXPECT_EQ(row(batch.x, 9).front(), 90);
  EXPECT_EQ(row(batch.y, 9).back(), 100);
  EXPECT_THROW(corpus.windows(Split::kTrain, 10, 0), std::invalid_argument);
}

TEST_F(TextCorpusTest, RefusesTextsThatAreNone) {
  EXPECT_EQ(error_text<FileError>([&] { TextCorpus corpus(folder_ / "none"); }),
            "cannot open " + (folder_ / "none") + ": No such file or directory");
  EXPECT_CONTAINS(error_text<FileError>([&] { TextCorpus corpus(folder_ / ""); }), "Is a directory");
  EXPECT_EQ(error_text<FormatError>([&] { load(""); }), path_ + ": the text is empty");
  EXPECT_EQ(error_text<FormatError>([&] { load("abc\xff" + std::string(100, 'x')); }),
            path_ + ": invalid UTF-8 at byte 3: \"\\xff\" begins no character; a vocabulary of bytes takes any text");
  EXPECT_EQ(load("abc\xff" + std::string(100, 'x'), {.kind = Vocabulary::Kind::kBytes}).size(Split::kTrain), 93);
  EXPECT_CONTAINS(error_text<FormatError>([&] { load(std::string(100, 'x') + "\xe2\x82"); }), "invalid UTF-8 at byte 100");
}

TEST_F(TextCorpusTest, RefusesTextsTooShortForTheContext) {
  const std::string text(100, 'x');
  EXPECT_EQ(load(text, {.context = 9}).size(Split::kValidation), 10);
  EXPECT_EQ(error_text<FormatError>([&] { load(text, {.context = 10}); }),
            path_ + ": the text is too short: 10 validation tokens, expected at least 10 + 1 for a context of 10");
  EXPECT_CONTAINS(error_text<FormatError>([&] { load(text, {.context = 90}); }), "90 training tokens, expected at least 90 + 1");
  EXPECT_CONTAINS(error_text<FormatError>([&] { load(text, {.context = INT64_MAX}); }), "too short");
  EXPECT_CONTAINS(error_text<FormatError>([&] { load("x"); }), "too short");
}

TEST_F(TextCorpusTest, AnotherVocabularyMustHoldEveryCharacter) {
  const Vocabulary vocabulary = Vocabulary::characters_of("zyx");
  const TextCorpus corpus = load("xyxyxyxyxyxyxyxyxyxyx", {.vocabulary = vocabulary});
  EXPECT_EQ(corpus.vocabulary(), vocabulary);
  EXPECT_EQ(error_text<FormatError>([&] { load("xyw", {.vocabulary = vocabulary}); }),
            path_ + ": invalid token: the character \"w\" (U+0077) at byte 2 is none of the vocabulary's 3");
}

TEST_F(TextCorpusTest, RefusesArgumentsOutOfRange) {
  const std::string text(100, 'x');
  for (double fraction : {-0.1, 1.0, 2.0, std::nan("")}) {
    EXPECT_THROW(load(text, {.validation_fraction = fraction}), std::invalid_argument) << fraction;
  }
  EXPECT_THROW(load(text, {.context = 0}), std::invalid_argument);
  const TextCorpus corpus = load(text);
  for (int64_t bad : {int64_t{0}, int64_t{-1}, INT64_MIN}) {
    EXPECT_THROW(corpus.sample_batch(Split::kTrain, bad, 8, 0, 0), std::invalid_argument);
    EXPECT_THROW(corpus.sample_batch(Split::kTrain, 8, bad, 0, 0), std::invalid_argument);
  }
  EXPECT_THROW(corpus.sample_batch(Split::kTrain, 8, 90, 0, 0), std::invalid_argument);
  EXPECT_EQ(corpus.sample_batch(Split::kTrain, 8, 89, 0, 0).x.size(0), 8);
  for (int64_t bad : {int64_t{-1}, int64_t{81}, INT64_MAX}) {
    EXPECT_THROW(corpus.batch_at(Split::kTrain, {&bad, 1}, 9), std::invalid_argument) << bad;
  }
  const int64_t last = 80;
  EXPECT_NO_THROW(corpus.batch_at(Split::kTrain, {&last, 1}, 9));
}

TEST(TextCorpus, AThirdPartIsForTesting) {
  const formats::TestFolder folder;
  std::string text;
  for (int i = 0; i < 1000; ++i) text += static_cast<char>('a' + i / 100);
  formats::write_bytes(folder / "text", text);
  const TextCorpus corpus(
      folder / "text",
      {.kind = Vocabulary::Kind::kBytes, .vocabulary = {}, .validation_fraction = 0.1, .test_fraction = 0.2, .context = 10});
  EXPECT_EQ(corpus.size(Split::kTrain), 700);
  EXPECT_EQ(corpus.size(Split::kValidation), 100);
  EXPECT_EQ(corpus.size(Split::kTest), 200);
  const auto first = [&](Split split) { return corpus.batch_at(split, std::vector<int64_t>{0}, 10).x[0][0].item<int64_t>(); };
  EXPECT_EQ(first(Split::kTrain), 'a');
  EXPECT_EQ(first(Split::kValidation), 'h');
  EXPECT_EQ(first(Split::kTest), 'i');
  EXPECT_EQ(corpus.windows(Split::kTest, 10).size(), 19U);
  EXPECT_THROW(TextCorpus(folder / "text", {.validation_fraction = 0.5, .test_fraction = 0.5}), std::invalid_argument);
}

TEST(TextCorpus, TokensOfATokeniserStayInTheirFile) {
  const formats::TestFolder folder;
  const std::string id(32, '1');
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < 100; ++i) tokens.push_back(1000 + i);
  formats::write_token_corpus(folder / "corpus", tokens, 50000, id);
  TextCorpusOptions options{.kind = Vocabulary::Kind::kTokens, .vocabulary = {}, .validation_fraction = 0.2, .context = 5};
  const TextCorpus corpus(folder / "corpus", options);
  EXPECT_EQ(corpus.vocabulary().size(), 50000);
  const TokenBatch batch = corpus.batch_at(Split::kValidation, std::vector<int64_t>{0, 3}, 4);
  EXPECT_EQ(batch.x[0][0].item<int64_t>(), 1080);
  EXPECT_EQ(batch.y[0][3].item<int64_t>(), 1084);
  EXPECT_EQ(batch.x[1][0].item<int64_t>(), 1083);
  options.vocabulary = Vocabulary::tokens(50000, std::string(32, '2'));
  EXPECT_CONTAINS(formats::error_text<formats::FormatError>([&] { TextCorpus(folder / "corpus", options); }),
                  "expected the model's");
  formats::write_bytes(folder / "text", "no tokens at all");
  options.vocabulary.reset();
  EXPECT_THROW(TextCorpus(folder / "text", options), formats::FormatError);
}

}  // namespace
}  // namespace latte
