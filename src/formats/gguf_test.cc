#include "formats/gguf.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/test_files.h"

namespace latte::formats {
namespace {

// A GGUF file put together by hand: the tests of the reader don't lean on the writer.
class Bytes {
 public:
  template <typename T>
  Bytes& number(T value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  Bytes& text(std::string_view text) {
    number(uint64_t{text.size()});
    text_ += text;
    return *this;
  }
  Bytes& head(uint64_t tensors, uint64_t entries, uint32_t version = 3) {
    text_ += "GGUF";
    return number(version).number(tensors).number(entries);
  }
  Bytes& tensor(std::string_view name, const std::vector<int64_t>& ne, uint32_t type, uint64_t offset) {
    text(name).number(static_cast<uint32_t>(ne.size()));
    for (int64_t size : ne) number(size);
    return number(type).number(offset);
  }
  Bytes& data(size_t size, size_t alignment = 32) {
    text_.append((alignment - text_.size() % alignment) % alignment, '\0');
    text_.append(size, '\1');
    return *this;
  }
  const std::string& str() const { return text_; }

 private:
  std::string text_;
};

constexpr uint32_t kString = 8, kArray = 9, kUInt32 = 4, kBool = 7, kUInt8 = 0;

class GgufTest : public ::testing::Test {
 protected:
  std::string refuse(const std::string& bytes) {
    write_bytes(path_, bytes);
    return error_text<FormatError>([&] { GgufFile file(path_); });
  }

  TestFolder folder_;
  std::string path_ = folder_ / "model.gguf";
};

GgufMetadata every_type() {
  GgufMetadata metadata("model.gguf");
  metadata.set("u8", uint8_t{200});
  metadata.set("i8", int8_t{-100});
  metadata.set("u16", uint16_t{60000});
  metadata.set("i16", int16_t{-30000});
  metadata.set("u32", uint32_t{4000000000u});
  metadata.set("i32", int32_t{-2000000000});
  metadata.set("f32", 0.25f);
  metadata.set("bool", true);
  metadata.set("string", std::string("größe\0x", 9));
  metadata.set("u64", uint64_t{1} << 63);
  metadata.set("i64", int64_t{-1} << 62);
  metadata.set("f64", 1e-300);
  metadata.set("strings", GgufArray(std::vector<std::string>{"a", "", "ccc"}));
  metadata.set("bools", GgufArray(std::vector<bool>{true, false, true}));
  metadata.set("i32s", GgufArray(std::vector<int32_t>{-1, 2, 3}));
  metadata.set("u64s", GgufArray(std::vector<uint64_t>{1, uint64_t{1} << 63}));
  metadata.set("f64s", GgufArray(std::vector<double>{0.5, -2}));
  metadata.set("none", GgufArray(std::vector<float>{}));
  return metadata;
}

std::vector<float> ramp(size_t count) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& value : out) value = normal(random);
  return out;
}

TEST_F(GgufTest, WhatIsWrittenIsReadBack) {
  const std::vector<float> weights = ramp(384);
  const auto q8 = quantize(TensorType::kQ8_0, weights, 64);
  const float scalar = 3;
  std::vector<GgufTensor> tensors(3);
  tensors[0] = {{"blk.0.attn_q.weight", TensorType::kF32, {6, 64}}, bytes_of(weights)};
  tensors[1] = {{"scalar", TensorType::kF32, {}}, std::as_bytes(std::span(&scalar, 1))};
  tensors[2] = {{"q8", TensorType::kQ8_0, {2, 3, 64}}, q8};
  write_gguf(path_, every_type(), tensors);

  const GgufFile file(path_);
  EXPECT_EQ(file.version(), 3u);
  EXPECT_EQ(file.metadata().entries(), every_type().entries());
  ASSERT_EQ(file.tensors().size(), 3u);
  EXPECT_EQ(describe(file.tensors()[0]), "f32 [6, 64]");
  EXPECT_EQ(describe(file.tensors()[1]), "f32 []");
  EXPECT_EQ(describe(file.at("q8")), "q8_0 [2, 3, 64]");
  EXPECT_EQ(file.at("blk.0.attn_q.weight").floats(), weights);
  EXPECT_EQ(file.at("scalar").floats(), std::vector<float>{3});
  EXPECT_EQ(file.find("absent"), nullptr);
  EXPECT_CONTAINS(error_text<FormatError>([&] { file.at("absent"); }), "tensor \"absent\" is missing");
  for (const GgufTensor& tensor : file.tensors()) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data.data()) % file.alignment(), 0u);
  }
  EXPECT_EQ(folder_.names(), std::set<std::string>{"model.gguf"});
}

