// What the tests of latent attention share: cases, their inputs and gradients in any dtype, and their definition in double.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "hwy/base.h"
#include "kernels/latent.h"
#include "kernels/latent_reference.h"
#include "kernels/scratch.h"

namespace latte::kernels {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Values of one dtype, as the kernel sees them and as float.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType dtype, const std::vector<float>& values) : dtype_(dtype), floats_(values), halves_(values.size()) {
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::kBFloat16) {
        const hwy::bfloat16_t half = hwy::BF16FromF32(values[i]);
        hwy::CopySameSize(&half, &halves_[i]);
        floats_[i] = hwy::F32FromBF16(half);
      } else if (dtype == DType::kFloat16) {
        const hwy::float16_t half = hwy::F16FromF32(values[i]);
        hwy::CopySameSize(&half, &halves_[i]);
        floats_[i] = hwy::F32FromF16(half);
      }
    }
  }
  void* data() { return dtype_ == DType::kFloat32 ? static_cast<void*>(floats_.data()) : halves_.data(); }
  bool empty() const { return floats_.empty(); }
  // What the kernel wrote.
  std::vector<float> Read() const {
    std::vector<float> read = floats_;
    for (size_t i = 0; i < read.size() && dtype_ != DType::kFloat32; ++i) {
      if (dtype_ == DType::kBFloat16) {
        hwy::bfloat16_t half;
        hwy::CopySameSize(&halves_[i], &half);
        read[i] = hwy::F32FromBF16(half);
      } else {
        hwy::float16_t half;
        hwy::CopySameSize(&halves_[i], &half);
        read[i] = hwy::F32FromF16(half);
      }
    }
    return read;
  }
  const std::vector<float>& floats() const { return floats_; }

 private:
  DType dtype_ = DType::kFloat32;
  std::vector<float> floats_;
  std::vector<uint16_t> halves_;
};

// What a kernel doesn't write it mustn't read: scratch memory that an earlier call left behind is NaN here.
inline void SpoilScratch() {
  constexpr size_t kFloats = size_t{1} << 18;
  Scratch scratch(kFloats);
  std::fill_n(scratch.Take(kFloats), kFloats, std::nanf(""));
}

struct Case {
  int64_t time, latents, head_dim, heads = 1, kv_heads = 1;
  DType dtype = DType::kFloat32;
  bool causal = true, decay = false, window = false, masked = false;
  float spread = 1.0f;       // of the logits
  float decay_scale = 0.1f;  // of the log decay
  float mean = 0.0f;         // of the values, and of what the window reads
  std::vector<int64_t> cu_seqlens = {};

  std::string Name() const {
    return "T" + std::to_string(time) + " L" + std::to_string(latents) + " D" + std::to_string(head_dim) + " H" +
           std::to_string(heads) + "/" + std::to_string(kv_heads) + (causal ? " causal" : " bidirectional") +
           (decay ? " decay" : "") + (window ? " window" : "") + (masked ? " masked" : "") + " dtype" +
           std::to_string(static_cast<int>(dtype)) + " spread" + std::to_string(spread);
  }
  double Epsilon() const { return dtype == DType::kFloat32 ? 1.2e-7 : dtype == DType::kBFloat16 ? 7.8e-3 : 9.8e-4; }
  // A relative error of outputs: inputs as rounded, float32 inside, one rounding at the end. Logits of some size lose as many
  // bits.
  double Tolerance() const { return 0.6 * (dtype == DType::kFloat32 ? 0.0 : Epsilon()) + 1e-5 * std::max(1.0f, spread / 64); }
};

enum Input { kQuery, kKey, kValues, kDecay, kWindow, kInputs };

