// Texts as a tokeniser's tokens, for training that maps them into memory: what `latte tokenize` writes. Safetensors with one
// tensor, "tokens" [N], I16 where the vocabulary has at most 65,536 tokens (to be read as unsigned), else I32; and this metadata:
//
//   format      "latte.tokens"
//   version     "1"
//   vocab_size  in decimal
//   tokenizer   32 hexadecimal digits: XXH3 of the vocabulary's pieces, which tells one tokeniser from another
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>

#include "formats/safetensors.h"
#include "formats/tokenizer.h"
#include "formats/vocabulary.h"

namespace latte::formats {

// XXH3 of the pieces of all tokens, in their order.
std::string tokenizer_id(const Tokenizer& tokenizer);

// Throws FileError, and std::invalid_argument for a token that isn't in 0 … vocab_size - 1.
void write_token_corpus(const std::string& path, std::span<const int64_t> tokens, int64_t vocab_size,
                        const std::string& tokenizer, FileOperations& operations = FileOperations::system());

class TokenCorpus {
 public:
  // Throws FileError, or FormatError for a file that isn't such a corpus. The tokens stay in the mapped file and aren't looked
  // at.
  explicit TokenCorpus(const std::string& path);

  // Looks at all tokens, as fast as they are read. Throws FormatError for one that is none of the vocabulary's.
  void check() const;

  const std::string& path() const { return file_.path(); }
  const Vocabulary& vocabulary() const { return vocabulary_; }
  int64_t size() const { return size_; }
  // The `count` tokens from `begin` on, into `out`. Throws FormatError for one that is none of the vocabulary's, and
  // std::out_of_range where the corpus ends before.
  void copy(int64_t begin, int64_t count, int64_t* out) const;

 private:
  SafetensorsFile file_;
  Vocabulary vocabulary_;
  const std::byte* data_ = nullptr;
  bool narrow_ = false;
  int64_t size_ = 0;
};

}  // namespace latte::formats
