// The second stage of a conversion: the converted model as a whole is trained to give the original's predictions (or the text's),
// one step after the other, with everything that makes a run continue where it was stopped.
//
// A checkpoint (formats/checkpoint.h) holds "latents.NAME" for each new parameter, "attention.NAME" for the float32 master of
// each pretrained weight that trains (with LoRA, its two factors), and "optimizer.G.exp_avg.NAME" and so on for each group G of
// parameters. Which text a step reads and which window it draws depend on the seed and on its number.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "extend/converted_model.h"
#include "extend/match.h"
#include "extend/options.h"
#include "extend/teacher_cache.h"
#include "extend/token_text.h"
#include "formats/checkpoint.h"
#include "train/optimizer.h"

namespace latte::extend {

struct StepResult {
  double loss = 0.0;
  double lr = 0.0;         // of pretrained weights
  double grad_norm = 0.0;  // before clipping
  int64_t window = 0;      // drawn
};

struct Validation {
  double kl = 0.0;          // to the original, nats a token
  double next_token = 0.0;  // nats a token
};

class ExtendTrainer {
 public:
  // A fresh conversion. `text` outlives the trainer.
  ExtendTrainer(const ExtendOptions& options, const TokenText& text);

  // The first stage. Does nothing where there are no latents, options.match_sequences is 0, or an adapter was started from and
  // options.match_layers is empty. Layers before `first` were fitted by an earlier call.
  void match(const MatchWatch& watch, int64_t first = 0);

  // Throws nothing for a loss that isn't finite: it is returned as it is, and the weights stay as they were.
  StepResult step();
  bool has_validation() const { return held_out_.size(0) > 0; }
  Validation validate(bool latents_off = false);

  // Throw as write_checkpoint, and formats::FormatError for a checkpoint of another conversion.
  void save(const std::string& path, const std::string& config) const;
  void load(const formats::CheckpointFile& checkpoint);

  // What an adapter holds: the latents and the pretrained weights that were trained.
  StoredTensors adapter_tensors() const;
  const formats::AdapterSpec& spec() const { return student_.spec; }
  int64_t trained_parameters() const;

  int64_t steps_done() const { return steps_done_; }
  const std::string& dtype() const { return dtype_; }
  ConvertedModel& student() { return student_; }

 private:
  // A set of parameters with a learning rate of their own.
  struct Group {
    std::string name;
    double lr;
    train::AdamW optimizer;
  };
  // A pretrained weight that trains: in float32 here, in the model's dtype there. With LoRA `master` stays and up [M, R] times
  // down [R, K] is added to it.
  struct Master {
    std::string name;
    at::Tensor master, weight, down = {}, up = {};
    at::Tensor value() const;
    void take_gradient();  // from `weight`
  };

  void collect_parameters();
  void start_from(const std::string& path, const std::vector<LatentForm>& forms);
  void masters_to_model();
  at::Tensor teacher_hidden(const at::Tensor& tokens);
  train::AdamW::NamedTensors state() const;

  ExtendOptions options_;
  std::string dtype_;
  const TokenText& text_;
  models::Decoder original_{nullptr};
  ConvertedModel student_;
  std::vector<Master> masters_;
  std::vector<std::pair<std::string, at::Tensor>> kept_;  // changed by options.from, and not trained
  std::vector<Group> groups_;
  std::vector<at::Tensor> parameters_;
  std::optional<TeacherCache> teacher_cache_;
  at::Tensor held_out_, held_out_hidden_;
  int64_t steps_done_ = 0;
};

// The spec of a conversion with these options, of the model that they name.
formats::AdapterSpec spec_of(const ExtendOptions& options, const formats::DecoderConfig& config);

}  // namespace latte::extend
