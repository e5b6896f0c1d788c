#include "runtime/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "formats/system_memory.h"
#include "runtime/error.h"

namespace latte::runtime {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

std::atomic<uint64_t> promised{0};  // bytes of all buffers

std::string in_megabytes(uint64_t bytes) { return std::to_string(bytes >> 20) + " MB"; }

}  // namespace

uint64_t available_memory() {
  const auto free = formats::free_memory();
  if (!free) return std::numeric_limits<uint64_t>::max();
  // Pages are taken as they are written. What isn't is what exceeds all that the process has in use.
  const uint64_t promised_now = promised.load();
  const uint64_t in_use = formats::kilobyte_field("/proc/self/status", "RssAnon:").value_or(promised_now);
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
