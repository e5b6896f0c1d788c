// A model's weights, ready for products. Immutable: any number of engines and sessions share one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/adapter.h"
#include "formats/checkpoint.h"
#include "formats/gguf.h"
#include "formats/vocabulary.h"
#include "runtime/matrix.h"
#include "runtime/memory.h"
#include "runtime/model_shape.h"
#include "runtime/threads.h"

namespace latte::runtime {

struct NormWeights {
  const float* weight = nullptr;  // [E], or null: there is no such norm
  const float* bias = nullptr;    // [E] or null
};

// The weights that a converted layer has beside its own (formats/adapter.h has the formulas).
struct LatentWeights {
  std::vector<Matrix> query;          // H of [L, Dk]
  const float* query_bias = nullptr;  // [H, L]
  std::vector<Matrix> key;            // Hkv of [L, Dk]
  const float* key_bias = nullptr;    // [Hkv, L]
  Matrix gate;                        // [H, E]
  const float* gate_bias = nullptr;   // [H]
  const float* gate_slope = nullptr;  // [H]
  const float* log_decay = nullptr;   // [Hkv, L] <= 0, or null
  const float* floor = nullptr;       // [Hkv, L], or null
  const float* key_conv = nullptr;    // [Hkv, Dk, kKeyConvWidth], or null
};

// The weights of a layer of latte train whose attention sums up the past (nn/attention.h and nn/linear_attention.h have the
// formulas).
struct SumWeights {
  Matrix query;                     // of mixed input: [H (L + 1), E], the window's logit first; without a window [H L, E]
  Matrix key;                       // of mixed input: [Hkv L, E]
  Matrix decay;                     // [Hkv L, E] or none; of gated linear attention [Hkv D, E]
  Matrix out_gate;                  // gated linear attention: [H D, E]
  const float* out_norm = nullptr;  // gated linear attention: [D]
};

// Of a layer of latte train whose input is mixed over time first (nn/recurrent.h).
struct MixerWeights {
  const float* conv = nullptr;       // [E, K]
  const float* conv_bias = nullptr;  // [E]
  Matrix recurrence;                 // [E, E]
  Matrix recurrence_input;           // [E, E]
  const float* lambda = nullptr;     // [E]
};

struct LayerWeights {
  NormWeights attention_norm;
  NormWeights attention_post_norm;
  const float* query_norm = nullptr;  // [Dk] or null
  const float* key_norm = nullptr;    // [Dk] or null
  Matrix query, key, value, output;
  NormWeights feed_forward_norm;
  NormWeights feed_forward_post_norm;
  Matrix gate, up, down;  // no gate where the feed-forward isn't gated
  LatentWeights latent;
  SumWeights sums;
  MixerWeights mixer;

  InputForms attention_forms, mixed_forms, output_forms, feed_forward_forms, down_forms, query_head_forms, key_head_forms;
};

struct ModelOptions {
  std::string adapter;  // path, or empty; a merged model needs none
  // Whether the weights that an adapter has changed, often in a larger type, are brought to the base's type.
  bool adapter_in_base_type = false;
  // Of every matrix: what has another type is converted while loading. Kept where unset.
  std::optional<formats::TensorType> type;
  AttentionChoice attention;  // of a model without an adapter
  int threads = 0;            // for loading; 0: as many as there are CPUs
};

// Whether Model::open takes `path` for a checkpoint of latte train (the file, or its run's folder) rather than a GGUF file.
bool is_checkpoint(const std::string& path);

class Model {
 public:
  // A GGUF file, or a checkpoint of latte train (the file, or its run's folder). Throws FileError, FormatError, ModelError,
  // MemoryError.
  static std::shared_ptr<const Model> open(const std::string& path, const ModelOptions& options = {});

  const ModelShape& shape() const { return shape_; }
  const std::string& path() const { return path_; }
  // What the model's tokens are: one of the two is null.
  const formats::GgufMetadata* metadata() const { return file_ ? &file_->metadata() : nullptr; }
  const formats::Vocabulary* vocabulary() const { return vocabulary_ ? &*vocabulary_ : nullptr; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const NormWeights& final_norm() const { return final_norm_; }
  const Matrix& head() const { return head_; }
  const std::vector<std::vector<double>>& frequencies() const { return frequencies_; }  // of shape().rotary, [rotary_dims / 2]
  // Row of the embedding, scaled, with what is added to it of the token's position.
  void embed(int32_t token, int64_t position, float* out) const;

  // Tells this model's states from any other's: the hash of its files and of the attention chosen.
  const std::string& state_hash() const { return state_hash_; }
  size_t weight_bytes() const { return weight_bytes_; }  // that one token reads

 private:
  Model(std::string path, const ModelOptions& options)
      : path_(std::move(path)), arena_("the model's weights"), options_(options) {}
  void load();
  void load_checkpoint();  // model_checkpoint.cc
  void finish_layer(const LayerShape& attends, LayerWeights& layer);
  void set_frequencies(const float* factors);
  void require_memory(uint64_t file_bytes) const;
  void load_layer(int64_t index, ThreadPool& pool);
  void load_latents(int64_t index, ThreadPool& pool);
  void make_latents(int64_t index, ThreadPool& pool);
  void convert(const formats::AdapterSpec& spec);

  const formats::GgufTensor* find(const std::string& name) const;  // the adapter's, else the file's
  const formats::GgufTensor& tensor(const std::string& name, const std::vector<int64_t>& shape) const;
  Matrix matrix(const std::string& name, int64_t rows, int64_t columns, ThreadPool& pool);
  Matrix converted(formats::GgufTensorSpec spec, std::span<const std::byte> data, formats::TensorType type, int64_t rows,
                   int64_t columns, ThreadPool& pool);
  const float* floats(const std::string& name, const std::vector<int64_t>& shape);

  class Checkpoint;

  std::string path_;
  std::optional<formats::GgufFile> file_;
  std::optional<formats::CheckpointFile> checkpoint_;
  std::optional<formats::Vocabulary> vocabulary_;
  ModelShape shape_;
  Arena arena_;
  std::optional<formats::AdapterFile> adapter_;
  ModelOptions options_;
  std::vector<LayerWeights> layers_;
  NormWeights final_norm_;
  Matrix head_;
  formats::TensorType embedding_type_ = formats::TensorType::kF32;
  std::span<const std::byte> embedding_;       // [vocabulary, E], where the file is mapped
  const float* position_embedding_ = nullptr;  // [learned_positions, E]
  std::vector<double> sinusoid_rates_;         // [ceil(E / 2)]
  std::vector<std::vector<double>> frequencies_;
  std::string state_hash_;
  size_t weight_bytes_ = 0;
};

}  // namespace latte::runtime
