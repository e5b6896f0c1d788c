// From torch tensors to the kernels' views, and from torch's threads to the kernels' slices.
#pragma once

#include <ATen/Parallel.h>
#include <torch/torch.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>

#include "kernels/types.h"
#include "ops/inputs.h"

namespace latte::cpu {

// The kernels know float32, bfloat16 and float16; float64 takes the composed path, and so does a call without tokens, whose
// tensors have no address.
inline bool Fused(const at::Tensor& x) { return x.scalar_type() != at::kDouble && x.numel() > 0; }

inline kernels::DType DTypeOf(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return kernels::DType::kBFloat16;
    case at::kHalf:
      return kernels::DType::kFloat16;
    default:
      return kernels::DType::kFloat32;
  }
}

// The tensor itself where its last dimension is contiguous: any other strides are the kernels' own business.
inline at::Tensor Readable(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous(); }
inline OptionalTensor Readable(const OptionalTensor& x) { return Present(x) ? OptionalTensor(Readable(*x)) : OptionalTensor(); }
inline OptionalTensor Contiguous(const OptionalTensor& x) {
  return Present(x) ? OptionalTensor(x->contiguous()) : OptionalTensor();
}

// [B, T, H, X] or [B, T, C]. The tensor must outlive the view.
inline kernels::View ViewOf(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.dim() == 4 ? x.stride(2) : 0};
}
inline kernels::View ViewOf(const OptionalTensor& x) { return Present(x) ? ViewOf(*x) : kernels::View(); }
inline kernels::MutableView WriteTo(const at::Tensor& x) {
  if (!x.defined()) return {};
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.dim() == 4 ? x.stride(2) : 0};
}
inline kernels::MaskView MaskOf(const OptionalTensor& mask) {
  return Present(mask) ? kernels::MaskView{mask->const_data_ptr<bool>(), mask->stride(0), mask->stride(1)} : kernels::MaskView();
}
inline const float* FloatsOf(const OptionalTensor& x) { return Present(x) ? x->const_data_ptr<float>() : nullptr; }
inline float* FloatsToWrite(const at::Tensor& x) { return x.defined() ? x.mutable_data_ptr<float>() : nullptr; }

// at::empty, on 2 MB pages if it is large and the kernel gives them on request: a fresh output is otherwise written at the pace
// of one page fault every 4 KB.
inline at::Tensor Empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor x = at::empty(sizes, options.memory_format(at::MemoryFormat::Contiguous));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + x.nbytes()) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: refusal costs only time
#endif
  return x;
}

// A contiguous tensor to write, of x's shape and dtype; undefined where x is absent.
inline at::Tensor Like(const OptionalTensor& x) { return Present(x) ? Empty(x->sizes(), x->options()) : at::Tensor(); }

// Gives function(first, last) ranges of slices on torch's threads. Waking them costs more than `work` below about 32,000
// multiplications is worth.
template <class Function>
void ForRanges(int64_t slices, int64_t work_per_slice, const Function& function) {
  constexpr int64_t kWorthAThread = 32768;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, work_per_slice));
  at::parallel_for(0, slices, grain, function);
}

// The same, slice by slice.
template <class Function>
void ForEachSlice(int64_t slices, int64_t work_per_slice, const Function& function) {
  ForRanges(slices, work_per_slice, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) function(slice);
  });
}

}  // namespace latte::cpu
