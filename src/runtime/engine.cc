#include "runtime/engine.h"

#include <algorithm>
#include <string>

#include "runtime/error.h"
#include "runtime/pass.h"

namespace latte::runtime {

Engine::Engine(std::shared_ptr<const Model> model, const EngineOptions& options)
    : model_(std::move(model)), pass_(std::make_unique<Pass>(*model_, options)) {}
Engine::~Engine() = default;

int Engine::threads() const { return pass_->threads(); }
int64_t Engine::batch_tokens() const { return pass_->batch_tokens(); }

namespace {

void check(const Model& model, const Session& session, std::span<const int32_t> tokens) {
  if (!session.holds(model)) throw SessionError("a session of another model");
  if (tokens.empty()) throw SessionError("no tokens to read");
  const auto stranger =
      std::find_if(tokens.begin(), tokens.end(), [&](int32_t token) { return token < 0 || token >= model.shape().vocab_size; });
  if (stranger != tokens.end()) {
    throw SessionError("token " + std::to_string(*stranger) + " isn't in the vocabulary of " +
                       std::to_string(model.shape().vocab_size));
  }
  if (static_cast<int64_t>(tokens.size()) > session.room()) {
    throw SessionError("no room for " + std::to_string(tokens.size()) + " tokens behind " + std::to_string(session.position()) +
                       ": the session was made for " + std::to_string(session.position() + session.room()));
  }
}

}  // namespace

std::span<const float> Engine::prefill(Session& session, std::span<const int32_t> tokens,
                                       const std::function<bool(int64_t)>& progress) {
  check(*model_, session, tokens);
  const auto batch = static_cast<size_t>(batch_tokens());
  std::span<const float> logits;
  for (size_t read = 0; read < tokens.size();) {
    const size_t count = std::min(batch, tokens.size() - read);
    const bool last = read + count == tokens.size();
    const StepPart part{&session, tokens.subspan(read, count), false, !last && !progress};
    logits = pass_->run({&part, 1});
    read += count;
    if (progress && !progress(static_cast<int64_t>(read))) break;
  }
  return logits;
}

std::span<const float> Engine::step(std::span<const StepPart> parts) {
  int64_t total = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].session == nullptr) throw SessionError("a part without a session");
    check(*model_, *parts[i].session, parts[i].tokens);
    total += static_cast<int64_t>(parts[i].tokens.size());
    for (size_t j = 0; j < i; ++j) {
      if (parts[j].session == parts[i].session) throw SessionError("a session twice in one step");
    }
  }
  if (total > batch_tokens()) {
    throw SessionError(std::to_string(total) + " tokens in one step, at most " + std::to_string(batch_tokens()) + " fit");
  }
  if (parts.empty()) return {};
  return pass_->run(parts);
}

}  // namespace latte::runtime
