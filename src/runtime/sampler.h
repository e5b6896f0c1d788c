// Chooses the next token from logits: libllama's samplers and grammars.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/tokenizer.h"

namespace latte::runtime {

struct SamplingOptions {
  double temperature = 0.8;  // 0: the likeliest
  int64_t top_k = 40;        // 0: all
  double top_p = 0.95;       // 1: all
  double min_p = 0.05;       // 0: all
  double repeat_penalty = 1.0;
  double frequency_penalty = 0.0;
  double presence_penalty = 0.0;
  int64_t penalty_tokens = 64;  // last ones that are penalised
  uint32_t seed = 0;
  std::string grammar;  // GBNF, with a rule "root"; empty: none
};

class Sampler {
 public:
  // Of logits [vocab_size]. `tokenizer` must live as long; a grammar alone needs one. Throws std::invalid_argument for a grammar
  // without a tokenizer, or that libllama can't read.
  Sampler(int64_t vocab_size, const formats::Tokenizer* tokenizer, const SamplingOptions& options);
  ~Sampler();
  Sampler(Sampler&&) noexcept;
  Sampler& operator=(Sampler&&) noexcept;

  // Tokens of a prompt, which penalties count, and a grammar doesn't.
  void note(std::span<const int32_t> tokens);

  // The token that was chosen has been taken note of. Throws std::runtime_error where the grammar allows none.
  int32_t choose(std::span<const float> logits);

 private:
  struct Chain;
  std::unique_ptr<Chain> chain_;
};

// ln p of a token, of unchanged logits.
double log_probability(std::span<const float> logits, int32_t token);

}  // namespace latte::runtime
