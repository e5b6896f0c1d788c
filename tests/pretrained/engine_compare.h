// The engine's logits against those of a libtorch model, on every way to the same token.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "formats/test_files.h"
#include "runtime/engine.h"

namespace latte {

constexpr double kFloat32 = 1e-4;  // relative, of float32 throughout

inline runtime::SessionOptions exact() {
  runtime::SessionOptions options;
  options.dtype = kernels::DType::kFloat32;
  options.context = 512;
  return options;
}

inline double distance(std::span<const float> got, const at::Tensor& expected) {
  const auto values =
      torch::from_blob(const_cast<float*>(got.data()), {static_cast<int64_t>(got.size())}, torch::kFloat32).to(torch::kFloat64);
  return ((values - expected).norm() / expected.norm()).item<double>();
}

// Reads `tokens` in pieces, every token's logits against `expected`.
inline void expect_equal(runtime::Engine& engine, runtime::Session& session, std::span<const int32_t> tokens,
                         const at::Tensor& expected, size_t piece, size_t begin = 0) {
  const auto vocabulary = static_cast<size_t>(engine.model().shape().vocab_size);
  for (size_t i = begin; i < tokens.size(); i += piece) {
    const size_t count = std::min(piece, tokens.size() - i);
    const runtime::StepPart part{&session, tokens.subspan(i, count), true};
    const auto logits = engine.step({&part, 1});
    for (size_t t = 0; t < count; ++t) {
      ASSERT_LT(distance(logits.subspan(t * vocabulary, vocabulary), expected[static_cast<int64_t>(i + t)]), kFloat32)
          << "token " << i + t << ", pieces of " << piece;
    }
  }
}

// Every way to the same place: pieces, threads, a batch of sessions, a state that is saved and loaded by another engine.
inline void expect_the_same_on_every_way(const std::shared_ptr<const runtime::Model>& model, const std::vector<int32_t>& tokens,
                                         const at::Tensor& expected, const std::vector<size_t>& pieces) {
  const formats::TestFolder folder;
  const size_t half = tokens.size() / 2;
  for (const int threads : {1, 2, 3}) {
    runtime::Engine engine(model, {threads, {}, 256});
    for (const size_t piece : pieces) {
      if (threads != 2 && piece != pieces.front()) continue;
      runtime::Session session(model, exact());
      expect_equal(engine, session, tokens, expected, piece);
      if (testing::Test::HasFatalFailure()) return;
    }
    runtime::Session first(model, exact());
    engine.prefill(first, std::span(tokens).first(half));
    first.save(folder / "state");
  }
  runtime::Engine other(model, {1, {}, 256});
  std::vector<runtime::Session> sessions;
  for (int i = 0; i < 3; ++i) sessions.push_back(runtime::Session::load(folder / "state", model));
  for (size_t t = half; t < tokens.size(); ++t) {
    std::vector<runtime::StepPart> parts;
    for (runtime::Session& session : sessions) parts.push_back({&session, {&tokens[t], 1}});
    const auto logits = other.step(parts);
    const size_t vocabulary = logits.size() / parts.size();
    for (size_t i = 0; i < parts.size(); ++i) {
      ASSERT_LT(distance(logits.subspan(i * vocabulary, vocabulary), expected[static_cast<int64_t>(t)]), kFloat32)
          << "session " << i << ", token " << t;
    }
  }
}

// Sessions that read, write, are copied, saved, loaded by an engine of other threads, taken back and dropped, in random order:
// each stays what it is alone. `text`: the tokens that they read; reference(tokens) [tokens, vocabulary]: the libtorch model's
// logits.
inline void expect_random_schedules_to_equal_each_alone(const std::shared_ptr<const runtime::Model>& model,
                                                        const std::vector<int32_t>& text,
                                                        const std::function<at::Tensor(const std::vector<int32_t>&)>& reference) {
  const formats::TestFolder folder;
  runtime::Engine one(model, {1, {}, 64}), two(model, {2, {}, 64});
  struct Running {
    std::optional<runtime::Session> session;
    std::vector<int32_t> tokens;
  };
  std::vector<Running> running(3);
  for (Running& r : running) r.session.emplace(model, exact());
  std::mt19937 random(11);
  size_t next = 0;
  const auto some_tokens = [&](size_t count) {
    next = next + count <= text.size() ? next : 0;
    const auto begin = text.begin() + static_cast<std::ptrdiff_t>(next);
    next += count;
    return std::vector<int32_t>(begin, begin + static_cast<std::ptrdiff_t>(count));
  };
  int moved = 0;
  for (int round = 0; round < 40; ++round) {
    runtime::Engine& engine = random() % 2 == 0 ? one : two;
    Running& some = running[random() % running.size()];
    Running& other = running[random() % running.size()];
    switch (random() % 7) {
      case 0:
      case 1: {
        const auto tokens = some_tokens(1 + random() % 40);
        engine.prefill(*some.session, tokens);
        some.tokens.insert(some.tokens.end(), tokens.begin(), tokens.end());
        break;
      }
      case 2: {
        std::vector<std::vector<int32_t>> tokens;
        for (Running& r : running) {
          tokens.push_back(some_tokens(1 + random() % 5));
          r.tokens.insert(r.tokens.end(), tokens.back().begin(), tokens.back().end());
        }
        std::vector<runtime::StepPart> parts;
        for (size_t i = 0; i < running.size(); ++i) parts.push_back({&*running[i].session, tokens[i]});
        engine.step(parts);
        break;
      }
      case 3:
        other = some;
        break;
      case 4:
        some.session->save(folder / "state");
        other.session.emplace(runtime::Session::load(folder / "state", model));
        other.tokens = some.tokens;
        ++moved;
        break;
      case 5:
        if (some.session->can_truncate(static_cast<int64_t>(some.tokens.size() / 2))) {
          some.session->truncate(static_cast<int64_t>(some.tokens.size() / 2));
          some.tokens.resize(some.tokens.size() / 2);
        }
        break;
      default:
        if (some.tokens.size() > 150) {
          some.session.emplace(model, exact());
          some.tokens.clear();
        }
    }
  }
  EXPECT_GT(moved, 2);
  for (Running& r : running) {
    r.tokens.push_back(7);
    const at::Tensor expected = reference(r.tokens)[-1];
    EXPECT_LT(distance(two.decode(*r.session, 7), expected), kFloat32) << "after " << r.tokens.size() << " tokens";
  }
}

}  // namespace latte
