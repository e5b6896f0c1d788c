// The loop of a run in its folder.
#pragma once

#include "train/run.h"
#include "train/run_folder.h"
#include "train/step_trainer.h"

namespace latte::train {

// `folder` is null on ranks that don't write. Trains to options().steps or to an interruption: metrics, progress, checkpoints,
// and the loss curve at the end. Throws formats::FileError, and std::runtime_error where the loss stops being finite; the
// checkpoint is then the one of before.
RunResult run_loop(StepTrainer& trainer, const RunFolder* folder, Progress progress, const RunOptions& run);

}  // namespace latte::train
