// A regular file mapped read-only in memory.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace latte::formats {

// The bytes stay valid as long as the object lives, also when the file is replaced (AtomicFile) or removed meanwhile. Whoever
// shortens the file in place while it is mapped gets this process a SIGBUS; nothing in latte does.
class MappedFile {
 public:
  // Throws FileError: no such file, no permission, or not a regular file (EISDIR, or EINVAL for devices and pipes).
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  size_t size() const { return bytes_.size(); }
  std::span<const std::byte> bytes() const { return bytes_; }
  // Gives the memory of whole pages of `part`, a part of bytes(), back to the system: they are read again where they are needed.
  void release(std::span<const std::byte> part) const;
  std::string_view text() const { return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()}; }

 private:
  std::string path_;
  std::span<const std::byte> bytes_;  // empty, and mapped nowhere, for an empty file
};

}  // namespace latte::formats
