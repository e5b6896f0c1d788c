// One training step after the other, and everything that makes a run continue bit for bit.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "data/text.h"
#include "models/language_model.h"
#include "train/optimizer.h"
#include "train/options.h"
#include "train/ranks.h"
#include "train/training_checkpoint.h"

namespace latte::train {

struct StepResult {
  double loss = 0.0;  // nats a token, of the batches of this step, before its update
  double lr = 0.0;
  double grad_norm = 0.0;  // before clipping
};

// Uses torch's default generator (initialisation, dropout), which it seeds: one at a time in a process. With the same number of
// threads, the same options and the same text, the weights after N steps are the same bits, whether or not a checkpoint lay
// between.
class Trainer {
 public:
  // A fresh model. `corpus` outlives the trainer, and so do `ranks`, with which it trains its share of each batch: all that is
  // said of losses is the mean over them. Throws ConfigError and OptionError.
  Trainer(const models::LanguageModelConfig& model, const TrainerOptions& options, const TextCorpus& corpus,
          Ranks* ranks = nullptr);
  // Goes on from a checkpoint of such a model; options may differ. Throws formats::FormatError.
  Trainer(const formats::CheckpointFile& checkpoint, const TrainerOptions& options, const TextCorpus& corpus,
          Ranks* ranks = nullptr);
  // Brings every rank to where the first stands, and from there on averages gradients. Collective; to call once, before a step.
  void join_ranks();

  // A loss that isn't finite is returned as it is, and the weights stay as they were.
  StepResult step();
  // The mean loss over the validation batches. Draws no random number.
  double evaluate();
  bool has_validation() const { return corpus_.size(Split::kValidation) > 0; }

  // Writes a checkpoint atomically; `progress` says how far this and earlier sessions got.
  void save(const std::string& path, const Progress& progress,
            formats::FileOperations& operations = formats::FileOperations::system()) const;

  int64_t steps_done() const { return steps_done_; }
  const TrainerOptions& options() const { return options_; }
  const std::string& dtype() const { return dtype_; }
  models::LanguageModel& model() { return model_; }

 private:
  at::Tensor loss_of(const TokenBatch& batch);
  AdamW::NamedTensors state() const;  // all of a checkpoint's tensors but the generator

  const TextCorpus& corpus_;
  Ranks* ranks_;  // null: alone
  TrainerOptions options_;
  std::string dtype_;
  models::LanguageModel model_{nullptr};
  std::vector<at::Tensor> parameters_;
  std::optional<AdamW> optimizer_;
  std::vector<int64_t> validation_windows_;
  int64_t steps_done_ = 0;
};

}  // namespace latte::train
