// Latent attention against its definition in double, on every SIMD target of this machine: outputs, gradients by finite
// differences, and the identity whole = chunked = step by step = merged pieces.
#include "kernels/latent.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "hwy/targets.h"
#include "kernels/latent_test_util.h"
#include "kernels/rounding_test_util.h"

namespace latte::kernels {
namespace {

class LatentTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (int64_t time : {1, 2, 7, 31, 32, 33, 70}) {
    for (auto [latents, head_dim] : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {8, 8}, {17, 9}}) {
      for (bool causal : {true, false})
        cases.push_back({.time = time, .latents = latents, .head_dim = head_dim, .causal = causal});
    }
  }
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (bool causal : {true, false}) {
      cases.push_back({.time = 45,
                       .latents = 6,
                       .head_dim = 7,
                       .heads = 4,
                       .kv_heads = 2,
                       .dtype = dtype,
                       .causal = causal,
                       .window = true,
                       .masked = true});
      cases.push_back({.time = 41,
                       .latents = 5,
                       .head_dim = 4,
                       .heads = 3,
                       .kv_heads = 1,
                       .dtype = dtype,
                       .causal = causal,
                       .masked = true,
                       .cu_seqlens = {0, 0, 1, 9, 9, 41}});
      cases.push_back({.time = 40, .latents = 4, .head_dim = 4, .dtype = dtype, .causal = causal, .spread = 30.0f});
    }
    cases.push_back(
        {.time = 77, .latents = 5, .head_dim = 6, .heads = 2, .kv_heads = 1, .dtype = dtype, .decay = true, .masked = true});
  }
  cases.push_back({.time = 50, .latents = 4, .head_dim = 4, .decay = true, .spread = 3.0f, .decay_scale = 30.0f});
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    cases.push_back(
        {.time = 300, .latents = 20, .head_dim = 18, .heads = 2, .kv_heads = 2, .dtype = dtype, .decay = true, .masked = true});
  }
  cases.push_back({.time = 290, .latents = 3, .head_dim = 2, .heads = 2, .kv_heads = 2, .cu_seqlens = {0, 20, 285, 290}});
  // Whole vectors, which are read and written in place, and more of them than are worked on together.
  for (bool causal : {true, false}) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      cases.push_back({.time = 70, .latents = 80, .head_dim = 64, .heads = 2, .kv_heads = 1, .dtype = dtype, .causal = causal});
      cases.push_back({.time = 33, .latents = 16, .head_dim = 32, .dtype = dtype, .causal = causal, .masked = true});
      cases.push_back({.time = 71, .latents = 33, .head_dim = 40, .dtype = dtype, .causal = causal, .window = true});
    }
    // More sequences than have their states in memory at the same time.
    Case many{.time = 400, .latents = 64, .head_dim = 64, .heads = 3, .kv_heads = 3, .causal = causal};
    for (int64_t t = 0; t <= many.time; t += 2) many.cu_seqlens.push_back(t);
    cases.push_back(many);
  }
  return cases;
}

TEST_P(LatentTest, ForwardMatchesDefinition) {
  for (const Case& c : Cases()) {
    Problem problem(c);
    problem.Forward();
    ExpectNear(problem.out.Read(), problem.ReferenceOut(), c.Tolerance(), c.Name());
  }
}

