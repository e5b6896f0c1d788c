#include "formats/safetensors.h"

#include <cmath>
#include <cstring>
#include <random>

#include "formats/error.h"
#include "formats/safetensors_header.h"
#include "formats/test_files.h"

namespace latte::formats {
namespace {

TensorView tensor(std::string name, DType dtype, std::vector<int64_t> shape, std::span<const std::byte> data) {
  TensorView view;
  view.name = std::move(name);
  view.dtype = dtype;
  view.shape = std::move(shape);
  view.data = data;
  return view;
}

std::string file_bytes(const std::string& header, const std::string& data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(static_cast<uint64_t>(header.size()) >> 8 * i));
  return bytes + header + data;
}

class SafetensorsTest : public ::testing::Test {
 protected:
  // The error for a file of this header and so many bytes of data.
  std::string refusal(const std::string& header, size_t data_size) {
    write_bytes(path_, file_bytes(header, std::string(data_size, '\0')));
    const std::string text = error_text<FormatError>([&] { SafetensorsFile file(path_); });
    EXPECT_EQ(text.find(path_ + ": "), 0u) << text;
    return text;
  }

  // Whatever a file holds, opening it ends in a FormatError or in tensors that lie inside the file. True: it was accepted.
  bool open_anything(const std::string& bytes) {
    write_bytes(path_, bytes);
    try {
      const SafetensorsFile file(path_);
      uint64_t total = 0;
      for (const TensorView& view : file.tensors()) {
        EXPECT_EQ(checked_bytes(view.dtype, view.shape), view.data.size());
        total += view.data.size();
        for (std::byte b : view.data) sum_ += std::to_integer<unsigned>(b);  // every byte can be read
      }
      EXPECT_LE(total, bytes.size());
      return true;
    } catch (const FormatError& error) {
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
      return false;
    }
  }

  std::string valid_file() {
    const std::vector<float> weights = {1, 2, 3, 4, 5, 6};
    const std::vector<uint8_t> mask = {1, 0, 1};
    const std::vector<TensorView> tensors = {tensor("weights", DType::kFloat32, {2, 3}, bytes_of(weights)),
                                             tensor("mask", DType::kBool, {3}, bytes_of(mask)),
                                             tensor("none", DType::kInt64, {0, 4}, {})};
    write_safetensors(path_, tensors, {{"key", "value"}});
    return read_bytes(path_);
  }

  TestFolder folder_;
  const std::string path_ = folder_ / "file.safetensors";
  unsigned sum_ = 0;
};

TEST_F(SafetensorsTest, RoundTripOfEveryDType) {
  const std::vector<uint8_t> data = {1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0};
  std::vector<TensorView> tensors;
  for (size_t i = 0; i < kDTypes.size(); ++i) {
    const auto dtype = static_cast<DType>(i);
    tensors.push_back(tensor("t." + std::string(name_of(dtype)), dtype, {3, 1}, bytes_of(data).subspan(0, 3 * size_of(dtype))));
  }
  tensors.push_back(tensor("scalar", DType::kFloat64, {}, bytes_of(data).subspan(0, 8)));
  tensors.push_back(tensor("empty", DType::kFloat32, {5, 0}, {}));
  tensors.push_back(tensor("näme \"quoted\"", DType::kUInt8, {24}, bytes_of(data)));
  const Metadata metadata = {{"a", "1"}, {"text", std::string("line\n\"two\" \0 é", 16)}};
  write_safetensors(path_, tensors, metadata);

  const SafetensorsFile file(path_);
  EXPECT_EQ(file.metadata(), metadata);
  ASSERT_EQ(file.tensors().size(), tensors.size());
  for (const TensorView& expected : tensors) {
    const TensorView& found = file.at(expected.name);
    EXPECT_EQ(found.dtype, expected.dtype);
    EXPECT_EQ(found.shape, expected.shape);
    EXPECT_TRUE(std::ranges::equal(found.data, expected.data)) << expected.name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(found.data.data()) % size_of(found.dtype), 0u) << expected.name;
  }
  for (size_t i = 1; i < tensors.size(); ++i) EXPECT_LT(file.tensors()[i - 1].name, file.tensors()[i].name);
  EXPECT_EQ(file.find("t.F3"), nullptr);
  EXPECT_EQ(file.find("zzz"), nullptr);
  EXPECT_CONTAINS(error_text<FormatError>([&] { file.at("zzz"); }), "tensor \"zzz\" is missing");
  EXPECT_CONTAINS(error_text<FormatError>([&] { file.metadata_at("b"); }), "metadata \"b\" is missing");
}

