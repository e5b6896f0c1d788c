#include "train/task_trainer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <span>
#include <utility>

#include "formats/error.h"
#include "train/autocast.h"

namespace latte::train {
namespace {

using nlohmann::json;

constexpr uint64_t kMaskStride = 0x9E3779B97F4A7C15;  // a batch's masks have nothing to do with the next one's

// evaluate()'s: enough for a mean whose error is a sixteenth of what examples differ by.
constexpr int64_t kPooledExamples = 256;

// While it lives, a batch norm has the statistics of `rows` [N, E] in place of those that followed training. These lag some steps
// behind the weights, which move what all examples have in common by more than the examples differ: of an encoder that got 72%
// right on the training set they made 57%.
class MeasuredStatistics {
 public:
  MeasuredStatistics(nn::Norm norm, const at::Tensor& rows)
      : norm_(std::move(norm)), mean_(norm_->running_mean.clone()), variance_(norm_->running_var.clone()) {
    if (rows.size(0) < 2) return;  // no variance to measure
    norm_->running_mean.copy_(rows.mean(0));
    norm_->running_var.copy_(rows.var(0));
  }
  ~MeasuredStatistics() {
    norm_->running_mean.copy_(mean_);
    norm_->running_var.copy_(variance_);
  }
  MeasuredStatistics(const MeasuredStatistics&) = delete;
  MeasuredStatistics& operator=(const MeasuredStatistics&) = delete;

 private:
  nn::Norm norm_;
  at::Tensor mean_, variance_;
};

void check_ranks(const Ranks& ranks, const TrainerOptions& options) {
  if (ranks.sequence_parallel() > 1) {
    throw OptionError("--sequence-parallel is " + std::to_string(ranks.sequence_parallel()) +
                      ", expected 1 with a task: its sequences are read whole, and ranks share its batches");
  }
  ranks.check_divides(options.batch, 1);
}

models::EncoderConfig checked_config(const formats::CheckpointFile& checkpoint) {
  auto config = TaskRecord::from(checkpoint).model;
  check_parameter_count(checkpoint.file(), config.parameter_count());
  return config;
}

}  // namespace

std::string TaskRecord::to_json() const {
  const json object = {
      {"model", model.to_json()}, {"training", options.to_json()}, {"task", task.to_json()}, {"progress", progress.to_json()}};
  // A path on the command line may be any bytes.
  return object.dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace);
}

TaskRecord TaskRecord::from(const formats::CheckpointFile& checkpoint) {
  return from_json(checkpoint.file().path(), checkpoint.config());
}

TaskRecord TaskRecord::from_json(const std::string& path, const std::string& config) {
  TaskRecord record;
  try {
    const json object = json::parse(config);
    record.model = models::EncoderConfig::from_json(formats::saved_model_config(object.at("model")));
    record.options = TrainerOptions::from_json(object.at("training"));
    record.task = TaskOptions::from_json(object.at("task"));
    record.progress = Progress::from_json(object.at("progress"));
  } catch (const json::exception&) {
    throw formats::FormatError(path, "config isn't one of latte train --task: " + formats::quote(config));
  } catch (const std::invalid_argument& error) {
    throw formats::FormatError(path, error.what());
  }
  return record;
}

void check_reach(const models::EncoderConfig& model, const TaskData& data) {
  const int64_t longest = data.longest();
  const bool bounded = model.position_name() == "learned" || model.attention == "linformer";
  if (bounded && longest > model.max_positions) {
    throw formats::ConfigError("model config: max_positions is " + std::to_string(model.max_positions) + ", expected at least " +
                               std::to_string(longest) + ", the tokens of task " + data.name + "'s longest sequence");
  }
}

models::EncoderConfig fit_to(models::EncoderConfig model, const TaskData& data, bool max_positions_given) {
  model.vocab_size = data.vocab_size;
  model.num_outputs = data.num_classes;
  model.head = to_string(data.kind);
  if (!max_positions_given) model.max_positions = std::max<int64_t>(data.longest(), 1);
  check_reach(model, data);
  model.validate();
  return model;
}

