#include "train/run_loop.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats/atomic_file.h"
#include "formats/error.h"
#include "formats/json_file.h"
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

// Of all sessions.
double mean_step_seconds(const Progress& progress, int64_t steps) {
  return progress.seconds / static_cast<double>(std::max<int64_t>(1, steps));
}

// A run that goes on has no results until its end.
void forget_results(const RunFolder& folder, formats::FileOperations& files) {
  const std::string path = folder / kResultsName;
  if (files.unlink(path.c_str()) != 0 && errno != ENOENT) throw formats::FileError("remove", path, errno);
}

bool is_due(int64_t step, int64_t every, int64_t last) { return step == last || (every > 0 && step % every == 0); }

}  // namespace

bool leads(const RunOptions& run) { return !run.ranks || run.ranks->leads(); }

std::string checkpoint_of(const RunOptions& run) { return (std::filesystem::path(run.out) / formats::kCheckpointName).string(); }

std::string dump(const nlohmann::json& object) {
  return object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

void refuse_to_overwrite(const RunOptions& run) {
  const std::string existing = checkpoint_of(run);
  if (leads(run) && !run.overwrite && std::filesystem::exists(existing)) {
    throw OptionError(existing +
                      " is there already: --resume goes on with it, --overwrite starts again, --out names another folder");
  }
}

std::optional<RunResult> finished_run(const ResumedRun& resumed, const TrainerOptions& options, const RunOptions& run) {
  const std::string results = (std::filesystem::path(run.out) / kResultsName).string();
  // The step, and whether the results are there, as the rank that leads knows them.
  std::vector<double> known(2);
  if (resumed.checkpoint) {
    known[0] = static_cast<double>(resumed.checkpoint->step());
    known[1] = std::filesystem::exists(results) ? 1.0 : 0.0;
  }
  if (run.ranks) known = run.ranks->sum(known);
  const auto step = static_cast<int64_t>(known[0]);
  if (step < options.steps) return {};
  if (resumed.tests && known[1] == 0.0) {
    if (options == resumed.options) return {};
    throw OptionError("the checkpoint is at step " + std::to_string(step) + " of " + std::to_string(options.steps) +
                      " already and owes its results alone, which are of the options that it was trained with");
  }
  if (options != resumed.options) {
    throw OptionError("the checkpoint is at step " + std::to_string(step) + " of " + std::to_string(options.steps) +
                      " already, with other options: more steps go on with these");
  }
  if (leads(run)) {
    ProgressLine(0, 0, run.quiet)
        .note("latte: all " + std::to_string(step) + " steps were done before: a larger --steps goes on");
  }
  RunResult result;
  result.told = true;
  result.step = step;
  result.step_seconds = mean_step_seconds(resumed.progress, step);
  result.parameters = resumed.parameters;
  result.progress = resumed.progress;
  result.checkpoint = checkpoint_of(run);
  if (resumed.checkpoint) {
    if (resumed.tests) result.splits = formats::read_json_object(results);
    const auto metrics = read_metrics((std::filesystem::path(run.out) / "metrics.jsonl").string());
    if (!metrics.empty()) result.loss = metrics.back().loss;
  }
  if (run.ranks) run.ranks->finish();
  return result;
}

void note_threads(const Progress& before, const RunOptions& run) {
  const int64_t threads = at::get_num_threads();
  if (before.threads == threads) return;
  ProgressLine(0, 0, run.quiet)
      .note("latte: " + std::to_string(threads) + " threads, where the checkpoint was made with " +
            std::to_string(before.threads) + ": the same to rounding, not bit for bit");
}

RunResult run_loop(StepTrainer& trainer, const RunFolder* folder, Progress progress, const RunOptions& run) {
  const TrainerOptions& options = trainer.options();
  RunResult result;
  result.parameters = trainer.parameter_count();
  result.checkpoint = checkpoint_of(run);
  const InterruptGuard interrupt;
  std::optional<MetricsLog> log;
  if (folder && trainer.steps_done() < options.steps) forget_results(*folder, *run.files);
  if (folder) log.emplace(*folder / "metrics.jsonl", trainer.steps_done(), *run.files);
  if (folder && run.ranks) run.ranks->set_begun(run.out);
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
      throw DivergedError("the loss or its gradient isn't finite at step " + std::to_string(trainer.steps_done() + 1) +
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
  if (!result.interrupted && trainer.has_test()) {
    result.splits = trainer.test();
    result.interrupted = result.splits.is_null();
    if (result.interrupted) line.note("latte: trained; the test was cut short: --resume tests it");
    if (folder && !result.interrupted) formats::write_file(*folder / kResultsName, dump(result.splits), *run.files);
  }
  // What came so late that nothing was left to stop is no interruption.
  if (trainer.steps_done() >= options.steps && !trainer.has_test()) result.interrupted = false;
  line.finish();
  // No rank ends well before the first has saved.
  if (run.ranks) run.ranks->finish();
  if (folder) {
    const auto metrics = read_metrics(*folder / "metrics.jsonl");
    if (!metrics.empty()) result.loss = metrics.back().loss;  // of an earlier session, where this one only tested
    const std::string problem = plot_losses({{folder->name(), metrics}}, *folder / "loss", *run.files);
    if (!problem.empty()) line.note("latte: " + problem);
  }
  result.step = trainer.steps_done();
  // Where this session only tested, there are earlier ones'.
  result.step_seconds = step_time.mean() > 0 ? step_time.mean() : mean_step_seconds(progress, result.step);
  result.progress = progress;
  return result;
}

}  // namespace latte::train
