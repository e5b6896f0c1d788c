// A run's metrics: one JSON object a line, one line a step.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "formats/atomic_file.h"

namespace latte::train {

struct StepMetrics {
  int64_t step = 0;  // counts from 1
  double loss = 0.0;
  std::optional<double> val_loss;      // where the step ended with a validation
  std::optional<double> val_accuracy;  // of a task, there too
  double lr = 0.0;
  double grad_norm = 0.0;
  double tokens_per_second = 0.0;  // of this step
  int64_t tokens = 0;              // seen, over all steps
  double time = 0.0;               // seconds of training, over all steps; validation and checkpoints don't count
};

// {"step":…,"loss":…,"val_loss":… or null, of a validated task also
// "val_accuracy":…,"lr":…,"grad_norm":…,"tokens_per_second":…,"tokens":…,"time":…}
std::string to_json_line(const StepMetrics& metrics);

// The lines of a metrics file up to the first that isn't whole, as a killed program may leave it. Throws formats::FileError.
std::vector<StepMetrics> read_metrics(const std::string& path);

class MetricsLog {
 public:
  // Keeps the lines of `path` up to step `last_step` (0: none) and appends from there. A file that isn't there is made. Throws
  // formats::FileError.
  MetricsLog(std::string path, int64_t last_step, formats::FileOperations& operations = formats::FileOperations::system());
  ~MetricsLog();
  MetricsLog(const MetricsLog&) = delete;
  MetricsLog& operator=(const MetricsLog&) = delete;

  // Throws formats::FileError.
  void append(const StepMetrics& metrics);

 private:
  std::string path_;
  formats::FileOperations& operations_;
  int fd_ = -1;
};

}  // namespace latte::train
