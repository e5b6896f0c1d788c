// Whatever config.json of a Hugging Face folder says: it is refused with an error, or its metadata make a model's configuration
// or none.
#include <cstdlib>
#include <vector>

#include "formats/decoder_config.h"
#include "formats/error.h"
#include "formats/hugging_face.h"
#include "input_file.h"

using namespace latte;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const formats::GgufMetadata metadata = formats::hugging_face_metadata(fuzz::input_file(data, size));
    const std::string prefix = metadata.string("general.architecture");
    const int64_t vocabulary = metadata.integer(prefix + ".vocab_size", 1, INT64_MAX);
    const std::vector<formats::GgufTensorSpec> tensors = {{"token_embd.weight", formats::TensorType::kF32, {vocabulary, 4}}};
    const formats::DecoderConfig config = formats::decoder_config(metadata, tensors);
    if (config.num_layers < 1 || config.num_heads % config.num_kv_heads != 0 || config.head_dim < 2) std::abort();
    if (formats::decoder_tensors(config).empty()) std::abort();
  } catch (const formats::FormatError&) {
  }
  return 0;
}
