// Safetensors files (github.com/huggingface/safetensors): eight bytes of header length (little-endian), a JSON header that gives
// each tensor's dtype, shape and place, and the tensors' bytes, row-major, without gap or overlap.
//
// A file is checked as a whole when it is opened; what SafetensorsFile hands out afterwards lies inside the file and fits its
// shape and dtype.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/atomic_file.h"
#include "formats/dtype.h"
#include "formats/mapped_file.h"

namespace latte::formats {

constexpr uint64_t kLargestHeader = 100'000'000;  // bytes, as in the reference implementation
constexpr size_t kLargestRank = 64;

using Metadata = std::map<std::string, std::string>;

struct TensorSpec {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;  // no dimensions: a scalar
};

// A tensor in a file or in memory. `data` is borrowed, contiguous, row-major, little-endian and aligned to nothing: copy it with
// memcpy, don't cast its pointer.
struct TensorView : TensorSpec {
  std::span<const std::byte> data;
};

// "F32 [2, 3]".
std::string describe(const TensorSpec& spec);

class SafetensorsFile {
 public:
  // Throws FileError, or FormatError for whatever the file has wrong.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const Metadata& metadata() const { return metadata_; }
  const std::vector<TensorView>& tensors() const { return tensors_; }  // sorted by name

  const TensorView* find(std::string_view name) const;           // null where there is none
  const TensorView& at(std::string_view name) const;             // throws FormatError where there is none
  const std::string& metadata_at(const std::string& key) const;  // likewise

  void release(std::span<const std::byte> part) const { file_.release(part); }  // of a tensor's data: MappedFile

  // Throws one FormatError that lists the tensors of `expected` that are missing or of another dtype or shape, and the file's
  // tensors that `expected` doesn't have.
  void require(std::span<const TensorSpec> expected) const;

 private:
  MappedFile file_;
  Metadata metadata_;
  std::vector<TensorView> tensors_;
};

// Writes `path` atomically: keys sorted, the header padded to 8 bytes, tensors of large elements first so that each is aligned.
// Throws FileError, and std::invalid_argument for tensors that make no file: a name twice, "__metadata__" or not UTF-8, data that
// doesn't fit its shape.
void write_safetensors(const std::string& path, std::span<const TensorView> tensors, const Metadata& metadata = {},
                       FileOperations& operations = FileOperations::system());

}  // namespace latte::formats
