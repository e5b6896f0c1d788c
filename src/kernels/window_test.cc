// Window attention against its definition in double, on every SIMD target.
#include "kernels/window.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "kernels/recurrent_test_util.h"
#include "kernels/rounding_test_util.h"
#include "kernels/window_reference.h"

namespace latte::kernels {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace): latte's own

struct Shape {
  int64_t sequences = 1;
  int64_t time = 1;
  int64_t heads = 1;
  int64_t kv_heads = 1;
  int64_t key_dim = 4;
  int64_t head_dim = 4;
  int64_t window = 1;
  int64_t sinks = 0;
  bool causal = true;
  bool sink_query = false;
  enum class Masked { kNone, kSome, kAll } masked = Masked::kNone;
  std::vector<int64_t> cu_seqlens;
  std::vector<int64_t> positions;  // one a sequence, or empty: a fresh start
  int64_t past = 0;
  double query_scale = 1.0;
  double mean = 0.0;  // of the values

  int64_t rows() const { return cu_seqlens.empty() ? sequences : 1; }
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  out << "N " << s.sequences << " T " << s.time << " H " << s.heads << "/" << s.kv_heads << " Dk " << s.key_dim << " D "
      << s.head_dim << " W " << s.window << " S " << s.sinks << (s.causal ? " causal" : " bidirectional")
      << (s.sink_query ? " sink_query" : "") << " masked " << static_cast<int>(s.masked) << " P " << s.past;
  for (const int64_t position : s.positions) out << " @" << position;
  for (const int64_t begin : s.cu_seqlens) out << " |" << begin;
  return out;
}

// Random inputs of a shape. Masked keys and rows of the past that stand for no token hold NaN: whoever reads one shows it.
class Problem {
 public:
  Problem(const Shape& shape, DType dtype, Random& random)
      : shape_(shape),
        dtype_(dtype),
        query_(Tensor(dtype, shape.rows(), shape.time, shape.heads, shape.key_dim)),
        sink_query_(Tensor(dtype, shape.rows(), shape.time, shape.heads, shape.key_dim)),
        key_(Tensor(dtype, shape.rows(), shape.time, shape.kv_heads, shape.key_dim)),
        values_(Tensor(dtype, shape.rows(), shape.time, shape.kv_heads, shape.head_dim)),
        past_key_(Tensor(dtype, shape.sequences, shape.past, shape.kv_heads, shape.key_dim)),
        past_values_(Tensor(dtype, shape.sequences, shape.past, shape.kv_heads, shape.head_dim)),
        sink_key_(Tensor(dtype, shape.sequences, shape.sinks, shape.kv_heads, shape.key_dim)),
        sink_values_(Tensor(dtype, shape.sequences, shape.sinks, shape.kv_heads, shape.head_dim)),
        grad_out_(Tensor(DType::kFloat32, shape.rows(), shape.time, shape.heads, shape.head_dim)),
        mask_(random, shape.rows() * shape.time),
        past_mask_(random, shape.sequences * shape.past),
        sink_mask_(random, shape.sequences * shape.sinks) {
    if (shape.masked == Shape::Masked::kAll) std::fill_n(mask_.data(), shape.rows() * shape.time, false);
    Fill(query_, random, shape.query_scale);
    Fill(sink_query_, random, shape.query_scale);
    Fill(grad_out_, random, 1.0);
    const bool masked = shape.masked != Shape::Masked::kNone;
    FillKeys(key_, values_, random, [&](int64_t row) { return !masked || mask_[row]; });
    FillKeys(past_key_, past_values_, random, [&](int64_t row) {
      const int64_t position = shape_.positions[static_cast<size_t>(row / shape_.past)];
      return row % shape_.past >= shape_.past - position && (!masked || past_mask_[row]);
    });
    FillKeys(sink_key_, sink_values_, random, [&](int64_t row) {
      if (shape_.positions.empty()) return true;
      const int64_t position = shape_.positions[static_cast<size_t>(row / shape_.sinks)];
      return row % shape_.sinks < position && (!masked || sink_mask_[row]);
    });

    args_.dtype = dtype;
    args_.causal = shape.causal;
    args_.sequences = shape.sequences;
    args_.time = shape.time;
    args_.heads = shape.heads;
    args_.kv_heads = shape.kv_heads;
    args_.key_dim = shape.key_dim;
    args_.head_dim = shape.head_dim;
    args_.window = shape.window;
    args_.sinks = shape.sinks;
    args_.scale = 1.0f / std::sqrt(static_cast<float>(shape.key_dim));
    if (!shape.cu_seqlens.empty()) args_.cu_seqlens = shape_.cu_seqlens.data();
    args_.query = query_.view();
    if (shape.sink_query) args_.sink_query = sink_query_.view();
    args_.key = key_.view();
    args_.values = values_.view();
    if (masked) args_.key_mask = {mask_.data(), shape.time, 1};
    if (!shape.positions.empty()) {
      args_.position = shape_.positions.data();
      args_.past = shape.past;
      args_.past_key = past_key_.view();
      args_.past_values = past_values_.view();
      args_.sink_key = sink_key_.view();
      args_.sink_values = sink_values_.view();
      if (masked) {
        args_.past_mask = {past_mask_.data(), shape.past, 1};
        args_.sink_mask = {sink_mask_.data(), shape.sinks, 1};
      }
    }
  }

