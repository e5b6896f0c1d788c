// What the causal and the bidirectional backward pass of latent attention share: the query heads' side of a chunk, the gradient
// that flows through a state, and where gradients are stored. Included once per SIMD target.
#if defined(LATTE_KERNELS_LATENT_GRADIENT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_LATENT_GRADIENT_INL_H_
#undef LATTE_KERNELS_LATENT_GRADIENT_INL_H_
#else
#define LATTE_KERNELS_LATENT_GRADIENT_INL_H_
#endif

#include <algorithm>
#include <vector>

#include "hwy/highway.h"
#include "kernels/latent_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

// Scratch for the query heads' side of a chunk.
struct QueryChunk {
  QueryChunk(const Dims& dims, Scratch& scratch)
      : probabilities(scratch.Take(kChunk * dims.latents_padded)),
        shares(scratch.Take(kChunk * dims.latents_padded)),
        grad_shares(scratch.Take(kChunk * dims.latents_padded)),
        grad_out(scratch.Take(kChunk * dims.head_dim_padded)) {}
  static size_t Floats(const Dims& dims) {
    return 3 * Scratch::Rounded(kChunk * dims.latents_padded) + Scratch::Rounded(kChunk * dims.head_dim_padded);
  }

  float* probabilities;  // p [C, L]
  float* shares;         // p / z [C, L]
  float* grad_shares;    // [C, L]
  float* grad_out;       // dy [C, D]
  float gates[kChunk];   // p(0 | t)
};

inline void LoadGradOut(const LatentArgs& args, const Dims& dims, const Slice& slice, const LatentGradients& gradients,
                        int64_t token, size_t count, int64_t head, float* grad_out) {
  const F d;
  for (size_t i = 0; i < count; ++i) {
    LoadRow(d, args.dtype, gradients.grad_out.data, slice.Offset(gradients.grad_out, token + static_cast<int64_t>(i), head),
            dims.head_dim, grad_out + i * dims.head_dim_padded, dims.head_dim_padded);
  }
}

// Softmax backward of a token: `grad` [L] holds dp and becomes the gradient of the query logits, which is stored. With a window
// also the gate's, and the gradient of the window's output.
inline void StoreQueryGradient(const LatentArgs& args, const Dims& dims, const Slice& slice, const LatentGradients& gradients,
                               int64_t token, int64_t head, const float* probabilities, float gate, const float* grad_out,
                               float* grad) {
  const F d;
  const size_t lanes = hn::Lanes(d);
  VF mean = hn::Zero(d);
  for (size_t l = 0; l < dims.latents_padded; l += lanes) {
    mean = hn::MulAdd(hn::Load(d, probabilities + l), hn::Load(d, grad + l), mean);
  }
  float expected = hn::ReduceSum(d, mean);
  int64_t offset = slice.Offset(gradients.grad_query_logits, token, head);
  if (args.window_out) {
    const float* window = static_cast<const float*>(args.window_out.data) + slice.Offset(args.window_out, token, head);
    float* grad_window =
        static_cast<float*>(gradients.grad_window_out.data) + slice.Offset(gradients.grad_window_out, token, head);
    VF sum = hn::Zero(d);
    for (size_t j = 0; j < dims.head_dim; j += lanes) {
      const size_t n = std::min(lanes, dims.head_dim - j);
      const VF dy = hn::Load(d, grad_out + j);
      sum = hn::MulAdd(dy, hn::LoadN(d, window + j, n), sum);
      hn::StoreN(hn::Mul(dy, hn::Set(d, gate)), d, grad_window + j, n);
    }
    const float grad_gate = hn::ReduceSum(d, sum);
    expected += gate * grad_gate;
    const float grad_gate_logit = gate * (grad_gate - expected);
    StoreRow(d, args.dtype, &grad_gate_logit, 1, gradients.grad_query_logits.data, offset);
    ++offset;
  }
  const VF centre = hn::Set(d, expected);
  for (size_t l = 0; l < dims.latents_padded; l += lanes) {
    hn::Store(hn::Mul(hn::Load(d, probabilities + l), hn::Sub(hn::Load(d, grad + l), centre)), d, grad + l);
  }
  StoreRow(d, args.dtype, grad, dims.latents, gradients.grad_query_logits.data, offset);
}

// The gradient that flows backward through the state of one slice.
struct StateGradient {
  StateGradient(const Dims& dims, Scratch& scratch)
      : sum(scratch.Take(dims.StateFloats())),
        normaliser(scratch.Take(dims.latents_padded)),
        decay(scratch.Take(dims.latents_padded)),
        log_weight(dims.latents, 0.0) {
    std::fill_n(sum, dims.StateFloats(), 0.0f);
    std::fill_n(normaliser, dims.latents_padded, 0.0f);
    std::fill_n(decay, dims.latents_padded, 0.0f);
  }
  static size_t Floats(const Dims& dims) {
    return Scratch::Rounded(dims.StateFloats()) + 2 * Scratch::Rounded(dims.latents_padded);
  }

  float* sum;                      // dS [L, D]
  float* normaliser;               // dz [L]
  float* decay;                    // dG [L]
  std::vector<double> log_weight;  // of all weights so far together, [L]: what a decay's gradient is made of
};

inline void StoreKeyGradients(const LatentArgs& args, const Dims& dims, const Slice& slice, const LatentGradients& gradients,
                              int64_t token, const float* grad_logits, const float* grad_values, StateGradient& carried,
                              float* spare) {
  const F d;
  const bool masked = slice.Masked(args.key_mask, token);
  StoreRow(d, args.dtype, grad_logits, dims.latents, gradients.grad_key_logits.data,
           slice.Offset(gradients.grad_key_logits, token, slice.kv_head));
  if (masked) {
    std::fill_n(spare, dims.head_dim_padded, 0.0f);
    StoreRow(d, args.dtype, spare, dims.head_dim, gradients.grad_values.data,
             slice.Offset(gradients.grad_values, token, slice.kv_head));
  } else {
    StoreRow(d, args.dtype, grad_values, dims.head_dim, gradients.grad_values.data,
             slice.Offset(gradients.grad_values, token, slice.kv_head));
  }
  if (!args.log_decay) return;
  // Outputs depend on ratios of weights alone: a decay at r moves every weight before r against those from r on, so its gradient
  // is what remains of the total when the weights from r on are taken away.
  for (size_t l = 0; l < dims.latents; ++l) {
    carried.log_weight[l] -= static_cast<double>(grad_logits[l]);
    spare[l] = masked ? 0.0f : static_cast<float>(carried.log_weight[l]) + carried.decay[l];
  }
  StoreRow(d, args.dtype, spare, dims.latents, gradients.grad_log_decay.data,
           slice.Offset(gradients.grad_log_decay, token, slice.kv_head));
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
