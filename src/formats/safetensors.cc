#include "formats/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <utility>

#include "formats/error.h"
#include "formats/safetensors_header.h"
#include "formats/utf8.h"

namespace latte::formats {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are read and written as they lie in memory");

constexpr size_t kLengthBytes = 8;  // of the header's length, in front of the header
constexpr size_t kAlignment = 8;    // of the header's end

// Whoever copies the bytes into a C++ bool relies on this.
void check_booleans(const std::string& path, const TensorView& tensor) {
  const auto wrong = std::find_if(tensor.data.begin(), tensor.data.end(), [](std::byte b) { return b > std::byte{1}; });
  if (wrong == tensor.data.end()) return;
  throw FormatError(path, "tensor " + quote(tensor.name) + " (BOOL) has the value " +
                              std::to_string(std::to_integer<int>(*wrong)) + " at element " +
                              std::to_string(wrong - tensor.data.begin()) + ", expected 0 or 1");
}

bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const int length = decode_utf8(text, i).length;
    if (length == 0) return false;
    i += length;
  }
  return true;
}

void check_writable(const TensorView& tensor) {
  const auto fail = [&](const std::string& problem) {
    throw std::invalid_argument("tensor " + quote(tensor.name) + " can't be written: " + problem);
  };
  if (tensor.name == kMetadataKey) fail("the name is reserved");
  if (!is_utf8(tensor.name)) fail("the name isn't UTF-8");
  if (tensor.shape.size() > kLargestRank) fail("more than " + std::to_string(kLargestRank) + " dimensions");
  const std::optional<uint64_t> bytes = checked_bytes(tensor.dtype, tensor.shape);
  if (!bytes || *bytes != tensor.data.size()) {
    fail(std::to_string(tensor.data.size()) + " bytes of data, expected " + (bytes ? std::to_string(*bytes) : "fewer") + " for " +
         describe(tensor));
  }
}

// `tensors` in the order of their data.
std::string make_header(const std::vector<const TensorView*>& tensors, const Metadata& metadata) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header[std::string(kMetadataKey)] = metadata;
  uint64_t offset = 0;
  for (const TensorView* tensor : tensors) {
    auto& entry = header[tensor->name];
    if (!entry.is_null()) throw std::invalid_argument("tensor " + quote(tensor->name) + " is given twice");
    entry = {
        {"dtype", name_of(tensor->dtype)}, {"shape", tensor->shape}, {"data_offsets", {offset, offset + tensor->data.size()}}};
    offset += tensor->data.size();
  }
  std::string text = header.dump();
  text.append((kAlignment - text.size() % kAlignment) % kAlignment, ' ');
  return text;
}

// The first few of `names`, and how many more there are.
std::string list(const std::vector<std::string>& names) {
  constexpr size_t kShown = 5;
  std::string text;
  for (size_t i = 0; i < std::min(names.size(), kShown); ++i) text += (i == 0 ? "" : ", ") + names[i];
  if (names.size() > kShown) text += " and " + std::to_string(names.size() - kShown) + " more";
  return text;
}

}  // namespace

std::string describe(const TensorSpec& spec) {
  std::string text = std::string(name_of(spec.dtype)) + " [";
  for (size_t i = 0; i < spec.shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(spec.shape[i]);
  return text + "]";
}

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  const std::span<const std::byte> bytes = file_.bytes();
  if (bytes.size() < kLengthBytes) {
    throw FormatError(path, "not a safetensors file, or cut short: " + std::to_string(bytes.size()) +
                                " bytes, expected at least " + std::to_string(kLengthBytes));
  }
  uint64_t length = 0;
  for (size_t i = kLengthBytes; i-- > 0;) length = length << 8 | std::to_integer<uint64_t>(bytes[i]);
  if (length > kLargestHeader) {
    throw FormatError(path, "not a safetensors file: a header of " + std::to_string(length) + " bytes, expected at most " +
                                std::to_string(kLargestHeader));
  }
  if (length > bytes.size() - kLengthBytes) {
    throw FormatError(path, "the file is cut short: a header of " + std::to_string(length) + " bytes, of which " +
                                std::to_string(bytes.size() - kLengthBytes) + " are there");
  }
  const std::span<const std::byte> data = bytes.subspan(kLengthBytes + length);
  SafetensorsHeader header = parse_safetensors_header(path, file_.text().substr(kLengthBytes, length), data.size());
  metadata_ = std::move(header.metadata);
  tensors_.reserve(header.entries.size());
  for (HeaderEntry& entry : header.entries) {
    TensorView tensor;
    tensor.name = std::move(entry.name);
    tensor.dtype = entry.dtype;
    tensor.shape = std::move(entry.shape);
    tensor.data = data.subspan(entry.begin, entry.end - entry.begin);
    if (tensor.dtype == DType::kBool) check_booleans(path, tensor);
    tensors_.push_back(std::move(tensor));
  }
}

