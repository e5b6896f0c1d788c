// A llama of random float32 weights, small enough for a naive forward pass in float64, plain or converted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "formats/adapter.h"
#include "formats/gguf.h"
#include "formats/hash.h"
#include "formats/test_files.h"

namespace latte::runtime {

struct TinyShape {
  int64_t embed = 32, heads = 4, kv_heads = 2, head_dim = 8, hidden = 64, vocabulary = 50, layers = 3;
  // Of the converted model: layer 0 keeps its attention, layer 1 has no latents.
  int64_t window = 7, sinks = 3, latents = 5, far_limit = 20;
  bool evicted = true;
  bool floor = false;  // of the last layer's latents; the others' decay. In the layer before it of the last key-value head
  bool conv = false;   // in front of the latents' key logits

  bool has_floor(int64_t layer) const { return floor && layer >= layers - 2; }
  bool has_decay(int64_t layer) const { return !floor || layer < layers - 1; }
};

class TinyModel {
 public:
  explicit TinyModel(const TinyShape& shape = {}, uint64_t seed = 1) : shape_(shape), random_(seed) {
    formats::GgufMetadata metadata;
    metadata.set("general.architecture", std::string("llama"));
    metadata.set("general.name", std::string("Tiny"));
    const auto number = [&](const char* key, int64_t value) { metadata.set(key, static_cast<uint32_t>(value)); };
    number("llama.block_count", shape.layers);
    number("llama.embedding_length", shape.embed);
    number("llama.attention.head_count", shape.heads);
    number("llama.attention.head_count_kv", shape.kv_heads);
    number("llama.attention.key_length", shape.head_dim);
    number("llama.attention.value_length", shape.head_dim);
    number("llama.feed_forward_length", shape.hidden);
    number("llama.context_length", 512);
    metadata.set("llama.attention.layer_norm_rms_epsilon", 1e-5f);
    metadata.set("llama.rope.freq_base", 100.0f);
    add("token_embd.weight", {shape.vocabulary, shape.embed}, 1.0f);
    add("output.weight", {shape.vocabulary, shape.embed}, 0.3f);
    add("output_norm.weight", {shape.embed}, 1.0f);
    for (int64_t i = 0; i < shape.layers; ++i) {
      const std::string block = "blk." + std::to_string(i) + ".";
      add(block + "attn_norm.weight", {shape.embed}, 1.0f);
      add(block + "ffn_norm.weight", {shape.embed}, 1.0f);
      add(block + "attn_q.weight", {shape.heads * shape.head_dim, shape.embed}, 0.3f);
      add(block + "attn_k.weight", {shape.kv_heads * shape.head_dim, shape.embed}, 0.3f);
      add(block + "attn_v.weight", {shape.kv_heads * shape.head_dim, shape.embed}, 0.3f);
      add(block + "attn_output.weight", {shape.embed, shape.heads * shape.head_dim}, 0.2f);
      add(block + "ffn_gate.weight", {shape.hidden, shape.embed}, 0.2f);
      add(block + "ffn_up.weight", {shape.hidden, shape.embed}, 0.2f);
      add(block + "ffn_down.weight", {shape.embed, shape.hidden}, 0.2f);
    }
    formats::write_gguf(path(), metadata, tensors());

    names_.clear();
    formats::AdapterSpec spec;
    spec.window = shape.window;
    spec.sinks = shape.sinks;
    spec.far_limit = shape.far_limit;
    spec.evicted = shape.evicted;
    spec.latents = {-1, 0};
    while (static_cast<int64_t>(spec.latents.size()) < shape.layers) spec.latents.push_back(static_cast<int32_t>(shape.latents));
    spec.base_hash = formats::hash_of_file(path());
    spec.base_name = "Tiny";
    const formats::GgufFile base(path());
    for (int64_t i = 2; i < shape.layers; ++i) {
      for (const auto& tensor : formats::adapter_tensors(spec, formats::BaseShape::from(base.metadata()), i,
                                                         {shape.has_decay(i), shape.has_floor(i), shape.conv})) {
        add(tensor.name, tensor.shape, 0.5f);
      }
      if (!shape.has_floor(i) || !shape.has_decay(i)) continue;
      for (size_t j = 0; j < static_cast<size_t>(shape.kv_heads * shape.latents); ++j) {  // each has one of the two
        const bool last = static_cast<int64_t>(j) >= (shape.kv_heads - 1) * shape.latents;
        values_.at("blk." + std::to_string(i) + (last ? ".latte_decay" : ".latte_floor"))[j] = formats::kAbsent;
      }
    }
    formats::write_adapter(adapter(), spec, base, tensors());
  }

