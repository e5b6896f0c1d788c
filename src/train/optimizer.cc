#include "train/optimizer.h"

#include <torch/torch.h>

namespace latte::train {

AdamW::AdamW(const NamedTensors& parameters, const AdamWOptions& options) : options_(options) {
  groups_[0].weight_decay = options.weight_decay;
  for (const auto& [name, parameter] : parameters) {
    Group& group = groups_[parameter.dim() >= 2 ? 0 : 1];
    group.names.push_back(name);
    group.parameters.push_back(parameter);
    group.exp_avgs.push_back(at::zeros_like(parameter));
    group.exp_avg_sqs.push_back(at::zeros_like(parameter));
  }
}

void AdamW::step(double lr, int64_t step) {
  const torch::NoGradGuard no_grad;
  // The operator reads the step and doesn't advance it.
  const auto count = at::full({}, static_cast<double>(step), at::kFloat);
  for (Group& group : groups_) {
    std::vector<at::Tensor> parameters, grads, exp_avgs, exp_avg_sqs;
    for (size_t i = 0; i < group.parameters.size(); ++i) {
      if (!group.parameters[i].grad().defined()) continue;
      parameters.push_back(group.parameters[i]);
      grads.push_back(group.parameters[i].grad());
      exp_avgs.push_back(group.exp_avgs[i]);
      exp_avg_sqs.push_back(group.exp_avg_sqs[i]);
    }
    if (parameters.empty()) continue;
    const std::vector<at::Tensor> steps(parameters.size(), count);
    at::_fused_adamw_(parameters, grads, exp_avgs, exp_avg_sqs, {}, steps, lr, options_.beta1, options_.beta2, group.weight_decay,
                      options_.eps, /*amsgrad=*/false, /*maximize=*/false);
  }
}

void AdamW::zero_grad() {
  for (Group& group : groups_) {
    for (at::Tensor& parameter : group.parameters) parameter.mutable_grad() = at::Tensor();
  }
}

AdamW::NamedTensors AdamW::state() const {
  NamedTensors tensors;
  for (const Group& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      tensors.emplace_back("exp_avg." + group.names[i], group.exp_avgs[i]);
      tensors.emplace_back("exp_avg_sq." + group.names[i], group.exp_avg_sqs[i]);
    }
  }
  return tensors;
}

}  // namespace latte::train
