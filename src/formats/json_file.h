// Small JSON files that come with models, and access to their fields.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace latte::formats {

constexpr uint64_t kLargestJson = 64'000'000;  // bytes, unless a caller says less

// Throws FileError, or FormatError: no JSON object, larger than `largest` bytes, or a key that an object has twice (which the
// parser would merge).
nlohmann::json read_json_object(const std::string& path, uint64_t largest = kLargestJson);
nlohmann::json parse_json_object(const std::string& path, std::string_view text);  // the same of a text; `path` is for errors

// Whether a text is one JSON object nested no deeper than those take. Keeps no document, so that a hostile text costs no memory.
bool is_json_object(std::string_view text);

// A value on one line, in ASCII, cut short: for messages.
std::string shown(const nlohmann::json& value);

// Fields of an object. Errors are FormatErrors that name the file, the field, what it holds and what was expected. null counts as
// absent.
class JsonFields {
 public:
  // `object` is borrowed; `where` stands before a field's name in messages ("rope_scaling.").
  JsonFields(const std::string& path, const nlohmann::json& object, std::string where = "")
      : path_(path), object_(object), where_(std::move(where)) {}

  bool has(const char* key) const;
  int64_t integer(const char* key, int64_t least, int64_t most) const;
  int64_t integer_or(const char* key, int64_t otherwise, int64_t least, int64_t most) const;
  double positive(const char* key) const;  // below 10^12
  double positive_or(const char* key, double otherwise) const;
  bool boolean_or(const char* key, bool otherwise) const;
  std::string string(const char* key) const;
  std::string string_or(const char* key, std::string otherwise) const;
  const nlohmann::json& at(const char* key) const;  // there, or an error
  JsonFields object(const char* key) const;
  [[noreturn]] void refuse(const char* key, const std::string& expected) const;

 private:
  const std::string& path_;
  const nlohmann::json& object_;
  std::string where_;
};

}  // namespace latte::formats
