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
  at::Tensor head = torch::randn({kVocabulary, kEmbed});
  at::Tensor targets = torch::randint(kVocabulary, {kTokens});
};

TEST(KlLoss, EqualsTorchs) {
  torch::manual_seed(1);
  Inputs in;
  const auto log_p = torch::log_softmax(torch::linear(in.student, in.head), -1);
  const auto log_q = torch::log_softmax(torch::linear(in.teacher, in.head), -1);
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
  const auto expected = torch::nn::functional::cross_entropy(torch::linear(in.student, in.head), in.targets);
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
  const auto student = in.student.detach().to(torch::kFloat64).requires_grad_(), head = in.head.to(torch::kFloat64);
  const auto loss = mixed_loss(student, in.teacher.to(torch::kFloat64), in.targets, 0.3, head);
  const auto narrow = mixed_loss(in.student, in.teacher, in.targets, 0.3, in.head);
  EXPECT_TRUE(close(narrow, loss.to(torch::kFloat32)));
  EXPECT_TRUE(
      close(torch::autograd::grad({narrow}, {in.student})[0], torch::autograd::grad({loss}, {student})[0].to(torch::kFloat32)));
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
