#include "formats/json_file.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "formats/mapped_file.h"

namespace latte::formats {

using nlohmann::json;

namespace {

// Deeper than any model's file: what is nested is also copied and written by recursion.
constexpr int kDeepest = 64;

// Of a valid JSON text: the most arrays and objects that are open at a time.
int depth_of(std::string_view text) {
  int depth = 0, deepest = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted && c == '\\') {
      ++i;
    } else if (c == '"') {
      quoted = !quoted;
    } else if (!quoted && (c == '{' || c == '[')) {
      deepest = std::max(deepest, ++depth);
    } else if (!quoted && (c == '}' || c == ']')) {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

bool is_json_object(std::string_view text) {
  // The parser would take a NUL for the end, whatever follows.
  return text.starts_with('{') && text.find('\0') == text.npos && json::accept(text) && depth_of(text) <= kDeepest;
}

json parse_json_object(const std::string& path, std::string_view text) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto watch = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > kDeepest) throw FormatError(path, "JSON nested deeper than " + std::to_string(kDeepest));
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second) {
      throw FormatError(path, "the key " + quote(value.get<std::string>()) + " is there twice");
    }
    return true;
  };
  // The parser would take a NUL for the end, whatever follows.
  if (const size_t nul = text.find('\0'); nul != text.npos) {
    throw FormatError(path, "no valid JSON at byte " + std::to_string(nul + 1));
  }
  json value;
  try {
    value = json::parse(text.begin(), text.end(), watch);
  } catch (const json::parse_error& error) {
    // The library's own text may quote raw bytes of the file.
    const auto lines =
        std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(std::min(error.byte, text.size())), '\n');
    throw FormatError(path, "no valid JSON at byte " + std::to_string(error.byte) + ", line " + std::to_string(1 + lines));
  } catch (const json::exception&) {
    throw FormatError(path, "no valid JSON");
  }
  if (!value.is_object()) throw FormatError(path, "holds " + shown(value) + ", expected a JSON object");
  return value;
}

json read_json_object(const std::string& path, uint64_t largest) {
  const MappedFile file(path);
  if (file.size() > largest) {
    throw FormatError(path, std::to_string(file.size()) + " bytes, expected at most " + std::to_string(largest));
  }
  return parse_json_object(path, file.text());
}

std::string shown(const json& value) {
  constexpr size_t kLongest = 64;
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array of " + std::to_string(value.size());
  auto text = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "…";
  return text;
}

bool JsonFields::has(const char* key) const {
  const auto it = object_.find(key);
  return it != object_.end() && !it->is_null();
}

const json& JsonFields::at(const char* key) const {
  if (!has(key)) throw FormatError(path_, where_ + key + " is missing");
  return object_[key];
}

void JsonFields::refuse(const char* key, const std::string& expected) const {
  throw FormatError(path_, where_ + key + " is " + (has(key) ? shown(at(key)) : "missing") + ", expected " + expected);
}

int64_t JsonFields::integer(const char* key, int64_t least, int64_t most) const {
  const json& value = at(key);
  const bool fits = value.is_number_unsigned() ? std::in_range<int64_t>(value.get<uint64_t>()) : value.is_number_integer();
  if (fits && value.get<int64_t>() >= least && value.get<int64_t>() <= most) return value.get<int64_t>();
  refuse(key, "an integer in " + std::to_string(least) + " … " + std::to_string(most));
}

double JsonFields::positive(const char* key) const {
  constexpr double kMost = 1e12;
  const json& value = at(key);
  const double number = value.is_number() ? value.get<double>() : -1;
  if (!(number > 0 && number < kMost)) refuse(key, "a positive number");
  return number;
}

std::string JsonFields::string(const char* key) const {
  if (!at(key).is_string()) refuse(key, "a string");
  return at(key).get<std::string>();
}

JsonFields JsonFields::object(const char* key) const {
  if (!at(key).is_object()) refuse(key, "an object");
  return {path_, at(key), where_ + key + "."};
}

bool JsonFields::boolean_or(const char* key, bool otherwise) const {
  if (!has(key)) return otherwise;
  if (!at(key).is_boolean()) refuse(key, "true or false");
  return at(key).get<bool>();
}

int64_t JsonFields::integer_or(const char* key, int64_t otherwise, int64_t least, int64_t most) const {
  return has(key) ? integer(key, least, most) : otherwise;
}
double JsonFields::positive_or(const char* key, double otherwise) const { return has(key) ? positive(key) : otherwise; }
std::string JsonFields::string_or(const char* key, std::string otherwise) const {
  return has(key) ? string(key) : std::move(otherwise);
}

}  // namespace latte::formats
