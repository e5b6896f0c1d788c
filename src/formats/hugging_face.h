// Hugging Face folders: config.json, and the weights in model.safetensors or in shards that model.safetensors.index.json lists.
#pragma once

#include <memory>
#include <string>

#include "formats/pretrained.h"

namespace latte::formats {

// config.json -> the metadata that a GGUF file of the model has. LlamaForCausalLM and Gemma3ForCausalLM. Throws FileError, and
// FormatError for another architecture, for what latte can't compute, and for fields that are missing or out of range.
GgufMetadata hugging_face_metadata(const std::string& config_path);

// Tensors bear GGUF's names and layout: query and key weights of llama in the order of neighbouring pairs, Gemma's norms with
// their 1 added. Throws as hugging_face_metadata does, and FormatError for shards that don't fit their index or the config.
std::unique_ptr<PretrainedFile> open_hugging_face(const std::string& folder);

}  // namespace latte::formats
