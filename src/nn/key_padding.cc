#include "nn/key_padding.h"

#include <cmath>
#include <limits>
#include <utility>

namespace latte::nn {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// A bias within what `dtype` holds, with room for a logit beside it: a huge one mustn't become -inf, which is padding. 1e30 times
// 1 / scale is still far from float32's infinity.
at::Tensor finite_in(const at::Tensor& bias, at::ScalarType dtype) {
  const double limit = dtype == torch::kHalf ? std::numeric_limits<c10::Half>::max() / 2.0 : 1e30;
  return bias.clamp(-limit, limit);
}

}  // namespace

at::Tensor real_tokens(const at::Tensor& padding) {
  return padding.scalar_type() == torch::kBool ? padding.logical_not() : padding != kMinusInfinity;
}

OptionalTensor key_bias_of(const OptionalTensor& padding) {
  if (!padding || padding->scalar_type() == torch::kBool) return {};
  const auto bias = padding->masked_fill(*padding == kMinusInfinity, 0.0);
  if (bias.is_meta()) return bias;
  TORCH_CHECK_VALUE(bias.isfinite().all().item<bool>(),
                    "key_padding_mask has NaN or +inf, expected -inf (padding) or finite numbers");
  return bias.requires_grad() || bias.any().item<bool>() ? OptionalTensor(bias) : OptionalTensor();
}

at::Tensor bias_key_logits(const at::Tensor& key_logits, const OptionalTensor& key_bias) {
  if (!key_bias) return key_logits;
  const auto dtype = key_logits.scalar_type();
  return (key_logits + finite_in(*key_bias, dtype).unsqueeze(-1).unsqueeze(-1)).to(dtype);
}

void bias_window(at::Tensor& query, at::Tensor& key, OptionalTensor& sink_query, const OptionalTensor& key_bias, double scale) {
  // A power of 2, exact in every dtype, so that the keys' feature is no larger than the bias.
  const double of_query = std::exp2(std::ceil(-std::log2(scale)));
  const auto widened = [&](const at::Tensor& x) { return torch::constant_pad_nd(x, {0, 1}, of_query); };
  const auto bias = key_bias ? finite_in(*key_bias, key.scalar_type()) / (scale * of_query)
                             : torch::zeros({key.size(0), key.size(1)}, key.options());
  const auto of_key = bias.to(key.scalar_type()).unsqueeze(-1).unsqueeze(-1).expand({-1, -1, key.size(2), 1});
  query = widened(query);
  key = torch::cat({key, of_key}, -1);
  if (sink_query) sink_query = widened(*sink_query);
}

MacchiatoState widen_keys(MacchiatoState state, int64_t head_dim) {
  for (auto* keys : {&state.keys, &state.sink_keys}) {
    if (keys->size(-1) == head_dim) *keys = torch::constant_pad_nd(*keys, {0, 1}, 0.0);
  }
  return state;
}

}  // namespace latte::nn
