// What a run leaves behind when the disk or the processor isn't what it was: every write made to fail, and resuming on two
// threads.
#include <ATen/Parallel.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/test_files.h"
#include "train/metrics.h"
#include "train/run.h"
#include "train/task_run.h"
#include "train/test_checkpoint.h"

namespace latte::train {
namespace {

using formats::TestFolder;

std::string pattern_text(int length) {
  std::string text;
  for (int i = 0; i < length; ++i) text += "abcacb"[i * i % 7 % 6];
  return text;
}

// The system's calls, of which one fails, or, as on a disk that is full, all from there on that would take room.
class FailingDisk : public formats::FileOperations {
 public:
  FailingDisk(int64_t failing, int error_number) : failing_(failing), error_number_(error_number) {}

  int open(const char* path, int flags, mode_t mode) override {
    const bool makes = (flags & O_CREAT) != 0;
    if (fails(makes)) return -1;
    const int fd = FileOperations::open(path, flags, mode);
    if (makes) made_.insert(fd);
    return fd;
  }
  ssize_t write(int fd, const void* data, size_t size) override {
    if (!fails(true)) return FileOperations::write(fd, data, size);
    // Half of it got through, as on a disk that fills up.
    if (calls_ == failing_ + 1 && size > 1 && error_number_ == ENOSPC) return FileOperations::write(fd, data, size / 2);
    errno = error_number_;
    return -1;
  }
  int fsync(int fd) override { return fails(false) ? -1 : FileOperations::fsync(fd); }
  int close(int fd) override {
    const int result = FileOperations::close(fd);
    // What was only read, or appended to, has nothing left to lose.
    return made_.erase(fd) > 0 && fails(false) ? -1 : result;
  }
  int rename(const char* from, const char* to) override { return fails(true) ? -1 : FileOperations::rename(from, to); }

  int64_t calls() const { return calls_; }

 private:
  bool fails(bool takes_room) {
    const int64_t call = calls_++;
    const bool failed = call == failing_ || (call > failing_ && error_number_ == ENOSPC && takes_room);
    if (failed) errno = error_number_;
    return failed;
  }

  int64_t failing_, calls_ = 0;
  int error_number_;
  std::set<int> made_;
};

class RecoveryTest : public ::testing::Test {
 protected:
  RecoveryTest() {
    options_.text = folder_ / "text.txt";
    formats::write_bytes(options_.text, pattern_text(3000));
    options_.context = 8;
    options_.batch = 2;
    options_.steps = 4;
    options_.warmup = 1;
    options_.eval_every = 2;
    options_.eval_batches = 1;
    options_.save_every = 2;
    options_.test_fraction = 0.1;
    options_.dtype = "float32";
    model_.vocab_size = 3;
    model_.num_layers = 1;
    model_.embed_dim = 8;
    model_.num_heads = 2;
    model_.attention = "latte";
  }

  // What a run is made of in place of the text, which the options lose.
  std::pair<TaskOptions, models::EncoderConfig> task_and_encoder() {
    options_.text.clear();
    options_.test_fraction = 0.0;
    auto task = TaskOptions::defaults("needle");
    task.length = 8;
    task.train = task.validation = task.test = 8;
    models::EncoderConfig model;
    static_cast<formats::LanguageModelConfig&>(model) = model_;
    model.position = "sinusoidal";
    model.num_outputs = 1;
    return {task, model};
  }

  ~RecoveryTest() override { setenv("PATH", path_.c_str(), 1); }

