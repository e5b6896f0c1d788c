// Plain texts as a pretrained model's tokens, to train and to validate on.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

#include "formats/tokenizer.h"

namespace latte::extend {

// The whole of a file as tokens. Throws formats::FileError, and formats::FormatError for a text that the vocabulary can't
// express.
std::vector<int64_t> read_tokens(const std::string& path, const formats::Tokenizer& tokenizer);

class TokenText {
 public:
  // The last `held_out_fraction` of each file is for validation. Throws as read_tokens, and formats::FormatError where no file
  // has a sequence of `context` tokens and one more to train on.
  TokenText(const std::vector<std::string>& paths, const formats::Tokenizer& tokenizer, double held_out_fraction,
            int64_t context);

  // int64 [batch, length + 1], length <= context, from random places, which depend on seed and index alone; a file is drawn by
  // its size.
  at::Tensor sample(int64_t batch, int64_t length, uint64_t seed, uint64_t index) const;
  // int64 [N, context + 1], N <= count, evenly spread over what is held out; the same at every call. N is 0 where too little is.
  at::Tensor held_out(int64_t count) const;

  int64_t train_tokens() const { return train_tokens_; }
  int64_t held_out_tokens() const { return held_out_tokens_; }

 private:
  struct Part {
    at::Tensor tokens;  // int32
    int64_t starts;     // places where a sequence may start
  };
  static at::Tensor stretch(const std::vector<Part>& parts, int64_t start, int64_t length);

  int64_t context_;
  std::vector<Part> train_, held_out_;
  int64_t train_starts_ = 0, held_out_starts_ = 0;
  int64_t train_tokens_ = 0, held_out_tokens_ = 0;
};

}  // namespace latte::extend
