#include "train/metrics.h"

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
  const ordered_json object = {{"step", metrics.step},
                               {"loss", metrics.loss},
                               {"val_loss", metrics.val_loss ? ordered_json(*metrics.val_loss) : ordered_json(nullptr)},
                               {"lr", metrics.lr},
                               {"grad_norm", metrics.grad_norm},
                               {"tokens_per_second", metrics.tokens_per_second},
                               {"tokens", metrics.tokens},
                               {"time", metrics.time}};
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

MetricsLog::MetricsLog(std::string path, int64_t last_step) : path_(std::move(path)) {
  std::string kept;
  if (last_step > 0 && std::filesystem::exists(path_)) {
    for (const StepMetrics& metrics : read_metrics(path_)) {
      if (metrics.step > last_step) break;
      kept += to_json_line(metrics);
    }
  }
  formats::write_file(path_, kept);
  file_.reset(std::fopen(path_.c_str(), "ae"));
  if (!file_) throw formats::FileError("open", path_, errno);
}

void MetricsLog::append(const StepMetrics& metrics) {
  const std::string line = to_json_line(metrics);
  errno = 0;
  if (std::fwrite(line.data(), 1, line.size(), file_.get()) != line.size() || std::fflush(file_.get()) != 0) {
    throw formats::FileError("write", path_, errno);
  }
}

}  // namespace latte::train
