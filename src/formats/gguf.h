// GGUF files, version 3 and 2: typed metadata, then tensors in any of ggml's types. Read and written here rather than through
// ggml, which ends the process for some files and for a key of another type; a file that passes is safe to hand to libllama.
//
// A file is checked as a whole when it is opened; what GgufFile hands out afterwards lies inside the file and fits its shape and
// type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "formats/atomic_file.h"
#include "formats/mapped_file.h"
#include "formats/tensor_type.h"

namespace latte::formats {

constexpr size_t kLargestGgufName = 63;  // bytes of a tensor's name, ggml's limit
constexpr size_t kLargestGgufRank = 4;
constexpr uint32_t kDefaultGgufAlignment = 32;

// Alternatives in the order of GGUF's type numbers; arrays don't nest.
using GgufArray = std::variant<std::vector<uint8_t>, std::vector<int8_t>, std::vector<uint16_t>, std::vector<int16_t>,
                               std::vector<uint32_t>, std::vector<int32_t>, std::vector<float>, std::vector<bool>,
                               std::vector<std::string>, std::vector<uint64_t>, std::vector<int64_t>, std::vector<double>>;
using GgufValue = std::variant<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, float, bool, std::string, GgufArray,
                               uint64_t, int64_t, double>;

// "uint32 576", "string "llama"", "array of 49152 strings": for messages and for looking at.
std::string describe(const GgufValue& value);

// Metadata in the order of the file, and typed access to it. Errors are FormatErrors that name the source (a path), the key, what
// it holds and what was expected.
class GgufMetadata {
 public:
  GgufMetadata() = default;
  explicit GgufMetadata(std::string source) : source_(std::move(source)) {}

  const std::string& source() const { return source_; }
  const std::vector<std::pair<std::string, GgufValue>>& entries() const { return entries_; }
  bool has(std::string_view key) const { return find(key) != nullptr; }
  const GgufValue* find(std::string_view key) const;  // null where there is none

  void set(const std::string& key, GgufValue value);  // replaces, or appends
  void remove(std::string_view key);                  // does nothing where there is none

  // Any of GGUF's integer types, within least … most.
  int64_t integer(std::string_view key, int64_t least, int64_t most) const;
  double number(std::string_view key) const;  // integers too; finite
  bool boolean(std::string_view key) const;
  const std::string& string(std::string_view key) const;
  std::vector<int64_t> integers(std::string_view key) const;  // arrays
  std::vector<double> numbers(std::string_view key) const;
  std::vector<bool> booleans(std::string_view key) const;
  const std::vector<std::string>& strings(std::string_view key) const;

  // The same for keys that may be absent.
  int64_t integer_or(std::string_view key, int64_t otherwise, int64_t least, int64_t most) const;
  double number_or(std::string_view key, double otherwise) const;
  bool boolean_or(std::string_view key, bool otherwise) const;
  std::string string_or(std::string_view key, std::string otherwise) const;

  // Throws the error of a key whose value isn't as expected.
  [[noreturn]] void refuse(std::string_view key, const std::string& expected) const;

 private:
  const GgufValue& at(std::string_view key) const;

  std::string source_;
  std::vector<std::pair<std::string, GgufValue>> entries_;
  std::map<std::string, size_t, std::less<>> places_;
};

struct GgufTensorSpec {
  std::string name;
  TensorType type = TensorType::kF32;
  // Row-major, as in torch: the last dimension is contiguous. ggml's ne[] is the reverse. No dimensions: a scalar.
  std::vector<int64_t> shape;

  int64_t elements() const;  // of a valid shape
};

// "q4_1 [576, 1536]".
std::string describe(const GgufTensorSpec& spec);

// `data` is borrowed; of a file it is aligned to the file's alignment (at least 8).
struct GgufTensor : GgufTensorSpec {
  std::span<const std::byte> data;

  std::vector<float> floats() const;  // dequantised; throws std::invalid_argument for a type that ggml can't read
};

class GgufFile {
 public:
  // Throws FileError, or FormatError for whatever the file has wrong.
  explicit GgufFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  uint64_t size() const { return file_.size(); }  // bytes
  std::span<const std::byte> bytes() const { return file_.bytes(); }
  uint32_t version() const { return version_; }
  uint32_t alignment() const { return alignment_; }
  const GgufMetadata& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }  // in the order of the file

  const GgufTensor* find(std::string_view name) const;  // null where there is none
  const GgufTensor& at(std::string_view name) const;    // throws FormatError where there is none

 private:
  MappedFile file_;
  uint32_t version_ = 0;
  uint32_t alignment_ = kDefaultGgufAlignment;
  GgufMetadata metadata_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, size_t, std::less<>> places_;
};

// Whether the file begins as a GGUF file does. Throws FileError.
bool is_gguf(const std::string& path);

// Writes `path` atomically: version 3, the metadata as it is, tensors in the order given, aligned to metadata
// "general.alignment" (32 unless given). Throws FileError, and std::invalid_argument for what makes no file: a name twice, too
// long or empty, data that doesn't fit its shape, more than 4 dimensions, an alignment that isn't uint32 and a power of two of
// 8 … 2^20.
void write_gguf(const std::string& path, const GgufMetadata& metadata, std::span<const GgufTensor> tensors,
                FileOperations& operations = FileOperations::system());

// The same with data made while it is written, so that it needn't be in memory as a whole: `produce(i, write)` calls write() any
// number of times with the bytes of tensor i, in order. What it throws leaves no file.
using WriteBytes = std::function<void(std::span<const std::byte>)>;
void write_gguf(const std::string& path, const GgufMetadata& metadata, std::span<const GgufTensorSpec> tensors,
                const std::function<void(size_t, const WriteBytes&)>& produce,
                FileOperations& operations = FileOperations::system());

// The bytes of a file of metadata alone. Throws std::invalid_argument as write_gguf does.
std::string gguf_without_tensors(const GgufMetadata& metadata);

}  // namespace latte::formats
