// Configurations and vocabularies of checkpoints, whose checksum a fuzzer wouldn't get past: whatever text they are, they are
// refused with an error or mean something that can be written and read again.
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/language_model_config.h"
#include "formats/vocabulary.h"
#include "input_file.h"

using namespace latte;

namespace {

int try_vocabulary(const std::string& text) {
  try {
    const auto vocabulary = formats::Vocabulary::from_description(text);
    if (vocabulary.description() != text || vocabulary.size() < 1) std::abort();
    if (vocabulary.kind() == formats::Vocabulary::Kind::kTokens) return 0;  // has no texts
    std::vector<int64_t> tokens;
    for (int64_t token = 0; token < vocabulary.size(); ++token) tokens.push_back(token);
    const std::string decoded = vocabulary.decode(tokens);
    if (vocabulary.encode(decoded) != tokens) std::abort();
  } catch (const std::invalid_argument&) {  // TokenError is one
  }
  return 0;
}

int try_config(const std::string& text) {
  try {
    const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (json.is_discarded()) return 0;
    const auto config = formats::LanguageModelConfig::from_json(json);
    const auto written = config.to_json();
    if (formats::LanguageModelConfig::from_json(written).to_json() != written || config.parameter_count() < 1) std::abort();
  } catch (const formats::ConfigError&) {
  }
  return 0;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  // A vocabulary fills a table of all characters: too slow to be tried on what is a configuration.
  return text.starts_with('{') ? try_config(text) : try_vocabulary(text);
}