TEST_F(SafetensorsTest, BytesOfTheFormat) {
  const std::vector<uint8_t> data = {7, 8};
  const std::vector<TensorView> tensors = {tensor("b", DType::kUInt8, {1}, bytes_of(data).subspan(1)),
                                           tensor("a", DType::kUInt8, {1}, bytes_of(data).subspan(0, 1))};
  write_safetensors(path_, tensors, {{"k", "v"}});
  std::string header = R"({"__metadata__":{"k":"v"},"a":{"data_offsets":[0,1],"dtype":"U8","shape":[1]},)"
                       R"("b":{"data_offsets":[1,2],"dtype":"U8","shape":[1]}})";
  header.append((8 - header.size() % 8) % 8, ' ');
  EXPECT_EQ(read_bytes(path_), file_bytes(header, "\7\10"));
}

TEST_F(SafetensorsTest, NoTensors) {
  write_safetensors(path_, {});
  EXPECT_TRUE(SafetensorsFile(path_).tensors().empty());
  write_bytes(path_, file_bytes("{}", ""));
  EXPECT_TRUE(SafetensorsFile(path_).tensors().empty());
}

TEST_F(SafetensorsTest, AlignmentIsNotAsked) {
  const std::string header = R"({"x":{"dtype":"F64","shape":[],"data_offsets":[0,8]}} )";
  ASSERT_NE(header.size() % 8, 0u);
  write_bytes(path_, file_bytes(header, std::string("\0\0\0\0\0\0\xf0\x3f", 8)));
  const SafetensorsFile file(path_);
  double value = 0;
  std::memcpy(&value, file.at("x").data.data(), sizeof(value));
  EXPECT_EQ(value, 1.0);
}

TEST_F(SafetensorsTest, GoldenFilesLoad) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(LATTE_SOURCE_DIR "/tests/golden")) {
    if (entry.path().extension() != ".safetensors") continue;
    const SafetensorsFile file(entry.path());
    ++files;
    const auto number = [&](const std::string& key) { return std::stoll(file.metadata_at(key)); };
    const std::vector<int64_t> shape = {number("batch"), number("time"), number("model_dim")};
    for (const char* name : {"x", "y", "dx", "dy"}) {
      const TensorView& view = file.at(name);
      EXPECT_EQ(view.dtype, DType::kFloat64);
      EXPECT_EQ(view.shape, shape);
      double norm = 0;
      for (size_t i = 0; i < view.data.size(); i += 8) {
        double value = 0;
        std::memcpy(&value, view.data.data() + i, 8);
        norm += value * value;
      }
      EXPECT_TRUE(std::isfinite(norm) && norm > 0) << name;
    }
  }
  EXPECT_GE(files, 5);
}

TEST_F(SafetensorsTest, TruncationAtEveryByte) {
  const std::string bytes = valid_file();
  ASSERT_TRUE(open_anything(bytes));
  for (size_t size = 0; size < bytes.size(); ++size) EXPECT_FALSE(open_anything(bytes.substr(0, size))) << size;
  EXPECT_FALSE(open_anything(bytes + '\0'));
}

TEST_F(SafetensorsTest, EveryByteReplaced) {
  const std::string bytes = valid_file();
  const size_t header_end = bytes.size() - 27;
  int refused = 0;
  for (size_t i = 0; i < header_end; ++i) {
    for (char byte : std::string("\0\x01\x7f\xff\"{}[]:,-0e\\", 15)) {
      std::string mutated = bytes;
      mutated[i] = byte;
      refused += !open_anything(mutated);
    }
  }
  EXPECT_GT(refused, 100);
}

