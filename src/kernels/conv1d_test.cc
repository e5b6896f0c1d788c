#include "kernels/conv1d.h"

#include <gtest/gtest.h>

#include "kernels/recurrent_reference.h"
#include "kernels/recurrent_test_util.h"

namespace latte::kernels {
namespace {

using namespace testing;

struct Shape {
  int64_t sequences, time, channels, width;
  std::vector<int64_t> cu_seqlens = {};

  int64_t batch() const { return cu_seqlens.empty() ? sequences : 1; }
  int64_t states() const { return sequences * (width - 1) * channels; }
};

const Shape kShapes[] = {
    {1, 1, 1, 1},
    {2, 0, 3, 4},
    {1, 5, 1, 2},
    {2, 7, 3, 3},
    {1, 3, 5, 8},
    {1, 67, 65, 4},
    {2, 130, 3, 1},
    {1, 66, 2, 70},
    {3, 64, 8, 5},
    {1, 129, 64, 2},
    {1, 1, 130, 4},
    {5, 75, 5, 4, {0, 3, 3, 4, 70, 75}},
    {2, 9, 17, 3, {0, 0, 9}},
};

// Inputs in float64, rounded to what the kernel is given, and the kernel's view of them.
struct Problem {
  Problem(DType dtype, const Shape& shape, bool masked, bool with_state, uint64_t seed)
      : dtype(dtype),
        shape(shape),
        random(seed),
        x(RandomValues(random, shape.batch() * shape.time * shape.channels)),
        weight(RandomValues(random, shape.channels * shape.width)),
        bias(RandomValues(random, shape.channels)),
        state(RandomValues(random, shape.states())),
        mask(random, shape.batch() * shape.time),
        x_tensor(dtype, shape.batch(), shape.time, shape.channels) {
    x_tensor.Set(x);
    if (masked) HideNaN();
    weight_floats = Floats(weight);
    bias_floats = Floats(bias);
    state_floats = Floats(state);
    args.dtype = dtype;
    args.sequences = shape.sequences;
    args.time = shape.time;
    args.channels = shape.channels;
    args.width = shape.width;
    args.x = x_tensor.view();
    args.weight = weight_floats.data();
    args.bias = bias_floats.data();
    if (!shape.cu_seqlens.empty()) args.cu_seqlens = this->shape.cu_seqlens.data();
    if (masked) args.key_mask = {mask.data(), shape.time, 1};
    if (with_state) args.initial_state = state_floats.data();
  }
  Problem(const Problem&) = delete;

  // What a masked token holds may be anything.
  void HideNaN() {
    std::vector<double> hidden = x;
    for (size_t i = 0; i < hidden.size(); ++i) {
      if (!mask[static_cast<int64_t>(i) / shape.channels]) hidden[i] = std::nan("");
    }
    x_tensor.Set(hidden);
  }

  void Reference(std::vector<double>& out, std::vector<double>& final_state) const {
    out.assign(x.size(), 0.0);
    final_state.assign(state.size(), 0.0);
    const Conv1dReferenceArgs reference{shape.sequences,    shape.time,
                                        shape.channels,     shape.width,
                                        args.cu_seqlens,    x.data(),
                                        weight.data(),      args.bias == nullptr ? nullptr : bias.data(),
                                        args.key_mask.data, args.initial_state == nullptr ? nullptr : state.data()};
    Conv1dReference(reference, out.data(), final_state.data());
  }

