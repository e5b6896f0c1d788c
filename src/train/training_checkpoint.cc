#include "train/training_checkpoint.h"

#include <torch/torch.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "formats/error.h"
#include "formats/trained_model.h"

namespace latte::train {
namespace {

using formats::DType;
using nlohmann::json;

constexpr std::pair<at::ScalarType, DType> kDTypePairs[] = {
    {at::kDouble, DType::kFloat64},    {at::kFloat, DType::kFloat32}, {at::kHalf, DType::kFloat16},
    {at::kBFloat16, DType::kBFloat16}, {at::kLong, DType::kInt64},    {at::kInt, DType::kInt32},
    {at::kShort, DType::kInt16},       {at::kChar, DType::kInt8},     {at::kByte, DType::kUInt8},
    {at::kBool, DType::kBool},
};

DType dtype_of(const at::Tensor& tensor) {
  for (const auto& [torch_dtype, dtype] : kDTypePairs) {
    if (torch_dtype == tensor.scalar_type()) return dtype;
  }
  TORCH_CHECK_TYPE(false, "a checkpoint holds no tensor of dtype ", tensor.scalar_type());
}

json number_or_null(const std::optional<double>& value) { return value ? json(*value) : json(nullptr); }

std::optional<double> optional_number(const json& value) {
  if (value.is_null()) return std::nullopt;
  return value.get<double>();
}

}  // namespace

json Progress::to_json() const {
  json object = {{"seconds", seconds},
                 {"threads", threads},
                 {"dtype", dtype},
                 {"train_tokens", train_tokens},
                 {"validation_tokens", validation_tokens},
                 {"val_loss", number_or_null(val_loss)},
                 {"best_val_loss", number_or_null(best_val_loss)},
                 {"tokens", tokens}};
  if (val_accuracy) object["val_accuracy"] = *val_accuracy;
  return object;
}

Progress Progress::from_json(const json& object) {
  Progress progress;
  object.at("seconds").get_to(progress.seconds);
  object.at("threads").get_to(progress.threads);
  object.at("dtype").get_to(progress.dtype);
  object.at("train_tokens").get_to(progress.train_tokens);
  object.at("validation_tokens").get_to(progress.validation_tokens);
  progress.val_loss = optional_number(object.at("val_loss"));
  progress.best_val_loss = optional_number(object.at("best_val_loss"));
  if (object.contains("val_accuracy")) progress.val_accuracy = object.at("val_accuracy").get<double>();
  if (object.contains("tokens")) object.at("tokens").get_to(progress.tokens);  // absent in older checkpoints
  return progress;
}

std::string TrainingRecord::to_json() const {
  const json object = {{"model", model.to_json()},
                       {"training", options.to_json()},
                       {"vocabulary", vocabulary.description()},
                       {"progress", progress.to_json()}};
  // A path on the command line may be any bytes.
  return object.dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace);
}

TrainingRecord TrainingRecord::from(const formats::CheckpointFile& checkpoint) {
  return from_json(checkpoint.file().path(), checkpoint.config());
}

TrainingRecord TrainingRecord::from_json(const std::string& path, const std::string& text) {
  TrainingRecord record;
  try {
    const json object = json::parse(text);
    formats::TrainedModel trained = formats::trained_model(path, object);
    record.model = std::move(trained.config);
    record.vocabulary = std::move(trained.vocabulary);
    record.options = TrainerOptions::from_json(object.at("training"));
    record.progress = Progress::from_json(object.at("progress"));
  } catch (const json::exception&) {
    throw formats::FormatError(path, "config isn't one of latte train: " + formats::quote(text));
  } catch (const std::invalid_argument& error) {
    throw formats::FormatError(path, error.what());
  }
  return record;
}

formats::TensorView view_of(const std::string& name, const at::Tensor& tensor) {
  TORCH_INTERNAL_ASSERT(tensor.is_contiguous() && tensor.device().is_cpu());
  formats::TensorView view;
  view.name = name;
  view.dtype = dtype_of(tensor);
  view.shape = tensor.sizes().vec();
  view.data = {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()};
  return view;
}

void copy_from(const formats::SafetensorsFile& file, const std::string& name, at::Tensor tensor) {
  const formats::TensorView& found = file.at(name);
  const formats::TensorView expected = view_of(name, tensor);
  if (found.dtype != expected.dtype || found.shape != expected.shape) {
    throw formats::FormatError(file.path(),
                               "tensor " + formats::quote(name) + " is " + describe(found) + ", expected " + describe(expected));
  }
  if (!found.data.empty()) std::memcpy(tensor.mutable_data_ptr(), found.data.data(), found.data.size());
}

void load_weights(const formats::SafetensorsFile& file, models::LanguageModel& model) {
  for (const auto& item : model->named_parameters()) copy_from(file, "model." + item.key(), item.value().detach());
}

void check_parameter_count(const formats::SafetensorsFile& file, int64_t expected) {
  uint64_t count = 0;  // no overflow: the bytes lie in one file
  for (const formats::TensorView& tensor : file.tensors()) {
    const bool buffer = tensor.name.ends_with(".running_mean") || tensor.name.ends_with(".running_var");
    if (tensor.name.starts_with("model.") && !buffer) count += tensor.data.size() / formats::size_of(tensor.dtype);
  }
  if (count != static_cast<uint64_t>(expected)) {
    throw formats::FormatError(file.path(), "the model has " + std::to_string(count) + " parameters, expected " +
                                                std::to_string(expected) + " by its config");
  }
}

LoadedModel load_model(const std::string& path) {
  const formats::CheckpointFile checkpoint(formats::checkpoint_path(path));
  LoadedModel loaded;
  loaded.record = TrainingRecord::from(checkpoint);
  loaded.step = checkpoint.step();
  check_parameter_count(checkpoint.file(), loaded.record.model.parameter_count());
  loaded.model = models::LanguageModel(loaded.record.model);
  load_weights(checkpoint.file(), loaded.model);
  loaded.model->eval();
  return loaded;
}

}  // namespace latte::train
