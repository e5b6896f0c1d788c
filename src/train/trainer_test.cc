#include "train/trainer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/test_files.h"
#include "formats/trained_model.h"
#include "train/interrupt.h"
#include "train/metrics.h"
#include "train/run.h"
#include "train/test_checkpoint.h"

namespace latte::train {
namespace {

using formats::TestFolder;

// Three letters in an order that a model learns at once.
std::string pattern_text(int length) {
  std::string text;
  for (int i = 0; i < length; ++i) text += "abcacb"[i % 6];
  return text;
}

class TrainerTest : public ::testing::Test {
 protected:
  TrainerTest() {
    options_.text = folder_ / "text.txt";
    formats::write_bytes(options_.text, pattern_text(3000));
    options_.context = 16;
    options_.batch = 4;
    options_.steps = 8;
    options_.warmup = 2;
    options_.lr = 1e-2;
    options_.min_lr = 1e-3;
    options_.eval_batches = 2;
    options_.dtype = "float32";
    model_.vocab_size = 3;
    model_.num_layers = 2;
    model_.embed_dim = 16;
    model_.num_heads = 2;
    model_.attention = "macchiato";
    model_.window = 4;
  }

  TextCorpus corpus() const { return TextCorpus(options_.text, {.context = options_.context}); }

  TestFolder folder_;
  TrainerOptions options_;
  formats::LanguageModelConfig model_;
};

TEST_F(TrainerTest, ResumesBitForBitWithDropoutAndAccumulation) {
  model_.dropout = 0.2;
  options_.accumulate = 2;
  const TextCorpus text = corpus();
  const std::string whole = folder_ / "whole", half = folder_ / "half", resumed = folder_ / "resumed";
  {
    Trainer trainer(model_, options_, text);
    for (int i = 0; i < 8; ++i) {
      trainer.step();
      if (i == 2 || i == 5) trainer.evaluate();  // which must draw nothing
      if (i == 3) trainer.save(half, {});
    }
    trainer.save(whole, {});
  }
  torch::rand({7});  // a new process has another generator
  Trainer trainer(formats::CheckpointFile(half), options_, text);
  ASSERT_EQ(trainer.steps_done(), 4);
  for (int i = 0; i < 4; ++i) trainer.step();
  trainer.save(resumed, {});
  EXPECT_NE(tensors_of(whole), tensors_of(half));
  EXPECT_EQ(tensors_of(whole), tensors_of(resumed));
}

// Of before decays had a rank: their configuration doesn't name it.
TEST_F(TrainerTest, OldCheckpointsGoOnWithWholeMatricesOfDecays) {
  model_.decay_rank = 0;
  const TextCorpus text = corpus();
  const std::string saved = folder_ / "saved", old = folder_ / "old";
  Trainer(model_, options_, text).save(saved, {});
  const formats::CheckpointFile checkpoint(saved);
  auto config = nlohmann::json::parse(checkpoint.config());
  ASSERT_EQ(config.at("model").erase("decay_rank"), 1);
  const auto& tensors = checkpoint.file().tensors();
  formats::write_checkpoint(old, {config.dump(), checkpoint.step()}, tensors);
  Trainer trainer(formats::CheckpointFile(old), options_, text);
  EXPECT_TRUE(std::isfinite(trainer.step().loss));
  EXPECT_EQ(trainer.model()->config().decay_rank, 0);
  EXPECT_EQ(formats::trained_model(formats::CheckpointFile(old)).config.decay_rank, 0);
}

TEST_F(TrainerTest, LearnsAPatternWithEveryAttention) {
  options_.steps = 120;
  const TextCorpus text = corpus();
  for (const char* attention : {"softmax", "window", "latte", "macchiato"}) {
    model_.attention = attention;
    Trainer trainer(model_, options_, text);
    const double before = trainer.evaluate();
    EXPECT_NEAR(before, std::log(3.0), 0.2) << attention;
    for (int i = 0; i < 120; ++i) trainer.step();
    EXPECT_LT(trainer.evaluate(), 0.2) << attention;
  }
}

// Products round to eight bits, weights and moments don't: the losses of both dtypes stay within a few of bfloat16's roundings.
TEST_F(TrainerTest, MixedPrecisionFollowsFloat32) {
  const TextCorpus text = corpus();
  std::vector<double> losses[2];
  for (const char* dtype : {"float32", "bfloat16"}) {
    options_.dtype = dtype;
    Trainer trainer(model_, options_, text);
    for (int i = 0; i < 8; ++i) losses[trainer.dtype() == "bfloat16" ? 1 : 0].push_back(trainer.step().loss);
    for (const auto& parameter : trainer.model()->parameters()) EXPECT_EQ(parameter.scalar_type(), at::kFloat);
  }
  EXPECT_NE(losses[0], losses[1]);
  for (size_t i = 0; i < 8; ++i) EXPECT_NEAR(losses[1][i], losses[0][i], 4 * 0x1p-8 * losses[0][i]) << i;
}

TEST_F(TrainerTest, AccumulatedBatchesMakeOneGradient) {
  const TextCorpus text = corpus();
  model_.num_layers = 1;
  options_.accumulate = 3;
  Trainer trainer(model_, options_, text);
  std::vector<at::Tensor> sums;
  double loss = 0.0;
  for (uint64_t i = 0; i < 3; ++i) {
    const auto batch = text.sample_batch(Split::kTrain, options_.batch, options_.context, options_.seed, i);
    const auto value = torch::nn::functional::cross_entropy(trainer.model()(batch.x).flatten(0, 1), batch.y.flatten());
    const auto grads = torch::autograd::grad({value}, trainer.model()->parameters(), {}, {}, false, /*allow_unused=*/false);
    for (size_t k = 0; k < grads.size(); ++k) {
      if (i == 0) sums.push_back(at::zeros_like(grads[k]));
      sums[k] += grads[k] / 3;
    }
    loss += value.item<double>() / 3;
  }
  double squares = 0.0;
  for (const auto& sum : sums) squares += sum.pow(2).sum().item<double>();
  const StepResult result = trainer.step();
  EXPECT_NEAR(result.loss, loss, 1e-6 * loss);
  EXPECT_NEAR(result.grad_norm, std::sqrt(squares), 1e-5 * std::sqrt(squares));
}

// arXiv 1711.05101, algorithm 2, in float64.
TEST(AdamWTest, FollowsItsDefinitionAndDecaysMatricesOnly) {
  torch::manual_seed(1);
  const AdamWOptions options{.beta1 = 0.8, .beta2 = 0.9, .eps = 1e-8, .weight_decay = 0.3};
  auto matrix = torch::randn({3, 5}).requires_grad_(), vector = torch::randn({7}).requires_grad_();
  AdamW optimizer({{"matrix", matrix}, {"vector", vector}}, options);
  for (auto* parameter : {&matrix, &vector}) {
    auto expected = parameter->detach().to(at::kDouble).clone();
    auto mean = at::zeros_like(expected), variance = at::zeros_like(expected);
    const double decay = parameter->dim() == 2 ? options.weight_decay : 0.0;
    torch::manual_seed(2);
    optimizer.zero_grad();
    for (int step = 1; step <= 5; ++step) {
      const double lr = 0.1 / step;
      parameter->mutable_grad() = torch::randn(parameter->sizes());
      const auto grad = parameter->grad().to(at::kDouble);
      mean = options.beta1 * mean + (1 - options.beta1) * grad;
      variance = options.beta2 * variance + (1 - options.beta2) * grad * grad;
      const auto corrected = mean / (1 - std::pow(options.beta1, step));
      const auto scale = (variance / (1 - std::pow(options.beta2, step))).sqrt() + options.eps;
      expected = expected - lr * decay * expected - lr * corrected / scale;
      optimizer.step(lr, step);
    }
    const double error = (parameter->detach().to(at::kDouble) - expected).norm().item<double>();
    EXPECT_LE(error, 1e-5 * expected.norm().item<double>());
  }
}

TEST(ScheduleTest, WarmsUpAndFallsByACosine) {
  TrainerOptions options;
  options.lr = 1.0;
  options.min_lr = 0.1;
  options.warmup = 4;
  options.steps = 15;
  EXPECT_DOUBLE_EQ(learning_rate(options, 0), 0.25);
  EXPECT_DOUBLE_EQ(learning_rate(options, 3), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(options, 4), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(options, 9), 0.55);
  EXPECT_DOUBLE_EQ(learning_rate(options, 14), 0.1);
  for (int step = 5; step < 15; ++step) EXPECT_LT(learning_rate(options, step), learning_rate(options, step - 1));
  options.warmup = 0;
  options.steps = 1;
  EXPECT_DOUBLE_EQ(learning_rate(options, 0), 0.1);
  options.warmup = 2;
  EXPECT_DOUBLE_EQ(learning_rate(options, 0), 0.5);
}

TEST(TrainerOptionsTest, SurvivesJsonAndNamesWhatIsWrong) {
  TrainerOptions options;
  options.text = "a.txt";
  options.lr = 0.1 + 0.2;
  EXPECT_EQ(TrainerOptions::from_json(nlohmann::json::parse(options.to_json().dump())), options);
  const auto problem = [](const char* json) {
    return formats::error_text<OptionError>([&] { TrainerOptions::from_json(nlohmann::json::parse(json)); });
  };
  EXPECT_CONTAINS(problem(R"({"stepz": 1})"), "stepz");
  EXPECT_CONTAINS(problem(R"({"steps": "1"})"), "an integer");
  EXPECT_CONTAINS(problem(R"({"steps": 0})"), "steps is 0");
  EXPECT_CONTAINS(problem(R"({"batch": 18446744073709551615})"), "an integer");
  EXPECT_CONTAINS(problem(R"({"batch": 1099511627776})"), "batch");
  EXPECT_CONTAINS(problem(R"({"lr": -1})"), "lr is -1");
  // A sequence may be shared by ranks of which none could hold it.
  const char* long_context = R"({"context": 134217728, "batch": 1})";
  EXPECT_EQ(TrainerOptions::from_json(nlohmann::json::parse(long_context)).tokens_per_step(), int64_t{1} << 27);
  EXPECT_CONTAINS(problem(R"({"context": 134217728, "batch": 65536})"),
                  "with accumulate 1 and context 134217728 more than the 2^40");
  EXPECT_CONTAINS(problem(R"({"context": 2147483648, "batch": 1})"),
                  "context is 2147483648, expected an integer in 1 … 1073741824");
  EXPECT_CONTAINS(problem(R"({"min_lr": 1})"), "min_lr");
  EXPECT_CONTAINS(problem(R"({"tokens": "\n"})"), "tokens");
  EXPECT_CONTAINS(problem("[]"), "a JSON object");
}

TEST_F(TrainerTest, RefusesCheckpointsThatDoNotFit) {
  const TextCorpus text = corpus();
  const std::string path = folder_ / "checkpoint";
  Trainer(model_, options_, text).save(path, {});
  const std::string good = formats::read_bytes(path);
  const formats::CheckpointFile checkpoint(path);
  EXPECT_NO_THROW(load_model(path));

  formats::write_bytes(path + ".cut", good.substr(0, good.size() / 2));
  formats::error_text<formats::FormatError>([&] { load_model(path + ".cut"); });
  std::string damaged = good;
  damaged[damaged.size() - 9] ^= 1;
  formats::write_bytes(path + ".damaged", damaged);
  EXPECT_CONTAINS(formats::error_text<formats::FormatError>([&] { load_model(path + ".damaged"); }), "damaged");

  // Whole files with a wrong content.
  const auto refusal = [&](const std::string& config, const std::vector<formats::TensorView>& tensors) {
    formats::write_checkpoint(path + ".odd", {config, 1}, tensors);
    return formats::error_text<formats::FormatError>([&] { Trainer(formats::CheckpointFile(path + ".odd"), options_, text); });
  };
  const auto& tensors = checkpoint.file().tensors();
  auto config = nlohmann::json::parse(checkpoint.config());
  EXPECT_CONTAINS(refusal("{}", tensors), "config");
  config["model"]["num_layers"] = 4096;
  EXPECT_CONTAINS(refusal(config.dump(), tensors), "parameters");
  config["model"]["num_layers"] = 2;
  config["vocabulary"] = "bytes";
  EXPECT_CONTAINS(refusal(config.dump(), tensors), "vocabulary");
  std::vector<formats::TensorView> fewer;
  for (const auto& tensor : tensors) {
    if (tensor.name != "random.torch") fewer.push_back(tensor);
  }
  EXPECT_CONTAINS(refusal(checkpoint.config(), fewer), "random.torch");
  auto other = tensors;
  const std::string zeros(5056, '\0');
  for (auto& tensor : other) {
    if (tensor.name == "random.torch") tensor.data = std::as_bytes(std::span(zeros)).first(tensor.data.size());
  }
  EXPECT_CONTAINS(refusal(checkpoint.config(), other), "generator");
}

// A disk that is full after `room` bytes.
class FullDisk : public formats::FileOperations {
 public:
  explicit FullDisk(size_t room) : room_(room) {}
  ssize_t write(int fd, const void* data, size_t size) override {
    if (size > room_) return errno = ENOSPC, -1;
    room_ -= size;
    return FileOperations::write(fd, data, size);
  }

