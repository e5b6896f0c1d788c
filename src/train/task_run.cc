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

bool leads(const RunOptions& run) { return !run.ranks || run.ranks->leads(); }

std::string checkpoint_of(const RunOptions& run) { return (std::filesystem::path(run.out) / formats::kCheckpointName).string(); }

// What `latte train --config` takes, to do the same again: without what the task says.
void write_config(const RunFolder& folder, const models::EncoderConfig& model, const TrainerOptions& options,
                  const TaskOptions& task, formats::FileOperations& files) {
  json object = {{"task", task.to_json()}, {"model", model.to_json()}, {"training", options.to_json()}};
  for (const char* field : {"vocab_size", "num_outputs", "head", "tie_embeddings"}) object["model"].erase(field);
  for (const char* field : kTextFields) object["training"].erase(field);
  formats::write_file(folder / "config.json", dump(object), files);
}

Progress progress_of(const TaskTrainer& trainer, const TaskData& data, Progress before) {
  before.threads = at::get_num_threads();
  before.dtype = trainer.dtype();
  before.train_tokens = data.examples(data.splits.at("train"));
  before.validation_tokens = data.examples(data.splits.at("validation"));
  return before;
}

// `folder`: the first rank's.
TaskRunResult run(TaskTrainer& trainer, const TaskData& data, const RunFolder* folder, const Progress& progress,
                  const RunOptions& options) {
  TaskRunResult result;
  result.run = run_loop(trainer, folder, progress, options);
  result.run.interrupted |= trainer.cut_short();
  if (result.run.interrupted) return result;
  for (const auto& [name, evaluation] : trainer.evaluations()) {
    const TaskExamples& split = data.splits.at(name);
    result.splits[name] = {{"loss", evaluation.loss},
                           {"accuracy", *evaluation.accuracy},
                           {"examples", data.examples(split)},
                           {"majority", data.majority_share(split)}};
  }
  if (folder) formats::write_file(*folder / kResultsName, dump(result.splits), *options.files);
  return result;
}

}  // namespace

TaskRunResult start_task_run(const models::EncoderConfig& model, bool max_positions_given, const TrainerOptions& options,
                             const TaskOptions& task, const RunOptions& run_options) {
  options.validate();
  const std::string existing = checkpoint_of(run_options);
  if (leads(run_options) && !run_options.overwrite && std::filesystem::exists(existing)) {
    throw OptionError(existing +
                      " is there already: --resume goes on with it, --overwrite starts again, --out names another folder");
  }
  const TaskData data = load_task(task, *run_options.files);
  const models::EncoderConfig fitted = fit_to(model, data, max_positions_given);
  TaskTrainer trainer(fitted, options, task, data, run_options.ranks);
  const Progress progress = progress_of(trainer, data, {});
  if (!leads(run_options)) return run(trainer, data, nullptr, progress, run_options);
  const RunFolder folder(run_options.out);
  trainer.save(folder.checkpoint(), progress, *run_options.files);
  std::error_code ignored;
  std::filesystem::remove(folder / kResultsName, ignored);  // the run's that was there
  write_config(folder, fitted, options, task, *run_options.files);
  return run(trainer, data, &folder, progress, run_options);
}

TaskRecord read_task_record(const RunOptions& run) {
  const std::string path = checkpoint_of(run);
  std::string config;
  if (leads(run)) config = formats::CheckpointFile(path).config();
  if (run.ranks) config = run.ranks->broadcast(config);
  return TaskRecord::from_json(path, config);
}

TaskRunResult resume_task_run(const TrainerOptions& options, const RunOptions& run_options) {
  options.validate();
  const std::string path = checkpoint_of(run_options);
  if (leads(run_options) && !std::filesystem::exists(path)) throw formats::FileError("resume from", path, ENOENT);
  const TaskRecord record = read_task_record(run_options);
  if (!leads(run_options)) {
    const TaskData data = load_task(record.task, *run_options.files);
    TaskTrainer trainer(record.model, options, record.task, data, run_options.ranks);
    return run(trainer, data, nullptr, progress_of(trainer, data, record.progress), run_options);
  }
  const RunFolder folder(run_options.out);
  const formats::CheckpointFile checkpoint(path);
  // A run that was stopped after its last step still owes its results.
  if (checkpoint.step() >= options.steps && std::filesystem::exists(folder / kResultsName)) {
    throw OptionError("the checkpoint is at step " + std::to_string(checkpoint.step()) + " of " + std::to_string(options.steps) +
                      " already: more steps go on");
  }
  const TaskData data = load_task(record.task, *run_options.files);
  TaskTrainer trainer(checkpoint, options, data, run_options.ranks);
  ProgressLine notes(0, 0, run_options.quiet);
  const Progress progress = progress_of(trainer, data, record.progress);
  if (progress.train_tokens != record.progress.train_tokens) {
    notes.note("latte: the task's examples have changed since the checkpoint: the run goes on with the new ones");
  }
  if (record.progress.threads != at::get_num_threads()) {
    notes.note("latte: " + std::to_string(at::get_num_threads()) + " threads, where the checkpoint was made with " +
               std::to_string(record.progress.threads) + ": the same to rounding, not bit for bit");
  }
  write_config(folder, record.model, options, record.task, *run_options.files);
  return run(trainer, data, &folder, progress, run_options);
}

}  // namespace latte::train
