#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "formats/error.h"
#include "formats/gguf.h"

namespace latte::formats {
namespace {

template <typename T>
constexpr bool kIsInteger = std::is_integral_v<T> && !std::is_same_v<T, bool>;

template <typename T>
constexpr std::string_view type_name() {
  if constexpr (std::is_same_v<T, bool>) return "bool";
  if constexpr (std::is_same_v<T, std::string>) return "string";
  if constexpr (std::is_same_v<T, float>) return "float32";
  if constexpr (std::is_same_v<T, double>) return "float64";
  if constexpr (std::is_same_v<T, uint8_t>) return "uint8";
  if constexpr (std::is_same_v<T, int8_t>) return "int8";
  if constexpr (std::is_same_v<T, uint16_t>) return "uint16";
  if constexpr (std::is_same_v<T, int16_t>) return "int16";
  if constexpr (std::is_same_v<T, uint32_t>) return "uint32";
  if constexpr (std::is_same_v<T, int32_t>) return "int32";
  if constexpr (std::is_same_v<T, uint64_t>) return "uint64";
  if constexpr (std::is_same_v<T, int64_t>) return "int64";
  return "";
}

std::string shortest(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return text;
}

std::string within(int64_t least, int64_t most) {
  return "an integer in " + std::to_string(least) + " … " + std::to_string(most);
}

}  // namespace

std::string describe(const GgufValue& value) {
  return std::visit(
      [](const auto& held) -> std::string {
        using T = std::decay_t<decltype(held)>;
        if constexpr (std::is_same_v<T, GgufArray>) {
          return std::visit(
              [](const auto& array) {
                using E = typename std::decay_t<decltype(array)>::value_type;
                return "array of " + std::to_string(array.size()) + " " + std::string(type_name<E>());
              },
              held);
        } else if constexpr (std::is_same_v<T, std::string>) {
          return "string " + quote(held);
        } else if constexpr (std::is_same_v<T, bool>) {
          return held ? "bool true" : "bool false";
        } else if constexpr (std::is_floating_point_v<T>) {
          return std::string(type_name<T>()) + " " + shortest(held);
        } else {
          return std::string(type_name<T>()) + " " + std::to_string(held);
        }
      },
      value);
}

const GgufValue* GgufMetadata::find(std::string_view key) const {
  const auto it = places_.find(key);
  return it == places_.end() ? nullptr : &entries_[it->second].second;
}

void GgufMetadata::set(const std::string& key, GgufValue value) {
  const auto [it, added] = places_.emplace(key, entries_.size());
  if (added) {
    entries_.emplace_back(key, std::move(value));
  } else {
    entries_[it->second].second = std::move(value);
  }
}

void GgufMetadata::remove(std::string_view key) {
  const auto it = places_.find(key);
  if (it == places_.end()) return;
  const size_t place = it->second;
  entries_.erase(entries_.begin() + static_cast<std::ptrdiff_t>(place));
  places_.erase(it);
  for (auto& [name, other] : places_) other -= other > place ? 1 : 0;
}

const GgufValue& GgufMetadata::at(std::string_view key) const {
  if (const GgufValue* value = find(key)) return *value;
  throw FormatError(source_, "metadata " + quote(key) + " is missing");
}

void GgufMetadata::refuse(std::string_view key, const std::string& expected) const {
  const GgufValue* value = find(key);
  throw FormatError(source_,
                    "metadata " + quote(key) + " is " + (value ? describe(*value) : "missing") + ", expected " + expected);
}

int64_t GgufMetadata::integer(std::string_view key, int64_t least, int64_t most) const {
  return std::visit(
      [&](const auto& held) -> int64_t {
        using T = std::decay_t<decltype(held)>;
        if constexpr (kIsInteger<T>) {
          if (std::in_range<int64_t>(held) && static_cast<int64_t>(held) >= least && static_cast<int64_t>(held) <= most) {
            return static_cast<int64_t>(held);
          }
        }
        refuse(key, within(least, most));
      },
      at(key));
}

double GgufMetadata::number(std::string_view key) const {
  return std::visit(
      [&](const auto& held) -> double {
        using T = std::decay_t<decltype(held)>;
        if constexpr (kIsInteger<T> || std::is_floating_point_v<T>) {
          if (std::isfinite(static_cast<double>(held))) return static_cast<double>(held);
        }
        refuse(key, "a finite number");
      },
      at(key));
}

bool GgufMetadata::boolean(std::string_view key) const {
  const bool* held = std::get_if<bool>(&at(key));
  if (held == nullptr) refuse(key, "a bool");
  return *held;
}

const std::string& GgufMetadata::string(std::string_view key) const {
  const std::string* held = std::get_if<std::string>(&at(key));
  if (held == nullptr) refuse(key, "a string");
  return *held;
}

std::vector<int64_t> GgufMetadata::integers(std::string_view key) const {
  const auto* array = std::get_if<GgufArray>(&at(key));
  if (array == nullptr) refuse(key, "an array of integers");
  return std::visit(
      [&](const auto& held) -> std::vector<int64_t> {
        using T = typename std::decay_t<decltype(held)>::value_type;
        if constexpr (kIsInteger<T>) {
          const bool fits = std::all_of(held.begin(), held.end(), [](T value) { return std::in_range<int64_t>(value); });
          if (fits) return {held.begin(), held.end()};
        }
        refuse(key, "an array of integers below 2^63");
      },
      *array);
}

std::vector<double> GgufMetadata::numbers(std::string_view key) const {
  const auto* array = std::get_if<GgufArray>(&at(key));
  if (array == nullptr) refuse(key, "an array of numbers");
  return std::visit(
      [&](const auto& held) -> std::vector<double> {
        using T = typename std::decay_t<decltype(held)>::value_type;
        if constexpr (kIsInteger<T> || std::is_floating_point_v<T>) return {held.begin(), held.end()};
        refuse(key, "an array of numbers");
      },
      *array);
}

std::vector<bool> GgufMetadata::booleans(std::string_view key) const {
  const auto* array = std::get_if<GgufArray>(&at(key));
  const auto* held = array ? std::get_if<std::vector<bool>>(array) : nullptr;
  if (held == nullptr) refuse(key, "an array of bool");
  return *held;
}

const std::vector<std::string>& GgufMetadata::strings(std::string_view key) const {
  const auto* array = std::get_if<GgufArray>(&at(key));
  const auto* held = array ? std::get_if<std::vector<std::string>>(array) : nullptr;
  if (held == nullptr) refuse(key, "an array of strings");
  return *held;
}

int64_t GgufMetadata::integer_or(std::string_view key, int64_t otherwise, int64_t least, int64_t most) const {
  return has(key) ? integer(key, least, most) : otherwise;
}
double GgufMetadata::number_or(std::string_view key, double otherwise) const { return has(key) ? number(key) : otherwise; }
bool GgufMetadata::boolean_or(std::string_view key, bool otherwise) const { return has(key) ? boolean(key) : otherwise; }
std::string GgufMetadata::string_or(std::string_view key, std::string otherwise) const {
  if (!has(key)) return otherwise;
  return string(key);
}

}  // namespace latte::formats
