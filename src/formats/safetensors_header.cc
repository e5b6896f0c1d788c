#include "formats/safetensors_header.h"

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "formats/error.h"

namespace latte::formats {
namespace {

using Json = nlohmann::json;

// A parser of events rather than of a document: it stops at the first value out of place, so that a header of a million brackets
// costs nothing, and sees keys that appear twice, which a document would merge.
class HeaderParser : public nlohmann::json_sax<Json> {
 public:
  HeaderParser(const std::string& path, SafetensorsHeader& header) : path_(path), header_(header) {}

  bool null() override { unexpected("null"); }
  bool boolean(bool) override { unexpected("a boolean"); }
  bool number_float(number_float_t, const string_t& text) override { unexpected("the number " + text.substr(0, 40)); }
  bool binary(binary_t&) override { unexpected("binary data"); }
  bool number_integer(number_integer_t value) override { unexpected("the number " + std::to_string(value)); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ == Place::kShape) {
      if (value > INT64_MAX) unexpected("the number " + std::to_string(value));
      if (entry_.shape.size() == kLargestRank) fail("has more than " + std::to_string(kLargestRank) + " dimensions");
      entry_.shape.push_back(static_cast<int64_t>(value));
    } else if (place_ == Place::kOffsets && offsets_ < 2) {
      (offsets_++ == 0 ? entry_.begin : entry_.end) = value;
    } else {
      unexpected("the number " + std::to_string(value));
    }
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::kMetadataValue) {
      if (!header_.metadata.emplace(key_, std::move(value)).second) fail("has the key " + quote(key_) + " twice");
      place_ = Place::kMetadata;
    } else if (place_ == Place::kDType) {
      const std::optional<DType> dtype = dtype_named(value);
      if (!dtype) fail("has dtype " + quote(value) + ", expected one of F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL");
      entry_.dtype = *dtype;
      place_ = Place::kTensor;
    } else {
      unexpected("the string " + quote(value));
    }
    return true;
  }

  bool start_object(std::size_t) override {
    switch (place_) {
      case Place::kStart:
        place_ = Place::kTop;
        return true;
      case Place::kMetadataStart:
        place_ = Place::kMetadata;
        return true;
      case Place::kTensorStart:
        place_ = Place::kTensor;
        return true;
      default:
        unexpected("an object");
    }
  }

  bool key(string_t& key) override {
    switch (place_) {
      case Place::kTop:
        if (key == kMetadataKey) {
          if (std::exchange(has_metadata_, true)) throw FormatError(path_, "the header has " + quote(key) + " twice");
          entry_ = {};
          place_ = Place::kMetadataStart;
        } else {
          entry_ = {.name = key};
          place_ = Place::kTensorStart;
        }
        has_dtype_ = has_shape_ = has_offsets_ = false;
        offsets_ = 0;
        return true;
      case Place::kMetadata:
        key_ = key;
        place_ = Place::kMetadataValue;
        return true;
      case Place::kTensor: {
        const bool dtype = key == "dtype", shape = key == "shape", offsets = key == "data_offsets";
        if (!dtype && !shape && !offsets) fail("has the key " + quote(key) + ", expected dtype, shape and data_offsets");
        bool& seen = dtype ? has_dtype_ : shape ? has_shape_ : has_offsets_;
        if (std::exchange(seen, true)) fail("has the key " + quote(key) + " twice");
        place_ = dtype ? Place::kDType : shape ? Place::kShapeStart : Place::kOffsetsStart;
        return true;
      }
      default:
        unexpected("a key");
    }
  }

