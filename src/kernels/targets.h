// The SIMD targets that the kernels were compiled for. Kernels pick the best one of this machine by themselves; tests and `latte
// verify` pin one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace latte::kernels {

struct Target {
  int64_t id;        // Highway's bit
  std::string name;  // "AVX2"
};

// Those that this machine can run, best first.
std::vector<Target> SupportedTargets();

// All kernels run on this target until the object goes away; not for use while another thread runs kernels.
class PinnedTarget {
 public:
  explicit PinnedTarget(const Target& target);
  ~PinnedTarget();
  PinnedTarget(const PinnedTarget&) = delete;
  PinnedTarget& operator=(const PinnedTarget&) = delete;
};

}  // namespace latte::kernels
