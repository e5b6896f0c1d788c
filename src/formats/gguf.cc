#include "formats/gguf.h"

#include <bit>
#include <cstring>
#include <filesystem>
#include <limits>
#include <type_traits>

#include "formats/error.h"

namespace latte::formats {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers and tensors are read as they lie in memory");

constexpr std::string_view kMagic = "GGUF";
constexpr uint32_t kOldestVersion = 2, kNewestVersion = 3;
constexpr uint32_t kLeastAlignment = 8, kMostAlignment = 1u << 20;
constexpr std::string_view kAlignmentKey = "general.alignment";
constexpr uint32_t kArrayType = 9;
// The fewest bytes that an entry takes in a file: whatever a count says, memory stays within a small multiple of the file.
constexpr uint64_t kLeastEntryBytes = 8 + 4 + 1;
constexpr uint64_t kLeastTensorBytes = 8 + 4 + 4 + 8;

// Reads what follows, and knows how much is left.
class Reader {
 public:
  Reader(const std::string& path, std::span<const std::byte> bytes) : path_(path), bytes_(bytes) {}

  const std::string& path() const { return path_; }
  uint64_t position() const { return position_; }
  uint64_t left() const { return bytes_.size() - position_; }

  [[noreturn]] void fail(const std::string& problem) const { throw FormatError(path_, problem); }

  std::string_view take(uint64_t size, const std::string& what) {
    if (size > left()) {
      fail("the file is cut short, or lies: " + what + " takes " + std::to_string(size) + " bytes at byte " +
           std::to_string(position_) + ", of which " + std::to_string(left()) + " are there");
    }
    const std::string_view found(reinterpret_cast<const char*>(bytes_.data()) + position_, size);
    position_ += size;
    return found;
  }

  template <typename T>
  T number(const std::string& what) {
    const std::string_view found = take(sizeof(T), what);
    T value;
    std::memcpy(&value, found.data(), sizeof(T));
    return value;
  }

  bool boolean(const std::string& what) {
    const auto value = number<uint8_t>(what);
    if (value > 1) fail(what + " has the bool " + std::to_string(value) + ", expected 0 or 1");
    return value == 1;
  }

  std::string_view text(const std::string& what) { return take(number<uint64_t>(what), what); }

  // A count of things that take at least `least` bytes each.
  uint64_t count(uint64_t least, const std::string& what) {
    const auto count = number<uint64_t>(what);
    if (count > left() / least) {
      fail("the file is cut short, or lies: " + std::to_string(count) + " " + what + ", for which " + std::to_string(left()) +
           " bytes are left");
    }
    return count;
  }

 private:
  const std::string& path_;
  std::span<const std::byte> bytes_;
  uint64_t position_ = 0;
};

// Calls `visit` with an empty value of the C++ type that stands for GGUF's type number; false for an unknown number or an array.
template <typename Visit>
bool visit_scalar(uint32_t type, const Visit& visit) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    const auto visit_one = [&]<size_t J>(std::integral_constant<size_t, J>) {
      using T = std::variant_alternative_t<J, GgufValue>;
      if constexpr (std::is_same_v<T, GgufArray>) {
        return false;
      } else {
        visit(T{});
        return true;
      }
    };
    return ((I == type && visit_one(std::integral_constant<size_t, I>{})) || ...);
  }
  (std::make_index_sequence<std::variant_size_v<GgufValue>>{});
}

template <typename T>
std::vector<T> read_array(Reader& reader, const std::string& what) {
  const uint64_t count = reader.count(std::is_same_v<T, std::string> ? 8 : sizeof(T), "elements of " + what);
  std::vector<T> array;
  if constexpr (std::is_same_v<T, std::string>) {
    array.reserve(count);
    for (uint64_t i = 0; i < count; ++i) array.emplace_back(reader.text(what));
  } else if constexpr (std::is_same_v<T, bool>) {
    array.reserve(count);
    for (uint64_t i = 0; i < count; ++i) array.push_back(reader.boolean(what));
  } else {
    array.resize(count);
    if (count > 0) std::memcpy(array.data(), reader.take(count * sizeof(T), what).data(), count * sizeof(T));
  }
  return array;
}

