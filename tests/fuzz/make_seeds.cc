// make_seeds FOLDER: a few sound inputs for each fuzz target, in FOLDER/TARGET, from which it finds the unsound ones.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "formats/adapter.h"
#include "formats/checkpoint.h"
#include "formats/gguf.h"
#include "formats/safetensors.h"
#include "formats/token_corpus.h"
#include "small_model.h"
#include "state_models.h"

using namespace latte;
using namespace latte::formats;
using fuzz::small_model;
using fuzz::write_model;

namespace {

void add_vocabulary(GgufMetadata& metadata, bool sentencepiece) {
  metadata.set("tokenizer.ggml.model", std::string(sentencepiece ? "llama" : "gpt2"));
  metadata.set("tokenizer.ggml.pre", std::string("default"));
  metadata.set("tokenizer.ggml.tokens", GgufArray(std::vector<std::string>{"<|end|>", "a", "b", "ab", "<0x0A>", "\u0120", "c",
                                                                           "d", "e", "<|im_start|>", "\u2581", "\u2581a"}));
  metadata.set("tokenizer.ggml.token_type", GgufArray(std::vector<int32_t>{3, 1, 1, 1, 6, 4, 1, 1, 1, 3, 1, 1}));
  metadata.set("tokenizer.ggml.scores", GgufArray(std::vector<float>{0, -1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11}));
  metadata.set("tokenizer.ggml.merges", GgufArray(std::vector<std::string>{"a b"}));
  metadata.set("tokenizer.ggml.eos_token_id", uint32_t{0});
  metadata.set("tokenizer.ggml.bos_token_id", uint32_t{0});
  metadata.set("tokenizer.ggml.add_bos_token", true);
  metadata.set("tokenizer.ggml.add_space_prefix", false);
  metadata.set("tokenizer.chat_template", std::string("{{'<|im_start|>'}}"));
}

void text(const std::string& path, std::string_view content) { std::ofstream(path, std::ios::binary) << content; }

std::string many(const std::string& lines, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) all += lines;
  return all;
}

