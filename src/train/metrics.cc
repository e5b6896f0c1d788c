#include "train/metrics.h"

#include <fcntl.h>

#include <cerrno>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>

#include "formats/atomic_file.h"
#include "formats/error.h"
#include "formats/mapped_file.h"

namespace latte::train {
namespace {

using nlohmann::ordered_json;

bool parse_line(std::string_view line, StepMetrics& metrics) {
  const auto object = ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return false;
  try {
    object.at("step").get_to(metrics.step);
    object.at("loss").get_to(metrics.loss);
    if (!object.at("val_loss").is_null()) metrics.val_loss = object.at("val_loss").get<double>();
    if (object.contains("val_accuracy")) metrics.val_accuracy = object.at("val_accuracy").get<double>();
    object.at("lr").get_to(metrics.lr);
    object.at("grad_norm").get_to(metrics.grad_norm);
    object.at("tokens_per_second").get_to(metrics.tokens_per_second);
    object.at("tokens").get_to(metrics.tokens);
    object.at("time").get_to(metrics.time);
  } catch (const ordered_json::exception&) {
    return false;
  }
  return true;
}

}  // namespace

std::string to_json_line(const StepMetrics& metrics) {
  ordered_json object = {{"step", metrics.step},
                         {"loss", metrics.loss},
                         {"val_loss", metrics.val_loss ? ordered_json(*metrics.val_loss) : ordered_json(nullptr)}};
  if (metrics.val_accuracy) object["val_accuracy"] = *metrics.val_accuracy;
  object["lr"] = metrics.lr;
  object["grad_norm"] = metrics.grad_norm;
  object["tokens_per_second"] = metrics.tokens_per_second;
  object["tokens"] = metrics.tokens;
  object["time"] = metrics.time;
  return object.dump() + '\n';
}

std::vector<StepMetrics> read_metrics(const std::string& path) {
  const formats::MappedFile file(path);
  std::vector<StepMetrics> all;
  std::string_view rest = file.text();
  for (size_t end; (end = rest.find('\n')) != std::string_view::npos; rest.remove_prefix(end + 1)) {
    StepMetrics metrics;
    if (!parse_line(rest.substr(0, end), metrics)) break;
    all.push_back(metrics);
  }
  return all;
}

MetricsLog::MetricsLog(std::string path, int64_t last_step, formats::FileOperations& operations)
    : path_(std::move(path)), operations_(operations) {
  std::string kept;
  if (last_step > 0 && std::filesystem::exists(path_)) {
    for (const StepMetrics& metrics : read_metrics(path_)) {
      if (metrics.step > last_step) break;
      kept += to_json_line(metrics);
    }
  }
  formats::AtomicFile file(path_, operations);
  file.write(kept);
  file.commit();
  fd_ = operations.open(path_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC, 0666);
  if (fd_ < 0) throw formats::FileError("open", path_, errno);
}

MetricsLog::~MetricsLog() { operations_.close(fd_); }

void MetricsLog::append(const StepMetrics& metrics) {
  const std::string line = to_json_line(metrics);
  for (std::string_view rest = line; !rest.empty();) {
    const ssize_t written = operations_.write(fd_, rest.data(), rest.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) throw formats::FileError("write", path_, written < 0 ? errno : EIO);
    rest.remove_prefix(static_cast<size_t>(written));
  }
}

}  // namespace latte::train
