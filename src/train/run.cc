#include "train/run.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/text.h"
#include "formats/error.h"
#include "train/interrupt.h"
#include "train/metrics.h"
#include "train/plot.h"
#include "train/progress.h"
#include "train/run_folder.h"
#include "train/trainer.h"

namespace latte::train {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

TextCorpusOptions corpus_options(const TrainerOptions& options) {
  return {.kind = options.vocabulary_kind(), .validation_fraction = options.validation_fraction, .context = options.context};
}

bool is_due(int64_t step, int64_t every, int64_t last) { return step == last || (every > 0 && step % every == 0); }

// `before` on this machine, with this text.
Progress progress_of(const Trainer& trainer, const TextCorpus& corpus, Progress before) {
  before.threads = at::get_num_threads();
  before.dtype = trainer.dtype();
  before.train_tokens = corpus.size(Split::kTrain);
  before.validation_tokens = corpus.size(Split::kValidation);
  return before;
}

bool leads(const RunOptions& run) { return !run.ranks || run.ranks->leads(); }

std::string checkpoint_of(const RunOptions& run) { return (std::filesystem::path(run.out) / kCheckpointName).string(); }

// The loop: what start_run and resume_run have in common. `folder` is null on ranks that don't write.
RunResult run_loop(Trainer& trainer, const RunFolder* folder, Progress progress, const RunOptions& run) {
  const TrainerOptions& options = trainer.options();
  RunResult result;
  result.parameters = trainer.model()->config().parameter_count();
  result.checkpoint = checkpoint_of(run);
  const InterruptGuard interrupt;
  std::optional<MetricsLog> log;
  if (folder) log.emplace(*folder / "metrics.jsonl", trainer.steps_done(), *run.files);
  trainer.join_ranks();
  ProgressLine line(trainer.steps_done(), options.steps, run.quiet || !folder);
  if (trainer.dtype() == "bfloat16" && !has_bfloat16_products()) {
    line.note("latte: this processor has no bfloat16 products: float32 would be many times faster");
  }
  while (trainer.steps_done() < options.steps && !result.interrupted) {
    const auto start = Clock::now();
    const StepResult step = trainer.step();
    const double seconds = seconds_since(start);
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
    metrics.tokens = metrics.step * options.tokens_per_step();
    metrics.tokens_per_second = static_cast<double>(options.tokens_per_step()) / std::max(seconds, 1e-9);
    metrics.time = progress.seconds;
    if (trainer.has_validation() && is_due(metrics.step, options.eval_every, options.steps)) {
      metrics.val_loss = progress.val_loss = trainer.evaluate();
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
  line.finish();
  // No rank ends well before the first has saved.
  if (run.ranks) run.ranks->finish();
  if (folder) {
    const std::string problem =
        plot_losses({{folder->name(), read_metrics(*folder / "metrics.jsonl")}}, *folder / "loss", *run.files);
    if (!problem.empty()) line.note("latte: " + problem);
  }
  result.step = trainer.steps_done();
  result.progress = progress;
  return result;
}

// What `latte train --config` takes, to do the same again.
void write_config(const RunFolder& folder, models::LanguageModelConfig model, const TrainerOptions& options,
                  formats::FileOperations& files) {
  nlohmann::json object = {{"model", model.to_json()}, {"training", options.to_json()}};
  object["model"].erase("vocab_size");
  formats::AtomicFile file(folder / "config.json", files);
  file.write(object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  file.commit();
}

}  // namespace

RunResult start_run(const models::LanguageModelConfig& model, const TrainerOptions& options, const RunOptions& run) {
  options.validate();
  const std::string existing = checkpoint_of(run);
  if (leads(run) && !run.overwrite && std::filesystem::exists(existing)) {
    throw OptionError(existing +
                      " is there already: --resume goes on with it, --overwrite starts again, --out names another folder");
  }
  const TextCorpus corpus(options.text, corpus_options(options));
  models::LanguageModelConfig sized = model;
  sized.vocab_size = corpus.vocabulary().size();
  Trainer trainer(sized, options, corpus, run.ranks);
  const Progress progress = progress_of(trainer, corpus, {});
  if (!leads(run)) return run_loop(trainer, nullptr, progress, run);

  // Only now, when everything that could be wrong was read, does anything change on the disk.
  // The untrained model takes the place of the run that --overwrite gives up first of all: what can't be written is noticed at
  // once, and costs that run nothing.
  const RunFolder folder(run.out);
  trainer.save(folder.checkpoint(), progress, *run.files);
  write_config(folder, sized, options, *run.files);
  return run_loop(trainer, &folder, progress, run);
}

TrainingRecord read_record(const RunOptions& run) {
  const std::string path = checkpoint_of(run);
  std::string config;
  if (leads(run)) config = formats::CheckpointFile(path).config();
  if (run.ranks) config = run.ranks->broadcast(config);
  return TrainingRecord::from_json(path, config);
}

RunResult resume_run(const TrainerOptions& options, const RunOptions& run) {
  options.validate();
  const std::string path = checkpoint_of(run);
  if (leads(run) && !std::filesystem::exists(path)) throw formats::FileError("resume from", path, ENOENT);
  std::optional<RunFolder> folder;
  std::optional<formats::CheckpointFile> checkpoint;
  if (leads(run)) {
    folder.emplace(run.out);
    checkpoint.emplace(path);
    if (checkpoint->step() >= options.steps) {
      throw OptionError("the checkpoint is at step " + std::to_string(checkpoint->step()) + " of " +
                        std::to_string(options.steps) + " already: more steps go on");
    }
  }
  std::string config = checkpoint ? checkpoint->config() : "";
  if (run.ranks) config = run.ranks->broadcast(config);
  const TrainingRecord record = TrainingRecord::from_json(path, config);
  if (options.vocabulary_kind() != record.vocabulary.kind()) {
    throw OptionError("tokens is " + options.tokens + ", but the checkpoint was trained on " + record.options.tokens);
  }
  TextCorpusOptions corpus_settings = corpus_options(options);
  corpus_settings.vocabulary = record.vocabulary;
  const TextCorpus corpus(options.text, corpus_settings);
  if (!checkpoint) {
    Trainer trainer(record.model, options, corpus, run.ranks);
    return run_loop(trainer, nullptr, progress_of(trainer, corpus, record.progress), run);
  }
  Trainer trainer(*checkpoint, options, corpus, run.ranks);

  ProgressLine notes(0, 0, run.quiet);
  if (corpus.size(Split::kTrain) != record.progress.train_tokens ||
      corpus.size(Split::kValidation) != record.progress.validation_tokens) {
    notes.note("latte: the text has changed since the checkpoint: the run goes on with the new one");
  }
  if (record.progress.threads != at::get_num_threads()) {
    notes.note("latte: " + std::to_string(at::get_num_threads()) + " threads, where the checkpoint was made with " +
               std::to_string(record.progress.threads) + ": the same to rounding, not bit for bit");
  }
  write_config(*folder, record.model, options, *run.files);
  return run_loop(trainer, &*folder, progress_of(trainer, corpus, record.progress), run);
}

}  // namespace latte::train
