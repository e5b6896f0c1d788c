#include "formats/pretrained.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>

#include "formats/adapter.h"
#include "formats/error.h"
#include "formats/hash.h"
#include "formats/hugging_face.h"

namespace latte::formats {
namespace {

class GgufPretrained : public PretrainedFile {
 public:
  explicit GgufPretrained(const std::string& path) : PretrainedFile(path), file_(path) {
    metadata_ = file_.metadata();
    if (const int64_t pieces = metadata_.integer_or("split.count", 1, 0, UINT16_MAX); pieces > 1) {
      throw FormatError(path, "one of " + std::to_string(pieces) + " pieces of a model; expected a file that is whole");
    }
    tensors_ = base_tensors(file_);
    config_ = decoder_config(metadata_, tensors_);
    require_decoder_tensors(path, config_, tensors_);
  }

  void read_rows(std::string_view name, int64_t first_row, std::span<float> out) const override {
    const GgufTensor& tensor = file_.at(name);
    const Rows rows = checked_rows(tensor, first_row, out.size());
    const uint64_t bytes = tensor_bytes(tensor.type, rows.count, rows.columns).value();
    const uint64_t begin = tensor_bytes(tensor.type, first_row, rows.columns).value();
    dequantize(tensor.type, tensor.data.subspan(begin, bytes), out);
  }

 private:
  GgufFile file_;
};

}  // namespace

const GgufTensorSpec& PretrainedFile::tensor(std::string_view name) const {
  const auto it = std::find_if(tensors_.begin(), tensors_.end(), [&](const GgufTensorSpec& spec) { return spec.name == name; });
  if (it == tensors_.end()) throw FormatError(path_, "tensor " + quote(name) + " is missing");
  return *it;
}

PretrainedFile::Rows PretrainedFile::checked_rows(const GgufTensorSpec& spec, int64_t first_row, size_t elements) const {
  const int64_t columns = spec.shape.empty() ? 1 : spec.shape.back();
  const int64_t rows = spec.elements() / columns, count = static_cast<int64_t>(elements) / columns;
  if (first_row < 0 || count > rows || first_row > rows - count || count * columns != static_cast<int64_t>(elements)) {
    throw std::invalid_argument("tensor " + quote(spec.name) + " (" + describe(spec) + ") has no rows that make " +
                                std::to_string(elements) + " elements from row " + std::to_string(first_row));
  }
  return {count, columns};
}

std::vector<float> PretrainedFile::read(std::string_view name) const {
  std::vector<float> out(static_cast<size_t>(tensor(name).elements()));
  read_rows(name, 0, out);
  return out;
}

std::unique_ptr<PretrainedFile> open_pretrained(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return open_hugging_face(path);
  return std::make_unique<GgufPretrained>(path);
}

std::string hash_of_pretrained(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (!fs::is_directory(path, error)) return hash_of_file(path);
  Hash hash;
  hash.add(MappedFile((fs::path(path) / "config.json").string()).text());
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(path, error)) {
    if (entry.path().extension() == ".safetensors") names.push_back(entry.path().filename().string());
  }
  if (error) throw FileError("read", path, error.value());
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) {
    hash.add(std::string_view(name));
    hash.add(MappedFile((fs::path(path) / name).string()).text());
  }
  return hash.digits();
}

}  // namespace latte::formats
