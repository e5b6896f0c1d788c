#include "kernels/vapor.h"

#include <gtest/gtest.h>

#include "kernels/recurrent_reference.h"
#include "kernels/recurrent_test_util.h"

namespace latte::kernels {
namespace {

using namespace testing;

struct Shape {
  int64_t batch, time, heads, head_dim;
  int64_t size() const { return batch * time * heads * head_dim; }
};

const Shape kShapes[] = {{1, 1, 1, 2},  {2, 0, 1, 4},   {1, 3, 0, 4},   {1, 3, 2, 0},    {2, 5, 3, 6},  {1, 130, 2, 64},
                         {3, 65, 1, 8}, {1, 2, 1, 130}, {1, 70, 3, 34}, {1, 20, 2, 256}, {1, 1, 9, 62}, {1, 9, 1, 18}};

enum class Positions { kImplicit, kOffset, kPacked, kScattered, kFar };

std::vector<int64_t> MakePositions(Positions kind, const Shape& shape, Random& random) {
  std::vector<int64_t> positions;
  std::uniform_int_distribution<int64_t> scattered(-1000, 1000), far(9'999'000, 10'000'000);
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t t = 0; t < shape.time; ++t) {
      switch (kind) {
        case Positions::kImplicit:
          break;
        case Positions::kOffset:
          positions.push_back(9'999'900 + 7 * b + t);
          break;
        case Positions::kPacked:
          positions.push_back(t % 13 / 2 * 2);
          break;  // restarts, jumps and repeats
        case Positions::kScattered:
          positions.push_back(scattered(random));
          break;
        case Positions::kFar:
          positions.push_back(far(random) * (t % 2 == 0 ? 1 : -1));
          break;
      }
    }
  }
  return positions;
}

VaporArgs MakeArgs(DType dtype, const Shape& shape, const Tensor& x, const std::vector<int64_t>& positions, bool inverse) {
  VaporArgs args;
  args.dtype = dtype;
  args.batch = shape.batch;
  args.time = shape.time;
  args.heads = shape.heads;
  args.head_dim = shape.head_dim;
  args.inverse = inverse;
  args.x = x.view();
  if (!positions.empty()) {
    args.positions = positions.data();
    args.positions_batch_stride = shape.time;
    args.positions_time_stride = 1;
  }
  return args;
}

std::vector<double> Rotate(const VaporArgs& args, const Shape& shape) {
  Tensor out(args.dtype, shape.batch, shape.time, shape.heads, shape.head_dim, 5);
  RunSlices(VaporSlices(args), [&](int64_t slice) { VaporRotate(args, out.mutable_view(), slice); });
  EXPECT_TRUE(out.GuardsIntact());
  return out.Get();
}

template <class Test>
void ForEachProblem(const Test& test) {
  for (const Shape& shape : kShapes) {
    for (const DType dtype : kDTypes) {
      for (const Positions kind :
           {Positions::kImplicit, Positions::kOffset, Positions::kPacked, Positions::kScattered, Positions::kFar}) {
        for (const bool inverse : {false, true}) {
          SCOPED_TRACE(::testing::Message() << Name(dtype) << " B " << shape.batch << " T " << shape.time << " H " << shape.heads
                                            << " D " << shape.head_dim << " positions " << static_cast<int>(kind) << " inverse "
                                            << inverse);
          Random random(31);
          std::vector<double> x = RandomValues(random, shape.size());
          Tensor x_tensor(dtype, shape.batch, shape.time, shape.heads, shape.head_dim);
          x_tensor.Set(x);
          const std::vector<int64_t> positions = MakePositions(kind, shape, random);
          const VaporArgs args = MakeArgs(dtype, shape, x_tensor, positions, inverse);
          test(args, shape, x, x_tensor);
        }
      }
    }
  }
}

std::vector<double> Reference(const VaporArgs& args, const std::vector<double>& x, double base) {
  std::vector<double> out(x.size());
  VaporReference({args.batch, args.time, args.heads, args.head_dim, base, args.inverse, x.data(), args.positions}, out.data());
  return out;
}

TEST(Vapor, FollowsReferenceAtAnyPosition) {
  ForEachProblem([](VaporArgs args, const Shape& shape, std::vector<double>& x, Tensor&) {
    for (const double base : {10000.0, 500000.0, 1.0}) {
      args.base = base;
      const std::vector<double> expected = Reference(args, x, base);
      ForEachTarget([&] {
        const std::vector<double> out = Rotate(args, shape);
        EXPECT_TRUE(Close(out, expected, Epsilon(args.dtype))) << "base " << base;
        if (args.dtype != DType::kFloat32) return;
        for (size_t i = 0; i < out.size(); ++i) {
          EXPECT_NEAR(out[i], expected[i], 2e-7 * (1.0 + std::hypot(x[i], 3.0))) << "base " << base << " at " << i;
        }
      });
    }
  });
}

