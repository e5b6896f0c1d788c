// How structures of options are read from JSON and checked: every error is an OptionError that names the field, what it holds and
// what it may.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "formats/error.h"
#include "formats/option_error.h"

namespace latte::formats::fields {

// Products of three of these fit in 63 bits.
constexpr int64_t kLargestSize = int64_t{1} << 20;
constexpr int64_t kLargestCount = int64_t{1} << 40;

[[noreturn]] inline void fail(std::string_view field, const std::string& got, const std::string& expected) {
  throw OptionError(std::string(field) + " is " + got + ", expected " + expected);
}

inline std::string shown(const nlohmann::json& value) {
  if (value.is_string()) return quote(value.get_ref<const std::string&>());
  // Not taken apart: what is nested may be nested deeper than a stack.
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array of " + std::to_string(value.size());
  const std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  constexpr size_t kLongest = 64;
  return text.size() > kLongest ? text.substr(0, kLongest) + "…" : text;
}

inline void read(std::string_view field, const nlohmann::json& value, std::string& into) {
  if (!value.is_string()) fail(field, shown(value), "a string");
  into = value.get<std::string>();
}

inline void read(std::string_view field, const nlohmann::json& value, double& into) {
  if (!value.is_number()) fail(field, shown(value), "a number");
  into = value.get<double>();
}

inline void read(std::string_view field, const nlohmann::json& value, int64_t& into) {
  const bool too_large = value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()};
  if (!value.is_number_integer() || too_large) fail(field, shown(value), "an integer");
  into = value.get<int64_t>();
}

inline void read(std::string_view field, const nlohmann::json& value, bool& into) {
  if (!value.is_boolean()) fail(field, shown(value), "true or false");
  into = value.get<bool>();
}

template <typename T>
void read(std::string_view field, const nlohmann::json& value, std::vector<T>& into) {
  if (!value.is_array()) fail(field, shown(value), "an array");
  into.clear();
  for (const auto& element : value) read(field, element, into.emplace_back());
}

// Reads an object of known fields; `for_each` visits them as (name, reference).
template <typename ForEach>
void read_object(std::string_view what, const nlohmann::json& object, const ForEach& for_each) {
  if (!object.is_object()) throw OptionError(std::string(what) + "s: expected a JSON object, got " + shown(object));
  std::vector<std::string_view> known;
  for_each([&](const char* field, auto& into) {
    known.emplace_back(field);
    if (const auto found = object.find(field); found != object.end()) read(field, *found, into);
  });
  for (const auto& [field, value] : object.items()) {
    if (std::find(known.begin(), known.end(), field) == known.end()) {
      std::string expected;
      for (const std::string_view name : known) expected += (expected.empty() ? "" : ", ") + std::string(name);
      throw OptionError("unknown " + std::string(what) + " " + quote(field) + ", expected one of " + expected);
    }
  }
}

inline void check_range(std::string_view field, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    fail(field, std::to_string(value), "an integer in " + std::to_string(least) + " … " + std::to_string(most));
  }
}

inline void check_that(bool good, std::string_view field, double value, const std::string& expected) {
  if (good && std::isfinite(value)) return;
  fail(field, std::isfinite(value) ? nlohmann::json(value).dump() : std::to_string(value), expected);
}

}  // namespace latte::formats::fields
