// Slices on threads of the caller's own: whichever thread runs which slice, and beside which, every bit of the result is that of
// one thread running them in order. Built with the preset tsan this is what shows that slices share nothing they write.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "kernels/conv1d.h"
#include "kernels/latent.h"
#include "kernels/macchiato.h"
#include "kernels/rg_lru.h"
#include "kernels/vapor.h"
#include "kernels/window.h"

namespace latte::kernels {
namespace {

using Floats = std::vector<float>;
using Slices = std::function<void(int64_t first, int64_t last)>;

constexpr int64_t kBatch = 3, kTime = 300, kHeads = 4, kKvHeads = 2, kLatents = 7, kHeadDim = 9;

Floats Random(int64_t count, unsigned seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random) * scale;
  return values;
}

// [B, T, heads, inner], contiguous.
template <typename AnyView, typename AnyFloats>
AnyView Of(AnyFloats& values, int64_t heads, int64_t inner) {
  AnyView view;
  view.data = values.data();
  view.head_stride = inner;
  view.time_stride = heads * inner;
  view.batch_stride = kTime * heads * inner;
  return view;
}

View In(const Floats& values, int64_t heads, int64_t inner) { return Of<View>(values, heads, inner); }
MutableView Out(Floats& values, int64_t heads, int64_t inner) {
  values.assign(static_cast<size_t>(kBatch * kTime * heads * inner), 0.0f);
  return Of<MutableView>(values, heads, inner);
}
float* Zeros(Floats& values, int64_t count) {
  values.assign(static_cast<size_t>(count), 0.0f);
  return values.data();
}

// Everything that a kernel wrote.
struct Results {
  Floats out, state, kept, grad[5];
  const Floats* begin() const { return &out; }
  const Floats* end() const { return &out + sizeof(Results) / sizeof(Floats); }
};

// What one thread does in order, and what threads do that take one or two slices at a time as they come.
void Serial(int64_t slices, const Slices& run) { run(0, slices); }
void Threaded(int64_t slices, const Slices& run) {
  constexpr int kThreads = 4;
  std::atomic<int64_t> next{0};
  std::atomic<int> waiting{kThreads};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, step = 1 + i % 2] {
      for (--waiting; waiting > 0;) std::this_thread::yield();  // all at once: a slice takes microseconds
      for (int64_t first; (first = next.fetch_add(step)) < slices;) run(first, std::min(first + step, slices));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

template <typename Kernel>
void ExpectThreadsChangeNothing(const Kernel& kernel) {
  Results serial;
  kernel(serial, Serial);
  for (int repeat = 0; repeat < 3; ++repeat) {
    Results threaded;
    kernel(threaded, Threaded);
    auto other = threaded.begin();
    int index = 0;
    for (const Floats& expected : serial) {
      ASSERT_EQ(other->size(), expected.size()) << "result " << index;
      const bool same = expected.empty() || std::memcmp(other->data(), expected.data(), expected.size() * sizeof(float)) == 0;
      EXPECT_TRUE(same) << "result " << index;
      ++other, ++index;
    }
  }
}

template <typename Kernel>  // one slice a call
Slices Each(const Kernel& kernel) {
  return [kernel](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) kernel(slice);
  };
}

TEST(Threads, LatentAttention) {
  const Floats query = Random(kBatch * kTime * kHeads * kLatents, 1),
               key = Random(kBatch * kTime * kKvHeads * kLatents, 2, 20.0f);
  const Floats values = Random(kBatch * kTime * kKvHeads * kHeadDim, 3), grad_out = Random(kBatch * kTime * kHeads * kHeadDim, 4);
  for (const bool causal : {true, false}) {
    ExpectThreadsChangeNothing([&](Results& results, const auto& share) {
      LatentArgs args;
      args.causal = causal;
      args.sequences = kBatch, args.time = kTime, args.heads = kHeads, args.kv_heads = kKvHeads;
      args.latents = kLatents, args.head_dim = kHeadDim;
      args.query_logits = In(query, kHeads, kLatents);
      args.key_logits = In(key, kKvHeads, kLatents);
      args.values = In(values, kKvHeads, kHeadDim);
      LatentOutputs outputs;
      outputs.out = Out(results.out, kHeads, kHeadDim);
      if (causal) outputs.final_state = Zeros(results.state, kBatch * kKvHeads * kLatents * (kHeadDim + kStateExtra));
      outputs.saved = Zeros(results.kept, LatentSavedFloats(args));
      share(LatentSlices(args), [&](int64_t first, int64_t last) { LatentForward(args, outputs, first, last); });
      LatentGradients gradients;
      gradients.grad_out = In(grad_out, kHeads, kHeadDim);
      gradients.saved = outputs.saved;
      gradients.grad_query_logits = Out(results.grad[0], kHeads, kLatents);
      gradients.grad_key_logits = Out(results.grad[1], kKvHeads, kLatents);
      gradients.grad_values = Out(results.grad[2], kKvHeads, kHeadDim);
      share(LatentSlices(args), [&](int64_t first, int64_t last) { LatentBackward(args, gradients, first, last); });
    });
  }
}

TEST(Threads, WindowAttention) {
  const Floats query = Random(kBatch * kTime * kHeads * kHeadDim, 1), key = Random(kBatch * kTime * kKvHeads * kHeadDim, 2);
  const Floats values = Random(kBatch * kTime * kKvHeads * kHeadDim, 3), grad_out = Random(kBatch * kTime * kHeads * kHeadDim, 4);
  for (const bool causal : {true, false}) {
    ExpectThreadsChangeNothing([&](Results& results, const auto& share) {
      WindowArgs args;
      args.causal = causal;
      args.sequences = kBatch, args.time = kTime, args.heads = kHeads, args.kv_heads = kKvHeads;
      args.key_dim = args.head_dim = kHeadDim;
      args.window = 17, args.sinks = causal ? 3 : 0;
      args.query = In(query, kHeads, kHeadDim);
      args.key = In(key, kKvHeads, kHeadDim);
      args.values = In(values, kKvHeads, kHeadDim);
      WindowOutputs outputs;
      outputs.out = static_cast<float*>(Out(results.out, kHeads, kHeadDim).data);
      outputs.lse = Zeros(results.kept, kBatch * kTime * kHeads);
      share(WindowSlices(args), [&](int64_t first, int64_t last) { WindowForward(args, outputs, first, last); });
      WindowGradients gradients;
      gradients.out = outputs.out;
      gradients.lse = outputs.lse;
      gradients.grad_out = In(grad_out, kHeads, kHeadDim);
      gradients.grad_query = Out(results.grad[0], kHeads, kHeadDim);
      gradients.grad_key = Out(results.grad[1], kKvHeads, kHeadDim);
      gradients.grad_values = Out(results.grad[2], kKvHeads, kHeadDim);
      share(WindowSlices(args), [&](int64_t first, int64_t last) { WindowBackward(args, gradients, first, last); });
    });
  }
}

TEST(Threads, MacchiatoAttention) {
  const Floats query = Random(kBatch * kTime * kHeads * kHeadDim, 1), key = Random(kBatch * kTime * kKvHeads * kHeadDim, 2);
  const Floats values = Random(kBatch * kTime * kKvHeads * kHeadDim, 3);
  const Floats query_logits = Random(kBatch * kTime * kHeads * (kLatents + 1), 4);
  const Floats key_logits = Random(kBatch * kTime * kKvHeads * kLatents, 5);
  for (const bool causal : {true, false}) {
    ExpectThreadsChangeNothing([&](Results& results, const auto& share) {
      WindowArgs window;
      LatentArgs latent;
      window.causal = latent.causal = causal;
      window.sequences = latent.sequences = kBatch, window.time = latent.time = kTime;
      window.heads = latent.heads = kHeads, window.kv_heads = latent.kv_heads = kKvHeads;
      window.key_dim = window.head_dim = latent.head_dim = kHeadDim;
      window.window = 17, window.sinks = causal ? 3 : 0;
      window.query = In(query, kHeads, kHeadDim);
      window.key = In(key, kKvHeads, kHeadDim);
      window.values = latent.values = In(values, kKvHeads, kHeadDim);
      latent.latents = kLatents;
      latent.query_logits = In(query_logits, kHeads, kLatents + 1);
      latent.key_logits = In(key_logits, kKvHeads, kLatents);
      LatentOutputs outputs;
      outputs.out = Out(results.out, kHeads, kHeadDim);
      if (causal) outputs.final_state = Zeros(results.state, kBatch * kKvHeads * kLatents * (kHeadDim + kStateExtra));
      share(LatentSlices(latent), [&](int64_t first, int64_t last) { MacchiatoForward(window, latent, outputs, first, last); });
    });
  }
}

// Two blocks of channels, the second one short.
constexpr int64_t kChannels = 75;

TEST(Threads, Conv1d) {
  constexpr int64_t kWidth = 4;
  const Floats x = Random(kBatch * kTime * kChannels, 1), grad_out = Random(kBatch * kTime * kChannels, 2);
  const Floats weight = Random(kChannels * kWidth, 3), bias = Random(kChannels, 4);
  ExpectThreadsChangeNothing([&](Results& results, const auto& share) {
    Conv1dArgs args;
    args.sequences = kBatch, args.time = kTime, args.channels = kChannels, args.width = kWidth;
    args.x = In(x, 1, kChannels);
    args.weight = weight.data();
    args.bias = bias.data();
    Conv1dOutputs outputs;
    outputs.out = Out(results.out, 1, kChannels);
    outputs.final_state = Zeros(results.state, kBatch * (kWidth - 1) * kChannels);
    share(Conv1dSlices(args), Each([&](int64_t slice) { Conv1dForward(args, outputs, slice); }));
    Conv1dGradients gradients;
    gradients.grad_out = In(grad_out, 1, kChannels);
    gradients.grad_x = Out(results.grad[0], 1, kChannels);
    gradients.grad_weight = Zeros(results.grad[1], kBatch * kChannels * kWidth);
    gradients.grad_bias = Zeros(results.grad[2], kBatch * kChannels);
    share(Conv1dSlices(args), Each([&](int64_t slice) { Conv1dBackward(args, gradients, slice); }));
  });
}

TEST(Threads, RgLru) {
  const Floats x = Random(kBatch * kTime * kChannels, 1), grad_out = Random(kBatch * kTime * kChannels, 2);
  const Floats recurrence = Random(kBatch * kTime * kChannels, 3), input = Random(kBatch * kTime * kChannels, 4);
  const Floats lambda = Random(kChannels, 5);
  ExpectThreadsChangeNothing([&](Results& results, const auto& share) {
    RgLruArgs args;
    args.sequences = kBatch, args.time = kTime, args.channels = kChannels;
    args.x = In(x, 1, kChannels);
    args.recurrence_logits = In(recurrence, 1, kChannels);
    args.input_logits = In(input, 1, kChannels);
    args.lambda = lambda.data();
    RgLruOutputs outputs;
    outputs.out = Out(results.out, 1, kChannels);
    outputs.final_state = Zeros(results.state, kBatch * kChannels);
    outputs.hidden = Zeros(results.kept, kBatch * kTime * kChannels);
    share(RgLruSlices(args), Each([&](int64_t slice) { RgLruForward(args, outputs, slice); }));
    RgLruGradients gradients;
    gradients.grad_out = In(grad_out, 1, kChannels);
    gradients.hidden = outputs.hidden;
    gradients.grad_x = Out(results.grad[0], 1, kChannels);
    gradients.grad_recurrence_logits = Out(results.grad[1], 1, kChannels);
    gradients.grad_input_logits = Out(results.grad[2], 1, kChannels);
    gradients.grad_lambda = Zeros(results.grad[3], kBatch * kChannels);
    share(RgLruSlices(args), Each([&](int64_t slice) { RgLruBackward(args, gradients, slice); }));
  });
}

TEST(Threads, Vapor) {
  constexpr int64_t kEven = 10;
  const Floats x = Random(kBatch * kTime * kHeads * kEven, 1);
  ExpectThreadsChangeNothing([&](Results& results, const auto& share) {
    VaporArgs args;
    args.batch = kBatch, args.time = kTime, args.heads = kHeads, args.head_dim = kEven;
    args.x = In(x, kHeads, kEven);
    const MutableView out = Out(results.out, kHeads, kEven);
    share(VaporSlices(args), Each([&](int64_t slice) { VaporRotate(args, out, slice); }));
  });
}

}  // namespace
}  // namespace latte::kernels
