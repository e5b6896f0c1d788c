#include "train/task_trainer.h"

#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>

#include "data/random.h"
#include "data/tasks.h"
#include "formats/error.h"
#include "formats/test_files.h"
#include "train/interrupt.h"
#include "train/metrics.h"
#include "train/task_run.h"
#include "train/test_checkpoint.h"

namespace latte::train {
namespace {

using formats::TestFolder;
using nlohmann::json;

class TaskTrainerTest : public ::testing::Test {
 protected:
  TaskTrainerTest() {
    task_ = TaskOptions::defaults("listops");
    task_.train = 100;
    task_.validation = task_.test = 40;
    task_.min_length = 4;
    task_.max_length = 20;
    options_.batch = 8;
    options_.steps = 8;
    options_.warmup = 2;
    options_.lr = 1e-2;
    options_.min_lr = 1e-3;
    options_.eval_batches = 2;
    options_.dtype = "float32";
    model_.num_layers = 1;
    model_.embed_dim = 16;
    model_.num_heads = 2;
    model_.attention = "latte";
    model_.norm = "batch";  // whose buffers a checkpoint needs too
    model_.dropout = 0.1;
    model_.vocab_size = model_.num_outputs = 1;
  }

  TestFolder folder_;
  TaskOptions task_;
  TrainerOptions options_;
  models::EncoderConfig model_;
};

TEST_F(TaskTrainerTest, OldRecordsHaveWholeMatricesOfDecays) {
  model_.causal = true;
  model_.norm = "layer";
  auto record = json::parse(TaskRecord{model_, options_, task_, {}}.to_json());
  EXPECT_EQ(TaskRecord::from_json("it", record.dump()).model.decay_rank, model_.decay_rank);
  ASSERT_EQ(record.at("model").erase("decay_rank"), 1);
  EXPECT_EQ(TaskRecord::from_json("it", record.dump()).model.decay_rank, 0);
}

TEST_F(TaskTrainerTest, AnInterruptionEndsTheLastEvaluation) {
  const TaskData data = load_task(task_);
  TaskTrainer trainer(fit_to(model_, data, false), options_, task_, data);
  const InterruptGuard guard;
  const json whole = trainer.test();
  EXPECT_EQ(whole.at("test").at("loss"), trainer.evaluate(data.splits.at("test")).loss);
  const auto validation = trainer.validate().loss;
  std::raise(SIGINT);
  EXPECT_TRUE(trainer.test().is_null());
  EXPECT_EQ(trainer.validate().loss, validation);  // which the metrics of a step want whole
}

TEST_F(TaskTrainerTest, ResumesBitForBit) {
  options_.accumulate = 2;
  const TaskData data = load_task(task_);
  const auto model = fit_to(model_, data, false);
  const std::string whole = folder_ / "whole", half = folder_ / "half", resumed = folder_ / "resumed";
  {
    TaskTrainer trainer(model, options_, task_, data);
    for (int i = 0; i < 8; ++i) {
      trainer.step();
      if (i == 2 || i == 5) trainer.validate();  // which must change nothing
      if (i == 3) trainer.save(half, {});
    }
    trainer.save(whole, {});
  }
  {
    const formats::CheckpointFile checkpoint(half);
    TaskTrainer trainer(checkpoint, options_, data);
    EXPECT_EQ(trainer.steps_done(), 4);
    for (int i = 4; i < 8; ++i) trainer.step();
    trainer.save(resumed, {});
  }
  EXPECT_EQ(tensors_of(whole), tensors_of(resumed));
}

TEST_F(TaskTrainerTest, EvaluationCountsEveryExampleOnce) {
  const TaskData data = load_task(task_);
  TaskTrainer trainer(fit_to(model_, data, false), options_, task_, data);
  trainer.step();
  const TaskExamples& split = data.splits.at("test");
  const Evaluation all = trainer.evaluate(split);
  // One by one, without padding.
  torch::NoGradGuard no_grad;
  trainer.model()->eval();
  double loss = 0.0;
  int64_t right = 0;
  for (int64_t i = 0; i < 40; ++i) {
    const TaskBatch batch = data.batch(split, std::vector<int64_t>{i});
    const auto logits = trainer.model()(batch.tokens);
    loss -= logits.log_softmax(-1)[0][batch.targets.item<int64_t>()].item<double>() / 40;
    right += logits.argmax(-1).item<int64_t>() == batch.targets.item<int64_t>() ? 1 : 0;
  }
  EXPECT_NEAR(all.loss, loss, 1e-4);
  EXPECT_EQ(*all.accuracy, static_cast<double>(right) / 40);
}

// What a classifier of long texts has to find: letters that are a little more frequent with one label than with the other.
TaskExamples faint_letters(int64_t count, uint64_t seed) {
  constexpr int64_t kLength = 1024, kLetters = 16;
  TaskBuilder builder;
  for (int64_t i = 0; i < count; ++i) {
    RandomStream random(seed, static_cast<uint64_t>(i));
    const auto label = static_cast<int32_t>(i % 2);
    std::string text;
    while (std::ssize(text) < kLength) {
      const int64_t letter = random.below(kLetters);
      const bool odd = letter % 2 == 1;
      // One letter in eight of the wrong kind is drawn again.
      if (odd != (label == 1) && random.uniform() < 0.125) continue;
      text += static_cast<char>(letter);
    }
    builder.add_bytes(text);
    builder.add_label(label);
  }
  return builder.finish();
}

TEST_F(TaskTrainerTest, AFaintSignalOfALongTextIsLearnt) {
  TaskData data{.name = "faint", .kind = TaskKind::kClassify, .vocab_size = 16, .num_classes = 2};
  data.splits.emplace("train", faint_letters(400, 1));
  data.splits.emplace("validation", faint_letters(100, 2));
  options_.steps = 50;
  options_.eval_batches = 100;
  options_.warmup = 5;
  options_.lr = 3e-3;
  model_.norm = "layer";
  model_.pooled_norm = "batch";
  TaskTrainer trainer(fit_to(model_, data, false), options_, task_, data);
  while (trainer.steps_done() < options_.steps) trainer.step();
  const auto statistics = trainer.model()->pooled_norm->running_mean.clone();
  const Evaluation learnt = trainer.validate();
  EXPECT_GT(*learnt.accuracy, 0.9);
  EXPECT_TRUE(at::equal(trainer.model()->pooled_norm->running_mean, statistics));
  {  // It goes by the examples, and not by statistics that lag behind the weights.
    const torch::NoGradGuard no_grad;
    trainer.model()->pooled_norm->running_mean.add_(10.0);
  }
  EXPECT_EQ(trainer.validate().loss, learnt.loss);
  options_.batch = 1;
  EXPECT_THROW(TaskTrainer(fit_to(model_, data, false), options_, task_, data), OptionError);
}

TEST_F(TaskTrainerTest, ALongTextIsAnsweredFromItsStretches) {
  std::string lines;
  for (int i = 0; i < 60; ++i)
    lines += std::to_string(i % 2) + "\t" + std::string(static_cast<size_t>(5 + i), 'a' + i % 26) + "\n";
  formats::write_bytes(folder_ / "all.tsv", lines);
  task_ = TaskOptions::defaults("text");
  task_.data = folder_ / "all.tsv";
  task_.length = 16;
  task_.crop = true;
  const TaskData data = load_task(task_);
  TaskTrainer trainer(fit_to(model_, data, false), options_, task_, data);
  trainer.step();
  const TaskExamples& split = data.splits.at("validation");
  const Evaluation all = trainer.evaluate(split);
  torch::NoGradGuard no_grad;
  trainer.model()->eval();
  double loss = 0.0;
  int64_t right = 0;
  for (int64_t i = 0; i < data.examples(split); ++i) {
    const auto begins = data.stretches(split, i);
    auto sum = torch::zeros({2});
    for (const int64_t begin : begins) {
      const TaskBatch batch = data.batch(split, std::vector<int64_t>{i}, 0, std::vector<int64_t>{begin});
      EXPECT_LE(batch.tokens.size(1), 16);
      sum += trainer.model()(batch.tokens).log_softmax(-1)[0];
    }
    const auto answer = (sum / static_cast<double>(begins.size())).log_softmax(-1);
    const auto label = split.labels[i].item<int32_t>();
    loss -= answer[label].item<double>() / static_cast<double>(data.examples(split));
    right += answer.argmax().item<int64_t>() == label ? 1 : 0;
  }
  EXPECT_NEAR(all.loss, loss, 1e-4);
  EXPECT_EQ(*all.accuracy, static_cast<double>(right) / static_cast<double>(data.examples(split)));
}

TEST_F(TaskTrainerTest, ARunLearnsWritesResultsAndRefusesAnotherTask) {
  // The first token is the answer.
  task_ = TaskOptions::defaults("needle");
  task_.length = 8;
  task_.symbols = 4;
  task_.train = 2000;
  task_.validation = task_.test = 100;
  task_.test_lengths = {12};
  model_.attention = "softmax";
  model_.norm = "layer";
  model_.causal = true;
  model_.dropout = 0.0;
  options_.batch = 32;
  options_.steps = 20;
  options_.eval_every = 10;
  const RunOptions run{.out = folder_ / "run", .overwrite = false, .quiet = true};
  const RunResult result = start_task_run(model_, false, options_, task_, run);
  EXPECT_EQ(result.step, 20);
  const json results = json::parse(formats::read_bytes(folder_ / "run/results.json"));
  EXPECT_EQ(results, result.splits);
  EXPECT_EQ(results.size(), 3U);
  EXPECT_TRUE(results.contains("test_12"));
  const auto metrics = read_metrics(folder_ / "run/metrics.jsonl");
  ASSERT_EQ(metrics.size(), 20U);
  EXPECT_TRUE(metrics[9].val_accuracy.has_value());
  EXPECT_FALSE(metrics[8].val_accuracy.has_value());
  EXPECT_EQ(metrics[19].tokens, 20 * 32 * 8);
  EXPECT_LT(metrics[19].loss, metrics[0].loss);
  EXPECT_THROW(start_task_run(model_, false, options_, task_, run), OptionError);
  EXPECT_EQ(resume_task_run(options_, run).splits, result.splits);  // at its last step already
  // A run that was stopped before it wrote its results still writes them.
  std::filesystem::remove(folder_ / "run/results.json");
  EXPECT_EQ(resume_task_run(options_, run).splits, result.splits);
  options_.steps = 24;
  EXPECT_EQ(resume_task_run(options_, run).step, 24);
}

TEST_F(TaskTrainerTest, SequencesBeyondThePositionsAreAnError) {
  const TaskData data = load_task(task_);
  model_.position = "learned";
  model_.max_positions = 8;
  EXPECT_CONTAINS(formats::error_text<formats::ConfigError>([&] { fit_to(model_, data, true); }),
                  "max_positions is 8, expected at least ");
  EXPECT_EQ(fit_to(model_, data, false).max_positions, data.longest());
  // Nor is a run resumed on examples that have become longer.
  task_.data = folder_ / "text.tsv";
  const auto write_texts = [&](const std::string& last) {
    std::string lines;
    for (int i = 0; i < 40; ++i) lines += std::to_string(i % 2) + "\ttext" + (i == 20 ? last : "") + "\n";
    formats::write_bytes(task_.data, lines);
  };
  task_ = TaskOptions::defaults("text");
  task_.data = folder_ / "text.tsv";
  write_texts("");
  model_.max_positions = 4;
  const RunOptions run{.out = folder_ / "run", .quiet = true};
  options_.steps = 1;
  start_task_run(model_, false, options_, task_, run);
  write_texts(" that is longer");
  options_.steps = 2;
  EXPECT_CONTAINS(formats::error_text<formats::ConfigError>([&] { resume_task_run(options_, run); }),
                  "max_positions is 4, expected at least 19");
}

TEST_F(TaskTrainerTest, DamagedConfigsAreErrors) {
  const TaskData data = load_task(task_);
  TaskTrainer trainer(fit_to(model_, data, false), options_, task_, data);
  trainer.save(folder_ / "good", {});
  const formats::CheckpointFile good(folder_ / "good");
  const auto error = [&](const char* section, const json& change) {
    json config = json::parse(good.config());
    config[section].update(change);
    formats::write_checkpoint(folder_ / "bad", {config.dump(), good.step()}, good.file().tensors());
    return formats::error_text<formats::FormatError>([&] {
      const formats::CheckpointFile bad(folder_ / "bad");
      TaskTrainer(bad, options_, data);
    });
  };
  EXPECT_CONTAINS(error("model", {{"num_layers", 1000}}), "parameters, expected");
  EXPECT_CONTAINS(error("model", {{"norm", "layer"}}), "running_mean");
  EXPECT_CONTAINS(error("task", {{"train", -1}}), "train is -1");
  EXPECT_CONTAINS(error("training", {{"batch", "x"}}), "batch is ");
}

}  // namespace
}  // namespace latte::train
