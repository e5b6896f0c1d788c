#include "train/trainer.h"

#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "formats/error.h"

namespace latte::train {
namespace {

constexpr const char* kGeneratorName = "random.torch";

// torch.autocast("cpu", dtype) of Python.
class AutocastGuard {
 public:
  AutocastGuard(bool enabled, at::ScalarType dtype)
      : enabled_(at::autocast::is_autocast_enabled(at::kCPU)), dtype_(at::autocast::get_autocast_dtype(at::kCPU)) {
    at::autocast::set_autocast_enabled(at::kCPU, enabled);
    at::autocast::set_autocast_dtype(at::kCPU, dtype);
    at::autocast::increment_nesting();
  }
  ~AutocastGuard() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, enabled_);
    at::autocast::set_autocast_dtype(at::kCPU, dtype_);
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  bool enabled_;
  at::ScalarType dtype_;
};

AdamW::NamedTensors named_parameters(const models::LanguageModel& model) {
  AdamW::NamedTensors parameters;
  for (const auto& item : model->named_parameters()) parameters.emplace_back(item.key(), item.value());
  return parameters;
}

// Checked before a model is built from it, so that a damaged one allocates nothing.
models::LanguageModelConfig checked_config(const formats::CheckpointFile& checkpoint) {
  const auto config = TrainingRecord::from(checkpoint).model;
  check_parameter_count(checkpoint.file(), config);
  return config;
}

at::Generator default_generator() { return at::detail::getDefaultCPUGenerator(); }

}  // namespace

Trainer::Trainer(const models::LanguageModelConfig& model, const TrainerOptions& options, const TextCorpus& corpus)
    : corpus_(corpus), options_(options), dtype_(resolve_dtype(options.dtype)) {
  options.validate();
  if (model.vocab_size != corpus.vocabulary().size()) {
    throw models::ConfigError("model config: vocab_size is " + std::to_string(model.vocab_size) + ", expected " +
                              std::to_string(corpus.vocabulary().size()) + ", the text's");
  }
  if (model.position_name() == "learned" && options.context > model.max_positions) {
    throw OptionError("context is " + std::to_string(options.context) + ", expected at most max_positions, " +
                      std::to_string(model.max_positions) + ", with learned positions");
  }
  torch::manual_seed(static_cast<uint64_t>(options.seed));
  model_ = models::LanguageModel(model);
  model_->train();
  const AdamW::NamedTensors parameters = named_parameters(model_);
  for (const auto& [name, parameter] : parameters) parameters_.push_back(parameter);
  optimizer_.emplace(parameters,
                     AdamWOptions{.beta1 = options.beta1, .beta2 = options.beta2, .weight_decay = options.weight_decay});
  if (has_validation()) {
    validation_windows_ = corpus.windows(Split::kValidation, options.context, options.eval_batches * options.batch);
  }
}

Trainer::Trainer(const formats::CheckpointFile& checkpoint, const TrainerOptions& options, const TextCorpus& corpus)
    : Trainer(checked_config(checkpoint), options, corpus) {
  const formats::SafetensorsFile& file = checkpoint.file();
  at::Tensor generator_state = default_generator().get_state();
  AdamW::NamedTensors tensors = state();
  tensors.emplace_back(kGeneratorName, generator_state);
  std::vector<formats::TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) specs.push_back(view_of(name, tensor));
  file.require(specs);
  for (const auto& [name, tensor] : tensors) copy_from(file, name, tensor);
  try {
    default_generator().set_state(generator_state);
  } catch (const c10::Error& error) {
    throw formats::FormatError(file.path(), std::string(kGeneratorName) + " is no state of torch's generator");
  }
  steps_done_ = checkpoint.step();
}

AdamW::NamedTensors Trainer::state() const {
  AdamW::NamedTensors tensors;
  for (const auto& [name, parameter] : named_parameters(model_)) tensors.emplace_back("model." + name, parameter.detach());
  for (const auto& [name, tensor] : optimizer_->state()) tensors.emplace_back("optimizer." + name, tensor);
  return tensors;
}

at::Tensor Trainer::loss_of(const TokenBatch& batch) {
  const AutocastGuard autocast(dtype_ == "bfloat16", at::kBFloat16);
  const at::Tensor logits = model_(batch.x);
  return torch::nn::functional::cross_entropy(logits.flatten(0, 1), batch.y.flatten());
}

StepResult Trainer::step() {
  StepResult result;
  result.lr = learning_rate(options_, steps_done_);
  optimizer_->zero_grad();
  const double share = 1.0 / static_cast<double>(options_.accumulate);
  for (int64_t i = 0; i < options_.accumulate; ++i) {
    const auto index = static_cast<uint64_t>(steps_done_) * static_cast<uint64_t>(options_.accumulate) + static_cast<uint64_t>(i);
    const at::Tensor loss = loss_of(
        corpus_.sample_batch(Split::kTrain, options_.batch, options_.context, static_cast<uint64_t>(options_.seed), index));
    (options_.accumulate == 1 ? loss : loss * share).backward();
    result.loss += loss.item<double>() * share;
  }
  const double limit = options_.clip > 0 ? options_.clip : std::numeric_limits<double>::infinity();
  result.grad_norm = torch::nn::utils::clip_grad_norm_(parameters_, limit);
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) return result;
  ++steps_done_;
  optimizer_->step(result.lr, steps_done_);
  return result;
}

double Trainer::evaluate() {
  const torch::NoGradGuard no_grad;
  model_->eval();
  double total = 0.0;
  for (size_t begin = 0; begin < validation_windows_.size(); begin += static_cast<size_t>(options_.batch)) {
    const size_t count = std::min(validation_windows_.size() - begin, static_cast<size_t>(options_.batch));
    const std::span offsets = std::span(validation_windows_).subspan(begin, count);
    total += loss_of(corpus_.batch_at(Split::kValidation, offsets, options_.context)).item<double>() * static_cast<double>(count);
  }
  model_->train();
  return total / static_cast<double>(validation_windows_.size());
}

void Trainer::save(const std::string& path, const Progress& progress, formats::FileOperations& operations) const {
  AdamW::NamedTensors tensors = state();
  tensors.emplace_back(kGeneratorName, default_generator().get_state());
  std::vector<formats::TensorView> views;
  for (const auto& [name, tensor] : tensors) views.push_back(view_of(name, tensor));
  const TrainingRecord record{model_->config(), options_, corpus_.vocabulary(), progress};
  write_checkpoint(path, {record.to_json(), steps_done_}, views, operations);
}

}  // namespace latte::train
