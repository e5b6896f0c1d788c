// The SIMD targets that the operators' kernels were compiled for. Kernels pick the best one of this machine by themselves; `latte
// verify` pins one. A choice is made for each copy of the kernels: these functions belong to the copy in the operators' library.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace latte {

struct Target {
  int64_t id;        // Highway's bit
  std::string name;  // "AVX2"
};

// Those that this machine can run, best first.
std::vector<Target> SupportedTargets();

// All operators run on this target until the object goes away; not for use while another thread runs operators.
class PinnedTarget {
 public:
  explicit PinnedTarget(const Target& target);
  ~PinnedTarget();
  PinnedTarget(const PinnedTarget&) = delete;
  PinnedTarget& operator=(const PinnedTarget&) = delete;
};

}  // namespace latte
