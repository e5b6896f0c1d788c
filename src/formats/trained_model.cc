#include "formats/trained_model.h"

#include <nlohmann/json.hpp>
#include <stdexcept>

#include "formats/error.h"

namespace latte::formats {

TrainedModel trained_model(const std::string& path, const nlohmann::json& config) {
  TrainedModel model;
  try {
    if (config.contains("task")) throw std::invalid_argument("holds an encoder of latte train --task, expected a language model");
    model.config = LanguageModelConfig::from_json(saved_model_config(config.at("model")));
    model.vocabulary = Vocabulary::from_description(config.at("vocabulary").get<std::string>());
  } catch (const nlohmann::json::exception&) {
    throw FormatError(path, "config isn't one of latte train: " +
                                quote(config.dump(-1, ' ', /*ensure_ascii=*/false, nlohmann::json::error_handler_t::replace)));
  } catch (const std::invalid_argument& error) {
    throw FormatError(path, error.what());
  }
  if (model.vocabulary.size() != model.config.vocab_size) {
    throw FormatError(path, "a vocabulary of " + std::to_string(model.vocabulary.size()) + " tokens, expected vocab_size, " +
                                std::to_string(model.config.vocab_size));
  }
  return model;
}

TrainedModel trained_model(const CheckpointFile& checkpoint) {
  // The checkpoint has seen to it that this is an object.
  return trained_model(checkpoint.file().path(), nlohmann::json::parse(checkpoint.config()));
}

}  // namespace latte::formats
