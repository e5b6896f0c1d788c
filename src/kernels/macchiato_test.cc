// The two kernels of Latte-Macchiato in one against one after the other, on every SIMD target.
#include "kernels/macchiato.h"

#include <gtest/gtest.h>

#include <limits>

#include "kernels/latent_reference.h"
#include "kernels/recurrent_test_util.h"
#include "kernels/window_reference.h"

namespace latte::kernels {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace): latte's own

struct Shape {
  const char* name;
  int64_t sequences, time, heads, kv_heads, key_dim, head_dim, latents, window, sinks;
  bool causal = true;
  bool decay = false;
  bool masked = false;
  std::vector<int64_t> cu_seqlens = {};
  std::vector<int64_t> positions = {};  // one a sequence: tokens that came before, with a state; or empty
  bool sink_query = true;
};

// Random inputs of a shape, and both kernels' arguments.
struct Problem {
  Problem(const Shape& s, DType dtype, Random& random)
      : batch(s.cu_seqlens.empty() ? s.sequences : 1),
        query(Drawn(dtype, batch, s.time, s.heads, s.key_dim, random)),
        sink_query(Drawn(dtype, batch, s.time, s.heads, s.key_dim, random)),
        key(Drawn(dtype, batch, s.time, s.kv_heads, s.key_dim, random)),
        values(Drawn(dtype, batch, s.time, s.kv_heads, s.head_dim, random)),
        query_logits(Drawn(dtype, batch, s.time, s.heads, s.latents + 1, random)),
        key_logits(Drawn(dtype, batch, s.time, s.kv_heads, s.latents, random, 3.0)),
        log_decay(Drawn(dtype, batch, s.time, s.kv_heads, s.latents, random, 0.0, -0.1)),
        past_key(Drawn(dtype, s.sequences, s.window, s.kv_heads, s.key_dim, random)),
        past_values(Drawn(dtype, s.sequences, s.window, s.kv_heads, s.head_dim, random)),
        sink_key(Drawn(dtype, s.sequences, s.sinks, s.kv_heads, s.key_dim, random)),
        sink_values(Drawn(dtype, s.sequences, s.sinks, s.kv_heads, s.head_dim, random)),
        mask(random, batch * s.time),
        cu_seqlens(s.cu_seqlens),
        positions(s.positions) {
    std::vector<double> drawn = RandomValues(random, s.sequences * s.kv_heads * s.latents * (s.head_dim + kStateExtra), 0.1, 1.0);
    initial_state = Floats(drawn);

    window.dtype = dtype;
    window.causal = s.causal;
    window.sequences = s.sequences, window.time = s.time, window.heads = s.heads, window.kv_heads = s.kv_heads;
    window.key_dim = s.key_dim, window.head_dim = s.head_dim, window.window = s.window, window.sinks = s.sinks;
    window.scale = 0.3f;
    window.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
    window.query = query.view(), window.key = key.view(), window.values = values.view();
    if (s.sinks > 0 && s.sink_query) window.sink_query = sink_query.view();
    if (s.masked) window.key_mask = {mask.data(), s.time, 1};
    if (!positions.empty()) {
      window.position = positions.data();
      window.past = s.window;
      window.past_key = past_key.view(), window.past_values = past_values.view();
      window.sink_key = sink_key.view(), window.sink_values = sink_values.view();
    }
    latent.dtype = dtype;
    latent.causal = s.causal;
    latent.sequences = s.sequences, latent.time = s.time, latent.heads = s.heads, latent.kv_heads = s.kv_heads;
    latent.latents = s.latents, latent.head_dim = s.head_dim;
    latent.cu_seqlens = window.cu_seqlens;
    latent.query_logits = query_logits.view(), latent.key_logits = key_logits.view(), latent.values = values.view();
    if (s.decay) latent.log_decay = log_decay.view();
    latent.key_mask = window.key_mask;
    if (!positions.empty()) latent.initial_state = initial_state.data();
  }

