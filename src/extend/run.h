// A whole conversion: matching, training, checkpoints in the folder OUT.run, the adapter in OUT, and a report.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "extend/extend_trainer.h"
#include "extend/match.h"
#include "extend/options.h"

namespace latte::extend {

struct RunOptions {
  std::string out;         // the adapter, NAME.gguf; checkpoint.safetensors, metrics.jsonl and loss.svg go to NAME.gguf.run
  std::string merged;      // also write a merged model here; a resumed run has to be told again
  std::string config;      // the file that options came from, if any: what is read is never written over
  bool overwrite = false;  // run_extend: an adapter or a run that is there goes
  bool quiet = false;      // nothing on standard error
};

struct Report {
  bool interrupted = false;  // by Ctrl-C or SIGTERM; everything is saved
  bool matching = false;     // it was interrupted in the first stage, of which the first `matched_layers` are done
  int64_t matched_layers = 0;
  int64_t step = 0;
  int64_t steps = 0;
  int64_t tokens = 0;
  double seconds = 0.0;        // of training, over all sessions; of matching as well
  double match_seconds = 0.0;  // of those
  double tokens_per_second = 0.0;
  int64_t parameters = 0;  // trained
  int64_t adapter_bytes = 0;
  std::string out;
  std::vector<MatchResult> layers;         // of this session
  bool full = false;                       // attention stayed as it was, without window and sinks
  std::optional<Validation> window_sinks;  // before anything was trained
  std::optional<Validation> matched;       // after the first stage
  std::optional<Validation> trained;       // at the end
  std::optional<Validation> latents_off;   // at the end
};

// Throws formats::FileError and formats::FormatError (model, text, checkpoint, disk), OptionError, and std::runtime_error where
// the loss stops being finite or another process trains in the folder. The files are then those of the last checkpoint.
Report run_extend(const ExtendOptions& options, const RunOptions& run);
// Goes on from OUT.run's checkpoint. `tokens` may differ; whatever shapes the model can't, nor, in the first stage, what that
// does, nor the adapter that it began from.
Report resume_extend(const ExtendOptions& options, const RunOptions& run);

// What a run's checkpoint was made with. Throws formats::FileError and formats::FormatError.
ExtendOptions options_of_run(const std::string& out);

}  // namespace latte::extend
