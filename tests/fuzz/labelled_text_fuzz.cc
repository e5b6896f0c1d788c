// Whatever bytes a file of label, tab, text has: it is refused with an error, or gives sequences of its own bytes that are no
// longer than asked for.
#include <cstdlib>

#include "data/tasks.h"
#include "formats/error.h"
#include "input_file.h"

using namespace latte;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  TaskOptions options = TaskOptions::defaults("text");
  options.data = fuzz::input_file(data, size);
  options.length = 7;
  for (const bool crop : {false, true}) {
    options.crop = crop;
    try {
      const TaskData task = read_labelled_text(options);
      task.check(options.data);
      int64_t bytes = 0;
      for (const auto& [name, split] : task.splits) bytes += split.tokens.numel();
      if (task.longest() > options.length || bytes > static_cast<int64_t>(size)) std::abort();
    } catch (const formats::FormatError&) {
    }
  }
  return 0;
}
