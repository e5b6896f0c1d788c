// The convolution, the RG-LRU and VAPOR: per channel, so nothing here needs blocks to keep memory linear except the recurrence.
#include <cmath>
#include <limits>

#include "ops/autocast.h"
#include "ops/composed.h"

namespace latte::composed {
namespace {

constexpr int64_t kChunk = 32;
constexpr double kGriffinPower = 8.0;  // the constant c of arXiv 2402.19427, equation 3

at::Tensor MaskedOut(const at::Tensor& x, const OptionalTensor& mask) {
  return Present(mask) ? x.masked_fill(mask->logical_not().unsqueeze(-1), 0.0) : x;
}

}  // namespace

ChannelOutputs CausalConv1d(const Conv1dInputs& in) {
  const NoAutocast no_autocast;
  std::vector<at::Tensor> outs, states;
  const auto dtype = in.weight.scalar_type();
  const int64_t channels = in.x.size(2), width = in.weight.size(1);
  for (const auto& piece : Pieces("causal_conv1d_core", in.x, in.cu_seqlens)) {
    const auto x = MaskedOut(piece.Tokens(in.x).to(dtype), piece.Tokens(in.key_mask));
    const auto before = Present(in.initial_state) ? piece.States(*in.initial_state)
                                                  : at::zeros({piece.state_rows, width - 1, channels}, in.weight.options());
    const auto all = at::cat({before, x}, 1);  // [b, K - 1 + T, C]
    auto out = at::zeros_like(x);
    for (int64_t j = 0; j < width; ++j) out = out + in.weight.select(1, j) * all.narrow(1, j, piece.length);
    if (Present(in.bias)) out = out + *in.bias;
    outs.push_back(out.to(in.x.scalar_type()));
    states.push_back(all.narrow(1, piece.length, width - 1).clone());
  }
  return {Join(outs, 1,
               [&] {
                 return at::zeros({in.x.size(0), 0, channels}, in.x.options());
               }),
          Join(states, 0, [&] {
            return at::zeros({0, width - 1, channels}, in.weight.options());
          })};
}

ChannelOutputs RgLru(const RgLruInputs& in) {
  const NoAutocast no_autocast;
  std::vector<at::Tensor> outs, states;
  const auto dtype = in.lambda.scalar_type();
  const int64_t channels = in.x.size(2);
  const auto rate = kGriffinPower * at::softplus(in.lambda);
  for (const auto& piece : Pieces("rg_lru_core", in.x, in.cu_seqlens)) {
    auto hidden = Present(in.initial_state) ? piece.States(*in.initial_state)
                                            : at::zeros({piece.state_rows, channels}, in.lambda.options());
    for (int64_t begin = 0; begin < piece.length; begin += kChunk) {
      const int64_t length = std::min(kChunk, piece.length - begin);
      const auto cut = [&](const at::Tensor& x) { return x.narrow(1, piece.begin + begin, length); };
      const auto mask = Present(in.key_mask) ? OptionalTensor(cut(*in.key_mask)) : OptionalTensor();
      // A masked token keeps everything and adds nothing, whatever it holds: NaN would show in gradients of what it is times 0.
      const auto read = [&](const at::Tensor& x) { return MaskedOut(cut(x).to(dtype), mask); };
      const auto log_keep = MaskedOut(-rate * read(in.recurrence_logits).sigmoid(), mask);
      const auto gated = read(in.input_logits).sigmoid() * read(in.x);
      const auto share_squared = -(2.0 * log_keep).expm1();
      // Where the share is 0 its slope is infinite, but all that moves it is 0 there too.
      const auto shut = share_squared == 0;
      const auto input = share_squared.masked_fill(shut, 1.0).sqrt().masked_fill(shut, 0.0) * gated;
      // In float64: after one strong decay the later, weak ones would be lost in rounding.
      const auto total = log_keep.to(at::kDouble).cumsum(1);  // [b, C, channels]
      const auto future = at::ones({length, length}, in.x.options().dtype(at::kBool)).triu(1).unsqueeze(-1);
      const auto decay = (total.unsqueeze(2) - total.unsqueeze(1))
                             .masked_fill(future, -std::numeric_limits<double>::infinity())
                             .exp()
                             .to(dtype);  // [b, t, s, channels]
      const auto all = (decay * input.unsqueeze(1)).sum(2) + total.exp().to(dtype) * hidden.unsqueeze(1);
      outs.push_back(all.to(in.x.scalar_type()));
      hidden = all.select(1, length - 1);
    }
    states.push_back(hidden);
  }
  return {Join(outs, 1,
               [&] {
                 return at::zeros({in.x.size(0), 0, channels}, in.x.options());
               }),
          Join(states, 0, [&] {
            return at::zeros({0, channels}, in.lambda.options());
          })};
}

at::Tensor Vapor(const at::Tensor& x, const OptionalTensor& positions, double base, bool inverse) {
  const int64_t half = x.size(3) / 2;
  // Angles of far positions need float64, which not every device has.
  const auto doubles = at::TensorOptions(at::kDouble).device(x.is_mps() ? at::Device(at::kCPU) : x.device());
  const auto position = Present(positions) ? positions->to(doubles.device()).to(at::kDouble) : at::arange(x.size(1), doubles);
  const auto frequency = (at::arange(half, doubles) * (-std::log(base) / std::max<int64_t>(half, 1))).exp();
  const auto angle = (position.unsqueeze(-1) * frequency).unsqueeze(-2);  // [B or nothing, T, 1, D / 2]
  const auto compute = AccumulateType(x.scalar_type());
  const auto cos = angle.cos().to(compute).to(x.device());
  const auto sin = (inverse ? -angle.sin() : angle.sin()).to(compute).to(x.device());
  const auto first = x.narrow(-1, 0, half).to(compute), second = x.narrow(-1, half, half).to(compute);
  return at::cat({first * cos - second * sin, second * cos + first * sin}, -1).to(x.scalar_type());
}

}  // namespace latte::composed
