#include "train/run_loop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <optional>
#include <stdexcept>

#include "train/interrupt.h"
#include "train/metrics.h"
#include "train/plot.h"
#include "train/progress.h"
#include "train/ranks.h"

namespace latte::train {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Of all threads of this process.
double processor_seconds() {
  timespec time = {};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// The mean time of steps; the first two, in which memory is found and kernels are chosen, count where there is no other.
class StepTime {
 public:
  void add(double seconds) {
    if (steps_ == kFirst) seconds_ = 0.0;
    seconds_ += seconds;
    ++steps_;
  }
  double mean() const {
    const int64_t counted = steps_ > kFirst ? steps_ - kFirst : steps_;
    return counted > 0 ? seconds_ / static_cast<double>(counted) : 0.0;
  }

 private:
  static constexpr int64_t kFirst = 2;
  int64_t steps_ = 0;
  double seconds_ = 0.0;
};

bool is_due(int64_t step, int64_t every, int64_t last) { return step == last || (every > 0 && step % every == 0); }

}  // namespace

RunResult run_loop(StepTrainer& trainer, const RunFolder* folder, Progress progress, const RunOptions& run) {
  const TrainerOptions& options = trainer.options();
  RunResult result;
  result.parameters = trainer.parameter_count();
  result.checkpoint = (std::filesystem::path(run.out) / formats::kCheckpointName).string();
  const InterruptGuard interrupt;
  std::optional<MetricsLog> log;
  if (folder) log.emplace(*folder / "metrics.jsonl", trainer.steps_done(), *run.files);
  trainer.join_ranks();
  ProgressLine line(trainer.steps_done(), options.steps, run.quiet || !folder);
  if (trainer.dtype() == "bfloat16" && !has_bfloat16_products()) {
    line.note("latte: this processor has no bfloat16 products: float32 would be many times faster");
  }
  StepTime step_time;
  while (trainer.steps_done() < options.steps && !result.interrupted) {
    const auto start = Clock::now();
    const double processor_start = processor_seconds();
    const StepResult step = trainer.step();
    const double seconds = seconds_since(start);
    step_time.add(std::min(seconds, processor_seconds() - processor_start));
    if (!std::isfinite(step.loss) || !std::isfinite(step.grad_norm)) {
      throw std::runtime_error("the loss or its gradient isn't finite at step " + std::to_string(trainer.steps_done() + 1) +
                               ": a lower learning rate, a longer warm-up or float32 may help");
    }
    progress.seconds += seconds;

    StepMetrics metrics;
    metrics.step = trainer.steps_done();
    metrics.loss = step.loss;
    metrics.lr = step.lr;
    metrics.grad_norm = step.grad_norm;
    metrics.tokens = progress.tokens += step.tokens;
    metrics.tokens_per_second = static_cast<double>(step.tokens) / std::max(seconds, 1e-9);
    metrics.time = progress.seconds;
    if (trainer.has_validation() && is_due(metrics.step, options.eval_every, options.steps)) {
      const Evaluation validation = trainer.validate();
      metrics.val_loss = progress.val_loss = validation.loss;
      metrics.val_accuracy = progress.val_accuracy = validation.accuracy;
      progress.best_val_loss = std::min(progress.best_val_loss.value_or(*metrics.val_loss), *metrics.val_loss);
    }
    if (log) log->append(metrics);
    line.update(metrics);
    result.loss = step.loss;
    result.interrupted = InterruptGuard::interrupted();
    if (run.ranks) result.interrupted = run.ranks->any(result.interrupted);
    const bool saves = result.interrupted || is_due(metrics.step, options.save_every, options.steps);
    if (folder && saves) trainer.save(result.checkpoint, progress, *run.files);
  }
  if (!result.interrupted) result.test_loss = trainer.test();
  line.finish();
  // No rank ends well before the first has saved.
  if (run.ranks) run.ranks->finish();
  if (folder) {
    const std::string problem =
        plot_losses({{folder->name(), read_metrics(*folder / "metrics.jsonl")}}, *folder / "loss", *run.files);
    if (!problem.empty()) line.note("latte: " + problem);
  }
  result.step = trainer.steps_done();
  result.step_seconds = step_time.mean();
  result.progress = progress;
  return result;
}

}  // namespace latte::train
