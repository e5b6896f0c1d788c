// What latte train's two kinds share: a language model on a text, and an encoder on a task.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "train/run.h"

namespace latte::cli {

struct TrainRequest {
  nlohmann::json model = nlohmann::json::object();     // fields that the command line or the configuration names
  nlohmann::json training = nlohmann::json::object();  // of train::TrainerOptions
  nlohmann::json task = nlohmann::json::object();      // of TaskOptions
  train::RunOptions run;
  bool resume = false;
  bool configured = false;  // a configuration file was given
};

// Lays `over` over `under`, field by field.
void MergeFields(nlohmann::json& under, const nlohmann::json& over);

// Lays training fields over all of a run's: a min_lr that isn't named keeps its share of lr.
void MergeTraining(nlohmann::json& under, const nlohmann::json& over);

// A tenth of whichever learning rate was named is min_lr, unless it was named as well.
void FillMinLr(nlohmann::json& training);

// Lays texts FIELD=VALUE over the fields of a task. Throws CLI::ValidationError.
void SetTaskFields(const std::vector<std::string>& settings, nlohmann::json& task);

// A configuration file of latte train and latte compare: model, training, task; `paper` holds the published settings, such an
// object as well, which are laid over the rest with `paper`. Throws formats::FormatError, with the line.
nlohmann::json ReadTrainConfig(const std::string& path, bool paper);

// The line, from 1, of a byte of a text.
int64_t LineOf(std::string_view text, size_t offset);

// `message`, and where `config` names the field that it is about: "configs/x.json: line 7: …". `path` may be empty.
std::string LocatedMessage(const std::string& path, const std::string& message);

// Whether run.out holds a run of --task. Collective.
bool IsTaskRun(const train::RunOptions& run);

// Whether torchrun has started this job again, and a checkpoint is there: it goes on from that, if it is its own. Collective.
bool Restarted(const train::RunOptions& run);

// What to say where it is not.
std::string OtherRun(const train::RunOptions& run);

// Trains on a task. Throws as start_task_run and resume_task_run do.
train::RunResult TrainTask(const TrainRequest& request);

}  // namespace latte::cli