  static Tensor Drawn(DType dtype, int64_t batch, int64_t time, int64_t heads, int64_t inner, Random& random, double scale = 1.0,
                      double shift = 0.0) {
    Tensor tensor(dtype, batch, time, heads, inner);
    std::vector<double> drawn = RandomValues(random, tensor.size(), scale, shift);
    tensor.Set(drawn);
    return tensor;
  }

  int64_t out_size(const Shape& s) const { return batch * s.time * s.heads * s.head_dim; }

  int64_t batch;
  Tensor query, sink_query, key, values, query_logits, key_logits, log_decay, past_key, past_values, sink_key, sink_values;
  Mask mask;
  std::vector<int64_t> cu_seqlens, positions;
  std::vector<float> initial_state;
  WindowArgs window;
  LatentArgs latent;
};

// Output and final state. What no slice writes stays NaN.
struct Result {
  Result(const Shape& s, const Problem& problem, DType dtype) : out(dtype, problem.batch, s.time, s.heads, s.head_dim) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::vector<double> unwritten(static_cast<size_t>(out.size()), nan);
    out.Set(unwritten);
    state.assign(problem.initial_state.size(), std::numeric_limits<float>::quiet_NaN());
    outputs.out = out.mutable_view();
    if (s.causal) outputs.final_state = state.data();
  }
  Tensor out;
  std::vector<float> state;
  LatentOutputs outputs;
};

// The definition: the window's and then each head's latents, in double. There is no state in it.
std::vector<double> ReferenceOut(const Shape& s, const Problem& problem) {
  const std::vector<double> window_out = ReferenceWindow(problem.window).out;
  const std::vector<double> query_logits = problem.query_logits.Get(), key_logits = problem.key_logits.Get(),
                            values = problem.values.Get(), log_decay = problem.log_decay.Get();
  std::vector<double> out(static_cast<size_t>(problem.out_size(s)));
  for (int64_t n = 0; n < s.sequences; ++n) {
    const Sequence sequence = SequenceAt(n, s.time, problem.window.cu_seqlens);
    for (int64_t h = 0; h < s.heads; ++h) {
      LatentReference reference;
      reference.time = sequence.length, reference.latents = s.latents, reference.head_dim = s.head_dim;
      reference.causal = s.causal;
      const auto add = [&](const std::vector<double>& from, int64_t heads, int64_t head, int64_t inner, std::vector<double>& to) {
        for (int64_t t = 0; t < sequence.length; ++t) {
          const auto row = from.begin() + ((sequence.batch * s.time + sequence.begin + t) * heads + head) * inner;
          to.insert(to.end(), row, row + inner);
        }
      };
      const int64_t kv_head = h / (s.heads / s.kv_heads);
      add(query_logits, s.heads, h, s.latents + 1, reference.query_logits);
      add(window_out, s.heads, h, s.head_dim, reference.window_out);
      add(key_logits, s.kv_heads, kv_head, s.latents, reference.key_logits);
      add(values, s.kv_heads, kv_head, s.head_dim, reference.values);
      if (s.decay) add(log_decay, s.kv_heads, kv_head, s.latents, reference.log_decay);
      for (int64_t t = 0; t < sequence.length; ++t) {
        reference.key_mask.push_back(!s.masked || problem.mask[sequence.batch * s.time + sequence.begin + t]);
      }
      const std::vector<double> rows = reference.Forward();
      for (int64_t t = 0; t < sequence.length; ++t) {
        const int64_t row = ((sequence.batch * s.time + sequence.begin + t) * s.heads + h) * s.head_dim;
        std::copy_n(rows.begin() + t * s.head_dim, s.head_dim, out.begin() + row);
      }
    }
  }
  return out;
}

