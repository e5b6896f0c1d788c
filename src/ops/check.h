// Validation at the operators' boundary. Every message reads "[latte.OP] ARGUMENT: got …, expected …"; wrong shapes and values
// raise c10::ValueError, wrong dtypes and devices c10::TypeError (ValueError and TypeError in Python).
//
// Sizes are compared as SymInts, so that the same checks run while torch.compile traces; checks that read data (cu_seqlens,
// positions) are apart and run in the backends' kernels only.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <initializer_list>

#include "ops/inputs.h"

namespace latte {

class Checker {
 public:
  // `op` without "latte."; it must outlive the checker.
  explicit Checker(const char* op) : op_(op) {}

  // `letters` describes the expected shape for the reader, as in "[B, T, Hkv, D]".
  void Rank(const char* argument, const at::Tensor& tensor, int64_t rank, const char* letters) const;
  void Shape(const char* argument, const at::Tensor& tensor, const char* letters,
             std::initializer_list<c10::SymInt> expected) const;
  // float32, bfloat16, float16 or float64.
  void Floating(const char* argument, const at::Tensor& tensor) const;
  void Dtype(const char* argument, const at::Tensor& tensor, at::ScalarType expected) const;
  void Device(const char* argument, const at::Tensor& tensor, const at::Tensor& like) const;
  void AtLeast(const char* argument, const c10::SymInt& value, int64_t least) const;
  void Absent(const char* argument, bool present, const char* reason) const;
  // Query heads must be a multiple of key-value heads, and there is at least one of each.
  void Heads(const c10::SymInt& heads, const c10::SymInt& kv_heads) const;
  // Shapes and dtypes of what every operator over time takes. `like` is [B, T, …].
  void KeyMask(const OptionalTensor& key_mask, const at::Tensor& like) const;
  void CuSeqlens(const OptionalTensor& cu_seqlens, const at::Tensor& like) const;
  // The caches of a state hold `window` rows.
  void Past(const at::Tensor& past_key, int64_t window) const;
  // Reads the data: cu_seqlens (on the CPU) starts at 0, never decreases and ends at `time`.
  void CuSeqlensData(const at::Tensor& cu_seqlens, int64_t time) const;
  // Reads the data: 0 <= position, and no sum with a length can overflow.
  void PositionData(const at::Tensor& position) const;

 private:
  const char* op_;
};

// The inputs of latent attention, as the operator named `op` takes them.
void CheckLatent(const char* op, const LatentInputs& inputs);
void CheckWindow(const char* op, const WindowInputs& inputs);
void CheckConv1d(const char* op, const Conv1dInputs& inputs);
void CheckRgLru(const char* op, const RgLruInputs& inputs);
void CheckVapor(const char* op, const at::Tensor& x, const OptionalTensor& positions, double base);

}  // namespace latte