TEST_F(SafetensorsTest, RandomMutations) {
  const std::string bytes = valid_file();
  std::mt19937 random(42);
  for (int round = 0; round < 2000; ++round) {
    std::string mutated = bytes;
    const int edits = 1 + static_cast<int>(random() % 4);
    for (int edit = 0; edit < edits; ++edit) {
      const size_t at = random() % mutated.size();
      const size_t length = std::min<size_t>(1 + random() % 8, mutated.size() - at);
      switch (random() % 4) {
        case 0:
          mutated[at] = static_cast<char>(random());
          break;
        case 1:
          mutated.insert(at, mutated.substr(random() % mutated.size(), length));
          break;
        case 2:
          mutated.erase(at, length);
          break;
        default:
          mutated[at] ^= static_cast<char>(1 << random() % 8);
      }
      if (mutated.empty()) mutated = "x";
    }
    open_anything(mutated);
  }
}

TEST_F(SafetensorsTest, RefusesOtherFiles) {
  write_bytes(path_, "");
  EXPECT_CONTAINS(error_text<FormatError>([&] { SafetensorsFile file(path_); }), "0 bytes, expected at least 8");
  write_bytes(path_, "First Citizen:\nBefore we proceed any further, hear me speak.\n");
  EXPECT_CONTAINS(error_text<FormatError>([&] { SafetensorsFile file(path_); }), "not a safetensors file");
  write_bytes(path_, std::string(8, '\xff') + "{}");
  EXPECT_CONTAINS(error_text<FormatError>([&] { SafetensorsFile file(path_); }), "18446744073709551615 bytes");
  write_bytes(path_, file_bytes("{}      ", "").substr(0, 13));  // whole JSON, part of the padding
  EXPECT_CONTAINS(error_text<FormatError>([&] { SafetensorsFile file(path_); }), "a header of 8 bytes, of which 5 are there");
  EXPECT_CONTAINS(refusal("", 0), "doesn't begin with {");
  EXPECT_CONTAINS(refusal(" {}", 0), "doesn't begin with {");
  EXPECT_CONTAINS(refusal("\xef\xbb\xbf{}", 0), "doesn't begin with {");
  EXPECT_CONTAINS(refusal("{} x", 0), "no valid JSON");
  EXPECT_CONTAINS(refusal(std::string("{}\0", 3), 0), "no valid JSON");
  EXPECT_CONTAINS(refusal("{\"\xff\":1}", 0), "no valid JSON");
}

TEST_F(SafetensorsTest, RefusesHeadersOutOfForm) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"({"x":1})", "has the number 1, expected an object"},
      {R"({"x":null})", "has null, expected an object"},
      {R"({"x":[]})", "has an array, expected an object"},
      {R"({"x":{}})", "tensor \"x\" has no dtype"},
      {R"({"x":{"dtype":"U8","shape":[0]}})", "has no data_offsets"},
      {R"({"x":{"dtype":"U8","data_offsets":[0,0]}})", "has no shape"},
      {R"({"x":{"dtype":"F7","shape":[0],"data_offsets":[0,0]}})", "dtype \"F7\", expected one of"},
      {R"({"x":{"dtype":3,"shape":[0],"data_offsets":[0,0]}})", "has the number 3, expected a string for dtype"},
      {R"({"x":{"dtype":"U8","shape":0,"data_offsets":[0,0]}})", "expected an array for shape"},
      {R"({"x":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}})", "has the number -1, expected dimensions"},
      {R"({"x":{"dtype":"U8","shape":[1.0],"data_offsets":[0,0]}})", "has the number 1.0, expected dimensions"},
      {R"({"x":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}})", "no valid JSON"},
      {R"({"x":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,0]}})", "expected dimensions"},
      {R"({"x":{"dtype":"U8","shape":[[1]],"data_offsets":[0,0]}})", "has an array, expected dimensions"},
      {R"({"x":{"dtype":"U8","shape":[true],"data_offsets":[0,0]}})", "has a boolean"},
      {R"({"x":{"dtype":"U8","shape":["1"],"data_offsets":[0,0]}})", "has the string \"1\""},
      {R"({"x":{"dtype":"U8","shape":[0],"data_offsets":[0]}})", "has 1 data_offsets"},
      {R"({"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0,0]}})", "two data_offsets"},
      {R"({"x":{"dtype":"U8","shape":[0],"data_offsets":[0,-8]}})", "has the number -8, expected two data_offsets"},
      {R"({"x":{"dtype":"U8","shape":[0],"data_offsets":{}}})", "has an object, expected an array"},
      {R"({"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"more":1}})", "has the key \"more\""},
      {R"({"x":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}})", "has the key \"dtype\" twice"},
      {R"({"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
       "has tensor \"x\" twice"},
      {R"({"__metadata__":{"a":1}})", "has the number 1, expected a string for the key \"a\""},
      {R"({"__metadata__":{"a":{}}})", "has an object, expected a string"},
      {R"({"__metadata__":{"a":"1","a":"2"}})", "has the key \"a\" twice"},
      {R"({"__metadata__":{},"__metadata__":{}})", "has \"__metadata__\" twice"},
      {R"({"__metadata__":"text"})", "expected an object"},
  };
  for (const auto& [header, problem] : cases) EXPECT_CONTAINS(refusal(header, 0), problem) << header;
}

