// A whole training run on a task, in a folder as train/run.h's; its results are loss and accuracy on every split.
#pragma once

#include "data/task_options.h"
#include "models/encoder.h"
#include "train/run.h"
#include "train/task_trainer.h"

namespace latte::train {

// `model` without what the task says: see fit_to(). Errors as start_run's, and the task's.
RunResult start_task_run(const models::EncoderConfig& model, bool max_positions_given, const TrainerOptions& options,
                         const TaskOptions& task, const RunOptions& run);

// The record of the checkpoint in run.out, which the first rank reads. Throws as resume_task_run.
TaskRecord read_task_record(const RunOptions& run);

// resume_run, on the run's task and model.
RunResult resume_task_run(const TrainerOptions& options, const RunOptions& run);

}  // namespace latte::train
