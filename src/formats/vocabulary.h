// Vocabularies that need no training: the 256 bytes, or the characters (Unicode code points) of a text; and what is known of a
// tokeniser's where only its tokens are at hand.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace latte::formats {

// A character that a vocabulary lacks, bytes that aren't UTF-8, or a number that isn't a token.
class TokenError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

class Vocabulary {
 public:
  enum class Kind { kBytes, kCharacters, kTokens };

  Vocabulary() = default;  // the bytes; a token is the byte's value
  static Vocabulary bytes() { return {}; }

  // The code points of `text`, in their order. Throws TokenError for invalid UTF-8.
  static Vocabulary characters_of(std::string_view text);

  // `size` tokens of the tokeniser with this tokenizer_id() (formats/token_corpus.h): encodes and decodes nothing. Throws
  // std::invalid_argument for a size that isn't in 1 … 2^31 - 1 or an id that isn't 32 hexadecimal digits.
  static Vocabulary tokens(int64_t size, std::string id);

  // What description() gave. Throws std::invalid_argument for any other text.
  static Vocabulary from_description(std::string_view description);

  // For a checkpoint's config: "bytes", "characters:" and all characters in UTF-8, or "tokens:SIZE:ID".
  std::string description() const;

  Kind kind() const { return kind_; }
  int64_t size() const {
    return kind_ == Kind::kBytes ? 256 : kind_ == Kind::kTokens ? token_count_ : static_cast<int64_t>(characters_.size());
  }

  // Calls emit(token) for each token of `text`. Throws TokenError, with the offset in bytes, for invalid UTF-8 and for a
  // character that the vocabulary lacks.
  template <typename Emit>
  void encode(std::string_view text, Emit&& emit) const {
    for (size_t offset = 0; offset < text.size();) emit(next(text, offset));
  }
  std::vector<int64_t> encode(std::string_view text) const;

  // Throws TokenError for a token below 0 or not below size(). Bytes may end in the middle of a character.
  std::string decode(std::span<const int64_t> tokens) const;

  bool operator==(const Vocabulary& other) const {
    return kind_ == other.kind_ && characters_ == other.characters_ && token_count_ == other.token_count_ && id_ == other.id_;
  }

 private:
  // The token at text[offset], which is moved behind it.
  int64_t next(std::string_view text, size_t& offset) const {
    if (kind_ == Kind::kBytes) return static_cast<uint8_t>(text[offset++]);
    const auto byte = static_cast<uint8_t>(text[offset]);
    if (byte < kAscii && ascii_[byte] >= 0) return ++offset, ascii_[byte];
    return next_character(text, offset);
  }
  int64_t next_character(std::string_view text, size_t& offset) const;
  void set_characters(std::u32string characters);

  static constexpr size_t kAscii = 128;
  Kind kind_ = Kind::kBytes;
  std::u32string characters_;   // sorted; token i is characters_[i]
  int64_t token_count_ = 0;     // kTokens
  std::string id_;              // kTokens
  std::vector<int32_t> ascii_;  // tokens of the first 128 code points, -1 where there is none
};

}  // namespace latte::formats
