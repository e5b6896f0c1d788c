// Runs a model: reads tokens into sessions and gives the logits of what comes next.
//
//   auto model = Model::open("model.gguf");
//   Engine engine(model, {.threads = 2});
//   Session session(model);
//   std::span<const float> logits = engine.prefill(session, prompt);
//   for (;;) logits = engine.decode(session, choose(logits));
//
// A session gets the same state and logits, to rounding, however its tokens are split into calls, whichever sessions share a
// step with it, and on any number of threads. An engine serves one caller at a time; any number of engines may share a model.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "runtime/model.h"
#include "runtime/session.h"
#include "runtime/threads.h"

namespace latte::runtime {

struct EngineOptions {
  int threads = 0;             // 0: one a CPU
  std::vector<int> cpus;       // see ThreadPool
  int64_t batch_tokens = 512;  // read together; memory grows with it
};

// Some tokens of one session in a step of several.
struct StepPart {
  Session* session = nullptr;
  std::span<const int32_t> tokens;  // at least one
  bool all_logits = false;          // of each token, not of the last alone
  bool no_logits = false;
};

class Engine {
 public:
  // Throws MemoryError.
  explicit Engine(std::shared_ptr<const Model> model, const EngineOptions& options = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Model& model() const { return *model_; }
  int threads() const;
  int64_t batch_tokens() const;

  // Reads any number of tokens (at least one), calling progress(tokens read) between pieces; where that returns false, reading
  // stops there, and the logits are those of the last token read. Logits [vocab_size] are valid until the next call.
  // Throws SessionError, with the session as it was: a token that isn't one, no room, a session of another model.
  std::span<const float> prefill(Session& session, std::span<const int32_t> tokens,
                                 const std::function<bool(int64_t)>& progress = nullptr);
  std::span<const float> decode(Session& session, int32_t token) { return prefill(session, {&token, 1}); }

  // One step of several sessions, each once, at most batch_tokens() tokens together. Logits of the parts in order, [vocab_size]
  // each. Throws SessionError before anything has changed.
  std::span<const float> step(std::span<const StepPart> parts);

 private:
  class Pass;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Pass> pass_;
};

}  // namespace latte::runtime