TEST_F(SafetensorsTest, RefusesPlacesOutOfTheFile) {
  const auto two = [](const std::string& a, const std::string& b) {
    return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[)" + a + R"(]},"b":{"dtype":"U8","shape":[4],"data_offsets":[)" + b +
           "]}}";
  };
  write_bytes(path_, file_bytes(two("4,8", "0,4"), "bbbbaaaa"));  // any order will do
  EXPECT_EQ(std::to_integer<char>(SafetensorsFile(path_).at("a").data[0]), 'a');
  EXPECT_CONTAINS(refusal(two("0,4", "5,9"), 9), "begins at byte 5 of the data, expected 4");
  EXPECT_CONTAINS(refusal(two("0,4", "2,6"), 8), "begins at byte 2 of the data, expected 4");
  EXPECT_CONTAINS(refusal(two("0,4", "0,4"), 8), "begins at byte 0 of the data, expected 4");
  EXPECT_CONTAINS(refusal(two("1,5", "5,9"), 9), "begins at byte 1 of the data, expected 0");
  EXPECT_CONTAINS(refusal(two("0,4", "4,8"), 7), "cut short: 7 bytes of data, expected 8");
  EXPECT_CONTAINS(refusal(two("0,4", "4,8"), 9), "1 bytes follow the last tensor");
  EXPECT_CONTAINS(refusal(two("0,4", "8,4"), 8), "ends at byte 4, before its begin at 8");
  EXPECT_CONTAINS(refusal(two("0,3", "3,7"), 7), "has 3 bytes, expected 4 for U8 [4]");
  EXPECT_CONTAINS(refusal(two("0,4", "18446744073709551612,18446744073709551615"), 8), "has 3 bytes, expected 4");
}

TEST_F(SafetensorsTest, RefusesShapesThatOverflow) {
  for (const char* shape : {"4294967296,4294967296", "9223372036854775807,9223372036854775807", "3037000500,3037000500,0",
                            "9223372036854775807,2", "2305843009213693952", "1152921504606846976,2"}) {
    const std::string header = std::string(R"({"x":{"dtype":"F64","shape":[)") + shape + R"(],"data_offsets":[0,0]}})";
    EXPECT_CONTAINS(refusal(header, 0), "too large for any memory") << shape;
  }
  EXPECT_CONTAINS(refusal(R"({"x":{"dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807]}})", 4),
                  "cut short: 4 bytes of data, expected 9223372036854775807");
  std::string ones = "1";
  for (int i = 0; i < 64; ++i) ones += ",1";
  EXPECT_CONTAINS(refusal(R"({"x":{"dtype":"U8","shape":[)" + ones + R"(],"data_offsets":[0,1]}})", 1),
                  "more than 64 dimensions");
}

