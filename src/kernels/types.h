// Plain types that every kernel shares. No torch, no ggml: a kernel sees pointers, strides and sizes.
#pragma once

#include <cstdint>

namespace latte::kernels {

// Element type of a kernel's inputs and outputs. Arithmetic, states and maxima are always float32.
// Stored as bfloat16, a number below the smallest normal one (2^-126) may become zero: some processors' conversion does that.
enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A tensor [batch, time, heads, inner] whose last dimension is contiguous. Strides count elements and may be 0 (an expanded
// tensor). `data == nullptr` stands for an absent optional tensor.
struct View {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t time_stride = 0;
  int64_t head_stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

// The same for a tensor that a kernel writes.
struct MutableView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t time_stride = 0;
  int64_t head_stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

// A boolean mask [batch, time]; true marks a real token. `data == nullptr`: every token is real.
struct MaskView {
  const bool* data = nullptr;
  int64_t batch_stride = 0;
  int64_t time_stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

// One sequence of a batch: where it lies in the tensors. With cu_seqlens, batch row 0 holds all sequences end to end.
struct Sequence {
  int64_t batch;  // row of the tensors
  int64_t begin;  // first token, in that row
  int64_t length;
};

inline Sequence SequenceAt(int64_t index, int64_t time, const int64_t* cu_seqlens) {
  if (cu_seqlens == nullptr) return {index, 0, time};
  return {0, cu_seqlens[index], cu_seqlens[index + 1] - cu_seqlens[index]};
}

}  // namespace latte::kernels