  std::string path() const { return folder_ / "tiny.gguf"; }
  std::string adapter() const { return folder_ / "adapter.gguf"; }
  const TinyShape& shape() const { return shape_; }
  std::string operator/(std::string_view name) const { return folder_ / name; }

  std::vector<int32_t> tokens(int64_t count) {
    std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(shape_.vocabulary) - 1);
    std::vector<int32_t> result(static_cast<size_t>(count));
    for (int32_t& t : result) t = token(random_);
    return result;
  }

  // Logits [T][vocabulary], by the definitions.
  std::vector<std::vector<double>> logits(const std::vector<int32_t>& tokens, bool converted) const;

 private:
  using Row = std::vector<double>;

  void add(const std::string& name, const std::vector<int64_t>& shape, float deviation) {
    formats::GgufTensorSpec spec{name, formats::TensorType::kF32, shape};
    std::normal_distribution<float> normal(shape.size() == 1 && deviation == 1.0f ? 1.0f : 0.0f,
                                           deviation == 1.0f ? 0.5f : deviation);
    std::vector<float>& values = values_[name];
    values.resize(static_cast<size_t>(spec.elements()));
    for (float& value : values) value = normal(random_);
    names_.push_back(spec);
  }
  std::vector<formats::GgufTensor> tensors() const {
    std::vector<formats::GgufTensor> result;
    for (const auto& spec : names_) {
      formats::GgufTensor tensor;
      static_cast<formats::GgufTensorSpec&>(tensor) = spec;
      tensor.data = formats::bytes_of(values_.at(spec.name));
      result.push_back(tensor);
    }
    return result;
  }
  Row times(const std::string& name, const Row& x, size_t first_row = 0, size_t rows = 0) const {
    const std::vector<float>& w = values_.at(name);
    if (rows == 0) rows = w.size() / x.size();
    Row out(rows, 0.0);
    for (size_t r = 0; r < rows; ++r) {
      for (size_t c = 0; c < x.size(); ++c) out[r] += static_cast<double>(w[(first_row + r) * x.size() + c]) * x[c];
    }
    return out;
  }
  Row norm(const std::string& name, const Row& x) const {
    double squares = 0.0;
    for (const double v : x) squares += v * v;
    Row out = x;
    for (size_t i = 0; i < x.size(); ++i) {
      out[i] *= values_.at(name)[i] / std::sqrt(squares / static_cast<double>(x.size()) + static_cast<double>(1e-5f));
    }
    return out;
  }
  Row head(const Row& heads, int64_t index) const {
    return {heads.begin() + index * shape_.head_dim, heads.begin() + (index + 1) * shape_.head_dim};
  }
  Row rotated(Row x, int64_t position) const {
    for (int64_t i = 0; i < shape_.head_dim / 2; ++i) {
      const double angle =
          static_cast<double>(position) * std::pow(100.0, -2.0 * static_cast<double>(i) / static_cast<double>(shape_.head_dim));
      const auto a = static_cast<size_t>(2 * i);
      const double left = x[a], right = x[a + 1];
      x[a] = left * std::cos(angle) - right * std::sin(angle);
      x[a + 1] = left * std::sin(angle) + right * std::cos(angle);
    }
    return x;
  }
  static double dot(const Row& a, const Row& b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  }
  // The mean of values by softmax weights.
  static Row mean(std::vector<double> scores, const std::vector<Row>& values, size_t size) {
    Row out(size, 0.0);
    if (scores.empty()) return out;
    const double max = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (double& score : scores) sum += (score = std::exp(score - max));
    for (size_t s = 0; s < scores.size(); ++s) {
      for (size_t j = 0; j < size; ++j) out[j] += scores[s] / sum * values[s][j];
    }
    return out;
  }

  TinyShape shape_;
  std::mt19937_64 random_;
  formats::TestFolder folder_;
  std::vector<formats::GgufTensorSpec> names_;  // of the file that is written next
  std::map<std::string, std::vector<float>> values_;
};

