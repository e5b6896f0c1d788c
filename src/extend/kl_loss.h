// The loss that brings a converted model back to its original: how far its next-token distributions are from the original's.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace latte::extend {

// The mean over tokens of KL(teacher ‖ student) in nats, with gradients to `student` alone. student and teacher [N, E] are what
// the head reads (the last norm's output), of the head's dtype; head [V, E]. Logits of a few hundred tokens exist at a time, in
// forward and backward alike.
at::Tensor kl_to_teacher(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& head);

// (1 − share) of that and `share` of the next loss, in one pass over the logits.
at::Tensor mixed_loss(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& targets, double share,
                      const at::Tensor& head);

// The same for what the text says: the mean of −log p(targets[n]). targets int64 [N].
at::Tensor next_token_loss(const at::Tensor& student, const at::Tensor& targets, const at::Tensor& head);

// −log p(targets[n]) and, where `teacher` is defined, KL(teacher ‖ student), of each token: float32 [N] each. No gradients.
struct TokenLosses {
  at::Tensor next_token;
  at::Tensor kl;
};
TokenLosses token_losses(const at::Tensor& student, const at::Tensor& targets, const at::Tensor& head,
                         const at::Tensor& teacher = {});

}  // namespace latte::extend
