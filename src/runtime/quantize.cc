#include "runtime/quantize.h"

#include <algorithm>
#include <vector>

#include "formats/gguf.h"
#include "runtime/error.h"

namespace latte::runtime {
namespace {

using formats::TensorType;

TensorType type_for(const formats::GgufTensor& tensor, TensorType wanted) {
  if (tensor.shape.size() != 2 || !tensor.name.ends_with(".weight") || !formats::can_dequantize(tensor.type)) return tensor.type;
  const bool vocabulary = tensor.name == "token_embd.weight" || tensor.name == "output.weight";
  const int64_t columns = tensor.shape[1];
  const auto bits = [](TensorType type) {
    const int64_t block = formats::block_size(type);
    return static_cast<int64_t>(*formats::tensor_bytes(type, 1, block)) * 8 / block;
  };
  TensorType type = wanted;
  if (vocabulary && bits(wanted) < 8) type = TensorType::kQ8_0;
  if (columns % formats::block_size(type) != 0) type = TensorType::kQ8_0;
  if (columns % formats::block_size(type) != 0) type = TensorType::kF16;
  return type;
}

}  // namespace

void quantize_model(const std::string& from, const std::string& to, TensorType wanted) {
  if (!formats::is_known(wanted) || !formats::can_quantize(wanted)) throw ModelError("quantize: this type can't be written");
  const formats::GgufFile file(from);
  formats::GgufMetadata metadata = file.metadata();
  metadata.remove("general.file_type");  // llama.cpp's number for the mixture of types, which is no longer that
  std::vector<formats::GgufTensorSpec> specs;
  for (const formats::GgufTensor& tensor : file.tensors()) specs.push_back({tensor.name, type_for(tensor, wanted), tensor.shape});
  formats::write_gguf(to, metadata, specs, [&](size_t i, const formats::WriteBytes& write) {
    const formats::GgufTensor& tensor = file.tensors()[i];
    if (specs[i].type == tensor.type) return write(tensor.data);
    // Some rows at a time: a vocabulary's matrix in float32 is large.
    const int64_t columns = tensor.shape[1];
    const int64_t rows = tensor.shape[0];
    const size_t row_bytes = tensor.data.size() / static_cast<size_t>(rows);
    constexpr int64_t kRows = 256;
    std::vector<float> floats;
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t count = std::min(kRows, rows - r);
      floats.resize(static_cast<size_t>(count * columns));
      formats::dequantize(
          tensor.type, tensor.data.subspan(static_cast<size_t>(r) * row_bytes, static_cast<size_t>(count) * row_bytes), floats);
      write(formats::quantize(specs[i].type, floats, columns));
    }
  });
}

}  // namespace latte::runtime