inline std::vector<std::vector<double>> TinyModel::logits(const std::vector<int32_t>& tokens, bool converted) const {
  const TinyShape& s = shape_;
  const int64_t count = static_cast<int64_t>(tokens.size());
  const auto dim = static_cast<size_t>(s.head_dim);
  std::vector<Row> x;
  for (const int32_t token : tokens) {
    const auto begin = values_.at("token_embd.weight").begin() + token * s.embed;
    x.emplace_back(begin, begin + s.embed);
  }
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    const std::string block = "blk." + std::to_string(layer) + ".";
    const bool window = converted && layer > 0, latents = converted && layer > 1;
    std::vector<Row> inputs, queries, keys, values;
    for (const Row& row : x) {
      inputs.push_back(norm(block + "attn_norm.weight", row));
      queries.push_back(times(block + "attn_q.weight", inputs.back()));
      keys.push_back(times(block + "attn_k.weight", inputs.back()));
      values.push_back(times(block + "attn_v.weight", inputs.back()));
    }
    std::vector<Row> latent_keys = keys;
    if (latents && s.conv) {
      const auto& weight = values_.at(block + "latte_conv.weight");
      for (int64_t t = 0; t < count; ++t) {
        Row& row = latent_keys[static_cast<size_t>(t)];
        for (size_t i = 0; i < row.size(); ++i) {
          row[i] = 0.0;
          for (int64_t j = std::max(s.sinks, t - 3); j <= t; ++j) {
            row[i] += static_cast<double>(weight[i * 4 + static_cast<size_t>(3 - t + j)]) * keys[static_cast<size_t>(j)][i];
          }
        }
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      const auto now = static_cast<size_t>(t);
      Row out;
      for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t g = h / (s.heads / s.kv_heads);
        const Row query = head(queries[now], h);
        std::vector<double> scores;
        std::vector<Row> read;
        for (int64_t r = 0; r <= t; ++r) {
          const bool near = !window || r > t - s.window;
          if (!near && r >= s.sinks) continue;
          const Row turned = rotated(query, near ? t : std::min(t, s.window + s.sinks - 1));
          scores.push_back(dot(turned, rotated(head(keys[static_cast<size_t>(r)], g), r)) / std::sqrt(static_cast<double>(dim)));
          read.push_back(head(values[static_cast<size_t>(r)], g));
        }
        Row y = mean(scores, read, dim);
        if (latents) {
          const int64_t far = std::min(t + 1 - s.window - s.sinks, s.far_limit);
          const auto number = [&](const std::string& name, int64_t i) {
            return static_cast<double>(values_.at(block + "latte_" + name)[static_cast<size_t>(i)]);
          };
          std::vector<double> mixture = {
              times(block + "latte_gate.weight", inputs[now])[static_cast<size_t>(h)] + number("gate.bias", h) -
              number("gate.slope", h) * std::log(static_cast<double>(std::max<int64_t>(far, 1)) / 1024.0)};
          std::vector<Row> sources = {y};
          const auto rows = static_cast<size_t>(s.latents);
          const Row query_logits = times(block + "latte_query.weight", query, static_cast<size_t>(h) * rows, rows);
          for (int64_t l = 0; l < s.latents && far > 0; ++l) {
            mixture.push_back(query_logits[static_cast<size_t>(l)] + number("query.bias", h * s.latents + l));
            std::vector<double> weights;
            std::vector<Row> all;
            const int64_t read_first = s.evicted ? s.sinks : 0, delay = s.evicted ? s.window : 0;
            for (int64_t r = read_first; r <= t - delay; ++r) {
              const Row key_logits = times(block + "latte_key.weight", head(latent_keys[static_cast<size_t>(r)], g),
                                           static_cast<size_t>(g) * rows, rows);
              const double forgotten =
                  s.has_decay(layer) ? static_cast<double>(t - delay - r) * std::exp(number("decay", g * s.latents + l)) : 0.0;
              weights.push_back(key_logits[static_cast<size_t>(l)] + number("key.bias", g * s.latents + l) - forgotten);
              all.push_back(head(values[static_cast<size_t>(r)], g));
            }
            sources.push_back(mean(weights, all, dim));
            if (s.has_floor(layer)) {  // what it doesn't keep is the window's
              double z = 0.0;
              for (const double weight : weights) z += std::exp(weight);
              const double kept = z / (z + std::exp(number("floor", g * s.latents + l)));
              for (size_t i = 0; i < y.size(); ++i) sources.back()[i] = kept * sources.back()[i] + (1.0 - kept) * y[i];
            }
          }
          y = mean(mixture, sources, dim);
        }
        out.insert(out.end(), y.begin(), y.end());
      }
      const Row added = times(block + "attn_output.weight", out);
      for (size_t i = 0; i < added.size(); ++i) x[now][i] += added[i];
      const Row normed = norm(block + "ffn_norm.weight", x[now]);
      Row gate = times(block + "ffn_gate.weight", normed);
      const Row up = times(block + "ffn_up.weight", normed);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1.0 + std::exp(-gate[i]));
      const Row down = times(block + "ffn_down.weight", gate);
      for (size_t i = 0; i < down.size(); ++i) x[now][i] += down[i];
    }
  }
  std::vector<Row> result;
  for (const Row& row : x) result.push_back(times("output.weight", norm("output_norm.weight", row)));
  return result;
}

}  // namespace latte::runtime
