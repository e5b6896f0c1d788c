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
  char* const data = static_cast<char*>(x.data_ptr());
  const auto address = reinterpret_cast<uintptr_t>(data);
  const auto begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (address + x.nbytes()) / kHugePage * kHugePage;
  if (end > begin) madvise(data + (begin - address), end - begin, MADV_HUGEPAGE);  // advice: refusal costs only time
#endif
  return x;
}

// A contiguous tensor to write, of x's shape and dtype; undefined where x is absent.
inline at::Tensor Like(const OptionalTensor& x) { return Present(x) ? Empty(x->sizes(), x->options()) : at::Tensor(); }

// Multiplications that are worth waking a thread for, about.
constexpr int64_t kWorthAThread = 32768;

// Gives function(first, last) ranges of slices on torch's threads.
template <class Function>
void ForRanges(int64_t slices, int64_t work_per_slice, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, work_per_slice));
  at::parallel_for(0, slices, grain, function);
}

// The first slice of share i of `shares`, where packed sequences are shared out by their tokens.
inline int64_t FirstOfShare(const int64_t* cu_seqlens, int64_t sequences, int64_t kv_heads, int64_t i, int64_t shares) {
  if (i == 0) return 0;
  if (i == shares) return sequences * kv_heads;
  // The sequence that this many tokens, each counted once a head, lie before or in.
  const int64_t before = cu_seqlens[sequences] * kv_heads / shares * i;
  const int64_t n = std::upper_bound(cu_seqlens, cu_seqlens + sequences + 1, before / kv_heads) - cu_seqlens - 1;
  const int64_t length = cu_seqlens[n + 1] - cu_seqlens[n];
  return n * kv_heads + (before - cu_seqlens[n] * kv_heads + length - 1) / length;
}

// Gives function(first, last) ranges of the slices of an attention's arguments on torch's threads. `work` is a whole row's;
// packed sequences are shared out by their lengths.
template <class Args, class Function>
void ForSlices(const Args& args, int64_t work, const Function& function) {
  if (args.cu_seqlens == nullptr) return ForRanges(args.sequences * args.kv_heads, work, function);
  const int64_t worth = std::max<int64_t>(1, (work + kWorthAThread - 1) / kWorthAThread * args.kv_heads);
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), worth);
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = FirstOfShare(args.cu_seqlens, args.sequences, args.kv_heads, begin, shares);
    const int64_t last = FirstOfShare(args.cu_seqlens, args.sequences, args.kv_heads, end, shares);
    if (first < last) function(first, last);
  });
}

// ForRanges, slice by slice.
template <class Function>
void ForEachSlice(int64_t slices, int64_t work_per_slice, const Function& function) {
  ForRanges(slices, work_per_slice, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) function(slice);
  });
}

}  // namespace latte::cpu
