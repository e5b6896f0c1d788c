#include "kernels/quant_matmul.h"

#include <gtest/gtest.h>

#include <cstring>

#include "hwy/aligned_allocator.h"
#include "kernels/recurrent_test_util.h"

namespace latte::kernels {
namespace {

using namespace testing;

constexpr WeightFormat kFormats[] = {WeightFormat::kQ4_0,     WeightFormat::kQ4_1,    WeightFormat::kQ8_0,
                                     WeightFormat::kBFloat16, WeightFormat::kFloat16, WeightFormat::kFloat32};

bool Quantised(WeightFormat format) { return format <= WeightFormat::kQ8_0; }

// Rows in ggml's layout, and what they stand for.
struct Weights {
  std::vector<std::byte> bytes;
  std::vector<double> values;  // [rows, columns]
};

template <class T>
void Append(std::vector<std::byte>& bytes, T value) {
  const auto* begin = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), begin, begin + sizeof(T));
}

Weights MakeWeights(WeightFormat format, int64_t rows, int64_t columns, Random& random) {
  Weights w;
  std::uniform_int_distribution<int> byte(0, 255);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  const auto half = [&](float value) {
    const hwy::float16_t narrow = hwy::F16FromF32(value);
    Append(w.bytes, narrow);
    return static_cast<double>(hwy::F32FromF16(narrow));
  };
  for (int64_t r = 0; r < rows; ++r) {
    if (!Quantised(format)) {
      for (int64_t c = 0; c < columns; ++c) {
        if (format == WeightFormat::kFloat32) {
          const float value = normal(random);
          Append(w.bytes, value);
          w.values.push_back(value);
        } else if (format == WeightFormat::kFloat16) {
          w.values.push_back(half(normal(random)));
        } else {
          const hwy::bfloat16_t narrow = hwy::BF16FromF32(normal(random));
          Append(w.bytes, narrow);
          w.values.push_back(hwy::F32FromBF16(narrow));
        }
      }
      continue;
    }
    for (int64_t b = 0; b < columns / kQuantBlock; ++b) {
      const double scale = half(0.01f * normal(random));
      const double minimum = format == WeightFormat::kQ4_1 ? half(0.1f * normal(random)) : 0.0;
      int quants[kQuantBlock];
      if (format == WeightFormat::kQ8_0) {
        for (int& q : quants) {
          q = byte(random) - 128;
          Append(w.bytes, static_cast<int8_t>(q));
        }
      } else {
        for (int i = 0; i < kQuantBlock / 2; ++i) {
          const auto both = static_cast<uint8_t>(byte(random));
          Append(w.bytes, both);
          const int offset = format == WeightFormat::kQ4_0 ? 8 : 0;
          quants[i] = (both & 15) - offset;
          quants[i + kQuantBlock / 2] = (both >> 4) - offset;
        }
      }
      for (const int q : quants) w.values.push_back(q * scale + minimum);
    }
  }
  return w;
}

struct Packed {
  Packed(WeightFormat format, int64_t rows, int64_t columns, const Weights& weights) {
    matrix = {format, rows, columns, nullptr};
    const int64_t bytes = PackedGroupBytes(format, columns) * matrix.groups();
    memory = hwy::AllocateAligned<std::byte>(static_cast<size_t>(bytes));
    EXPECT_EQ(static_cast<int64_t>(weights.bytes.size()), rows * UnpackedRowBytes(format, columns));
    const int64_t middle = matrix.groups() / 2;
    PackGroups(matrix, weights.bytes.data(), middle, matrix.groups(), memory.get());
    PackGroups(matrix, weights.bytes.data(), 0, middle, memory.get());
    matrix.data = memory.get();
  }
  PackedMatrix matrix;
  hwy::AlignedFreeUniquePtr<std::byte[]> memory;
};

// Activations in the form of a format, and the values that they stand for.
struct Rows {
  Rows(WeightFormat format, const std::vector<float>& x, int64_t tokens, int64_t columns) {
    const int64_t padded = (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
    const int64_t blocks = columns / kQuantBlock;
    quants.resize(static_cast<size_t>(padded * columns));
    scales.resize(static_cast<size_t>(padded * blocks));
    scaled_sums.resize(scales.size());
    sums.resize(scales.size());
    bfloats.resize(quants.size());
    floats.resize(quants.size());
    activations = {columns, quants.data(), scales.data(), scaled_sums.data(), sums.data(), bfloats.data(), floats.data()};
    // In two pieces, as threads put them.
    const int64_t middle = Quantised(format) ? columns / 2 / kQuantBlock * kQuantBlock : columns / 2 / 2 * 2;
    for (int64_t t = 0; t < tokens; ++t) {
      PackActivations(FormOf(format), x.data() + t * columns + middle, t, middle, columns, activations);
      PackActivations(FormOf(format), x.data() + t * columns, t, 0, middle, activations);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < columns; ++c) {
        const size_t tile = static_cast<size_t>(t / kTileTokens * kTileTokens * columns);
        const auto slot = static_cast<size_t>(t % kTileTokens);
        const auto column = static_cast<size_t>(c);
        if (Quantised(format)) {
          const size_t block = tile / kQuantBlock + column / kQuantBlock * kTileTokens + slot;
          values.push_back(static_cast<double>(scales[block]) * quants[block * kQuantBlock + column % kQuantBlock]);
        } else if (format == WeightFormat::kBFloat16) {
          values.push_back(
              hwy::F32FromBF16(hwy::bfloat16_t::FromBits(bfloats[tile + column / 2 * kTileTokens * 2 + slot * 2 + column % 2])));
        } else {
          values.push_back(floats[tile + column * kTileTokens + slot]);
        }
      }
    }
  }
  std::vector<int8_t> quants;
  std::vector<float> scales, scaled_sums, floats;
  std::vector<int32_t> sums;
  std::vector<uint16_t> bfloats;
  Activations activations;
  std::vector<double> values;  // [tokens, columns]
};

