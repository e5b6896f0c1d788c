// Forward pass and decoding step of latent attention; contract in latent.h, method in docs/mathematics.md.
#include "kernels/latent.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/latent_forward.cc"
#include "hwy/foreach_target.h"
// clang-format off
#include "hwy/highway.h"
#include "kernels/latent_forward-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {

template <bool kPaired>
void RunForward(const LatentArgs& args, const LatentOutputs& outputs, int64_t first, int64_t last) {
  ForEachRun(args, first, last, State::Floats(Dims(args), kChunk), [&](int64_t begin, int64_t end) HWY_ATTR {
    Scratch scratch(LatentForwardPass<kPaired>::ScratchFloats(args, end - begin));
    LatentForwardPass<kPaired>(args, outputs, begin, end, scratch).Run();
  });
}

void Forward(const LatentArgs& args, const LatentOutputs& outputs, int64_t first, int64_t last) {
  if (kHasPairs && args.dtype == DType::kBFloat16) return RunForward<kHasPairs>(args, outputs, first, last);
  RunForward<false>(args, outputs, first, last);
}

// One token: decays and rescales the state, adds the token's value, and reads the latents for each query head.
void Step(const LatentArgs& args, const LatentOutputs& outputs, float* packed, int64_t index) {
  const F d;
  const size_t lanes = hn::Lanes(d);
  const Dims dims(args);
  const Slice slice(args, index);
  const size_t row = dims.latents_padded;
  Scratch scratch(3 * Scratch::Rounded(row) + 2 * Scratch::Rounded(dims.head_dim_padded));
  float* logits = scratch.Take(row);
  float* decay = scratch.Take(row);
  float* share = scratch.Take(row);
  float* values = scratch.Take(dims.head_dim_padded);
  float* out = scratch.Take(dims.head_dim_padded);

  const bool masked = slice.Masked(args.key_mask, 0);
  std::fill_n(decay, row, 0.0f);
  if (masked) {
    std::fill_n(logits, row, kNegativeInfinity);
    std::fill_n(values, dims.head_dim_padded, 0.0f);
  } else {
    LoadRow(d, args.dtype, args.key_logits.data, slice.Offset(args.key_logits, 0, slice.kv_head), dims.latents, logits, row,
            kNegativeInfinity);
    LoadRow(d, args.dtype, args.values.data, slice.Offset(args.values, 0, slice.kv_head), dims.head_dim, values,
            dims.head_dim_padded);
    if (args.log_decay) {
      LoadRow(d, args.dtype, args.log_decay.data, slice.Offset(args.log_decay, 0, slice.kv_head), dims.latents, decay, row);
    }
  }
  // The per-latent numbers sit at a stride in the packed state: gather, work in vectors, put back.
  const size_t packed_row = dims.head_dim + kStateExtra;
  HWY_ALIGN float carry[hn::MaxLanes(F())];
  HWY_ALIGN float weight[hn::MaxLanes(F())];
  HWY_ALIGN float maximum[hn::MaxLanes(F())];
  for (size_t l = 0; l < dims.latents; l += lanes) {
    const size_t rows = std::min(lanes, dims.latents - l);
    for (size_t r = 0; r < lanes; ++r)
      maximum[r] = r < rows ? packed[(l + r) * packed_row + dims.head_dim + 1] : kNegativeInfinity;
    const VF before = hn::Add(hn::Load(d, maximum), hn::Load(d, decay + l));
    const VF high = hn::Max(before, hn::Load(d, logits + l));
    const VF reference = hn::IfThenZeroElse(hn::Eq(high, hn::Set(d, kNegativeInfinity)), high);
    hn::Store(Exp(d, hn::Sub(before, reference)), d, carry);
    hn::Store(Exp(d, hn::Sub(hn::Load(d, logits + l), reference)), d, weight);
    hn::Store(high, d, maximum);
    for (size_t r = 0; r < rows; ++r) {
      float* state = packed + (l + r) * packed_row;
      const VF keep = hn::Set(d, carry[r]);
      const VF add = hn::Set(d, weight[r]);
      size_t j = 0;
      for (; j + lanes <= dims.head_dim; j += lanes) {
        const VF sum = hn::MulAdd(add, hn::Load(d, values + j), hn::Mul(keep, hn::LoadU(d, state + j)));
        hn::StoreU(sum, d, state + j);
      }
      for (; j < dims.head_dim; ++j) state[j] = state[j] * carry[r] + weight[r] * values[j];
      state[dims.head_dim] = state[dims.head_dim] * carry[r] + weight[r];
      state[dims.head_dim + 1] = maximum[r];
      state[dims.head_dim + 2] += decay[l + r];
    }
  }
  for (size_t g = 0; g < dims.group; ++g) {
    const int64_t head = slice.first_head + static_cast<int64_t>(g);
    float gate;
    LoadProbabilities(args, dims, slice, 0, 1, head, share, &gate);
    for (size_t l = 0; l < dims.latents; ++l) {
      const float z = packed[l * packed_row + dims.head_dim];
      share[l] = z > 0.0f ? share[l] / z : 0.0f;
    }
    size_t j = 0;
    for (; j + lanes <= dims.head_dim; j += lanes) {
      VF total = hn::Zero(d);
      VF other = hn::Zero(d);
      size_t l = 0;
      for (; l + 2 <= dims.latents; l += 2) {
        total = hn::MulAdd(hn::Set(d, share[l]), hn::LoadU(d, packed + l * packed_row + j), total);
        other = hn::MulAdd(hn::Set(d, share[l + 1]), hn::LoadU(d, packed + (l + 1) * packed_row + j), other);
      }
      if (l < dims.latents) total = hn::MulAdd(hn::Set(d, share[l]), hn::LoadU(d, packed + l * packed_row + j), total);
      hn::Store(hn::Add(total, other), d, out + j);
    }
    for (; j < dims.head_dim_padded; ++j) {
      out[j] = 0.0f;
      for (size_t l = 0; l < dims.latents && j < dims.head_dim; ++l) out[j] += share[l] * packed[l * packed_row + j];
    }
    if (args.window_out) {
      const float* window = static_cast<const float*>(args.window_out.data) + slice.Offset(args.window_out, 0, head);
      for (j = 0; j < dims.head_dim; ++j) out[j] += gate * window[j];
    }
    StoreRow(d, args.dtype, out, dims.head_dim, outputs.out.data, slice.Offset(outputs.out, 0, head));
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(Forward);
HWY_EXPORT(Step);

int64_t LatentSlices(const LatentArgs& args) { return args.sequences * args.kv_heads; }

int64_t LatentSavedFloats(const LatentArgs& args) {
  const int64_t state = args.latents * (args.head_dim + kStateExtra);
  if (!args.causal) return args.sequences * args.kv_heads * state;
  const int64_t segments = (args.time + kSegmentTokens - 1) / kSegmentTokens;
  const int64_t slots = args.cu_seqlens == nullptr ? args.sequences * segments : args.time / kSegmentTokens + args.sequences;
  return args.kv_heads * slots * state;
}

void LatentForward(const LatentArgs& args, const LatentOutputs& outputs, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(Forward)(args, outputs, first, last);
}

void LatentStep(const LatentArgs& args, const LatentOutputs& outputs, float* state, int64_t slice) {
  HWY_DYNAMIC_DISPATCH(Step)(args, outputs, state, slice);
}

void MergeStates(int64_t latents, int64_t head_dim, const float* left, const float* right, float* out) {
  for (int64_t l = 0; l < latents;
       ++l, left += head_dim + kStateExtra, right += head_dim + kStateExtra, out += head_dim + kStateExtra) {
    const float left_maximum = left[head_dim + 1] + right[head_dim + 2];
    const float maximum = std::max(left_maximum, right[head_dim + 1]);
    const float decay = left[head_dim + 2] + right[head_dim + 2];
    const float reference = std::isinf(maximum) ? 0.0f : maximum;
    const float keep = std::exp(left_maximum - reference);
    const float add = std::exp(right[head_dim + 1] - reference);
    for (int64_t j = 0; j <= head_dim; ++j) out[j] = keep * left[j] + add * right[j];
    out[head_dim + 1] = maximum;
    out[head_dim + 2] = decay;
  }
}

}  // namespace latte::kernels
#endif
