// One optimizer step after the other, and everything that makes a run continue bit for bit: what training on a text (Trainer) and
// on a task (TaskTrainer) have in common.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "formats/checkpoint.h"
#include "train/optimizer.h"
#include "train/options.h"
#include "train/ranks.h"
#include "train/training_checkpoint.h"

namespace latte::train {

struct StepResult {
  double loss = 0.0;  // nats a token (a task: an answer), of the batches of this step, before its update
  double lr = 0.0;
  double grad_norm = 0.0;  // before clipping
  int64_t tokens = 0;      // read, without padding
};

struct Evaluation {
  double loss = 0.0;
  std::optional<double> accuracy;  // tasks: the share of right answers
};

// Uses torch's default generator (initialisation, dropout), which it seeds: one at a time in a process. With the same number of
// threads, the same options and the same data, the weights after N steps are the same bits, whether or not a checkpoint lay
// between.
class StepTrainer {
 public:
  virtual ~StepTrainer() = default;
  StepTrainer(const StepTrainer&) = delete;
  StepTrainer& operator=(const StepTrainer&) = delete;

  // Brings every rank to where the first stands, and from there on averages gradients. Collective; to call once, before a step.
  void join_ranks();
  // A loss that isn't finite is returned as it is, and the weights stay as they were.
  StepResult step();
  // On the validation examples. Draws no random number.
  virtual Evaluation validate() = 0;
  virtual bool has_validation() const = 0;
  // What a run is judged by at its end.
  virtual bool has_test() const = 0;
  // By split: {"test": {"loss": nats, …}, …}. null where an interruption cut it short, on all ranks alike.
  nlohmann::json test();

  // Writes a checkpoint atomically; `progress` says how far this and earlier sessions got.
  void save(const std::string& path, const Progress& progress,
            formats::FileOperations& operations = formats::FileOperations::system()) const;

  int64_t steps_done() const { return steps_done_; }
  int64_t parameter_count() const;
  const TrainerOptions& options() const { return options_; }
  const std::string& dtype() const { return dtype_; }

 protected:
  // Seeds the generator: what follows draws the weights. With `ranks`, which outlive it, a step is theirs together: all that is
  // said of losses is the mean over them.
  explicit StepTrainer(const TrainerOptions& options, Ranks* ranks = nullptr);
  Ranks* ranks() const { return ranks_; }  // null: alone
  // Whether an evaluation is to end here: test()'s alone, as what a validation says stands in a run's metrics.
  bool stopped();
  virtual nlohmann::json evaluate_splits() = 0;  // test()'s

  struct Loss {
    at::Tensor mean;     // nats
    int64_t tokens = 0;  // of all ranks
  };
  // Of training's batch number `index`; over all steps, accumulation counted.
  virtual Loss loss_of_batch(uint64_t index) = 0;
  // A checkpoint's config, a JSON object.
  virtual std::string record(const Progress& progress) const = 0;

  // Once, with the fresh model, which the subclass keeps.
  void train_module(torch::nn::Module& module);
  // All of a checkpoint's tensors. Throws formats::FormatError.
  void restore(const formats::CheckpointFile& checkpoint);

 private:
  AdamW::NamedTensors state() const;  // all of a checkpoint's tensors but the generator

  Ranks* ranks_;
  TrainerOptions options_;
  std::string dtype_;
  torch::nn::Module* module_ = nullptr;
  std::vector<at::Tensor> parameters_;
  std::optional<AdamW> optimizer_;
  int64_t steps_done_ = 0;
  bool interruptible_ = false, cut_short_ = false;  // test()
};

}  // namespace latte::train
