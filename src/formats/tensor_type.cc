#include "formats/tensor_type.h"

#include <ggml.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <stdexcept>
#include <string>

namespace latte::formats {
namespace {

ggml_type raw(TensorType type) { return static_cast<ggml_type>(type); }

const ggml_type_traits& traits(TensorType type) {
  if (!is_known(type)) throw std::invalid_argument("tensor type " + std::to_string(static_cast<uint32_t>(type)) + " is unknown");
  return *ggml_get_type_traits(raw(type));
}

template <typename T>
void convert(std::span<const std::byte> bytes, std::span<float> floats) {
  for (size_t i = 0; i < floats.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    floats[i] = static_cast<float>(value);
  }
}

// Plain numbers, for which ggml has no conversion.
using Convert = void (*)(std::span<const std::byte>, std::span<float>);
Convert plain_conversion(TensorType type) {
  switch (raw(type)) {
    case GGML_TYPE_F32:
      return convert<float>;
    case GGML_TYPE_F64:
      return convert<double>;
    case GGML_TYPE_I8:
      return convert<int8_t>;
    case GGML_TYPE_I16:
      return convert<int16_t>;
    case GGML_TYPE_I32:
      return convert<int32_t>;
    case GGML_TYPE_I64:
      return convert<int64_t>;
    default:
      return nullptr;
  }
}

}  // namespace

bool is_known(TensorType type) {
  if (static_cast<uint32_t>(type) >= static_cast<uint32_t>(GGML_TYPE_COUNT)) return false;
  // Numbers of types that were removed have traits without a block.
  const ggml_type_traits* found = ggml_get_type_traits(raw(type));
  return found->type_name != nullptr && found->blck_size > 0 && found->type_size > 0;
}

std::string_view name_of(TensorType type) { return traits(type).type_name; }

std::optional<TensorType> tensor_type_named(std::string_view name) {
  const auto same = [](unsigned char a, unsigned char b) { return std::tolower(a) == std::tolower(b); };
  for (uint32_t i = 0; i < static_cast<uint32_t>(GGML_TYPE_COUNT); ++i) {
    const auto type = static_cast<TensorType>(i);
    if (is_known(type) && std::ranges::equal(name_of(type), name, same)) return type;
  }
  return std::nullopt;
}

int64_t block_size(TensorType type) { return traits(type).blck_size; }

std::optional<uint64_t> tensor_bytes(TensorType type, int64_t rows, int64_t columns) {
  const ggml_type_traits& found = traits(type);
  if (rows < 0 || columns < 0 || columns % found.blck_size != 0) return std::nullopt;
  int64_t blocks = 0, bytes = 0;
  if (__builtin_mul_overflow(rows, columns / found.blck_size, &blocks) ||
      __builtin_mul_overflow(blocks, static_cast<int64_t>(found.type_size), &bytes)) {
    return std::nullopt;
  }
  return static_cast<uint64_t>(bytes);
}

bool can_dequantize(TensorType type) { return plain_conversion(type) != nullptr || traits(type).to_float != nullptr; }

bool can_quantize(TensorType type) {
  switch (raw(type)) {
    case GGML_TYPE_F32:
    case GGML_TYPE_F16:
    case GGML_TYPE_BF16:
      return true;
    default:
      // Types without an own to_float are ggml's intermediate ones.
      return traits(type).is_quantized && traits(type).to_float != nullptr && !ggml_quantize_requires_imatrix(raw(type));
  }
}

void dequantize(TensorType type, std::span<const std::byte> bytes, std::span<float> floats) {
  const ggml_type_traits& found = traits(type);
  const auto expected = tensor_bytes(type, 1, static_cast<int64_t>(floats.size()));
  if (!expected || *expected != bytes.size()) {
    throw std::invalid_argument("dequantize: " + std::to_string(bytes.size()) + " bytes don't make " +
                                std::to_string(floats.size()) + " elements of " + found.type_name);
  }
  if (floats.empty()) return;
  if (const Convert plain = plain_conversion(type)) return plain(bytes, floats);
  if (found.to_float == nullptr) throw std::invalid_argument(std::string("dequantize: ggml can't read ") + found.type_name);
  found.to_float(bytes.data(), floats.data(), static_cast<int64_t>(floats.size()));
}

std::vector<std::byte> quantize(TensorType type, std::span<const float> floats, int64_t columns) {
  if (columns < 1 || floats.size() % static_cast<size_t>(columns) != 0) {
    throw std::invalid_argument("quantize: " + std::to_string(floats.size()) + " elements don't make rows of " +
                                std::to_string(columns));
  }
  const int64_t rows = static_cast<int64_t>(floats.size()) / columns;
  const auto size = tensor_bytes(type, rows, columns);
  if (!size) {
    throw std::invalid_argument("quantize: rows of " + std::to_string(columns) + " elements make no whole blocks of " +
                                std::string(name_of(type)));
  }
  if (!can_quantize(type)) throw std::invalid_argument("quantize: can't write " + std::string(name_of(type)));
  std::vector<std::byte> bytes(*size);
  if (rows > 0) ggml_quantize_chunk(raw(type), floats.data(), bytes.data(), 0, rows, columns, /*imatrix=*/nullptr);
  return bytes;
}

}  // namespace latte::formats
