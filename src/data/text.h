// A plain text as training data: its tokens, cut by position into a part to train on and a part to validate on, and batches of
// either for predicting the next token.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "formats/token_corpus.h"
#include "formats/vocabulary.h"

namespace latte {

using formats::Vocabulary;

enum class Split { kTrain, kValidation, kTest };

// y holds the token that follows each of x. Both int64 [B, T], contiguous, on the CPU.
struct TokenBatch {
  at::Tensor x;
  at::Tensor y;
};

struct TextCorpusOptions {
  Vocabulary::Kind kind = Vocabulary::Kind::kCharacters;  // made of the whole text, as nanoGPT does
  std::optional<Vocabulary> vocabulary;                   // a trained model's, in place of `kind`
  double validation_fraction = 0.1;                       // of the text, its end; 0: nothing to validate on
  double test_fraction = 0.0;                             // of the text, what comes behind that
  int64_t context = 1;                                    // T: each part must hold a sequence of it and a token more
};

class TextCorpus {
 public:
  // With kind kTokens a file of latte tokenize (formats/token_corpus.h), which stays mapped. Throws formats::FileError for a file
  // that can't be read; formats::FormatError for one that is empty, too short, not UTF-8 (with the offset) or has a character
  // that options.vocabulary lacks; std::invalid_argument for options out of range.
  explicit TextCorpus(const std::string& path, const TextCorpusOptions& options = {});

  const Vocabulary& vocabulary() const { return vocabulary_; }
  int64_t size(Split split) const {  // tokens
    return split == Split::kTrain ? train_size_ : split == Split::kTest ? test_size_ : size_ - train_size_ - test_size_;
  }

  // `batch` sequences of `time` tokens from random places. The places depend on the seed and on `index` alone: training that
  // numbers its batches (over all processes and accumulated gradients) is resumed by going on with the next number. Throws
  // std::invalid_argument where batch or time is not positive or the split has no time + 1 tokens.
  TokenBatch sample_batch(Split split, int64_t batch, int64_t time, uint64_t seed, uint64_t index) const;

  // Where the sequences start that cover a split without overlap; if there are more than `limit`, so many of them, evenly spread.
  // The same at every call: for validation, in batches of any size. Throws as sample_batch does.
  std::vector<int64_t> windows(Split split, int64_t time, int64_t limit = INT64_MAX) const;

  // The sequences of `time` tokens that start at `offsets`, counted from the start of the split. Throws std::invalid_argument for
  // an offset from which the split has no time + 1 tokens.
  TokenBatch batch_at(Split split, std::span<const int64_t> offsets, int64_t time) const;

 private:
  void divide(const std::string& path, const TextCorpusOptions& options);
  void require_context(Split split, int64_t time) const;

  Vocabulary vocabulary_;
  std::variant<std::vector<uint8_t>, std::vector<uint16_t>, std::vector<int32_t>, formats::TokenCorpus>
      tokens_;  // the narrowest that fits
  int64_t size_ = 0;
  int64_t train_size_ = 0;
  int64_t test_size_ = 0;
};

}  // namespace latte
