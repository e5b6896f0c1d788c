// The loop of a run in its folder.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "formats/checkpoint.h"
#include "train/options.h"
#include "train/run.h"
#include "train/run_folder.h"
#include "train/step_trainer.h"
#include "train/training_checkpoint.h"

namespace latte::train {

bool leads(const RunOptions& run);  // reads the checkpoint and writes
std::string checkpoint_of(const RunOptions& run);
std::string dump(const nlohmann::json& object);  // as a file's text

// Throws OptionError on the rank that leads where a run is there and isn't to be overwritten.
void refuse_to_overwrite(const RunOptions& run);

// What a run is resumed from, on all ranks.
struct ResumedRun {
  const formats::CheckpointFile* checkpoint = nullptr;  // of the rank that leads
  TrainerOptions options;                               // as it was trained
  Progress progress;
  int64_t parameters = 0;
  bool tests = false;  // it has results at its end
};

// Where no step is left of options.steps: what the run ended with, or an OptionError on all ranks where the options are others
// than the run's. None where there is something to do, be it only results that are owed; those of other options are an
// OptionError too. Collective.
std::optional<RunResult> finished_run(const ResumedRun& resumed, const TrainerOptions& options, const RunOptions& run);

// What follows from another number of threads, on standard error.
void note_threads(const Progress& before, const RunOptions& run);

// `folder` is null on ranks that don't write. Trains to options().steps or to an interruption: metrics, progress, checkpoints,
// and at the end the results and the loss curve. Results of fewer steps go first. Throws formats::FileError and DivergedError;
// the checkpoint is then the one of before.
RunResult run_loop(StepTrainer& trainer, const RunFolder* folder, Progress progress, const RunOptions& run);

}  // namespace latte::train
