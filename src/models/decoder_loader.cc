#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "formats/error.h"
#include "formats/pretrained.h"
#include "models/decoder.h"

namespace latte::models {
namespace {

// One tensor into one parameter, a block of rows at a time, so that no float32 copy of a large tensor is made.
void load(const formats::PretrainedFile& file, const std::string& name, const at::Tensor& parameter) {
  constexpr int64_t kBlockElements = int64_t{1} << 20;
  const auto flat = parameter.dim() == 1 ? parameter.unsqueeze(0) : parameter;
  const int64_t rows = flat.size(0), columns = flat.size(1);
  at::parallel_for(0, rows, std::max<int64_t>(1, kBlockElements / columns), [&](int64_t begin, int64_t end) {
    const torch::NoGradGuard no_grad;  // threads have their own
    if (flat.scalar_type() == torch::kFloat32) {
      file.read_rows(name, begin, {flat.data_ptr<float>() + begin * columns, static_cast<size_t>((end - begin) * columns)});
      return;
    }
    const int64_t block = std::max<int64_t>(1, kBlockElements / columns);
    std::vector<float> buffer;
    for (int64_t first = begin; first < end; first += block) {
      const int64_t count = std::min(block, end - first);
      buffer.resize(static_cast<size_t>(count * columns));
      file.read_rows(name, first, buffer);
      flat.slice(0, first, first + count).copy_(torch::from_blob(buffer.data(), {count, columns}));
    }
  });
}

}  // namespace

Decoder load_decoder(const std::string& path, const DecoderOptions& options) {
  const auto file = formats::open_pretrained(path);
  DecoderOptions with_factors = options;
  if (file->config().rope_factors) {
    with_factors.rope_factors = torch::tensor(file->read("rope_freqs.weight"), torch::kFloat64);
    if (!(with_factors.rope_factors > 0).all().item<bool>() || !with_factors.rope_factors.isfinite().all().item<bool>()) {
      throw formats::FormatError(path, "tensor \"rope_freqs.weight\" holds what is no positive number");
    }
  }
  Decoder model(file->config(), with_factors);
  const torch::NoGradGuard no_grad;
  for (const auto& item : model->named_parameters()) load(*file, item.key(), item.value());
  return model;
}

}  // namespace latte::models
