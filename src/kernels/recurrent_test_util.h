// What the tests of the kernels along time share: tensors of any dtype with gaps in memory, SIMD targets one by one, slices in
// any order, finite differences.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "hwy/base.h"
#include "hwy/targets.h"
#include "kernels/types.h"

namespace latte::kernels::testing {

inline const char* Name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

inline double Epsilon(DType dtype) { return dtype == DType::kFloat32 ? 0x1p-23 : dtype == DType::kBFloat16 ? 0x1p-7 : 0x1p-10; }

// A tensor [batch, time, heads, inner] whose rows are apart in memory. What lies between them must survive a kernel.
class Tensor {
 public:
  Tensor(DType dtype, int64_t batch, int64_t time, int64_t heads, int64_t inner, int64_t gap = 3)
      : dtype_(dtype), sizes_{batch, time, heads, inner} {
    head_stride_ = inner + gap;
    time_stride_ = heads * head_stride_ + gap;
    batch_stride_ = time * time_stride_ + gap;
    // Some room behind the last row too, so that an out-of-bounds store is seen as such.
    bytes_.assign(static_cast<size_t>((batch * batch_stride_ + 64) * SizeOf(dtype)), kGuard);
  }
  Tensor(DType dtype, int64_t batch, int64_t time, int64_t inner) : Tensor(dtype, batch, time, 1, inner) {}

  View view() const { return {bytes_.data(), batch_stride_, time_stride_, head_stride_}; }
  MutableView mutable_view() { return {bytes_.data(), batch_stride_, time_stride_, head_stride_}; }
  int64_t size() const { return sizes_[0] * sizes_[1] * sizes_[2] * sizes_[3]; }

  // The same tensor from token `begin` on.
  View view_from(int64_t begin) const {
    View v = view();
    v.data = bytes_.data() + begin * time_stride_ * SizeOf(dtype_);
    return v;
  }
  MutableView mutable_view_from(int64_t begin) {
    MutableView v = mutable_view();
    v.data = bytes_.data() + begin * time_stride_ * SizeOf(dtype_);
    return v;
  }

  // Rounds `values` [batch, time, heads, inner] in place to what the dtype holds, and takes them.
  void Set(std::vector<double>& values) {
    ASSERT_EQ(static_cast<int64_t>(values.size()), size());
    ForEachOffset([&](size_t i, int64_t offset) {
      const float value = static_cast<float>(values[i]);
      if (dtype_ == DType::kFloat32) {
        reinterpret_cast<float*>(bytes_.data())[offset] = value;
      } else if (dtype_ == DType::kBFloat16) {
        reinterpret_cast<hwy::bfloat16_t*>(bytes_.data())[offset] = hwy::BF16FromF32(value);
      } else {
        reinterpret_cast<hwy::float16_t*>(bytes_.data())[offset] = hwy::F16FromF32(value);
      }
    });
    values = Get();
  }

  std::vector<double> Get() const {
    std::vector<double> values(static_cast<size_t>(size()));
    ForEachOffset([&](size_t i, int64_t offset) {
      if (dtype_ == DType::kFloat32) {
        values[i] = reinterpret_cast<const float*>(bytes_.data())[offset];
      } else if (dtype_ == DType::kBFloat16) {
        values[i] = hwy::F32FromBF16(reinterpret_cast<const hwy::bfloat16_t*>(bytes_.data())[offset]);
      } else {
        values[i] = hwy::F32FromF16(reinterpret_cast<const hwy::float16_t*>(bytes_.data())[offset]);
      }
    });
    return values;
  }

