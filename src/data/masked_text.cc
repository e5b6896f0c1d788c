// Masked language modelling on the bytes of a file.
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
  TaskBuilder train, held_out;
  for (int64_t i = 0; i < windows; ++i) {
    (i < windows - validation ? train : held_out).add_bytes(text.substr(static_cast<size_t>(i) * length, length));
  }
  data.splits.emplace("train", train.finish());
  data.splits.emplace("validation", held_out.finish());
  return data;
}

}  // namespace latte
