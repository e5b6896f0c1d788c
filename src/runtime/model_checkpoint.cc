// Models from checkpoints of latte train: weights of float32, repacked as they are or in the type that is asked for.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/trained_model.h"
#include "runtime/error.h"
#include "runtime/model.h"

namespace latte::runtime {

constexpr int64_t kGatedRank = 16;  // of the decays of gated_linear, as in nn/linear_attention.cc

class Model::Checkpoint {
 public:
  Checkpoint(Model& model, const formats::LanguageModelConfig& config)
      : model_(model),
        shape_(model.shape_),
        config_(config),
        file_(model.checkpoint_->file()),
        pool_(model.options_.threads > 0 ? model.options_.threads
                                         : std::max(1, static_cast<int>(std::thread::hardware_concurrency()))) {}

  void load() {
    const int64_t dim = shape_.embed_dim;
    model_.embedding_ = tensor("token_embedding.weight", {shape_.vocab_size, dim}).data;
    if (shape_.learned_positions > 0) {
      model_.position_embedding_ = floats("position_embedding.weight", {shape_.learned_positions, dim});
    }
    if (shape_.sinusoidal) {
      for (int64_t i = 0; i < (dim + 1) / 2; ++i) {
        model_.sinusoid_rates_.push_back(std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(dim)));
      }
    }
    model_.final_norm_ = norm("final_norm");
    model_.head_ = matrix(config_.tie_embeddings ? "token_embedding" : "output_proj", shape_.vocab_size, dim, false);
    model_.weight_bytes_ = model_.head_.bytes();
    model_.layers_.resize(shape_.layers.size());
    for (size_t i = 0; i < model_.layers_.size(); ++i) {
      load_layer("blocks." + std::to_string(i) + ".", shape_.layers[i], model_.layers_[i]);
      model_.finish_layer(shape_.layers[i], model_.layers_[i]);
    }
  }

 private:
  void load_layer(const std::string& block, const LayerShape& attends, LayerWeights& layer) {
    const int64_t dim = shape_.embed_dim, kv_dim = shape_.num_kv_heads * shape_.head_dim;
    const std::string attention = block + "attention.", mlp = block + "mlp.";
    layer.attention_norm = norm(block + "attention_norm");
    layer.feed_forward_norm = norm(block + "mlp_norm");
    if (shape_.gated) layer.gate = matrix(mlp + "gate_proj", shape_.hidden_dim, dim, config_.bias);
    layer.up = matrix(mlp + "up_proj", shape_.hidden_dim, dim, config_.bias);
    layer.down = matrix(mlp + "down_proj", dim, shape_.hidden_dim, config_.bias);
    if (attends.latents == 0 || attends.tokens) {
      layer.query = matrix(attention + "query_proj", dim, dim, config_.bias);
      layer.key = matrix(attention + "key_proj", kv_dim, dim, config_.bias);
    }
    layer.value = matrix(attention + "value_proj", kv_dim, dim, config_.bias);
    layer.output = matrix(attention + "out_proj", dim, dim, config_.bias);
    load_mixer(attention, layer.mixer);
    if (attends.latents > 0) load_latents(attention, attends, layer.sums);
    if (attends.linear == Linear::kGated) load_gated(attention, layer.sums);
  }

  void load_latents(const std::string& attention, const LayerShape& attends, SumWeights& sums) {
    const int64_t dim = shape_.embed_dim, gates = attends.tokens ? 1 : 0;
    const int64_t key_logits = shape_.num_kv_heads * attends.latents;
    sums.query = matrix(attention + "query_logits_proj", shape_.num_heads * (attends.latents + gates), dim, config_.bias);
    sums.key = matrix(attention + "key_logits_proj", key_logits, dim, config_.bias);
    if (!config_.forgets()) return;
    sums.decay = config_.decay_rank == 0 ? matrix(attention + "decay_proj", key_logits, dim, config_.bias)
                                         : decay_product(attention, key_logits, config_.decay_rank);
  }

  void load_mixer(const std::string& attention, MixerWeights& mixer) {
    const int64_t dim = shape_.embed_dim;
    if (shape_.mixer == Mixer::kConv) {
      mixer.conv = floats(attention + "conv.weight", {dim, shape_.conv_width});
      mixer.conv_bias = floats(attention + "conv.bias", {dim});
    }
    if (shape_.mixer == Mixer::kRgLru) {
      mixer.recurrence = matrix(attention + "rg_lru.recurrence_proj", dim, dim, config_.bias);
      mixer.recurrence_input = matrix(attention + "rg_lru.input_proj", dim, dim, config_.bias);
      mixer.lambda = floats(attention + "rg_lru.lambda", {dim});
    }
  }

  void load_gated(const std::string& attention, SumWeights& sums) {
    sums.decay = decay_product(attention, shape_.num_kv_heads * shape_.head_dim, kGatedRank);
    sums.out_gate = matrix(attention + "gate_proj", shape_.embed_dim, shape_.embed_dim, config_.bias);
    sums.out_norm = floats(attention + "norm_weight", {shape_.head_dim});
  }

