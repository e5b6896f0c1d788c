// What a training run is told, beside its model's configuration: as a value and as JSON (what a checkpoint's config holds).
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "formats/option_error.h"
#include "formats/vocabulary.h"

namespace latte::train {

using formats::OptionError;

// The defaults train a small character model in a few minutes on two cores.
struct TrainerOptions {
  std::string text;                  // a file
  std::string tokens = "chars";      // chars | bytes | corpus: a file of latte tokenize
  double validation_fraction = 0.1;  // of the text, its end; 0: no validation
  double test_fraction = 0.0;        // of the text, what comes behind that; tested on at the end

  int64_t context = 256;   // tokens a sequence; a step has 2^40 at most
  int64_t batch = 16;      // sequences at once
  int64_t accumulate = 1;  // batches a step
  int64_t steps = 1000;
  int64_t seed = 1337;
  std::string dtype = "auto";  // auto | float32 | bfloat16: see resolve_dtype()

  double lr = 4e-3;           // at the end of the warm-up
  double min_lr = 4e-4;       // at the last step
  int64_t warmup = 50;        // steps
  double weight_decay = 0.1;  // of matrices
  double beta1 = 0.9;
  double beta2 = 0.99;
  double clip = 1.0;  // gradient norm; 0: none

  int64_t eval_every = 100;   // steps; 0: at the end only
  int64_t eval_batches = 20;  // batches a validation, always the same
  int64_t save_every = 100;   // steps; 0: at the end only

  int64_t tokens_per_step() const { return context * batch * accumulate; }
  formats::Vocabulary::Kind vocabulary_kind() const;

  void validate() const;  // throws OptionError

  nlohmann::json to_json() const;  // every field
  // Takes an object of these fields. Throws OptionError: not an object, an unknown field, a wrong type, an impossible value.
  static TrainerOptions from_json(const nlohmann::json& json);

  bool operator==(const TrainerOptions&) const = default;
};

// The fields that say how a text is read: none of a task's.
inline constexpr std::array kTextFields = {"text", "tokens", "validation_fraction", "test_fraction", "context"};

// Throws OptionError where an object of training options has one of them.
void refuse_text_fields(const nlohmann::json& training);

// The learning rate of the step that follows `step` finished ones: a linear warm-up from lr / warmup to lr, then half a cosine to
// min_lr at the last step.
double learning_rate(const TrainerOptions& options, int64_t step);

// Whether matrix products are worth computing in bfloat16: AVX512-BF16, AMX or Arm's extension. Without, torch emulates them.
bool has_bfloat16_products();

// "float32" or "bfloat16": `dtype` itself, or what suits this machine for "auto".
std::string resolve_dtype(const std::string& dtype);

}  // namespace latte::train
