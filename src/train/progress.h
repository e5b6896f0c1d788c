// What a run shows on standard error: one line that is rewritten where that is a terminal, else a line every few seconds.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "train/metrics.h"

namespace latte::train {

class ProgressLine {
 public:
  // `first_step` steps were done before this session, of `steps`.
  ProgressLine(int64_t first_step, int64_t steps, bool quiet);
  ~ProgressLine() { finish(); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  // After each step. One with a validation keeps its line.
  void update(const StepMetrics& metrics);
  // After each step of work that has no metrics; `what` names it.
  void update(int64_t step, const std::string& what);
  // A line of text above the progress line.
  void note(const std::string& text);
  // Ends the line that is being rewritten.
  void finish();

 private:
  std::string line_of(const StepMetrics& metrics) const;
  std::string time_of(int64_t step) const;  // left, where it can be told yet, or taken at the end
  void show(bool keep, const std::function<std::string()>& line);

  using Clock = std::chrono::steady_clock;
  int64_t first_step_;
  int64_t steps_;
  bool quiet_;
  bool terminal_;
  bool open_ = false;  // the cursor stands in a line that may be rewritten
  double val_loss_ = 0.0;
  std::optional<double> val_accuracy_;
  double loss_ = 0.0;  // smoothed
  double rate_ = 0.0;  // tokens a second, smoothed
  Clock::time_point start_ = Clock::now();
  Clock::time_point shown_{};
};

// 0.95 s, 12 s, 3 min 05 s, 2 h 07 min.
std::string format_seconds(double seconds);

}  // namespace latte::train