  const WindowArgs& args() const { return args_; }
  WindowArgs& args() { return args_; }
  Tensor& grad_out() { return grad_out_; }
  DType dtype() const { return dtype_; }
  Tensor& query() { return query_; }
  Tensor& sink_query() { return sink_query_; }
  Tensor& key() { return key_; }
  Tensor& values() { return values_; }
  Tensor& past_key() { return past_key_; }
  Tensor& past_values() { return past_values_; }
  Tensor& sink_key() { return sink_key_; }
  Tensor& sink_values() { return sink_values_; }

 private:
  static void Fill(Tensor& tensor, Random& random, double scale) {
    std::vector<double> values = RandomValues(random, tensor.size(), scale);
    tensor.Set(values);
  }

  void FillKeys(Tensor& key, Tensor& values, Random& random, const std::function<bool(int64_t)>& real) const {
    std::vector<double> k = RandomValues(random, key.size());
    std::vector<double> v = RandomValues(random, values.size());
    for (double& x : v) x += shape_.mean;
    const int64_t key_row = shape_.kv_heads * shape_.key_dim;
    const int64_t value_row = shape_.kv_heads * shape_.head_dim;
    for (int64_t row = 0; row < key.size() / key_row; ++row) {
      if (real(row)) continue;
      const double nan = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(k.begin() + row * key_row, key_row, nan);
      std::fill_n(v.begin() + row * value_row, value_row, nan);
    }
    key.Set(k);
    values.Set(v);
  }

  Shape shape_;
  DType dtype_;
  Tensor query_, sink_query_, key_, values_, past_key_, past_values_, sink_key_, sink_values_, grad_out_;
  Mask mask_, past_mask_, sink_mask_;
  WindowArgs args_;
};

struct Result {
  std::vector<float> out;
  std::vector<float> lse;
};

Result Forward(const WindowArgs& args) {
  const int64_t batch = args.cu_seqlens == nullptr ? args.sequences : 1;
  const size_t rows = static_cast<size_t>(batch * args.time * args.heads);
  // What no slice writes stays NaN.
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Result result{std::vector<float>(rows * static_cast<size_t>(args.head_dim), nan), std::vector<float>(rows, nan)};
  const WindowOutputs outputs{result.out.data(), result.lse.data()};
  RunRanges(WindowSlices(args), [&](int64_t first, int64_t last) { WindowForward(args, outputs, first, last); });
  return result;
}

// lse as doubles, with -inf (the same in both) as 0 where `expected` is -inf.
std::vector<double> Finite(const std::vector<float>& lse, const std::vector<double>& expected) {
  std::vector<double> finite = Doubles(lse);
  for (size_t i = 0; i < finite.size(); ++i) {
    if (std::isinf(expected[i])) finite[i] = finite[i] == expected[i] ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  }
  return finite;
}

std::vector<double> Finite(std::vector<double> lse) {
  for (double& value : lse) {
    if (std::isinf(value)) value = 0.0;
  }
  return lse;
}

constexpr double kTolerance = 1e-5;

void ExpectForward(const WindowArgs& args, double tolerance = kTolerance) {
  const WindowReference expected = ReferenceWindow(args);
  const Result actual = Forward(args);
  EXPECT_TRUE(Close(Doubles(actual.out), expected.out, tolerance + WeightRounding(args.dtype)));
  EXPECT_TRUE(Close(Finite(actual.lse, expected.lse), Finite(expected.lse), tolerance + WeightRounding(args.dtype)));
}

