#include "formats/adapter.h"

#include <gtest/gtest.h>

#include <limits>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/test_files.h"

namespace latte::formats {
namespace {

// Two blocks of the smallest llama that is one: E 4, H 2, Hkv 1, Dk 2.
class AdapterTest : public ::testing::Test {
 protected:
  AdapterTest() {
    GgufMetadata metadata;
    metadata.set("general.architecture", std::string("llama"));
    metadata.set("general.name", std::string("Tiny"));
    metadata.set("llama.block_count", uint32_t{2});
    metadata.set("llama.embedding_length", uint32_t{4});
    metadata.set("llama.attention.head_count", uint32_t{2});
    metadata.set("llama.attention.head_count_kv", uint32_t{1});
    for (int block = 0; block < 2; ++block) add("blk." + std::to_string(block) + ".attn_q.weight", {4, 4});
    write_gguf(folder_ / "base.gguf", metadata, tensors_);
    tensors_.clear();
    spec_.window = 8;
    spec_.sinks = 2;
    spec_.latents = {3, 0};
    spec_.base_hash = hash_of_file(folder_ / "base.gguf");
    spec_.base_name = "Tiny";
    spec_.recipe = R"({"tokens":1})";
  }

  void add(const std::string& name, std::vector<int64_t> shape) {
    GgufTensor tensor;
    tensor.name = name;
    tensor.shape = std::move(shape);
    tensor.data = std::as_bytes(std::span(values_)).first(static_cast<size_t>(tensor.elements()) * sizeof(float));
    tensors_.push_back(std::move(tensor));
  }
  void add_block() {
    const GgufFile base(folder_ / "base.gguf");
    for (const GgufTensorSpec& spec : adapter_tensors(spec_, BaseShape::from(base.metadata()), 0, {})) {
      add(spec.name, spec.shape);
    }
  }
  void write(const std::string& name) { write_adapter(folder_ / name, spec_, GgufFile(folder_ / "base.gguf"), tensors_); }

