// What training does to whole rows between its matrix products, one pass forward and one backward: as chains of a framework's
// operators these took as long as the products, for want of memory's speed. Rows are contiguous; arithmetic is float32.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace latte::kernels {

// out[r, :] = x[r, :] / sqrt(mean(x[r, :]²) + epsilon) * weight. x, out [rows, n] and weight [n] of `dtype`; inverse [rows] gets
// 1 / sqrt(…), which the gradient takes.
struct RmsNormRows {
  DType dtype;
  int64_t n;
  const void* x;
  const void* weight;
};
void RmsNormRowsForward(const RmsNormRows& args, float epsilon, int64_t begin, int64_t end, void* out, float* inverse);
// grad_x for grad_out [rows, n]. The weight gets none.
void RmsNormRowsBackward(const RmsNormRows& args, const float* inverse, const void* grad_out, int64_t begin, int64_t end,
                         void* grad_x);

// out = silu(gate) * up, of `count` elements each (Shazeer 2020, arXiv 2002.05202).
struct SwigluRows {
  DType dtype;
  const void* gate;
  const void* up;
};
void SwigluForward(const SwigluRows& args, int64_t begin, int64_t end, void* out);
void SwigluBackward(const SwigluRows& args, const void* grad_out, int64_t begin, int64_t end, void* grad_gate, void* grad_up);

// Of each row of logits [rows, n], n >= 1: the loss (1 − share) KL(softmax(teacher) ‖ softmax(student)) − share ln
// softmax(student)[target], and in place of the student's logits `scale` times its gradient. Without `teacher` (null) share
// counts as 1; without `targets` as 0.
struct DivergenceRows {
  DType dtype;
  int64_t n;
  const void* teacher;
  const int64_t* targets;  // [rows], each in 0 … n − 1
  float share;
  float scale;
};
void DivergenceRowsForward(const DivergenceRows& args, int64_t begin, int64_t end, void* student, float* losses);

}  // namespace latte::kernels