TEST_F(GgufTest, EveryTypeThatGgmlWritesIsReadWithinItsStep) {
  const int64_t columns = 256;
  const std::vector<float> weights = ramp(4 * columns);
  int types = 0;
  for (uint32_t number = 0; number < 64; ++number) {
    const auto type = static_cast<TensorType>(number);
    if (!is_known(type) || !can_quantize(type)) continue;
    ++types;
    EXPECT_EQ(tensor_type_named(name_of(type)), type);
    const auto bytes = quantize(type, weights, columns);
    std::vector<float> back(weights.size());
    dequantize(type, bytes, back);
    double error = 0, norm = 0;
    for (size_t i = 0; i < back.size(); ++i) {
      error += std::pow(back[i] - weights[i], 2);
      norm += std::pow(weights[i], 2);
    }
    // A uniform step over a normal distribution's range loses about 4^-bits; one- and two-bit types keep little but the sign.
    const double bits = 8.0 * static_cast<double>(bytes.size()) / static_cast<double>(weights.size());
    EXPECT_LT(error / norm, bits < 3 ? 0.75 : 4 * std::pow(4.0, 1.5 - bits) + 1e-5) << name_of(type) << " " << bits;
  }
  EXPECT_GT(types, 12);
  EXPECT_THROW(quantize(TensorType::kQ4_K, weights, 32), std::invalid_argument);
  std::vector<float> wrong(31);
  EXPECT_THROW(dequantize(TensorType::kQ8_0, std::vector<std::byte>(34), wrong), std::invalid_argument);
}

TEST_F(GgufTest, TypedAccessNamesWhatCameAndWhatWasExpected) {
  const GgufMetadata metadata = every_type();
  EXPECT_EQ(metadata.integer("u8", 0, 255), 200);
  EXPECT_EQ(metadata.integer("i64", std::numeric_limits<int64_t>::min(), 0), int64_t{-1} << 62);
  EXPECT_EQ(metadata.number("f32"), 0.25);
  EXPECT_EQ(metadata.number("i16"), -30000);
  EXPECT_TRUE(metadata.boolean("bool"));
  EXPECT_EQ(metadata.string("string").size(), 9u);
  EXPECT_EQ(metadata.strings("strings"), (std::vector<std::string>{"a", "", "ccc"}));
  EXPECT_EQ(metadata.integers("i32s"), (std::vector<int64_t>{-1, 2, 3}));
  EXPECT_EQ(metadata.numbers("f64s"), (std::vector<double>{0.5, -2}));
  EXPECT_EQ(metadata.booleans("bools"), (std::vector<bool>{true, false, true}));
  EXPECT_EQ(metadata.integer_or("absent", 5, 0, 9), 5);
  EXPECT_EQ(metadata.string_or("absent", "x"), "x");

  const auto text = [&](auto&& action) { return error_text<FormatError>(action); };
  EXPECT_EQ(text([&] { metadata.integer("absent", 0, 1); }), "model.gguf: metadata \"absent\" is missing");
  EXPECT_EQ(text([&] { metadata.integer("u32", 1, 100); }),
            "model.gguf: metadata \"u32\" is uint32 4000000000, expected an integer in 1 … 100");
  EXPECT_EQ(text([&] { metadata.integer("u64", 0, std::numeric_limits<int64_t>::max()); }),
            "model.gguf: metadata \"u64\" is uint64 9223372036854775808, expected an integer in 0 … 9223372036854775807");
  EXPECT_EQ(text([&] { metadata.integer("bool", 0, 1); }),
            "model.gguf: metadata \"bool\" is bool true, expected an integer in 0 … 1");
  EXPECT_EQ(text([&] { metadata.number("string"); }),
            "model.gguf: metadata \"string\" is string \"größe\\x00x\", expected a finite number");
  EXPECT_EQ(text([&] { metadata.string("strings"); }),
            "model.gguf: metadata \"strings\" is array of 3 string, expected a string");
  EXPECT_CONTAINS(text([&] { metadata.integers("u64s"); }), "array of 2 uint64, expected an array of integers below 2^63");
  EXPECT_CONTAINS(text([&] { metadata.strings("i32s"); }), "array of 3 int32, expected an array of strings");
}

TEST_F(GgufTest, KeysAreReplacedAndRemoved) {
  GgufMetadata metadata = every_type();
  metadata.set("i8", std::string("other"));
  metadata.remove("u8");
  metadata.remove("u8");
  EXPECT_EQ(metadata.entries().front().first, "i8");
  EXPECT_EQ(metadata.string("i8"), "other");
  EXPECT_EQ(metadata.number("f64"), 1e-300);
  EXPECT_FALSE(metadata.has("u8"));
}

