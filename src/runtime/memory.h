// Memory straight from the operating system: zero, in huge pages where it offers them, and taken only as it is written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace latte::runtime {

// Bytes that can still be had without swapping, and within the limits of the process's groups (a container's), less those that
// this process's buffers were promised and haven't written yet; the largest number where the system doesn't say.
uint64_t available_memory();

class Buffer {
 public:
  Buffer() = default;
  // Zeroed. Throws MemoryError where `size` exceeds what is available; `what` names the purpose.
  Buffer(size_t size, const char* what);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::byte* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out pieces, aligned to cache lines, that live as long as it does.
class Arena {
 public:
  explicit Arena(const char* what) : what_(what) {}
  std::byte* take(size_t size);
  template <class T>
  T* take_array(int64_t count) {
    return reinterpret_cast<T*>(take(static_cast<size_t>(count) * sizeof(T)));
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kSlab = size_t{32} << 20;
  const char* what_;
  std::vector<Buffer> slabs_;
  size_t left_ = 0;  // of the last slab
  size_t used_ = 0;
};

}  // namespace latte::runtime
