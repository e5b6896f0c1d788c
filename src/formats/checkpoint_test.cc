#include "formats/checkpoint.h"

#include <sys/resource.h>

#include <csignal>
#include <random>

#include "formats/error.h"
#include "formats/test_files.h"

namespace latte::formats {
namespace {

class CheckpointTest : public ::testing::Test {
 protected:
  CheckpointTest() {
    add("model.weight", DType::kFloat32, {2, 2}, bytes_of(weights_));
    add("optimizer.exp_avg.model.weight", DType::kFloat32, {2, 2}, bytes_of(weights_));
    add("random.cpu", DType::kUInt8, {5}, bytes_of(random_state_));
  }

  void add(const char* name, DType dtype, std::vector<int64_t> shape, std::span<const std::byte> data) {
    TensorView& view = tensors_.emplace_back();
    view.name = name;
    view.dtype = dtype;
    view.shape = std::move(shape);
    view.data = data;
  }

  std::string refusal() {
    std::string text = error_text<FormatError>([&] { CheckpointFile file(path_); });
    EXPECT_EQ(text.find(path_ + ": "), 0u) << text;
    return text;
  }

  // The checkpoint with this metadata in place of its own.
  void write_with(const std::string& key, const std::string& value) {
    write_checkpoint(path_, header_, tensors_);
    Metadata metadata = SafetensorsFile(path_).metadata();
    metadata[key] = value;
    write_safetensors(path_, tensors_, metadata);
  }

