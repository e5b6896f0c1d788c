// Whatever bytes a safetensors file has: it is refused with an error, or its tensors lie in it and make a checkpoint or none.
#include <cstdlib>

#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/safetensors.h"
#include "input_file.h"

using namespace latte;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string& path = fuzz::input_file(data, size);
  try {
    const formats::SafetensorsFile file(path);
    for (const formats::TensorView& tensor : file.tensors()) {
      fuzz::touch(tensor.data);
      if (formats::describe(tensor).empty() || file.find(tensor.name) != &tensor) std::abort();
    }
    const formats::CheckpointFile checkpoint(path);
    if (checkpoint.step() < 0 || checkpoint.config().empty()) std::abort();
  } catch (const formats::FormatError&) {
  }
  return 0;
}
