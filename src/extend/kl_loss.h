// The loss that brings a converted model back to its original: how far its next-token distributions are from the original's.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace latte::extend {

// What makes logits of hidden states: weight [V, E], and c · tanh(logit / c) of each where `softcap` c is above 0 (Gemma 2).
struct OutputHead {
  at::Tensor weight;
  double softcap = 0.0;

  // [..., E] -> [..., V], of the weight's dtype, or where they are capped float32 at least (rounded in between, one of 30 moves
  // by up to 0.15). Not to be differentiated through.
  at::Tensor logits(const at::Tensor& hidden) const;
};

// The mean over tokens of KL(teacher ‖ student) in nats, with gradients to `student` alone. student and teacher [N, E] are what
// the head reads (the last norm's output), of its weight's dtype. Logits of a few hundred tokens exist at a time, in forward and
// backward alike.
at::Tensor kl_to_teacher(const at::Tensor& student, const at::Tensor& teacher, const OutputHead& head);

// (1 − share) of that and `share` of the next loss, in one pass over the logits.
at::Tensor mixed_loss(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& targets, double share,
                      const OutputHead& head);

// The same for what the text says: the mean of −log p(targets[n]). targets int64 [N].
at::Tensor next_token_loss(const at::Tensor& student, const at::Tensor& targets, const OutputHead& head);

// −log p(targets[n]) and, where `teacher` is defined, KL(teacher ‖ student), of each token: float32 [N] each. No gradients.
struct TokenLosses {
  at::Tensor next_token;
  at::Tensor kl;
};
TokenLosses token_losses(const at::Tensor& student, const at::Tensor& targets, const OutputHead& head,
                         const at::Tensor& teacher = {});

}  // namespace latte::extend