  const std::string path_ = std::getenv("PATH") == nullptr ? "" : std::getenv("PATH");
  TestFolder folder_;
  TrainerOptions options_;
  formats::LanguageModelConfig model_;
};

TEST_F(RecoveryTest, EveryWriteMayFailAndNothingIsLost) {
  const RunOptions undisturbed{.out = folder_ / "undisturbed", .quiet = true};
  const auto expected_splits = start_run(model_, options_, undisturbed).splits;
  const auto expected = tensors_of(undisturbed.out + "/checkpoint.safetensors");
  for (const int error_number : {ENOSPC, EIO}) {
    int64_t failures = 0;
    for (bool over = false; !over; ++failures) {
      SCOPED_TRACE(std::string(std::strerror(error_number)) + " at call " + std::to_string(failures));
      RunOptions run{.out = folder_ / "run", .quiet = true};
      FailingDisk disk(failures, error_number);
      run.files = &disk;
      std::string problem;
      try {
        start_run(model_, options_, run);
      } catch (const formats::FileError& error) {
        problem = error.what();
        EXPECT_EQ(error.error_number(), error_number);
        EXPECT_TRUE(problem.find('\n') == std::string::npos && problem.starts_with("cannot ")) << problem;
      }
      over = disk.calls() <= failures;
      EXPECT_EQ(problem.empty(), over) << problem;
      run.files = &formats::FileOperations::system();
      const std::string checkpoint = run.out + "/checkpoint.safetensors";
      setenv("PATH", "/nowhere", 1);  // no gnuplot: it takes longer than everything else here
      if (!std::filesystem::exists(checkpoint)) {
        start_run(model_, options_, run);
      } else if (!std::filesystem::exists(run.out + "/results.json")) {
        resume_run(options_, run);
      }
      setenv("PATH", path_.c_str(), 1);
      EXPECT_EQ(tensors_of(checkpoint), expected);
      EXPECT_EQ(nlohmann::json::parse(formats::read_bytes(run.out + "/results.json")), expected_splits);
      const auto metrics = read_metrics(run.out + "/metrics.jsonl");
      ASSERT_EQ(metrics.size(), 4);
      for (const auto& entry : std::filesystem::directory_iterator(run.out)) {
        EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
      }
      std::filesystem::remove_all(run.out);
      if (HasFailure()) return;
    }
    // Three checkpoints, config, metrics with four lines, results and two figures: each opened, written, synced, closed, renamed.
    EXPECT_GT(failures, 50);
  }
}

// The same of a run that goes on from its checkpoint, and rewrites the metrics that came after it.
TEST_F(RecoveryTest, EveryWriteOfAResumedRunMayFailToo) {
  setenv("PATH", "/nowhere", 1);  // no gnuplot: it takes longer than everything else here
  const RunOptions undisturbed{.out = folder_ / "undisturbed", .quiet = true};
  const auto expected_splits = start_run(model_, options_, undisturbed).splits;
  const auto expected = tensors_of(undisturbed.out + "/checkpoint.safetensors");
  // A run that a failing disk has stopped behind its first checkpoint.
  const RunOptions half{.out = folder_ / "half", .quiet = true};
  for (int64_t failing = 0;; ++failing) {
    RunOptions run = half;
    FailingDisk disk(failing, EIO);
    run.files = &disk;
    ASSERT_THROW(start_run(model_, options_, run), formats::FileError) << failing;
    const std::string metrics = run.out + "/metrics.jsonl";
    if (std::filesystem::exists(metrics) && read_metrics(metrics).size() == 3) break;
    std::filesystem::remove_all(run.out);
  }
  for (const int error_number : {ENOSPC, EIO}) {
    int64_t failures = 0;
    for (bool over = false; !over; ++failures) {
      SCOPED_TRACE(std::string(std::strerror(error_number)) + " at call " + std::to_string(failures));
      RunOptions run{.out = folder_ / "run", .quiet = true};
      std::filesystem::copy(half.out, run.out, std::filesystem::copy_options::recursive);
      FailingDisk disk(failures, error_number);
      run.files = &disk;
      bool failed = false;
      try {
        resume_run(options_, run);
      } catch (const formats::FileError& error) {
        failed = true;
        EXPECT_EQ(error.error_number(), error_number);
      }
      over = disk.calls() <= failures;
      EXPECT_EQ(failed, !over);
      run.files = &formats::FileOperations::system();
      const std::string checkpoint = run.out + "/checkpoint.safetensors";
      EXPECT_GE(formats::CheckpointFile(checkpoint).step(), 2);
      if (!std::filesystem::exists(run.out + "/results.json")) resume_run(options_, run);
      EXPECT_EQ(tensors_of(checkpoint), expected);
      EXPECT_EQ(read_metrics(run.out + "/metrics.jsonl").size(), 4U);
      EXPECT_EQ(nlohmann::json::parse(formats::read_bytes(run.out + "/results.json")), expected_splits);
      std::filesystem::remove_all(run.out);
      if (HasFailure()) return;
    }
    EXPECT_GT(failures, 20);
  }
}

// The same of a task, whose examples and results are written as well.
TEST_F(RecoveryTest, EveryWriteOfATasksRunMayFailToo) {
  setenv("PATH", "/nowhere", 1);  // no gnuplot: it takes longer than everything else here
  auto [task, model] = task_and_encoder();
  const RunOptions undisturbed{.out = folder_ / "undisturbed", .quiet = true};
  const auto expected_splits = start_task_run(model, false, options_, task, undisturbed).splits;
  const auto expected = tensors_of(undisturbed.out + "/checkpoint.safetensors");
  for (const int error_number : {ENOSPC, EIO}) {
    int64_t failures = 0;
    std::string problems;  // all of them
    for (bool over = false; !over; ++failures) {
      SCOPED_TRACE(std::string(std::strerror(error_number)) + " at call " + std::to_string(failures));
      RunOptions run{.out = folder_ / "run", .quiet = true};
      task.data = folder_ / "examples";
      FailingDisk disk(failures, error_number);
      run.files = &disk;
      std::string problem;
      try {
        start_task_run(model, false, options_, task, run);
      } catch (const formats::FileError& error) {
        problem = error.what();
        problems += problem;
        EXPECT_EQ(error.error_number(), error_number);
      }
      over = disk.calls() <= failures;
      EXPECT_EQ(problem.empty(), over) << problem;
      run.files = &formats::FileOperations::system();
      const std::string checkpoint = run.out + "/checkpoint.safetensors";
      if (!std::filesystem::exists(checkpoint)) {
        start_task_run(model, false, options_, task, run);
      } else if (!std::filesystem::exists(run.out + "/results.json")) {
        EXPECT_EQ(resume_task_run(options_, run).splits, expected_splits);
      }
      EXPECT_EQ(tensors_of(checkpoint), expected);
      EXPECT_EQ(nlohmann::json::parse(formats::read_bytes(run.out + "/results.json")), expected_splits);
      for (const std::string& folder : {run.out, folder_ / ""}) {
        for (const auto& entry : std::filesystem::directory_iterator(folder)) {
          EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
        }
      }
      std::filesystem::remove_all(run.out);
      std::filesystem::remove(task.data);
      if (HasFailure()) return;
    }
    for (const char* name : {"checkpoint.safetensors", "config.json", "metrics.jsonl", "examples", "results.json"}) {
      EXPECT_CONTAINS(problems, name);
    }
  }
}

// A run that was at its end and is made longer has results of fewer steps, which must not pass for the new ones.
TEST_F(RecoveryTest, EveryWriteOfATasksLongerRunMayFail) {
  setenv("PATH", "/nowhere", 1);  // no gnuplot
  auto [task, model] = task_and_encoder();
  auto half = options_;
  half.steps = 2;
  const RunOptions begun{.out = folder_ / "begun", .quiet = true}, undisturbed{.out = folder_ / "undisturbed", .quiet = true};
  const auto first = start_task_run(model, false, half, task, begun).splits;
  const auto copy = std::filesystem::copy_options::recursive;
  std::filesystem::copy(begun.out, undisturbed.out, copy);
  const auto expected = resume_task_run(options_, undisturbed).splits;
  ASSERT_NE(first, expected);
  int64_t failures = 0;
  for (bool over = false; !over; ++failures) {
    SCOPED_TRACE("at call " + std::to_string(failures));
    RunOptions run{.out = folder_ / "run", .quiet = true};
    std::filesystem::copy(begun.out, run.out, copy);
    FailingDisk disk(failures, EIO);
    run.files = &disk;
    bool failed = false;
    try {
      resume_task_run(options_, run);
    } catch (const formats::FileError&) {
      failed = true;
    }
    over = disk.calls() <= failures;
    EXPECT_EQ(failed, !over);
    run.files = &formats::FileOperations::system();
    const std::string checkpoint = run.out + "/checkpoint.safetensors", results = run.out + "/results.json";
    if (formats::CheckpointFile(checkpoint).step() < options_.steps || !std::filesystem::exists(results)) {
      resume_task_run(options_, run);
    }
    EXPECT_EQ(nlohmann::json::parse(formats::read_bytes(results)), expected);
    std::filesystem::remove_all(run.out);
    if (HasFailure()) return;
  }
  EXPECT_GT(failures, 10);
}

// Products that torch and oneDNN split among threads, 2^20 multiplications and more.
TEST_F(RecoveryTest, ResumesBitForBitOnTwoThreadsWithLargeProducts) {
  const int threads = at::get_num_threads();
  at::set_num_threads(2);
  model_.embed_dim = 128;
  model_.num_heads = 4;
  model_.dropout = 0.1;
  options_.context = 64;
  options_.batch = 8;                    // 512 tokens × 128 × 512: 2^25
  options_.lr = options_.min_lr = 1e-3;  // the same rate whatever --steps says
  options_.warmup = 0;
  for (const std::string dtype : {"float32", "bfloat16"}) {
    options_.dtype = dtype;
    const RunOptions whole{.out = folder_ / ("whole-" + dtype), .quiet = true}, pieces{.out = folder_ / dtype, .quiet = true};
    start_run(model_, options_, whole);
    auto half = options_;
    half.steps = 2;
    start_run(model_, half, pieces);
    resume_run(options_, pieces);
    EXPECT_EQ(tensors_of(pieces.out + "/checkpoint.safetensors"), tensors_of(whole.out + "/checkpoint.safetensors")) << dtype;
  }
  at::set_num_threads(threads);
}

}  // namespace
}  // namespace latte::train
