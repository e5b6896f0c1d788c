// Training an encoder on a task.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "data/task_data.h"
#include "data/task_options.h"
#include "models/encoder.h"
#include "train/step_trainer.h"

namespace latte::train {

// A checkpoint's config: a JSON object of model, training, task, progress.
struct TaskRecord {
  models::EncoderConfig model;
  TrainerOptions options;
  TaskOptions task;
  Progress progress;

  std::string to_json() const;
  // Throws formats::FormatError for a config that no latte train --task wrote.
  static TaskRecord from(const formats::CheckpointFile& checkpoint);
  static TaskRecord from_json(const std::string& path, const std::string& config);  // of the checkpoint at `path`
};

// Throws ConfigError where learned positions or Linformer don't reach to the data's longest sequence.
void check_reach(const models::EncoderConfig& model, const TaskData& data);

// `model` for a task: its vocab_size, num_outputs and head are the data's; learned positions and Linformer reach to its longest
// sequence unless max_positions says more. Throws as check_reach.
models::EncoderConfig fit_to(models::EncoderConfig model, const TaskData& data, bool max_positions_given);

class TaskTrainer : public StepTrainer {
 public:
  // `model` as fit_to() makes it. `data` outlives the trainer. With `ranks` (step_trainer.h) all of them hold all examples, and
  // each reads its share of a batch; batch norms take their statistics over the whole of it. Throws ConfigError and OptionError.
  TaskTrainer(const models::EncoderConfig& model, const TrainerOptions& options, const TaskOptions& task, const TaskData& data,
              Ranks* ranks = nullptr);
  // Goes on from a checkpoint. Throws formats::FormatError.
  TaskTrainer(const formats::CheckpointFile& checkpoint, const TrainerOptions& options, const TaskData& data,
              Ranks* ranks = nullptr);

  // On eval_batches batches of the validation split, evenly spread over it.
  Evaluation validate() override;
  bool has_validation() const override { return true; }
  // On all of a split, in batches.
  Evaluation evaluate(const TaskExamples& split);
  bool has_test() const override { return true; }

  models::Encoder& model() { return model_; }

 private:
  Loss loss_of_batch(uint64_t index) override;
  std::string record(const Progress& progress) const override;
  // Of all splits but the training one "loss", "accuracy", "examples" and "majority", the share of the most frequent answer.
  nlohmann::json evaluate_splits() override;
  struct Answers {
    at::Tensor loss;    // the mean over them
    int64_t count = 0;  // of answers asked for
    int64_t right = 0;
    double total() const { return loss.item<double>() * static_cast<double>(count); }
  };
  int64_t batch_at_once() const;  // examples that this rank has in memory together
  // This rank's part of a batch, or of what is evaluated.
  std::vector<int64_t> share(const std::vector<int64_t>& examples) const;
  Answers answer(const TaskBatch& batch, bool count_right);
  // Each example from the mean of its stretches' log-probabilities: TaskData::crop.
  Answers answer_in_stretches(const TaskExamples& split, const std::vector<int64_t>& examples);
  Evaluation evaluate(const TaskExamples& split, const std::vector<int64_t>& examples);
  // Of some training examples [N, E], each sequence's: what pooled_norm knows of them.
  at::Tensor pooled_examples();

  const TaskData& data_;
  TaskOptions task_;
  models::Encoder model_{nullptr};
  EpochOrder order_;
};

}  // namespace latte::train
