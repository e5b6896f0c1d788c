// Scratch memory of a kernel call: one aligned block a thread, kept for the next call.
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

}  // namespace latte::kernels
