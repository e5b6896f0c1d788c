// A model's weights, ready for products. Immutable: any number of engines and sessions share one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "formats/adapter.h"
#include "formats/gguf.h"
#include "runtime/matrix.h"
#include "runtime/memory.h"
#include "runtime/model_shape.h"
#include "runtime/threads.h"

namespace latte::runtime {

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
};

struct LayerWeights {
  const float* attention_norm = nullptr;       // [E]
  const float* attention_post_norm = nullptr;  // [E] or null
  const float* query_norm = nullptr;           // [Dk] or null
  const float* key_norm = nullptr;             // [Dk] or null
  Matrix query, key, value, output;
  const float* feed_forward_norm = nullptr;       // [E]
  const float* feed_forward_post_norm = nullptr;  // [E] or null
  Matrix gate, up, down;
  LatentWeights latent;

  InputForms attention_forms, output_forms, feed_forward_forms, down_forms, query_head_forms, key_head_forms;
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

class Model {
 public:
  // Throws FileError, FormatError, ModelError, MemoryError.
  static std::shared_ptr<const Model> open(const std::string& path, const ModelOptions& options = {});

  const ModelShape& shape() const { return shape_; }
  const std::string& path() const { return file_.path(); }
  const formats::GgufFile& file() const { return file_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const float* final_norm() const { return final_norm_; }
  const Matrix& head() const { return head_; }
  const std::vector<std::vector<double>>& frequencies() const { return frequencies_; }  // of shape().rotary, [rotary_dims / 2]
  // Row of the embedding, scaled.
  void embed(int32_t token, float* out) const;

  // Tells this model's states from any other's: the hash of its files and of the attention chosen.
  const std::string& state_hash() const { return state_hash_; }
  size_t weight_bytes() const { return weight_bytes_; }  // that one token reads

 private:
  Model(const std::string& path, const ModelOptions& options) : file_(path), arena_("the model's weights"), options_(options) {}
  void load();
  void load_layer(int64_t index, ThreadPool& pool);
  void load_latents(int64_t index, ThreadPool& pool);
  void make_latents(int64_t index, ThreadPool& pool);
  void convert(const formats::AdapterSpec& spec);

  const formats::GgufTensor* find(const std::string& name) const;  // the adapter's, else the file's
  const formats::GgufTensor& tensor(const std::string& name, std::vector<int64_t> shape) const;
  Matrix matrix(const std::string& name, int64_t rows, int64_t columns, ThreadPool& pool);
  const float* floats(const std::string& name, std::vector<int64_t> shape);

  formats::GgufFile file_;
  ModelShape shape_;
  Arena arena_;
  std::optional<formats::AdapterFile> adapter_;
  ModelOptions options_;
  std::vector<LayerWeights> layers_;
  const float* final_norm_ = nullptr;
  Matrix head_;
  const formats::GgufTensor* embedding_ = nullptr;
  std::vector<std::vector<double>> frequencies_;
  std::string state_hash_;
  size_t weight_bytes_ = 0;
};

}  // namespace latte::runtime
