// What latte train puts into a checkpoint (formats/checkpoint.h), and how a model comes back from it.
//
// Tensors: "model.NAME" for each parameter, "optimizer.exp_avg.NAME" and "optimizer.exp_avg_sq.NAME", "random.torch" (torch's
// default generator, U8). Data sampling needs no state: a batch depends on the seed and on its number. The config is a JSON
// object: model, training (TrainerOptions), vocabulary (its description), progress.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "formats/checkpoint.h"
#include "formats/language_model_config.h"
#include "formats/vocabulary.h"
#include "models/language_model.h"
#include "train/options.h"

namespace latte::train {

struct Progress {
  double seconds = 0.0;      // of training, over all sessions
  int64_t threads = 0;       // of the last session
  std::string dtype;         // of the last session
  int64_t train_tokens = 0;  // of the text; of a task, examples
  int64_t validation_tokens = 0;
  std::optional<double> val_loss;  // the last
  std::optional<double> best_val_loss;
  std::optional<double> val_accuracy;  // of a task, the last
  int64_t tokens = 0;                  // read over all sessions, without padding

  nlohmann::json to_json() const;
  // Throws nlohmann::json::exception.
  static Progress from_json(const nlohmann::json& object);
};

struct TrainingRecord {
  formats::LanguageModelConfig model;
  TrainerOptions options;
  formats::Vocabulary vocabulary;
  Progress progress;

  std::string to_json() const;
  // Throws formats::FormatError for a config that no latte train wrote.
  static TrainingRecord from(const formats::CheckpointFile& checkpoint);
  // The same of to_json()'s text; `path` is where it comes from.
  static TrainingRecord from_json(const std::string& path, const std::string& text);
};

// The checkpoint's view of a contiguous tensor on the CPU; it borrows the tensor's memory.
formats::TensorView view_of(const std::string& name, const at::Tensor& tensor);

// Copies a file's tensor into `tensor`, contiguous, on the CPU. Throws formats::FormatError unless dtype and shape agree.
void copy_from(const formats::SafetensorsFile& file, const std::string& name, at::Tensor tensor);

// Fills a model of record.model with the checkpoint's weights. Throws formats::FormatError.
void load_weights(const formats::SafetensorsFile& file, models::LanguageModel& model);

struct LoadedModel {
  models::LanguageModel model{nullptr};  // in evaluation mode
  TrainingRecord record;
  int64_t step = 0;
};

// Reads and verifies a checkpoint. Throws formats::FileError or formats::FormatError, the latter also where the file holds
// another number of parameters than its config asks for, before the model is built.
LoadedModel load_model(const std::string& path);

// Throws formats::FormatError unless the file's "model." tensors, buffers aside, have `expected` elements.
void check_parameter_count(const formats::SafetensorsFile& file, int64_t expected);

}  // namespace latte::train