// Gradients of logits are small differences where values have a mean: rounded operands must leave them their digits. With masked
// tokens in front latents have seen nothing yet.
TEST_P(LatentTest, GradientsOfLogitsOutliveAMeanOfTheValues) {
  for (const int64_t time : {60, 700}) {
    for (const bool window : {false, true}) {
      const Case c{.time = time,
                   .latents = 12,
                   .head_dim = 16,
                   .heads = 2,
                   .kv_heads = 1,
                   .dtype = DType::kBFloat16,
                   .decay = true,
                   .window = window,
                   .mean = 8.0f};
      Problem problem(c);
      for (int64_t t = 0; t < 5; ++t) problem.mask[static_cast<size_t>(t)] = 0;
      problem.Forward();
      problem.Backward();
      Case exact = c;
      exact.dtype = DType::kFloat32;
      Problem reference(exact);
      reference.mask = problem.mask;
      for (int input = 0; input < kInputs; ++input) {
        if (!reference.inputs[input].empty()) reference.inputs[input] = Buffer(DType::kFloat32, problem.inputs[input].floats());
      }
      reference.grad_out = Buffer(DType::kFloat32, problem.grad_out.floats());
      reference.Forward();
      reference.Backward();
      for (const Input input : {kQuery, kKey, kDecay}) {
        const std::vector<float> got = problem.grads[input].Read(), expected = reference.grads[input].Read();
        double error = 0.0, norm = 0.0;
        for (size_t i = 0; i < got.size(); ++i) {
          error += std::pow(static_cast<double>(got[i]) - static_cast<double>(expected[i]), 2);
          norm += std::pow(static_cast<double>(expected[i]), 2);
        }
        EXPECT_LE(std::sqrt(error / norm), 0.005) << "input " << input << " " << c.Name();
      }
    }
  }
}

TEST_P(LatentTest, GradientsMatchFiniteDifferences) {
  for (const Case& c : Cases()) {
    Problem problem(c);
    problem.Forward();
    problem.Backward();
    const std::vector<float> grad_out = problem.grad_out.floats();
    for (int input = 0; input < kInputs; ++input) {
      if (problem.inputs[input].empty()) continue;
      const std::vector<float> grad = problem.grads[input].Read();
      for (float g : grad) ASSERT_TRUE(std::isfinite(g)) << c.Name() << " input " << input;
      std::normal_distribution<double> normal;
      std::vector<double> got, expected;
      for (int trial = 0; trial < 4; ++trial) {
        std::vector<double> direction(grad.size(), 0.0);
        // Dense, then a single element: a wrong element can't hide behind the others.
        if (trial < 2) {
          for (double& x : direction) x = normal(problem.random) / std::sqrt(static_cast<double>(grad.size()));
        } else {
          direction[problem.random() % grad.size()] = 1.0;
        }
        double along = 0.0;
        for (size_t i = 0; i < grad.size(); ++i) along += static_cast<double>(grad[i]) * direction[i];
        const double step = 1e-5;
        const auto loss = [&](double shift) {
          const std::vector<double> out = problem.ReferenceOut(input, &direction, shift);
          double sum = 0.0;
          for (size_t i = 0; i < out.size(); ++i) sum += out[i] * static_cast<double>(grad_out[i]);
          return sum;
        };
        got.push_back(along);
        expected.push_back((loss(step) - loss(-step)) / (2 * step));
      }
      ExpectNear(got, expected, 2 * c.Tolerance() + 1e-7, c.Name() + " gradient of input " + std::to_string(input));
    }
  }
}

