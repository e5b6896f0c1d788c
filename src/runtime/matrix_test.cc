// Products of matrices in every type that ggml writes, against ggml's own reading of them.
#include "runtime/matrix.h"

#include <ggml-cpu.h>
#include <ggml.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "formats/tensor_type.h"

namespace latte::runtime {
namespace {

std::vector<float> random_floats(int64_t count, std::mt19937_64& random) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

TEST(Matrix, MultipliesInEveryTypeThatGgmlWrites) {
  ggml_cpu_init();
  constexpr int64_t kRows = 37, kColumns = 512, kTokens = 11;
  ThreadPool pool(2);
  int types = 0, packed = 0;
  for (int number = 0; number < GGML_TYPE_COUNT; ++number) {
    const auto type = static_cast<formats::TensorType>(number);
    if (!formats::is_known(type) || !formats::can_quantize(type)) continue;
    SCOPED_TRACE(formats::name_of(type));
    ++types;
    std::mt19937_64 random(static_cast<uint64_t>(number));
    const std::vector<std::byte> bytes = formats::quantize(type, random_floats(kRows * kColumns, random), kColumns);
    std::vector<float> weights(static_cast<size_t>(kRows * kColumns));
    formats::dequantize(type, bytes, weights);
    Arena arena("a test's matrix");
    const Matrix matrix({"w", type, {kRows, kColumns}}, bytes.data(), kRows, kColumns, arena, pool);
    packed += matrix.is_mapped() ? 0 : 1;

    double largest = 0.0;
    for (const float weight : weights) largest = std::max(largest, static_cast<double>(std::abs(weight)));
    std::vector<float> row(static_cast<size_t>(kColumns));
    for (int64_t r = 0; r < kRows; ++r) {
      matrix.row(r, row.data());
      // K types' scales are rounded to float16 (kernels/quant_matmul.h).
      for (int64_t c = 0; c < kColumns; ++c) {
        ASSERT_NEAR(row[static_cast<size_t>(c)], weights[static_cast<size_t>(r * kColumns + c)], 2 * 0x1p-11 * largest);
      }
    }

    const std::vector<float> x = random_floats(kTokens * kColumns, random);
    const Inputs inputs(kTokens, kColumns, matrix.forms(), arena);
    for (int64_t t = 0; t < kTokens; ++t) inputs.put(matrix.forms(), x.data() + t * kColumns, t);
    std::vector<float> out(static_cast<size_t>(kTokens * kRows));
    matrix.multiply(inputs, 0, kTokens, 0, matrix.groups(), out.data(), kRows);
    for (int64_t t = 0; t < kTokens; ++t) {
      const float* token = x.data() + t * kColumns;
      // Activations are rounded by at most half of 1 / 127 of the largest: errors of either sign, whose sum grows with the root
      // of their number; six deviations.
      double most = 0.0;
      for (int64_t c = 0; c < kColumns; ++c) most = std::max(most, static_cast<double>(std::abs(token[c])));
      for (int64_t r = 0; r < kRows; ++r) {
        double expected = 0.0, squares = 0.0;
        for (int64_t c = 0; c < kColumns; ++c) {
          const double weight = weights[static_cast<size_t>(r * kColumns + c)];
          expected += weight * token[c];
          squares += weight * weight;
        }
        const double deviation = most / 127 / std::sqrt(12.0) * std::sqrt(squares);
        ASSERT_NEAR(out[static_cast<size_t>(t * kRows + r)], expected, 6 * deviation + 1e-5);
      }
    }
  }
  EXPECT_GE(types, 12);
  EXPECT_EQ(packed, 15);  // those of kernels::RowLayout
}

}  // namespace
}  // namespace latte::runtime
