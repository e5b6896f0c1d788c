// CIFAR-10's binary version: records of a label and 32 x 32 pixels in three planes, red, green and blue. Read pixel by pixel in
// grey, as Long Range Arena does.
#include <array>
#include <cmath>
#include <filesystem>
#include <vector>

#include "data/random.h"
#include "data/tasks.h"
#include "formats/error.h"
#include "formats/mapped_file.h"

namespace latte {
namespace {

constexpr size_t kPixels = size_t{32} * 32, kRecord = 1 + 3 * kPixels;
constexpr int32_t kClasses = 10;

// ITU-R BT.601's luma.
int32_t grey(uint8_t red, uint8_t green, uint8_t blue) {
  return static_cast<int32_t>(std::lround(0.299 * red + 0.587 * green + 0.114 * blue));
}

// Calls add(label, pixels) for each image of a file.
template <typename Add>
void read_file(const std::string& path, const Add& add) {
  const formats::MappedFile file(path);
  const auto bytes = file.bytes();
  if (bytes.empty() || bytes.size() % kRecord != 0) {
    throw formats::FormatError(path, std::to_string(bytes.size()) + " bytes, expected a multiple of " + std::to_string(kRecord) +
                                         ": a label and 32 x 32 pixels of three colours an image");
  }
  std::vector<int32_t> pixels(kPixels);
  for (size_t begin = 0; begin < bytes.size(); begin += kRecord) {
    const auto at = [&](size_t offset) { return static_cast<uint8_t>(bytes[begin + offset]); };
    const int32_t label = at(0);
    if (label >= kClasses) {
      throw formats::FormatError(
          path, "image " + std::to_string(begin / kRecord) + ": the label is " + std::to_string(label) + ", expected 0 to 9");
    }
    for (size_t i = 0; i < kPixels; ++i) pixels[i] = grey(at(1 + i), at(1 + kPixels + i), at(1 + 2 * kPixels + i));
    add(label, pixels);
  }
}

}  // namespace

TaskData read_images(const TaskOptions& options) {
  const std::filesystem::path folder = options.data;
  TaskBuilder train, validation, test;
  RandomStream random(/*seed=*/0, /*index=*/0);  // which images validate: the same ones in every run
  int64_t trained = 0, validated = 0;
  for (int i = 1; i <= 5; ++i) {
    read_file((folder / ("data_batch_" + std::to_string(i) + ".bin")).string(),
              [&](int32_t label, const std::vector<int32_t>& pixels) {
                const bool validates = random.uniform() < options.validation_fraction;
                (validates ? validation : train).add(pixels, label);
                ++(validates ? validated : trained);
              });
  }
  if (trained == 0 || validated == 0) throw formats::FormatError(options.data, "too few images to train and to validate on");
  read_file((folder / "test_batch.bin").string(),
            [&](int32_t label, const std::vector<int32_t>& pixels) { test.add(pixels, label); });
  TaskData data{.name = options.name, .kind = TaskKind::kClassify, .vocab_size = 256, .num_classes = kClasses};
  data.splits.emplace("train", train.finish());
  data.splits.emplace("validation", validation.finish());
  data.splits.emplace("test", test.finish());
  return data;
}

}  // namespace latte