// Every way to cut a sequence gives the same outputs and the same state.
TEST_P(LatentTest, WholeEqualsChunkedEqualsStepsEqualsMerged) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Case c{
        .time = 75, .latents = 9, .head_dim = 10, .heads = 4, .kv_heads = 2, .dtype = dtype, .decay = true, .masked = true};
    Problem whole(c);
    whole.Forward();
    const std::vector<float> expected = whole.out.Read();
    const int64_t state_size = c.latents * (c.head_dim + kStateExtra);
    const auto part = [&](int64_t begin, int64_t end) {
      LatentArgs args = whole.Args();
      args.time = end - begin;
      View* views[] = {&args.query_logits, &args.key_logits, &args.values, &args.log_decay};
      for (View* view : views) view->data = static_cast<const char*>(view->data) + begin * view->time_stride * SizeOf(dtype);
      args.key_mask.data += begin;
      return args;
    };
    const auto outputs_at = [&](Buffer& out, int64_t begin) {
      LatentOutputs outputs;
      outputs.out = Problem::MutableOf(out, c.heads * c.head_dim, c.head_dim);
      outputs.out.data = static_cast<char*>(outputs.out.data) + begin * outputs.out.time_stride * SizeOf(dtype);
      return outputs;
    };
    // Merging rounds in another order than running through.
    const double tolerance = 2 * c.Tolerance();
    const double state_tolerance = 1e-5 + WeightRounding(dtype);  // states are float32

    Buffer out(dtype, std::vector<float>(expected.size()));
    std::vector<float> state, next(whole.final_state.size());
    std::vector<std::vector<float>> pieces;
    const std::vector<int64_t> cuts = {0, 1, 33, 34, 64, 75};
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      LatentArgs args = part(cuts[i], cuts[i + 1]);
      LatentOutputs outputs = outputs_at(out, cuts[i]);
      args.initial_state = state.empty() ? nullptr : state.data();
      outputs.final_state = next.data();
      LatentForward(args, outputs, 0, LatentSlices(args));
      state = next;
      args.initial_state = nullptr;
      Buffer unused(dtype, std::vector<float>(expected.size()));
      outputs.out = Problem::MutableOf(unused, c.heads * c.head_dim, c.head_dim);
      LatentForward(args, outputs, 0, LatentSlices(args));
      pieces.push_back(next);
    }
    ExpectNear(out.Read(), expected, tolerance, "chunked");
    ExpectNear(state, whole.final_state, state_tolerance, "chunked state");

    std::vector<float> merged = pieces[0];
    for (size_t i = 1; i < pieces.size(); ++i) {
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        float* left = merged.data() + h * state_size;
        MergeStates(c.latents, c.head_dim, left, pieces[i].data() + h * state_size, left);
      }
    }
    ExpectNear(merged, whole.final_state, state_tolerance, "merged state");

    std::vector<float> running(whole.final_state.size(), 0.0f);
    for (size_t row = 0; row < running.size() / static_cast<size_t>(c.head_dim + kStateExtra); ++row) {
      running[row * static_cast<size_t>(c.head_dim + kStateExtra) + static_cast<size_t>(c.head_dim) + 1] = -kInfinity;
    }
    Buffer stepped(dtype, std::vector<float>(expected.size()));
    for (int64_t t = 0; t < c.time; ++t) {
      const LatentArgs args = part(t, t + 1);
      for (int64_t slice = 0; slice < LatentSlices(args); ++slice) {
        SpoilScratch();
        LatentStep(args, outputs_at(stepped, t), running.data() + slice * state_size, slice);
      }
    }
    ExpectNear(stepped.Read(), expected, tolerance, "stepped");
    ExpectNear(running, whole.final_state, state_tolerance, "stepped state");
  }
}

