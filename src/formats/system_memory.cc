#include "formats/system_memory.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string_view>

#include "formats/error.h"

namespace latte::formats {
namespace {

std::optional<uint64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  uint64_t number = 0;
  if (file >> number) return number;
  return std::nullopt;  // no such file, or "max"
}

// Bytes of file pages, which the system takes back where it needs room.
uint64_t cached_in(const std::string& path, std::string_view prefix) {
  std::ifstream file(path);
  uint64_t sum = 0, number = 0;
  for (std::string name; file >> name >> number;) {
    if (!name.starts_with(prefix)) continue;
    const std::string_view rest = std::string_view(name).substr(prefix.size());
    if (rest == "inactive_file" || rest == "active_file") sum += number;
  }
  return sum;
}

uint64_t less(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

// The least of left(folder, whether version 2) over the groups that `membership` lists and those around them.
template <class Left>
uint64_t least_of_groups(const std::string& membership, const std::string& root, const Left& left) {
  uint64_t least = std::numeric_limits<uint64_t>::max();
  std::ifstream file(membership);
  for (std::string line; std::getline(file, line);) {  // number:controllers:/group, without controllers in version 2
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = ",";
    controllers.append(line, first + 1, second - first - 1).append(",");
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",memory,") == std::string::npos) continue;
    const std::string top = unified ? root : root + "/memory";
    // A group has what the ones around it have, at most.
    for (std::string group = line.substr(second + 1);; group.resize(group.rfind('/'))) {
      if (group == "/") group.clear();
      if (const auto bytes = left(top + group + "/", unified)) least = std::min(least, *bytes);
      if (group.find('/') == std::string::npos) break;
    }
  }
  return least;
}

}  // namespace

std::optional<uint64_t> kilobyte_field(const std::string& path, std::string_view name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name)) return std::strtoull(line.c_str() + name.size(), nullptr, 10) << 10;
  }
  return std::nullopt;
}

uint64_t memory_left_to_groups(const std::string& membership, const std::string& root) {
  return least_of_groups(membership, root, [](const std::string& folder, bool unified) -> std::optional<uint64_t> {
    const auto limit = number_in(folder + (unified ? "memory.max" : "memory.limit_in_bytes"));
    const auto used = number_in(folder + (unified ? "memory.current" : "memory.usage_in_bytes"));
    if (!limit || !used) return std::nullopt;
    return less(*limit, less(*used, cached_in(folder + "memory.stat", unified ? "" : "total_")));
  });
}

uint64_t swap_left_to_groups(const std::string& membership, const std::string& root) {
  return least_of_groups(membership, root, [](const std::string& folder, bool unified) -> std::optional<uint64_t> {
    if (unified) {
      const auto limit = number_in(folder + "memory.swap.max"), used = number_in(folder + "memory.swap.current");
      if (!limit || !used) return std::nullopt;
      return less(*limit, *used);
    }
    // Version 1 counts memory and swap together.
    const auto limit = number_in(folder + "memory.limit_in_bytes"), used = number_in(folder + "memory.usage_in_bytes");
    const auto both_limit = number_in(folder + "memory.memsw.limit_in_bytes");
    const auto both_used = number_in(folder + "memory.memsw.usage_in_bytes");
    constexpr uint64_t kNone = uint64_t{1} << 62;  // and more: how it writes that there is no limit
    if (!limit || !used || !both_limit || !both_used || *both_limit > kNone) return std::nullopt;
    return less(less(*both_limit, *limit), less(*both_used, *used));
  });
}

std::optional<uint64_t> free_memory() {
  const auto free = kilobyte_field("/proc/meminfo", "MemAvailable:");
  if (!free) return std::nullopt;
  return std::min(*free, memory_left_to_groups());
}

uint64_t free_swap() { return std::min(kilobyte_field("/proc/meminfo", "SwapFree:").value_or(0), swap_left_to_groups()); }

std::optional<uint64_t> count_in(std::string_view text) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number == 0) return std::nullopt;
  return number;
}

std::optional<uint64_t> memory_allowed(std::string_view asked, std::optional<uint64_t> free, std::string_view processes) {
  if (asked == "none") return std::nullopt;
  if (asked.empty()) return free ? std::optional(*free / count_in(processes).value_or(1)) : std::nullopt;
  const auto megabytes = count_in(asked);
  constexpr uint64_t kMost = uint64_t{1} << 40;
  if (!megabytes || *megabytes > kMost) {
    throw std::invalid_argument("the environment's LATTE_MEMORY_LIMIT is " + quote(asked) + ", expected megabytes, or none");
  }
  return *megabytes << 20;
}

}  // namespace latte::formats