const TensorView* SafetensorsFile::find(std::string_view name) const {
  const auto it = std::lower_bound(tensors_.begin(), tensors_.end(), name,
                                   [](const TensorView& tensor, std::string_view wanted) { return tensor.name < wanted; });
  return it != tensors_.end() && it->name == name ? &*it : nullptr;
}

const TensorView& SafetensorsFile::at(std::string_view name) const {
  if (const TensorView* tensor = find(name)) return *tensor;
  throw FormatError(path(), "tensor " + quote(name) + " is missing");
}

const std::string& SafetensorsFile::metadata_at(const std::string& key) const {
  if (const auto it = metadata_.find(key); it != metadata_.end()) return it->second;
  throw FormatError(path(), "metadata " + quote(key) + " is missing");
}

void SafetensorsFile::require(std::span<const TensorSpec> expected) const {
  std::vector<std::string> missing, different, unexpected, names;
  for (const TensorSpec& spec : expected) {
    names.push_back(spec.name);
    const TensorView* tensor = find(spec.name);
    if (tensor == nullptr) {
      missing.push_back(quote(spec.name));
    } else if (tensor->dtype != spec.dtype || tensor->shape != spec.shape) {
      different.push_back(quote(spec.name) + " is " + describe(*tensor) + ", expected " + describe(spec));
    }
  }
  std::sort(names.begin(), names.end());
  for (const TensorView& tensor : tensors_) {
    if (!std::binary_search(names.begin(), names.end(), tensor.name)) unexpected.push_back(quote(tensor.name));
  }
  std::string problem;
  const auto add = [&](const std::string& label, const std::vector<std::string>& found) {
    if (!found.empty()) problem += (problem.empty() ? "" : "; ") + label + list(found);
  };
  add("missing tensors: ", missing);
  add("unexpected tensors: ", unexpected);
  add("", different);
  if (!problem.empty()) throw FormatError(path(), problem);
}

void write_safetensors(const std::string& path, std::span<const TensorView> tensors, const Metadata& metadata,
                       FileOperations& operations) {
  std::vector<const TensorView*> order;
  for (const TensorView& tensor : tensors) {
    check_writable(tensor);
    order.push_back(&tensor);
  }
  for (const auto& [key, value] : metadata) {
    if (!is_utf8(key) || !is_utf8(value)) throw std::invalid_argument("metadata " + quote(key) + " isn't UTF-8");
  }
  std::sort(order.begin(), order.end(), [](const TensorView* a, const TensorView* b) {
    const size_t size_a = size_of(a->dtype), size_b = size_of(b->dtype);
    return size_a != size_b ? size_a > size_b : a->name < b->name;
  });
  const std::string header = make_header(order, metadata);
  if (header.size() > kLargestHeader) {
    throw std::invalid_argument("the header of " + path + " takes " + std::to_string(header.size()) +
                                " bytes, expected at most " + std::to_string(kLargestHeader));
  }
  std::array<std::byte, kLengthBytes> length;
  for (size_t i = 0; i < kLengthBytes; ++i) length[i] = static_cast<std::byte>(header.size() >> 8 * i);

  AtomicFile file(path, operations);
  file.write(length);
  file.write(header);
  for (const TensorView* tensor : order) file.write(tensor->data);
  file.commit();
}

}  // namespace latte::formats