TEST_P(LatentTest, ExtremeLogitsStayExact) {
  struct Extreme {
    const char* name;
    float (*key)(int64_t t, int64_t l, float normal);
    bool half = false;  // its numbers fit float16
  };
  const Extreme extremes[] = {
      {"logits of ten thousand", [](int64_t, int64_t, float x) { return 1e4f * x; }},
      {"a jump of a thousand inside a chunk", [](int64_t t, int64_t, float x) { return t < 13 ? x : 1000.0f + x; }},
      {"a fall of a thousand", [](int64_t t, int64_t, float x) { return t < 13 ? 1000.0f + x : x; }},
      {"a staircase of fifties", [](int64_t t, int64_t, float x) { return 50.0f * static_cast<float>(t) + x; }},
      {"latents that start late", [](int64_t t, int64_t l, float x) { return t < 5 * l ? -kInfinity : x; }, true},
      {"keys never seen", [](int64_t, int64_t l, float x) { return l == 1 ? -kInfinity : x; }, true},
  };
  for (const Extreme& extreme : extremes) {
    for (const auto [causal, dtype] : {std::pair{true, DType::kFloat32},
                                       {false, DType::kFloat32},
                                       {true, DType::kFloat16},
                                       {true, DType::kBFloat16},
                                       {false, DType::kBFloat16}}) {
      if (dtype == DType::kFloat16 && !extreme.half) continue;
      const Case c{.time = 67, .latents = 4, .head_dim = 3, .dtype = dtype, .causal = causal, .window = true, .masked = causal};
      Problem problem(c);
      std::vector<float> key = problem.inputs[kKey].floats();
      for (int64_t t = 0; t < c.time; ++t) {
        for (int64_t l = 0; l < c.latents; ++l) {
          float& logit = key[static_cast<size_t>(t * c.latents + l)];
          logit = extreme.key(t, l, logit);
        }
      }
      problem.inputs[kKey] = Buffer(dtype, key);
      std::vector<float> query = problem.inputs[kQuery].floats();
      for (int64_t l = 0; l <= c.latents; ++l) query[static_cast<size_t>(6 * (c.latents + 1) + l)] = -kInfinity;
      query[0] = -kInfinity;
      query[9] = 1e4f;
      problem.inputs[kQuery] = Buffer(dtype, query);
      problem.Forward();
      problem.Backward();
      const std::vector<float> out = problem.out.Read();
      ExpectNear(out, problem.ReferenceOut(), c.Tolerance(), extreme.name);
      for (int64_t j = 0; j < c.head_dim; ++j) EXPECT_EQ(out[static_cast<size_t>(6 * c.head_dim + j)], 0.0f) << extreme.name;
      for (int input = 0; input < kInputs; ++input) {
        for (float g : problem.grads[input].Read()) ASSERT_TRUE(std::isfinite(g)) << extreme.name << " input " << input;
      }
    }
  }
}

TEST_P(LatentTest, ForgetsExactlyHoweverStrongly) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (float strength : {0.5f, 20.0f, 1e4f, kInfinity}) {
      const Case c{.time = 66, .latents = 4, .head_dim = 3, .dtype = dtype, .decay = true};
      Problem problem(c);
      std::vector<float> decay = problem.inputs[kDecay].floats();
      for (size_t i = 0; i < decay.size(); ++i) decay[i] = i % 3 == 0 ? -strength : 0.0f;
      problem.inputs[kDecay] = Buffer(dtype, decay);
      problem.Forward();
      ExpectNear(problem.out.Read(), problem.ReferenceOut(), c.Tolerance(), "strength " + std::to_string(strength));
      problem.Backward();
      for (const Buffer& grad : problem.grads) {
        for (const float g : grad.Read()) ASSERT_TRUE(std::isfinite(g)) << "strength " << strength;
      }
    }
  }
}

TEST_P(LatentTest, MaskedTokensAddNothingWhateverTheyHold) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Case c{.time = 40, .latents = 4, .head_dim = 3, .dtype = dtype, .masked = true};
    Problem problem(c);
    problem.Forward();
    const std::vector<float> expected = problem.out.Read();
    std::vector<float> key = problem.inputs[kKey].floats(), values = problem.inputs[kValues].floats();
    for (int64_t t = 0; t < c.time; ++t) {
      if (problem.mask[static_cast<size_t>(t)]) continue;
      for (int64_t l = 0; l < c.latents; ++l) key[static_cast<size_t>(t * c.latents + l)] = std::nanf("");
      for (int64_t j = 0; j < c.head_dim; ++j) values[static_cast<size_t>(t * c.head_dim + j)] = std::nanf("");
    }
    problem.inputs[kKey] = Buffer(dtype, key);
    problem.inputs[kValues] = Buffer(dtype, values);
    problem.Forward();
    EXPECT_EQ(problem.out.Read(), expected);
  }
}

TEST_P(LatentTest, SlicesAreIndependent) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Case c{
        .time = 300, .latents = 5, .head_dim = 6, .heads = 6, .kv_heads = 3, .dtype = dtype, .cu_seqlens = {0, 270, 300}};
    Problem together(c), apart(c);
    together.Forward();
    together.Backward();
    apart.Forward();
    apart.out = Buffer(c.dtype, std::vector<float>(together.out.floats().size()));
    const LatentArgs args = apart.Args();
    LatentOutputs outputs;
    outputs.out = Problem::MutableOf(apart.out, c.heads * c.head_dim, c.head_dim);
    for (int64_t slice = LatentSlices(args) - 1; slice >= 0; --slice) LatentForward(args, outputs, slice, slice + 1);
    EXPECT_EQ(apart.out.Read(), together.out.Read());
  }
}

