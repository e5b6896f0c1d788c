// A whole training run in a folder: checkpoint.safetensors, metrics.jsonl, config.json, loss.svg and loss.png, and results.json
// where there is something to test on.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "formats/language_model_config.h"
#include "train/ranks.h"
#include "train/training_checkpoint.h"

namespace latte::train {

struct RunOptions {
  std::string out;         // the folder; made when it isn't there
  bool overwrite = false;  // start_run: a run that is there already goes
  bool quiet = false;      // nothing on standard error
  // With whom to train; null: alone. The first of them reads the checkpoint and writes everything. All have to read the text.
  Ranks* ranks = nullptr;
  formats::FileOperations* files = &formats::FileOperations::system();  // what it writes with
};

// The loss or its gradient stopped being finite: what was saved before stays.
class DivergedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  static constexpr int kExitCode = 3;  // of latte train
};

struct RunResult {
  bool interrupted = false;  // by Ctrl-C or SIGTERM; everything is saved
  bool told = false;         // all of it was done before: this is what the run ended with
  int64_t step = 0;
  int64_t parameters = 0;
  double loss = 0.0;      // of the last step
  nlohmann::json splits;  // StepTrainer::test()'s, what results.json holds; null: interrupted, or nothing to test on
  // The mean of this session's steps, its first two aside: time passed or, where that is less, the processor's. So on one thread
  // what else the machine does isn't counted; on several it is. Where it had none, that of all earlier ones.
  double step_seconds = 0.0;
  Progress progress;
  std::string checkpoint;
};

constexpr const char* kResultsName = "results.json";

// Trains a model from the start; its vocab_size becomes the text's.
// Throws formats::FileError and formats::FormatError (text, checkpoint, disk), ConfigError, OptionError, DivergedError, and
// std::runtime_error where another process trains in the folder. The checkpoint is then the one of before.
RunResult start_run(const formats::LanguageModelConfig& model, const TrainerOptions& options, const RunOptions& run);

// What a run's checkpoint says, on all of run.ranks. Throws as resume_run does.
TrainingRecord read_record(const RunOptions& run);

// Goes on with a run from its checkpoint, or where that has all steps writes the results that it still owes; where nothing is
// left to do, says what it ended with. `options` as those in the checkpoint or changed; what they train on and the vocabulary
// can't change. Throws as start_run; OptionError where nothing is left to do with other options.
RunResult resume_run(const TrainerOptions& options, const RunOptions& run);

}  // namespace latte::train
