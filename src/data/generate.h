// What the generators share: examples made in parallel, each from a random stream of its own.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
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

// `count` examples of split number `split`, made by `make(random)` and packed block by block, so that no more than a block is
// held unpacked. `wide`: tokens beyond 255. With `seen`, no sequence comes twice, in this split or another that was given the
// same set: a second one is drawn again.
template <typename Make>
TaskExamples make_split(int64_t count, uint64_t seed, uint64_t split, const Make& make, bool wide = false,
                        std::unordered_set<std::string>* seen = nullptr) {
  constexpr int64_t kFewest = 64, kMost = 4096;  // examples a block
  constexpr int64_t kTokens = int64_t{1} << 22;  // and its tokens, more or less
  const auto stream = [&](int64_t i, uint64_t attempt) {
    return RandomStream(seed, split * kSplitStride + attempt * kRetryStride + static_cast<uint64_t>(i));
  };
  const auto make_new = [&](Example& example, int64_t i) {
    const auto key = [&] { return std::string(example.tokens.begin(), example.tokens.end()); };
    for (uint64_t attempt = 1; !seen->insert(key()).second; ++attempt) {
      constexpr uint64_t kMostAttempts = 1000;
      if (attempt > kMostAttempts) {
        throw formats::OptionError("the task has too few different examples for so many: fewer examples or longer sequences");
      }
      RandomStream random = stream(i, attempt);
      example = make(random);
    }
  };
  TaskBuilder builder(wide);
  std::vector<Example> block;
  int64_t size = kFewest;
  for (int64_t first = 0; first < count; first += static_cast<int64_t>(block.size())) {
    block.assign(static_cast<size_t>(std::min(size, count - first)), Example());
    at::parallel_for(0, static_cast<int64_t>(block.size()), 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        RandomStream random = stream(first + i, 0);
        block[static_cast<size_t>(i)] = make(random);
      }
    });
    if (first == 0) {
      size_t tokens = 0;
      for (const Example& example : block) tokens += example.tokens.size();
      const double all = static_cast<double>(tokens) / static_cast<double>(block.size()) * static_cast<double>(count);
      builder.reserve(static_cast<int64_t>(1.05 * all));
    }
    for (size_t i = 0; i < block.size(); ++i) {
      Example& example = block[i];
      if (seen) make_new(example, first + static_cast<int64_t>(i));
      if (example.targets.empty()) {
        builder.add(example.tokens, example.label);
      } else {
        builder.add(example.tokens, example.targets);
      }
    }
    const auto longest = std::max_element(block.begin(), block.end(),
                                          [](const Example& a, const Example& b) { return a.tokens.size() < b.tokens.size(); });
    size = std::clamp(kTokens / std::max<int64_t>(1, static_cast<int64_t>(longest->tokens.size())), kFewest, kMost);
  }
  return builder.finish();
}

}  // namespace latte
