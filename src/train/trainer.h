// Training a language model on a text.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "data/text.h"
#include "models/language_model.h"
#include "train/ranks.h"
#include "train/step_trainer.h"

namespace latte::train {

class Trainer : public StepTrainer {
 public:
  // A fresh model. `corpus` outlives the trainer, and so do `ranks`, with which it trains its share of each batch: all that is
  // said of losses is the mean over them. Throws ConfigError and OptionError.
  Trainer(const formats::LanguageModelConfig& model, const TrainerOptions& options, const TextCorpus& corpus,
          Ranks* ranks = nullptr);
  // Goes on from a checkpoint of such a model; options may differ. Throws formats::FormatError.
  Trainer(const formats::CheckpointFile& checkpoint, const TrainerOptions& options, const TextCorpus& corpus,
          Ranks* ranks = nullptr);

  // The mean loss over the validation batches. Draws no random number.
  double evaluate();
  Evaluation validate() override { return {.loss = evaluate(), .accuracy = {}}; }
  bool has_validation() const override { return corpus_.size(Split::kValidation) > 0; }
  bool has_test() const override { return corpus_.size(Split::kTest) > 0; }

  models::LanguageModel& model() { return model_; }

 private:
  Loss loss_of_batch(uint64_t index) override;
  std::string record(const Progress& progress) const override;
  // {"test": {"loss", "tokens"}} and, of bytes, "bits_per_byte".
  nlohmann::json evaluate_splits() override;
  at::Tensor loss_of(const TokenBatch& batch);
  double evaluate(Split split, std::span<const int64_t> windows);

  const TextCorpus& corpus_;
  models::LanguageModel model_{nullptr};
  std::vector<int64_t> validation_windows_;
};

}  // namespace latte::train
