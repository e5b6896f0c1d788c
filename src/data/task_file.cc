#include "data/task_file.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <charconv>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>

#include "formats/error.h"
#include "formats/json_file.h"
#include "formats/safetensors.h"

namespace latte {
namespace {

using formats::DType;
using formats::FormatError;
using formats::SafetensorsFile;

constexpr const char* kFormat = "latte.task";
constexpr const char* kVersion = "2";

int64_t number_at(const SafetensorsFile& file, const std::string& key) {
  const std::string& text = file.metadata_at(key);
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  // int32 holds tokens and labels.
  if (error != std::errc() || end != text.data() + text.size() || number < 1 || number > INT32_MAX) {
    throw FormatError(file.path(), key + " is " + formats::quote(text) + ", expected an integer from 1 to 2147483647");
  }
  return number;
}

TaskKind kind_at(const SafetensorsFile& file) {
  const std::string& text = file.metadata_at("kind");
  for (const TaskKind kind : {TaskKind::kClassify, TaskKind::kPairs, TaskKind::kTokens}) {
    if (text == to_string(kind)) return kind;
  }
  throw FormatError(file.path(), "kind is " + formats::quote(text) + ", expected classify, pairs or tokens");
}

at::Tensor vector_at(const std::shared_ptr<SafetensorsFile>& file, const std::string& name, DType dtype,
                     at::ScalarType torch_dtype) {
  const formats::TensorView& view = file->at(name);
  if (view.dtype != dtype || view.shape.size() != 1) {
    throw FormatError(file->path(), "tensor " + formats::quote(name) + " is " + describe(view) + ", expected a vector of " +
                                        std::string(formats::name_of(dtype)));
  }
  if (dtype == DType::kUInt8 && !view.data.empty()) {
    auto* bytes = const_cast<std::byte*>(view.data.data());  // nothing writes to a task's tokens
    return at::from_blob(
        bytes, view.shape, [file](void*) {}, torch_dtype);
  }
  at::Tensor copy = at::empty(view.shape, torch_dtype);
  if (!view.data.empty()) std::memcpy(copy.mutable_data_ptr(), view.data.data(), view.data.size());
  return copy;
}

// train, validation, test or test_LENGTH.
bool is_split(std::string_view name) {
  if (name == "train" || name == "validation" || name == "test") return true;
  constexpr std::string_view kAtLength = "test_";
  if (!name.starts_with(kAtLength)) return false;
  name.remove_prefix(kAtLength.size());
  int64_t length = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), length);
  return error == std::errc() && end == name.data() + name.size() && length > 0;
}

}  // namespace

void write_task(const std::string& path, const TaskData& data, const std::string& options, formats::FileOperations& operations) {
  std::vector<formats::TensorView> views;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    formats::TensorView view;
    view.name = name;
    view.dtype = tensor.scalar_type() == at::kByte  ? DType::kUInt8
                 : tensor.scalar_type() == at::kInt ? DType::kInt32
                                                    : DType::kInt64;
    view.shape = tensor.sizes().vec();
    view.data = {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()};
    views.push_back(std::move(view));
  };
  for (const auto& [name, split] : data.splits) {
    add(name + ".tokens", split.tokens);
    add(name + ".offsets", split.offsets);
    if (data.kind == TaskKind::kTokens) {
      add(name + ".target_positions", split.target_positions);
      add(name + ".targets", split.targets);
    } else {
      add(name + ".labels", split.labels);
    }
  }
  formats::write_safetensors(path, views,
                             {{"format", kFormat},
                              {"version", kVersion},
                              {"name", data.name},
                              {"kind", std::string(to_string(data.kind))},
                              {"vocab_size", std::to_string(data.vocab_size)},
                              {"num_classes", std::to_string(data.num_classes)},
                              {"options", options}},
                             operations);
}

TaskFile read_task(const std::string& path) {
  const auto file = std::make_shared<SafetensorsFile>(path);
  if (const std::string& format = file->metadata_at("format"); format != kFormat) {
    throw FormatError(path, "not a task file: format is " + formats::quote(format) + ", expected " + kFormat);
  }
  const std::string& version = file->metadata_at("version");
  const bool first = version == "1" && file->metadata_at("kind") != to_string(TaskKind::kTokens);  // of which labels are as ever
  if (version != kVersion && !first) {
    throw FormatError(path, "a task file of version " + formats::quote(version) + ", expected " + kVersion +
                                ": remove it, and its examples are made again");
  }
  TaskFile task;
  task.options = file->metadata_at("options");
  (void)formats::parse_json_object(path, task.options);
  task.data.name = file->metadata_at("name");
  task.data.kind = kind_at(*file);
  task.data.vocab_size = number_at(*file, "vocab_size");
  task.data.num_classes = number_at(*file, "num_classes");
  const bool asks_tokens = task.data.kind == TaskKind::kTokens;
  const std::string answers = asks_tokens ? ".targets" : ".labels";
  for (const formats::TensorView& view : file->tensors()) {
    const size_t dot = view.name.rfind('.');
    const std::string split = view.name.substr(0, dot), part = dot == std::string::npos ? "" : view.name.substr(dot);
    if (part == ".tokens") {
      if (!is_split(split)) {
        throw FormatError(path,
                          "a split is named " + formats::quote(split) + ", expected train, validation, test or test_LENGTH");
      }
      TaskExamples& examples = task.data.splits[split];
      const bool narrow = view.dtype == DType::kUInt8;
      examples.tokens = vector_at(file, view.name, narrow ? DType::kUInt8 : DType::kInt32, narrow ? at::kByte : at::kInt);
      examples.offsets = vector_at(file, split + ".offsets", DType::kInt64, at::kLong);
      (asks_tokens ? examples.targets : examples.labels) = vector_at(file, split + answers, DType::kInt32, at::kInt);
      if (asks_tokens) examples.target_positions = vector_at(file, split + ".target_positions", DType::kInt64, at::kLong);
    } else if ((part != ".offsets" && part != answers && !(asks_tokens && part == ".target_positions")) ||
               file->find(split + ".tokens") == nullptr) {
      throw FormatError(path, "unexpected tensor " + formats::quote(view.name));
    }
  }
  task.data.check(path);
  return task;
}

}  // namespace latte
