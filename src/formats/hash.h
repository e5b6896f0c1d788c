// XXH3 (128 bits) of bytes, numbers and texts: what tells a damaged file, and an adapter's base, from any other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace latte::formats {

class Hash {
 public:
  Hash();
  ~Hash();
  Hash(const Hash&) = delete;
  Hash& operator=(const Hash&) = delete;

  void add(std::span<const std::byte> bytes);
  void add(uint64_t number);        // as 64 bits little-endian
  void add(std::string_view text);  // behind its length

  std::string digits() const;  // 32 hexadecimal digits of all so far

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Of a file's bytes. Throws FileError.
std::string hash_of_file(const std::string& path);

}  // namespace latte::formats
