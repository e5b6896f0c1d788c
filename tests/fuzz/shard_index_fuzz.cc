// Whatever model.safetensors.index.json of a Hugging Face folder says, beside a sound configuration and one sound shard: it is
// refused with an error, or its tensors can be read.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/hugging_face.h"
#include "formats/safetensors.h"
#include "input_file.h"

using namespace latte;

namespace {

constexpr const char* kConfig = R"({"architectures": ["LlamaForCausalLM"], "vocab_size": 4, "num_hidden_layers": 1,
  "max_position_embeddings": 8, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1,
  "rms_norm_eps": 1e-5, "tie_word_embeddings": true})";

void fill(const fuzz::TemporaryFolder& folder) {
  std::ofstream(folder / "config.json") << kConfig;
  const std::vector<float> values(16, 0.5f);
  std::vector<formats::TensorView> tensors;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    formats::TensorView& tensor = tensors.emplace_back();
    tensor.name = name;
    tensor.data = std::as_bytes(std::span(values).first(shape.size() == 1 ? 4 : 16));
    tensor.shape = std::move(shape);
  };
  add("model.embed_tokens.weight", {4, 4});
  add("model.norm.weight", {4});
  const std::string layer = "model.layers.0.";
  for (const char* name : {"input_layernorm", "post_attention_layernorm"}) add(layer + name + ".weight", {4});
  for (const char* name : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                           "mlp.up_proj", "mlp.down_proj"}) {
    add(layer + name + ".weight", {4, 4});
  }
  formats::write_safetensors(folder / "a.safetensors", tensors, {{"format", "pt"}});
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string& index = fuzz::input_file(data, size);
  static const fuzz::TemporaryFolder folder;
  static const bool filled = [&] {
    fill(folder);
    std::filesystem::create_symlink(index, folder / "model.safetensors.index.json");
    return true;
  }();
  if (!filled) std::abort();
  try {
    const auto model = formats::open_hugging_face(folder.path());
    for (const auto& tensor : model->tensors()) {
      if (model->read(tensor.name).empty()) std::abort();
    }
  } catch (const formats::FormatError&) {
  } catch (const formats::FileError&) {  // a shard that isn't there
  }
  return 0;
}