std::vector<float> RandomRows(int64_t count, Random& random) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = normal(random);
  return x;
}

TEST(QuantMatmul, UnpacksWhatItPacked) {
  for (const WeightFormat format : kFormats) {
    Random random(1);
    const int64_t rows = 37, columns = 96;
    const Weights weights = MakeWeights(format, rows, columns, random);
    const Packed packed(format, rows, columns, weights);
    std::vector<float> row(static_cast<size_t>(columns));
    for (int64_t r = 0; r < rows; ++r) {
      UnpackRow(packed.matrix, r, row.data());
      for (int64_t c = 0; c < columns; ++c) {
        const double expected = weights.values[static_cast<size_t>(r * columns + c)];
        EXPECT_NEAR(row[static_cast<size_t>(c)], expected, 1e-6 * std::abs(expected) + 1e-7) << static_cast<int>(format);
      }
    }
  }
}

TEST(QuantMatmul, ActivationsAreWithinHalfAStep) {
  ForEachTarget([] {
    Random random(2);
    const int64_t tokens = 11, columns = 96;
    const std::vector<float> x = RandomRows(tokens * columns, random);
    const Rows rows(WeightFormat::kQ8_0, x, tokens, columns);
    for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(rows.values[i], x[i], 6.0 / 127 / 2);
    const Rows rounded(WeightFormat::kBFloat16, x, tokens, columns);
    for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(rounded.values[i], x[i], std::abs(x[i]) * 0x1p-8);
    // A row of zeros has no scale to divide by.
    const Rows zeros(WeightFormat::kQ8_0, std::vector<float>(64, 0.0f), 1, 64);
    for (const double value : zeros.values) EXPECT_EQ(value, 0.0);
  });
}

// Every format, on every target, with rows and tokens that fill no group and no tile: sums in float32 over values that the test
// takes from the packed activations, so that only rounding remains.
TEST(QuantMatmul, EqualsProductsInFloat64) {
  ForEachTarget([] {
    for (const WeightFormat format : kFormats) {
      for (const int64_t rows : {1, 16, 33}) {
        for (const int64_t columns : {32, 96, 576}) {
          for (const int64_t tokens : {1, 2, 3, 5, 8, 9, 19}) {
            SCOPED_TRACE(::testing::Message() << "format " << static_cast<int>(format) << " rows " << rows << " columns "
                                              << columns << " tokens " << tokens);
            Random random(3);
            const Weights weights = MakeWeights(format, rows, columns, random);
            const Packed packed(format, rows, columns, weights);
            const Rows x(format, RandomRows(tokens * columns, random), tokens, columns);
            const int64_t stride = rows + 3;
            std::vector<float> out(static_cast<size_t>(tokens * stride), -7.0f);
            const int64_t groups = packed.matrix.groups();
            MatMulPacked(packed.matrix, x.activations, 0, tokens, groups / 2, groups, out.data(), stride);
            MatMulPacked(packed.matrix, x.activations, 0, tokens, 0, groups / 2, out.data(), stride);
            for (int64_t t = 0; t < tokens; ++t) {
              for (int64_t r = 0; r < stride; ++r) {
                const float got = out[static_cast<size_t>(t * stride + r)];
                if (r >= rows) {
                  EXPECT_EQ(got, -7.0f) << "written behind the last row";
                  continue;
                }
                double expected = 0.0, norm = 0.0;
                for (int64_t c = 0; c < columns; ++c) {
                  const double term =
                      weights.values[static_cast<size_t>(r * columns + c)] * x.values[static_cast<size_t>(t * columns + c)];
                  expected += term;
                  norm += std::abs(term);
                }
                // Each of the sums of float32 terms rounds by half a unit of what it holds: at most `norm`.
                ASSERT_NEAR(got, expected, norm * 0x1p-23 * 16 + 1e-7);
              }
            }
          }
        }
      }
    }
  });
}

TEST(QuantMatmul, DoesNotDependOnTheSplit) {
  Random random(4);
  const int64_t rows = 48, columns = 64, tokens = 24;
  for (const WeightFormat format : kFormats) {
    const Weights weights = MakeWeights(format, rows, columns, random);
    const Packed packed(format, rows, columns, weights);
    const Rows x(format, RandomRows(tokens * columns, random), tokens, columns);
    std::vector<float> whole(static_cast<size_t>(tokens * rows)), pieces(whole.size());
    MatMulPacked(packed.matrix, x.activations, 0, tokens, 0, 3, whole.data(), rows);
    for (int64_t t = 0; t < tokens; t += 16) {
      for (int64_t g = 0; g < 3; ++g) {
        MatMulPacked(packed.matrix, x.activations, t, std::min(tokens, t + 16), g, g + 1, pieces.data() + t * rows, rows);
      }
    }
    EXPECT_EQ(whole, pieces);
  }
}

}  // namespace
}  // namespace latte::kernels
