#include <bit>
#include <set>
#include <stdexcept>
#include <type_traits>

#include "formats/error.h"
#include "formats/gguf.h"

namespace latte::formats {
namespace {

constexpr uint32_t kVersion = 3;
constexpr uint32_t kArrayType = 9;
constexpr uint32_t kLeastAlignment = 8, kMostAlignment = 1u << 20;

class Header {
 public:
  template <typename T>
  void number(T value) {
    static_assert(std::is_arithmetic_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  void text(std::string_view text) {
    number(uint64_t{text.size()});
    bytes_ += text;
  }
  void raw(std::string_view bytes) { bytes_ += bytes; }
  void pad(uint64_t alignment) { bytes_.append((alignment - bytes_.size() % alignment) % alignment, '\0'); }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

template <typename T>
void add_scalar(Header& header, const T& value) {
  if constexpr (std::is_same_v<T, std::string>) {
    header.text(value);
  } else if constexpr (std::is_same_v<T, bool>) {
    header.number(uint8_t{value});
  } else {
    header.number(value);
  }
}

void add_value(Header& header, const GgufValue& value) {
  header.number(static_cast<uint32_t>(value.index()));
  std::visit(
      [&](const auto& held) {
        if constexpr (std::is_same_v<std::decay_t<decltype(held)>, GgufArray>) {
          // The numbers of element types are those of scalars, among which that of arrays is left out.
          const auto index = static_cast<uint32_t>(held.index());
          header.number(index < kArrayType ? index : index + 1);
          std::visit(
              [&](const auto& array) {
                header.number(uint64_t{array.size()});
                using E = typename std::decay_t<decltype(array)>::value_type;
                for (const E& element : array) add_scalar<E>(header, element);
              },
              held);
        } else {
          add_scalar(header, held);
        }
      },
      value);
}

uint32_t alignment_of(const GgufMetadata& metadata) {
  const GgufValue* value = metadata.find("general.alignment");
  if (value == nullptr) return kDefaultGgufAlignment;
  const uint32_t* alignment = std::get_if<uint32_t>(value);
  if (alignment == nullptr || !std::has_single_bit(*alignment) || *alignment < kLeastAlignment || *alignment > kMostAlignment) {
    throw std::invalid_argument("general.alignment is " + describe(*value) +
                                ", expected a uint32 that is a power of two in 8 … 1048576");
  }
  return *alignment;
}

// Bytes of a tensor that can be written.
uint64_t checked_size(const GgufTensorSpec& spec) {
  const auto fail = [&](const std::string& problem) {
    throw std::invalid_argument("tensor " + quote(spec.name) + " can't be written: " + problem);
  };
  if (spec.name.empty() || spec.name.size() > kLargestGgufName) {
    fail("a name of " + std::to_string(spec.name.size()) + " bytes, expected 1 … " + std::to_string(kLargestGgufName));
  }
  if (spec.name.find('\0') != spec.name.npos) fail("a NUL in its name");
  if (!is_known(spec.type)) fail("ggml doesn't know type " + std::to_string(static_cast<uint32_t>(spec.type)));
  if (spec.shape.size() > kLargestGgufRank) fail("more than " + std::to_string(kLargestGgufRank) + " dimensions");
  int64_t rows = 1;
  for (size_t i = 0; i < spec.shape.size(); ++i) {
    if (spec.shape[i] < 1) fail(describe(spec) + " has a dimension below 1");
    if (i + 1 < spec.shape.size() && __builtin_mul_overflow(rows, spec.shape[i], &rows)) fail(describe(spec) + " is too large");
  }
  const auto bytes = tensor_bytes(spec.type, rows, spec.shape.empty() ? 1 : spec.shape.back());
  if (!bytes) fail(describe(spec) + " has rows of no whole blocks, or is too large");
  return *bytes;
}

// The header up to the tensors.
Header begin_header(const GgufMetadata& metadata, size_t tensors) {
  Header header;
  header.raw("GGUF");
  header.number(kVersion);
  header.number(uint64_t{tensors});
  header.number(uint64_t{metadata.entries().size()});
  for (const auto& [key, value] : metadata.entries()) {
    if (key.empty() || key.find('\0') != key.npos) throw std::invalid_argument("metadata " + quote(key) + " can't be a key");
    header.text(key);
    add_value(header, value);
  }
  return header;
}

uint64_t padded(uint64_t size, uint64_t alignment) { return (size + alignment - 1) / alignment * alignment; }

}  // namespace

void write_gguf(const std::string& path, const GgufMetadata& metadata, std::span<const GgufTensorSpec> tensors,
                const std::function<void(size_t, const WriteBytes&)>& produce, FileOperations& operations) {
  const uint64_t alignment = alignment_of(metadata);
  Header header = begin_header(metadata, tensors.size());
  std::set<std::string_view> names;
  std::vector<uint64_t> sizes;
  uint64_t offset = 0;
  for (const GgufTensorSpec& spec : tensors) {
    sizes.push_back(checked_size(spec));
    if (!names.insert(spec.name).second) throw std::invalid_argument("tensor " + quote(spec.name) + " is given twice");
    header.text(spec.name);
    header.number(static_cast<uint32_t>(spec.shape.size()));
    for (size_t i = spec.shape.size(); i-- > 0;) header.number(spec.shape[i]);
    header.number(static_cast<uint32_t>(spec.type));
    header.number(offset);
    offset += padded(sizes.back(), alignment);
  }
  header.pad(alignment);

  AtomicFile file(path, operations);
  file.write(header.bytes());
  const std::string zeros(alignment, '\0');
  for (size_t i = 0; i < tensors.size(); ++i) {
    uint64_t written = 0;
    produce(i, [&](std::span<const std::byte> bytes) {
      written += bytes.size();
      file.write(bytes);
    });
    if (written != sizes[i]) {
      throw std::invalid_argument("tensor " + quote(tensors[i].name) + ": " + std::to_string(written) +
                                  " bytes of data, expected " + std::to_string(sizes[i]) + " for " + describe(tensors[i]));
    }
    file.write(std::string_view(zeros).substr(0, padded(written, alignment) - written));
  }
  file.commit();
}

void write_gguf(const std::string& path, const GgufMetadata& metadata, std::span<const GgufTensor> tensors,
                FileOperations& operations) {
  std::vector<GgufTensorSpec> specs(tensors.begin(), tensors.end());
  for (size_t i = 0; i < specs.size(); ++i) {
    if (const uint64_t size = checked_size(specs[i]); size != tensors[i].data.size()) {
      throw std::invalid_argument("tensor " + quote(specs[i].name) + ": " + std::to_string(tensors[i].data.size()) +
                                  " bytes of data, expected " + std::to_string(size) + " for " + describe(specs[i]));
    }
  }
  write_gguf(
      path, metadata, specs, [&](size_t i, const WriteBytes& write) { write(tensors[i].data); }, operations);
}

std::string gguf_without_tensors(const GgufMetadata& metadata) {
  alignment_of(metadata);
  return begin_header(metadata, 0).bytes();
}

}  // namespace latte::formats
