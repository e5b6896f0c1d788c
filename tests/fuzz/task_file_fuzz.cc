// Whatever bytes a task file has: it is refused with an error, or every batch of every split holds the tokens and answers that
// the file declares.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "data/task_file.h"
#include "formats/error.h"
#include "input_file.h"

using namespace latte;

namespace {

void require_between(const at::Tensor& values, int64_t least, int64_t most) {
  const auto* data = values.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    if (data[i] < least || data[i] > most) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    TaskFile file = read_task(fuzz::input_file(data, size));
    for (const int64_t crop : {0, 3}) {
      file.data.crop = file.data.kind == TaskKind::kClassify ? crop : 0;
      const int64_t longest = file.data.longest();
      for (const auto& [name, split] : file.data.splits) {
        std::vector<int64_t> examples(static_cast<size_t>(std::min<int64_t>(file.data.examples(split), 16)));
        std::iota(examples.begin(), examples.end(), int64_t{0});
        const TaskBatch batch = file.data.batch(split, examples, size);
        if (batch.tokens.size(1) > longest) std::abort();
        require_between(batch.tokens, 0, file.data.vocab_size - 1);
        require_between(batch.targets, file.data.kind == TaskKind::kTokens ? kNoTarget : 0, file.data.num_classes - 1);
        const double share = file.data.majority_share(split);
        if (!(share >= 0 && share <= 1)) std::abort();
      }
    }
  } catch (const formats::FormatError&) {
  }
  return 0;
}