  TestFolder folder_;
  std::vector<float> values_ = std::vector<float>(64, 0.5F);
  std::vector<GgufTensor> tensors_;
  AdapterSpec spec_;
};

TEST_F(AdapterTest, ComesBackAsItWasWritten) {
  add_block();
  add("blk.1.attn_q.weight", {4, 4});
  write("a.gguf");
  const AdapterFile adapter(folder_ / "a.gguf");
  EXPECT_EQ(adapter.spec(), spec_);
  EXPECT_EQ(adapter.file().tensors().size(), 9U);
  EXPECT_EQ(adapter.spec().converted_blocks(), 2);
  adapter.check_fits(GgufFile(folder_ / "base.gguf"));
}

TEST_F(AdapterTest, AMergedModelHoldsBoth) {
  add_block();
  add("blk.1.attn_q.weight", {4, 4});
  const GgufFile base(folder_ / "base.gguf");
  write_merged(folder_ / "m.gguf", spec_, base, tensors_);
  const GgufFile merged(folder_ / "m.gguf");
  ASSERT_EQ(merged_spec(merged), spec_);
  EXPECT_EQ(merged.tensors().size(), 10U);
  EXPECT_EQ(merged.metadata().string("general.name"), "Tiny");
  EXPECT_EQ(merged_spec(base), std::nullopt);
}

TEST_F(AdapterTest, TheErrorListsAllThatIsWrong) {
  add_block();
  tensors_.erase(tensors_.begin());
  tensors_[0].shape = {3, 2};
  add("blk.0.latte_extra", {4});
  add("blk.7.attn_q.weight", {4, 4});
  add("blk.1.attn_q.weight", {2, 4});
  const std::string text = error_text<FormatError>([&] { write("a.gguf"); });
  EXPECT_CONTAINS(text, "missing tensor blk.0.latte_query.weight");
  EXPECT_CONTAINS(text, "blk.0.latte_query.bias is [3, 2], expected [2, 3]");
  EXPECT_CONTAINS(text, "unknown tensor \"blk.0.latte_extra\"");
  EXPECT_CONTAINS(text, "unknown tensor \"blk.7.attn_q.weight\"");
  EXPECT_CONTAINS(text, "\"blk.1.attn_q.weight\" is [2, 4], the base's is [4, 4]");
  EXPECT_EQ(folder_.names().count("a.gguf"), 0U);
}

TEST_F(AdapterTest, AFloorIsReadWithWhatLeftTheWindow) {
  spec_.evicted = true;
  add_block();
  add("blk.0.latte_floor", {1, 3});
  for (const char* name : {"a.gguf", "without_decay.gguf"}) {
    write(name);
    AdapterFile(folder_ / name).check_fits(GgufFile(folder_ / "base.gguf"));
    std::erase_if(tensors_, [](const GgufTensor& tensor) { return tensor.name == "blk.0.latte_decay"; });
  }
  spec_.evicted = false;
  EXPECT_CONTAINS(error_text<FormatError>([&] { write("b.gguf"); }), "goes with latte.evicted");
  spec_.evicted = true;
  values_[1] = std::numeric_limits<float>::infinity();
  EXPECT_CONTAINS(error_text<FormatError>([&] { write("b.gguf"); }), "latte_floor holds a number that isn't finite");
  values_[1] = 0.5F;
  tensors_.back().shape = {1, 2};
  EXPECT_CONTAINS(error_text<FormatError>([&] { write("b.gguf"); }), "latte_floor is [1, 2], expected [1, 3]");
  add("blk.1.latte_floor", {1, 3});
  EXPECT_CONTAINS(error_text<FormatError>([&] { write("b.gguf"); }), "unknown tensor \"blk.1.latte_floor\"");
}

TEST_F(AdapterTest, AConvolutionOfKeysIsReadWithWhatLeftTheWindow) {
  spec_.evicted = true;
  add_block();
  add("blk.0.latte_conv.weight", {1, BaseShape::from(GgufFile(folder_ / "base.gguf").metadata()).head_dim, 4});
  write("a.gguf");
  AdapterFile(folder_ / "a.gguf").check_fits(GgufFile(folder_ / "base.gguf"));
  spec_.evicted = false;
  EXPECT_CONTAINS(error_text<FormatError>([&] { write("b.gguf"); }), "conv.weight goes with latte.evicted");
  spec_.evicted = true;
  values_[1] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_CONTAINS(error_text<FormatError>([&] { write("b.gguf"); }), "latte_conv.weight holds a number that isn't finite");
  values_[1] = 0.5F;
  tensors_.back().shape.back() = 3;
  EXPECT_CONTAINS(error_text<FormatError>([&] { write("b.gguf"); }), "3], expected [1, ");
}

TEST_F(AdapterTest, AnotherBaseIsRefused) {
  add_block();
  write("a.gguf");
  GgufMetadata metadata = GgufFile(folder_ / "base.gguf").metadata();
  metadata.set("llama.block_count", uint32_t{3});
  metadata.set("general.name", std::string("Other"));
  write_gguf(folder_ / "other.gguf", metadata, tensors_);
  const std::string text =
      error_text<FormatError>([&] { AdapterFile(folder_ / "a.gguf").check_fits(GgufFile(folder_ / "other.gguf")); });
  EXPECT_CONTAINS(text, "made for \"Tiny\" with hash");
  EXPECT_CONTAINS(text, "it is for 2 blocks, the base has 3");
}

TEST_F(AdapterTest, BadMetadataIsRefused) {
  const GgufFile base(folder_ / "base.gguf");
  EXPECT_CONTAINS(error_text<FormatError>([&] { AdapterFile(folder_ / "base.gguf"); }), "not an adapter");
  add_block();
  write("a.gguf");
  const GgufFile good(folder_ / "a.gguf");
  const auto with = [&](const std::string& key, GgufValue value) {
    GgufMetadata metadata = good.metadata();
    metadata.set(key, std::move(value));
    write_gguf(folder_ / "bad.gguf", metadata, good.tensors());
    return error_text<FormatError>([&] { AdapterFile(folder_ / "bad.gguf"); });
  };
  EXPECT_CONTAINS(with("latte.version", uint32_t{3}), "latte.version");
  EXPECT_CONTAINS(with("latte.window", uint32_t{0}), "latte.window");
  EXPECT_CONTAINS(with("latte.window", std::string("8")), "latte.window");
  EXPECT_CONTAINS(with("latte.latents", GgufArray(std::vector<int32_t>{-2, 0})), "latte.latents");
  EXPECT_CONTAINS(with("latte.latents", GgufArray(std::vector<int32_t>{})), "latte.latents");
}

}  // namespace
}  // namespace latte::formats
