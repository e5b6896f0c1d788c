// Forward pass of window.h.
#include "kernels/window.h"

#include <deque>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/window.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include "hwy/highway.h"
#include "kernels/window_forward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
constexpr int64_t kTurnBlocks = 16;  // blocks of one slice before the next slice's turn

// The slices [first, last) of one sequence, in turns: their rows share pages and lines, which then are still near.
template <bool kPaired>
void ForwardSequence(const WindowArgs& args, const WindowOutputs& outputs, int64_t first, int64_t last) {
  std::deque<WindowForwardSlice<kPaired>> slices;
  for (int64_t slice = first; slice < last; ++slice) slices.emplace_back(args, outputs, slice);
  WindowWorkspace work;
  const auto carve = [&](ScratchLayout& layout) {
    for (auto& slice : slices) slice.Carve(layout);
    slices.front().Carve(work, layout);
  };
  ScratchLayout counted(nullptr);
  carve(counted);
  if (counted.used() > WindowScratch::kKeptFloats && last - first > 1) {  // too much for a thread to keep: fewer at a time
    const int64_t middle = first + (last - first) / 2;
    ForwardSequence<kPaired>(args, outputs, first, middle);
    ForwardSequence<kPaired>(args, outputs, middle, last);
    return;
  }
  const WindowScratch memory(counted.used());
  ScratchLayout layout(memory.data());
  carve(layout);

  RunInTurns(slices, kTurnBlocks, work);
}

void WindowForwardSlices(const WindowArgs& args, const WindowOutputs& outputs, int64_t first, int64_t last) {
  while (first < last) {
    const Band band(args, first);
    const int64_t end = std::min(last, (band.index + 1) * args.kv_heads);
    if (band.sequence.length > 1) {
      if (kHasPairs && args.dtype == DType::kBFloat16) {
        ForwardSequence<kHasPairs>(args, outputs, first, end);
      } else {
        ForwardSequence<false>(args, outputs, first, end);
      }
    } else if (band.sequence.length == 1) {
      for (int64_t slice = first; slice < end; ++slice) {
        const Band one(args, slice);
        WindowStep(one, outputs.out + one.OutRow(one.position, 0) * args.head_dim, outputs.lse);
      }
    }
    first = end;
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(WindowForwardSlices);

int64_t WindowSlices(const WindowArgs& args) { return args.sequences * args.kv_heads; }

void WindowForward(const WindowArgs& args, const WindowOutputs& outputs, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(WindowForwardSlices)(args, outputs, first, last);
}

}  // namespace latte::kernels
#endif
