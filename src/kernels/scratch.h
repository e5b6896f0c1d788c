// Scratch memory of a kernel call: one aligned block a thread, kept for the next call, unless it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "hwy/aligned_allocator.h"

namespace latte::kernels {

// Hands out float arrays, each aligned to cache lines, from a block that grows to what was asked for and belongs to this thread.
class Scratch {
 public:
  static constexpr size_t kAlignFloats = 32;  // 128 bytes: no array shares a line with the next, whatever the vector length

  static constexpr size_t Rounded(size_t floats) { return (floats + kAlignFloats - 1) / kAlignFloats * kAlignFloats; }

  // Room for `floats` in all, each array rounded up. Earlier arrays of this thread become invalid. Throws std::bad_alloc.
  explicit Scratch(size_t floats) {
    Block& block = ThreadBlock();
    if (block.size < floats) {
      block.data.reset();
      block.size = 0;
      block.data = hwy::AllocateAligned<float>(floats);
      if (!block.data) throw std::bad_alloc();
      block.size = floats;
    }
    next_ = block.data.get();
  }

  // From memory that someone else holds.
  explicit Scratch(float* memory) : next_(memory) {}

  float* Take(size_t floats) {
    float* taken = next_;
    next_ += Rounded(floats);
    return taken;
  }

 private:
  struct Block {
    hwy::AlignedFreeUniquePtr<float[]> data;
    size_t size = 0;
  };
  static Block& ThreadBlock() {
    thread_local Block block;
    return block;
  }

  float* next_;
};

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

// Memory for one call with a window: the thread's kept block, or where the window is wide (whose tiles take megabytes) memory
// that is given back.
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
