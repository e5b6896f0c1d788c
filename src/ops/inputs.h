// What the core operators take, gathered in one struct each: the public operators fill them in, and the fused kernels, the
// composed path, validation and autograd read them. Shapes as in ops.h.
#pragma once

#include <torch/torch.h>

#include <cstdint>

#include "ops/ops.h"

namespace latte {

// The dtype of sums, maxima and states for inputs of `dtype`.
inline at::ScalarType AccumulateType(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline bool Present(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }
// Empty tensors stand for absent outputs: an operator's schema can't return an optional tensor.
inline at::Tensor AbsentOutput(const at::Tensor& like, at::ScalarType dtype) {
  return at::empty({0}, like.options().dtype(dtype));
}
inline bool NeedsGrad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool NeedsGrad(const OptionalTensor& tensor) { return Present(tensor) && tensor->requires_grad(); }
// Whether more than plain reverse mode follows x: forward mode (a dual number), or one of torch.func's transforms. C++ autograd
// functions know neither; the composed path, called above autograd, serves both.
inline bool Transformed(const at::Tensor& x) {
  return x.defined() && (x._fw_grad(/*level=*/0).defined() || x.key_set().has(c10::DispatchKey::FuncTorchGradWrapper));
}
inline bool Transformed(const OptionalTensor& x) { return Present(x) && Transformed(*x); }
template <class... Tensors>
bool AnyTransformed(const Tensors&... x) {
  return (Transformed(x) || ...);
}
inline at::Tensor OrUndefined(const OptionalTensor& tensor) { return Present(tensor) ? *tensor : at::Tensor(); }
inline OptionalTensor OrAbsent(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor(); }

// Sequences of a batch: the rows, or what cu_seqlens packs into one.
inline c10::SymInt SequenceCount(const at::Tensor& like, const OptionalTensor& cu_seqlens) {
  return Present(cu_seqlens) ? cu_seqlens->sym_size(0) - 1 : like.sym_size(0);
}

struct LatentInputs {
  at::Tensor query_logits;       // [B, T, H, L], or L + 1 with window_out
  at::Tensor key_logits;         // [B, T, Hkv, L]
  at::Tensor values;             // [B, T, Hkv, D]
  OptionalTensor window_out;     // [B, T, H, D], AccumulateType
  OptionalTensor log_decay;      // [B, T, Hkv, L]
  OptionalTensor key_mask;       // bool [B, T]
  OptionalTensor initial_state;  // [N, Hkv, L, D + 3], AccumulateType
  OptionalTensor cu_seqlens;     // int64 [N + 1]
  bool causal = true;
  bool gated = false;  // query_logits are [B, T, H, L + 1] while window_out isn't there yet
};

struct WindowInputs {
  at::Tensor query;           // [B, T, H, Dk]
  at::Tensor key;             // [B, T, Hkv, Dk]
  at::Tensor values;          // [B, T, Hkv, D]
  OptionalTensor sink_query;  // [B, T, H, Dk]
  OptionalTensor key_mask;    // bool [B, T]
  // All of the past are present with position, and absent without it.
  OptionalTensor position;     // int64 [N]
  OptionalTensor past_key;     // [N, P, Hkv, Dk], P >= window - 1; its last row is the token before this call
  OptionalTensor past_values;  // [N, P, Hkv, D]
  OptionalTensor past_mask;    // bool [N, P]
  OptionalTensor sink_key;     // [N, S, Hkv, Dk]
  OptionalTensor sink_values;  // [N, S, Hkv, D]
  OptionalTensor sink_mask;    // bool [N, S]
  OptionalTensor cu_seqlens;   // int64 [N + 1]
  int64_t window = 1;
  int64_t sinks = 0;
  double scale = 1.0;
  bool causal = true;
};

struct Conv1dInputs {
  at::Tensor x;                  // [B, T, C]
  at::Tensor weight;             // [C, K], AccumulateType
  OptionalTensor bias;           // [C], AccumulateType
  OptionalTensor key_mask;       // bool [B, T]
  OptionalTensor initial_state;  // [N, K - 1, C], AccumulateType
  OptionalTensor cu_seqlens;     // int64 [N + 1]
};

struct RgLruInputs {
  at::Tensor x;                  // [B, T, C]
  at::Tensor recurrence_logits;  // [B, T, C]
  at::Tensor input_logits;       // [B, T, C]
  at::Tensor lambda;             // [C], AccumulateType
  OptionalTensor key_mask;       // bool [B, T]
  OptionalTensor initial_state;  // [N, C], AccumulateType
  OptionalTensor cu_seqlens;     // int64 [N + 1]
};

}  // namespace latte