  bool GuardsIntact() const {
    std::vector<bool> used(bytes_.size());
    const int64_t item = SizeOf(dtype_);
    ForEachOffset([&](size_t, int64_t offset) {
      for (int64_t b = 0; b < item; ++b) used[static_cast<size_t>(offset * item + b)] = true;
    });
    for (size_t b = 0; b < bytes_.size(); ++b) {
      if (!used[b] && bytes_[b] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char kGuard = 0x7b;

  template <class Function>
  void ForEachOffset(const Function& function) const {
    size_t i = 0;
    for (int64_t b = 0; b < sizes_[0]; ++b) {
      for (int64_t t = 0; t < sizes_[1]; ++t) {
        for (int64_t h = 0; h < sizes_[2]; ++h) {
          for (int64_t d = 0; d < sizes_[3]; ++d) {
            function(i++, b * batch_stride_ + t * time_stride_ + h * head_stride_ + d);
          }
        }
      }
    }
  }

  DType dtype_;
  int64_t sizes_[4];
  int64_t batch_stride_, time_stride_, head_stride_;
  std::vector<unsigned char> bytes_;
};

using Random = std::mt19937_64;

inline std::vector<double> RandomValues(Random& random, int64_t size, double scale = 1.0, double shift = 0.0) {
  std::normal_distribution<double> normal(shift, scale);
  std::vector<double> values(static_cast<size_t>(size));
  for (double& value : values) value = normal(random);
  return values;
}

// As float32, rounding `values` in place to what they hold.
inline std::vector<float> Floats(std::vector<double>& values) {
  std::vector<float> floats(values.begin(), values.end());
  values.assign(floats.begin(), floats.end());
  return floats;
}

// Mask [rows] with about a quarter of the tokens masked.
class Mask {
 public:
  Mask(Random& random, int64_t rows) : values_(new bool[static_cast<size_t>(std::max<int64_t>(rows, 1))]) {
    std::bernoulli_distribution real(0.75);
    for (int64_t i = 0; i < rows; ++i) values_[static_cast<size_t>(i)] = real(random);
  }
  const bool* data() const { return values_.get(); }
  bool* data() { return values_.get(); }
  bool operator[](int64_t row) const { return values_[static_cast<size_t>(row)]; }

 private:
  std::unique_ptr<bool[]> values_;
};

// ‖actual - expected‖₂ ≤ tolerance · (‖expected‖₂ + √n · small).
inline ::testing::AssertionResult Close(const std::vector<double>& actual, const std::vector<double>& expected, double tolerance,
                                        double small = 0.01) {
  if (actual.size() != expected.size())
    return ::testing::AssertionFailure() << actual.size() << " values, not " << expected.size();
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < actual.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double bound = tolerance * (std::sqrt(norm) + std::sqrt(static_cast<double>(actual.size())) * small);
  if (actual.empty() || std::sqrt(error) <= bound) return ::testing::AssertionSuccess();  // NaN fails
  return ::testing::AssertionFailure() << "error " << std::sqrt(error) << " exceeds " << bound << " = " << tolerance << " x norm "
                                       << std::sqrt(norm);
}

inline std::vector<double> Doubles(const std::vector<float>& values) { return {values.begin(), values.end()}; }

// Runs every slice once, in an order of no meaning.
inline void RunSlices(int64_t slices, const std::function<void(int64_t)>& run) {
  std::vector<int64_t> order(static_cast<size_t>(slices));
  std::iota(order.begin(), order.end(), int64_t{0});
  Random random(slices + 1);
  std::shuffle(order.begin(), order.end(), random);
  for (const int64_t slice : order) run(slice);
}

// Runs every slice once, in ranges of one, two, three … slices, the last range first.
inline void RunRanges(int64_t slices, const std::function<void(int64_t, int64_t)>& run) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t first = 0, size = 1; first < slices; first += size, ++size)
    ranges.emplace_back(first, std::min(slices, first + size));
  std::for_each(ranges.rbegin(), ranges.rend(), [&](const auto& range) { run(range.first, range.second); });
}

// Runs `test` on each SIMD target that this machine and this build have.
inline void ForEachTarget(const std::function<void()>& test) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    test();
    hwy::SetSupportedTargetsForTest(0);
  }
}

// Indices of at most `count` of `size` parameters: all of few, a sample of many.
inline std::vector<size_t> Sample(Random& random, size_t size, size_t count) {
  std::vector<size_t> indices(size);
  std::iota(indices.begin(), indices.end(), size_t{0});
  if (size > count) {
    std::shuffle(indices.begin(), indices.end(), random);
    indices.resize(count);
  }
  return indices;
}

// Central differences of `loss` in `parameters` at `indices`.
inline std::vector<double> FiniteDifferences(const std::function<double()>& loss, std::vector<double>& parameters,
                                             const std::vector<size_t>& indices, double step = 1e-4) {
  std::vector<double> gradient;
  for (const size_t i : indices) {
    const double value = parameters[i];
    parameters[i] = value + step;
    const double above = loss();
    parameters[i] = value - step;
    const double below = loss();
    parameters[i] = value;
    gradient.push_back((above - below) / (2.0 * step));
  }
  return gradient;
}

inline std::vector<double> Pick(const std::vector<double>& values, const std::vector<size_t>& indices) {
  std::vector<double> picked;
  for (const size_t i : indices) picked.push_back(values[i]);
  return picked;
}

inline double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

}  // namespace latte::kernels::testing
