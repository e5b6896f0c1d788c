#include "formats/error.h"

#include <system_error>

#include "formats/utf8.h"

namespace latte::formats {
namespace {

// Paths come from the user and stay readable as they are, unless they hold what would break the line.
std::string one_line(const std::string& path) {
  for (size_t i = 0; i < path.size();) {
    const CodePoint point = decode_utf8(path, i);
    if (point.length == 0 || point.value < 0x20 || (point.value >= 0x7F && point.value < 0xA0)) return quote(path);
    i += point.length;
  }
  return path;
}

}  // namespace

std::string quote(std::string_view text) {
  constexpr int kLongest = 64;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  int characters = 0;
  for (size_t i = 0; i < text.size(); ++characters) {
    if (characters == kLongest) return out + "…\"";
    const CodePoint point = decode_utf8(text, i);
    const bool control = point.value < 0x20 || (point.value >= 0x7F && point.value < 0xA0);
    if (point.length == 0 || (point.length == 1 && control)) {
      const auto byte = static_cast<unsigned char>(text[i]);
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
      i += 1;
    } else if (control) {
      out += "\\x";
      out += kHex[point.value >> 4];
      out += kHex[point.value & 15];
      i += point.length;
    } else {
      out += text.substr(i, point.length);
      i += point.length;
    }
  }
  return out + "\"";
}

FileError::FileError(std::string_view action, const std::string& path, int error_number)
    : std::runtime_error("cannot " + std::string(action) + " " + one_line(path) + ": " +
                         std::generic_category().message(error_number)),
      path_(path),
      error_number_(error_number) {}

FormatError::FormatError(const std::string& path, std::string_view problem)
    : std::runtime_error(one_line(path) + ": " + std::string(problem)), path_(path) {}

}  // namespace latte::formats
