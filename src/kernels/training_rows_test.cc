#include "kernels/training_rows.h"

#include <gtest/gtest.h>

#include "kernels/recurrent_test_util.h"

namespace latte::kernels {
namespace {

using namespace testing;

using Doubles = std::vector<double>;

// Rows end to end, as the kernels take them, with a tensor behind them that a store beyond the end would hit.
Tensor RowsOf(DType dtype, int64_t rows, int64_t n, Doubles& values) {
  Tensor tensor(dtype, 1, 1, 1, rows * n);
  tensor.Set(values);
  return tensor;
}

Doubles RandomValues(int64_t count, Random& random, double spread = 1.0) {
  std::normal_distribution<double> normal(0.2, spread);
  Doubles values(static_cast<size_t>(count));
  for (double& value : values) value = normal(random);
  return values;
}

// `unit` is the size of what the numbers are differences of.
void ExpectClose(const Doubles& got, const Doubles& wanted, double tolerance, const std::string& what, double unit = 1e-6) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
    norm += wanted[i] * wanted[i];
  }
  EXPECT_LE(std::sqrt(error), tolerance * (std::sqrt(norm) + std::sqrt(static_cast<double>(wanted.size())) * unit)) << what;
}

// By central differences of a function of one argument's elements.
template <class Loss>
Doubles Differences(Doubles at, const Loss& loss) {
  Doubles gradient(at.size());
  for (size_t i = 0; i < at.size(); ++i) {
    const double kept = at[i], step = 1e-5;
    at[i] = kept + step;
    const double above = loss(at);
    at[i] = kept - step;
    gradient[i] = (above - loss(at)) / (2 * step);
    at[i] = kept;
  }
  return gradient;
}

Doubles RmsReference(const Doubles& x, const Doubles& weight, double epsilon) {
  const size_t n = weight.size();
  Doubles out(x.size());
  for (size_t row = 0; row < x.size() / n; ++row) {
    double squares = 0.0;
    for (size_t i = 0; i < n; ++i) squares += x[row * n + i] * x[row * n + i];
    for (size_t i = 0; i < n; ++i) {
      out[row * n + i] = x[row * n + i] / std::sqrt(squares / static_cast<double>(n) + epsilon) * weight[i];
    }
  }
  return out;
}

