#include "extend/kl_loss.h"

#include <gtest/gtest.h>

#include "nn/test_close.h"

namespace latte::extend {
namespace {

using nn::close;

// More rows than are computed at a time.
constexpr int64_t kTokens = 300, kEmbed = 8, kVocabulary = 21;

struct Inputs {
  at::Tensor student = torch::randn({kTokens, kEmbed}).requires_grad_();
  at::Tensor teacher = torch::randn({kTokens, kEmbed});
  OutputHead head{torch::randn({kVocabulary, kEmbed})};
  at::Tensor targets = torch::randint(kVocabulary, {kTokens});
};

TEST(KlLoss, EqualsTorchs) {
  torch::manual_seed(1);
  Inputs in;
  const auto log_p = torch::log_softmax(torch::linear(in.student, in.head.weight), -1);
  const auto log_q = torch::log_softmax(torch::linear(in.teacher, in.head.weight), -1);
  const auto expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean();
  const auto expected_grad = torch::autograd::grad({expected * 3}, {in.student})[0];
  const auto loss = kl_to_teacher(in.student, in.teacher, in.head);
  const auto grad = torch::autograd::grad({loss * 3}, {in.student})[0];
  EXPECT_TRUE(close(loss, expected));
  EXPECT_TRUE(close(grad, expected_grad));
  EXPECT_LT(kl_to_teacher(in.teacher, in.teacher, in.head).item<double>(), 1e-6);
}

TEST(NextTokenLoss, EqualsTorchs) {
  torch::manual_seed(2);
  Inputs in;
  const auto expected = torch::nn::functional::cross_entropy(torch::linear(in.student, in.head.weight), in.targets);
  const auto expected_grad = torch::autograd::grad({expected}, {in.student})[0];
  const auto loss = next_token_loss(in.student, in.targets, in.head);
  EXPECT_TRUE(close(loss, expected));
  EXPECT_TRUE(close(torch::autograd::grad({loss}, {in.student})[0], expected_grad));
}

TEST(MixedLoss, IsTheTwoLossesInTheirShares) {
  torch::manual_seed(4);
  Inputs in;
  const auto expected =
      kl_to_teacher(in.student, in.teacher, in.head) * 0.7 + next_token_loss(in.student, in.targets, in.head) * 0.3;
  const auto expected_grad = torch::autograd::grad({expected}, {in.student})[0];
  const auto loss = mixed_loss(in.student, in.teacher, in.targets, 0.3, in.head);
  EXPECT_TRUE(close(loss, expected));
  EXPECT_TRUE(close(torch::autograd::grad({loss}, {in.student})[0], expected_grad));
  EXPECT_THROW(mixed_loss(in.student, in.teacher, in.targets.slice(0, 1), 0.3, in.head), c10::ValueError);
}

TEST(KlLoss, HasAComposedPath) {
  torch::manual_seed(5);
  Inputs in;
  const auto student = in.student.detach().to(torch::kFloat64).requires_grad_();
  const OutputHead head{in.head.weight.to(torch::kFloat64)};
  const auto loss = mixed_loss(student, in.teacher.to(torch::kFloat64), in.targets, 0.3, head);
  const auto narrow = mixed_loss(in.student, in.teacher, in.targets, 0.3, in.head);
  EXPECT_TRUE(close(narrow, loss.to(torch::kFloat32)));
  EXPECT_TRUE(
      close(torch::autograd::grad({narrow}, {in.student})[0], torch::autograd::grad({loss}, {student})[0].to(torch::kFloat32)));
}

// The definition by torch's operators, in double; the losses in float32 and double against it.
TEST(MixedLoss, CapsLogitsSoftly) {
  torch::manual_seed(6);
  Inputs in;
  constexpr double kCap = 2.0;  // most logits here are well within its bend
  const auto capped = [&](const at::Tensor& hidden, const at::Tensor& weight) {
    return torch::tanh(torch::linear(hidden, weight) / kCap) * kCap;
  };
  const auto student = in.student.detach().to(torch::kFloat64).requires_grad_(), teacher = in.teacher.to(torch::kFloat64);
  const auto weight = in.head.weight.to(torch::kFloat64);
  const auto log_p = torch::log_softmax(capped(student, weight), -1), log_q = torch::log_softmax(capped(teacher, weight), -1);
  const auto kl = (log_q.exp() * (log_q - log_p)).sum(-1);
  const auto next_token = log_p.gather(-1, in.targets.unsqueeze(-1)).neg().squeeze(-1);
  const auto expected = (kl * 0.7 + next_token * 0.3).mean();
  const auto expected_grad = torch::autograd::grad({expected}, {student})[0];

  const auto loss = mixed_loss(student, teacher, in.targets, 0.3, {weight, kCap});
  EXPECT_TRUE(close(loss.to(torch::kFloat64), expected, 1e-6));
  EXPECT_TRUE(close(torch::autograd::grad({loss}, {student})[0], expected_grad));
  const auto narrow = mixed_loss(in.student, in.teacher, in.targets, 0.3, {in.head.weight, kCap});
  EXPECT_TRUE(close(narrow, expected.to(torch::kFloat32)));
  EXPECT_TRUE(close(torch::autograd::grad({narrow}, {in.student})[0], expected_grad.to(torch::kFloat32)));

  const auto half = in.student.detach().to(torch::kBFloat16).requires_grad_();
  const auto coarse =
      mixed_loss(half, in.teacher.to(torch::kBFloat16), in.targets, 0.3, {in.head.weight.to(torch::kBFloat16), kCap});
  EXPECT_TRUE(close(coarse, expected.to(torch::kFloat32), 5e-3));
  EXPECT_TRUE(close(torch::autograd::grad({coarse * kTokens}, {half})[0], expected_grad * kTokens, 2e-2));
  // What bfloat16's products are is capped in float32.
  const OutputHead half_head{in.head.weight.to(torch::kBFloat16), kCap};
  const auto product = torch::linear(half, half_head.weight).detach();
  EXPECT_EQ(OutputHead{half_head.weight}.logits(half.detach()).scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(torch::equal(half_head.logits(half.detach()), torch::tanh(product.to(torch::kFloat32) / kCap) * kCap));

  const auto each = token_losses(student.detach(), in.targets, {weight, kCap}, teacher);
  EXPECT_TRUE(close(each.kl.to(torch::kFloat32), kl.to(torch::kFloat32)));
  EXPECT_TRUE(close(each.next_token.to(torch::kFloat32), next_token.to(torch::kFloat32)));
}

TEST(TokenLosses, AreThoseOfEachToken) {
  torch::manual_seed(3);
  Inputs in;
  const auto losses = token_losses(in.student.detach(), in.targets, in.head, in.teacher);
  EXPECT_EQ(losses.kl.size(0), kTokens);
  EXPECT_TRUE(close(losses.kl.mean(), kl_to_teacher(in.student, in.teacher, in.head)));
  EXPECT_TRUE(close(losses.next_token.mean(), next_token_loss(in.student, in.targets, in.head)));
  EXPECT_FALSE(token_losses(in.teacher, in.targets, in.head).kl.defined());
}

TEST(KlLoss, RefusesShapesThatDiffer) {
  Inputs in;
  EXPECT_THROW(kl_to_teacher(in.student, in.teacher.slice(0, 1), in.head), c10::ValueError);
  EXPECT_THROW(next_token_loss(in.student, in.targets.slice(0, 1), in.head), c10::ValueError);
}

}  // namespace
}  // namespace latte::extend
