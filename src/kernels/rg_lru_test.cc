#include "kernels/rg_lru.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "kernels/recurrent_reference.h"
#include "kernels/recurrent_test_util.h"

namespace latte::kernels {
namespace {

using namespace testing;

struct Shape {
  int64_t sequences, time, channels;
  std::vector<int64_t> cu_seqlens = {};

  int64_t batch() const { return cu_seqlens.empty() ? sequences : 1; }
};

const Shape kShapes[] = {
    {1, 1, 1},
    {2, 0, 3},
    {1, 5, 1},
    {2, 7, 3},
    {3, 64, 8},
    {1, 67, 65},
    {1, 300, 2},
    {1, 1, 130},
    {2, 129, 9},
    {1, 33, 64},
    {5, 75, 5, {0, 3, 3, 4, 70, 75}},
    {2, 9, 17, {0, 0, 9}},
};

// Inputs in float64, rounded to what the kernel is given, and the kernel's view of them. `spread` scales logits and lambda.
struct Problem {
  Problem(DType dtype, const Shape& shape, bool masked, bool with_state, double spread, uint64_t seed)
      : dtype(dtype),
        shape(shape),
        random(seed),
        x(RandomValues(random, shape.batch() * shape.time * shape.channels)),
        recurrence_logits(RandomValues(random, static_cast<int64_t>(x.size()), spread)),
        input_logits(RandomValues(random, static_cast<int64_t>(x.size()), spread)),
        lambda(RandomValues(random, shape.channels, spread, -4.0)),
        state(RandomValues(random, shape.sequences * shape.channels)),
        mask(random, shape.batch() * shape.time),
        x_tensor(dtype, shape.batch(), shape.time, shape.channels),
        recurrence_tensor(x_tensor),
        input_tensor(x_tensor) {
    x_tensor.Set(x);
    recurrence_tensor.Set(recurrence_logits);
    input_tensor.Set(input_logits);
    if (masked) {
      HideNaN(x, x_tensor);
      HideNaN(recurrence_logits, recurrence_tensor);
      HideNaN(input_logits, input_tensor);
    }
    lambda_floats = Floats(lambda);
    state_floats = Floats(state);
    args.dtype = dtype;
    args.sequences = shape.sequences;
    args.time = shape.time;
    args.channels = shape.channels;
    args.x = x_tensor.view();
    args.recurrence_logits = recurrence_tensor.view();
    args.input_logits = input_tensor.view();
    args.lambda = lambda_floats.data();
    if (!shape.cu_seqlens.empty()) args.cu_seqlens = this->shape.cu_seqlens.data();
    if (masked) args.key_mask = {mask.data(), shape.time, 1};
    if (with_state) args.initial_state = state_floats.data();
  }
  Problem(const Problem&) = delete;

  // What a masked token holds may be anything.
  void HideNaN(const std::vector<double>& values, Tensor& tensor) {
    std::vector<double> hidden = values;
    for (size_t i = 0; i < hidden.size(); ++i) {
      if (!mask[static_cast<int64_t>(i) / shape.channels]) hidden[i] = std::nan("");
    }
    tensor.Set(hidden);
  }

  void Reference(std::vector<double>& out, std::vector<double>& final_state) const {
    out.assign(x.size(), 0.0);
    final_state.assign(state.size(), 0.0);
    const RgLruReferenceArgs reference{shape.sequences,
                                       shape.time,
                                       shape.channels,
                                       args.cu_seqlens,
                                       x.data(),
                                       recurrence_logits.data(),
                                       input_logits.data(),
                                       lambda.data(),
                                       args.key_mask.data,
                                       args.initial_state == nullptr ? nullptr : state.data()};
    RgLruReference(reference, out.data(), final_state.data());
  }