GgufValue read_value(Reader& reader, const std::string& what) {
  const auto type = reader.number<uint32_t>(what);
  GgufValue value;
  if (type == kArrayType) {
    const auto element = reader.number<uint32_t>(what);
    const bool known =
        visit_scalar(element, [&](auto empty) { value.emplace<GgufArray>(read_array<decltype(empty)>(reader, what)); });
    if (!known) reader.fail(what + " is an array of type " + std::to_string(element) + ", which is unknown or an array itself");
    return value;
  }
  const bool known = visit_scalar(type, [&](auto empty) {
    using T = decltype(empty);
    if constexpr (std::is_same_v<T, std::string>) {
      value.emplace<T>(reader.text(what));
    } else if constexpr (std::is_same_v<T, bool>) {
      value.emplace<T>(reader.boolean(what));
    } else {
      value.emplace<T>(reader.number<T>(what));
    }
  });
  if (!known) reader.fail(what + " is of type " + std::to_string(type) + ", expected 0 … 12");
  return value;
}

// C code downstream would take a NUL for the name's end, and so two names for one.
void check_name(const Reader& reader, std::string_view name, const std::string& what) {
  if (name.empty()) reader.fail(what + " has an empty name");
  if (name.find('\0') != name.npos) reader.fail(what + " " + quote(name) + " has a NUL in its name");
}

bool is_alignment(uint64_t alignment) {
  return std::has_single_bit(alignment) && alignment >= kLeastAlignment && alignment <= kMostAlignment;
}

struct Placed {
  GgufTensorSpec spec;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

Placed read_tensor(Reader& reader) {
  Placed tensor;
  const std::string_view name = reader.text("a tensor's name");
  check_name(reader, name, "a tensor");
  const std::string what = "tensor " + quote(name);
  if (name.size() > kLargestGgufName) {
    reader.fail(what + " has a name of " + std::to_string(name.size()) + " bytes, expected at most " +
                std::to_string(kLargestGgufName));
  }
  tensor.spec.name = name;
  const auto rank = reader.number<uint32_t>(what);
  if (rank > kLargestGgufRank) {
    reader.fail(what + " has " + std::to_string(rank) + " dimensions, expected at most " + std::to_string(kLargestGgufRank));
  }
  tensor.spec.shape.resize(rank);
  int64_t rows = 1, columns = 1;
  for (uint32_t i = 0; i < rank; ++i) {
    const auto size = reader.number<int64_t>(what);
    if (size < 1) reader.fail(what + " has the dimension " + std::to_string(size) + ", expected at least 1");
    tensor.spec.shape[rank - 1 - i] = size;
    if (i == 0) columns = size;
    if (i > 0 && __builtin_mul_overflow(rows, size, &rows)) reader.fail(what + " is too large for any memory");
  }
  const auto type = reader.number<uint32_t>(what);
  tensor.spec.type = static_cast<TensorType>(type);
  if (!is_known(tensor.spec.type)) reader.fail(what + " is of the type " + std::to_string(type) + ", which ggml doesn't know");
  int64_t elements = 0;
  const auto bytes = tensor_bytes(tensor.spec.type, rows, columns);
  if (columns % block_size(tensor.spec.type) != 0) {
    reader.fail(what + " has rows of " + std::to_string(columns) + " elements, expected a multiple of " +
                std::to_string(block_size(tensor.spec.type)) + " for " + std::string(name_of(tensor.spec.type)));
  }
  if (!bytes || __builtin_mul_overflow(rows, columns, &elements)) reader.fail(what + " is too large for any memory");
  tensor.bytes = *bytes;
  tensor.offset = reader.number<uint64_t>(what);
  return tensor;
}

}  // namespace

