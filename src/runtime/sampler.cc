#include "runtime/sampler.h"

#include <llama.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace latte::runtime {

struct Sampler::Chain {
  llama_sampler* samplers = nullptr;
  llama_sampler* grammar = nullptr;
  std::vector<llama_token_data> candidates;
  ~Chain() {
    if (samplers != nullptr) llama_sampler_free(samplers);
    if (grammar != nullptr) llama_sampler_free(grammar);
  }
};

Sampler::Sampler(int64_t vocab_size, const formats::Tokenizer* tokenizer, const SamplingOptions& options)
    : chain_(std::make_unique<Chain>()) {
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  chain_->samplers = llama_sampler_chain_init(llama_sampler_chain_default_params());
  const auto add = [&](llama_sampler* sampler) {
    if (sampler == nullptr) throw std::invalid_argument("sampling: options that libllama refuses");
    llama_sampler_chain_add(chain_->samplers, sampler);
  };
  if (!options.grammar.empty()) {
    if (tokenizer == nullptr) throw std::invalid_argument("a grammar needs the tokens of a GGUF file");
    chain_->grammar = llama_sampler_init_grammar(tokenizer->vocab(), options.grammar.c_str(), "root");
    if (chain_->grammar == nullptr)
      throw std::invalid_argument("the grammar can't be read: GBNF with a rule \"root\" is expected");
  }
  if (options.penalty_tokens > 0 &&
      (options.repeat_penalty != 1.0 || options.frequency_penalty != 0.0 || options.presence_penalty != 0.0)) {
    add(llama_sampler_init_penalties(static_cast<int32_t>(vocab_size), static_cast<int32_t>(options.penalty_tokens),
                                     static_cast<float>(options.repeat_penalty), static_cast<float>(options.frequency_penalty),
                                     static_cast<float>(options.presence_penalty)));
  }
  if (options.temperature <= 0.0) {
    add(llama_sampler_init_greedy());
    return;
  }
  if (options.top_k > 0) add(llama_sampler_init_top_k(static_cast<int32_t>(options.top_k)));
  if (options.top_p < 1.0) add(llama_sampler_init_top_p(static_cast<float>(options.top_p), 1));
  if (options.min_p > 0.0) add(llama_sampler_init_min_p(static_cast<float>(options.min_p), 1));
  add(llama_sampler_init_temp(static_cast<float>(options.temperature)));
  add(llama_sampler_init_dist(options.seed));
}

Sampler::~Sampler() = default;
Sampler::Sampler(Sampler&&) noexcept = default;
Sampler& Sampler::operator=(Sampler&&) noexcept = default;

void Sampler::note(std::span<const int32_t> tokens) {
  for (const int32_t token : tokens) llama_sampler_accept(chain_->samplers, token);
}

int32_t Sampler::choose(std::span<const float> logits) {
  std::vector<llama_token_data>& candidates = chain_->candidates;
  candidates.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) candidates[i] = {static_cast<llama_token>(i), logits[i], 0.0f};
  llama_token_data_array array = {candidates.data(), candidates.size(), -1, false};
  if (chain_->grammar != nullptr) {
    llama_sampler_apply(chain_->grammar, &array);
    const bool any =
        std::any_of(array.data, array.data + array.size, [](const llama_token_data& c) { return c.logit > -INFINITY; });
    if (!any) throw std::runtime_error("the grammar allows no further token");
  }
  llama_sampler_apply(chain_->samplers, &array);
  if (array.selected < 0 || array.selected >= static_cast<int64_t>(array.size))
    throw std::runtime_error("no token could be chosen");
  const llama_token token = array.data[array.selected].id;
  if (chain_->grammar != nullptr) llama_sampler_accept(chain_->grammar, token);
  llama_sampler_accept(chain_->samplers, token);
  return token;
}

double log_probability(std::span<const float> logits, int32_t token) {
  const float max = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float logit : logits) sum += static_cast<double>(std::exp(logit - max));
  return static_cast<double>(logits[static_cast<size_t>(token)] - max) - std::log(sum);
}

}  // namespace latte::runtime
