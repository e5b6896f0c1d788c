// A pretrained model on disk, whatever its format, seen as a GGUF file: metadata, tensors by GGUF's names, rows as float32.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/decoder_config.h"
#include "formats/gguf.h"

namespace latte::formats {

class PretrainedFile {
 public:
  virtual ~PretrainedFile() = default;

  const std::string& path() const { return path_; }
  const GgufMetadata& metadata() const { return metadata_; }
  const DecoderConfig& config() const { return config_; }
  // Exactly those of decoder_tensors(config()).
  const std::vector<GgufTensorSpec>& tensors() const { return tensors_; }
  const GgufTensorSpec& tensor(std::string_view name) const;  // throws FormatError where there is none

  // Rows `first_row`, … of tensor `name`, as many as `out` holds whole rows of; a tensor of one dimension is one row. Throws
  // std::invalid_argument for rows that aren't there. Several threads may read at once.
  virtual void read_rows(std::string_view name, int64_t first_row, std::span<float> out) const = 0;
  std::vector<float> read(std::string_view name) const;  // the whole tensor

 protected:
  explicit PretrainedFile(const std::string& path) : path_(path) {}
  // Rows asked for, and elements of one. Throws as read_rows does.
  struct Rows {
    int64_t count, columns;
  };
  Rows checked_rows(const GgufTensorSpec& spec, int64_t first_row, size_t elements) const;

  std::string path_;
  GgufMetadata metadata_;
  DecoderConfig config_;
  std::vector<GgufTensorSpec> tensors_;
};

// Opens a GGUF file or a Hugging Face folder (formats/hugging_face.h). Throws FileError, or FormatError for whatever is wrong
// with it: the file's form, an unknown architecture, sizes out of range, missing or unexpected tensors.
std::unique_ptr<PretrainedFile> open_pretrained(const std::string& path);

// What tells this model from any other, for adapters: the hash of the file, or of the folder's config.json and weights. Throws
// FileError.
std::string hash_of_pretrained(const std::string& path);

}  // namespace latte::formats
