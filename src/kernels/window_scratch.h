// Scratch memory of a window's slice: a single aligned allocation that its arrays are carved from.
#pragma once

#include <cstddef>
#include <new>

#include "hwy/aligned_allocator.h"
#include "kernels/scratch.h"

namespace latte::kernels {

// Hands out arrays that start on a cache line. A call lays its arrays out twice: with `data` null to learn the total, then for
// real. Throws std::bad_alloc where a size overflows.
class ScratchLayout {
 public:
  explicit ScratchLayout(float* data) : data_(data) {}

  float* Take(size_t rows, size_t row_floats) {
    size_t floats = 0;
    size_t end = 0;
    if (__builtin_mul_overflow(rows, row_floats, &floats) || __builtin_add_overflow(used_, floats, &end) ||
        end > static_cast<size_t>(-1) / (2 * sizeof(float))) {
      throw std::bad_alloc();
    }
    float* array = data_ == nullptr ? nullptr : data_ + used_;
    used_ = (end + 15) / 16 * 16;
    return array;
  }

  size_t used() const { return used_; }

 private:
  float* data_;
  size_t used_ = 0;
};

// Memory for one call: the thread's kept block, or for a wide window (whose tiles take megabytes) memory that is given back.
class WindowScratch {
 public:
  static constexpr size_t kKeptFloats = size_t{1} << 21;

  explicit WindowScratch(size_t floats) {
    if (floats > kKeptFloats) {
      own_ = hwy::AllocateAligned<float>(floats);
      if (own_ == nullptr) throw std::bad_alloc();
      data_ = own_.get();
    } else {
      data_ = Scratch(floats).Take(floats);
    }
  }

  float* data() const { return data_; }

 private:
  hwy::AlignedFreeUniquePtr<float[]> own_;
  float* data_ = nullptr;
};

}  // namespace latte::kernels
