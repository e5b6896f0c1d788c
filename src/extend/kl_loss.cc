#include "extend/kl_loss.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "kernels/training_rows.h"

namespace latte::extend {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kRows = 256;  // 50 MB of float32 logits for 49,152 tokens of vocabulary

at::Tensor log_probabilities(const at::Tensor& hidden, const OutputHead& head) {
  return at::log_softmax(head.logits(hidden), -1, at::kFloat);
}

// The mean over rows of (1 − share) KL(teacher ‖ student) − share log p(targets). The gradient of each row is known as soon as
// its loss is, so nothing of size [N, V] is kept. Without teacher or targets the other has the whole share.
class RowLoss : public torch::autograd::Function<RowLoss> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& student, const OptionalTensor& teacher,
                            const OptionalTensor& targets, double share, const at::Tensor& weight, double softcap) {
    const OutputHead head{weight, softcap};
    const int64_t count = student.size(0);
    const auto gradient = at::empty_like(student);
    const bool fused = student.device().is_cpu() && (weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16);
    double total = 0.0;
    for (int64_t begin = 0; begin < count; begin += kRows) {
      const int64_t end = std::min(count, begin + kRows);
      auto logits = head.logits(student.slice(0, begin, end));
      const auto slope = softcap > 0 ? (logits / softcap).square_().neg_().add_(1) : at::Tensor();  // of the cap: 1 − tanh²
      const auto teacher_logits = teacher ? head.logits(teacher->slice(0, begin, end)) : at::Tensor();
      const auto rows = targets ? targets->slice(0, begin, end).contiguous() : at::Tensor();
      total += (fused ? losses_in_place : composed_losses)(logits, teacher_logits, rows, share, 1.0 / static_cast<double>(count))
                   .sum(at::kDouble)
                   .item<double>();
      if (slope.defined()) logits.mul_(slope);
      gradient.slice(0, begin, end).copy_(at::matmul(logits.to(weight.scalar_type()), weight));
    }
    ctx->save_for_backward({gradient});
    return at::full({}, total / static_cast<double>(count), student.options().dtype(at::kFloat));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto gradient = ctx->get_saved_variables()[0];
    return {gradient * grads[0].to(gradient.scalar_type()), {}, {}, {}, {}, {}};
  }

 private:
  // The losses [n] of rows of logits [n, V], which become `scale` times the losses' gradient.
  static at::Tensor losses_in_place(at::Tensor& logits, const at::Tensor& teacher, const at::Tensor& targets, double share,
                                    double scale) {
    logits = logits.contiguous();
    const auto taught = teacher.defined() ? teacher.contiguous() : teacher;
    auto losses = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
    kernels::DivergenceRows args{};
    args.dtype = logits.scalar_type() == at::kFloat ? kernels::DType::kFloat32 : kernels::DType::kBFloat16;
    args.n = logits.size(1);
    args.teacher = taught.defined() ? taught.const_data_ptr() : nullptr;
    args.targets = targets.defined() ? targets.const_data_ptr<int64_t>() : nullptr;
    args.share = static_cast<float>(share);
    args.scale = static_cast<float>(scale);
    at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      kernels::DivergenceRowsForward(args, begin, end, logits.mutable_data_ptr(), losses.mutable_data_ptr<float>());
    });
    return losses;
  }

  // The same from torch's operators.
  static at::Tensor composed_losses(at::Tensor& logits, const at::Tensor& teacher, const at::Tensor& targets, double share,
                                    double scale) {
    const double told = !teacher.defined() ? 1.0 : targets.defined() ? share : 0.0;
    const auto log_p = at::log_softmax(logits, -1, logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    auto gradient = log_p.exp();
    auto losses = at::zeros({logits.size(0)}, log_p.options());
    if (teacher.defined()) {
      const auto log_q = at::log_softmax(teacher, -1, log_p.scalar_type());
      const auto q = log_q.exp();
      losses.add_((q * (log_q - log_p)).sum(-1), 1.0 - told);
      gradient.sub_(q, 1.0 - told);
    }
    if (targets.defined()) {
      const auto index = targets.unsqueeze(-1);
      losses.sub_(log_p.gather(-1, index).squeeze(-1), told);
      gradient.scatter_add_(-1, index, at::full({logits.size(0), 1}, -told, log_p.options()));
    }
    logits = gradient.mul_(scale).to(logits.scalar_type());
    return losses;
  }
};

}  // namespace

at::Tensor OutputHead::logits(const at::Tensor& hidden) const {
  const auto logits = at::linear(hidden, weight);
  if (softcap <= 0) return logits;
  const auto wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return logits.to(wide).div_(softcap).tanh_().mul_(softcap);
}

at::Tensor kl_to_teacher(const at::Tensor& student, const at::Tensor& teacher, const OutputHead& head) {
  TORCH_CHECK_VALUE(student.dim() == 2 && student.sizes() == teacher.sizes() && student.size(0) > 0, "[latte.kl_to_teacher] got ",
                    student.sizes(), " and ", teacher.sizes(), ", expected [N, E] twice, N > 0");
  return RowLoss::apply(student, teacher, std::nullopt, 0.0, head.weight, head.softcap);
}

at::Tensor mixed_loss(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& targets, double share,
                      const OutputHead& head) {
  TORCH_CHECK_VALUE(student.dim() == 2 && student.sizes() == teacher.sizes() && targets.dim() == 1 &&
                        student.size(0) == targets.size(0) && student.size(0) > 0,
                    "[latte.mixed_loss] got ", student.sizes(), ", ", teacher.sizes(), " and ", targets.sizes(),
                    ", expected [N, E] twice and [N], N > 0");
  return RowLoss::apply(student, teacher, targets, share, head.weight, head.softcap);
}

at::Tensor next_token_loss(const at::Tensor& student, const at::Tensor& targets, const OutputHead& head) {
  TORCH_CHECK_VALUE(student.dim() == 2 && targets.dim() == 1 && student.size(0) == targets.size(0) && student.size(0) > 0,
                    "[latte.next_token_loss] got ", student.sizes(), " and ", targets.sizes(),
                    ", expected [N, E] and [N], N > 0");
  return RowLoss::apply(student, std::nullopt, targets, 1.0, head.weight, head.softcap);
}

TokenLosses token_losses(const at::Tensor& student, const at::Tensor& targets, const OutputHead& head,
                         const at::Tensor& teacher) {
  const torch::NoGradGuard no_grad;
  std::vector<at::Tensor> next_token, kl;
  for (int64_t begin = 0; begin < student.size(0); begin += kRows) {
    const int64_t end = std::min(student.size(0), begin + kRows);
    const auto log_p = log_probabilities(student.slice(0, begin, end), head);
    next_token.push_back(log_p.gather(-1, targets.slice(0, begin, end).unsqueeze(-1)).neg().squeeze(-1));
    if (!teacher.defined()) continue;
    const auto log_q = log_probabilities(teacher.slice(0, begin, end), head);
    kl.push_back((log_q.exp() * (log_q - log_p)).sum(-1));
  }
  return {at::cat(next_token), kl.empty() ? at::Tensor() : at::cat(kl)};
}

}  // namespace latte::extend