  bool end_object() override {
    if (place_ == Place::kTensor) {
      if (!has_dtype_ || !has_shape_ || !has_offsets_) {
        fail(std::string("has no ") + (!has_dtype_ ? "dtype" : !has_shape_ ? "shape" : "data_offsets"));
      }
      header_.entries.push_back(std::move(entry_));
    }
    place_ = place_ == Place::kTop ? Place::kEnd : Place::kTop;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::kShapeStart && place_ != Place::kOffsetsStart) unexpected("an array");
    place_ = place_ == Place::kShapeStart ? Place::kShape : Place::kOffsets;
    return true;
  }

  bool end_array() override {
    if (place_ == Place::kOffsets && offsets_ != 2) {
      fail("has " + std::to_string(offsets_) + " data_offsets, expected begin and end");
    }
    place_ = Place::kTensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    // The library's own text may quote raw bytes of the file.
    throw FormatError(path_, "the header is no valid JSON at its byte " + std::to_string(position));
  }

 private:
  enum class Place {
    kStart,
    kTop,
    kMetadataStart,
    kMetadata,
    kMetadataValue,
    kTensorStart,
    kTensor,
    kDType,
    kShapeStart,
    kShape,
    kOffsetsStart,
    kOffsets,
    kEnd,
  };

  std::string subject() const {
    switch (place_) {
      case Place::kStart:
      case Place::kTop:
      case Place::kEnd:
        return "the header";
      case Place::kMetadataStart:
      case Place::kMetadata:
      case Place::kMetadataValue:
        return quote(kMetadataKey);
      default:
        return "tensor " + quote(entry_.name);
    }
  }

  std::string expected() const {
    switch (place_) {
      case Place::kMetadataValue:
        return "a string for the key " + quote(key_);
      case Place::kDType:
        return "a string for dtype";
      case Place::kShapeStart:
        return "an array for shape";
      case Place::kShape:
        return "dimensions from 0 to 2^63 - 1";
      case Place::kOffsetsStart:
        return "an array for data_offsets";
      case Place::kOffsets:
        return "two data_offsets from 0 to 2^64 - 1";
      default:
        return "an object";
    }
  }

  [[noreturn]] void fail(const std::string& problem) const { throw FormatError(path_, subject() + " " + problem); }
  [[noreturn]] void unexpected(const std::string& what) const { fail("has " + what + ", expected " + expected()); }

  const std::string& path_;
  SafetensorsHeader& header_;
  Place place_ = Place::kStart;
  bool has_metadata_ = false;
  std::string key_;    // of the metadata entry at hand
  HeaderEntry entry_;  // the tensor at hand
  bool has_dtype_ = false, has_shape_ = false, has_offsets_ = false;
  int offsets_ = 0;  // seen
};

void check_layout(const std::string& path, const std::vector<HeaderEntry>& entries, uint64_t data_size) {
  for (const HeaderEntry& entry : entries) {
    const std::string subject = "tensor " + quote(entry.name);
    const std::optional<uint64_t> bytes = checked_bytes(entry.dtype, entry.shape);
    const std::string what = describe({entry.name, entry.dtype, entry.shape});
    if (!bytes) throw FormatError(path, subject + ": " + what + " is too large for any memory");
    if (entry.begin > entry.end) {
      throw FormatError(
          path, subject + " ends at byte " + std::to_string(entry.end) + ", before its begin at " + std::to_string(entry.begin));
    }
    if (entry.end - entry.begin != *bytes) {
      throw FormatError(path, subject + " has " + std::to_string(entry.end - entry.begin) + " bytes, expected " +
                                  std::to_string(*bytes) + " for " + what);
    }
  }
  std::vector<size_t> order(entries.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::pair(entries[a].begin, entries[a].end) < std::pair(entries[b].begin, entries[b].end);
  });
  uint64_t end = 0;
  for (size_t i : order) {
    if (entries[i].begin != end) {
      throw FormatError(path, "tensor " + quote(entries[i].name) + " begins at byte " + std::to_string(entries[i].begin) +
                                  " of the data, expected " + std::to_string(end) +
                                  " (tensors follow each other without gap or overlap)");
    }
    end = entries[i].end;
  }
  if (end > data_size) {
    throw FormatError(path,
                      "the file is cut short: " + std::to_string(data_size) + " bytes of data, expected " + std::to_string(end));
  }
  if (end < data_size) {
    throw FormatError(path, std::to_string(data_size - end) + " bytes follow the last tensor, expected none");
  }
}

}  // namespace

std::optional<uint64_t> checked_bytes(DType dtype, const std::vector<int64_t>& shape) {
  auto bytes = static_cast<int64_t>(size_of(dtype));
  for (int64_t dimension : shape) {
    if (dimension < 0 || __builtin_mul_overflow(bytes, dimension, &bytes)) return std::nullopt;
  }
  return static_cast<uint64_t>(bytes);
}

SafetensorsHeader parse_safetensors_header(const std::string& path, std::string_view json, uint64_t data_size) {
  // The parser would skip white space and a byte order mark; the format has neither here.
  if (!json.starts_with('{')) throw FormatError(path, "not a safetensors file: its header doesn't begin with {");
  // It would also take a NUL for the end, whatever follows.
  if (const size_t nul = json.find('\0'); nul != json.npos) {
    throw FormatError(path, "the header is no valid JSON at its byte " + std::to_string(nul + 1));
  }
  SafetensorsHeader header;
  HeaderParser parser(path, header);
  if (!Json::sax_parse(json.begin(), json.end(), &parser)) throw FormatError(path, "the header is no valid JSON");
  auto& entries = header.entries;
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  const auto twice =
      std::adjacent_find(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.name == b.name; });
  if (twice != entries.end()) throw FormatError(path, "the header has tensor " + quote(twice->name) + " twice");
  check_layout(path, entries, data_size);
  return header;
}

}  // namespace latte::formats
