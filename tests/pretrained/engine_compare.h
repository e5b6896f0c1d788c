// The engine's logits against those of a libtorch model, on every way to the same token.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
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

}  // namespace latte
