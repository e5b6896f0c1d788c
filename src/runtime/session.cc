#include "runtime/session.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/latent.h"
#include "runtime/error.h"

namespace latte::runtime {
namespace {

size_t cache_bytes(const ModelShape& shape, int64_t slots, kernels::DType dtype) {
  return static_cast<size_t>(slots * (shape.key_dim + shape.head_dim) * kernels::SizeOf(dtype));
}

// Floats.
int64_t sums_of_head(const ModelShape& shape, const LayerShape& layer) {
  if (layer.linear != Linear::kNone) return shape.head_dim * (shape.head_dim + 1);
  return layer.latents * (shape.latent_dim(layer) + kernels::kStateExtra);
}

int64_t whole_blocks(int64_t slots) { return (slots + kernels::kCacheBlock - 1) / kernels::kCacheBlock * kernels::kCacheBlock; }

SessionOptions with_defaults(const Model& model, SessionOptions options) {
  if (options.context <= 0) options.context = model.shape().context;
  if (const int64_t most = model.shape().learned_positions; most > 0) options.context = std::min(options.context, most);
  return options;
}

}  // namespace

std::vector<Session::Place> Session::lay_out(const ModelShape& shape, const SessionOptions& options, size_t& total) {
  constexpr size_t kLine = 64;
  std::vector<Place> places;
  size_t end = 0;
  const auto take = [&](size_t size) {
    const size_t begin = end;
    end += (size + kLine - 1) / kLine * kLine;
    return begin;
  };
  for (const LayerShape& layer : shape.layers) {
    Place& place = places.emplace_back();
    place.window = !layer.tokens ? 0 : layer.window > 0 ? layer.window : options.context;
    place.ring_bytes = cache_bytes(shape, whole_blocks(place.window), options.dtype);
    place.ring = take(place.ring_bytes * static_cast<size_t>(shape.num_kv_heads));
    place.sink_bytes = cache_bytes(shape, whole_blocks(layer.sinks), options.dtype);
    place.sinks = take(place.sink_bytes * static_cast<size_t>(shape.num_kv_heads));
    place.sum_bytes = static_cast<size_t>(shape.num_kv_heads * sums_of_head(shape, layer)) * sizeof(float);
    place.sums = take(place.sum_bytes);
    const int64_t remembered = shape.mixer == Mixer::kConv ? shape.conv_width - 1 : shape.mixer == Mixer::kRgLru ? 1 : 0;
    const int64_t keys = layer.key_conv ? (formats::kKeyConvWidth - 1) * shape.num_kv_heads * shape.key_dim : 0;
    place.mixer_bytes = static_cast<size_t>(remembered * shape.embed_dim + keys) * sizeof(float);
    place.mixer = take(place.mixer_bytes);
  }
  total = end;
  return places;
}

Session::Session(std::shared_ptr<const Model> model, const SessionOptions& options)
    : model_(std::move(model)), options_(with_defaults(*model_, options)) {
  size_t total = 0;
  places_ = lay_out(model_->shape(), options_, total);
  memory_ = Buffer(total, "a session's state");
  clear_sums();
}

Session::Session(const Session& other)
    : model_(other.model_),
      options_(other.options_),
      places_(other.places_),
      memory_(other.memory_.size(), "a session's state"),
      position_(other.position_) {
  for (const Stretch& stretch : stretches(position_)) {
    std::memcpy(memory_.data() + stretch.begin, other.memory_.data() + stretch.begin, stretch.size);
  }
}

Session& Session::operator=(const Session& other) {
  if (this != &other) *this = Session(other);
  return *this;
}

void Session::clear_sums() {
  const ModelShape& shape = model_->shape();
  for (size_t i = 0; i < places_.size(); ++i) {
    const Place& place = places_[i];
    std::fill_n(memory_.data() + place.mixer, place.mixer_bytes, std::byte{0});
    const auto floats = static_cast<int64_t>(place.sum_bytes / sizeof(float));
    float* state = reinterpret_cast<float*>(memory_.data() + place.sums);
    std::fill_n(state, floats, 0.0f);
    if (shape.layers[i].linear != Linear::kNone) continue;
    const int64_t row = shape.latent_dim(shape.layers[i]) + kernels::kStateExtra;
    const float* floor = shape.layers[i].floor ? model_->layers()[i].latent.floor : nullptr;
    for (int64_t j = 0; j < floats / row; ++j) {
      float* sum = state + j * row + row - kernels::kStateExtra;  // z, m, G
      sum[0] = floor == nullptr ? 0.0f : 1.0f;
      sum[1] = floor == nullptr ? -std::numeric_limits<float>::infinity() : floor[j];
    }
  }
}

int64_t Session::room() const {
  const ModelShape& shape = model_->shape();
  if (shape.learned_positions > 0 || !shape.constant_state()) return options_.context - position_;
  return std::numeric_limits<int64_t>::max() - position_;
}

uint64_t Session::bytes_needed(const Model& model, const SessionOptions& options) {
  size_t total = 0;
  lay_out(model.shape(), with_defaults(model, options), total);
  return total;
}

uint64_t Session::bytes_in_use() const {
  uint64_t total = 0;
  for (const Stretch& stretch : stretches(position_)) total += stretch.size;
  return total;
}

std::vector<Session::Stretch> Session::stretches(int64_t position) const {
  const ModelShape& shape = model_->shape();
  const auto item = static_cast<size_t>(kernels::SizeOf(options_.dtype));
  std::vector<Stretch> result;
  // Keys lie in blocks of whole columns, values behind all of them.
  const auto add_cache = [&](size_t begin, size_t bytes, int64_t slots, int64_t used) {
    for (int64_t h = 0; h < shape.num_kv_heads; ++h, begin += bytes) {
      const auto used_keys = static_cast<size_t>(whole_blocks(used) * shape.key_dim) * item;
      result.push_back({begin, used_keys});
      result.push_back({begin + static_cast<size_t>(whole_blocks(slots) * shape.key_dim) * item,
                        static_cast<size_t>(used * shape.head_dim) * item});
    }
  };
  for (size_t i = 0; i < places_.size(); ++i) {
    const Place& place = places_[i];
    if (place.window > 0) add_cache(place.ring, place.ring_bytes, place.window, std::min(place.window, position));
    const int64_t sinks = shape.layers[i].sinks;
    if (sinks > 0) add_cache(place.sinks, place.sink_bytes, sinks, std::min(sinks, position));
    if (place.sum_bytes > 0) result.push_back({place.sums, place.sum_bytes});
    if (place.mixer_bytes > 0) result.push_back({place.mixer, place.mixer_bytes});
  }
  return result;
}

bool Session::can_truncate(int64_t position) const {
  if (position < 0 || position > position_) return false;
  if (position == position_ || position == 0) return true;
  for (size_t i = 0; i < places_.size(); ++i) {
    if (places_[i].sum_bytes > 0 || places_[i].mixer_bytes > 0 || position_ > places_[i].window) return false;
  }
  return true;
}

void Session::truncate(int64_t position) {
  if (!can_truncate(position)) {
    throw SessionError("can't go back from token " + std::to_string(position_) + " to " + std::to_string(position) +
                       ": the state no longer holds what was there");
  }
  if (position == 0 && position_ != 0) clear_sums();
  position_ = position;
}

kernels::KeyValueCache Session::ring(int64_t layer, int64_t kv_head) const {
  const Place& place = places_[static_cast<size_t>(layer)];
  const ModelShape& shape = model_->shape();
  const int64_t slots = whole_blocks(place.window);
  std::byte* keys = memory_.data() + place.ring + static_cast<size_t>(kv_head) * place.ring_bytes;
  return {options_.dtype, shape.key_dim, shape.head_dim,
          slots,          keys,          keys + slots * shape.key_dim * kernels::SizeOf(options_.dtype)};
}

kernels::KeyValueCache Session::sinks(int64_t layer, int64_t kv_head) const {
  const Place& place = places_[static_cast<size_t>(layer)];
  const ModelShape& shape = model_->shape();
  const int64_t slots = whole_blocks(shape.layers[static_cast<size_t>(layer)].sinks);
  std::byte* keys = memory_.data() + place.sinks + static_cast<size_t>(kv_head) * place.sink_bytes;
  return {options_.dtype, shape.key_dim, shape.head_dim,
          slots,          keys,          keys + slots * shape.key_dim * kernels::SizeOf(options_.dtype)};
}

float* Session::sums(int64_t layer) const {
  return reinterpret_cast<float*>(memory_.data() + places_[static_cast<size_t>(layer)].sums);
}

float* Session::mixer(int64_t layer) const {
  return reinterpret_cast<float*>(memory_.data() + places_[static_cast<size_t>(layer)].mixer);
}

}  // namespace latte::runtime