// As data/task_file.h says, without torch: two sequences a split.
void write_task(const std::string& path, const std::string& kind) {
  const std::vector<uint8_t> tokens = {1, 2, 3, 4, 0};
  const std::vector<int64_t> offsets = {0, 3, 5}, target_positions = {1, 3, 4};
  const std::vector<int32_t> labels = {0, 1}, pair_labels = {1}, targets = {3, 0, 4};
  const auto view = [](const std::string& name, DType dtype, const auto& values) {
    TensorView tensor;
    tensor.name = name;
    tensor.dtype = dtype;
    tensor.shape = {static_cast<int64_t>(values.size())};
    tensor.data = std::as_bytes(std::span(values));
    return tensor;
  };
  std::vector<TensorView> tensors;
  for (const std::string split : {"train", "validation"}) {
    tensors.push_back(view(split + ".tokens", DType::kUInt8, tokens));
    tensors.push_back(view(split + ".offsets", DType::kInt64, offsets));
    if (kind == "tokens") {
      tensors.push_back(view(split + ".target_positions", DType::kInt64, target_positions));
      tensors.push_back(view(split + ".targets", DType::kInt32, targets));
    } else {
      tensors.push_back(view(split + ".labels", DType::kInt32, kind == "pairs" ? pair_labels : labels));
    }
  }
  write_safetensors(path, tensors,
                    {{"format", "latte.task"},
                     {"version", "2"},
                     {"name", "text"},
                     {"kind", kind},
                     {"vocab_size", "5"},
                     {"num_classes", kind == "tokens" ? "5" : "2"},
                     {"options", "{}"}});
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return std::fputs("usage: make_seeds FOLDER\n", stderr), 2;
  const std::filesystem::path root = argv[1];
  const auto folder = [&](const char* name) {
    std::filesystem::create_directories(root / name);
    return (root / name).string() + "/";
  };
  const std::string gguf = folder("gguf");
  write_model(gguf + "llama", small_model("llama"), TensorType::kQ8_0);
  write_model(gguf + "gemma3", small_model("gemma3"), TensorType::kF16);
  GgufMetadata adapter = small_model("llama");
  AdapterSpec spec;
  spec.latents = {16, -1};
  spec.base_hash = std::string(32, '0');
  spec.put_into(adapter);
  text(gguf + "adapter", gguf_without_tensors(adapter));

  const std::string adapters = folder("adapter"), base = adapters + "base";
  write_model(base, small_model("llama"), TensorType::kQ8_0);
  fuzz::write_small_adapter(adapters + "latents", base);
  std::filesystem::remove(base);

  const std::string tokenizer = folder("tokenizer");
  for (bool sentencepiece : {false, true}) {
    GgufMetadata metadata;
    add_vocabulary(metadata, sentencepiece);
    text(tokenizer + (sentencepiece ? "sentencepiece" : "bytepairs"), gguf_without_tensors(metadata));
  }

  const std::string safetensors = folder("safetensors");
  const std::vector<float> values = {1, 2, 3, 4};
  TensorView tensor;
  tensor.name = "blocks.0.weight";
  tensor.shape = {2, 2};
  tensor.data = std::as_bytes(std::span(values));
  const std::vector<TensorView> tensors = {tensor};
  write_safetensors(safetensors + "plain", tensors, {{"format", "pt"}});
  write_checkpoint(safetensors + "checkpoint", {"{\"a\": 1}", 7}, tensors);

  const std::string corpus = folder("token_corpus");
  write_token_corpus(corpus + "narrow", std::vector<int64_t>{1, 2, 300}, 301, std::string(32, '0'));
  write_token_corpus(corpus + "wide", std::vector<int64_t>{1, 70000}, 70001, std::string(32, '0'));

  const std::string task = folder("task_file");
  for (const char* kind : {"classify", "pairs", "tokens"}) write_task(task + kind, kind);
  text(folder("labelled_text") + "reviews", "1\tgood\n0\tbad\r\n1.0\tvery good indeed\n0.0\ta\tb\n" + many("0\tno\n1\tyes\n", 8));

  const std::string checkpoint = folder("checkpoint");
  text(checkpoint + "bytes", "bytes");
  text(checkpoint + "characters", "characters:abc\xC3\xB6");
  text(checkpoint + "config",
       R"({"vocab_size": 65, "attention": "macchiato", "position": "conv", "num_latents": 8, "window": 4})");

  const std::string state = folder("state");
  for (const auto& [name, model] : fuzz::state_models()) {
    runtime::Engine engine(model, {1, {}, 16});
    runtime::Session session(model);
    for (const int32_t token : {1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}) engine.decode(session, token);
    session.save(state + name);
  }

  text(folder("shard_index") + "one_shard",
       R"({"metadata": {"total_size": 100}, "weight_map": {"model.embed_tokens.weight": "a.safetensors",
           "model.norm.weight": "a.safetensors", "model.layers.0.input_layernorm.weight": "a.safetensors",
           "model.layers.0.post_attention_layernorm.weight": "a.safetensors",
           "model.layers.0.self_attn.q_proj.weight": "a.safetensors", "model.layers.0.self_attn.k_proj.weight": "a.safetensors",
           "model.layers.0.self_attn.v_proj.weight": "a.safetensors", "model.layers.0.self_attn.o_proj.weight": "a.safetensors",
           "model.layers.0.mlp.gate_proj.weight": "a.safetensors", "model.layers.0.mlp.up_proj.weight": "a.safetensors",
           "model.layers.0.mlp.down_proj.weight": "a.safetensors"}})");

  const std::string hugging_face = folder("hugging_face");
  text(hugging_face + "llama",
       R"({"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "num_hidden_layers": 1, "max_position_embeddings": 8,
           "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
           "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 4}, "tie_word_embeddings": true})");
  text(hugging_face + "gemma3",
       R"({"model_type": "gemma3_text", "vocab_size": 9, "num_hidden_layers": 2, "max_position_embeddings": 8, "hidden_size": 4,
           "intermediate_size": 4, "num_attention_heads": 1, "head_dim": 4, "sliding_window": 2, "query_pre_attn_scalar": 4,
           "layer_types": ["sliding_attention", "full_attention"], "hidden_activation": "gelu_pytorch_tanh",
           "rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 2.0, "attention_factor": 1.1},
                               "sliding_attention": {"rope_theta": 1e4}}})");
  return 0;
}
