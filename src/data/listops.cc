// ListOps (arXiv 1804.06028) as in Long Range Arena (arXiv 2011.04006): nested MIN, MAX, MED and SUM modulo 10 of digits, in
// prefix notation; the label is the value. Below max_depth an argument is a digit with probability 3/4, else an expression of 2 …
// max_arguments arguments.
#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "data/generate.h"
#include "data/tasks.h"

namespace latte {
namespace {

enum Token : int32_t { kMin = 10, kMax, kMed, kSum, kClose, kVocabulary };

constexpr double kExpressionShare = 0.25;

int32_t apply(int32_t operation, std::vector<int32_t>& values) {
  switch (operation) {
    case kMin:
      return *std::min_element(values.begin(), values.end());
    case kMax:
      return *std::max_element(values.begin(), values.end());
    case kSum:
      return std::accumulate(values.begin(), values.end(), 0) % 10;
    default: {  // the median, of an even number of values the mean of the middle two, rounded down
      std::sort(values.begin(), values.end());
      const size_t middle = values.size() / 2;
      return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
    }
  }
}

class Generator {
 public:
  explicit Generator(const TaskOptions& options) : options_(options) {}

  Example operator()(RandomStream& random) const {
    constexpr int64_t kMostDraws = 50'000'000;
    Example example;
    for (int64_t i = 0; i < kMostDraws; ++i) {
      example.tokens.clear();
      example.label = draw(random, 1, example.tokens);
      const auto length = static_cast<int64_t>(example.tokens.size());
      if (length > options_.min_length && length < options_.max_length) return example;
    }
    throw formats::OptionError("no expression of more than min_length, " + std::to_string(options_.min_length) +
                               ", tokens was drawn: more max_depth or max_arguments make longer ones");
  }

 private:
  // Appends an expression and returns its value. One that is too long already is left as it is.
  int32_t draw(RandomStream& random, int64_t depth, std::vector<int32_t>& tokens) const {
    if (static_cast<int64_t>(tokens.size()) >= options_.max_length) return 0;
    if (depth >= options_.max_depth || random.uniform() >= kExpressionShare) {
      tokens.push_back(static_cast<int32_t>(random.below(10)));
      return tokens.back();
    }
    const int64_t arguments = random.between(2, options_.max_arguments);
    const auto operation = static_cast<int32_t>(random.between(kMin, kSum));
    tokens.push_back(operation);
    std::vector<int32_t> values;
    for (int64_t i = 0; i < arguments; ++i) values.push_back(draw(random, depth + 1, tokens));
    tokens.push_back(kClose);
    return apply(operation, values);
  }

  const TaskOptions& options_;
};

// A draw that can't come to the length asked for would be drawn again for ever.
void check_reachable(const TaskOptions& options) {
  int64_t longest = 1;
  for (int64_t depth = 1; depth < options.max_depth && longest < options.max_length; ++depth) {
    longest = 2 + options.max_arguments * longest;
  }
  if (longest <= options.min_length) {
    throw formats::OptionError("min_length is " + std::to_string(options.min_length) + ", expected less than " +
                               std::to_string(longest) + ", the longest expression of max_depth and max_arguments");
  }
}

}  // namespace

TaskData make_listops(const TaskOptions& options) {
  check_reachable(options);
  const Generator generator(options);
  TaskData data{.name = options.name, .kind = TaskKind::kClassify, .vocab_size = kVocabulary, .num_classes = 10};
  std::unordered_set<std::string> seen;
  uint64_t number = 0;
  for (const auto& [name, count] :
       {std::pair{"train", options.train}, {"validation", options.validation}, {"test", options.test}}) {
    data.splits.emplace(name, make_split(count, static_cast<uint64_t>(options.seed), number++, generator, false, &seen));
  }
  return data;
}

std::string listops_text(const std::vector<int32_t>& tokens) {
  constexpr std::array<const char*, 5> kNames{"[MIN", "[MAX", "[MED", "[SM", "]"};
  std::string text;
  for (const int32_t token : tokens) {
    if (!text.empty()) text += ' ';
    text += token < kMin ? std::to_string(token) : kNames.at(static_cast<size_t>(token - kMin));
  }
  return text;
}

int32_t listops_value(const std::vector<int32_t>& tokens) {
  std::vector<std::pair<int32_t, std::vector<int32_t>>> open{{kMax, {}}};
  for (const int32_t token : tokens) {
    if (token < kMin) {
      open.back().second.push_back(token);
    } else if (token < kClose) {
      open.emplace_back(token, std::vector<int32_t>());
    } else {
      if (open.size() < 2 || open.back().second.empty()) throw std::invalid_argument("the expression isn't whole");
      const int32_t value = apply(open.back().first, open.back().second);
      open.pop_back();
      open.back().second.push_back(value);
    }
  }
  if (open.size() != 1 || open.front().second.size() != 1) throw std::invalid_argument("the expression isn't whole");
  return open.front().second.front();
}

}  // namespace latte