  DType dtype;
  Shape shape;
  Random random;
  std::vector<double> x, recurrence_logits, input_logits, lambda, state;
  Mask mask;
  Tensor x_tensor, recurrence_tensor, input_tensor;
  std::vector<float> lambda_floats, state_floats;
  RgLruArgs args;
};

struct Result {
  std::vector<double> out, final_state;
  std::vector<float> hidden;
};

Result Forward(const Problem& problem) {
  const Shape& shape = problem.shape;
  Tensor out(problem.dtype, shape.batch(), shape.time, shape.channels);
  std::vector<float> final_state(problem.state.size(), std::nanf(""));
  std::vector<float> hidden(problem.x.size(), std::nanf(""));
  RunSlices(RgLruSlices(problem.args), [&](int64_t slice) {
    RgLruForward(problem.args, {out.mutable_view(), final_state.data(), hidden.data()}, slice);
  });
  EXPECT_TRUE(out.GuardsIntact());
  return {out.Get(), Doubles(final_state), hidden};
}

template <class Test>
void ForEachProblem(const Test& test) {
  for (const Shape& shape : kShapes) {
    for (const DType dtype : kDTypes) {
      for (const double spread : {1.0, 30.0}) {  // 30: gates that are shut or open to the last digit
        for (const bool masked : {false, true}) {
          for (const bool with_state : {false, true}) {
            SCOPED_TRACE(::testing::Message()
                         << Name(dtype) << " N " << shape.sequences << " T " << shape.time << " C " << shape.channels
                         << " spread " << spread << " masked " << masked << " state " << with_state);
            Problem problem(dtype, shape, masked, with_state, spread, 23);
            test(problem);
          }
        }
      }
    }
  }
}

TEST(RgLru, ForwardFollowsReference) {
  ForEachTarget([] {
    ForEachProblem([](Problem& problem) {
      std::vector<double> out, final_state;
      problem.Reference(out, final_state);
      const Result result = Forward(problem);
      EXPECT_TRUE(Close(result.out, out, Epsilon(problem.dtype) + 1e-6));
      EXPECT_TRUE(Close(Doubles(result.hidden), out, 1e-6));
      EXPECT_TRUE(Close(result.final_state, final_state, 1e-6));
    });
  });
}

TEST(RgLru, HalfPrecisionIsTheRoundedState) {
  ForEachTarget([] {
    ForEachProblem([](Problem& problem) {
      const Result result = Forward(problem);
      std::vector<double> expected = Doubles(result.hidden);
      Tensor rounded(problem.dtype, problem.shape.batch(), problem.shape.time, problem.shape.channels);
      rounded.Set(expected);
      // AVX512-BF16's conversion takes numbers below the smallest normal one for zero.
      const auto flushed = [&](std::vector<double> x) {
        if (problem.dtype == DType::kBFloat16)
          std::ranges::replace_if(
              x, [](double y) { return std::abs(y) < 0x1p-126; }, 0.0);
        return x;
      };
      EXPECT_EQ(flushed(result.out), flushed(expected));
    });
  });
}

// One token from a zero state is sqrt(1 - a²) sigmoid(i) x: each element must be right by itself, whatever a is.
TEST(RgLru, InputShareIsExactToAFewUlp) {
  std::vector<double> lambda, recurrence, input, x;
  for (double l = -44.0; l <= 30.0; l += 1.5) {
    for (double r = -40.0; r <= 40.0; r += 0.625) {
      lambda.push_back(l);
      recurrence.push_back(r);
      input.push_back(0.4 * (l + r));
      x.push_back(1.0);
    }
  }
  const int64_t channels = static_cast<int64_t>(x.size());
  const std::vector<float> lambda_floats = Floats(lambda);
  Tensor recurrence_tensor(DType::kFloat32, 1, 1, channels), input_tensor = recurrence_tensor, x_tensor = recurrence_tensor;
  recurrence_tensor.Set(recurrence);
  input_tensor.Set(input);
  x_tensor.Set(x);
  std::vector<double> expected(x.size());
  const RgLruReferenceArgs reference{1,       1,      channels, nullptr, x.data(), recurrence.data(), input.data(), lambda.data(),
                                     nullptr, nullptr};
  RgLruReference(reference, expected.data(), nullptr);
  RgLruArgs args;
  args.sequences = args.time = 1;
  args.channels = channels;
  args.x = x_tensor.view();
  args.recurrence_logits = recurrence_tensor.view();
  args.input_logits = input_tensor.view();
  args.lambda = lambda_floats.data();
  ForEachTarget([&] {
    Tensor out(DType::kFloat32, 1, 1, channels);
    RunSlices(RgLruSlices(args), [&](int64_t slice) { RgLruForward(args, {out.mutable_view(), nullptr, nullptr}, slice); });
    const std::vector<double> actual = out.Get();
    for (size_t i = 0; i < actual.size(); ++i) {
      EXPECT_NEAR(actual[i], expected[i], 8.0 * Epsilon(DType::kFloat32) * expected[i])
          << "lambda " << lambda[i] << " r " << recurrence[i] << " i " << input[i];
    }
  });
}

struct Gradients {
  std::vector<double> x, recurrence_logits, input_logits, lambda, state;  // lambda: summed over sequences
};

Gradients Backward(const Problem& problem, const std::vector<float>& hidden, const Tensor& grad_out,
                   const float* grad_final_state) {
  const Shape& shape = problem.shape;
  Tensor grad_x(problem.dtype, shape.batch(), shape.time, shape.channels), grad_recurrence = grad_x, grad_input = grad_x;
  std::vector<float> lambda(problem.state.size(), std::nanf("")), state(problem.state.size(), std::nanf(""));
  RunSlices(RgLruSlices(problem.args), [&](int64_t slice) {
    RgLruBackward(problem.args,
                  {grad_out.view(), grad_final_state, hidden.data(), grad_x.mutable_view(), grad_recurrence.mutable_view(),
                   grad_input.mutable_view(), lambda.data(), state.data()},
                  slice);
  });
  EXPECT_TRUE(grad_x.GuardsIntact() && grad_recurrence.GuardsIntact() && grad_input.GuardsIntact());
  Gradients gradients{grad_x.Get(), grad_recurrence.Get(), grad_input.Get(), std::vector<double>(problem.lambda.size()),
                      Doubles(state)};
  for (size_t i = 0; i < lambda.size(); ++i) gradients.lambda[i % problem.lambda.size()] += lambda[i];
  return gradients;
}

TEST(RgLru, GradientsFollowFiniteDifferences) {
  ForEachProblem([](Problem& problem) {
    const Shape& shape = problem.shape;
    std::vector<double> grad_out = RandomValues(problem.random, static_cast<int64_t>(problem.x.size()));
    std::vector<double> grad_final = RandomValues(problem.random, static_cast<int64_t>(problem.state.size()));
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
      const char* name;
      std::vector<double>* values;
      std::vector<double> Gradients::*gradient;
      double tolerance;
      std::vector<size_t> indices;
      std::vector<double> expected;
    };
    const double tolerance = Epsilon(problem.dtype) + 2e-6;
    std::vector<Parameter> parameters = {
        {"x", &problem.x, &Gradients::x, tolerance, {}, {}},
        {"recurrence_logits", &problem.recurrence_logits, &Gradients::recurrence_logits, tolerance, {}, {}},
        {"input_logits", &problem.input_logits, &Gradients::input_logits, tolerance, {}, {}},
        {"lambda", &problem.lambda, &Gradients::lambda, 2e-6, {}, {}}};
    if (problem.args.initial_state != nullptr) {
      parameters.push_back({"initial_state", &problem.state, &Gradients::state, 2e-6, {}, {}});
    }
    for (Parameter& parameter : parameters) {
      parameter.indices = Sample(problem.random, parameter.values->size(), 16);
      parameter.expected = FiniteDifferences(loss, *parameter.values, parameter.indices);
    }
    ForEachTarget([&] {
      const Gradients gradients =
          Backward(problem, Forward(problem).hidden, grad_out_tensor, with_final ? grad_final_floats.data() : nullptr);
      for (const Parameter& parameter : parameters) {
        EXPECT_TRUE(Close(Pick(gradients.*parameter.gradient, parameter.indices), parameter.expected, parameter.tolerance))
            << parameter.name;
      }
      if (!problem.args.key_mask) return;
      for (size_t i = 0; i < gradients.x.size(); ++i) {
        if (problem.mask[static_cast<int64_t>(i) / shape.channels]) continue;
        EXPECT_EQ(gradients.x[i], 0.0);
        EXPECT_EQ(gradients.recurrence_logits[i], 0.0);
        EXPECT_EQ(gradients.input_logits[i], 0.0);
      }
    });
  });
}

// Arguments for tokens [begin, begin + time) of a problem without cu_seqlens.
RgLruArgs Stretch(const Problem& problem, int64_t begin, int64_t time, const float* state) {
  RgLruArgs args = problem.args;
  args.time = time;
  args.x = problem.x_tensor.view_from(begin);
  args.recurrence_logits = problem.recurrence_tensor.view_from(begin);
  args.input_logits = problem.input_tensor.view_from(begin);
  if (args.key_mask) args.key_mask.data += begin;
  args.initial_state = state;
  return args;
}

TEST(RgLru, WholeIsChunkedIsStepByStep) {
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
            const RgLruArgs args = Stretch(problem, begin, std::min(chunk, shape.time - begin), state.data());
            std::vector<float> next(state.size());
            RunSlices(RgLruSlices(args), [&](int64_t slice) {
              const MutableView rows = out.mutable_view_from(begin);
              step ? RgLruStep(args, {rows, nullptr, nullptr}, state.data(), slice)
                   : RgLruForward(args, {rows, next.data(), nullptr}, slice);
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

TEST(RgLru, GradientsPassThroughTheState) {
  ForEachTarget([] {
    ForEachProblem([](Problem& problem) {
      const Shape& shape = problem.shape;
      if (!shape.cu_seqlens.empty() || shape.time < 2 || shape.sequences > 1) return;  // hidden is split along time below
      std::vector<double> grad_out_values = RandomValues(problem.random, static_cast<int64_t>(problem.x.size()));
      std::vector<double> grad_final_values = RandomValues(problem.random, static_cast<int64_t>(problem.state.size()));
      Tensor grad_out(problem.dtype, shape.batch(), shape.time, shape.channels);
      grad_out.Set(grad_out_values);
      const std::vector<float> grad_final = Floats(grad_final_values);
      const Result forward = Forward(problem);
      const Gradients whole = Backward(problem, forward.hidden, grad_out, grad_final.data());

      const int64_t middle = std::max<int64_t>(shape.time / 3, 1);
      const float* state = forward.hidden.data() + (middle - 1) * shape.channels;
      const RgLruArgs left = Stretch(problem, 0, middle, problem.args.initial_state);
      const RgLruArgs right = Stretch(problem, middle, shape.time - middle, state);
      std::vector<float> lambda(problem.lambda.size()), right_lambda = lambda, grad_state = lambda, grad_initial = lambda;
      Tensor grad_x(problem.dtype, shape.batch(), shape.time, shape.channels), grad_recurrence = grad_x, grad_input = grad_x;
      RunSlices(RgLruSlices(left), [&](int64_t slice) {
        RgLruBackward(right,
                      {grad_out.view_from(middle), grad_final.data(), state + shape.channels, grad_x.mutable_view_from(middle),
                       grad_recurrence.mutable_view_from(middle), grad_input.mutable_view_from(middle), right_lambda.data(),
                       grad_state.data()},
                      slice);
        RgLruBackward(left,
                      {grad_out.view(), grad_state.data(), forward.hidden.data(), grad_x.mutable_view(),
                       grad_recurrence.mutable_view(), grad_input.mutable_view(), lambda.data(), grad_initial.data()},
                      slice);
      });
      EXPECT_EQ(grad_x.Get(), whole.x);
      EXPECT_EQ(grad_recurrence.Get(), whole.recurrence_logits);
      EXPECT_EQ(grad_input.Get(), whole.input_logits);
      EXPECT_EQ(Doubles(grad_initial), whole.state);
      for (size_t c = 0; c < lambda.size(); ++c) lambda[c] += right_lambda[c];
      EXPECT_TRUE(Close(Doubles(lambda), whole.lambda, 1e-6));
    });
  });
}

TEST(RgLru, PackedIsSeparate) {
  ForEachTarget([] {
    ForEachProblem([](Problem& problem) {
      const Shape& shape = problem.shape;
      if (shape.cu_seqlens.empty()) return;
      const Result packed = Forward(problem);
      Tensor out(problem.dtype, 1, shape.time, shape.channels);
      std::vector<float> final_state(problem.state.size());
      for (int64_t n = 0; n < shape.sequences; ++n) {
        const int64_t begin = shape.cu_seqlens[static_cast<size_t>(n)];
        const float* state = problem.args.initial_state;
        RgLruArgs args = Stretch(problem, begin, shape.cu_seqlens[static_cast<size_t>(n) + 1] - begin,
                                 state == nullptr ? nullptr : state + n * shape.channels);
        args.cu_seqlens = nullptr;
        args.sequences = 1;
        RunSlices(RgLruSlices(args), [&](int64_t slice) {
          RgLruForward(args, {out.mutable_view_from(begin), final_state.data() + n * shape.channels, nullptr}, slice);
        });
      }
      EXPECT_EQ(packed.out, out.Get());
      EXPECT_EQ(packed.final_state, Doubles(final_state));
    });
  });
}

// Memories of 10⁴ to 10⁶ tokens. What is left is the rounding of h; that of a, the same at every token, would be six times this.
TEST(RgLru, LongMemoryKeepsItsDigits) {
  const Shape shape{1, 20000, 16};
  Problem problem(DType::kFloat32, shape, /*masked=*/false, /*with_state=*/true, 0.0, 29);
  for (int64_t c = 0; c < shape.channels; ++c) problem.lambda[static_cast<size_t>(c)] = -11.0 - 0.3 * static_cast<double>(c);
  problem.lambda_floats = Floats(problem.lambda);
  problem.args.lambda = problem.lambda_floats.data();
  std::vector<double> out, final_state;
  problem.Reference(out, final_state);
  ForEachTarget([&] { EXPECT_TRUE(Close(Forward(problem).final_state, final_state, 1e-4)); });
}

// Gates that no training reaches still give finite values and gradients, and NaN is not swallowed.
TEST(RgLru, ExtremeGates) {
  const float inf = std::numeric_limits<float>::infinity();
  ForEachTarget([&] {
    for (const float lambda : {-inf, -1e30f, -104.0f, 0.0f, 1e30f, inf}) {
      for (const double logit : {-1e30, -200.0, -90.0, 0.0, 200.0, 1e30}) {
        SCOPED_TRACE(::testing::Message() << "lambda " << lambda << " logit " << logit);
        std::vector<double> x = {1.0, -2.0}, logits = {logit, logit};
        Tensor x_tensor(DType::kFloat32, 1, 2, 1), logits_tensor(x_tensor), grad_x(x_tensor), grad_r(x_tensor), grad_i(x_tensor);
        x_tensor.Set(x);
        logits_tensor.Set(logits);
        const float initial = 3.0f;
        float final_state, hidden[2], grad_lambda, grad_initial;
        RgLruArgs args;
        args.sequences = args.channels = 1;
        args.time = 2;
        args.x = x_tensor.view();
        args.recurrence_logits = args.input_logits = logits_tensor.view();
        args.lambda = &lambda;
        args.initial_state = &initial;
        RgLruForward(args, {grad_x.mutable_view(), &final_state, hidden}, 0);
        EXPECT_TRUE(std::isfinite(hidden[0]) && std::isfinite(hidden[1]));
        RgLruBackward(args,
                      {x_tensor.view(), nullptr, hidden, grad_x.mutable_view(), grad_r.mutable_view(), grad_i.mutable_view(),
                       &grad_lambda, &grad_initial},
                      0);
        for (const double value : {grad_x.Get()[0], grad_r.Get()[0], grad_i.Get()[0], grad_x.Get()[1], grad_r.Get()[1],
                                   grad_i.Get()[1], double{grad_lambda}, double{grad_initial}}) {
          EXPECT_TRUE(std::isfinite(value));
        }
        const float nan = std::nanf("");
        args.lambda = &nan;
        RgLruForward(args, {grad_x.mutable_view(), &final_state, hidden}, 0);
        EXPECT_TRUE(std::isnan(final_state));
        args.lambda = &lambda;
        logits[0] = std::nan("");
        logits_tensor.Set(logits);
        RgLruForward(args, {grad_x.mutable_view(), &final_state, hidden}, 0);
        EXPECT_TRUE(std::isnan(final_state));
      }
    }
  });
}

}  // namespace
}  // namespace latte::kernels