TEST_F(GgufTest, EveryPrefixOfAFileIsRefused) {
  const std::vector<float> weights = ramp(64);
  const std::vector<GgufTensor> tensors = {{{"x", TensorType::kF32, {2, 32}}, bytes_of(weights)}};
  write_gguf(path_, every_type(), tensors);
  const std::string whole = read_bytes(path_);
  for (size_t size = 0; size < whole.size(); ++size) refuse(whole.substr(0, size));
  // The padding behind the last tensor may be missing.
  const std::vector<GgufTensor> odd = {{{"x", TensorType::kF32, {3}}, bytes_of(weights).first(12)}};
  write_gguf(path_, {}, odd);
  const std::string padded = read_bytes(path_);
  write_bytes(path_, padded.substr(0, padded.size() - 20));
  EXPECT_EQ(GgufFile(path_).tensors().front().data.size(), 12u);
}

TEST_F(GgufTest, OtherFilesAreRefused) {
  EXPECT_CONTAINS(refuse("PK-something"), "not a GGUF file: it begins with \"PK-s\", expected \"GGUF\"");
}

TEST_F(GgufTest, LyingCountsAndSizesAreRefused) {
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  EXPECT_CONTAINS(refuse(Bytes().head(0, 0, 1).str()), "GGUF version 1, expected 2 or 3");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 0, 0x03000000).str()), "big-endian");
  EXPECT_CONTAINS(refuse(Bytes().head(kHuge, 0).str()), "18446744073709551615 tensors");
  EXPECT_CONTAINS(refuse(Bytes().head(0, kHuge).str()), "18446744073709551615 metadata entries");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 1).number(kHuge).data(64).str()), "a metadata key takes 18446744073709551615 bytes");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 1).text("k").number(kString).number(kHuge).data(64).str()), "metadata \"k\" takes");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 1).text("k").number(kArray).number(kUInt32).number(kHuge / 4).data(64).str()),
                  "elements of metadata \"k\"");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 1).text("k").number(kArray).number(kString).number(uint64_t{1} << 61).data(64).str()),
                  "elements of metadata \"k\"");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 1).text("k").number(kArray).number(kArray).number(uint64_t{1}).data(64).str()),
                  "an array of type 9, which is unknown or an array itself");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 1).text("k").number(uint32_t{13}).data(64).str()), "is of type 13, expected 0 … 12");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 1).text("k").number(kBool).number(uint8_t{2}).data(64).str()), "has the bool 2");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 1).text("").number(kUInt8).number(uint8_t{2}).data(64).str()), "empty name");
  EXPECT_CONTAINS(refuse(Bytes().head(0, 1).text(std::string_view("k\0", 2)).number(kUInt8).number(uint8_t{2}).data(64).str()),
                  "\"k\\x00\" has a NUL in its name");
  EXPECT_CONTAINS(refuse(Bytes()
                             .head(0, 2)
                             .text("k")
                             .number(kUInt8)
                             .number(uint8_t{2})
                             .text("k")
                             .number(kUInt8)
                             .number(uint8_t{2})
                             .data(64)
                             .str()),
                  "metadata \"k\" is there twice");
}

TEST_F(GgufTest, LyingTensorsAreRefused) {
  const auto one = [&](std::string_view name, const std::vector<int64_t>& ne, uint32_t type, uint64_t offset, size_t data) {
    return refuse(Bytes().head(1, 0).tensor(name, ne, type, offset).data(data).str());
  };
  EXPECT_CONTAINS(one("x", {4}, 0, 0, 15),
                  "cut short: tensor \"x\" (f32 [4]) ends at byte 16 of the data, of which 15 are there");
  EXPECT_CONTAINS(one("x", {4}, 0, 32, 64), "begins at byte 32 of the data, expected 0");
  EXPECT_CONTAINS(one("x", {4}, 0, ~uint64_t{0} - 8, 64), "begins at byte");
  EXPECT_CONTAINS(one("x", {4}, 99, 0, 64), "type 99, which ggml doesn't know");
  EXPECT_CONTAINS(one("x", {4}, 4, 0, 64), "type 4, which ggml doesn't know");
  EXPECT_CONTAINS(one("x", {33}, 8, 0, 64), "rows of 33 elements, expected a multiple of 32 for q8_0");
  EXPECT_CONTAINS(one("x", {}, 8, 0, 64), "rows of 1 elements");
  EXPECT_CONTAINS(one("x", {1, 1, 1, 1, 1}, 0, 0, 64), "5 dimensions, expected at most 4");
  EXPECT_CONTAINS(one("x", {4, 0}, 0, 0, 64), "the dimension 0, expected at least 1");
  EXPECT_CONTAINS(one("x", {-4}, 0, 0, 64), "the dimension -4");
  EXPECT_CONTAINS(one("x", {int64_t{1} << 62, 4}, 0, 0, 64), "too large for any memory");
  EXPECT_CONTAINS(one("x", {1, int64_t{1} << 32, int64_t{1} << 32}, 0, 0, 64), "too large for any memory");
  EXPECT_CONTAINS(one("x", {int64_t{1} << 60}, 0, 0, 64), "cut short");
  EXPECT_CONTAINS(one("", {4}, 0, 0, 64), "empty name");
  EXPECT_CONTAINS(one(std::string(64, 'x'), {4}, 0, 0, 64), "a name of 64 bytes, expected at most 63");
  EXPECT_CONTAINS(one(std::string_view("x\0y", 3), {4}, 0, 0, 64), "NUL");
  EXPECT_CONTAINS(refuse(Bytes().head(2, 0).tensor("x", {8}, 0, 0).tensor("x", {8}, 0, 32).data(64).str()),
                  "tensor \"x\" is there twice");
  EXPECT_CONTAINS(refuse(Bytes().head(2, 0).tensor("x", {8}, 0, 0).tensor("y", {8}, 0, 0).data(64).str()), "expected 32");
  for (const uint32_t alignment : {0u, 4u, 24u, 1u << 21, ~0u}) {
    const auto bytes =
        Bytes().head(1, 1).text("general.alignment").number(kUInt32).number(alignment).tensor("x", {8}, 0, 0).data(64);
    EXPECT_CONTAINS(refuse(bytes.str()), "metadata \"general.alignment\" is uint32");
  }
  const auto bytes = Bytes().head(0, 1).text("general.alignment").number(kString).text("32");
  EXPECT_CONTAINS(refuse(bytes.str()), "expected a uint32 that is a power of two");
}

