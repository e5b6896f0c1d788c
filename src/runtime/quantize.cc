#include "runtime/quantize.h"

#include <algorithm>
#include <vector>

#include "formats/error.h"
#include "formats/gguf.h"
#include "formats/pretrained.h"
#include "formats/tokenizer.h"
#include "runtime/error.h"

namespace latte::runtime {
namespace {

using formats::TensorType;

constexpr int64_t kRows = 256;  // of a matrix in float32 at a time: a vocabulary's is large

TensorType type_for(const formats::GgufTensorSpec& tensor, TensorType wanted) {
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

void require_writable(TensorType wanted) {
  if (!formats::is_known(wanted) || !formats::can_quantize(wanted)) throw ModelError("quantize: this type can't be written");
}

}  // namespace

void quantize_folder(const std::string& folder, const std::string& to, TensorType wanted, const std::string& tokenizer) {
  require_writable(wanted);
  const auto model = formats::open_pretrained(folder);
  formats::GgufMetadata metadata = model->metadata();
  if (!tokenizer.empty()) {
    const formats::GgufFile file(tokenizer);
    const formats::Tokenizer checked(file.metadata());
    if (checked.size() > model->config().vocab_size) {
      throw formats::FormatError(tokenizer, "its tokeniser has " + std::to_string(checked.size()) +
                                                " tokens, the vocabulary of " + folder + " " +
                                                std::to_string(model->config().vocab_size));
    }
    for (const auto& [key, value] : file.metadata().entries()) {
      if (key.starts_with("tokenizer.")) metadata.set(key, value);
    }
  }
  std::vector<formats::GgufTensorSpec> specs;
  for (const formats::GgufTensorSpec& tensor : model->tensors()) {
    // Vectors are float32 in every GGUF file; a folder has them in its weights' type.
    const bool vector = tensor.shape.size() < 2;
    specs.push_back({tensor.name, vector ? TensorType::kF32 : type_for(tensor, wanted), tensor.shape});
  }
  formats::write_gguf(to, metadata, specs, [&](size_t i, const formats::WriteBytes& write) {
    const formats::GgufTensorSpec& spec = specs[i];
    const int64_t columns = spec.shape.back(), rows = spec.elements() / columns;
    std::vector<float> floats;
    for (int64_t r = 0; r < rows; r += kRows) {
      floats.resize(static_cast<size_t>(std::min(kRows, rows - r) * columns));
      model->read_rows(spec.name, r, floats);
      write(formats::quantize(spec.type, floats, columns));
    }
  });
}

void quantize_model(const std::string& from, const std::string& to, TensorType wanted) {
  require_writable(wanted);
  const formats::GgufFile file(from);
  formats::GgufMetadata metadata = file.metadata();
  metadata.remove("general.file_type");  // llama.cpp's number for the mixture of types, which is no longer that
  std::vector<formats::GgufTensorSpec> specs;
  for (const formats::GgufTensor& tensor : file.tensors()) specs.push_back({tensor.name, type_for(tensor, wanted), tensor.shape});
  formats::write_gguf(to, metadata, specs, [&](size_t i, const formats::WriteBytes& write) {
    const formats::GgufTensor& tensor = file.tensors()[i];
    if (specs[i].type == tensor.type) return write(tensor.data);
    const int64_t columns = tensor.shape[1];
    const int64_t rows = tensor.shape[0];
    const size_t row_bytes = tensor.data.size() / static_cast<size_t>(rows);
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
