// Memory that isn't there is refused, rather than promised: a system that overcommits ends a process later, when it writes to
// what it was promised, without a word and with all that wasn't saved.
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "formats/system_memory.h"

namespace latte::cli {

// From here on this process, and those it starts, are given what memory is free now, swap included, and no more: allocations
// beyond it fail, and are reported. A lower limit of the user's (ulimit -d) stays. Returns the bytes that are left; none where
// the system doesn't say.
inline std::optional<uint64_t> LimitMemoryToWhatIsFree() {
  const auto free = formats::free_memory();
  const auto in_use = formats::kilobyte_field("/proc/self/status", "VmData:");
  rlimit limit;
  if (!free || !in_use || ::getrlimit(RLIMIT_DATA, &limit) != 0) return std::nullopt;
  const uint64_t swap = formats::kilobyte_field("/proc/meminfo", "SwapFree:").value_or(0);
  limit.rlim_cur = std::min<rlim_t>(limit.rlim_cur, *in_use + *free + swap);
  if (::setrlimit(RLIMIT_DATA, &limit) != 0) return std::nullopt;
  return limit.rlim_cur > *in_use ? limit.rlim_cur - *in_use : 0;
}

}  // namespace latte::cli
