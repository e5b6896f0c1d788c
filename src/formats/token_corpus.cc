#include "formats/token_corpus.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/token_corpus_writer.h"

namespace latte::formats {
namespace {

constexpr const char* kFormat = "latte.tokens";
constexpr const char* kVersion = "1";
constexpr int64_t kMostNarrow = 65536;  // tokens of a vocabulary whose tokens fit in 16 bits

int64_t vocab_size_of(const SafetensorsFile& file) {
  const std::string& text = file.metadata_at("vocab_size");
  int64_t size = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), size);
  if (error != std::errc() || end != text.data() + text.size() || size < 1 || size > INT32_MAX) {
    throw FormatError(file.path(), "vocab_size is " + quote(text) + ", expected an integer from 1 to 2147483647");
  }
  return size;
}

}  // namespace

std::string tokenizer_id(const Tokenizer& tokenizer) {
  Hash hash;
  for (int64_t token = 0; token < tokenizer.size(); ++token) hash.add(tokenizer.piece(token, /*special=*/true));
  return hash.digits();
}

bool is_narrow_corpus(int64_t vocab_size) { return vocab_size <= kMostNarrow; }

Metadata token_corpus_metadata(int64_t vocab_size, const std::string& tokenizer) {
  return {{"format", kFormat}, {"version", kVersion}, {"vocab_size", std::to_string(vocab_size)}, {"tokenizer", tokenizer}};
}

void write_token_corpus(const std::string& path, std::span<const int64_t> tokens, int64_t vocab_size,
                        const std::string& tokenizer, FileOperations& operations) {
  TokenCorpusWriter writer(path, vocab_size, tokenizer, operations);
  writer.add(tokens);
  writer.commit();
}

TokenCorpus::TokenCorpus(const std::string& path) : file_(path) {
  for (const auto& [key, expected] : {std::pair{"format", kFormat}, std::pair{"version", kVersion}}) {
    if (file_.metadata_at(key) != expected) {
      throw FormatError(path, std::string("no tokens of latte tokenize: ") + key + " is " + quote(file_.metadata_at(key)) +
                                  ", expected " + expected);
    }
  }
  const int64_t vocab_size = vocab_size_of(file_);
  narrow_ = is_narrow_corpus(vocab_size);
  const TensorView& view = file_.at("tokens");
  if (view.dtype != (narrow_ ? DType::kInt16 : DType::kInt32) || view.shape.size() != 1) {
    throw FormatError(path, "tensor \"tokens\" is " + describe(view) + ", expected a vector of " + (narrow_ ? "I16" : "I32"));
  }
  try {
    vocabulary_ = Vocabulary::tokens(vocab_size, file_.metadata_at("tokenizer"));
  } catch (const std::invalid_argument& error) {
    throw FormatError(path, error.what());
  }
  data_ = view.data.data();
  size_ = view.shape[0];
}

void TokenCorpus::check() const {
  constexpr int64_t kPiece = 1 << 20;
  const int64_t element = narrow_ ? 2 : 4;
  std::vector<int64_t> tokens(static_cast<size_t>(std::min(kPiece, size_)));
  for (int64_t begin = 0; begin < size_; begin += kPiece) {
    const int64_t count = std::min(kPiece, size_ - begin);
    copy(begin, count, tokens.data());
    file_.release({data_ + begin * element, static_cast<size_t>(count * element)});
  }
}

void TokenCorpus::copy(int64_t begin, int64_t count, int64_t* out) const {
  if (begin < 0 || count < 0 || begin > size_ - count) {
    throw std::out_of_range("tokens " + std::to_string(begin) + " and " + std::to_string(count) + " more, of " +
                            std::to_string(size_));
  }
  for (int64_t i = 0; i < count; ++i) {
    if (narrow_) {
      uint16_t token = 0;
      std::memcpy(&token, data_ + static_cast<size_t>(begin + i) * sizeof token, sizeof token);
      out[i] = token;
    } else {
      int32_t token = 0;
      std::memcpy(&token, data_ + static_cast<size_t>(begin + i) * sizeof token, sizeof token);
      out[i] = token;
    }
    if (out[i] < 0 || out[i] >= vocabulary_.size()) {
      throw FormatError(path(), "token " + std::to_string(begin + i) + " is " + std::to_string(out[i]) + ", expected 0 to " +
                                    std::to_string(vocabulary_.size() - 1));
    }
  }
}

}  // namespace latte::formats