// Inputs, outputs and gradients of a case, one batch row, [T, heads, inner] each.
struct Problem {
  explicit Problem(const Case& c, unsigned seed = 1) : c(c), random(seed) {
    std::normal_distribution<float> normal;
    const auto draw = [&](int64_t count, float scale, float sign = 0.0f) {
      std::vector<float> values(static_cast<size_t>(count));
      for (float& value : values) value = sign == 0.0f ? normal(random) * scale : sign * std::abs(normal(random)) * scale;
      return values;
    };
    const int64_t gates = c.window ? 1 : 0;
    inputs[kQuery] = Buffer(c.dtype, draw(c.time * c.heads * (c.latents + gates), c.spread));
    inputs[kKey] = Buffer(c.dtype, draw(c.time * c.kv_heads * c.latents, c.spread));
    inputs[kValues] = Buffer(c.dtype, draw(c.time * c.kv_heads * c.head_dim, 1.0f));
    if (c.decay) inputs[kDecay] = Buffer(c.dtype, draw(c.time * c.kv_heads * c.latents, c.decay_scale, -1.0f));
    if (c.window) inputs[kWindow] = Buffer(DType::kFloat32, draw(c.time * c.heads * c.head_dim, 1.0f));
    if (c.mean != 0.0f) {
      for (const Input input : {kValues, kWindow}) {
        if (inputs[input].empty()) continue;
        std::vector<float> shifted = inputs[input].floats();
        for (float& x : shifted) x += c.mean;
        inputs[input] = Buffer(input == kWindow ? DType::kFloat32 : c.dtype, shifted);
      }
    }
    grad_out = Buffer(c.dtype, draw(c.time * c.heads * c.head_dim, 1.0f));
    mask.assign(static_cast<size_t>(c.time), 1);
    if (c.masked) {
      for (auto& real : mask) real = random() % 3 != 0;
    }
    out = Buffer(c.dtype, std::vector<float>(static_cast<size_t>(c.time * c.heads * c.head_dim)));
  }

  static View Of(Buffer& buffer, int64_t time_stride, int64_t head_stride) {
    View view;
    if (!buffer.empty()) view = {buffer.data(), 0, time_stride, head_stride};
    return view;
  }
  static MutableView MutableOf(Buffer& buffer, int64_t time_stride, int64_t head_stride) {
    MutableView view;
    if (!buffer.empty()) view = {buffer.data(), 0, time_stride, head_stride};
    return view;
  }
  int64_t Inner(int input) const {
    return input == kQuery ? c.latents + (c.window ? 1 : 0) : input == kKey || input == kDecay ? c.latents : c.head_dim;
  }
  int64_t Heads(int input) const { return input == kQuery || input == kWindow ? c.heads : c.kv_heads; }

  LatentArgs Args() {
    LatentArgs args;
    args.dtype = c.dtype;
    args.causal = c.causal;
    args.sequences = c.cu_seqlens.empty() ? 1 : static_cast<int64_t>(c.cu_seqlens.size()) - 1;
    args.time = c.time;
    args.heads = c.heads;
    args.kv_heads = c.kv_heads;
    args.latents = c.latents;
    args.head_dim = c.head_dim;
    args.cu_seqlens = c.cu_seqlens.empty() ? nullptr : c.cu_seqlens.data();
    View* views[] = {&args.query_logits, &args.key_logits, &args.values, &args.log_decay, &args.window_out};
    for (int i = 0; i < kInputs; ++i) *views[i] = Of(inputs[i], Heads(i) * Inner(i), Inner(i));
    if (std::ranges::count(mask, 0) > 0) args.key_mask = {reinterpret_cast<const bool*>(mask.data()), 0, 1};
    return args;
  }

  void Forward() {
    SpoilScratch();
    const LatentArgs args = Args();
    saved.assign(static_cast<size_t>(LatentSavedFloats(args)), 0.0f);
    final_state.assign(static_cast<size_t>(args.sequences * c.kv_heads * c.latents * (c.head_dim + kStateExtra)), 0.0f);
    LatentOutputs outputs;
    outputs.out = MutableOf(out, c.heads * c.head_dim, c.head_dim);
    outputs.saved = saved.data();
    outputs.final_state = c.causal ? final_state.data() : nullptr;
    LatentForward(args, outputs, 0, LatentSlices(args));
  }

