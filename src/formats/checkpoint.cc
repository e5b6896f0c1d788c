#include "formats/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <stdexcept>
#include <vector>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/json_file.h"

namespace latte::formats {
namespace {

// `tensors` sorted by name.
std::string checksum_of(const Metadata& metadata, const std::vector<const TensorView*>& tensors) {
  Hash checksum;
  checksum.add(uint64_t{metadata.size() - metadata.count("checksum")});
  for (const auto& [key, value] : metadata) {
    if (key == "checksum") continue;
    checksum.add(std::string_view(key));
    checksum.add(std::string_view(value));
  }
  checksum.add(uint64_t{tensors.size()});
  for (const TensorView* tensor : tensors) {
    checksum.add(std::string_view(tensor->name));
    checksum.add(name_of(tensor->dtype));
    checksum.add(uint64_t{tensor->shape.size()});
    for (int64_t dimension : tensor->shape) checksum.add(static_cast<uint64_t>(dimension));
    checksum.add(uint64_t{tensor->data.size()});
    checksum.add(tensor->data);
  }
  return checksum.digits();
}

}  // namespace

std::string checkpoint_path(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) return path;
  return (std::filesystem::path(path) / kCheckpointName).string();
}

void write_checkpoint(const std::string& path, const CheckpointHeader& header, std::span<const TensorView> tensors,
                      FileOperations& operations) {
  if (!is_json_object(header.config)) {
    throw std::invalid_argument("checkpoint: config is " + quote(header.config) + ", expected a JSON object");
  }
  if (header.step < 0) throw std::invalid_argument("checkpoint: step is " + std::to_string(header.step) + ", expected >= 0");
  Metadata metadata = {{"format", std::string(kCheckpointFormat)},
                       {"version", std::string(kCheckpointVersion)},
                       {"config", header.config},
                       {"step", std::to_string(header.step)}};
  std::vector<const TensorView*> order;
  for (const TensorView& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const TensorView* a, const TensorView* b) { return a->name < b->name; });
  metadata["checksum"] = checksum_of(metadata, order);
  write_safetensors(path, tensors, metadata, operations);
}

CheckpointFile::CheckpointFile(const std::string& path) : file_(path) {
  const Metadata& metadata = file_.metadata();
  const auto format = metadata.find("format");
  if (format == metadata.end() || format->second != kCheckpointFormat) {
    throw FormatError(path, "not a checkpoint of latte: format is " +
                                (format == metadata.end() ? "missing" : quote(format->second)) + ", expected " +
                                quote(kCheckpointFormat));
  }
  if (const std::string& version = file_.metadata_at("version"); version != kCheckpointVersion) {
    throw FormatError(path, "a checkpoint of version " + quote(version) + ", expected " + quote(kCheckpointVersion));
  }
  const std::string& expected = file_.metadata_at("checksum");
  std::vector<const TensorView*> tensors;
  for (const TensorView& tensor : file_.tensors()) tensors.push_back(&tensor);
  if (const std::string found = checksum_of(metadata, tensors); found != expected) {
    throw FormatError(path, "the checkpoint is damaged: checksum " + found + ", expected " + quote(expected));
  }
  header_.config = file_.metadata_at("config");
  if (!is_json_object(header_.config)) {
    throw FormatError(path, "config is " + quote(header_.config) + ", expected a JSON object");
  }
  const std::string& step = file_.metadata_at("step");
  const auto [end, error] = std::from_chars(step.data(), step.data() + step.size(), header_.step);
  if (error != std::errc() || end != step.data() + step.size() || header_.step < 0) {
    throw FormatError(path, "step is " + quote(step) + ", expected a number >= 0");
  }
}

}  // namespace latte::formats
