// Asking for memory ahead of its use. Included once per SIMD target.
#if defined(LATTE_KERNELS_PREFETCH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_PREFETCH_INL_H_
#undef LATTE_KERNELS_PREFETCH_INL_H_
#else
#define LATTE_KERNELS_PREFETCH_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "hwy/highway.h"
#include "kernels/tile_matmul-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

// The rows that a later piece of work reads and writes. Rows of one head lie pages apart, where no hardware prefetcher follows.
// Their cache lines are asked for one by one, by the inner loops of this piece's products (MatMul): in one go they would fill the
// processor's queue of misses, and wait. They are asked into the first-level cache: Zen 4 drops most requests for the second.
class Prefetch {
 public:
  // The lines that an inner loop asks for, one call a step.
  class Lines {
   public:
    Lines(const char* const* lines, size_t step) : lines_(lines), step_(step) {}
    HWY_INLINE void operator()() {
      __builtin_prefetch(lines_[position_ / kSteps], 0, 3);
      position_ += step_;
    }

   private:
    const char* const* lines_;
    size_t step_;
    size_t position_ = 0;
  };

  // `pace`: new lines in two steps, 1 or 2; at 1 each of the two asks for the same one.
  explicit Prefetch(size_t pace = 1) : pace_(pace) {}
  Prefetch(const Prefetch&) = delete;
  Prefetch& operator=(const Prefetch&) = delete;

  void Clear() { end_ = next_ = 0; }
  // `count` rows of `bytes`, the first at `data` and `stride` bytes between them.
  void Add(const void* data, int64_t stride, size_t bytes, size_t count) {
    const size_t lines = (bytes + kLineBytes - 1) / kLineBytes;
    if (lines_.size() < end_ + count * lines) lines_.resize(2 * (end_ + count * lines));
    const char* row = static_cast<const char*>(data);
    const char** to = lines_.data() + end_;
    for (size_t i = 0; i < count; ++i, row += stride) {
      for (size_t line = 0; line < lines; ++line) *to++ = row + line * kLineBytes;
    }
    end_ += count * lines;
  }
  // For a loop of so many steps. One that is longer than what is left asks for a few at once, and for nothing on its way.
  HWY_INLINE Lines Take(size_t steps) {
    constexpr size_t kAtOnce = 8;
    const size_t wanted = (steps * pace_ + kSteps - 1) / kSteps;
    const size_t left = end_ - next_;
    if (left < wanted) {
      const size_t last = next_ + std::min(left, kAtOnce);
      for (; next_ < last; ++next_) __builtin_prefetch(lines_[next_], 0, 3);
      return {&own_, 0};
    }
    const Lines lines(lines_.data() + next_, pace_);
    next_ += wanted;
    return lines;
  }

 private:
  static constexpr size_t kLineBytes = 64;
  static constexpr size_t kSteps = 2;

  const char* const own_ = reinterpret_cast<const char*>(this);  // is asked for where there is nothing to ask for
  const size_t pace_;
  std::vector<const char*> lines_;  // [next_, end_) are still to be asked for
  size_t next_ = 0;
  size_t end_ = 0;
};

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
