#include "formats/pretrained.h"

#include <algorithm>
#include <stdexcept>

#include "formats/error.h"

namespace latte::formats {
namespace {

class GgufPretrained : public PretrainedFile {
 public:
  explicit GgufPretrained(const std::string& path) : PretrainedFile(path), file_(path) {
    metadata_ = file_.metadata();
    tensors_.assign(file_.tensors().begin(), file_.tensors().end());
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

std::unique_ptr<PretrainedFile> open_pretrained(const std::string& path) { return std::make_unique<GgufPretrained>(path); }

}  // namespace latte::formats
