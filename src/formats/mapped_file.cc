#include "formats/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cassert>
#include <cerrno>
#include <cstdint>
#include <utility>

#include "formats/error.h"

namespace latte::formats {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  // Without O_NONBLOCK opening a pipe that nobody writes to would wait for ever.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) throw FileError("open", path, errno);
  const auto fail = [&](std::string_view action, int error_number) {
    ::close(fd);
    throw FileError(action, path, error_number);
  };
  struct stat status {};
  if (::fstat(fd, &status) != 0) fail("read", errno);
  if (S_ISDIR(status.st_mode)) fail("read", EISDIR);
  if (!S_ISREG(status.st_mode)) fail("map what isn't a regular file,", EINVAL);
  if (static_cast<uint64_t>(status.st_size) > SIZE_MAX) fail("map", EFBIG);
  const auto size = static_cast<size_t>(status.st_size);
  if (size > 0) {
    void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) fail("map", errno);
    bytes_ = {static_cast<const std::byte*>(data), size};
  }
  ::close(fd);
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})) {}

void MappedFile::release(std::span<const std::byte> part) const {
  assert(part.data() >= bytes_.data() && part.data() + part.size() <= bytes_.data() + bytes_.size());
  // The mapping begins at a page.
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const auto offset = static_cast<size_t>(part.data() - bytes_.data());
  const size_t begin = (offset + page - 1) / page * page, end = (offset + part.size()) / page * page;
  if (begin >= end) return;
  ::madvise(const_cast<std::byte*>(bytes_.data()) + begin, end - begin, MADV_DONTNEED);  // a hint: it may fail
}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace latte::formats
