#include "train/step_trainer.h"

#include <ATen/core/PhiloxRNGEngine.h>

#include <cmath>
#include <limits>
#include <utility>

#include "formats/error.h"
#include "train/interrupt.h"

namespace latte::train {
namespace {

constexpr const char* kGeneratorName = "random.torch";

uint64_t seed_of_step(int64_t seed, int64_t step, int64_t rank) {
  at::Philox4_32 engine(static_cast<uint64_t>(seed), static_cast<uint64_t>(rank), static_cast<uint64_t>(step));
  const uint64_t high = engine();
  return high << 32 | engine();
}

at::Generator default_generator() { return at::detail::getDefaultCPUGenerator(); }

}  // namespace

StepTrainer::StepTrainer(const TrainerOptions& options, Ranks* ranks)
    : ranks_(ranks), options_(options), dtype_(resolve_dtype(options.dtype)) {
  options.validate();
  torch::manual_seed(static_cast<uint64_t>(options.seed));
}

void StepTrainer::train_module(torch::nn::Module& module) {
  module_ = &module;
  module.train();
  AdamW::NamedTensors parameters;
  for (const auto& item : module.named_parameters()) {
    parameters.emplace_back(item.key(), item.value());
    parameters_.push_back(item.value());
  }
  optimizer_.emplace(parameters,
                     AdamWOptions{.beta1 = options_.beta1, .beta2 = options_.beta2, .weight_decay = options_.weight_decay});
}

void StepTrainer::restore(const formats::CheckpointFile& checkpoint) {
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

AdamW::NamedTensors StepTrainer::state() const {
  AdamW::NamedTensors tensors;
  for (const auto& item : module_->named_parameters()) tensors.emplace_back("model." + item.key(), item.value().detach());
  for (const auto& item : module_->named_buffers()) tensors.emplace_back("model." + item.key(), item.value());
  for (const auto& [name, tensor] : optimizer_->state()) tensors.emplace_back("optimizer." + name, tensor);
  return tensors;
}

void StepTrainer::join_ranks() {
  if (!ranks_) return;
  std::vector<at::Tensor> tensors = {at::full({}, steps_done_, at::kLong)};
  for (const auto& [name, tensor] : state()) tensors.push_back(tensor);
  ranks_->broadcast(tensors);
  steps_done_ = tensors[0].item<int64_t>();
  ranks_->watch(parameters_);
}

int64_t StepTrainer::parameter_count() const {
  int64_t count = 0;
  for (const at::Tensor& parameter : parameters_) count += parameter.numel();
  return count;
}

StepResult StepTrainer::step() {
  StepResult result;
  result.lr = learning_rate(options_, steps_done_);
  optimizer_->zero_grad();
  // Dropout's numbers: of their own on each rank, and none of a checkpoint's business.
  if (ranks_ && ranks_->size() > 1) torch::manual_seed(seed_of_step(options_.seed, steps_done_, ranks_->rank()));
  const double share = 1.0 / static_cast<double>(options_.accumulate);
  for (int64_t i = 0; i < options_.accumulate; ++i) {
    const Loss loss =
        loss_of_batch(static_cast<uint64_t>(steps_done_) * static_cast<uint64_t>(options_.accumulate) + static_cast<uint64_t>(i));
    const bool last = i + 1 == options_.accumulate;
    if (ranks_ && last) ranks_->average_gradients(loss.mean);
    (options_.accumulate == 1 ? loss.mean : loss.mean * share).backward();
    if (ranks_ && last) ranks_->gradients_arrived();
    result.loss += loss.mean.item<double>() * share;
    result.tokens += loss.tokens;
  }
  if (ranks_) result.loss = ranks_->sum({result.loss})[0] / static_cast<double>(ranks_->size());
  const double limit = options_.clip > 0 ? options_.clip : std::numeric_limits<double>::infinity();
  result.grad_norm = torch::nn::utils::clip_grad_norm_(parameters_, limit);
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) return result;
  ++steps_done_;
  optimizer_->step(result.lr, steps_done_);
  return result;
}

bool StepTrainer::stopped() {
  if (interruptible_ && InterruptGuard::interrupted()) cut_short_ = true;
  return cut_short_;
}

nlohmann::json StepTrainer::test() {
  // Ranks that share a sequence read it together: none leaves the others alone with it.
  interruptible_ = !ranks_ || ranks_->sequence_parallel() == 1;
  nlohmann::json splits = evaluate_splits();
  interruptible_ = false;
  bool cut_short = std::exchange(cut_short_, false);
  if (ranks_) cut_short = ranks_->any(cut_short);
  return cut_short ? nlohmann::json() : splits;
}

void StepTrainer::save(const std::string& path, const Progress& progress, formats::FileOperations& operations) const {
  AdamW::NamedTensors tensors = state();
  tensors.emplace_back(kGeneratorName, default_generator().get_state());
  std::vector<formats::TensorView> views;
  for (const auto& [name, tensor] : tensors) views.push_back(view_of(name, tensor));
  write_checkpoint(path, {record(progress), steps_done_}, views, operations);
}

}  // namespace latte::train
