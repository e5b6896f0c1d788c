#include "data/tasks.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <span>
#include <vector>

#include "data/task_file.h"
#include "data/test_tasks.h"
#include "formats/error.h"
#include "formats/safetensors.h"
#include "formats/test_files.h"

namespace latte {
namespace {

using formats::TestFolder;
using nlohmann::json;

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

// As published (Long Range Arena): 500 to 2,000 tokens, and the four operators alike often.
TEST(ListOps, PublishedLengthsAndMixOfOperators) {
  TaskOptions options = TaskOptions::defaults("listops");
  options.train = 100;
  options.validation = options.test = 1;
  EXPECT_EQ(options.min_length, 500);
  EXPECT_EQ(options.max_length, 2000);
  std::map<int32_t, double> operators;
  double total = 0.0;
  for (const auto& tokens : all_of(make_listops(options).splits.at("train"))) {
    EXPECT_GT(tokens.size(), 500U);
    EXPECT_LT(tokens.size(), 2000U);
    for (const int32_t token : tokens) {
      if (token < 10 || token > 13) continue;
      ++operators[token];
      ++total;
    }
  }
  for (const auto& [token, count] : operators) EXPECT_NEAR(count / total, 0.25, 0.02) << token;
  EXPECT_EQ(operators.size(), 4U);
}

TEST(Generators, SameWithAnyNumberOfThreadsAndOtherWithAnotherSeed) {
  for (const char* name : {"listops", "pathfinder", "associative_recall", "selective_copying", "needle"}) {
    SCOPED_TRACE(name);
    TaskOptions options = TaskOptions::defaults(name);
    options.train = 60;
    options.validation = options.test = 2;
    options.contour_length = 4;
    if (options.name == "listops") options.min_length = 10, options.max_length = 60;
    const int before = at::get_num_threads();
    at::set_num_threads(1);
    const auto one = all_of(load_task(options).splits.at("train"));
    at::set_num_threads(3);
    const auto three = all_of(load_task(options).splits.at("train"));
    at::set_num_threads(before);
    EXPECT_EQ(one.size(), 60U);
    EXPECT_EQ(one, three);
    options.seed = 2;
    EXPECT_NE(one, all_of(load_task(options).splits.at("train")));
  }
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

TEST(TaskOptionsTest, NoSequenceIsLongerThanTheyPromise) {
  for (const char* name : {"listops", "pathfinder", "associative_recall", "selective_copying", "needle"}) {
    TaskOptions options = TaskOptions::defaults(name);
    options.train = 300;
    options.validation = options.test = 5;
    options.min_length = 4;
    options.max_length = 12;
    options.size = 16;
    options.contour_length = 2;
    options.distractors = 0;
    options.length = 24;
    options.pairs = 4;
    options.copies = 3;
    if (options.name != "listops" && options.name != "pathfinder") options.test_lengths = {40};
    EXPECT_EQ(load_task(options).longest(), options.longest_sequence()) << name;
  }
  EXPECT_EQ(TaskOptions::defaults("image").longest_sequence(), 1024);
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

TEST_F(TaskFileTest, LabelsOfTheFirstVersionAreRead) {
  write_task(folder_ / "task", data_, "{}");
  const formats::SafetensorsFile file(folder_ / "task");
  formats::Metadata metadata = file.metadata();
  metadata["version"] = "1";
  formats::write_safetensors(folder_ / "first", file.tensors(), metadata);
  EXPECT_TRUE(read_task(folder_ / "first").data.splits.at("test").labels.equal(data_.splits.at("test").labels));
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
  EXPECT_CONTAINS(error_of([&](Tensors& tensors, Metadata&) {
                    for (auto& tensor : tensors) {
                      if (tensor.name.starts_with("test.")) tensor.name = "test_long" + tensor.name.substr(4);
                    }
                  }),
                  "a split is named \"test_long\"");
  EXPECT_CONTAINS(error_of([&](Tensors& tensors, Metadata&) { drop(tensors, "test.tokens"); }),
                  "unexpected tensor \"test.labels\"");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["vocab_size"] = "4"; }), "token 3 is 4, expected 0 to 3");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["vocab_size"] = "-4"; }), "vocab_size is \"-4\"");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["kind"] = "maps"; }), "kind is \"maps\"");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["kind"] = "pairs"; }), "2 labels, expected 1");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["version"] = "3"; }), "version \"3\", expected 2");
  EXPECT_CONTAINS(error_of([&](Tensors&, Metadata& metadata) { metadata["options"] = "["; }), "no valid JSON");
}