// The state's gradients, through a pair of calls whose joint outputs are a function of the first call's inputs.
TEST_P(LatentTest, GradientsFlowThroughStates) {
  const Case c{.time = 60, .latents = 5, .head_dim = 4, .heads = 2, .kv_heads = 1, .decay = true, .masked = true};
  Problem whole(c);
  whole.Forward();
  whole.Backward();
  const int64_t cut = 23;
  const auto part = [&](int64_t begin, int64_t end) {
    LatentArgs args = whole.Args();
    args.time = end - begin;
    View* views[] = {&args.query_logits, &args.key_logits, &args.values, &args.log_decay};
    for (View* view : views) view->data = static_cast<const float*>(view->data) + begin * view->time_stride;
    args.key_mask.data += begin;
    return args;
  };
  std::vector<float> state(whole.final_state.size()), last(whole.final_state.size()), grad_state(whole.final_state.size());
  Buffer grads[kInputs];
  for (int i = 0; i < kWindow; ++i) grads[i] = Buffer(c.dtype, std::vector<float>(whole.inputs[i].floats().size()));
  Buffer out(c.dtype, std::vector<float>(whole.out.floats().size()));
  const auto forward = [&](LatentArgs args, int64_t begin, std::vector<float>& final_state, std::vector<float>& saved) {
    LatentOutputs outputs;
    outputs.out = Problem::MutableOf(out, c.heads * c.head_dim, c.head_dim);
    outputs.out.data = static_cast<float*>(outputs.out.data) + begin * outputs.out.time_stride;
    saved.resize(static_cast<size_t>(LatentSavedFloats(args)));
    outputs.saved = saved.data();
    outputs.final_state = final_state.data();
    LatentForward(args, outputs, 0, LatentSlices(args));
  };
  LatentArgs head = part(0, cut), tail = part(cut, c.time);
  std::vector<float> head_saved, tail_saved;
  forward(head, 0, state, head_saved);
  tail.initial_state = state.data();
  forward(tail, cut, last, tail_saved);
  const auto gradients_at = [&](int64_t begin) {
    LatentGradients gradients;
    gradients.grad_out = Problem::Of(whole.grad_out, c.heads * c.head_dim, c.head_dim);
    gradients.grad_out.data = static_cast<const float*>(gradients.grad_out.data) + begin * gradients.grad_out.time_stride;
    MutableView* views[] = {&gradients.grad_query_logits, &gradients.grad_key_logits, &gradients.grad_values,
                            &gradients.grad_log_decay};
    for (int i = 0; i < kWindow; ++i) {
      *views[i] = Problem::MutableOf(grads[i], whole.Heads(i) * whole.Inner(i), whole.Inner(i));
      views[i]->data = static_cast<float*>(views[i]->data) + begin * views[i]->time_stride;
    }
    return gradients;
  };
  LatentGradients gradients = gradients_at(cut);
  gradients.saved = tail_saved.data();
  gradients.grad_initial_state = grad_state.data();
  LatentBackward(tail, gradients, 0, LatentSlices(tail));
  gradients = gradients_at(0);
  gradients.saved = head_saved.data();
  gradients.grad_final_state = grad_state.data();
  gradients.final_state = state.data();
  LatentBackward(head, gradients, 0, LatentSlices(head));
  for (int i = 0; i < kWindow; ++i) {
    ExpectNear(grads[i].Read(), whole.grads[i].Read(), 1e-5, "input " + std::to_string(i));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, LatentTest, testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const auto& info) { return std::string(hwy::TargetName(info.param)); });

}  // namespace
}  // namespace latte::kernels
