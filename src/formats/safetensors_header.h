// The JSON header of a safetensors file, parsed and checked against the bytes that follow it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/dtype.h"
#include "formats/safetensors.h"

namespace latte::formats {

constexpr std::string_view kMetadataKey = "__metadata__";

// Bytes of a tensor; nothing where a dimension is negative or the product doesn't fit in 63 bits.
std::optional<uint64_t> checked_bytes(DType dtype, const std::vector<int64_t>& shape);

struct HeaderEntry {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // in the data behind the header
  uint64_t end = 0;
};

struct SafetensorsHeader {
  Metadata metadata;
  std::vector<HeaderEntry> entries;  // sorted by name
};

// Throws FormatError, which names `path`, unless `json` is a well-formed header whose tensors fill exactly `data_size` bytes.
// Memory stays within a small multiple of json.size().
SafetensorsHeader parse_safetensors_header(const std::string& path, std::string_view json, uint64_t data_size);

}  // namespace latte::formats
