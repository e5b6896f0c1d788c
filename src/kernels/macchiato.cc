// Forward pass of macchiato.h: turns of the window and of the latents, slice by slice.
#include "kernels/macchiato.h"

#include <algorithm>
#include <deque>
#include <numeric>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/macchiato.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include "hwy/highway.h"
#include "kernels/latent_forward-inl.h"
#include "kernels/window_forward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

// Tokens of a turn: whole blocks of the window and whole chunks of the latents, enough that what a slice keeps (tiles, a state)
// is fetched seldom, and few enough that the window's output stays in a second-level cache.
int64_t MacchiatoTurn(int64_t block_tokens, int64_t row_floats, int64_t length) {
  constexpr int64_t kMostTokens = 192;
  constexpr int64_t kMostFloats = int64_t{1} << 15;
  const int64_t both = std::lcm(block_tokens, static_cast<int64_t>(kChunk));
  const int64_t tokens = std::min(kMostTokens, kMostFloats / row_floats);
  return std::min(length, std::max<int64_t>(1, tokens / both) * both);
}

// The slices [first, last) of one sequence, in turns: their rows share pages and lines, which then are still near.
template <bool kPaired>
void MacchiatoSequence(const WindowArgs& window, const LatentArgs& latent, const LatentOutputs& outputs, int64_t first,
                       int64_t last) {
  std::deque<WindowForwardSlice<kPaired>> slices;
  for (int64_t slice = first; slice < last; ++slice) slices.emplace_back(window, WindowOutputs{}, slice);
  const Band& band = slices.front().band();
  const int64_t length = band.sequence.length;
  const int64_t row_floats = static_cast<int64_t>(band.group) * window.head_dim;
  const int64_t turn_tokens = length == 0 ? 0 : MacchiatoTurn(slices.front().block_tokens(), row_floats, length);

  WindowWorkspace work;
  float* latent_floats = nullptr;
  float* window_out = nullptr;  // of the turn [turn_tokens, group, D]
  const size_t scratch_floats = LatentForwardPass<kPaired>::ScratchFloats(latent, last - first);
  const auto carve = [&](ScratchLayout& layout) {
    latent_floats = layout.Take(1, scratch_floats);
    if (length == 0) return;
    for (auto& slice : slices) slice.Carve(layout);
    slices.front().Carve(work, layout);
    window_out = layout.Take(static_cast<size_t>(turn_tokens), static_cast<size_t>(row_floats));
  };
  ScratchLayout counted(nullptr);
  carve(counted);
  if (counted.used() > WindowScratch::kKeptFloats && last - first > 1) {  // too much for a thread to keep: fewer at a time
    const int64_t middle = first + (last - first) / 2;
    MacchiatoSequence<kPaired>(window, latent, outputs, first, middle);
    MacchiatoSequence<kPaired>(window, latent, outputs, middle, last);
    return;
  }
  const WindowScratch memory(counted.used());
  ScratchLayout layout(memory.data());
  carve(layout);

  LatentArgs gated = latent;
  gated.window_out = {window_out, 0, 0, 0};  // says that there is a window; where its rows lie, ReadWindow does
  Scratch scratch(latent_floats);
  LatentForwardPass<kPaired> pass(gated, outputs, first, last, scratch);
  pass.ReadWindow(window_out, 0);
  pass.Start();
  for (int64_t begin = 0; begin < length; begin += turn_tokens) {
    const int64_t end = std::min(length, begin + turn_tokens);
    for (size_t i = 0; i < slices.size(); ++i) {
      const int64_t index = first + static_cast<int64_t>(i);
      const Turn turn{Slice(latent, index), static_cast<int64_t>(i), begin, end};
      slices[i].WriteTo(window_out, band.position + begin);
      RunBlocks(slices[i], band.position + begin, band.position + end, work,
                [&](Prefetch& prefetch) { pass.LookAhead(turn, begin, prefetch); });
      pass.ReadWindow(window_out, begin);
      pass.RunTurn(turn, [&](Prefetch& prefetch) {
        if (i + 1 < slices.size()) {
          slices[i + 1].Fetch(band.position + begin, prefetch);
        } else {
          slices.front().Fetch(band.position + end, prefetch);
        }
      });
    }
  }
  pass.Finish();
}

// A sequence of one token, packed beside others: the window's step, then the latents.
template <bool kPaired>
void MacchiatoStep(const WindowArgs& window, const LatentArgs& latent, const LatentOutputs& outputs, int64_t first,
                   int64_t last) {
  const Band front(window, first);
  const int64_t row = static_cast<int64_t>(front.group) * window.head_dim;
  std::vector<float> window_out(static_cast<size_t>((last - first) * row));
  for (int64_t slice = first; slice < last; ++slice) WindowStep(Band(window, slice), window_out.data() + (slice - first) * row);
  LatentArgs gated = latent;
  gated.window_out = {window_out.data(), 0, 0, 0};
  Scratch scratch(LatentForwardPass<kPaired>::ScratchFloats(latent, last - first));
  LatentForwardPass<kPaired> pass(gated, outputs, first, last, scratch);
  pass.Start();
  for (int64_t slice = first; slice < last; ++slice) {
    pass.ReadWindow(window_out.data() + (slice - first) * row, 0);
    pass.RunTurn({Slice(latent, slice), slice - first, 0, 1}, [](Prefetch&) {});
  }
  pass.Finish();
}

void MacchiatoForwardSlices(const WindowArgs& window, const LatentArgs& latent, const LatentOutputs& outputs, int64_t first,
                            int64_t last) {
  while (first < last) {
    const int64_t end = std::min(last, (first / window.kv_heads + 1) * window.kv_heads);
    const bool step = SequenceAt(first / window.kv_heads, window.time, window.cu_seqlens).length == 1;
    if (step && kHasPairs && window.dtype == DType::kBFloat16) {
      MacchiatoStep<kHasPairs>(window, latent, outputs, first, end);
    } else if (step) {
      MacchiatoStep<false>(window, latent, outputs, first, end);
    } else if (kHasPairs && window.dtype == DType::kBFloat16) {
      MacchiatoSequence<kHasPairs>(window, latent, outputs, first, end);
    } else {
      MacchiatoSequence<false>(window, latent, outputs, first, end);
    }
    first = end;
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(MacchiatoForwardSlices);

void MacchiatoForward(const WindowArgs& window, const LatentArgs& latent, const LatentOutputs& outputs, int64_t first,
                      int64_t last) {
  HWY_DYNAMIC_DISPATCH(MacchiatoForwardSlices)(window, latent, outputs, first, last);
}

}  // namespace latte::kernels
#endif
