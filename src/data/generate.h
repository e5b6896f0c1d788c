// What the generators share: examples made in parallel, each from a random stream of its own.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_set>
#include <vector>

#include "data/random.h"
#include "data/task_data.h"
#include "data/task_options.h"

namespace latte {

struct Example {
  std::vector<int32_t> tokens;
  int32_t label = 0;
  std::vector<int32_t> targets;  // kTokens only
};

// The streams of a split's examples. Splits lie far apart, and so do the streams of an example that is drawn again.
constexpr uint64_t kSplitStride = uint64_t{1} << 48;
constexpr uint64_t kRetryStride = uint64_t{1} << 32;

// `count` examples of split number `split`, made by `make(random)`. With `seen`, no sequence comes twice, in this split or
// another that was given the same set: a second one is drawn again.
template <typename Make>
std::vector<Example> make_examples(int64_t count, uint64_t seed, uint64_t split, const Make& make,
                                   std::unordered_set<std::string>* seen = nullptr) {
  std::vector<Example> examples(static_cast<size_t>(count));
  const auto stream = [&](int64_t i, uint64_t attempt) {
    return RandomStream(seed, split * kSplitStride + attempt * kRetryStride + static_cast<uint64_t>(i));
  };
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RandomStream random = stream(i, 0);
      examples[static_cast<size_t>(i)] = make(random);
    }
  });
  if (!seen) return examples;
  for (int64_t i = 0; i < count; ++i) {
    Example& example = examples[static_cast<size_t>(i)];
    const auto key = [&] { return std::string(example.tokens.begin(), example.tokens.end()); };
    for (uint64_t attempt = 1; !seen->insert(key()).second; ++attempt) {
      constexpr uint64_t kMostAttempts = 1000;
      if (attempt > kMostAttempts) {
        throw formats::OptionError("the task has too few different examples for so many: fewer examples or longer sequences");
      }
      RandomStream random = stream(i, attempt);
      example = make(random);
    }
  }
  return examples;
}

inline TaskExamples split_of(const std::vector<Example>& examples, bool wide = false) {
  TaskBuilder builder(wide);
  for (const Example& example : examples) {
    if (example.targets.empty()) {
      builder.add(example.tokens, example.label);
    } else {
      builder.add(example.tokens, example.targets);
    }
  }
  return builder.finish();
}

}  // namespace latte
