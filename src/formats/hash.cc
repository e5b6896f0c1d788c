#include "formats/hash.h"

#include <new>

#include "formats/mapped_file.h"

// Compiled in from its header: no library to find and ship.
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace latte::formats {

struct Hash::State {
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> xxh{XXH3_createState()};
};

Hash::Hash() : state_(std::make_unique<State>()) {
  if (!state_->xxh) throw std::bad_alloc();
  XXH3_128bits_reset(state_->xxh.get());
}

Hash::~Hash() = default;

void Hash::add(std::span<const std::byte> bytes) { XXH3_128bits_update(state_->xxh.get(), bytes.data(), bytes.size()); }

void Hash::add(uint64_t number) { add(std::as_bytes(std::span(&number, 1))); }

void Hash::add(std::string_view text) {
  add(uint64_t{text.size()});
  add(std::as_bytes(std::span(text.data(), text.size())));
}

std::string Hash::digits() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_->xxh.get()));
  constexpr char kHex[] = "0123456789abcdef";
  std::string text;
  for (unsigned char byte : canonical.digest) {
    text += kHex[byte >> 4];
    text += kHex[byte & 15];
  }
  return text;
}

std::string hash_of_file(const std::string& path) {
  Hash hash;
  hash.add(MappedFile(path).bytes());
  return hash.digits();
}

}  // namespace latte::formats