// `small`: as in Close; a true gradient may be zero.
void ExpectBackward(Problem& problem, double tolerance = kTolerance, double small = 1.0) {
  const WindowArgs& args = problem.args();
  const DType dtype = problem.dtype();
  const std::vector<double> grad_out = problem.grad_out().Get();
  const WindowReference expected = ReferenceWindow(args, grad_out.data());
  const Result forward = Forward(args);

  const int64_t batch = args.cu_seqlens == nullptr ? args.sequences : 1;
  const int64_t past = args.position == nullptr ? 0 : args.past;
  const int64_t sinks = args.position == nullptr ? 0 : args.sinks;
  Tensor grad_query(dtype, batch, args.time, args.heads, args.key_dim);
  Tensor grad_sink_query(dtype, batch, args.sink_query ? args.time : 0, args.heads, args.key_dim);
  Tensor grad_key(dtype, batch, args.time, args.kv_heads, args.key_dim);
  Tensor grad_values(dtype, batch, args.time, args.kv_heads, args.head_dim);
  Tensor grad_past_key(dtype, args.sequences, past, args.kv_heads, args.key_dim);
  Tensor grad_past_values(dtype, args.sequences, past, args.kv_heads, args.head_dim);
  Tensor grad_sink_key(dtype, args.sequences, sinks, args.kv_heads, args.key_dim);
  Tensor grad_sink_values(dtype, args.sequences, sinks, args.kv_heads, args.head_dim);
  WindowGradients gradients;
  gradients.out = forward.out.data();
  gradients.lse = forward.lse.data();
  gradients.grad_out = problem.grad_out().view();
  gradients.grad_query = grad_query.mutable_view();
  if (args.sink_query) gradients.grad_sink_query = grad_sink_query.mutable_view();
  gradients.grad_key = grad_key.mutable_view();
  gradients.grad_values = grad_values.mutable_view();
  if (args.position != nullptr) {
    gradients.grad_past_key = grad_past_key.mutable_view();
    gradients.grad_past_values = grad_past_values.mutable_view();
    gradients.grad_sink_key = grad_sink_key.mutable_view();
    gradients.grad_sink_values = grad_sink_values.mutable_view();
  }
  RunRanges(WindowSlices(args), [&](int64_t first, int64_t last) { WindowBackward(args, gradients, first, last); });

  const double rounding = (dtype == DType::kFloat32 ? 0.0 : Epsilon(dtype)) + 2 * WeightRounding(dtype);
  const auto expect = [&](const char* name, const Tensor& actual, const std::vector<double>& values) {
    SCOPED_TRACE(name);
    EXPECT_TRUE(Close(actual.Get(), values, tolerance + rounding, small));
    EXPECT_TRUE(actual.GuardsIntact());
  };
  expect("query", grad_query, expected.grad_query);
  expect("sink_query", grad_sink_query, expected.grad_sink_query);
  expect("key", grad_key, expected.grad_key);
  expect("values", grad_values, expected.grad_values);
  expect("past_key", grad_past_key, expected.grad_past_key);
  expect("past_values", grad_past_values, expected.grad_past_values);
  expect("sink_key", grad_sink_key, expected.grad_sink_key);
  expect("sink_values", grad_sink_values, expected.grad_sink_values);
}

// Every corner of the sizes: one token to several tiles, windows shorter and longer than the sequence, sinks within and beyond.
std::vector<Shape> Shapes() {
  std::vector<Shape> shapes;
  using Masked = Shape::Masked;
  for (const int64_t time : {1, 2, 7, 33, 150}) {
    for (const int64_t window : {int64_t{1}, int64_t{3}, int64_t{40}, time, time + 9}) {
      for (const int64_t sinks : {0, 1, 4, 50}) {
        Shape shape;
        shape.time = time;
        shape.window = window;
        shape.sinks = sinks;
        shape.sink_query = sinks % 2 == 0;
        shape.key_dim = 5;
        shape.head_dim = time % 2 == 0 ? 3 : 17;
        shape.heads = 2;
        shape.kv_heads = time % 2 == 0 ? 2 : 1;
        shape.masked = window % 2 == 0 ? Masked::kSome : Masked::kNone;
        shapes.push_back(shape);
        if (sinks == 0) {
          shape.causal = false;
          shapes.push_back(shape);
        }
      }
    }
  }
  Shape batch;
  batch.sequences = 3;
  batch.time = 140;
  batch.heads = 6;
  batch.kv_heads = 2;
  batch.key_dim = 16;
  batch.head_dim = 24;
  batch.window = 32;
  batch.sinks = 3;
  batch.sink_query = true;
  batch.masked = Masked::kSome;
  shapes.push_back(batch);
  batch.masked = Masked::kAll;
  shapes.push_back(batch);
  batch.causal = false;
  shapes.push_back(batch);
  batch.causal = true;
  batch.masked = Masked::kSome;
  batch.sequences = 5;
  batch.cu_seqlens = {0, 0, 61, 62, 140, 140};
  shapes.push_back(batch);
  batch.causal = false;
  shapes.push_back(batch);
  // Many query heads a key, more than a block's rows.
  Shape grouped;
  grouped.time = 9;
  grouped.heads = 70;
  grouped.key_dim = 1;
  grouped.head_dim = 1;
  grouped.window = 4;
  grouped.sinks = 2;
  shapes.push_back(grouped);
  // A wide window: several groups of tiles, and a running maximum.
  Shape wide;
  wide.time = 1300;
  wide.window = 1100;
  wide.sinks = 150;
  wide.sink_query = true;
  wide.query_scale = 3.0;
  shapes.push_back(wide);
  return shapes;
}

