#include "train/task_run.h"

#include <ATen/Parallel.h>

#include <cerrno>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

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

}  // namespace

RunResult start_task_run(const models::EncoderConfig& model, bool max_positions_given, const TrainerOptions& options,
                         const TaskOptions& task, const RunOptions& run) {
  options.validate();
  refuse_to_overwrite(run);
  const TaskData data = load_task(task, *run.files);
  const models::EncoderConfig fitted = fit_to(model, data, max_positions_given);
  TaskTrainer trainer(fitted, options, task, data, run.ranks);
  const Progress progress = progress_of(trainer, data, {});
  if (!leads(run)) return run_loop(trainer, nullptr, progress, run);
  const RunFolder folder(run.out);
  trainer.save(folder.checkpoint(), progress, *run.files);
  write_config(folder, fitted, options, task, *run.files);
  return run_loop(trainer, &folder, progress, run);
}

TaskRecord read_task_record(const RunOptions& run) {
  const std::string path = checkpoint_of(run);
  std::string config;
  if (leads(run)) config = formats::CheckpointFile(path).config();
  if (run.ranks) config = run.ranks->broadcast(config);
  return TaskRecord::from_json(path, config);
}

RunResult resume_task_run(const TrainerOptions& options, const RunOptions& run) {
  options.validate();
  const std::string path = checkpoint_of(run);
  if (leads(run) && !std::filesystem::exists(path)) throw formats::FileError("resume from", path, ENOENT);
  const TaskRecord record = read_task_record(run);
  std::optional<RunFolder> folder;
  std::optional<formats::CheckpointFile> checkpoint;
  if (leads(run)) {
    folder.emplace(run.out);
    checkpoint.emplace(path);
  }
  const ResumedRun resumed = {.checkpoint = checkpoint ? &*checkpoint : nullptr,
                              .options = record.options,
                              .progress = record.progress,
                              .parameters = record.model.parameter_count(),
                              .tests = true};
  if (const auto finished = finished_run(resumed, options, run)) return *finished;
  const TaskData data = load_task(record.task, *run.files);
  check_reach(record.model, data);
  if (!checkpoint) {
    TaskTrainer trainer(record.model, options, record.task, data, run.ranks);
    return run_loop(trainer, nullptr, progress_of(trainer, data, record.progress), run);
  }
  TaskTrainer trainer(*checkpoint, options, data, run.ranks);
  const Progress progress = progress_of(trainer, data, record.progress);
  if (progress.train_tokens != record.progress.train_tokens) {
    ProgressLine(0, 0, run.quiet)
        .note("latte: the task's examples have changed since the checkpoint: the run goes on with the new ones");
  }
  note_threads(record.progress, run);
  write_config(*folder, record.model, options, record.task, *run.files);
  return run_loop(trainer, &*folder, progress, run);
}

}  // namespace latte::train