TaskTrainer::TaskTrainer(const models::EncoderConfig& model, const TrainerOptions& options, const TaskOptions& task,
                         const TaskData& data, Ranks* ranks)
    : StepTrainer(options, ranks),
      data_(data),
      task_(task),
      order_(data.examples(data.splits.at("train")), static_cast<uint64_t>(options.seed)) {
  if (model.vocab_size != data.vocab_size || model.num_outputs != data.num_classes || model.head != to_string(data.kind)) {
    throw formats::ConfigError("model config: made for another task than " + data.name);
  }
  if (ranks) check_ranks(*ranks, options);
  // Of a pair two rows are pooled.
  if (model.pooled_norm == "batch" && model.head != "pairs" && options.batch < 2) {
    throw OptionError("batch is " + std::to_string(options.batch) + ", expected at least 2 with pooled_norm batch");
  }
  model_ = models::Encoder(model);
  if (ranks) model_->set_batch_peers(ranks->batch_peers());
  train_module(*model_);
}

TaskTrainer::TaskTrainer(const formats::CheckpointFile& checkpoint, const TrainerOptions& options, const TaskData& data,
                         Ranks* ranks)
    : TaskTrainer(checked_config(checkpoint), options, TaskRecord::from(checkpoint).task, data, ranks) {
  restore(checkpoint);
}

TaskTrainer::Answers TaskTrainer::answer(const TaskBatch& batch, bool count_right) {
  const AutocastGuard autocast(dtype() == "bfloat16", at::kBFloat16);
  Answers answers;
  auto logits = model_(batch.tokens, batch.padding), targets = batch.targets;
  if (data_.kind == TaskKind::kTokens) {
    // Few tokens are asked for: the others' logits needn't be normalised.
    const auto asked = targets.flatten().ne(kNoTarget).nonzero().squeeze(1);
    logits = logits.flatten(0, 1).index_select(0, asked);
    targets = targets.flatten().index_select(0, asked);
  }
  answers.count = targets.size(0);
  answers.loss = answers.count > 0 ? torch::nn::functional::cross_entropy(logits, targets) : logits.sum() * 0;
  if (count_right) answers.right = logits.argmax(-1).eq(targets).sum().item<int64_t>();
  return answers;
}

std::vector<int64_t> TaskTrainer::share(const std::vector<int64_t>& examples) const {
  if (!ranks()) return examples;
  const auto [first, end] = ranks()->share(static_cast<int64_t>(examples.size()));
  return {examples.begin() + first, examples.begin() + end};
}

int64_t TaskTrainer::batch_at_once() const { return ranks() ? options().batch / ranks()->data_parallel() : options().batch; }

StepTrainer::Loss TaskTrainer::loss_of_batch(uint64_t index) {
  const auto examples = order_.take(static_cast<int64_t>(index) * options().batch, options().batch);
  const TaskBatch batch =
      data_.batch(data_.splits.at("train"), share(examples), static_cast<uint64_t>(options().seed) + (index + 1) * kMaskStride);
  const Answers answers = answer(batch, /*count_right=*/false);
  if (!ranks()) return {answers.loss, batch.real_tokens};
  // The mean over all ranks' answers, of which each may have another number.
  const auto all = ranks()->sum({static_cast<double>(answers.count), static_cast<double>(batch.real_tokens)});
  const double weight = static_cast<double>(answers.count * ranks()->size()) / std::max(all[0], 1.0);
  return {answers.loss * weight, static_cast<int64_t>(all[1])};
}

TaskTrainer::Answers TaskTrainer::answer_in_stretches(const TaskExamples& split, const std::vector<int64_t>& examples) {
  std::vector<int64_t> rows, begins, owners;  // of each stretch: its example, where it begins, which of `examples` that is
  for (size_t i = 0; i < examples.size(); ++i) {
    for (const int64_t begin : data_.stretches(split, examples[i])) {
      rows.push_back(examples[i]);
      begins.push_back(begin);
      owners.push_back(static_cast<int64_t>(i));
    }
  }
  const auto all = static_cast<int64_t>(examples.size());
  auto sums = torch::zeros({all, data_.num_classes}), stretches = torch::zeros({all, 1});
  auto targets = torch::zeros({all}, torch::kInt64);
  const auto at_once = static_cast<size_t>(batch_at_once());
  for (size_t first = 0; first < rows.size() && !stopped(); first += at_once) {
    const size_t count = std::min(rows.size() - first, at_once);
    const TaskBatch batch =
        data_.batch(split, std::span(rows).subspan(first, count), 0, std::span<const int64_t>(begins).subspan(first, count));
    at::Tensor logits;
    {
      const AutocastGuard autocast(dtype() == "bfloat16", at::kBFloat16);
      logits = model_(batch.tokens, batch.padding);
    }
    const auto owner = torch::tensor(std::vector<int64_t>(owners.begin() + static_cast<std::ptrdiff_t>(first),
                                                          owners.begin() + static_cast<std::ptrdiff_t>(first + count)));
    sums.index_add_(0, owner, logits.to(torch::kFloat32).log_softmax(-1));
    stretches.index_add_(0, owner, torch::ones({static_cast<int64_t>(count), 1}));
    targets.index_put_({owner}, batch.targets);
  }
  const auto means = sums / stretches;
  return {.loss = torch::nn::functional::cross_entropy(means, targets),
          .count = all,
          .right = means.argmax(-1).eq(targets).sum().item<int64_t>()};
}