// After a past of any length: longer and shorter than the window, none, and sinks half of which are still to come.
std::vector<Shape> ResumedShapes() {
  std::vector<Shape> shapes;
  for (const int64_t time : {1, 5, 60}) {
    for (const int64_t window : {1, 6, 200}) {
      for (const int64_t sinks : {0, 3, 9}) {
        Shape shape;
        shape.sequences = 6;
        shape.time = time;
        shape.positions = {0, 1, 2, window, window + 7, 1000};
        shape.past = window;
        shape.window = window;
        shape.sinks = sinks;
        shape.sink_query = time != 5;
        shape.heads = 2;
        shape.key_dim = 6;
        shape.head_dim = 7;
        shape.masked = window == 6 ? Shape::Masked::kNone : Shape::Masked::kSome;
        shapes.push_back(shape);
        shape.past = window + 2;
        shape.cu_seqlens = {0, time, time, time + 1, time + 1, 2 * time + 1, 2 * time + 4};
        shape.time = 2 * time + 4;
        shapes.push_back(shape);
      }
    }
  }
  return shapes;
}

void ForEachProblem(const std::vector<Shape>& shapes, const std::function<void(Problem&)>& test) {
  ForEachTarget([&] {
    Random random(shapes.size());
    for (const Shape& shape : shapes) {
      for (const DType dtype : kDTypes) {
        SCOPED_TRACE(::testing::Message() << shape << " " << Name(dtype));
        Problem problem(shape, dtype, random);
        test(problem);
      }
    }
  });
}

TEST(Window, ForwardIsTheDefinition) {
  ForEachProblem(Shapes(), [](Problem& problem) { ExpectForward(problem.args()); });
}

TEST(Window, ForwardAfterAPastIsTheDefinition) {
  ForEachProblem(ResumedShapes(), [](Problem& problem) { ExpectForward(problem.args()); });
}

TEST(Window, BackwardIsTheDefinition) {
  ForEachProblem(Shapes(), [](Problem& problem) { ExpectBackward(problem); });
}

TEST(Window, BackwardAfterAPastIsTheDefinition) {
  ForEachProblem(ResumedShapes(), [](Problem& problem) { ExpectBackward(problem); });
}

