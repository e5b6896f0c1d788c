#include "train/trainer.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/PhiloxRNGEngine.h>

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

// What cannot be shared among these ranks.
void check_ranks(const Ranks& ranks, const models::LanguageModelConfig& model, const TrainerOptions& options) {
  ranks.check_divides(options.batch, options.context);
  if (ranks.sequence_parallel() == 1) return;
  if (model.attention == "softmax") {
    throw OptionError(
        "attention is softmax, which reads every earlier token: --sequence-parallel is for attentions whose past has "
        "a fixed size, latte, macchiato and window");
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

uint64_t seed_of_step(int64_t seed, int64_t step, int64_t rank) {
  at::Philox4_32 engine(static_cast<uint64_t>(seed), static_cast<uint64_t>(rank), static_cast<uint64_t>(step));
  const uint64_t high = engine();
  return high << 32 | engine();
}

at::Generator default_generator() { return at::detail::getDefaultCPUGenerator(); }

}  // namespace

Trainer::Trainer(const models::LanguageModelConfig& model, const TrainerOptions& options, const TextCorpus& corpus, Ranks* ranks)
    : corpus_(corpus), ranks_(ranks), options_(options), dtype_(resolve_dtype(options.dtype)) {
  options.validate();
  if (ranks_) check_ranks(*ranks_, model, options);
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
  if (ranks_) model_->sequence_peers = ranks_->sequence_peers();
  model_->train();
  const AdamW::NamedTensors parameters = named_parameters(model_);
  for (const auto& [name, parameter] : parameters) parameters_.push_back(parameter);
  optimizer_.emplace(parameters,
                     AdamWOptions{.beta1 = options.beta1, .beta2 = options.beta2, .weight_decay = options.weight_decay});
  if (has_validation()) {
    validation_windows_ = corpus.windows(Split::kValidation, options.context, options.eval_batches * options.batch);
  }
}

Trainer::Trainer(const formats::CheckpointFile& checkpoint, const TrainerOptions& options, const TextCorpus& corpus, Ranks* ranks)
    : Trainer(checked_config(checkpoint), options, corpus, ranks) {
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

void Trainer::join_ranks() {
  if (!ranks_) return;
  std::vector<at::Tensor> tensors = {at::full({}, steps_done_, at::kLong)};
  for (const auto& [name, tensor] : state()) tensors.push_back(tensor);
  ranks_->broadcast(tensors);
  steps_done_ = tensors[0].item<int64_t>();
  ranks_->watch(parameters_);
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
  // Dropout's numbers: of their own on each rank, and none of a checkpoint's business.
  if (ranks_ && ranks_->size() > 1) torch::manual_seed(seed_of_step(options_.seed, steps_done_, ranks_->rank()));
  const double share = 1.0 / static_cast<double>(options_.accumulate);
  for (int64_t i = 0; i < options_.accumulate; ++i) {
    const auto index = static_cast<uint64_t>(steps_done_) * static_cast<uint64_t>(options_.accumulate) + static_cast<uint64_t>(i);
    TokenBatch batch =
        corpus_.sample_batch(Split::kTrain, options_.batch, options_.context, static_cast<uint64_t>(options_.seed), index);
    if (ranks_) batch = ranks_->share(batch);
    const at::Tensor loss = loss_of(batch);
    const bool last = i + 1 == options_.accumulate;
    if (ranks_ && last) ranks_->average_gradients(loss);
    (options_.accumulate == 1 ? loss : loss * share).backward();
    if (ranks_ && last) ranks_->gradients_arrived();
    result.loss += loss.item<double>() * share;
  }
  if (ranks_) result.loss = ranks_->sum({result.loss})[0] / static_cast<double>(ranks_->size());
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
  std::span<const int64_t> windows = validation_windows_;
  auto at_once = static_cast<size_t>(options_.batch);
  if (ranks_) {
    const auto [first, end] = ranks_->share(static_cast<int64_t>(windows.size()));
    windows = windows.subspan(static_cast<size_t>(first), static_cast<size_t>(end - first));
    at_once = static_cast<size_t>(options_.batch / ranks_->data_parallel());
  }
  double total = 0.0;
  for (size_t begin = 0; begin < windows.size(); begin += at_once) {
    const std::span offsets = windows.subspan(begin, std::min(windows.size() - begin, at_once));
    TokenBatch batch = corpus_.batch_at(Split::kValidation, offsets, options_.context);
    if (ranks_) batch = ranks_->stretch(batch);
    total += loss_of(batch).item<double>() * static_cast<double>(offsets.size());
  }
  model_->train();
  const double mean = total / static_cast<double>(validation_windows_.size());
  return ranks_ ? ranks_->sum({mean})[0] / static_cast<double>(ranks_->sequence_parallel()) : mean;
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
