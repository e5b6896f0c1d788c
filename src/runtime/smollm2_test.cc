// The engine on the real SmolLM2, held against llama.cpp on the same file.
#include <ggml-cpu.h>
#include <gtest/gtest.h>
#include <llama.h>

#include <cmath>

#include "formats/test_models.h"
#include "formats/tokenizer.h"
#include "runtime/engine.h"
#include "runtime/sampler.h"

namespace latte::runtime {
namespace {

// libllama's path for AMX ends the process on some virtual machines that have it.
llama_model_params llama_params() {
  llama_model_params params = llama_model_default_params();
  if (ggml_cpu_has_amx_int8() != 0) params.use_extra_bufts = false;
  return params;
}

// KL(p || q) in nats.
double divergence(std::span<const float> p, std::span<const float> q) {
  const double p_sum = -log_probability(p, 0) + p[0], q_sum = -log_probability(q, 0) + q[0];
  double sum = 0.0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double log_p = p[i] - p_sum, log_q = q[i] - q_sum;
    sum += std::exp(log_p) * (log_p - log_q);
  }
  return sum;
}

std::vector<int32_t> text_tokens(const Model& model, size_t count) {
  const formats::Tokenizer tokenizer(*model.metadata());
  const std::string text = formats::read_bytes(LATTE_SOURCE_DIR "/data/tinyshakespeare.txt").substr(0, 6000);
  const std::vector<int64_t> tokens = tokenizer.encode(text);
  EXPECT_GE(tokens.size(), count);
  return {tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(count)};
}

TEST(SmolLM2, PredictsAsLlamaCppDoes) {
  const std::string path = formats::smollm2_path();
  LATTE_SKIP_WITHOUT(path);
  const auto model = Model::open(path);
  Engine engine(model, {2, {}, 64});
  const std::vector<int32_t> tokens = text_tokens(*model, 160);
  const auto vocabulary = static_cast<size_t>(model->shape().vocab_size);

  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_model* reference = llama_model_load_from_file(path.c_str(), llama_params());
  ASSERT_NE(reference, nullptr);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 256;
  params.n_threads = params.n_threads_batch = 2;
  llama_context* context = llama_init_from_model(reference, params);
  ASSERT_NE(context, nullptr);
  llama_batch batch = llama_batch_init(256, 0, 1);
  for (const int32_t token : tokens) {
    const int32_t i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  ASSERT_EQ(llama_decode(context, batch), 0);

  Session prompt(model), steps(model);
  double by_prompt = 0.0, by_steps = 0.0;
  for (size_t begin = 0; begin < tokens.size(); begin += 64) {
    const auto piece = std::span(tokens).subspan(begin, std::min<size_t>(64, tokens.size() - begin));
    const StepPart part{&prompt, piece, true};
    const auto logits = engine.step({&part, 1});
    for (size_t i = 0; i < piece.size(); ++i) {
      const float* expected = llama_get_logits_ith(context, static_cast<int32_t>(begin + i));
      by_prompt += divergence({expected, vocabulary}, logits.subspan(i * vocabulary, vocabulary));
    }
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    const float* expected = llama_get_logits_ith(context, static_cast<int32_t>(i));
    by_steps += divergence({expected, vocabulary}, engine.decode(steps, tokens[i]));
  }
  llama_batch_free(batch);
  llama_free(context);
  llama_model_free(reference);
  // Both round activations to 8 bits, in places that differ in the last bit.
  const auto count = static_cast<double>(tokens.size());
  EXPECT_LT(by_prompt / count, 1e-2);
  EXPECT_LT(by_steps / count, 1e-2);
  RecordProperty("kl_by_prompt", std::to_string(by_prompt / count));
  std::printf("KL to llama.cpp: %.2e read in pieces, %.2e token by token\n", by_prompt / count, by_steps / count);
}

// Converted with random latents: what the state does doesn't depend on how it came about.
TEST(SmolLM2, StatesDoNotDependOnTheWayThere) {
  const std::string path = formats::smollm2_path();
  LATTE_SKIP_WITHOUT(path);
  ModelOptions options;
  options.attention = {32, 4, 8, 8192};
  const auto model = Model::open(path, options);
  const std::vector<int32_t> tokens = text_tokens(*model, 120);
  Engine two(model, {2, {}, 48}), one(model, {1, {}, 120});
  Session pieces(model), whole(model);
  const auto logits = one.prefill(whole, tokens);
  const std::vector<float> expected(logits.begin(), logits.end());
  two.prefill(pieces, std::span(tokens).first(100));
  Session copy = pieces;
  formats::TestFolder folder;
  copy.save(folder / "state");
  Session loaded = Session::load(folder / "state", model);
  for (size_t i = 100; i + 1 < tokens.size(); ++i) {
    const StepPart parts[] = {{&pieces, {&tokens[i], 1}}, {&copy, {&tokens[i], 1}}, {&loaded, {&tokens[i], 1}}};
    two.step(parts);
  }
  for (Session* session : {&pieces, &copy, &loaded}) EXPECT_LT(divergence(expected, two.decode(*session, tokens.back())), 2e-2);
  EXPECT_EQ(pieces.bytes(), Session::bytes_needed(*model));
}

TEST(Gemma3, PredictsAsLlamaCppDoes) {
  const std::string path = formats::gemma3_path();
  LATTE_SKIP_WITHOUT(path);
  const auto model = Model::open(path);
  Engine engine(model, {2, {}, 64});
  const std::vector<int32_t> tokens = text_tokens(*model, 48);
  const auto vocabulary = static_cast<size_t>(model->shape().vocab_size);
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_model* reference = llama_model_load_from_file(path.c_str(), llama_params());
  ASSERT_NE(reference, nullptr);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 256;
  params.n_threads = params.n_threads_batch = 2;
  llama_context* context = llama_init_from_model(reference, params);
  ASSERT_NE(context, nullptr);
  Session session(model);
  double total = 0.0;
  for (const int32_t token : tokens) {
    llama_token next = token;
    ASSERT_EQ(llama_decode(context, llama_batch_get_one(&next, 1)), 0);
    total += divergence({llama_get_logits_ith(context, -1), vocabulary}, engine.decode(session, token));
  }
  llama_free(context);
  llama_model_free(reference);
  EXPECT_LT(total / static_cast<double>(tokens.size()), 1e-2);
  std::printf("KL to llama.cpp: %.2e\n", total / static_cast<double>(tokens.size()));
}

}  // namespace
}  // namespace latte::runtime
