#include "formats/token_corpus.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <vector>

#include "formats/error.h"
#include "formats/system_memory.h"
#include "formats/test_files.h"
#include "formats/token_corpus_writer.h"

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
  EXPECT_CONTAINS(error_text<FormatError>([&] { TokenCorpus(folder / "bad").check(); }), "token 2 is 300");
  TokenCorpus(folder / "good").check();
  EXPECT_CONTAINS(error("vocab_size", "70000"), "is I16 [3], expected a vector of I32");
  EXPECT_CONTAINS(error("vocab_size", "1e3"), "vocab_size is \"1e3\"");
  EXPECT_CONTAINS(error("tokenizer", "x"), "tokens:301:x");
}

// More than one piece, whose pages are given back behind it.
TEST(TokenCorpus, WhatWasLookedAtIsThereStill) {
  const TestFolder folder;
  std::vector<int64_t> tokens(2'500'000);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int64_t>(i * i % 301);
  write_token_corpus(folder / "corpus", tokens, 301, kId);
  const TokenCorpus corpus(folder / "corpus");
  const auto resident = [] { return kilobyte_field("/proc/self/status", "RssFile:").value_or(0); };
  const auto before = resident();
  corpus.check();
  EXPECT_LT(resident(), before + tokens.size());  // bytes; the file has twice as many, and 8 MB more of int64 aren't of a file
  std::vector<int64_t> read(tokens.size());
  corpus.copy(0, corpus.size(), read.data());
  EXPECT_EQ(read, tokens);
  tokens.back() = 400;
  write_token_corpus(folder / "other", tokens, 401, kId);
  const SafetensorsFile other(folder / "other");
  auto metadata = other.metadata();
  metadata["vocab_size"] = "301";
  write_safetensors(folder / "bad", other.tensors(), metadata);
  EXPECT_CONTAINS(error_text<FormatError>([&] { TokenCorpus(folder / "bad").check(); }), "token 2499999 is 400");
}

TEST(TokenCorpus, PiecesMakeTheFileOfTheWhole) {
  const TestFolder folder;
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < 1000; ++i) tokens.push_back(i * i % 300);
  write_token_corpus(folder / "whole", tokens, 300, kId);
  TokenCorpusWriter writer(folder / "pieces", 300, kId);
  for (size_t begin = 0; begin < tokens.size();) {
    const size_t count = std::min<size_t>(begin % 7, tokens.size() - begin);
    writer.add(std::span(tokens).subspan(begin, count));
    begin += std::max<size_t>(count, 1);
    if (count == 0) writer.add({{tokens[begin - 1]}});
  }
  EXPECT_EQ(writer.size(), 1000);
  EXPECT_FALSE(std::filesystem::exists(folder / "pieces"));
  writer.commit();
  EXPECT_EQ(read_bytes(folder / "pieces"), read_bytes(folder / "whole"));
  EXPECT_THROW(writer.add({{300}}), std::invalid_argument);
}

TEST(TokenCorpus, WhatCannotBeWrittenIsSaidFirst) {
  const TestFolder folder;
  std::filesystem::create_directory(folder / "corpus");
  EXPECT_THROW(TokenCorpusWriter(folder / "corpus", 300, kId), FileError);
  EXPECT_THROW(TokenCorpusWriter(folder / "nowhere/corpus", 300, kId), FileError);
}

// A link where the gathered tokens would go leads to another's file, which stays as it is.
TEST(TokenCorpus, NoLinkIsFollowed) {
  const TestFolder folder;
  write_bytes(folder / "other", "untouched");
  const std::string name(250, 'n');
  for (const std::string& path : {std::string("corpus"), name}) {
    const std::string begin = "." + path.substr(0, 200) + "." + std::to_string(::getpid()) + "-";
    // Names are counted by process, and other tests came before.
    for (int i = 0; i < 200; ++i) std::filesystem::create_symlink("other", folder / (begin + std::to_string(i) + ".tmp"));
    TokenCorpusWriter writer(folder / path, 300, kId);
    writer.add({{7}});
    writer.commit();
    EXPECT_TRUE(std::filesystem::exists(folder / path));
  }
  EXPECT_EQ(read_bytes(folder / "other"), "untouched");
}

// Every open, write, sync and rename in turn: the file that was there stays, and nothing is left beside it.
TEST(TokenCorpus, AFailingDiskLeavesTheOldFile) {
  class FailingDisk : public FileOperations {
   public:
    explicit FailingDisk(int failing) : failing_(failing) {}
    int open(const char* path, int flags, mode_t mode) override { return fails() ? -1 : FileOperations::open(path, flags, mode); }
    ssize_t write(int fd, const void* data, size_t size) override { return fails() ? -1 : FileOperations::write(fd, data, size); }
    int fsync(int fd) override { return fails() ? -1 : FileOperations::fsync(fd); }
    int rename(const char* from, const char* to) override { return fails() ? -1 : FileOperations::rename(from, to); }
    bool failed() const { return calls_ > failing_; }

   private:
    bool fails() {
      errno = ENOSPC;
      return calls_++ == failing_;
    }
    int failing_, calls_ = 0;
  };
  const TestFolder folder;
  write_token_corpus(folder / "c", std::vector<int64_t>{1, 2}, 10, kId);
  const std::string before = read_bytes(folder / "c");
  int failures = 0;
  for (bool over = false; !over; ++failures) {
    FailingDisk disk(failures);
    std::string error;
    try {
      write_token_corpus(folder / "c", std::vector<int64_t>{3, 4, 5}, 10, kId, disk);
    } catch (const FileError& caught) {
      error = caught.what();
      EXPECT_EQ(caught.error_number(), ENOSPC);
      EXPECT_CONTAINS(error, "c");
    }
    over = !disk.failed();
    EXPECT_EQ(error.empty(), over);
    const bool whole = read_bytes(folder / "c") == before || TokenCorpus(folder / "c").size() == 3;
    EXPECT_TRUE(whole) << failures;
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder / ""), {}), 1) << failures;
    write_token_corpus(folder / "c", std::vector<int64_t>{1, 2}, 10, kId);
  }
  EXPECT_GT(failures, 5);
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
