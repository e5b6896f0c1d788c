// Memory that isn't there is refused, rather than promised: a system that overcommits ends a process later, when it writes to
// what it was promised, without a word and with all that wasn't saved.
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <thread>

#include "formats/system_memory.h"

namespace latte::cli {

// From here on this process, and those it starts, get the memory that formats::memory_allowed names, and some for their threads'
// heaps and stacks, and no more: allocations beyond it fail, and are reported. A lower limit of the user's (ulimit -d) stays.
// Returns the bytes that are left to it; none without a limit. Throws std::invalid_argument as memory_allowed does.
inline std::optional<uint64_t> LimitMemory() {
  const auto environment = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string_view(value ? value : "");
  };
  std::optional<uint64_t> free = formats::free_memory();
  if (free) *free += formats::free_swap();
  const auto allowed = formats::memory_allowed(environment("LATTE_MEMORY_LIMIT"), free, environment("LOCAL_WORLD_SIZE"));
  const auto in_use = formats::kilobyte_field("/proc/self/status", "VmData:");
  rlimit data, stack;
  if (!allowed || !in_use || ::getrlimit(RLIMIT_DATA, &data) != 0 || ::getrlimit(RLIMIT_STACK, &stack) != 0) return std::nullopt;
  // The limit is of what was asked for, written or not. Each thread asks for a stack and, with the malloc settings that `latte`
  // gives commands that train, for a heap of 64 MB of its own; of both it writes little.
  constexpr uint64_t kHeap = uint64_t{64} << 20, kUnlimitedStack = uint64_t{2} << 20;  // glibc's
  const uint64_t threads = formats::count_in(environment("OMP_NUM_THREADS")).value_or(std::thread::hardware_concurrency());
  const uint64_t of_thread = kHeap + (stack.rlim_cur == RLIM_INFINITY ? kUnlimitedStack : stack.rlim_cur);
  const uint64_t unwritten = std::min(*allowed / 4, threads > *allowed / of_thread ? *allowed : threads * of_thread);
  data.rlim_cur = std::min<rlim_t>(data.rlim_cur, *in_use + unwritten + *allowed);
  if (::setrlimit(RLIMIT_DATA, &data) != 0) return std::nullopt;
  return data.rlim_cur > *in_use ? std::min<uint64_t>(*allowed, data.rlim_cur - *in_use) : 0;
}

}  // namespace latte::cli