  // The two matrices that decays come from, of which the first has `rank` rows, as one.
  Matrix decay_product(const std::string& attention, int64_t decays, int64_t rank) {
    const int64_t dim = shape_.embed_dim;
    const auto down = floats_of(attention + "decay_down.weight", {rank, dim});
    const auto up = floats_of(attention + "decay_up.weight", {decays, rank});
    std::vector<double> row(static_cast<size_t>(dim));
    std::vector<float> product(static_cast<size_t>(decays * dim));
    for (int64_t r = 0; r < decays; ++r) {
      std::fill(row.begin(), row.end(), 0.0);
      for (int64_t k = 0; k < rank; ++k) {
        const double weight = static_cast<double>(up[static_cast<size_t>(r * rank + k)]);
        for (int64_t c = 0; c < dim; ++c)
          row[static_cast<size_t>(c)] += weight * static_cast<double>(down[static_cast<size_t>(k * dim + c)]);
      }
      std::copy(row.begin(), row.end(), product.begin() + r * dim);
    }
    Matrix result = packed(attention + "decay", std::as_bytes(std::span(product)), decays, dim);
    result.set_bias(floats(attention + "decay_up.bias", {decays}));
    return result;
  }

  const formats::TensorView& tensor(const std::string& name, std::vector<int64_t> shape) const {
    const formats::TensorView& found = file_.at("model." + name);
    formats::TensorSpec expected;
    expected.shape = std::move(shape);
    if (found.dtype != expected.dtype || found.shape != expected.shape) {
      throw formats::FormatError(
          file_.path(), "tensor " + formats::quote(found.name) + " is " + describe(found) + ", expected " + describe(expected));
    }
    return found;
  }

  const float* floats(const std::string& name, std::vector<int64_t> shape) {
    const auto data = tensor(name, std::move(shape)).data;
    float* out = model_.arena_.take_array<float>(static_cast<int64_t>(data.size() / sizeof(float)));
    if (!data.empty()) std::memcpy(out, data.data(), data.size());
    return out;
  }

  // A copy that doesn't stay.
  std::vector<float> floats_of(const std::string& name, std::vector<int64_t> shape) const {
    const auto data = tensor(name, std::move(shape)).data;
    std::vector<float> copy(data.size() / sizeof(float));
    if (!data.empty()) std::memcpy(copy.data(), data.data(), data.size());
    return copy;
  }

  NormWeights norm(const std::string& name) {
    NormWeights weights;
    weights.weight = floats(name + ".weight", {shape_.embed_dim});
    if (config_.bias && shape_.norm == Norm::kLayer) weights.bias = floats(name + ".bias", {shape_.embed_dim});
    return weights;
  }

  Matrix matrix(const std::string& name, int64_t rows, int64_t columns, bool bias) {
    Matrix result = packed(name, tensor(name + ".weight", {rows, columns}).data, rows, columns);
    if (bias) result.set_bias(floats(name + ".bias", {rows}));
    return result;
  }

  Matrix packed(const std::string& name, std::span<const std::byte> data, int64_t rows, int64_t columns) {
    const formats::TensorType type = model_.options_.type.value_or(formats::TensorType::kF32);
    return model_.converted({name, formats::TensorType::kF32, {rows, columns}}, data, type, rows, columns, pool_);
  }

  Model& model_;
  const ModelShape& shape_;
  const formats::LanguageModelConfig& config_;
  const formats::SafetensorsFile& file_;
  ThreadPool pool_;
};

void Model::load_checkpoint() {
  if (!options_.adapter.empty()) throw ModelError(path_ + ": adapters are for GGUF files, this is a checkpoint of latte train");
  if (options_.attention.window > 0)
    throw ModelError(path_ + ": a model of latte train has the attention that it was trained with");
  checkpoint_.emplace(path_);
  formats::TrainedModel trained = formats::trained_model(*checkpoint_);
  vocabulary_ = std::move(trained.vocabulary);
  shape_ = ModelShape::from(trained.config);
  uint64_t bytes = 0;  // of the model; the optimizer's aren't read again
  for (const auto& tensor : checkpoint_->file().tensors()) bytes += tensor.name.starts_with("model.") ? tensor.data.size() : 0;
  require_memory(bytes);
  Checkpoint(*this, trained.config).load();
  set_frequencies(nullptr);
  formats::Hash hash;
  for (const auto& tensor : checkpoint_->file().tensors()) {
    if (!tensor.name.starts_with("model.")) continue;
    hash.add(std::string_view(tensor.name));
    hash.add(tensor.data);
  }
  hash.add(std::string_view(trained.config.to_json().dump()));
  hash.add(options_.type ? static_cast<uint64_t>(*options_.type) + 1 : 0);
  state_hash_ = hash.digits();
}

}  // namespace latte::runtime