int64_t GgufTensorSpec::elements() const {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

std::string describe(const GgufTensorSpec& spec) {
  std::string text = std::string(name_of(spec.type)) + " [";
  for (size_t i = 0; i < spec.shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(spec.shape[i]);
  return text + "]";
}

std::vector<float> GgufTensor::floats() const {
  std::vector<float> out(static_cast<size_t>(elements()));
  dequantize(type, data, out);
  return out;
}

namespace {

// Says what to do with the other form that models come in, which some commands don't read.
const std::string& no_folder(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::exists(std::filesystem::path(path) / "config.json", ignored)) {
    throw FormatError(path, "a Hugging Face folder where a GGUF file is needed: latte quantize makes one of it (--tokenizer)");
  }
  return path;
}

}  // namespace

GgufFile::GgufFile(const std::string& path) : file_(no_folder(path)), metadata_(path) {
  Reader reader(file_.path(), file_.bytes());
  if (!file_.text().starts_with(kMagic)) {
    reader.fail("not a GGUF file: it begins with " + quote(file_.text().substr(0, kMagic.size())) + ", expected \"GGUF\"");
  }
  reader.take(kMagic.size(), "the magic");
  version_ = reader.number<uint32_t>("the version");
  if (version_ < kOldestVersion || version_ > kNewestVersion) {
    const bool swapped = (version_ & 0xFFFF) == 0;
    reader.fail("GGUF version " + std::to_string(version_) + ", expected 2 or 3" +
                (swapped ? " (a big-endian file, which can't be read here)" : ""));
  }
  const auto tensor_count = reader.count(kLeastTensorBytes, "tensors");
  const auto entry_count = reader.count(kLeastEntryBytes, "metadata entries");

  for (uint64_t i = 0; i < entry_count; ++i) {
    const std::string key(reader.text("a metadata key"));
    check_name(reader, key, "a metadata key");
    if (metadata_.has(key)) reader.fail("metadata " + quote(key) + " is there twice");
    metadata_.set(key, read_value(reader, "metadata " + quote(key)));
  }
  if (const GgufValue* value = metadata_.find(kAlignmentKey)) {
    const uint32_t* alignment = std::get_if<uint32_t>(value);
    if (alignment == nullptr || !is_alignment(*alignment)) {
      metadata_.refuse(kAlignmentKey, "a uint32 that is a power of two in 8 … 1048576");
    }
    alignment_ = *alignment;
  }

  std::vector<Placed> placed;
  placed.reserve(tensor_count);
  uint64_t expected = 0;
  for (uint64_t i = 0; i < tensor_count; ++i) {
    Placed tensor = read_tensor(reader);
    const std::string what = "tensor " + quote(tensor.spec.name);
    if (!places_.emplace(tensor.spec.name, i).second) reader.fail(what + " is there twice");
    if (tensor.offset != expected) {
      reader.fail(what + " begins at byte " + std::to_string(tensor.offset) + " of the data, expected " +
                  std::to_string(expected) + " (tensors follow each other without gap or overlap)");
    }
    if (__builtin_add_overflow(expected, tensor.bytes, &expected) ||
        __builtin_add_overflow(expected, uint64_t{alignment_ - 1}, &expected)) {
      reader.fail(what + " ends beyond any file");
    }
    expected = expected / alignment_ * alignment_;
    placed.push_back(std::move(tensor));
  }

  const uint64_t padding = (alignment_ - reader.position() % alignment_) % alignment_;
  const uint64_t data_size = reader.left() > padding ? reader.left() - padding : 0;
  for (const Placed& tensor : placed) {
    if (tensor.offset > data_size || tensor.bytes > data_size - tensor.offset) {
      reader.fail("the file is cut short: tensor " + quote(tensor.spec.name) + " (" + describe(tensor.spec) + ") ends at byte " +
                  std::to_string(tensor.offset + tensor.bytes) + " of the data, of which " + std::to_string(data_size) +
                  " are there");
    }
  }
  tensors_.reserve(placed.size());
  for (Placed& tensor : placed) {
    GgufTensor view;
    static_cast<GgufTensorSpec&>(view) = std::move(tensor.spec);
    view.data = file_.bytes().subspan(reader.position() + padding + tensor.offset, tensor.bytes);
    tensors_.push_back(std::move(view));
  }
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto it = places_.find(name);
  return it == places_.end() ? nullptr : &tensors_[it->second];
}

const GgufTensor& GgufFile::at(std::string_view name) const {
  if (const GgufTensor* tensor = find(name)) return *tensor;
  throw FormatError(path(), "tensor " + quote(name) + " is missing");
}

bool is_gguf(const std::string& path) { return MappedFile(path).text().starts_with(kMagic); }

}  // namespace latte::formats
