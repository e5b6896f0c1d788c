#include "ops/targets.h"

#include "hwy/targets.h"

namespace latte {

std::vector<Target> SupportedTargets() {
  std::vector<Target> targets;
  for (const int64_t id : hwy::SupportedAndGeneratedTargets()) targets.push_back({id, hwy::TargetName(id)});
  return targets;
}

PinnedTarget::PinnedTarget(const Target& target) { hwy::SetSupportedTargetsForTest(target.id); }
PinnedTarget::~PinnedTarget() { hwy::SetSupportedTargetsForTest(0); }

}  // namespace latte