// A long sequence in one call, and in pieces that each see what came before as their past.
TEST(Window, WholeIsPiecesIsStepByStep) {
  ForEachTarget([] {
    Random random(5);
    const Shape shape{.time = 150,
                      .heads = 4,
                      .kv_heads = 2,
                      .key_dim = 8,
                      .head_dim = 10,
                      .window = 21,
                      .sinks = 5,
                      .sink_query = true,
                      .masked = Shape::Masked::kSome};
    for (const DType dtype : kDTypes) {
      Problem problem(shape, dtype, random);
      const WindowArgs& whole = problem.args();
      const Result expected = Forward(whole);
      for (const int64_t piece : {1, 2, 37, 149}) {
        SCOPED_TRACE(::testing::Message() << Name(dtype) << " in pieces of " << piece);
        Result joined;
        for (int64_t begin = 0; begin < shape.time; begin += piece) {
          const auto from = [&](View view, int64_t row) {
            view.data = static_cast<const char*>(view.data) + row * view.time_stride * SizeOf(dtype);
            return view;
          };
          WindowArgs args = whole;
          args.time = std::min(piece, shape.time - begin);
          args.query = from(whole.query, begin);
          args.sink_query = from(whole.sink_query, begin);
          args.key = from(whole.key, begin);
          args.values = from(whole.values, begin);
          args.key_mask.data = whole.key_mask.data + begin;
          args.position = &begin;
          args.past = std::min(begin, shape.window);
          args.past_key = from(whole.key, begin - args.past);
          args.past_values = from(whole.values, begin - args.past);
          args.past_mask = {whole.key_mask.data + begin - args.past, shape.time, 1};
          args.sink_key = whole.key;
          args.sink_values = whole.values;
          args.sink_mask = whole.key_mask;
          const Result part = Forward(args);
          joined.out.insert(joined.out.end(), part.out.begin(), part.out.end());
          joined.lse.insert(joined.lse.end(), part.lse.begin(), part.lse.end());
        }
        EXPECT_TRUE(Close(Doubles(joined.out), Doubles(expected.out), kTolerance + WeightRounding(dtype)));
        const std::vector<double> lse = Doubles(expected.lse);
        EXPECT_TRUE(Close(Finite(joined.lse, lse), Finite(lse), kTolerance + WeightRounding(dtype)));
      }
    }
  });
}

// Gradients of scores are small differences where values have a mean: rounded weights must leave them their digits.
TEST(Window, GradientsOutliveAMeanOfTheValues) {
  ForEachTarget([] {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      Random random(8);
      const Shape shape{.time = 130, .heads = 2, .key_dim = 24, .head_dim = 40, .window = 50, .sinks = 3, .mean = 50.0};
      Problem problem(shape, dtype, random);
      ExpectBackward(problem, dtype == DType::kFloat32 ? 1e-4 : 0.0, 0.0);
    }
  });
}

TEST(Window, ScoresOfTenThousand) {
  ForEachTarget([] {
    Random random(6);
    Shape shape{.time = 300, .key_dim = 8, .head_dim = 8, .window = 260, .sinks = 9, .query_scale = 4000.0};
    // Rounding of a score is proportional to it, and so is the error of its weight.
    const double tolerance = kTolerance * 1e4 / 64.0;
    for (const bool causal : {true, false}) {
      shape.causal = causal;
      for (const DType dtype : kDTypes) {
        if (dtype == DType::kFloat16) shape.query_scale = 3000.0;
        SCOPED_TRACE(::testing::Message() << shape << " " << Name(dtype));
        Problem problem(shape, dtype, random);
        ExpectForward(problem.args(), tolerance);
        ExpectBackward(problem, tolerance);
      }
    }
  });
}

TEST(Window, ExpandedTensors) {
  ForEachTarget([] {
    Random random(7);
    Shape shape;
    shape.sequences = 2;
    shape.time = 40;
    shape.heads = 4;
    shape.kv_heads = 2;
    shape.window = 9;
    shape.sinks = 2;
    Problem problem(shape, DType::kFloat32, random);
    problem.args().values.head_stride = 0;
    problem.args().key.batch_stride = 0;
    problem.args().query.time_stride = 0;
    ExpectForward(problem.args());

    // One gradient row for all tokens and heads, as sum() gives.
    const Result forward = Forward(problem.args());
    const std::vector<float> ones(static_cast<size_t>(shape.head_dim), 1.0f);
    const std::vector<double> grad_out(forward.out.size(), 1.0);
    const WindowReference expected = ReferenceWindow(problem.args(), grad_out.data());
    Tensor grad_query(DType::kFloat32, shape.sequences, shape.time, shape.heads, shape.key_dim);
    Tensor grad_key(DType::kFloat32, shape.sequences, shape.time, shape.kv_heads, shape.key_dim);
    Tensor grad_values(DType::kFloat32, shape.sequences, shape.time, shape.kv_heads, shape.head_dim);
    WindowGradients gradients;
    gradients.out = forward.out.data();
    gradients.lse = forward.lse.data();
    gradients.grad_out = {ones.data(), 0, 0, 0};
    gradients.grad_query = grad_query.mutable_view();
    gradients.grad_key = grad_key.mutable_view();
    gradients.grad_values = grad_values.mutable_view();
    RunRanges(WindowSlices(problem.args()),
              [&](int64_t first, int64_t last) { WindowBackward(problem.args(), gradients, first, last); });
    EXPECT_TRUE(Close(grad_query.Get(), expected.grad_query, kTolerance, 1.0));
    EXPECT_TRUE(Close(grad_key.Get(), expected.grad_key, kTolerance, 1.0));
    EXPECT_TRUE(Close(grad_values.Get(), expected.grad_values, kTolerance, 1.0));
  });
}