TEST_F(GgufTest, WriterRefusesWhatMakesNoFileAndLeavesTheOldOne) {
  write_bytes(path_, "old");
  const std::vector<float> data(8);
  const GgufTensor good{{"x", TensorType::kF32, {8}}, bytes_of(data)};
  const auto refuse_write = [&](const std::vector<GgufTensor>& tensors, const GgufMetadata& metadata = {}) {
    std::string text = error_text<std::invalid_argument>([&] { write_gguf(path_, metadata, tensors); });
    EXPECT_EQ(read_bytes(path_), "old");
    EXPECT_EQ(folder_.names(), std::set<std::string>{"model.gguf"});
    return text;
  };
  EXPECT_CONTAINS(refuse_write({good, good}), "\"x\" is given twice");
  EXPECT_CONTAINS(refuse_write({{{"x", TensorType::kF32, {9}}, bytes_of(data)}}), "32 bytes of data, expected 36 for f32 [9]");
  EXPECT_CONTAINS(refuse_write({{{"x", TensorType::kQ8_0, {8}}, bytes_of(data)}}), "no whole blocks");
  EXPECT_CONTAINS(refuse_write({{{"x", static_cast<TensorType>(99), {8}}, bytes_of(data)}}), "type 99");
  EXPECT_CONTAINS(refuse_write({{{std::string(64, 'x'), TensorType::kF32, {8}}, bytes_of(data)}}), "a name of 64 bytes");
  EXPECT_CONTAINS(refuse_write({{{"x", TensorType::kF32, {-8}}, bytes_of(data)}}), "a dimension below 1");
  GgufMetadata metadata;
  metadata.set("general.alignment", uint32_t{12});
  EXPECT_CONTAINS(refuse_write({good}, metadata), "general.alignment is uint32 12");
  const std::vector<GgufTensorSpec> specs = {good};
  EXPECT_CONTAINS(error_text<std::invalid_argument>([&] {
                    write_gguf(path_, {}, specs, [&](size_t, const WriteBytes& write) { write(bytes_of(data).first(4)); });
                  }),
                  "4 bytes of data, expected 32");
  EXPECT_EQ(read_bytes(path_), "old");
}

class FullDisk : public FileOperations {
 public:
  ssize_t write(int fd, const void* data, size_t size) override {
    if (left_ == 0) return errno = ENOSPC, -1;
    const size_t now = std::min(size, left_);
    left_ -= now;
    return FileOperations::write(fd, data, now);
  }

 private:
  size_t left_ = 100;
};

TEST_F(GgufTest, AFullDiskLeavesTheOldFile) {
  write_bytes(path_, "old");
  const std::vector<float> data(64);
  const std::vector<GgufTensor> tensors = {{{"x", TensorType::kF32, {64}}, bytes_of(data)}};
  FullDisk disk;
  EXPECT_CONTAINS(error_text<FileError>([&] { write_gguf(path_, {}, tensors, disk); }), "No space left");
  EXPECT_EQ(read_bytes(path_), "old");
  EXPECT_EQ(folder_.names(), std::set<std::string>{"model.gguf"});
}

TEST_F(GgufTest, FilesHaveAHash) {
  write_bytes(path_, "");
  EXPECT_EQ(hash_of_file(path_), "99aa06d3014798d86001c324468d497f");  // XXH3's of nothing
  EXPECT_THROW(hash_of_file(folder_ / "absent"), FileError);
}

}  // namespace
}  // namespace latte::formats
