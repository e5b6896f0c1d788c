// Another type for a model's matrices.
#pragma once

#include <string>

#include "formats/tensor_type.h"

namespace latte::runtime {

// The type that tensor `spec` of a model gets when `wanted` is asked for: norms and vectors keep theirs; rows that make no whole
// blocks fall back to Q8_0 or F16; below 8 bits the token embedding, which is the last matrix too where they are tied, gets Q8_0.
// `from` is a path. Throws FileError, FormatError, ModelError; the file at `to` is whole or as it was.
void quantize_model(const std::string& from, const std::string& to, formats::TensorType wanted);

// The same of a Hugging Face folder, which becomes a GGUF file. The tokeniser is that of a GGUF file (of the same family: its
// tokens are counted); without one (empty) the model reads numbers alone, not text.
void quantize_folder(const std::string& folder, const std::string& to, formats::TensorType wanted, const std::string& tokenizer);

}  // namespace latte::runtime
