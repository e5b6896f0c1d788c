// A model that reads tokens as they come and keeps a state, of constant size unless attention is softmax.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <span>

#include "models/language_model.h"

namespace latte::train {

class Decoder {
 public:
  // `model` in evaluation mode.
  explicit Decoder(models::LanguageModel model) : model_(std::move(model)) {}

  // Reads one token or more, long prompts in pieces, and returns the logits of what follows them, [V]. Throws
  // std::invalid_argument for no tokens, a token that isn't one of the model's, and more tokens than a model with learned
  // positions takes.
  at::Tensor read(std::span<const int64_t> tokens);

  int64_t position() const { return position_; }  // tokens read
  int64_t state_bytes() const;

 private:
  models::LanguageModel model_;
  std::optional<models::LanguageModelState> state_;
  int64_t position_ = 0;
};

}  // namespace latte::train