TEST_F(SafetensorsTest, HugeAndDeepHeaders) {
  constexpr size_t kMany = 20'000'000;
  EXPECT_CONTAINS(refusal("{\"x\":" + std::string(kMany, '['), 0), "has an array, expected an object");
  EXPECT_CONTAINS(refusal("{" + std::string(kMany, ' '), 0), "no valid JSON");
  std::string objects = "{";
  for (int i = 0; i < 100'000; ++i) objects += "\"x\":{";
  EXPECT_CONTAINS(refusal(objects, 0), "\"x\"");
  // A header beyond the limit, of which the file has every byte (a sparse file).
  write_bytes(path_, file_bytes("{", ""));
  std::filesystem::resize_file(path_, kLargestHeader + 9);
  std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
  const uint64_t length = kLargestHeader + 1;
  file.write(reinterpret_cast<const char*>(&length), 8);
  file.close();
  EXPECT_CONTAINS(error_text<FormatError>([&] { SafetensorsFile f(path_); }), "100000001 bytes, expected at most 100000000");
}

TEST_F(SafetensorsTest, NamesInErrorsAreEscapedAndCut) {
  const std::string text = refusal("{\"\\u001b[2J" + std::string(5000, 'n') + "\":1}", 0);
  EXPECT_CONTAINS(text, "\"\\x1b[2Jnnn");
  EXPECT_LT(text.size(), path_.size() + 200);
}

TEST_F(SafetensorsTest, BooleansAreZeroOrOne) {
  const std::vector<uint8_t> data = {1, 0, 7};
  const std::vector<TensorView> tensors = {tensor("mask", DType::kBool, {3}, bytes_of(data))};
  write_safetensors(path_, tensors);
  EXPECT_CONTAINS(error_text<FormatError>([&] { SafetensorsFile file(path_); }),
                  "tensor \"mask\" (BOOL) has the value 7 at element 2, expected 0 or 1");
}

TEST_F(SafetensorsTest, RequireListsEveryDifference) {
  valid_file();
  const SafetensorsFile file(path_);
  std::vector<TensorSpec> expected = {
      {"weights", DType::kFloat32, {2, 3}}, {"mask", DType::kBool, {3}}, {"none", DType::kInt64, {0, 4}}};
  EXPECT_NO_THROW(file.require(expected));
  expected[0].shape = {3, 2};
  expected[1].name = "musk";
  const std::string text = error_text<FormatError>([&] { file.require(expected); });
  EXPECT_EQ(text,
            path_ + ": missing tensors: \"musk\"; unexpected tensors: \"mask\"; \"weights\" is F32 [2, 3], expected F32 [3, 2]");
  for (int i = 0; i < 100; ++i) expected.push_back({"extra" + std::to_string(i), DType::kUInt8, {}});
  EXPECT_CONTAINS(error_text<FormatError>([&] { file.require(expected); }), "and 96 more");
}

TEST_F(SafetensorsTest, WriterRefusesWhatMakesNoFile) {
  write_bytes(path_, "old");
  const std::vector<float> data = {1, 2};
  const auto good = tensor("x", DType::kFloat32, {2}, bytes_of(data));
  const auto refuse = [&](const std::vector<TensorView>& tensors, const Metadata& metadata = {}) {
    const std::string text = error_text<std::invalid_argument>([&] { write_safetensors(path_, tensors, metadata); });
    EXPECT_EQ(read_bytes(path_), "old");
    return text;
  };
  EXPECT_CONTAINS(refuse({good, good}), "\"x\" is given twice");
  EXPECT_CONTAINS(refuse({tensor("__metadata__", DType::kFloat32, {2}, bytes_of(data))}), "reserved");
  EXPECT_CONTAINS(refuse({tensor("\xff", DType::kFloat32, {2}, bytes_of(data))}), "isn't UTF-8");
  EXPECT_CONTAINS(refuse({tensor("x", DType::kFloat32, {3}, bytes_of(data))}), "8 bytes of data, expected 12 for F32 [3]");
  EXPECT_CONTAINS(refuse({tensor("x", DType::kFloat32, {-2}, bytes_of(data))}), "F32 [-2]");
  EXPECT_CONTAINS(refuse({tensor("x", DType::kFloat32, {int64_t{1} << 62, 4}, bytes_of(data))}), "expected fewer");
  EXPECT_CONTAINS(refuse({good}, {{"key", "\xc3"}}), "metadata \"key\" isn't UTF-8");
}

}  // namespace
}  // namespace latte::formats
