// Calls the kernels and, where there are any, the operators of an installed latte.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "kernels/latent.h"
#ifdef CONSUMER_HAS_FORMATS
#include "formats/gguf.h"
#endif
#ifdef CONSUMER_HAS_OPS
#include "ops/ops.h"
#endif

namespace {

// Two tokens, one head, one latent of equal key logits: the latent averages the values so far, so token 1 reads their mean.
bool KernelsAnswer() {
  constexpr int64_t kTime = 2, kHeadDim = 3;
  const std::vector<float> query_logits(kTime, 0.0f), key_logits(kTime, 0.0f);
  const std::vector<float> values = {1, 2, 3, 3, 6, 9};
  const std::vector<float> expected = {1, 2, 3, 2, 4, 6};
  std::vector<float> out(values.size(), -1.0f);

  latte::kernels::LatentArgs args;
  args.sequences = 1;
  args.time = kTime;
  args.heads = args.kv_heads = args.latents = 1;
  args.head_dim = kHeadDim;
  args.query_logits = {query_logits.data(), kTime, 1, 1};
  args.key_logits = {key_logits.data(), kTime, 1, 1};
  args.values = {values.data(), kTime * kHeadDim, kHeadDim, kHeadDim};
  latte::kernels::LatentOutputs outputs;
  outputs.out = {out.data(), kTime * kHeadDim, kHeadDim, kHeadDim};
  for (int64_t slice = 0; slice < latte::kernels::LatentSlices(args); ++slice)
    latte::kernels::LatentForward(args, outputs, slice, slice + 1);

  for (size_t i = 0; i < out.size(); ++i) {
    if (!(std::abs(out[i] - expected[i]) <= 1e-6f * expected[i])) {
      std::fprintf(stderr, "LatentForward: out[%zu] is %g, not %g\n", i, out[i], expected[i]);
      return false;
    }
  }
  return true;
}

#ifdef CONSUMER_HAS_FORMATS
// ggml's types through latte's reader of files: 32 equal numbers come back from 8 bits each.
bool FormatsAnswer() {
  namespace formats = latte::formats;
  const std::vector<float> values(32, 0.5f);
  const auto bytes = formats::quantize(formats::TensorType::kQ8_0, values, 32);
  std::vector<float> back(32);
  formats::dequantize(formats::TensorType::kQ8_0, bytes, back);
  for (float value : back) {
    if (std::abs(value - 0.5f) > 1e-3f) {
      std::fprintf(stderr, "dequantize: %g, not 0.5\n", value);
      return false;
    }
  }
  return bytes.size() == 34 && !formats::gguf_without_tensors(formats::GgufMetadata()).empty();
}
#endif

#ifdef CONSUMER_HAS_OPS
// The same through the operators, with a gradient: out[1] is the mean of both values, so each receives half of its gradient.
bool OperatorsAnswer() {
  const at::Tensor logits = torch::zeros({1, 2, 1, 1});
  const at::Tensor values = torch::tensor({1.0f, 2.0f, 3.0f, 3.0f, 6.0f, 9.0f}).view({1, 2, 1, 3}).requires_grad_();
  const auto [out, state] = latte::causal_attention(logits, logits, values);
  if (!torch::allclose(out.flatten(), torch::tensor({1.0f, 2.0f, 3.0f, 2.0f, 4.0f, 6.0f}))) {
    std::fprintf(stderr, "causal_attention: wrong output\n");
    return false;
  }
  out.select(1, 1).sum().backward();
  if (!torch::allclose(values.grad(), torch::full({1, 2, 1, 3}, 0.5f))) {
    std::fprintf(stderr, "causal_attention: wrong gradient\n");
    return false;
  }
  return true;
}
#endif

}  // namespace

int main() {
  bool good = KernelsAnswer();
#ifdef CONSUMER_HAS_FORMATS
  good = FormatsAnswer() && good;
#endif
#ifdef CONSUMER_HAS_OPS
  good = OperatorsAnswer() && good;
#endif
  std::puts(good ? "consumer: latte answers" : "consumer: latte answers wrongly");
  return good ? 0 : 1;
}