  const std::vector<float> weights_ = {1, 2, 3, 4};
  const std::vector<uint8_t> random_state_ = {9, 8, 7, 6, 5};
  const CheckpointHeader header_ = {R"({"layers": 2, "vocabulary": "bytes"})", 1234};
  std::vector<TensorView> tensors_;
  TestFolder folder_;
  const std::string path_ = folder_ / "checkpoint.safetensors";
};

TEST_F(CheckpointTest, RoundTrip) {
  write_checkpoint(path_, header_, tensors_);
  const CheckpointFile file(path_);
  EXPECT_EQ(file.config(), header_.config);
  EXPECT_EQ(file.step(), 1234);
  EXPECT_EQ(file.file().tensors().size(), 3u);
  EXPECT_TRUE(std::ranges::equal(file.file().at("random.cpu").data, bytes_of(random_state_)));
  const std::string bytes = read_bytes(path_);
  write_checkpoint(path_, header_, tensors_);
  EXPECT_EQ(read_bytes(path_), bytes);
}

// A file of version 1 that must stay readable (tests/golden/checkpoints/make.py says how it was made).
TEST_F(CheckpointTest, GoldenVersion1Loads) {
  const CheckpointFile file(LATTE_SOURCE_DIR "/tests/golden/checkpoints/v1.safetensors");
  EXPECT_EQ(file.config(), header_.config);
  EXPECT_EQ(file.step(), 1234);
  EXPECT_EQ(file.file().metadata_at("checksum"), "378f44a10739820c39bc1edeb8c6271b");
  for (const TensorView& expected : tensors_) {
    const TensorView& found = file.file().at(expected.name);
    EXPECT_EQ(describe(found), describe(expected));
    EXPECT_TRUE(std::ranges::equal(found.data, expected.data)) << expected.name;
  }
}

TEST_F(CheckpointTest, ChecksumDoesNotDependOnTheLayout) {
  write_checkpoint(path_, header_, tensors_);
  const Metadata metadata = SafetensorsFile(path_).metadata();
  std::string bytes = read_bytes(path_);
  const std::string old_header = bytes.substr(8, bytes.find("}}") + 2 - 8);
  const std::string spaced = old_header.substr(0, old_header.size() - 1) + std::string(21, ' ') + "}";
  std::string moved(8, '\0');
  moved[0] = static_cast<char>(spaced.size());
  moved[1] = static_cast<char>(spaced.size() >> 8);
  write_bytes(path_, moved + spaced + bytes.substr(bytes.size() - 37));
  EXPECT_NO_THROW(CheckpointFile{path_});
}

TEST_F(CheckpointTest, AnyDamageIsRefused) {
  write_checkpoint(path_, header_, tensors_);
  const std::string bytes = read_bytes(path_);
  const size_t data_begin = bytes.size() - 37;
  const size_t header_end = bytes.find_last_not_of(' ', data_begin - 1) + 1;
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (i >= header_end && i < data_begin) continue;  // padding
    for (int bit : {0, 3, 6}) {
      std::string damaged = bytes;
      damaged[i] = static_cast<char>(damaged[i] ^ 1 << bit);
      write_bytes(path_, damaged);
      EXPECT_THROW(CheckpointFile{path_}, FormatError) << "byte " << i << " bit " << bit;
    }
  }
}

TEST_F(CheckpointTest, CutShortAnywhereIsRefused) {
  write_checkpoint(path_, header_, tensors_);
  const std::string bytes = read_bytes(path_);
  for (size_t size = 0; size < bytes.size(); ++size) {
    write_bytes(path_, bytes.substr(0, size));
    EXPECT_THROW(CheckpointFile{path_}, FormatError) << size;
  }
  write_bytes(path_, bytes.substr(0, bytes.size() - 1));
  EXPECT_CONTAINS(refusal(), "the file is cut short: 36 bytes of data, expected 37");
}

TEST_F(CheckpointTest, OtherFilesAndVersions) {
  write_safetensors(path_, tensors_);
  EXPECT_CONTAINS(refusal(), "not a checkpoint of latte: format is missing, expected \"latte.checkpoint\"");
  write_with("format", "pt");
  EXPECT_CONTAINS(refusal(), "not a checkpoint of latte: format is \"pt\"");
  write_with("version", "2");
  EXPECT_CONTAINS(refusal(), "a checkpoint of version \"2\", expected \"1\"");
  write_with("step", "1235");
  EXPECT_CONTAINS(refusal(), "the checkpoint is damaged: checksum ");
  write_with("config", "{}");
  EXPECT_CONTAINS(refusal(), "the checkpoint is damaged: checksum ");
  write_with("note", "not covered");
  EXPECT_CONTAINS(refusal(), "the checkpoint is damaged: checksum ");
  EXPECT_CONTAINS(error_text<FileError>([&] { CheckpointFile file(folder_ / "none"); }), "No such file or directory");
}

TEST_F(CheckpointTest, SwappedTensorsAreDamage) {
  write_checkpoint(path_, header_, tensors_);
  const Metadata metadata = SafetensorsFile(path_).metadata();
  const std::vector<float> other = {1, 2, 4, 3};
  tensors_[0].data = bytes_of(other);
  write_safetensors(path_, tensors_, metadata);
  EXPECT_CONTAINS(refusal(), "damaged");
  tensors_[0].data = bytes_of(weights_);
  tensors_[0].shape = {4};
  write_safetensors(path_, tensors_, metadata);
  EXPECT_CONTAINS(refusal(), "damaged");
}

TEST_F(CheckpointTest, WriterRefusesWhatItCouldNotRead) {
  write_checkpoint(path_, header_, tensors_);
  const std::string bytes = read_bytes(path_);
  for (const std::string& config :
       {std::string(), std::string("[]"), std::string("{"), std::string("{} {}"), std::string("3"), std::string("{\"a\":\xff}"),
        std::string("{}\0{}", 5), "{\"a\":" + std::string(100'000, '[') + std::string(100'000, ']') + "}"}) {
    EXPECT_CONTAINS(error_text<std::invalid_argument>([&] {
                      write_checkpoint(path_, {config, 1}, tensors_);
                    }),
                    "expected a JSON object");
  }
  EXPECT_CONTAINS(error_text<std::invalid_argument>([&] { write_checkpoint(path_, {"{}", -1}, tensors_); }), "step is -1");
  EXPECT_EQ(read_bytes(path_), bytes);
}

TEST_F(CheckpointTest, BracketsInTextsDontNest) {
  const std::string config = "{\"a\":\"" + std::string(200, '[') + "\\\"{" + "\",\"b\":[[1]]}";
  write_checkpoint(path_, {config, 1}, tensors_);
  EXPECT_EQ(CheckpointFile(path_).config(), config);
}

TEST_F(CheckpointTest, AFullDiskLeavesThePreviousCheckpoint) {
  write_checkpoint(path_, header_, tensors_);
  const std::vector<float> large(100'000);
  add("large", DType::kFloat32, {100'000}, bytes_of(large));
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{100'000, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  std::string text;
  try {
    write_checkpoint(path_, {"{}", 2000}, tensors_);
  } catch (const FileError& error) {
    text = error.what();
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(text, "cannot write " + path_ + ": File too large");
  EXPECT_EQ(CheckpointFile(path_).step(), 1234);
  EXPECT_EQ(folder_.names(), std::set<std::string>{"checkpoint.safetensors"});
}

}  // namespace
}  // namespace latte::formats
