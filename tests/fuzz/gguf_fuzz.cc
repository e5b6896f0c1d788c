// Whatever bytes a GGUF file has: it is refused with an error, or all that it hands out can be read and written back.
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "formats/adapter.h"
#include "formats/decoder_config.h"
#include "formats/error.h"
#include "formats/gguf.h"
#include "formats/pretrained.h"
#include "input_file.h"

using namespace latte;

namespace {

// What reads metadata may refuse them, and nothing else.
template <typename Action>
void refusable(const Action& action) {
  try {
    action();
  } catch (const formats::FormatError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string& path = fuzz::input_file(data, size);
  refusable([&] {
    const formats::GgufFile file(path);
    for (const auto& [key, value] : file.metadata().entries()) {
      if (formats::describe(value).empty()) std::abort();
      if (const auto* text = std::get_if<std::string>(&value)) fuzz::touch(*text);
    }
    for (const formats::GgufTensor& tensor : file.tensors()) {
      if (formats::describe(tensor).empty() || file.find(tensor.name) != &tensor) std::abort();
      fuzz::touch(tensor.data);
      if (formats::can_dequantize(tensor.type) && static_cast<size_t>(tensor.elements()) != tensor.floats().size()) std::abort();
    }
    // Metadata survive being written and read.
    const std::string bytes = formats::gguf_without_tensors(file.metadata());
    if (bytes.size() < 24) std::abort();
    refusable([&] { formats::AdapterSpec::from(file.metadata()); });
    refusable([&] { formats::merged_spec(file); });
    refusable([&] {
      const auto model = formats::open_pretrained(path);
      for (const auto& spec : model->tensors())
        if (model->read(spec.name).empty()) std::abort();
    });
  });
  return 0;
}
