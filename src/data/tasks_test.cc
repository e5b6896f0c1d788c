#include "data/tasks.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <span>
#include <vector>

#include "data/task_file.h"
#include "formats/error.h"
#include "formats/safetensors.h"
#include "formats/test_files.h"

namespace latte {
namespace {

using formats::TestFolder;
using nlohmann::json;

std::vector<int32_t> tokens_of(const TaskExamples& split, int64_t sequence) {
  const auto* offsets = split.offsets.const_data_ptr<int64_t>();
  std::vector<int32_t> tokens;
  for (int64_t i = offsets[sequence]; i < offsets[sequence + 1]; ++i) tokens.push_back(split.tokens[i].item<int32_t>());
  return tokens;
}

std::vector<std::vector<int32_t>> all_of(const TaskExamples& split) {
  std::vector<std::vector<int32_t>> all;
  for (int64_t i = 0; i < split.sequences(); ++i) all.push_back(tokens_of(split, i));
  return all;
}

TaskOptions small_listops() {
  TaskOptions options = TaskOptions::defaults("listops");
  options.train = 300;
  options.validation = options.test = 50;
  options.min_length = 10;
  options.max_length = 60;
  return options;
}

TEST(ListOps, ValuesOfExpressionsWrittenOutByHand) {
  // Tokens: digits, 10 [MIN, 11 [MAX, 12 [MED, 13 [SM, 14 ].
  EXPECT_EQ(listops_value({10, 4, 2, 9, 14}), 2);
  EXPECT_EQ(listops_value({11, 4, 2, 9, 14}), 9);
  EXPECT_EQ(listops_value({12, 4, 2, 9, 14}), 4);
  EXPECT_EQ(listops_value({12, 4, 1, 9, 2, 14}), 3);  // (2 + 4) / 2
  EXPECT_EQ(listops_value({12, 4, 1, 9, 5, 14}), 4);  // (4 + 5) / 2, rounded down
  EXPECT_EQ(listops_value({13, 7, 8, 9, 14}), 4);     // 24 modulo 10
  EXPECT_EQ(listops_value({11, 2, 10, 8, 7, 14, 13, 9, 9, 14, 14}), 8);
  EXPECT_EQ(listops_text({11, 2, 12, 8, 7, 14, 13, 9, 9, 14, 14}), "[MAX 2 [MED 8 7 ] [SM 9 9 ] ]");
  for (const std::vector<int32_t>& broken : {std::vector<int32_t>{10, 1}, {10, 14}, {1, 14}, {1, 2}, {}}) {
    EXPECT_THROW(listops_value(broken), std::invalid_argument);
  }
}

TEST(ListOps, LabelsAreTheValuesAndLengthsAreAsAsked) {
  const TaskOptions options = small_listops();
  const TaskData data = make_listops(options);
  data.check("listops");
  std::set<std::vector<int32_t>> seen;
  std::set<int32_t> operators, labels;
  for (const auto& [name, split] : data.splits) {
    EXPECT_EQ(split.sequences(), name == "train" ? 300 : 50);
    for (int64_t i = 0; i < split.sequences(); ++i) {
      const auto tokens = tokens_of(split, i);
      ASSERT_GT(tokens.size(), 10U);
      ASSERT_LT(tokens.size(), 60U);
      ASSERT_EQ(listops_value(tokens), split.labels[i].item<int32_t>()) << listops_text(tokens);
      EXPECT_TRUE(seen.insert(tokens).second) << "twice: " << listops_text(tokens);
      labels.insert(split.labels[i].item<int32_t>());
      for (const int32_t token : tokens) {
        if (token >= 10) operators.insert(token);
      }
    }
  }
  EXPECT_EQ(operators.size(), 5U);
  EXPECT_EQ(labels.size(), 10U);
}

TEST(ListOps, SameWithAnyNumberOfThreadsAndOtherWithAnotherSeed) {
  TaskOptions options = small_listops();
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = all_of(make_listops(options).splits.at("train"));
  at::set_num_threads(3);
  const auto three = all_of(make_listops(options).splits.at("train"));
  at::set_num_threads(before);
  EXPECT_EQ(one, three);
  options.seed = 2;
  EXPECT_NE(one, all_of(make_listops(options).splits.at("train")));
}

TEST(ListOps, ImpossibleSizesAreErrors) {
  TaskOptions options = small_listops();
  options.max_depth = 2;
  options.max_arguments = 4;  // 6 tokens at most
  EXPECT_CONTAINS(formats::error_text<formats::OptionError>([&] { make_listops(options); }),
                  "min_length is 10, expected less than 6");
  options = small_listops();
  options.min_length = 4;
  options.max_length = 6;  // [OP a b c ]: 4,000 different ones
  options.max_arguments = 3;
  options.max_depth = 2;
  options.train = 5000;
  EXPECT_CONTAINS(formats::error_text<formats::OptionError>([&] { make_listops(options); }), "too few different examples");
}

TEST(TaskOptionsTest, ErrorsNameTheField) {
  const auto error = [](const json& object) {
    return formats::error_text<formats::OptionError>([&] { TaskOptions::from_json(object); });
  };
  EXPECT_CONTAINS(error({{"name", "listop"}}), "task is \"listop\", expected one of listops, ");
  EXPECT_CONTAINS(error({{"name", "listops"}, {"size", 32}}), "unknown option of task listops \"size\"");
  EXPECT_CONTAINS(error({{"name", "listops"}, {"train", 0}}), "train is 0, expected an integer in 1 … ");
  EXPECT_CONTAINS(error({{"name", "listops"}, {"train", "many"}}), "train is ");
  EXPECT_CONTAINS(error({{"name", "listops"}, {"min_length", 2000}}), "min_length is 2000, expected an integer in 0 … 1998");
  EXPECT_CONTAINS(error({{"name", "text"}}), "data is missing");
  EXPECT_CONTAINS(error({{"name", "associative_recall"}, {"pairs", 100}, {"length", 64}}),
                  "length is 64, expected an integer in 400 … ");
  const TaskOptions options = small_listops();
  EXPECT_EQ(TaskOptions::from_json(options.to_json()), options);
}

class TaskFileTest : public ::testing::Test {
 protected:
  TaskFileTest() {
    TaskBuilder builder;
    builder.add(std::vector<int32_t>{1, 2, 3}, 0);
    builder.add(std::vector<int32_t>{4}, 1);
    data_.name = "listops";
    data_.vocab_size = 5;
    data_.num_classes = 2;
    for (const char* name : {"train", "validation", "test"}) {
      TaskBuilder copy = builder;
      data_.splits[name] = copy.finish();
    }
  }

