// Strict UTF-8 (RFC 3629): no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace latte::formats {

constexpr char32_t kCodePoints = 0x110000;  // one more than the greatest code point

struct CodePoint {
  char32_t value = 0;
  int length = 0;  // bytes; 0 marks invalid UTF-8
};

// The code point that starts at text[offset]; offset < text.size().
CodePoint decode_utf8(std::string_view text, size_t offset);

// Bytes that begin a code point: of valid UTF-8 the number of its code points.
size_t count_code_points(std::string_view text);

// Appends `value`, a valid code point, to `text`.
void append_utf8(std::string& text, char32_t value);

}  // namespace latte::formats
