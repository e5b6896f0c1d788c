#include "formats/vocabulary.h"

#include <algorithm>
#include <bitset>
#include <charconv>
#include <cstdio>
#include <limits>
#include <memory>
#include <utility>

#include "formats/error.h"
#include "formats/utf8.h"

namespace latte::formats {
namespace {

constexpr std::string_view kBytesName = "bytes";
constexpr std::string_view kCharactersPrefix = "characters:";
constexpr std::string_view kTokensPrefix = "tokens:";

CodePoint decode_or_throw(std::string_view text, size_t offset) {
  const CodePoint point = decode_utf8(text, offset);
  if (point.length > 0) return point;
  throw TokenError("invalid UTF-8 at byte " + std::to_string(offset) + ": " + quote(text.substr(offset, 1)) +
                   " begins no character; a vocabulary of bytes takes any text");
}

}  // namespace

Vocabulary Vocabulary::characters_of(std::string_view text) {
  const auto seen = std::make_unique<std::bitset<kCodePoints>>();
  for (size_t offset = 0; offset < text.size();) {
    const CodePoint point = decode_or_throw(text, offset);
    seen->set(point.value);
    offset += point.length;
  }
  std::u32string characters;
  for (char32_t value = 0; value < kCodePoints; ++value) {
    if (seen->test(value)) characters.push_back(value);
  }
  Vocabulary vocabulary;
  vocabulary.set_characters(std::move(characters));
  return vocabulary;
}

Vocabulary Vocabulary::from_description(std::string_view description) {
  if (description == kBytesName) return bytes();
  if (description.starts_with(kTokensPrefix)) {
    const std::string_view rest = description.substr(kTokensPrefix.size());
    const size_t colon = std::min(rest.find(':'), rest.size());
    int64_t size = 0;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + colon, size);
    if (error == std::errc() && end == rest.data() + colon && colon < rest.size()) {
      Vocabulary vocabulary = tokens(size, std::string(rest.substr(colon + 1)));
      if (vocabulary.description() == description) return vocabulary;
    }
    throw std::invalid_argument("vocabulary is " + quote(description) + ", expected \"tokens:SIZE:ID\"");
  }
  if (!description.starts_with(kCharactersPrefix)) {
    throw std::invalid_argument("vocabulary is " + quote(description) + ", expected \"bytes\", \"characters:…\" or \"tokens:…\"");
  }
  const std::string_view text = description.substr(kCharactersPrefix.size());
  Vocabulary vocabulary = characters_of(text);
  // Were they in another order, the tokens would mean other characters than those that a model was trained on.
  if (text.empty() || vocabulary.description() != description) {
    throw std::invalid_argument("vocabulary: no characters, or out of order, or twice; expected each once by code point");
  }
  return vocabulary;
}

Vocabulary Vocabulary::tokens(int64_t size, std::string id) {
  const auto is_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  Vocabulary vocabulary;
  vocabulary.kind_ = Kind::kTokens;
  vocabulary.token_count_ = size;
  vocabulary.ascii_.assign(kAscii, -1);
  vocabulary.id_ = std::move(id);
  if (size < 1 || size > std::numeric_limits<int32_t>::max() || vocabulary.id_.size() != 32 ||
      !std::all_of(vocabulary.id_.begin(), vocabulary.id_.end(), is_digit)) {
    throw std::invalid_argument("vocabulary is " + quote(vocabulary.description()) +
                                ", expected \"tokens:SIZE:ID\", the id 32 hexadecimal digits");
  }
  return vocabulary;
}

std::string Vocabulary::description() const {
  if (kind_ == Kind::kTokens) return std::string(kTokensPrefix) + std::to_string(token_count_) + ":" + id_;
  if (kind_ == Kind::kBytes) return std::string(kBytesName);
  std::string text(kCharactersPrefix);
  for (char32_t value : characters_) append_utf8(text, value);
  return text;
}

std::vector<int64_t> Vocabulary::encode(std::string_view text) const {
  std::vector<int64_t> tokens;
  tokens.reserve(text.size());
  encode(text, [&](int64_t token) { tokens.push_back(token); });
  return tokens;
}

std::string Vocabulary::decode(std::span<const int64_t> tokens) const {
  std::string text;
  for (int64_t token : tokens) {
    if (token < 0 || token >= size()) {
      throw TokenError("invalid token " + std::to_string(token) + ": expected 0 to " + std::to_string(size() - 1));
    }
    if (kind_ == Kind::kTokens) throw TokenError("a tokeniser's tokens become text by that tokeniser alone");
    if (kind_ == Kind::kBytes) {
      text.push_back(static_cast<char>(token));
    } else {
      append_utf8(text, characters_[static_cast<size_t>(token)]);
    }
  }
  return text;
}

int64_t Vocabulary::next_character(std::string_view text, size_t& offset) const {
  if (kind_ == Kind::kTokens) throw TokenError("a text becomes a tokeniser's tokens by that tokeniser alone: latte tokenize");
  const CodePoint point = decode_or_throw(text, offset);
  const auto it = std::lower_bound(characters_.begin(), characters_.end(), point.value);
  if (it == characters_.end() || *it != point.value) {
    char code[16];
    std::snprintf(code, sizeof(code), "U+%04X", static_cast<unsigned>(point.value));
    throw TokenError("invalid token: the character " + quote(text.substr(offset, point.length)) + " (" + code + ") at byte " +
                     std::to_string(offset) + " is none of the vocabulary's " + std::to_string(size()));
  }
  offset += point.length;
  return it - characters_.begin();
}

void Vocabulary::set_characters(std::u32string characters) {
  kind_ = Kind::kCharacters;
  characters_ = std::move(characters);
  ascii_.assign(kAscii, -1);
  for (size_t i = 0; i < characters_.size() && characters_[i] < kAscii; ++i) ascii_[characters_[i]] = static_cast<int32_t>(i);
}

}  // namespace latte::formats
