// What every fuzz target needs: its input as a file, since parsers take paths.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace latte::fuzz {

// The path of a file in memory that holds the input; the same file for every input of the process.
inline const std::string& input_file(const uint8_t* data, size_t size) {
  static const int fd = ::memfd_create("fuzz", MFD_CLOEXEC);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  if (::ftruncate(fd, 0) != 0 || ::pwrite(fd, data, size, 0) != static_cast<ssize_t>(size)) std::abort();
  return path;
}

// Reads every byte, so that a view that leaves its file is noticed.
template <typename Bytes>
inline void touch(const Bytes& bytes) {
  unsigned sum = 0;
  for (const auto& byte : bytes) sum += static_cast<unsigned>(byte);
  volatile unsigned sink = sum;
  static_cast<void>(sink);
}

}  // namespace latte::fuzz