  // The file with a change to its tensors or metadata.
  template <typename Change>
  std::string error_of(const Change& change) {
    const std::string path = folder_ / "task", broken = folder_ / "broken";
    write_task(path, data_, "{}");
    const formats::SafetensorsFile file(path);
    auto tensors = file.tensors();
    auto metadata = file.metadata();
    change(tensors, metadata);
    formats::write_safetensors(broken, tensors, metadata);
    return formats::error_text<formats::FormatError>([&] { read_task(broken); });
  }

  TestFolder folder_;
  TaskData data_;
};

TEST_F(TaskFileTest, WhatIsWrittenIsRead) {
  write_task(folder_ / "task", data_, R"({"seed":1})");
  const TaskFile file = read_task(folder_ / "task");
  EXPECT_EQ(file.options, R"({"seed":1})");
  EXPECT_EQ(file.data.vocab_size, 5);
  EXPECT_EQ(file.data.num_classes, 2);
  ASSERT_EQ(file.data.splits.size(), 3U);
  EXPECT_EQ(all_of(file.data.splits.at("test")), all_of(data_.splits.at("test")));
  EXPECT_TRUE(file.data.splits.at("test").labels.equal(data_.splits.at("test").labels));
}

TEST_F(TaskFileTest, EveryDefectIsAnErrorThatNamesIt) {
  using Tensors = std::vector<formats::TensorView>;
  using formats::Metadata;
  std::vector<int64_t> offsets = {0, 5, 4};
  std::vector<int32_t> labels = {0, 2};
  const auto replace = [](Tensors& tensors, const std::string& name, auto& values) {
    for (auto& tensor : tensors) {
      if (tensor.name != name) continue;
      tensor.data = std::as_bytes(std::span(values));
      tensor.shape = {static_cast<int64_t>(values.size())};
    }
  };
  const auto drop = [](Tensors& tensors, const std::string& name) {
    std::erase_if(tensors, [&](const auto& tensor) { return tensor.name == name; });
  };
  EXPECT_CONTAINS(error_of([&](Tensors& tensors, Metadata&) { replace(tensors, "test.offsets", offsets); }),
                  "split \"test\": offset 2 is 4, expected more than 5");
  EXPECT_CONTAINS(error_of([&](Tensors& tensors, Metadata&) { replace(tensors, "train.labels", labels); }),
                  "split \"train\": label 1 is 2, expected 0 to 1");
  offsets = {0, 3};
  EXPECT_CONTAINS(error_of([&](Tensors& tensors, Metadata&) { replace(tensors, "test.offsets", offsets); }), "expected 0 to 4");
  labels = {1};
  EXPECT_CONTAINS(error_of([&](Tensors& tensors, Metadata&) { replace(tensors, "train.labels", labels); }),
                  "1 labels, expected 2");
  EXPECT_CONTAINS(error_of([&](Tensors& tensors, Metadata&) { drop(tensors, "train.labels"); }), "train.labels");
  EXPECT_CONTAINS(error_of([&](Tensors& tensors, Metadata&) { drop(tensors, "test.tokens"); }),
                  "unexpected tensor \"test.labels\"");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["vocab_size"] = "4"; }), "token 3 is 4, expected 0 to 3");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["vocab_size"] = "-4"; }), "vocab_size is \"-4\"");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["kind"] = "maps"; }), "kind is \"maps\"");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["kind"] = "pairs"; }), "2 labels, expected 1");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["version"] = "2"; }), "version is \"2\"");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["options"] = "["; }), "no valid JSON");
}

