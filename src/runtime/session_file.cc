// A session's file: magic, version, what it was made with, the stretches of its memory that hold something, the caller's note,
// and a checksum of all that; numbers are little-endian, as the machines are that this runs on.
#include <algorithm>
#include <array>
#include <cstring>

#include "formats/atomic_file.h"
#include "formats/error.h"
#include "formats/hash.h"
#include "formats/mapped_file.h"
#include "runtime/error.h"
#include "runtime/session.h"

namespace latte::runtime {
namespace {

constexpr uint32_t kVersion = 2;
constexpr size_t kDigits = 32;

struct Header {
  std::array<char, 8> magic = {'L', 'A', 'T', 'T', 'E', 'S', 'T', '\n'};
  uint32_t version = kVersion;
  uint32_t dtype = 0;
  int64_t position = 0;
  int64_t context = 0;
  uint64_t payload = 0;  // bytes
  uint64_t note = 0;     // bytes
  std::array<char, kDigits> model = {};
};
static_assert(sizeof(Header) == 80, "no padding: the bytes are written as they are");

std::span<const std::byte> bytes_of(const Header& header) { return std::as_bytes(std::span(&header, 1)); }

}  // namespace

void Session::save(const std::string& path, std::string_view note) const {
  Header header;
  header.dtype = static_cast<uint32_t>(options_.dtype);
  header.position = position_;
  header.context = options_.context;
  header.payload = bytes_in_use();
  header.note = note.size();
  std::copy_n(model_->state_hash().begin(), kDigits, header.model.begin());
  formats::AtomicFile file(path);
  formats::Hash hash;
  const auto write = [&](std::span<const std::byte> bytes) {
    hash.add(bytes);
    file.write(bytes);
  };
  write(bytes_of(header));
  for (const Stretch& stretch : stretches(position_)) write({memory_.data() + stretch.begin, stretch.size});
  write(std::as_bytes(std::span(note)));
  file.write(hash.digits());
  file.commit();
}

Session Session::load(const std::string& path, std::shared_ptr<const Model> model, std::string* note) {
  const formats::MappedFile file(path);
  const auto refuse = [&](const std::string& reason) { throw StateError(path + ": " + reason); };
  const std::span<const std::byte> bytes = file.bytes();
  Header header, expected;
  if (bytes.size() < sizeof(Header) + kDigits) refuse("too short for a saved state");
  std::memcpy(&header, bytes.data(), sizeof(Header));
  if (header.magic != expected.magic) refuse("not a saved state");
  if (header.version != kVersion) {
    refuse("a saved state of version " + std::to_string(header.version) + ", version " + std::to_string(kVersion) +
           " is read here");
  }
  const uint64_t content = bytes.size() - sizeof(Header) - kDigits;
  if (header.payload > content || header.note != content - header.payload) {
    refuse("cut short or damaged: " + std::to_string(bytes.size()) + " bytes aren't what its header says");
  }
  if (!std::equal(header.model.begin(), header.model.end(), model->state_hash().begin(), model->state_hash().end())) {
    refuse("of another model, adapter or attention than " + model->path());
  }
  constexpr uint32_t kDTypes = 3;
  constexpr int64_t kMost = int64_t{1} << 40;
  if (header.dtype >= kDTypes || header.position < 0 || header.position > kMost || header.context < 1 || header.context > kMost) {
    refuse("damaged: sizes that can't be");
  }
  SessionOptions options;
  options.context = header.context;
  options.dtype = static_cast<kernels::DType>(header.dtype);
  Session session(std::move(model), options);
  if (header.position > 0 && session.room() < header.position) refuse("damaged: more tokens than there is room for");
  session.position_ = header.position;
  if (session.bytes_in_use() != header.payload) refuse("damaged: the payload doesn't fit its position");
  formats::Hash hash;
  const std::byte* next = bytes.data();
  const auto add = [&](size_t size) {
    hash.add(std::span(next, size));
    next += size;
  };
  add(sizeof(Header));
  for (const Stretch& stretch : session.stretches(session.position_)) {
    std::memcpy(session.memory_.data() + stretch.begin, next, stretch.size);
    add(stretch.size);
  }
  const std::byte* text = next;
  add(static_cast<size_t>(header.note));
  const std::string digits = hash.digits();
  if (std::memcmp(digits.data(), next, kDigits) != 0) refuse("damaged: its checksum doesn't fit");
  if (note != nullptr) note->assign(reinterpret_cast<const char*>(text), static_cast<size_t>(header.note));
  return session;
}

}  // namespace latte::runtime
