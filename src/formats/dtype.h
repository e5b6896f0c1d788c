// Element types of tensors in files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace latte::formats {

enum class DType : uint8_t {
  kFloat64,
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUInt8,
  kBool,  // one byte, 0 or 1
};

struct DTypeInfo {
  std::string_view name;  // in safetensors
  size_t size;            // bytes an element
};

inline constexpr std::array<DTypeInfo, 10> kDTypes = {{
    {"F64", 8},
    {"F32", 4},
    {"F16", 2},
    {"BF16", 2},
    {"I64", 8},
    {"I32", 4},
    {"I16", 2},
    {"I8", 1},
    {"U8", 1},
    {"BOOL", 1},
}};

constexpr std::string_view name_of(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].name; }
constexpr size_t size_of(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].size; }

constexpr std::optional<DType> dtype_named(std::string_view name) {
  for (size_t i = 0; i < kDTypes.size(); ++i) {
    if (kDTypes[i].name == name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

}  // namespace latte::formats
