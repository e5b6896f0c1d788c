// What a checkpoint's config says about a language model of latte train: its shape and its vocabulary. Both engines (src/models
// on libtorch, src/runtime) build from it; the tensors are named "model.NAME".
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "formats/checkpoint.h"
#include "formats/language_model_config.h"
#include "formats/vocabulary.h"

namespace latte::formats {

struct TrainedModel {
  LanguageModelConfig config;
  Vocabulary vocabulary;
};

// Throws FormatError, which names `path`, for a config that isn't one of latte train, for an encoder's, and for a vocabulary of
// another size than the model's.
TrainedModel trained_model(const std::string& path, const nlohmann::json& config);
TrainedModel trained_model(const CheckpointFile& checkpoint);

}  // namespace latte::formats
