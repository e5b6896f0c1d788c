#include "runtime/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "runtime/error.h"

namespace latte::runtime {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

std::atomic<uint64_t> promised{0};  // bytes of all buffers

// Bytes of a field of one of the system's files, which counts in kB.
std::optional<uint64_t> field_of(const char* path, std::string_view name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name)) return std::strtoull(line.c_str() + name.size(), nullptr, 10) << 10;
  }
  return std::nullopt;
}

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

std::string in_megabytes(uint64_t bytes) { return std::to_string(bytes >> 20) + " MB"; }

}  // namespace

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

uint64_t available_memory() {
  auto free = field_of("/proc/meminfo", "MemAvailable:");
  if (!free) return std::numeric_limits<uint64_t>::max();
  free = std::min(*free, memory_left_to_groups());
  // Pages are taken as they are written. What isn't is what exceeds all that the process has in use.
  const uint64_t promised_now = promised.load();
  const uint64_t in_use = field_of("/proc/self/status", "RssAnon:").value_or(promised_now);
  const uint64_t owed = promised_now > in_use ? promised_now - in_use : 0;
  return *free > owed ? *free - owed : 0;
}

Buffer::Buffer(size_t size, const char* what) : size_(size) {
  if (size == 0) return;
  constexpr size_t kSmall = size_t{1} << 20;  // not worth reading /proc for
  const uint64_t available = size > kSmall ? available_memory() : size;
  void* data = MAP_FAILED;
  if (size <= available) {
    data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  if (data == MAP_FAILED) {
    const int error_number = errno;
    size_ = 0;
    if (size <= available) {  // a limit of the process's own
      throw MemoryError("no memory for " + std::string(what) + ": the system refuses " + in_megabytes(size) + ": " +
                        std::strerror(error_number));
    }
    throw MemoryError("no memory for " + std::string(what) + ": " + in_megabytes(size) + " are needed, " +
                      in_megabytes(available_memory()) + " are free");
  }
  if (size >= kHugePage) ::madvise(data, size, MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(data);
  promised += size;
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  ::munmap(data_, size_);
  promised -= size_;
}

Buffer::Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::byte* Arena::take(size_t size) {
  size = (std::max<size_t>(size, 1) + 127) / 128 * 128;
  if (size > left_) {
    slabs_.emplace_back(std::max(size, kSlab), what_);
    left_ = slabs_.back().size();
  }
  std::byte* taken = slabs_.back().data() + (slabs_.back().size() - left_);
  left_ -= size;
  used_ += size;
  return taken;
}

}  // namespace latte::runtime