  void Backward() {
    SpoilScratch();
    LatentArgs args = Args();
    LatentGradients gradients;
    gradients.grad_out = Of(grad_out, c.heads * c.head_dim, c.head_dim);
    gradients.saved = saved.data();
    MutableView* views[] = {&gradients.grad_query_logits, &gradients.grad_key_logits, &gradients.grad_values,
                            &gradients.grad_log_decay, &gradients.grad_window_out};
    for (int i = 0; i < kInputs; ++i) {
      if (inputs[i].empty()) continue;
      grads[i] = Buffer(i == kWindow ? DType::kFloat32 : c.dtype, std::vector<float>(inputs[i].floats().size(), kInfinity));
      *views[i] = MutableOf(grads[i], Heads(i) * Inner(i), Inner(i));
    }
    LatentBackward(args, gradients, 0, LatentSlices(args));
  }

  // One query head of one sequence for the oracle, with `shift` added along `direction` of one input.
  LatentReference Reference(int64_t head, int64_t begin, int64_t end, int moved = kInputs,
                            const std::vector<double>* direction = {}, double shift = 0.0) const {
    LatentReference reference;
    reference.time = end - begin;
    reference.latents = c.latents;
    reference.head_dim = c.head_dim;
    reference.causal = c.causal;
    std::vector<double>* arrays[] = {&reference.query_logits, &reference.key_logits, &reference.values, &reference.log_decay,
                                     &reference.window_out};
    const int64_t kv_head = head / (c.heads / c.kv_heads);
    for (int i = 0; i < kInputs; ++i) {
      if (inputs[i].empty()) continue;
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t j = 0; j < Inner(i); ++j) {
          const size_t at = static_cast<size_t>((t * Heads(i) + (Heads(i) == c.heads ? head : kv_head)) * Inner(i) + j);
          const double value = inputs[i].floats()[at];
          arrays[i]->push_back(i == moved ? value + shift * (*direction)[at] : value);
        }
      }
    }
    for (int64_t t = begin; t < end; ++t) reference.key_mask.push_back(mask[static_cast<size_t>(t)] != 0);
    return reference;
  }

  std::vector<double> ReferenceOut(int moved = kInputs, const std::vector<double>* direction = nullptr,
                                   double shift = 0.0) const {
    std::vector<double> out(static_cast<size_t>(c.time * c.heads * c.head_dim));
    const std::vector<int64_t> bounds = c.cu_seqlens.empty() ? std::vector<int64_t>{0, c.time} : c.cu_seqlens;
    for (size_t n = 0; n + 1 < bounds.size(); ++n) {
      for (int64_t head = 0; head < c.heads; ++head) {
        const std::vector<double> part = Reference(head, bounds[n], bounds[n + 1], moved, direction, shift).Forward();
        for (int64_t t = bounds[n]; t < bounds[n + 1]; ++t) {
          for (int64_t j = 0; j < c.head_dim; ++j) {
            out[static_cast<size_t>((t * c.heads + head) * c.head_dim + j)] =
                part[static_cast<size_t>((t - bounds[n]) * c.head_dim + j)];
          }
        }
      }
    }
    return out;
  }

  Case c;
  std::mt19937 random;
  Buffer inputs[kInputs], grads[kInputs], out, grad_out;
  std::vector<char> mask;
  std::vector<float> saved, final_state;
};

template <class A, class B>
void ExpectNear(const A& got, const B& expected, double tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), expected.size()) << what;
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_TRUE(std::isfinite(got[i])) << what << " at " << i;
    error += std::pow(static_cast<double>(got[i]) - static_cast<double>(expected[i]), 2);
    norm += std::pow(static_cast<double>(expected[i]), 2);
  }
  const double size = static_cast<double>(std::max<size_t>(1, got.size()));
  EXPECT_LE(std::sqrt(error), tolerance * (std::sqrt(norm) + std::sqrt(size))) << what;
}

}  // namespace latte::kernels
