// AdamW by torch's fused operator, which makes one pass over the parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

namespace latte::train {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.99;
  double eps = 1e-8;
  double weight_decay = 0.1;  // decoupled (arXiv 1711.05101); of parameters with two dimensions or more
};

class AdamW {
 public:
  using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

  // `parameters` are leaves that require gradients, contiguous. Their moments start at zero.
  AdamW(const NamedTensors& parameters, const AdamWOptions& options);

  // One update from the parameters' gradients; those without one stay as they are. `step` counts from 1.
  void step(double lr, int64_t step);
  // Frees the gradients.
  void zero_grad();

  // "exp_avg.NAME" and "exp_avg_sq.NAME" of each parameter: with the step, all there is to save.
  NamedTensors state() const;

 private:
  struct Group {
    double weight_decay = 0.0;
    std::vector<std::string> names;
    std::vector<at::Tensor> parameters, exp_avgs, exp_avg_sqs;
  };

  AdamWOptions options_;
  Group groups_[2];
};

}  // namespace latte::train
