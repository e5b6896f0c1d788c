#include <ATen/Functions.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "data/tasks.h"
#include "data/test_tasks.h"

namespace latte {
namespace {

// int32 [T]: an example's targets, kNoTarget where it has none.
at::Tensor targets_of(const TaskData& data, const TaskExamples& split, int64_t example) {
  return data.batch(split, std::vector<int64_t>{example}).targets[0].to(at::kInt);
}

// Else the place would tell the answer: the i-th question stands at the i-th place no more often than the draw makes it.
TEST(Probes, QuestionsDontKeepTheOrderOfTheirPairs) {
  TaskOptions options = TaskOptions::defaults("associative_recall");
  options.train = 4000;
  options.validation = options.test = 5;
  options.length = 64;
  options.pairs = 4;
  options.keys = 32;
  const TaskData data = make_associative_recall(options);
  const auto& split = data.splits.at("train");
  int64_t in_order = 0, first = 0;
  for (int64_t i = 0; i < split.sequences(); ++i) {
    const auto tokens = tokens_of(split, i);
    for (size_t p = 0; p < 4; ++p) in_order += tokens[2 * p] == tokens[8 + 2 * p];
    first += tokens[0] == tokens[8];
  }
  // Of 28 places with weights 1 / g^0.99 the first is drawn first with probability 1 / sum.
  double sum = 0.0;
  for (int g = 1; g <= 28; ++g) sum += std::pow(g, -0.99);
  EXPECT_NEAR(static_cast<double>(first) / 4000.0, 1.0 / sum, 0.02);
  EXPECT_LT(static_cast<double>(in_order) / 16000.0, 0.25);
}

TEST(Probes, EveryQuestionHasTheAnswerThatWasGiven) {
  TaskOptions options = TaskOptions::defaults("associative_recall");
  options.train = 50;
  options.validation = options.test = 5;
  options.length = 64;
  options.pairs = 8;
  options.keys = 100;
  options.test_lengths = {32, 128};
  const TaskData data = make_associative_recall(options);
  data.check("associative_recall");
  EXPECT_EQ(data.splits.size(), 5U);
  for (const auto& [name, split] : data.splits) {
    const int64_t length = name == "test_32" ? 32 : name == "test_128" ? 128 : 64;
    for (int64_t i = 0; i < split.sequences(); ++i) {
      const auto tokens = tokens_of(split, i);
      ASSERT_EQ(static_cast<int64_t>(tokens.size()), length);
      const auto targets = targets_of(data, split, i);
      std::map<int32_t, int32_t> values;
      for (size_t p = 0; p < 16; p += 2) EXPECT_TRUE(values.emplace(tokens[p], tokens[p + 1]).second);
      int64_t asked = 0;
      for (size_t t = 0; t < tokens.size(); ++t) {
        const auto target = targets[static_cast<int64_t>(t)].item<int32_t>();
        if (target == kNoTarget) continue;
        ++asked;
        ASSERT_GE(t, 16U);
        EXPECT_EQ(target, values.at(tokens[t]));
      }
      EXPECT_EQ(asked, 8);
    }
  }
}

TEST(Probes, CopiesAndNeedles) {
  TaskOptions options = TaskOptions::defaults("selective_copying");
  options.train = 30;
  options.validation = options.test = 5;
  options.length = 20;
  options.copies = 4;
  options.symbols = 6;
  const TaskData copying = make_selective_copying(options);
  copying.check("selective_copying");
  const TaskExamples& split = copying.splits.at("train");
  for (int64_t i = 0; i < 30; ++i) {
    const auto tokens = tokens_of(split, i);
    std::vector<int32_t> symbols, answers;
    const auto targets = targets_of(copying, split, i);
    for (size_t t = 0; t < 20; ++t) {
      if (tokens[t] < 6) symbols.push_back(tokens[t]);
      EXPECT_EQ(tokens[t] == 7, t >= 16);
      const auto target = targets[static_cast<int64_t>(t)].item<int32_t>();
      if (target != kNoTarget) answers.push_back(target);
    }
    EXPECT_EQ(symbols.size(), 4U);
    EXPECT_EQ(symbols, answers);
  }
  options = TaskOptions::defaults("needle");
  options.train = 30;
  options.validation = options.test = 5;
  options.length = 12;
  const TaskData needle = make_needle(options);
  needle.check("needle");
  for (int64_t i = 0; i < 30; ++i) {
    const auto tokens = tokens_of(needle.splits.at("train"), i);
    const auto mark = std::find(tokens.begin(), tokens.end(), 16);
    ASSERT_LT(mark - tokens.begin(), 10);
    EXPECT_EQ(tokens.back(), 16);
    EXPECT_EQ(targets_of(needle, needle.splits.at("train"), i)[11].item<int32_t>(), mark[1]);
  }
}

}  // namespace
}  // namespace latte
