// Whatever an adapter holds: it is refused with an error that tells why it doesn't fit its base, or it is the base's.
#include <cstdlib>
#include <string>

#include "formats/adapter.h"
#include "formats/error.h"
#include "input_file.h"
#include "small_model.h"

using namespace latte;

namespace {

// The model that every input is held against; its file is gone once it is mapped.
const formats::GgufFile& base() {
  static const formats::GgufFile file = [] {
    const fuzz::TemporaryFolder folder;
    fuzz::write_model(folder / "base.gguf", fuzz::small_model("llama"), formats::TensorType::kQ8_0);
    return formats::GgufFile(folder / "base.gguf");
  }();
  return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const formats::AdapterFile adapter(fuzz::input_file(data, size));
    if (adapter.spec().latents.empty()) std::abort();
    fuzz::touch(adapter.spec().recipe);
    adapter.check_fits(base());
    for (const formats::GgufTensor& tensor : adapter.file().tensors()) {
      if (tensor.floats().size() != static_cast<size_t>(tensor.elements())) std::abort();
    }
  } catch (const formats::FormatError&) {
  }
  return 0;
}
