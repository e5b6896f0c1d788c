// Asking for memory ahead of its use. Included once per SIMD target.
#if defined(LATTE_KERNELS_PREFETCH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_PREFETCH_INL_H_
#undef LATTE_KERNELS_PREFETCH_INL_H_
#else
#define LATTE_KERNELS_PREFETCH_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <vector>

#include "hwy/highway.h"
#include "kernels/tile_matmul-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

// The rows that a later piece of work reads and writes. Rows of one head lie pages apart, where no hardware prefetcher follows.
// They are asked for a few at a time, between the blocks of this piece's products: in one go they would fill the processor's
// queue of misses, and wait. An object of this class is what MatMul calls between blocks.
class Prefetch {
 public:
  void Clear() {
    streams_.clear();
    next_ = 0;
  }
  // `count` rows of `bytes`, the first at `data` and `stride` bytes between them.
  void Add(const void* data, int64_t stride, size_t bytes, size_t count) {
    if (count > 0) streams_.push_back({static_cast<const char*>(data), stride, bytes, count});
  }
  // With L = D = 64 and blocks two vectors wide, a chunk of latent attention has 24 blocks or more for the rows of each two
  // tensors; with wider blocks it has about a third of that.
  HWY_INLINE void operator()() {
    constexpr size_t kRows = kBlockVectors == 2 ? 3 : 10;
    for (size_t i = 0; i < kRows && !streams_.empty(); ++i) {
      if (next_ >= streams_.size()) next_ = 0;
      Stream& stream = streams_[next_];
      for (size_t line = 0; line < stream.bytes; line += 64) __builtin_prefetch(stream.data + line, 0, 2);
      if (--stream.left == 0) {
        streams_.erase(streams_.begin() + static_cast<std::ptrdiff_t>(next_));
        continue;
      }
      stream.data += stream.stride;
      ++next_;
    }
  }

 private:
  struct Stream {
    const char* data;
    int64_t stride;
    size_t bytes;
    size_t left;
  };
  std::vector<Stream> streams_;
  size_t next_ = 0;
};

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
