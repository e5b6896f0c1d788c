#include "formats/system_memory.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string_view>

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

}  // namespace

std::optional<uint64_t> kilobyte_field(const std::string& path, std::string_view name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name)) return std::strtoull(line.c_str() + name.size(), nullptr, 10) << 10;
  }
  return std::nullopt;
}

uint64_t memory_left_to_groups(const std::string& membership, const std::string& root) {
  uint64_t least = std::numeric_limits<uint64_t>::max();
  std::ifstream file(membership);
  for (std::string line; std::getline(file, line);) {  // number:controllers:/group, without controllers in version 2
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",memory,") == std::string::npos) continue;
    const std::string top = unified ? root : root + "/memory";
    // A group has what the ones around it have, at most.
    for (std::string group = line.substr(second + 1);; group.resize(group.rfind('/'))) {
      if (group == "/") group.clear();
      const std::string folder = top + group + "/memory.";
      const auto limit = number_in(folder + (unified ? "max" : "limit_in_bytes"));
      const auto used = number_in(folder + (unified ? "current" : "usage_in_bytes"));
      if (limit && used) {
        const uint64_t held = *used - std::min(*used, cached_in(folder + "stat", unified ? "" : "total_"));
        least = std::min(least, *limit > held ? *limit - held : 0);
      }
      if (group.find('/') == std::string::npos) break;
    }
  }
  return least;
}

std::optional<uint64_t> free_memory() {
  const auto free = kilobyte_field("/proc/meminfo", "MemAvailable:");
  if (!free) return std::nullopt;
  return std::min(*free, memory_left_to_groups());
}

}  // namespace latte::formats