TEST_F(TaskFileTest, TargetsAreKeptWithTheirPositions) {
  TaskBuilder builder;
  builder.add(std::vector<int32_t>{1, 2, 3}, std::vector<int32_t>{kNoTarget, 4, kNoTarget});
  builder.add(std::vector<int32_t>{4, 0}, std::vector<int32_t>{0, kNoTarget});
  builder.add(std::vector<int32_t>{2}, std::vector<int32_t>{kNoTarget});
  data_.kind = TaskKind::kTokens;
  data_.num_classes = 5;
  for (auto& [name, split] : data_.splits) {
    TaskBuilder copy = builder;
    split = copy.finish();
  }
  write_task(folder_ / "task", data_, "{}");
  const TaskData read = read_task(folder_ / "task").data;
  const auto& split = read.splits.at("validation");
  EXPECT_TRUE(split.target_positions.equal(at::tensor({1, 3}, at::kLong)));
  EXPECT_TRUE(split.targets.equal(at::tensor({4, 0}, at::kInt)));
  EXPECT_DOUBLE_EQ(read.majority_share(split), 0.5);
  const TaskBatch batch = read.batch(split, std::vector<int64_t>{2, 1, 0});
  EXPECT_TRUE(batch.targets.equal(at::tensor({-1, -1, -1, 0, -1, -1, -1, 4, -1}, at::kLong).view({3, 3}))) << batch.targets;

  using Tensors = std::vector<formats::TensorView>;
  EXPECT_CONTAINS(error_of([](Tensors&, formats::Metadata& metadata) { metadata["version"] = "1"; }),
                  "a task file of version \"1\", expected 2: remove it");
  std::vector<int64_t> positions;
  const auto error = [&](std::vector<int64_t> changed) {
    positions = std::move(changed);
    return error_of([&](Tensors& tensors, formats::Metadata&) {
      for (auto& tensor : tensors) {
        if (tensor.name != "test.target_positions") continue;
        tensor.data = std::as_bytes(std::span(positions));
        tensor.shape = {static_cast<int64_t>(positions.size())};
      }
    });
  };
  EXPECT_CONTAINS(error({1, 6}), "split \"test\": target position 1 is 6, expected 0 to 5");
  EXPECT_CONTAINS(error({-1, 3}), "target position 0 is -1, expected 0 to 5");
  EXPECT_CONTAINS(error({3, 3}), "target position 1 is 3, expected more than 3, the one before");
  EXPECT_CONTAINS(error({3}), "2 targets, expected 1, one a position");
  EXPECT_CONTAINS(error({}), "split \"test\": has no target");
  EXPECT_CONTAINS(error_of([](Tensors& tensors, formats::Metadata&) {
                    std::erase_if(tensors, [](const auto& tensor) { return tensor.name == "train.target_positions"; });
                  }),
                  "train.target_positions");
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

TEST_F(TaskFileTest, ExamplesOfAnEarlierGeneratorAreNotTakenForTodays) {
  TaskOptions options = TaskOptions::defaults("associative_recall");
  options.length = 32;
  options.pairs = 4;
  options.keys = 8;
  options.train = options.validation = options.test = 4;
  options.data = folder_ / "recall";
  load_task(options);
  TaskFile kept = read_task(options.data);
  auto recipe = nlohmann::json::parse(kept.options);
  EXPECT_EQ(recipe.erase("generator"), 1U);  // as files had it before there was another
  write_task(options.data, kept.data, recipe.dump());
  EXPECT_CONTAINS(formats::error_text<formats::FormatError>([&] { load_task(options); }), "made with generator \"1\", not 2");
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

class LoaderTest : public ::testing::Test {
 protected:
  std::string error_of(const TaskOptions& options) {
    return formats::error_text<formats::FormatError>([&] { load_task(options); });
  }
  TaskOptions options_of(const std::string& name, const std::string& data) {
    TaskOptions options = TaskOptions::defaults(name);
    options.data = data;
    options.validation_fraction = 0.25;
    return options;
  }
  TestFolder folder_;
};

TEST_F(LoaderTest, LabelledLinesAndWhatIsWrongWithThem) {
  std::string lines;
  for (int i = 0; i < 40; ++i)
    lines += std::to_string(i % 2) + "\tthis is text " + std::to_string(i) + (i % 3 == 0 ? "\r\n" : "\n");
  formats::write_bytes(folder_ / "all.tsv", lines);
  TaskOptions options = options_of("text", folder_ / "all.tsv");
  options.length = 9;
  const TaskData data = load_task(options);
  EXPECT_EQ(data.splits.at("test").sequences(), 4);
  EXPECT_EQ(data.splits.at("validation").sequences(), 9);
  EXPECT_EQ(data.splits.at("train").sequences(), 27);
  EXPECT_EQ(data.longest(), 9);
  const auto first = tokens_of(data.splits.at("test"), 0);
  EXPECT_EQ(std::string(first.begin(), first.end()), "this is t");

  formats::write_bytes(folder_ / "all.tsv", lines + "2\ttext\n");
  EXPECT_CONTAINS(error_of(options), "line 41: the label is \"2\", expected 0 or 1");
  formats::write_bytes(folder_ / "all.tsv", "1 no tab\n");
  EXPECT_CONTAINS(error_of(options), "line 1: 1 fields between tabs, expected 2");
  formats::write_bytes(folder_ / "all.tsv", lines + "1\t\n");
  EXPECT_CONTAINS(error_of(options), "line 41: the text is empty");
  formats::write_bytes(folder_ / "all.tsv", "1\ta\n");
  EXPECT_CONTAINS(error_of(options), "too few");
  std::string sorted;
  for (int i = 0; i < 40; ++i) sorted += std::to_string(i / 20) + "\ta text\n";
  formats::write_bytes(folder_ / "all.tsv", sorted);
  EXPECT_CONTAINS(error_of(options), "the last tenth of its lines, the test part, has label 1 alone");
  formats::write_bytes(folder_ / "all.tsv", "");
  EXPECT_CONTAINS(error_of(options), "empty");
}

TEST_F(LoaderTest, LongTextsAreReadInStretches) {
  std::string lines, text;
  for (int i = 0; i < 25; ++i) text += static_cast<char>('a' + i);
  for (int i = 0; i < 40; ++i) lines += std::to_string(i % 2) + "\t" + (i % 2 == 0 ? text : "short") + "\n";
  formats::write_bytes(folder_ / "all.tsv", lines);
  TaskOptions options = options_of("text", folder_ / "all.tsv");
  options.length = 10;
  options.crop = true;
  const TaskData data = load_task(options);
  EXPECT_EQ(data.longest(), 10);
  const TaskExamples& split = data.splits.at("test");  // long, short, long, short
  EXPECT_EQ(data.stretches(split, 0), (std::vector<int64_t>{0, 7, 15}));
  EXPECT_EQ(data.stretches(split, 1), (std::vector<int64_t>{0}));
  const auto row = [](const TaskBatch& batch, int64_t i, int64_t length) {
    std::string bytes;
    for (int64_t t = 0; t < length; ++t) bytes += static_cast<char>(batch.tokens[i][t].item<int64_t>());
    return bytes;
  };
  const std::vector<int64_t> examples = {0, 1, 2}, begins = {7, 0, 15};
  const TaskBatch batch = data.batch(split, examples, 0, begins);
  EXPECT_EQ(batch.real_tokens, 25);
  EXPECT_EQ(row(batch, 0, 10), text.substr(7, 10));
  EXPECT_EQ(row(batch, 1, 5), "short");
  EXPECT_EQ(row(batch, 2, 10), text.substr(15, 10));
  // Every place comes up, and the same one for the same seed.
  std::set<std::string> seen;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    const std::string drawn = row(data.batch(split, examples, seed), 0, 10);
    EXPECT_EQ(drawn, row(data.batch(split, examples, seed), 0, 10));
    EXPECT_NE(text.find(drawn), std::string::npos);
    seen.insert(drawn);
  }
  EXPECT_EQ(seen.size(), 16U);
}

TEST_F(LoaderTest, FoldersOfReviews) {
  for (const char* part : {"train", "test"}) {
    for (const char* label : {"pos", "neg"}) {
      const std::string folder = folder_ / (std::string(part) + "/" + label);
      std::filesystem::create_directories(folder);
      for (int i = 0; i < 4; ++i) formats::write_bytes(folder + "/" + std::to_string(i) + ".txt", std::string(label) + " review");
    }
  }
  const TaskData data = load_task(options_of("text", folder_ / ""));
  EXPECT_EQ(data.splits.at("train").sequences() + data.splits.at("validation").sequences(), 8);
  for (int64_t i = 0; i < 8; ++i) {
    const auto text = tokens_of(data.splits.at("test"), i);
    EXPECT_EQ(data.splits.at("test").labels[i].item<int32_t>(), text[0] == 'p' ? 1 : 0);
  }
  std::filesystem::remove_all(folder_ / "test/neg");
  EXPECT_THROW(load_task(options_of("text", folder_ / "")), formats::FileError);
}

TEST_F(LoaderTest, PairsOfDocuments) {
  const std::string good = "1.0\t12\t13\tfirst paper\tsecond paper\n0.0\t1\t2\ta\tb\n";
  for (const char* part : {"train", "eval", "test"})
    formats::write_bytes(folder_ / ("new_aan_pairs." + std::string(part) + ".tsv"), good);
  const TaskData data = load_task(options_of("retrieval", folder_ / ""));
  const TaskExamples& split = data.splits.at("validation");
  EXPECT_EQ(data.examples(split), 2);
  const auto second = tokens_of(split, 1);
  EXPECT_EQ(std::string(second.begin(), second.end()), "second paper");
  EXPECT_EQ(data.batch(split, std::vector<int64_t>{1}).tokens.sizes(), (std::vector<int64_t>{2, 1}));
  formats::write_bytes(folder_ / "new_aan_pairs.eval.tsv", "1.0\t12\t13\tfirst paper\n");
  EXPECT_CONTAINS(error_of(options_of("retrieval", folder_ / "")), "new_aan_pairs.eval.tsv: line 1: 4 fields");
  formats::write_bytes(folder_ / "new_aan_pairs.eval.tsv", "1.0\t12\t13\tfirst\tpaper with a tab\tsecond\n");
  EXPECT_CONTAINS(error_of(options_of("retrieval", folder_ / "")), "new_aan_pairs.eval.tsv: line 1: 6 fields");
  formats::write_bytes(folder_ / "new_aan_pairs.eval.tsv", "2\t12\t13\tone\tother\n");
  EXPECT_CONTAINS(error_of(options_of("retrieval", folder_ / "")), "line 1: the label is \"2\"");
  formats::write_bytes(folder_ / "new_aan_pairs.eval.tsv", "1\t12\t13\tone\t\n");
  EXPECT_CONTAINS(error_of(options_of("retrieval", folder_ / "")), "line 1: the second document is empty");
}

TEST_F(LoaderTest, Images) {
  std::string images;
  for (int i = 0; i < 20; ++i)
    images += static_cast<char>(i % 10) + std::string(1024, '\xFF') + std::string(1024, '\0') + std::string(1024, '\0');
  for (const char* name : {"data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"}) {
    formats::write_bytes(folder_ / (std::string(name) + ".bin"), images);
  }
  const TaskData data = load_task(options_of("image", folder_ / ""));
  EXPECT_EQ(data.splits.at("train").sequences() + data.splits.at("validation").sequences(), 100);
  const auto pixels = tokens_of(data.splits.at("test"), 3);
  EXPECT_EQ(pixels.size(), 1024U);
  EXPECT_EQ(pixels[0], 76);  // 0.299 · 255
  EXPECT_EQ(data.splits.at("test").labels[13].item<int32_t>(), 3);
  formats::write_bytes(folder_ / "data_batch_3.bin", images + "x");
  EXPECT_CONTAINS(error_of(options_of("image", folder_ / "")), "data_batch_3.bin: 61461 bytes, expected a multiple of 3073");
  images[3073] = 10;
  formats::write_bytes(folder_ / "data_batch_3.bin", images);
  EXPECT_CONTAINS(error_of(options_of("image", folder_ / "")), "image 1: the label is 10, expected 0 to 9");
}

TEST_F(LoaderTest, MaskedTextAsksForItsOwnBytes) {
  std::string text;
  for (int i = 0; i < 4000; ++i) text += static_cast<char>('a' + i % 26);
  formats::write_bytes(folder_ / "text", text);
  TaskOptions options = options_of("masked_language", folder_ / "text");
  options.length = 100;
  const TaskData data = load_task(options);
  EXPECT_EQ(data.splits.at("train").sequences(), 30);
  EXPECT_EQ(data.splits.at("validation").sequences(), 10);
  std::vector<int64_t> all(30);
  std::iota(all.begin(), all.end(), int64_t{0});
  const TaskBatch batch = data.batch(data.splits.at("train"), all, 1);
  int64_t asked = 0, masked = 0, changed = 0;
  for (int64_t i = 0; i < 30; ++i) {
    for (int64_t t = 0; t < 100; ++t) {
      const int64_t original = static_cast<unsigned char>(text[static_cast<size_t>(i * 100 + t)]),
                    token = batch.tokens[i][t].item<int64_t>();
      const int64_t target = batch.targets[i][t].item<int64_t>();
      if (target == kNoTarget) {
        EXPECT_EQ(token, original);
        continue;
      }
      EXPECT_EQ(target, original);
      ++asked;
      masked += token == 256 ? 1 : 0;
      changed += token != original ? 1 : 0;
    }
  }
  EXPECT_NEAR(static_cast<double>(asked), 450, 80);  // four deviations of 3,000 draws
  EXPECT_NEAR(static_cast<double>(masked) / static_cast<double>(asked), 0.8, 0.08);
  EXPECT_NEAR(static_cast<double>(changed) / static_cast<double>(asked), 0.9, 0.06);
  EXPECT_TRUE(batch.tokens.equal(data.batch(data.splits.at("train"), all, 1).tokens));
  EXPECT_FALSE(batch.tokens.equal(data.batch(data.splits.at("train"), all, 2).tokens));
}

}  // namespace
}  // namespace latte
