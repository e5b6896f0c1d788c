#include "train/progress.h"

#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>

namespace latte::train {
namespace {

constexpr auto kTerminalPeriod = std::chrono::milliseconds(100);
constexpr auto kPlainPeriod = std::chrono::seconds(5);
constexpr double kSoonest = 0.1;  // seconds; what was done in less tells nothing of what is left

template <typename... Args>
std::string format(const char* pattern, Args... args) {
  std::array<char, 256> text{};
  std::snprintf(text.data(), text.size(), pattern, args...);
  return text.data();
}

double smoothed(double before, double now) { return before == 0.0 ? now : 0.8 * before + 0.2 * now; }

}  // namespace

std::string format_seconds(double seconds) {
  if (!(seconds >= 0)) seconds = 0;
  const auto whole = std::lround(seconds);
  if (seconds < 0.001) return "0 s";
  if (seconds < 10) return format("%.2g s", seconds);
  if (whole < 60) return format("%ld s", whole);
  if (whole < 3600) return format("%ld min %02ld s", whole / 60, whole % 60);
  return format("%ld h %02ld min", whole / 3600, whole / 60 % 60);
}

ProgressLine::ProgressLine(int64_t first_step, int64_t steps, bool quiet)
    : first_step_(first_step), steps_(steps), quiet_(quiet), terminal_(isatty(STDERR_FILENO) != 0) {}

std::string ProgressLine::line_of(const StepMetrics& metrics) const {
  std::string line =
      format("step %lld/%lld  loss %.4f", static_cast<long long>(metrics.step), static_cast<long long>(steps_), loss_);
  if (val_loss_ > 0) line += format("  val %.4f", val_loss_);
  if (val_accuracy_) line += format(" (%.1f%% right)", 100 * *val_accuracy_);
  line += format("  lr %.2e  %.0f tokens/s", metrics.lr, rate_);
  return line + time_of(metrics.step);
}

std::string ProgressLine::time_of(int64_t step) const {
  const double elapsed = std::chrono::duration<double>(Clock::now() - start_).count();
  if (step >= steps_) return format("  took %s", format_seconds(elapsed).c_str());
  if (step <= first_step_ || elapsed < kSoonest) return "";
  const double left = elapsed / static_cast<double>(step - first_step_) * static_cast<double>(steps_ - step);
  return format("  %s left", format_seconds(left).c_str());
}

void ProgressLine::update(const StepMetrics& metrics) {
  if (metrics.val_loss) val_loss_ = *metrics.val_loss;
  if (metrics.val_accuracy) val_accuracy_ = metrics.val_accuracy;
  loss_ = smoothed(loss_, metrics.loss);
  rate_ = smoothed(rate_, metrics.tokens_per_second);
  show(metrics.val_loss.has_value() || metrics.step == steps_, [&] { return line_of(metrics); });
}

void ProgressLine::update(int64_t step, const std::string& what) {
  show(step == steps_,
       [&] { return what + format(" %lld/%lld", static_cast<long long>(step), static_cast<long long>(steps_)) + time_of(step); });
}

void ProgressLine::show(bool keep, const std::function<std::string()>& line_now) {
  if (quiet_) return;
  const auto now = Clock::now();
  if (!keep && now - shown_ < (terminal_ ? kTerminalPeriod : Clock::duration(kPlainPeriod))) return;
  shown_ = now;
  const std::string line = line_now();
  if (!terminal_) {
    std::fprintf(stderr, "%s\n", line.c_str());
    return;
  }
  std::fprintf(stderr, "\r\033[K%s%s", line.c_str(), keep ? "\n" : "");
  std::fflush(stderr);
  open_ = !keep;
}

void ProgressLine::note(const std::string& text) {
  finish();
  if (!quiet_) std::fprintf(stderr, "%s\n", text.c_str());
}

void ProgressLine::finish() {
  if (open_) std::fputc('\n', stderr);
  open_ = false;
}

}  // namespace latte::train