 private:
  size_t room_;
};

TEST_F(TrainerTest, AFullDiskLeavesThePreviousCheckpoint) {
  const TextCorpus text = corpus();
  const std::string path = folder_ / "checkpoint";
  Trainer trainer(model_, options_, text);
  trainer.save(path, {});
  const std::string before = formats::read_bytes(path);
  trainer.step();
  for (const size_t room : {size_t{0}, size_t{100}, before.size() / 2}) {
    FullDisk disk(room);
    const auto problem = formats::error_text<formats::FileError>([&] { trainer.save(path, {}, disk); });
    EXPECT_CONTAINS(problem, "No space left on device");
    EXPECT_EQ(formats::read_bytes(path), before);
  }
  EXPECT_EQ(folder_.names(), (std::set<std::string>{"text.txt", "checkpoint"}));
}

TEST_F(TrainerTest, KeepsWeightsWhereTheLossIsNotFinite) {
  const TextCorpus text = corpus();
  Trainer trainer(model_, options_, text);
  {
    const torch::NoGradGuard no_grad;
    trainer.model()->final_norm->weight.fill_(std::numeric_limits<float>::quiet_NaN());
  }
  const auto before = trainer.model()->token_embedding->weight.detach().clone();
  EXPECT_TRUE(std::isnan(trainer.step().loss));
  EXPECT_EQ(trainer.steps_done(), 0);
  EXPECT_TRUE(before.equal(trainer.model()->token_embedding->weight));
}

TEST_F(TrainerTest, ALossThatIsNotFiniteIsAnErrorOfItsOwn) {
  options_.lr = options_.min_lr = 1e30;
  options_.warmup = 0;
  const RunOptions run{.out = folder_ / "run", .quiet = true};
  EXPECT_CONTAINS(formats::error_text<DivergedError>([&] { start_run(model_, options_, run); }), "isn't finite at step");
}

TEST_F(TrainerTest, RunsInAFolderAndResumesThere) {
  RunOptions run{.out = folder_ / "run", .quiet = true};
  options_.eval_every = 2;
  options_.save_every = 3;
  start_run(model_, options_, run);
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { start_run(model_, options_, run); }), "--resume");
  const RunResult ended = resume_run(options_, run);  // which has nothing left to do
  EXPECT_EQ(ended.step, 8);
  EXPECT_FALSE(ended.interrupted);
  EXPECT_EQ(ended.step_seconds, ended.progress.seconds / 8);
  auto other = options_;
  other.lr *= 2;
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { resume_run(other, run); }), "more steps");
  const auto metrics = read_metrics(run.out + "/metrics.jsonl");
  ASSERT_EQ(metrics.size(), 8);
  EXPECT_FALSE(metrics[0].val_loss);
  EXPECT_TRUE(metrics[1].val_loss);

  // A longer run that was killed after step 10 and wrote half of a line.
  options_.steps = 12;
  std::ofstream(run.out + "/metrics.jsonl", std::ios::app) << to_json_line({.step = 9}) << to_json_line({.step = 10}) << "{\"ste";
  formats::write_bytes(run.out + "/.checkpoint.safetensors.1-0.tmp", "half");
  const RunResult result = resume_run(options_, run);
  EXPECT_EQ(result.step, 12);
  const auto resumed = read_metrics(run.out + "/metrics.jsonl");
  ASSERT_EQ(resumed.size(), 12);
  for (size_t i = 0; i < resumed.size(); ++i) EXPECT_EQ(resumed[i].step, static_cast<int64_t>(i) + 1);
  EXPECT_EQ(resumed[7].loss, metrics[7].loss);
  EXPECT_GT(resumed[8].loss, 0.0);
  EXPECT_GT(resumed[11].time, metrics[7].time);
  EXPECT_FALSE(std::filesystem::exists(run.out + "/.checkpoint.safetensors.1-0.tmp"));

  run.overwrite = true;
  EXPECT_EQ(start_run(model_, options_, run).step, 12);
  EXPECT_EQ(read_metrics(run.out + "/metrics.jsonl").size(), 12);
}