TEST_F(TaskFileTest, AGeneratedTaskIsKeptAndReadAgain) {
  TaskOptions options = small_listops();
  options.data = folder_ / "kept/listops";
  const auto made = all_of(load_task(options).splits.at("train"));
  EXPECT_TRUE(std::filesystem::exists(options.data));
  EXPECT_EQ(made, all_of(load_task(options).splits.at("train")));
  options.max_length = 50;
  EXPECT_CONTAINS(formats::error_text<formats::FormatError>([&] { load_task(options); }), "made with max_length \"60\", not 50");
}

TEST_F(TaskFileTest, BatchesArePaddedAndAnEpochTakesEachExampleOnce) {
  const TaskBatch batch = data_.batch(data_.splits.at("train"), std::vector<int64_t>{1, 0});
  EXPECT_EQ(batch.tokens.sizes(), (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(batch.real_tokens, 4);
  ASSERT_TRUE(batch.padding.has_value());
  EXPECT_EQ(batch.padding->to(at::kLong).sum().item<int64_t>(), 2);
  EXPECT_EQ(batch.targets[0].item<int64_t>(), 1);
  EXPECT_FALSE(data_.batch(data_.splits.at("train"), std::vector<int64_t>{1, 1}).padding.has_value());
  EXPECT_THROW(data_.batch(data_.splits.at("train"), std::vector<int64_t>{2}), std::invalid_argument);

  EpochOrder order(7, 3);
  std::vector<int64_t> first = order.take(0, 7), second = order.take(7, 7);
  EXPECT_NE(first, second);
  // Resumed in the middle of an epoch.
  EXPECT_EQ(EpochOrder(7, 3).take(9, 5), std::vector<int64_t>(second.begin() + 2, second.end()));
  for (auto* epoch : {&first, &second}) {
    std::sort(epoch->begin(), epoch->end());
    for (int64_t i = 0; i < 7; ++i) EXPECT_EQ((*epoch)[static_cast<size_t>(i)], i);
  }
}

}  // namespace
}  // namespace latte
