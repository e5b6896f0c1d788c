#include "extend/converted_model.h"

#include <algorithm>
#include <string_view>

#include "extend/options.h"
#include "formats/error.h"

namespace latte::extend {
namespace {

std::string latent_name(size_t block, const std::string& name) { return "blk." + std::to_string(block) + ".latte_" + name; }

void copy_in(const formats::GgufTensor& tensor, const at::Tensor& parameter) {
  std::vector<float> values = tensor.floats();
  parameter.copy_(torch::from_blob(values.data(), parameter.sizes(), torch::kFloat32));
}

// Of latents: a model that has more of them than the file never chooses those that it adds.
void copy_latents(const formats::GgufTensor& tensor, std::string_view name, const at::Tensor& parameter) {
  std::vector<float> values = tensor.floats();
  const auto shape = formats::with_dims(tensor.shape, static_cast<size_t>(parameter.dim()));
  const auto from = torch::from_blob(values.data(), shape, torch::kFloat32);
  if (from.sizes() == parameter.sizes()) {
    parameter.copy_(from);
    return;
  }
  const int64_t count = std::min(from.size(1), parameter.size(1));
  parameter.slice(1, 0, count).copy_(from.slice(1, 0, count));
  if (name == "query.bias") parameter.slice(1, count).fill_(formats::kAbsent);
}

// The file's tensors into a model of that spec, but for numbers of latents.
void fill(ConvertedModel& converted, const formats::GgufFile& file) {
  const torch::NoGradGuard no_grad;
  for (size_t block = 0; block < converted.converted.size(); ++block) {
    const ConvertedAttention& attention = converted.converted[block];
    if (!attention || !attention->latents()) continue;
    for (auto& [name, parameter] : attention->latents()->named_tensors()) {
      const formats::GgufTensor* tensor = file.find(latent_name(block, name));
      if (tensor != nullptr) copy_latents(*tensor, name, parameter);  // what a layer to be made anew has more starts with it
    }
  }
  auto parameters = converted.model->named_parameters();
  for (const formats::GgufTensor& tensor : file.tensors()) {
    if (formats::is_added_tensor(tensor.name) || tensor.name == "rope_freqs.weight") continue;
    at::Tensor* parameter = parameters.find(tensor.name);
    if (parameter == nullptr) throw formats::FormatError(file.path(), "unknown tensor " + formats::quote(tensor.name));
    copy_in(tensor, *parameter);
  }
}

}  // namespace

void fill_from(ConvertedModel& converted, const formats::AdapterFile& adapter,
               const std::function<bool(int64_t block, int64_t theirs, int64_t ours)>& may_differ) {
  const auto &theirs = adapter.spec().latents, &ours = converted.spec.latents;
  std::string differing;
  for (size_t block = 0; block < ours.size(); ++block) {
    if (theirs[block] == ours[block] || may_differ(static_cast<int64_t>(block), theirs[block], ours[block])) continue;
    differing += (differing.empty() ? "block " : "; block ") + std::to_string(block) + " has " + std::to_string(theirs[block]) +
                 " latents, this conversion's has " + std::to_string(ours[block]);
  }
  if (!differing.empty()) throw formats::FormatError(adapter.file().path(), differing);
  fill(converted, adapter.file());
}

std::vector<LatentForm> forms_in(const formats::GgufFile& file, const formats::AdapterSpec& spec) {
  std::vector<LatentForm> forms;
  for (size_t block = 0; block < spec.latents.size(); ++block) {
    const auto has = [&](const char* name) { return file.find(latent_name(block, name)) != nullptr; };
    forms.push_back({.decay = has("decay"), .floor = has("floor"), .conv = has("conv.weight")});
  }
  return forms;
}

void require_original(const std::string& model) {
  if (formats::merged_spec(formats::GgufFile(model))) {
    throw OptionError("model " + model + " is converted already: name the original, and this one's adapter with --from");
  }
}

ConvertedModel make_converted(const std::string& model, const formats::AdapterSpec& spec, const std::vector<LatentForm>& forms,
                              at::ScalarType dtype) {
  ConvertedModel converted;
  converted.model = models::load_decoder(model, models::DecoderOptions{.dtype = dtype});
  converted.spec = spec;
  converted.converted = convert(converted.model, spec, forms);
  return converted;
}

ConvertedModel load_converted(const std::string& model, const std::string& adapter, at::ScalarType dtype) {
  if (adapter.empty()) {
    const formats::GgufFile merged(model);
    const auto spec = formats::merged_spec(merged);
    if (!spec) throw formats::FormatError(model, "its attention isn't converted: it needs an adapter");
    ConvertedModel converted = make_converted(model, *spec, forms_in(merged, *spec), dtype);
    fill(converted, merged);
    for (auto& parameter : converted.model->parameters()) parameter.requires_grad_(false);
    return converted;
  }
  const formats::AdapterFile file(adapter);
  file.check_fits(formats::GgufFile(model));
  ConvertedModel converted = make_converted(model, file.spec(), forms_in(file.file(), file.spec()), dtype);
  fill(converted, file.file());
  for (auto& parameter : converted.model->parameters()) parameter.requires_grad_(false);
  return converted;
}

std::vector<std::pair<std::string, at::Tensor>> latent_tensors(const std::vector<ConvertedAttention>& converted) {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (size_t block = 0; block < converted.size(); ++block) {
    if (!converted[block] || !converted[block]->latents()) continue;
    for (auto& [name, parameter] : converted[block]->latents()->named_tensors()) {
      tensors.emplace_back(latent_name(block, name), parameter);
    }
  }
  return tensors;
}

Storage storage_named(const std::string& name) {
  if (name == "q8_0") return Storage::kQ8_0;
  if (name == "bf16") return Storage::kBFloat16;
  if (name == "f32") return Storage::kFloat32;
  throw OptionError("storage is " + formats::quote(name) + ", expected one of q8_0, bf16, f32");
}

void StoredTensors::add(const std::string& name, const at::Tensor& tensor, Storage storage) {
  const auto values = tensor.detach().to(torch::kFloat32).contiguous();
  formats::GgufTensor stored;
  stored.name = name;
  stored.shape = values.sizes().vec();
  // Biases, slopes, decays and convolutions are few, and a rounded one shifts a whole latent. They may be [H, L]: the name tells.
  const bool matrix = name.ends_with(".weight") && !name.ends_with("latte_conv.weight") && values.dim() >= 2;
  const int64_t columns = values.size(-1);
  if (!matrix || storage == Storage::kFloat32) {
    stored.type = formats::TensorType::kF32;
  } else {
    const bool blocks = columns % formats::block_size(formats::TensorType::kQ8_0) == 0;
    stored.type = storage == Storage::kQ8_0 && blocks ? formats::TensorType::kQ8_0 : formats::TensorType::kBF16;
  }
  data_.push_back(formats::quantize(stored.type, {values.data_ptr<float>(), static_cast<size_t>(values.numel())}, columns));
  stored.data = data_.back();
  tensors_.push_back(std::move(stored));
}

size_t StoredTensors::bytes() const {
  size_t total = 0;
  for (const auto& data : data_) total += data.size();
  return total;
}

}  // namespace latte::extend