TEST_F(TrainerTest, ATextsTestIsOwedUntilItsResultsAreThere) {
  RunOptions run{.out = folder_ / "run", .quiet = true};
  options_.test_fraction = 0.1;
  options_.tokens = "bytes";
  const RunResult result = start_run(model_, options_, run);
  const std::string results = run.out + "/results.json";
  const auto splits = nlohmann::json::parse(formats::read_bytes(results));
  EXPECT_EQ(splits, result.splits);
  // The mean over the test part's whole sequences, read one by one.
  const TextCorpus text(options_.text, {.kind = options_.vocabulary_kind(), .test_fraction = 0.1, .context = 16});
  Trainer trainer(formats::CheckpointFile(result.checkpoint), options_, text);
  trainer.model()->eval();
  const auto windows = text.windows(Split::kTest, 16);
  ASSERT_EQ(windows.size(), 18);  // 300 bytes
  double loss = 0.0;
  for (const int64_t window : windows) {
    const auto batch = text.batch_at(Split::kTest, std::vector<int64_t>{window}, 16);
    loss += torch::nn::functional::cross_entropy(trainer.model()(batch.x)[0], batch.y[0]).item<double>() / 18;
  }
  EXPECT_NEAR(splits.at("test").at("loss").get<double>(), loss, 1e-5);
  EXPECT_NEAR(splits.at("test").at("bits_per_byte").get<double>(), loss / std::log(2.0), 1e-5);
  EXPECT_EQ(splits.at("test").at("tokens"), 18 * 16);

  EXPECT_EQ(resume_run(options_, run).splits, splits);  // it has come to its end, and says with what
  std::filesystem::remove(results);
  const RunResult owed = resume_run(options_, run);
  EXPECT_EQ(owed.splits, splits);
  EXPECT_EQ(owed.loss, result.loss);
  EXPECT_EQ(owed.step_seconds, result.progress.seconds / static_cast<double>(owed.step));  // of what was trained before
  EXPECT_EQ(nlohmann::json::parse(formats::read_bytes(results)), splits);
  // Only with the options that it was trained with, and not cut short.
  std::filesystem::remove(results);
  auto other = options_;
  other.test_fraction = 0.2;
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { resume_run(other, run); }), "owes its results alone");
  {
    const InterruptGuard guard;
    std::raise(SIGINT);
    EXPECT_TRUE(trainer.test().is_null());
  }
  // Another run in its place owes none, and has none.
  options_.test_fraction = 0.0;
  run.overwrite = true;
  start_run(model_, options_, run);
  EXPECT_FALSE(std::filesystem::exists(results));
}

}  // namespace
}  // namespace latte::train