TEST(Macchiato, OneKernelIsTwo) {
  const Shape shapes[] = {
      {"turns", 1, 450, 2, 2, 64, 64, 32, 128, 0},
      {"sinks, decay, groups, mask", 2, 333, 6, 2, 20, 24, 16, 31, 4, true, true, true},
      {"wide window, odd sizes", 1, 500, 3, 1, 37, 19, 5, 400, 3},
      {"packed", 5, 640, 4, 2, 16, 32, 8, 16, 2, true, false, false, {0, 1, 1, 300, 340, 640}},
      {"past", 3, 230, 4, 2, 16, 16, 12, 40, 3, true, true, false, {}, {300, 7, 0}},
      {"past, packed", 4, 100, 4, 2, 16, 16, 12, 9, 3, true, true, false, {0, 1, 60, 61, 100}, {300, 7, 0, 2}, false},
      {"many queries a key", 1, 260, 40, 2, 8, 8, 4, 20, 0},
      {"wide window, five queries a key", 1, 700, 5, 1, 16, 16, 8, 300, 2},
      {"bidirectional", 2, 400, 4, 2, 32, 16, 24, 50, 0, false, false, true},
      {"bidirectional, packed", 3, 300, 2, 2, 16, 16, 4, 7, 0, false, false, false, {0, 2, 200, 300}},
      {"bidirectional, wide", 1, 420, 2, 1, 16, 16, 4, 310, 0, false},
      {"short", 2, 3, 2, 1, 8, 8, 2, 64, 1},
      {"window of one", 1, 100, 2, 2, 8, 8, 3, 1, 0},
      {"one token", 1, 1, 2, 2, 8, 8, 3, 4, 0},
  };
  for (const Shape& shape : shapes) {
    for (const DType dtype : kDTypes) {
      SCOPED_TRACE(std::string(shape.name) + ", " + Name(dtype));
      Random random(7);
      const Problem problem(shape, dtype, random);
      const std::vector<double> expected = shape.positions.empty() ? ReferenceOut(shape, problem) : std::vector<double>();
      ForEachTarget([&] {
        Result together(shape, problem, dtype), apart(shape, problem, dtype);
        RunRanges(LatentSlices(problem.latent), [&](int64_t first, int64_t last) {
          MacchiatoForward(problem.window, problem.latent, together.outputs, first, last);
        });
        std::vector<float> window_out(static_cast<size_t>(problem.out_size(shape)));
        WindowForward(problem.window, {window_out.data(), nullptr}, 0, WindowSlices(problem.window));
        LatentArgs latent = problem.latent;
        latent.window_out = {window_out.data(), shape.time * shape.heads * shape.head_dim, shape.heads * shape.head_dim,
                             shape.head_dim};
        LatentForward(latent, apart.outputs, 0, LatentSlices(latent));
        // Pairs of bfloat16 lie elsewhere in blocks of other sizes; float32 adds up in the same order.
        EXPECT_TRUE(Close(together.out.Get(), apart.out.Get(), dtype == DType::kFloat32 ? 0.0 : Epsilon(dtype)));
        EXPECT_TRUE(together.out.GuardsIntact());
        if (shape.causal) EXPECT_EQ(together.state, apart.state);
        if (!expected.empty()) EXPECT_TRUE(Close(together.out.Get(), expected, dtype == DType::kFloat32 ? 2e-6 : Epsilon(dtype)));
      });
    }
  }
}

// The scratch memory of a window so wide that a thread takes the slices of a sequence in parts.
TEST(Macchiato, WideWindowsTakeFewerSlicesAtATime) {
  const Shape shape = {"wide", 1, 2500, 6, 6, 128, 128, 64, 2400, 0};
  Random random(8);
  const Problem problem(shape, DType::kFloat32, random);
  Result together(shape, problem, DType::kFloat32), one_by_one(shape, problem, DType::kFloat32);
  MacchiatoForward(problem.window, problem.latent, together.outputs, 0, LatentSlices(problem.latent));
  RunSlices(LatentSlices(problem.latent),
            [&](int64_t slice) { MacchiatoForward(problem.window, problem.latent, one_by_one.outputs, slice, slice + 1); });
  EXPECT_EQ(together.out.Get(), one_by_one.out.Get());
  EXPECT_EQ(together.state, one_by_one.state);
}

}  // namespace
}  // namespace latte::kernels
