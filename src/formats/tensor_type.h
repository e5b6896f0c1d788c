// The element types of GGUF tensors: ggml's, of which most are quantised in blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace latte::formats {

// ggml's number of a type. Those that latte names itself; any other that this ggml knows is as good.
enum class TensorType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kIQ4_XS = 23,
  kI32 = 26,
  kBF16 = 30,
};

// Whether this ggml knows the type. The functions below take known types only.
bool is_known(TensorType type);
std::string_view name_of(TensorType type);                           // ggml's: "f32", "q4_K"
std::optional<TensorType> tensor_type_named(std::string_view name);  // capital or small letters
int64_t block_size(TensorType type);                                 // elements a block: a row holds whole blocks

// Bytes of a tensor whose rows have `columns` elements; nothing where columns are no whole blocks, a number is negative, or the
// product doesn't fit in 63 bits.
std::optional<uint64_t> tensor_bytes(TensorType type, int64_t rows, int64_t columns);

// Whether dequantize() can read the type, and whether quantize() can write it.
bool can_dequantize(TensorType type);
bool can_quantize(TensorType type);

// bytes -> floats, of whole blocks. Throws std::invalid_argument: sizes that don't match, a type that can't be read.
void dequantize(TensorType type, std::span<const std::byte> bytes, std::span<float> floats);
// floats [rows, columns] -> bytes. Throws std::invalid_argument: columns that are no whole blocks, a type that can't be written.
std::vector<std::byte> quantize(TensorType type, std::span<const float> floats, int64_t columns);

}  // namespace latte::formats