double Dot(const Doubles& a, const Doubles& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

TEST(TrainingRows, RmsNorm) {
  ForEachTarget([] {
    for (const DType dtype : kDTypes) {
      for (const int64_t n : {1, 7, 16, 33, 96}) {
        const int64_t rows = 3;
        Random random(1);
        Doubles x = RandomValues(rows * n, random), weight = RandomValues(n, random), grad = RandomValues(rows * n, random);
        Doubles none(static_cast<size_t>(rows * n));
        const Tensor tx = RowsOf(dtype, rows, n, x), tw = RowsOf(dtype, 1, n, weight), tg = RowsOf(dtype, rows, n, grad);
        Tensor out = RowsOf(dtype, rows, n, none), grad_x = RowsOf(dtype, rows, n, none);
        std::vector<float> inverse(static_cast<size_t>(rows));
        const RmsNormRows args{dtype, n, tx.view().data, tw.view().data};
        for (int64_t row = 0; row < rows; ++row) {  // any slices
          RmsNormRowsForward(args, 1e-3f, row, row + 1, out.mutable_view().data, inverse.data());
        }
        RmsNormRowsBackward(args, inverse.data(), tg.view().data, 0, rows, grad_x.mutable_view().data);
        const std::string what = std::string(Name(dtype)) + " n " + std::to_string(n);
        ExpectClose(out.Get(), RmsReference(x, weight, 1e-3), 2 * Epsilon(dtype) + 2e-6, what);
        const auto wanted = Differences(x, [&](const Doubles& at) { return Dot(RmsReference(at, weight, 1e-3), grad); });
        // Of a single channel the gradient is a small difference of large numbers.
        ExpectClose(grad_x.Get(), wanted, (n == 1 ? 20 : 2) * Epsilon(dtype) + 2e-5, what + " gradient");
      }
    }
  });
}

TEST(TrainingRows, Swiglu) {
  ForEachTarget([] {
    for (const DType dtype : kDTypes) {
      for (const int64_t count : {1, 13, 64, 2100}) {
        Random random(2);
        Doubles gate = RandomValues(count, random, 6.0), up = RandomValues(count, random), grad = RandomValues(count, random);
        Doubles none(static_cast<size_t>(count));
        const Tensor tg = RowsOf(dtype, 1, count, gate), tu = RowsOf(dtype, 1, count, up), td = RowsOf(dtype, 1, count, grad);
        Tensor out = RowsOf(dtype, 1, count, none), grad_gate = out, grad_up = out;
        const SwigluRows args{dtype, tg.view().data, tu.view().data};
        SwigluForward(args, 0, count / 2, out.mutable_view().data);
        SwigluForward(args, count / 2, count, out.mutable_view().data);
        SwigluBackward(args, td.view().data, 0, count, grad_gate.mutable_view().data, grad_up.mutable_view().data);
        Doubles wanted(gate.size()), wanted_gate(gate.size()), wanted_up(gate.size());
        for (size_t i = 0; i < gate.size(); ++i) {
          const double s = 1 / (1 + std::exp(-gate[i]));
          wanted[i] = gate[i] * s * up[i];
          wanted_up[i] = grad[i] * gate[i] * s;
          wanted_gate[i] = grad[i] * up[i] * s * (1 + gate[i] * (1 - s));
        }
        const double tolerance = 2 * Epsilon(dtype) + 2e-6;
        ExpectClose(out.Get(), wanted, tolerance, Name(dtype));
        ExpectClose(grad_gate.Get(), wanted_gate, tolerance, Name(dtype));
        ExpectClose(grad_up.Get(), wanted_up, tolerance, Name(dtype));
      }
    }
  });
}

TEST(TrainingRows, Divergence) {
  const auto log_softmax = [](const Doubles& logits, size_t row, size_t n) {
    Doubles out(logits.begin() + static_cast<int64_t>(row * n), logits.begin() + static_cast<int64_t>((row + 1) * n));
    const double greatest = *std::max_element(out.begin(), out.end());
    double sum = 0.0;
    for (const double x : out) sum += std::exp(x - greatest);
    for (double& x : out) x -= greatest + std::log(sum);
    return out;
  };
  ForEachTarget([&] {
    for (const DType dtype : kDTypes) {
      for (const int64_t n : {1, 5, 16, 131}) {
        for (const double spread : {1.0, 60.0}) {
          for (const int kind : {0, 1, 2}) {  // teacher and targets, teacher alone, targets alone
            const int64_t rows = 3;
            Random random(3);
            Doubles student = RandomValues(rows * n, random, spread), teacher = RandomValues(rows * n, random, spread);
            Tensor ts = RowsOf(dtype, rows, n, student);
            const Tensor tt = RowsOf(dtype, rows, n, teacher);
            const std::vector<int64_t> targets = {0, n - 1, n / 2};
            const double share = kind == 0 ? 0.3 : kind == 1 ? 0.0 : 1.0, scale = 0.25;
            const DivergenceRows args{dtype,
                                      n,
                                      kind == 2 ? nullptr : tt.view().data,
                                      kind == 1 ? nullptr : targets.data(),
                                      0.3f,
                                      static_cast<float>(scale)};
            std::vector<float> losses(static_cast<size_t>(rows));
            DivergenceRowsForward(args, 0, 1, ts.mutable_view().data, losses.data());
            DivergenceRowsForward(args, 1, rows, ts.mutable_view().data, losses.data());
            Doubles wanted, gradient;
            double largest = 1.0;
            for (const double logit : student) largest = std::max(largest, std::abs(logit));
            for (const double logit : teacher) largest = std::max(largest, std::abs(logit));
            for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
              const Doubles log_p = log_softmax(student, row, static_cast<size_t>(n));
              const Doubles log_q = log_softmax(teacher, row, static_cast<size_t>(n));
              const auto target = static_cast<size_t>(targets[row]);
              double loss = -share * log_p[target];
              for (size_t i = 0; i < log_p.size(); ++i) {
                const double q = std::exp(log_q[i]);
                loss += (1 - share) * q * (log_q[i] - log_p[i]);
                gradient.push_back(scale * (std::exp(log_p[i]) - (1 - share) * q - (i == target ? share : 0.0)));
              }
              wanted.push_back(loss);
            }
            const std::string what = std::string(Name(dtype)) + " n " + std::to_string(n) + " kind " + std::to_string(kind);
            ExpectClose(Doubles(losses.begin(), losses.end()), wanted, 4e-6, what, largest);
            ExpectClose(ts.Get(), gradient, 2 * Epsilon(dtype) + 2e-6 * largest, what + " gradient");
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace latte::kernels