TEST(Vapor, HalfPrecisionIsTheRoundedFloat32Result) {
  ForEachTarget([] {
    ForEachProblem([](const VaporArgs& args, const Shape& shape, std::vector<double>& x, Tensor&) {
      Tensor wide(DType::kFloat32, shape.batch, shape.time, shape.heads, shape.head_dim);
      wide.Set(x);
      VaporArgs same = args;
      same.dtype = DType::kFloat32;
      same.x = wide.view();
      std::vector<double> expected = Rotate(same, shape);
      Tensor rounded(args.dtype, shape.batch, shape.time, shape.heads, shape.head_dim);
      rounded.Set(expected);
      EXPECT_EQ(Rotate(args, shape), expected);
    });
  });
}

// The rotation is orthogonal, so its gradient is the inverse rotation of the gradient.
TEST(Vapor, InverseIsTheGradient) {
  ForEachProblem([](VaporArgs args, const Shape& shape, std::vector<double>& x, Tensor&) {
    if (shape.size() > 1000) return;  // finite differences of the slow reference
    Random random(37);
    std::vector<double> grad_out = RandomValues(random, shape.size());
    Tensor grad_tensor(args.dtype, shape.batch, shape.time, shape.heads, shape.head_dim);
    grad_tensor.Set(grad_out);
    const std::vector<size_t> indices = Sample(random, x.size(), 20);
    const std::vector<double> expected =
        FiniteDifferences([&] { return Dot(Reference(args, x, args.base), grad_out); }, x, indices);
    args.x = grad_tensor.view();
    args.inverse = !args.inverse;
    ForEachTarget([&] { EXPECT_TRUE(Close(Pick(Rotate(args, shape), indices), expected, Epsilon(args.dtype))); });
  });
}

TEST(Vapor, InPlaceIsTheSame) {
  ForEachTarget([] {
    ForEachProblem([](const VaporArgs& args, const Shape& shape, std::vector<double>&, Tensor& x_tensor) {
      const std::vector<double> expected = Rotate(args, shape);
      RunSlices(VaporSlices(args), [&](int64_t slice) { VaporRotate(args, x_tensor.mutable_view(), slice); });
      EXPECT_TRUE(x_tensor.GuardsIntact());
      EXPECT_EQ(x_tensor.Get(), expected);
    });
  });
}

TEST(Vapor, WholeIsStepByStep) {
  ForEachTarget([] {
    ForEachProblem([](const VaporArgs& args, const Shape& shape, std::vector<double>&, Tensor& x_tensor) {
      const std::vector<double> whole = Rotate(args, shape);
      Tensor out(args.dtype, shape.batch, shape.time, shape.heads, shape.head_dim);
      for (int64_t t = 0; t < shape.time; ++t) {
        VaporArgs step = args;
        step.time = 1;
        step.x = x_tensor.view_from(t);
        step.positions = args.positions == nullptr ? &t : args.positions + t;
        RunSlices(VaporSlices(step), [&](int64_t slice) { VaporRotate(step, out.mutable_view_from(t), slice); });
      }
      // Both have float64 angles, apart by 1e-14; a cosine or an output may fall on the other side of a rounding boundary.
      EXPECT_TRUE(Close(out.Get(), whole, 0.1 * Epsilon(args.dtype)));
    });
  });
}

// What positions are for: the product of a value turned by s and a reader turned by t depends on t - s alone.
TEST(Vapor, DependsOnDistanceAlone) {
  ForEachTarget([] {
    Random random(41);
    const Shape shape{1, 2, 1, 64};
    std::vector<double> x = RandomValues(random, shape.size());
    Tensor x_tensor(DType::kFloat32, 1, 2, 1, 64);
    x_tensor.Set(x);
    std::vector<double> products;
    for (const int64_t start : {int64_t{0}, int64_t{123}, int64_t{9'999'000}}) {
      const std::vector<int64_t> positions = {start, start + 17};
      const std::vector<double> out = Rotate(MakeArgs(DType::kFloat32, shape, x_tensor, positions, false), shape);
      products.push_back(std::inner_product(out.begin(), out.begin() + 64, out.begin() + 64, 0.0));
    }
    EXPECT_NEAR(products[1], products[0], 64 * 1e-6);
    EXPECT_NEAR(products[2], products[0], 64 * 1e-6);
  });
}

TEST(Vapor, AnyPositionIsFinite) {
  ForEachTarget([] {
    const Shape shape{1, 4, 1, 8};
    Random random(43);
    std::vector<double> x = RandomValues(random, shape.size());
    Tensor x_tensor(DType::kFloat32, 1, 4, 1, 8);
    x_tensor.Set(x);
    const std::vector<int64_t> positions = {std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min(), -1, 0};
    for (const double value : Rotate(MakeArgs(DType::kFloat32, shape, x_tensor, positions, false), shape)) {
      EXPECT_TRUE(std::isfinite(value));
    }
  });
}

}  // namespace
}  // namespace latte::kernels