  DType dtype;
  Shape shape;
  Random random;
  std::vector<double> x, weight, bias, state;
  Mask mask;
  Tensor x_tensor;
  std::vector<float> weight_floats, bias_floats, state_floats;
  Conv1dArgs args;
};

// Rounding of an output of `width` terms: its own, and that of a float32 sum.
double Tolerance(const Problem& problem) {
  return Epsilon(problem.dtype) + 0x1p-24 * std::sqrt(static_cast<double>(problem.shape.width));
}

struct Result {
  std::vector<double> out, final_state;
};

Result Forward(const Problem& problem) {
  const Shape& shape = problem.shape;
  Tensor out(problem.dtype, shape.batch(), shape.time, shape.channels);
  std::vector<float> final_state(problem.state.size(), std::nanf(""));
  RunSlices(Conv1dSlices(problem.args), [&](int64_t slice) {
    Conv1dForward(problem.args, {out.mutable_view(), final_state.data()}, slice);
  });
  EXPECT_TRUE(out.GuardsIntact());
  return {out.Get(), Doubles(final_state)};
}

template <class Test>
void ForEachProblem(const Test& test) {
  for (const Shape& shape : kShapes) {
    for (const DType dtype : kDTypes) {
      for (const bool masked : {false, true}) {
        for (const bool with_state : {false, true}) {
          SCOPED_TRACE(::testing::Message() << Name(dtype) << " N " << shape.sequences << " T " << shape.time << " C "
                                            << shape.channels << " K " << shape.width << " masked " << masked << " state "
                                            << with_state);
          Problem problem(dtype, shape, masked, with_state, 17);
          test(problem);
        }
      }
    }
  }
}

TEST(Conv1d, ForwardFollowsReference) {
  ForEachTarget([] {
    ForEachProblem([](Problem& problem) {
      if (problem.shape.channels == 3) problem.args.bias = nullptr;
      std::vector<double> out, final_state;
      problem.Reference(out, final_state);
      const Result result = Forward(problem);
      EXPECT_TRUE(Close(result.out, out, Tolerance(problem)));
      EXPECT_EQ(result.final_state, final_state);  // inputs, unrounded
    });
  });
}

TEST(Conv1d, HalfPrecisionIsTheRoundedFloat32Result) {
  ForEachTarget([] {
    ForEachProblem([](Problem& problem) {
      Tensor wide(DType::kFloat32, problem.shape.batch(), problem.shape.time, problem.shape.channels);
      wide.Set(problem.x);
      Problem same(problem.dtype, problem.shape, bool(problem.args.key_mask), problem.args.initial_state != nullptr, 17);
      same.dtype = same.args.dtype = DType::kFloat32;
      same.args.x = wide.view();
      std::vector<double> expected = Forward(same).out;
      Tensor rounded(problem.dtype, problem.shape.batch(), problem.shape.time, problem.shape.channels);
      rounded.Set(expected);
      EXPECT_EQ(Forward(problem).out, expected);
    });
  });
}

TEST(Conv1d, RoundsTiesToEven) {
  ForEachTarget([] {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      const double ulp = Epsilon(dtype);
      std::vector<double> ones(4, 1.0), expected = {1.0, 1.0 + 2.0 * ulp, 1.0 + 2.0 * ulp, -1.0};
      const std::vector<float> weight = {static_cast<float>(1.0 + 0.5 * ulp), static_cast<float>(1.0 + 1.5 * ulp),
                                         static_cast<float>(1.0 + 2.5 * ulp), static_cast<float>(-1.0 - 0.5 * ulp)};
      Tensor x(dtype, 1, 1, 4), out(dtype, 1, 1, 4);
      x.Set(ones);
      Conv1dArgs args;
      args.dtype = dtype;
      args.sequences = args.time = args.width = 1;
      args.channels = 4;
      args.x = x.view();
      args.weight = weight.data();
      Conv1dForward(args, {out.mutable_view(), nullptr}, 0);
      EXPECT_EQ(out.Get(), expected) << Name(dtype);
    }
  });
}

struct Gradients {
  std::vector<double> x, weight, bias, state;  // summed over sequences
};

Gradients Backward(const Problem& problem, const Tensor& grad_out, const float* grad_final_state) {
  const Shape& shape = problem.shape;
  Tensor grad_x(problem.dtype, shape.batch(), shape.time, shape.channels);
  std::vector<float> weight(static_cast<size_t>(shape.sequences) * problem.weight.size(), std::nanf(""));
  std::vector<float> bias(static_cast<size_t>(shape.sequences) * problem.bias.size(), std::nanf(""));
  std::vector<float> state(problem.state.size(), std::nanf(""));
  RunSlices(Conv1dSlices(problem.args), [&](int64_t slice) {
    Conv1dBackward(problem.args,
                   {grad_out.view(), grad_final_state, grad_x.mutable_view(), weight.data(), bias.data(), state.data()}, slice);
  });
  EXPECT_TRUE(grad_x.GuardsIntact());
  Gradients gradients{grad_x.Get(), std::vector<double>(problem.weight.size()), std::vector<double>(problem.bias.size()),
                      Doubles(state)};
  for (size_t i = 0; i < weight.size(); ++i) gradients.weight[i % problem.weight.size()] += weight[i];
  for (size_t i = 0; i < bias.size(); ++i) gradients.bias[i % problem.bias.size()] += bias[i];
  return gradients;
}

TEST(Conv1d, GradientsFollowFiniteDifferences) {
  ForEachProblem([](Problem& problem) {
    const Shape& shape = problem.shape;
    std::vector<double> grad_out = RandomValues(problem.random, static_cast<int64_t>(problem.x.size()));
    std::vector<double> grad_final = RandomValues(problem.random, shape.states());
    Tensor grad_out_tensor(problem.dtype, shape.batch(), shape.time, shape.channels);
    grad_out_tensor.Set(grad_out);
    const std::vector<float> grad_final_floats = Floats(grad_final);
    const bool with_final = problem.args.initial_state != nullptr;

    const auto loss = [&] {
      std::vector<double> out, final_state;
      problem.Reference(out, final_state);
      return Dot(out, grad_out) + (with_final ? Dot(final_state, grad_final) : 0.0);
    };
    struct Parameter {
      std::vector<double>* values;
      std::vector<double> Gradients::*gradient;
      double tolerance;
      std::vector<size_t> indices;
      std::vector<double> expected;
    };
    std::vector<Parameter> parameters = {{&problem.x, &Gradients::x, Tolerance(problem), {}, {}},
                                         {&problem.weight, &Gradients::weight, 1e-6, {}, {}},
                                         {&problem.bias, &Gradients::bias, 1e-6, {}, {}}};
    if (problem.args.initial_state != nullptr) parameters.push_back({&problem.state, &Gradients::state, 1e-6, {}, {}});
    for (Parameter& parameter : parameters) {
      parameter.indices = Sample(problem.random, parameter.values->size(), 40);
      parameter.expected = FiniteDifferences(loss, *parameter.values, parameter.indices);
    }
    ForEachTarget([&] {
      const Gradients gradients = Backward(problem, grad_out_tensor, with_final ? grad_final_floats.data() : nullptr);
      for (const Parameter& parameter : parameters) {
        SCOPED_TRACE(&parameter - parameters.data());
        EXPECT_TRUE(Close(Pick(gradients.*parameter.gradient, parameter.indices), parameter.expected, parameter.tolerance));
      }
      if (!problem.args.key_mask) return;
      for (size_t i = 0; i < gradients.x.size(); ++i) {
        EXPECT_TRUE(problem.mask[static_cast<int64_t>(i) / shape.channels] || gradients.x[i] == 0.0);
      }
    });
  });
}

// Arguments for tokens [begin, begin + time) of a problem without cu_seqlens.
Conv1dArgs Stretch(const Problem& problem, int64_t begin, int64_t time, const float* state) {
  Conv1dArgs args = problem.args;
  args.time = time;
  args.x = problem.x_tensor.view_from(begin);
  if (args.key_mask) args.key_mask.data += begin;
  args.initial_state = state;
  return args;
}

TEST(Conv1d, WholeIsChunkedIsStepByStep) {
  ForEachTarget([] {
    ForEachProblem([](Problem& problem) {
      const Shape& shape = problem.shape;
      if (!shape.cu_seqlens.empty()) return;
      const Result whole = Forward(problem);
      for (const int64_t chunk : {int64_t{1}, int64_t{3}, int64_t{65}}) {
        for (const bool step : {false, true}) {
          if (step && chunk > 1) continue;
          std::vector<float> state(problem.state.size());
          if (problem.args.initial_state != nullptr) state = problem.state_floats;
          Tensor out(problem.dtype, shape.batch(), shape.time, shape.channels);
          for (int64_t begin = 0; begin < shape.time; begin += chunk) {
            const Conv1dArgs args = Stretch(problem, begin, std::min(chunk, shape.time - begin), state.data());
            std::vector<float> next(state.size());
            RunSlices(Conv1dSlices(args), [&](int64_t slice) {
              const MutableView rows = out.mutable_view_from(begin);
              step ? Conv1dStep(args, {rows, nullptr}, state.data(), slice) : Conv1dForward(args, {rows, next.data()}, slice);
            });
            if (!step) state = next;
          }
          EXPECT_TRUE(out.GuardsIntact());
          EXPECT_EQ(out.Get(), whole.out) << "chunk " << chunk << " step " << step;
          EXPECT_EQ(Doubles(state), whole.final_state) << "chunk " << chunk << " step " << step;
        }
      }
    });
  });
}

TEST(Conv1d, GradientsPassThroughTheState) {
  ForEachTarget([] {
    ForEachProblem([](Problem& problem) {
      const Shape& shape = problem.shape;
      if (!shape.cu_seqlens.empty() || shape.time < 2) return;
      std::vector<double> grad_out_values = RandomValues(problem.random, static_cast<int64_t>(problem.x.size()));
      std::vector<double> grad_final_values = RandomValues(problem.random, shape.states());
      Tensor grad_out(problem.dtype, shape.batch(), shape.time, shape.channels);
      grad_out.Set(grad_out_values);
      const std::vector<float> grad_final = Floats(grad_final_values);
      const Gradients whole = Backward(problem, grad_out, grad_final.data());

      const int64_t middle = std::max<int64_t>(shape.time / 3, 1);
      std::vector<float> state(problem.state.size()), grad_state(state.size()), grad_initial(state.size());
      Tensor out(problem.dtype, shape.batch(), shape.time, shape.channels), grad_x = out;
      const Conv1dArgs left = Stretch(problem, 0, middle, problem.args.initial_state);
      const Conv1dArgs right = Stretch(problem, middle, shape.time - middle, state.data());
      std::vector<float> weight(2 * static_cast<size_t>(shape.sequences) * problem.weight.size());
      float* right_weight = weight.data() + weight.size() / 2;
      RunSlices(Conv1dSlices(left), [&](int64_t slice) {
        Conv1dForward(left, {out.mutable_view(), state.data()}, slice);
        Conv1dBackward(right,
                       {grad_out.view_from(middle), grad_final.data(), grad_x.mutable_view_from(middle), right_weight, nullptr,
                        grad_state.data()},
                       slice);
        Conv1dBackward(left,
                       {grad_out.view(), grad_state.data(), grad_x.mutable_view(), weight.data(), nullptr, grad_initial.data()},
                       slice);
      });
      std::vector<double> weight_sum(problem.weight.size());
      for (size_t i = 0; i < weight.size(); ++i) weight_sum[i % weight_sum.size()] += weight[i];
      EXPECT_TRUE(Close(grad_x.Get(), whole.x, Tolerance(problem)));
      EXPECT_TRUE(Close(weight_sum, whole.weight, 1e-6));
      EXPECT_TRUE(Close(Doubles(grad_initial), whole.state, 1e-6));
    });
  });
}

TEST(Conv1d, PackedIsSeparate) {
  ForEachTarget([] {
    ForEachProblem([](Problem& problem) {
      const Shape& shape = problem.shape;
      if (shape.cu_seqlens.empty()) return;
      const Result packed = Forward(problem);
      Tensor out(problem.dtype, 1, shape.time, shape.channels);
      std::vector<float> final_state(problem.state.size());
      const int64_t state_size = (shape.width - 1) * shape.channels;
      for (int64_t n = 0; n < shape.sequences; ++n) {
        const int64_t begin = shape.cu_seqlens[static_cast<size_t>(n)];
        const float* state = problem.args.initial_state;
        Conv1dArgs args = Stretch(problem, begin, shape.cu_seqlens[static_cast<size_t>(n) + 1] - begin,
                                  state == nullptr ? nullptr : state + n * state_size);
        args.cu_seqlens = nullptr;
        args.sequences = 1;
        RunSlices(Conv1dSlices(args), [&](int64_t slice) {
          Conv1dForward(args, {out.mutable_view_from(begin), final_state.data() + n * state_size}, slice);
        });
      }
      EXPECT_EQ(packed.out, out.Get());
      EXPECT_EQ(packed.final_state, Doubles(final_state));
    });
  });
}

// A masked token keeps its place: the token after it still finds its true predecessor two steps back.
TEST(Conv1d, MaskedTokenIsAZeroThatTakesAPosition) {
  ForEachTarget([] {
    std::vector<double> values = {1.0, 2.0, 4.0};
    Tensor x(DType::kFloat32, 1, 3, 1), out(DType::kFloat32, 1, 3, 1);
    x.Set(values);
    const bool mask[] = {true, false, true};
    const float weight[] = {100.0f, 10.0f, 1.0f}, initial[] = {7.0f, 8.0f};
    float final_state[2];
    Conv1dArgs args;
    args.sequences = args.channels = 1;
    args.time = args.width = 3;
    args.x = x.view();
    args.weight = weight;
    args.key_mask = {mask, 3, 1};
    args.initial_state = initial;
    Conv1dForward(args, {out.mutable_view(), final_state}, 0);
    EXPECT_EQ(out.Get(), (std::vector<double>{700 + 80 + 1, 800 + 10 + 0, 100 + 0 + 4}));
    EXPECT_EQ(final_state[0], 0.0f);
    EXPECT_EQ(final_state[1], 4.0f);
  });
}

}  // namespace
}  // namespace latte::kernels