at::Tensor TaskTrainer::pooled_examples() {
  const AutocastGuard autocast(dtype() == "bfloat16", at::kBFloat16);
  const TaskExamples& train = data_.splits.at("train");
  const int64_t all = data_.examples(train), count = std::min(all, kPooledExamples);
  std::vector<at::Tensor> pooled;
  for (int64_t begin = 0; begin < count; begin += batch_at_once()) {
    std::vector<int64_t> examples;
    for (int64_t i = begin; i < std::min(count, begin + batch_at_once()); ++i) {
      examples.push_back(static_cast<int64_t>(static_cast<__int128>(i) * all / count));
    }
    const TaskBatch batch = data_.batch(train, examples);
    pooled.push_back(model_->pooled(batch.tokens, batch.padding).to(torch::kFloat32));
  }
  return torch::cat(pooled);
}

Evaluation TaskTrainer::evaluate(const TaskExamples& split, const std::vector<int64_t>& all) {
  const torch::NoGradGuard no_grad;
  model_->eval();
  std::optional<MeasuredStatistics> measured;
  if (model_->pooled_norm) measured.emplace(model_->pooled_norm, pooled_examples());
  const std::vector<int64_t> examples = share(all);
  std::vector<double> sums(3);  // loss, answers, right ones
  const auto add = [&](const Answers& answers) {
    sums[0] += answers.total();
    sums[1] += static_cast<double>(answers.count);
    sums[2] += static_cast<double>(answers.right);
  };
  if (data_.crop > 0) {
    if (!examples.empty()) add(answer_in_stretches(split, examples));
  } else {
    const auto at_once = static_cast<size_t>(batch_at_once());
    for (size_t begin = 0; begin < examples.size() && !stopped(); begin += at_once) {
      const size_t end = std::min(examples.size(), begin + at_once);
      add(answer(data_.batch(split, std::span(examples).subspan(begin, end - begin)), /*count_right=*/true));
    }
  }
  model_->train();
  if (ranks()) sums = ranks()->sum(sums);
  const double count = std::max(sums[1], 1.0);
  return {.loss = sums[0] / count, .accuracy = sums[2] / count};
}

json TaskTrainer::evaluate_splits() {
  json splits = json::object();
  for (const auto& [name, split] : data_.splits) {
    if (name == "train") continue;
    const Evaluation evaluation = evaluate(split);
    splits[name] = {{"loss", evaluation.loss},
                    {"accuracy", *evaluation.accuracy},
                    {"examples", data_.examples(split)},
                    {"majority", data_.majority_share(split)}};
  }
  return splits;
}

Evaluation TaskTrainer::validate() {
  const TaskExamples& split = data_.splits.at("validation");
  const int64_t all = data_.examples(split), count = std::min(all, options().eval_batches * options().batch);
  std::vector<int64_t> examples(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    examples[static_cast<size_t>(i)] = static_cast<int64_t>(static_cast<__int128>(i) * all / count);
  }
  return evaluate(split, examples);
}

Evaluation TaskTrainer::evaluate(const TaskExamples& split) {
  std::vector<int64_t> examples(static_cast<size_t>(data_.examples(split)));
  std::iota(examples.begin(), examples.end(), int64_t{0});
  return evaluate(split, examples);
}

std::string TaskTrainer::record(const Progress& progress) const {
  return TaskRecord{model_->config(), options(), task_, progress}.to_json();
}

}  // namespace latte::train
