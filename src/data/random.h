// Random numbers for data: a stream for each (seed, index), so that what is made in parallel doesn't depend on how.
#pragma once

#include <ATen/core/PhiloxRNGEngine.h>

#include <cstdint>

namespace latte {

class RandomStream {
 public:
  RandomStream(uint64_t seed, uint64_t index) : engine_(seed, index) {}

  // In [0, count), each as likely as the others to one part in 2^64 / count.
  int64_t below(int64_t count) {
    const uint64_t high = engine_();
    const uint64_t bits = high << 32 | engine_();
    return static_cast<int64_t>(static_cast<unsigned __int128>(bits) * static_cast<uint64_t>(count) >> 64);
  }
  // In [least, most].
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  // In [0, 1), a multiple of 2^-32.
  double uniform() { return static_cast<double>(engine_()) * 0x1p-32; }
  double uniform(double least, double most) { return least + (most - least) * uniform(); }

 private:
  at::Philox4_32 engine_;
};

}  // namespace latte
