#include "extend/kl_loss.h"

#include <algorithm>
#include <functional>

namespace latte::extend {
namespace {

constexpr int64_t kRows = 256;  // 50 MB of float32 logits for 49,152 tokens of vocabulary

at::Tensor log_probabilities(const at::Tensor& hidden, const at::Tensor& head) {
  return at::log_softmax(at::linear(hidden, head), -1, at::kFloat);
}

// Losses that are means over rows: the gradient of each row is known as soon as its loss is, so nothing of size [N, V] is kept.
class RowLoss : public torch::autograd::Function<RowLoss> {
 public:
  // Given the rows [begin, end) and the student's log p there, returns the rows' losses [n] and turns log p into d loss / d
  // logits.
  using Rows = std::function<at::Tensor(int64_t begin, int64_t end, at::Tensor& log_p)>;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& student, const at::Tensor& head,
                            const Rows& rows) {
    const int64_t count = student.size(0);
    const auto gradient = at::empty_like(student);
    double total = 0.0;
    for (int64_t begin = 0; begin < count; begin += kRows) {
      const int64_t end = std::min(count, begin + kRows);
      auto log_p = log_probabilities(student.slice(0, begin, end), head);
      total += rows(begin, end, log_p).sum(at::kDouble).item<double>();
      gradient.slice(0, begin, end).copy_(at::matmul(log_p.mul_(1.0 / static_cast<double>(count)).to(head.scalar_type()), head));
    }
    ctx->save_for_backward({gradient});
    return at::full({}, total / static_cast<double>(count), student.options().dtype(at::kFloat));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto gradient = ctx->get_saved_variables()[0];
    return {gradient * grads[0].to(gradient.scalar_type()), {}, {}};
  }
};

}  // namespace

at::Tensor kl_to_teacher(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& head) {
  TORCH_CHECK_VALUE(student.dim() == 2 && student.sizes() == teacher.sizes() && student.size(0) > 0, "[latte.kl_to_teacher] got ",
                    student.sizes(), " and ", teacher.sizes(), ", expected [N, E] twice, N > 0");
  return RowLoss::apply(student, head, [&](int64_t begin, int64_t end, at::Tensor& log_p) {
    const auto log_q = log_probabilities(teacher.slice(0, begin, end), head);
    const auto q = log_q.exp();
    auto losses = (q * (log_q - log_p)).sum(-1);
    log_p.exp_().sub_(q);
    return losses;
  });
}

at::Tensor next_token_loss(const at::Tensor& student, const at::Tensor& targets, const at::Tensor& head) {
  TORCH_CHECK_VALUE(student.dim() == 2 && targets.dim() == 1 && student.size(0) == targets.size(0) && student.size(0) > 0,
                    "[latte.next_token_loss] got ", student.sizes(), " and ", targets.sizes(),
                    ", expected [N, E] and [N], N > 0");
  return RowLoss::apply(student, head, [&](int64_t begin, int64_t end, at::Tensor& log_p) {
    const auto index = targets.slice(0, begin, end).unsqueeze(-1);
    auto losses = log_p.gather(-1, index).neg().squeeze(-1);
    log_p.exp_().scatter_add_(-1, index, at::full({end - begin, 1}, -1.0, log_p.options()));
    return losses;
  });
}

TokenLosses token_losses(const at::Tensor& student, const at::Tensor& targets, const at::Tensor& head,
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
