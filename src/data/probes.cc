// Synthetic probes of what a causal reader remembers. In all of them a token's target is the token that should follow it.
#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <utility>

#include "data/generate.h"
#include "data/tasks.h"

namespace latte {
namespace {

// `make(random, length)` for train, validation and test at options.length, and test_LENGTH for each of test_lengths.
template <typename Make>
void add_splits(TaskData& data, const TaskOptions& options, bool wide, const Make& make) {
  uint64_t number = 0;
  const auto add = [&](const std::string& name, int64_t count, int64_t length) {
    const auto one = [&](RandomStream& random) { return make(random, length); };
    data.splits.emplace(name, make_split(count, static_cast<uint64_t>(options.seed), number++, one, wide));
  };
  add("train", options.train, options.length);
  add("validation", options.validation, options.length);
  add("test", options.test, options.length);
  for (const int64_t length : options.test_lengths) add("test_" + std::to_string(length), options.test, length);
}

std::vector<int32_t> empty_targets(size_t size) { return std::vector<int32_t>(size, static_cast<int32_t>(kNoTarget)); }

// `count` different numbers below `all`, in random order.
std::vector<int64_t> draw_different(RandomStream& random, int64_t all, int64_t count) {
  std::vector<int64_t> drawn;
  std::unordered_set<int64_t> known;
  for (int64_t i = all - count; i < all; ++i) {  // Floyd's
    const int64_t value = random.below(i + 1);
    drawn.push_back(known.contains(value) ? i : value);
    known.insert(drawn.back());
  }
  for (size_t i = drawn.size(); i > 1; --i)
    std::swap(drawn[i - 1], drawn[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
  return drawn;
}

// `count` different numbers below `weights`' size, as drawn one after the other without replacement, each in proportion to its
// weight: sorted by arrival times of rate weight (Efraimidis and Spirakis 2006).
std::vector<int64_t> draw_weighted(RandomStream& random, const std::vector<double>& weights, int64_t count) {
  std::vector<std::pair<double, int64_t>> arrivals;
  for (size_t i = 0; i < weights.size(); ++i) {
    arrivals.emplace_back(-std::log(random.uniform()) / weights[i], static_cast<int64_t>(i));
  }
  std::partial_sort(arrivals.begin(), arrivals.begin() + count, arrivals.end());
  std::vector<int64_t> drawn;
  for (int64_t i = 0; i < count; ++i) drawn.push_back(arrivals[static_cast<size_t>(i)].second);
  return drawn;
}

}  // namespace

// Multi-query associative recall (arXiv 2312.04927): `pairs` keys, each followed by its value, then all keys once more in a
// sequence of fillers, near places more often than far ones (a power law, as in that paper's code); each asks for its value.
TaskData make_associative_recall(const TaskOptions& options) {
  const auto keys = static_cast<int32_t>(options.keys);
  const int32_t vocabulary = 2 * keys + 1;  // keys, values, the filler
  TaskData data{.name = options.name, .kind = TaskKind::kTokens, .vocab_size = vocabulary, .num_classes = vocabulary};
  add_splits(data, options, /*wide=*/vocabulary > 256, [&](RandomStream& random, int64_t length) {
    constexpr double kPower = 0.01;  // as published
    Example example;
    example.tokens.assign(static_cast<size_t>(length), 2 * keys);
    example.targets = empty_targets(static_cast<size_t>(length));
    const auto chosen = draw_different(random, keys, options.pairs);
    std::vector<int32_t> values;
    for (size_t i = 0; i < chosen.size(); ++i) {
      values.push_back(keys + static_cast<int32_t>(random.below(keys)));
      example.tokens[2 * i] = static_cast<int32_t>(chosen[i]);
      example.tokens[2 * i + 1] = values[i];
    }
    // A place for each question: the queries take two tokens each, so that none follows on another's answer.
    const int64_t places = (length - 2 * options.pairs) / 2;
    std::vector<double> weights;
    for (int64_t place = 1; place <= places; ++place) weights.push_back(std::pow(static_cast<double>(place), kPower - 1.0));
    const auto drawn = draw_weighted(random, weights, options.pairs);
    for (size_t i = 0; i < chosen.size(); ++i) {
      const auto at = static_cast<size_t>(2 * options.pairs + 2 * drawn[i]);
      example.tokens[at] = static_cast<int32_t>(chosen[i]);
      example.targets[at] = values[i];
    }
    return example;
  });
  return data;
}

// Selective copying (as in Mamba, arXiv 2312.00752): `copies` symbols strewn among blanks, then as many marks, each of which asks
// for the next symbol in their order.
TaskData make_selective_copying(const TaskOptions& options) {
  const auto symbols = static_cast<int32_t>(options.symbols);
  const int32_t blank = symbols, mark = symbols + 1;
  TaskData data{.name = options.name, .kind = TaskKind::kTokens, .vocab_size = symbols + 2, .num_classes = symbols + 2};
  add_splits(data, options, /*wide=*/false, [&](RandomStream& random, int64_t length) {
    Example example;
    example.tokens.assign(static_cast<size_t>(length), blank);
    example.targets = empty_targets(static_cast<size_t>(length));
    const int64_t room = length - options.copies;
    auto places = draw_different(random, room, options.copies);
    std::sort(places.begin(), places.end());
    for (size_t i = 0; i < places.size(); ++i) {
      const auto symbol = static_cast<int32_t>(random.below(symbols));
      example.tokens[static_cast<size_t>(places[i])] = symbol;
      example.tokens[static_cast<size_t>(room) + i] = mark;
      example.targets[static_cast<size_t>(room) + i] = symbol;
    }
    return example;
  });
  return data;
}

// A needle in a haystack: random symbols, somewhere among them a mark and the needle that follows it; at the end the mark once
// more asks for the needle.
TaskData make_needle(const TaskOptions& options) {
  const auto symbols = static_cast<int32_t>(options.symbols);
  const int32_t mark = symbols;
  TaskData data{.name = options.name, .kind = TaskKind::kTokens, .vocab_size = symbols + 1, .num_classes = symbols + 1};
  add_splits(data, options, /*wide=*/false, [&](RandomStream& random, int64_t length) {
    Example example;
    for (int64_t i = 0; i < length; ++i) example.tokens.push_back(static_cast<int32_t>(random.below(symbols)));
    example.targets = empty_targets(static_cast<size_t>(length));
    const auto place = static_cast<size_t>(random.below(length - 2));
    example.tokens[place] = mark;
    example.tokens.back() = mark;
    example.targets.back() = example.tokens[place + 1];
    return example;
  });
  return data;
}

}  // namespace latte
