// Writes a corpus of tokens (token_corpus.h) piece by piece, in memory that doesn't grow with it.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "formats/atomic_file.h"
#include "formats/safetensors.h"

namespace latte::formats {

// Whether tokens take 16 bits.
bool is_narrow_corpus(int64_t vocab_size);
// Of a corpus' file.
Metadata token_corpus_metadata(int64_t vocab_size, const std::string& tokenizer);

class TokenCorpusWriter {
 public:
  // The tokens gather in a file without a name beside `path`, and so take its room twice for a moment. Throws FileError.
  TokenCorpusWriter(const std::string& path, int64_t vocab_size, const std::string& tokenizer,
                    FileOperations& operations = FileOperations::system());
  ~TokenCorpusWriter();
  TokenCorpusWriter(const TokenCorpusWriter&) = delete;
  TokenCorpusWriter& operator=(const TokenCorpusWriter&) = delete;

  // Throws FileError, and std::invalid_argument for a token that isn't in 0 … vocab_size - 1.
  void add(std::span<const int64_t> tokens);
  int64_t size() const { return size_; }  // tokens so far
  // Writes `path` atomically; once. Throws FileError.
  void commit();

 private:
  template <typename T>
  void add_as(std::span<const int64_t> tokens);

  std::string path_, tokenizer_;
  int64_t vocab_size_;
  FileOperations& operations_;
  int fd_ = -1;
  int64_t size_ = 0;
};

}  // namespace latte::formats
