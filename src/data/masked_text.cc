// Masked language modelling on the bytes of a file.
#include <algorithm>
#include <vector>

#include "data/tasks.h"
#include "formats/error.h"
#include "formats/mapped_file.h"

namespace latte {

// Windows of `length` bytes, one after the other; the last validation_fraction of them validate.
TaskData read_masked_language(const TaskOptions& options) {
  const formats::MappedFile file(options.data);
  const auto text = file.text();
  const auto length = static_cast<size_t>(options.length);
  const auto windows = static_cast<int64_t>(text.size() / length);
  const auto validation = static_cast<int64_t>(static_cast<double>(windows) * options.validation_fraction);
  if (validation < 1 || validation == windows) {
    throw formats::FormatError(options.data, std::to_string(text.size()) + " bytes are too few to train and to validate on, " +
                                                 std::to_string(length) + " at a time");
  }
  constexpr int32_t kMask = 256;
  TaskData data{.name = options.name, .kind = TaskKind::kTokens, .vocab_size = kMask + 1, .num_classes = kMask};
  data.mask_fraction = options.mask_fraction;
  TaskBuilder train(/*wide=*/true), held_out(/*wide=*/true);
  std::vector<int32_t> window(length);
  for (int64_t i = 0; i < windows; ++i) {
    const auto begin = text.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(i) * length);
    std::transform(begin, begin + static_cast<std::ptrdiff_t>(length), window.begin(),
                   [](char c) { return static_cast<int32_t>(static_cast<unsigned char>(c)); });
    (i < windows - validation ? train : held_out).add(window, std::span<const int32_t>(window));
  }
  data.splits.emplace("train", train.finish());
  data.splits.emplace("validation", held_out.finish());
  return data;
}

}  // namespace latte
