#include "train/trainer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numbers>
#include <span>
#include <utility>

#include "formats/error.h"
#include "train/autocast.h"

namespace latte::train {
namespace {

// Checked before a model is built from it, so that a damaged one allocates nothing.
formats::LanguageModelConfig checked_config(const formats::CheckpointFile& checkpoint) {
  auto config = TrainingRecord::from(checkpoint).model;
  check_parameter_count(checkpoint.file(), config.parameter_count());
  return config;
}

// What cannot be shared among these ranks.
void check_ranks(const Ranks& ranks, const formats::LanguageModelConfig& model, const TrainerOptions& options) {
  ranks.check_divides(options.batch, options.context);
  if (ranks.sequence_parallel() == 1) return;
  if (model.attention == "softmax") {
    throw OptionError(
        "attention is softmax, which reads every earlier token: --sequence-parallel is for attentions whose past has "
        "a fixed size, latte, macchiato and window");
  }
  if (model.attention == "linear" || model.attention == "gated_linear") {
    throw OptionError("attention is " + model.attention + ", which --sequence-parallel doesn't carry from rank to rank");
  }
  int64_t reach = 1;
  if (model.attention != "latte") reach = std::max({reach, model.window, model.sinks});
  if (model.position_name() == "conv") reach = std::max(reach, model.conv_width - 1);
  const int64_t stretch = options.context / ranks.sequence_parallel();
  if (stretch < reach) {
    throw OptionError("a rank's stretch is " + std::to_string(stretch) + " tokens, expected at least " + std::to_string(reach) +
                      ", which is how far window, sinks or convolution reach: fewer ranks a sequence or a longer context");
  }
}

}  // namespace

Trainer::Trainer(const formats::LanguageModelConfig& model, const TrainerOptions& options, const TextCorpus& corpus, Ranks* ranks)
    : StepTrainer(options, ranks), corpus_(corpus) {
  if (ranks) check_ranks(*ranks, model, options);
  if (model.vocab_size != corpus.vocabulary().size()) {
    throw formats::ConfigError("model config: vocab_size is " + std::to_string(model.vocab_size) + ", expected " +
                               std::to_string(corpus.vocabulary().size()) + ", the text's");
  }
  if (model.position_name() == "learned" && options.context > model.max_positions) {
    throw OptionError("context is " + std::to_string(options.context) + ", expected at most max_positions, " +
                      std::to_string(model.max_positions) + ", with learned positions");
  }
  model_ = models::LanguageModel(model);
  if (ranks) model_->sequence_peers = ranks->sequence_peers();
  train_module(*model_);
  if (Trainer::has_validation()) {
    validation_windows_ = corpus.windows(Split::kValidation, options.context, options.eval_batches * options.batch);
  }
}

Trainer::Trainer(const formats::CheckpointFile& checkpoint, const TrainerOptions& options, const TextCorpus& corpus, Ranks* ranks)
    : Trainer(checked_config(checkpoint), options, corpus, ranks) {
  restore(checkpoint);
}

at::Tensor Trainer::loss_of(const TokenBatch& batch) {
  const AutocastGuard autocast(dtype() == "bfloat16", at::kBFloat16);
  const at::Tensor logits = model_(batch.x);
  return torch::nn::functional::cross_entropy(logits.flatten(0, 1), batch.y.flatten());
}

StepTrainer::Loss Trainer::loss_of_batch(uint64_t index) {
  const auto seed = static_cast<uint64_t>(options().seed);
  TokenBatch batch = corpus_.sample_batch(Split::kTrain, options().batch, options().context, seed, index);
  if (ranks()) batch = ranks()->share(batch);
  return {loss_of(batch), options().batch * options().context};
}

double Trainer::evaluate() { return evaluate(Split::kValidation, validation_windows_); }

nlohmann::json Trainer::evaluate_splits() {
  const auto windows = corpus_.windows(Split::kTest, options().context);
  const double loss = evaluate(Split::kTest, windows);
  nlohmann::json test = {{"loss", loss}, {"tokens", static_cast<int64_t>(windows.size()) * options().context}};
  if (options().tokens == "bytes") test["bits_per_byte"] = loss / std::numbers::ln2;
  return {{"test", test}};
}

double Trainer::evaluate(Split split, std::span<const int64_t> windows) {
  const torch::NoGradGuard no_grad;
  model_->eval();
  const auto all = static_cast<double>(windows.size());
  auto at_once = static_cast<size_t>(options().batch);
  if (ranks()) {
    const auto [first, end] = ranks()->share(static_cast<int64_t>(windows.size()));
    windows = windows.subspan(static_cast<size_t>(first), static_cast<size_t>(end - first));
    at_once = static_cast<size_t>(options().batch / ranks()->data_parallel());
  }
  double total = 0.0;
  for (size_t begin = 0; begin < windows.size() && !stopped(); begin += at_once) {
    const std::span offsets = windows.subspan(begin, std::min(windows.size() - begin, at_once));
    TokenBatch batch = corpus_.batch_at(split, offsets, options().context);
    if (ranks()) batch = ranks()->stretch(batch);
    total += loss_of(batch).item<double>() * static_cast<double>(offsets.size());
  }
  model_->train();
  const double mean = total / all;
  return ranks() ? ranks()->sum({mean})[0] / static_cast<double>(ranks()->sequence_parallel()) : mean;
}

std::string Trainer::record(const Progress& progress) const {
  return TrainingRecord{model_->config(), options(), corpus_.vocabulary(), progress}.to_json();
}

}  // namespace latte::train