TEST(Window, UnboundedWindowAndSinks) {
  ForEachTarget([] {
    Random random(8);
    for (const bool causal : {true, false}) {
      Shape shape;
      shape.time = 200;
      shape.causal = causal;
      Problem problem(shape, DType::kFloat32, random);
      problem.args().window = std::numeric_limits<int64_t>::max();
      ExpectForward(problem.args());
      ExpectBackward(problem);
      problem.args().window = 3;
      problem.args().sinks = std::numeric_limits<int64_t>::max();
      ExpectForward(problem.args());
      ExpectBackward(problem);
    }
  });
}

// So wide that the forward pass can't hold all of a block's tiles at once.
TEST(Window, WiderThanTheTilesKept) {
  Random random(11);
  Shape shape;
  shape.time = 4600;
  shape.window = 4500;
  shape.key_dim = 1;
  shape.head_dim = 1;
  Problem problem(shape, DType::kFloat32, random);
  const WindowReference expected = ReferenceWindow(problem.args());
  ForEachTarget([&] { EXPECT_TRUE(Close(Doubles(Forward(problem.args()).out), expected.out, kTolerance)); });
}

// Inference keeps no lse.
TEST(Window, WithoutLse) {
  ForEachTarget([] {
    Random random(9);
    for (const int64_t time : {1, 50}) {
      Shape shape;
      shape.time = time;
      shape.window = 7;
      Problem problem(shape, DType::kFloat32, random);
      const Result expected = Forward(problem.args());
      std::vector<float> out(expected.out.size());
      const WindowOutputs outputs{out.data(), nullptr};
      RunSlices(WindowSlices(problem.args()), [&](int64_t slice) { WindowForward(problem.args(), outputs, slice, slice + 1); });
      EXPECT_EQ(out, expected.out);
    }
  });
}

// The definition's own gradients, which the kernel's are held to.
TEST(WindowReference, GradientsAreFiniteDifferences) {
  Random random(10);
  Shape shape;
  shape.sequences = 2;
  shape.time = 9;
  shape.positions = {2, 11};
  shape.past = 4;
  shape.heads = 2;
  shape.key_dim = 3;
  shape.head_dim = 2;
  shape.window = 4;
  shape.sinks = 3;
  shape.sink_query = true;
  Problem problem(shape, DType::kFloat32, random);
  const WindowArgs& args = problem.args();
  const std::vector<double> grad_out = problem.grad_out().Get();
  const WindowReference reference = ReferenceWindow(args, grad_out.data());
  const auto check = [&](const char* name, Tensor& tensor, const std::vector<double>& gradient) {
    SCOPED_TRACE(name);
    const std::vector<double> start = tensor.Get();
    const std::vector<size_t> indices = Sample(random, start.size(), 60);
    std::vector<double> differences;
    for (const size_t i : indices) {
      // The step is a power of two and the tensor float32: each end is what was really evaluated.
      double losses[2], ends[2];
      for (int side = 0; side < 2; ++side) {
        std::vector<double> moved = start;
        moved[i] += side == 0 ? -0x1p-9 : 0x1p-9;
        tensor.Set(moved);
        ends[side] = moved[i];
        losses[side] = Dot(ReferenceWindow(args).out, grad_out);
      }
      // A row that stands for no token holds NaN, before and after.
      differences.push_back(std::isnan(start[i]) ? 0.0 : (losses[1] - losses[0]) / (ends[1] - ends[0]));
    }
    std::vector<double> restored = start;
    tensor.Set(restored);
    EXPECT_TRUE(Close(Pick(gradient, indices), differences, 1e-4));
  };
  check("query", problem.query(), reference.grad_query);
  check("sink_query", problem.sink_query(), reference.grad_sink_query);
  check("key", problem.key(), reference.grad_key);
  check("values", problem.values(), reference.grad_values);
  check("past_key", problem.past_key(), reference.grad_past_key);
  check("past_values", problem.past_values(), reference.grad_past_values);
  check("sink_key", problem.sink_key(), reference.grad_sink_key);
  check("sink_values", problem.sink_values(), reference.grad_sink_values);
}

}  // namespace
}  // namespace latte::kernels
