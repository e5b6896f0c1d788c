#include "train/decoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace latte::train {
namespace {

constexpr size_t kPiece = 1024;  // tokens: bounds the memory of a long prompt

int64_t bytes_of(const at::Tensor& tensor) { return tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : 0; }

int64_t bytes_of(const nn::AttentionState& state) {
  int64_t total = bytes_of(state.latents) + bytes_of(state.keys) + bytes_of(state.values) + bytes_of(state.mask) +
                  bytes_of(state.conv) + bytes_of(state.rg_lru);
  if (const auto& window = state.macchiato) {
    for (const at::Tensor* tensor : {&window->latents, &window->keys, &window->values, &window->mask, &window->sink_keys,
                                     &window->sink_values, &window->sink_mask, &window->position}) {
      total += bytes_of(*tensor);
    }
  }
  return total;
}

}  // namespace

at::Tensor Decoder::read(std::span<const int64_t> tokens) {
  const c10::InferenceMode inference;
  const models::LanguageModelConfig& config = model_->config();
  if (tokens.empty()) throw std::invalid_argument("no tokens to read");
  for (const int64_t token : tokens) {
    if (token < 0 || token >= config.vocab_size) {
      throw std::invalid_argument("token " + std::to_string(token) + ", expected 0 to " + std::to_string(config.vocab_size - 1));
    }
  }
  if (model_->position_embedding && position_ + static_cast<int64_t>(tokens.size()) > config.max_positions) {
    throw std::invalid_argument("this model has learned positions and ends at token " + std::to_string(config.max_positions));
  }
  at::Tensor logits;
  for (size_t begin = 0; begin < tokens.size(); begin += kPiece) {
    const auto piece = tokens.subspan(begin, std::min(kPiece, tokens.size() - begin));
    const auto count = static_cast<int64_t>(piece.size());
    at::Tensor input = at::empty({1, count}, at::kLong);
    std::copy(piece.begin(), piece.end(), input.mutable_data_ptr<int64_t>());
    std::tie(logits, state_) = model_->forward_with_state(input, state_, /*last_only=*/true);
    position_ += count;
  }
  return logits.flatten();
}

int64_t Decoder::state_bytes() const {
  int64_t total = 0;
  if (state_) {
    for (const nn::AttentionState& layer : state_->layers) total += bytes_of(layer);
  }
  return total;
}

}  // namespace latte::train
