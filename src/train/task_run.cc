#include "train/task_run.h"

#include <ATen/Parallel.h>

#include <cerrno>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "data/tasks.h"
#include "formats/atomic_file.h"
#include "formats/error.h"
#include "train/progress.h"
#include "train/run_folder.h"
#include "train/run_loop.h"
#include "train/task_trainer.h"

namespace latte::train {
namespace {

using nlohmann::json;

std::string dump(const json& object) { return object.dump(2, ' ', false, json::error_handler_t::replace) + "\n"; }

// What `latte train --config` takes, to do the same again: without what the task says.
void write_config(const RunFolder& folder, const models::EncoderConfig& model, const TrainerOptions& options,
                  const TaskOptions& task) {
  json object = {{"task", task.to_json()}, {"model", model.to_json()}, {"training", options.to_json()}};
  for (const char* field : {"vocab_size", "num_outputs", "head", "tie_embeddings"}) object["model"].erase(field);
  for (const char* field : kTextFields) object["training"].erase(field);
  formats::write_file(folder / "config.json", dump(object));
}

Progress progress_of(const TaskTrainer& trainer, const TaskData& data, Progress before) {
  before.threads = at::get_num_threads();
  before.dtype = trainer.dtype();
  before.train_tokens = data.examples(data.splits.at("train"));
  before.validation_tokens = data.examples(data.splits.at("validation"));
  return before;
}

TaskRunResult run(TaskTrainer& trainer, const TaskData& data, const RunFolder& folder, const Progress& progress,
                  const RunOptions& options) {
  TaskRunResult result;
  result.run = run_loop(trainer, &folder, progress, options);
  if (result.run.interrupted) return result;
  for (const auto& [name, split] : data.splits) {
    if (name == "train") continue;
    const Evaluation evaluation = trainer.evaluate(split);
    result.splits[name] = {{"loss", evaluation.loss},
                           {"accuracy", *evaluation.accuracy},
                           {"examples", data.examples(split)},
                           {"majority", data.majority_share(split)}};
  }
  formats::write_file(folder / kResultsName, dump(result.splits));
  return result;
}

void check_alone(const RunOptions& run) {
  if (run.ranks) throw OptionError("a task trains in one process: torchrun shares the training on a text alone");
}

}  // namespace

TaskRunResult start_task_run(const models::EncoderConfig& model, bool max_positions_given, const TrainerOptions& options,
                             const TaskOptions& task, const RunOptions& run_options) {
  options.validate();
  check_alone(run_options);
  const std::string existing = (std::filesystem::path(run_options.out) / formats::kCheckpointName).string();
  if (!run_options.overwrite && std::filesystem::exists(existing)) {
    throw OptionError(existing +
                      " is there already: --resume goes on with it, --overwrite starts again, --out names another folder");
  }
  const TaskData data = load_task(task);
  const models::EncoderConfig fitted = fit_to(model, data, max_positions_given);
  TaskTrainer trainer(fitted, options, task, data);
  const RunFolder folder(run_options.out);
  const Progress progress = progress_of(trainer, data, {});
  trainer.save(folder.checkpoint(), progress);
  std::error_code ignored;
  std::filesystem::remove(folder / kResultsName, ignored);  // the run's that was there
  write_config(folder, fitted, options, task);
  return run(trainer, data, folder, progress, run_options);
}

TaskRunResult resume_task_run(const TrainerOptions& options, const RunOptions& run_options) {
  options.validate();
  check_alone(run_options);
  const std::string path = (std::filesystem::path(run_options.out) / formats::kCheckpointName).string();
  if (!std::filesystem::exists(path)) throw formats::FileError("resume from", path, ENOENT);
  const RunFolder folder(run_options.out);
  const formats::CheckpointFile checkpoint(path);
  const TaskRecord record = TaskRecord::from(checkpoint);
  // A run that was stopped after its last step still owes its results.
  if (checkpoint.step() >= options.steps && std::filesystem::exists(folder / kResultsName)) {
    throw OptionError("the checkpoint is at step " + std::to_string(checkpoint.step()) + " of " + std::to_string(options.steps) +
                      " already: more steps go on");
  }
  const TaskData data = load_task(record.task);
  TaskTrainer trainer(checkpoint, options, data);
  ProgressLine notes(0, 0, run_options.quiet);
  const Progress progress = progress_of(trainer, data, record.progress);
  if (progress.train_tokens != record.progress.train_tokens) {
    notes.note("latte: the task's examples have changed since the checkpoint: the run goes on with the new ones");
  }
  if (record.progress.threads != at::get_num_threads()) {
    notes.note("latte: " + std::to_string(at::get_num_threads()) + " threads, where the checkpoint was made with " +
               std::to_string(record.progress.threads) + ": the same to rounding, not bit for bit");
  }
  write_config(folder, record.model, options, record.task);
  return run(trainer, data, folder, progress, run_options);
}

}  // namespace latte::train
