#include "models/rope.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <type_traits>

namespace latte::models {
namespace {

using formats::RopeScalingKind;

constexpr int64_t kFirstPositions = 1024;

// The pair, counted from the fastest, that turns `turns` times within `context` tokens.
double pair_of_turns(double turns, double dims, double context, double base) {
  return dims * std::log(context / (turns * 2 * std::numbers::pi)) / (2 * std::log(base));
}

// One pass over x [B, T, H, D], contiguous; cosine and sine [T, D / 2]. The inverse turns back.
template <typename T>
void rotate_tokens(const T* x, T* out, const float* cosine, const float* sine, int64_t tokens, int64_t time, int64_t heads,
                   int64_t dims, bool neighbours, bool inverse) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t pairs = dims / 2, step = neighbours ? 2 : 1, apart = neighbours ? 1 : pairs;
  at::parallel_for(0, tokens, std::max<int64_t>(1, 16384 / (heads * dims)), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float *c = cosine + token % time * pairs, *s = sine + token % time * pairs;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t offset = (token * heads + head) * dims;
        for (int64_t i = 0; i < pairs; ++i) {
          const int64_t left = offset + i * step, right = left + apart;
          const Wide a = static_cast<Wide>(x[left]), b = static_cast<Wide>(x[right]);
          const Wide cos = c[i], sin = inverse ? -s[i] : s[i];
          out[left] = static_cast<T>(a * cos - b * sin);
          out[right] = static_cast<T>(a * sin + b * cos);
        }
      }
    }
  });
}

// As a chain of torch's operators this took more time in training than the attention it is for.
class Rotation : public torch::autograd::Function<Rotation> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cosine,
                            const at::Tensor& sine, bool neighbours, bool inverse) {
    ctx->saved_data["cosine"] = cosine;
    ctx->saved_data["sine"] = sine;
    ctx->saved_data["neighbours"] = neighbours;
    ctx->saved_data["inverse"] = inverse;
    const auto from = x.contiguous();
    auto out = at::empty(from.sizes(), from.options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, from.scalar_type(), "rope", [&] {
      rotate_tokens(from.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>(), cosine.const_data_ptr<float>(),
                    sine.const_data_ptr<float>(), from.size(0) * from.size(1), from.size(1), from.size(2), from.size(3),
                    neighbours, inverse);
    });
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    return {apply(grads[0], ctx->saved_data["cosine"].toTensor(), ctx->saved_data["sine"].toTensor(),
                  ctx->saved_data["neighbours"].toBool(), !ctx->saved_data["inverse"].toBool()),
            {},
            {},
            {},
            {}};
  }
};

}  // namespace

Rope::Rope(const formats::RopeConfig& config, int64_t context_length, const at::Tensor& frequency_divisors) : config_(config) {
  const formats::RopeScaling& scaling = config.scaling;
  TORCH_CHECK_VALUE(config.dims >= 2 && config.dims % 2 == 0, "Rope: dims must be even and positive, got ", config.dims);
  TORCH_CHECK_VALUE(std::isfinite(config.base) && config.base > 0, "Rope: base must be positive, got ", config.base);
  TORCH_CHECK_VALUE(std::isfinite(scaling.factor) && scaling.factor > 0, "Rope: factor must be positive, got ", scaling.factor);
  const int64_t pairs = config.dims / 2;
  const auto dims = static_cast<double>(config.dims);
  double base = config.base;
  if (scaling.kind == RopeScalingKind::kNtk) {
    TORCH_CHECK_VALUE(config.dims > 2, "Rope: ntk needs more than one pair");
    base *= std::pow(scaling.factor, dims / (dims - 2));
  }
  const auto pair = torch::arange(pairs, torch::kFloat64);
  frequencies_ = (pair * (-2 / dims * std::log(base))).exp();
  if (frequency_divisors.defined()) frequencies_ = frequencies_ / frequency_divisors.to(torch::kFloat64);
  if (scaling.kind == RopeScalingKind::kLinear) frequencies_ = frequencies_ / scaling.factor;
  if (scaling.kind == RopeScalingKind::kYarn) {
    const auto context = static_cast<double>(scaling.original_context > 0 ? scaling.original_context : context_length);
    TORCH_CHECK_VALUE(context > 0 && base > 1, "Rope: yarn needs the trained context and a base above 1, got ", context, " and ",
                      base);
    const double first = std::max(0.0, std::floor(pair_of_turns(scaling.beta_fast, dims, context, base)));
    const double last = std::min(dims - 1, std::ceil(pair_of_turns(scaling.beta_slow, dims, context, base)));
    const auto kept = 1 - ((pair - first) / std::max(0.001, last - first)).clamp(0, 1);
    frequencies_ = frequencies_ * (kept + (1 - kept) / scaling.factor);
    magnitude_ = scaling.attention_factor * (1 + 0.1 * std::log(scaling.factor));
  }
}

at::Tensor Rope::rotate(const at::Tensor& x, const at::Tensor& positions) const {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(3) == config_.dims, "Rope: expected [B, T, H, ", config_.dims, "], got ", x.sizes());
  TORCH_CHECK_VALUE(positions.dim() == 1 && positions.size(0) == x.size(1), "Rope: expected ", x.size(1), " positions, got ",
                    positions.sizes());
  if (x.numel() == 0) return x;
  const int64_t end = positions.max().item<int64_t>() + 1;
  if (!cosines_.defined() || cosines_.size(0) < end) {
    const torch::NoGradGuard no_grad;
    const int64_t known = cosines_.defined() ? cosines_.size(0) : kFirstPositions;
    const auto angles = torch::outer(torch::arange(std::max(end, 2 * known), torch::kFloat64), frequencies_);
    cosines_ = (angles.cos() * magnitude_).to(torch::kFloat32);
    sines_ = (angles.sin() * magnitude_).to(torch::kFloat32);
  }
  return Rotation::apply(x, cosines_.index_select(0, positions), sines_.index_select(0, positions),
                         config_.pairs == formats::RopePairs::kNeighbours, /*inverse=*/false);
}

}  // namespace latte::models
