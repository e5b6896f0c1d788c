#include "kernels/quant_matmul.h"

#include <gtest/gtest.h>

#include <cstring>

#include "hwy/aligned_allocator.h"
#include "kernels/recurrent_test_util.h"

namespace latte::kernels {
namespace {

using namespace testing;

constexpr RowLayout kLayouts[] = {RowLayout::kQ4_0,     RowLayout::kQ4_1,    RowLayout::kQ5_0,   RowLayout::kQ5_1,
                                  RowLayout::kQ8_0,     RowLayout::kIQ4_NL,  RowLayout::kQ2_K,   RowLayout::kQ3_K,
                                  RowLayout::kQ4_K,     RowLayout::kQ5_K,    RowLayout::kQ6_K,   RowLayout::kIQ4_XS,
                                  RowLayout::kBFloat16, RowLayout::kFloat16, RowLayout::kFloat32};

constexpr int kIQ4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

bool IsSuper(RowLayout layout) { return ColumnStep(layout) > kQuantBlock; }

// Rows in ggml's layout, and what they stand for.
struct Weights {
  std::vector<std::byte> bytes;
  std::vector<double> values;  // [rows, columns]
  std::vector<double> errors;  // likewise: how far rounded scales may lead away from them
};

template <class T>
void Append(std::vector<std::byte>& bytes, T value) {
  const auto* begin = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), begin, begin + sizeof(T));
}

// A super-block of 256 columns of random bytes, and what ggml's definition makes of each column: scale d times a small integer
// times a quant, less such a product.
void AppendSuperBlock(RowLayout layout, Random& random, Weights* w) {
  std::uniform_int_distribution<int> byte(0, 255);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  const hwy::float16_t d = hwy::F16FromF32(0.001f * normal(random)), least = hwy::F16FromF32(0.01f * normal(random));
  const auto bytes = [&](size_t count) {
    std::vector<int> drawn(count);
    for (int& value : drawn) value = byte(random);
    return drawn;
  };
  const auto append = [&](const std::vector<int>& values) {
    for (const int value : values) Append(w->bytes, static_cast<uint8_t>(value));
  };
  const auto value_of = [&](double scale, int quant, double minimum) {
    constexpr double kHalfUnit = 0x1p-11, kLeast = 0x1p-25;  // of float16: relative, and of its smallest numbers
    w->values.push_back(scale * quant - minimum);
    w->errors.push_back((std::abs(scale) * kHalfUnit + kLeast) * std::abs(quant) + std::abs(minimum) * kHalfUnit + kLeast);
  };
  const double scale = hwy::F32FromF16(d), minimum = hwy::F32FromF16(least);
  if (layout == RowLayout::kQ6_K) {
    const std::vector<int> low = bytes(128), high = bytes(64), scales = bytes(16);
    append(low);
    append(high);
    append(scales);
    Append(w->bytes, d);
    for (size_t c = 0; c < 256; ++c) {
      const size_t quarter = c % 128 / 32, i = c % 32;  // of 128 columns; within the quarter
      const int nibble = low[c / 128 * 64 + quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 15;
      const int top = high[c / 128 * 32 + i] >> (2 * quarter) & 3;
      value_of(scale * static_cast<int8_t>(scales[c / 16]), nibble + 16 * top - 32, 0.0);
    }
    return;
  }
  if (layout == RowLayout::kQ2_K) {
    const std::vector<int> pairs = bytes(16), low = bytes(64);
    append(pairs);
    append(low);
    Append(w->bytes, d);
    Append(w->bytes, least);
    for (size_t c = 0; c < 256; ++c) {
      const int two = low[c / 128 * 32 + c % 32] >> (c % 128 / 32 * 2) & 3;
      value_of(scale * (pairs[c / 16] % 16), two, minimum * (pairs[c / 16] / 16));
    }
    return;
  }
  if (layout == RowLayout::kQ3_K) {
    const std::vector<int> third = bytes(32), low = bytes(64), scales = bytes(12);
    append(third);
    append(low);
    append(scales);
    Append(w->bytes, d);
    for (size_t c = 0; c < 256; ++c) {
      const size_t j = c / 16;  // of 16 scales
      const int six = (j < 8 ? scales[j] % 16 : scales[j - 8] / 16) + 16 * (scales[8 + j % 4] >> (2 * (j / 4)) & 3);
      const int two = low[c / 128 * 32 + c % 32] >> (c % 128 / 32 * 2) & 3;
      value_of(scale * (six - 32), (third[c % 32] >> (c / 32) & 1) != 0 ? two : two - 4, 0.0);
    }
    return;
  }
  if (layout == RowLayout::kIQ4_XS) {
    const std::vector<int> high = bytes(2), scales = bytes(4), low = bytes(128);
    Append(w->bytes, d);
    append(high);
    append(scales);
    append(low);
    for (size_t c = 0; c < 256; ++c) {
      const size_t block = c / 32, i = c % 32;
      const int six = (scales[block / 2] >> (block % 2 * 4) & 15) + 16 * ((high[0] + 256 * high[1]) >> (2 * block) & 3);
      value_of(scale * (six - 32), kIQ4Values[low[block * 16 + i % 16] >> (i / 16 * 4) & 15], 0.0);
    }
    return;
  }
  const std::vector<int> pairs = bytes(12);
  const std::vector<int> high = layout == RowLayout::kQ5_K ? bytes(32) : std::vector<int>();
  const std::vector<int> low = bytes(128);
  Append(w->bytes, d);
  Append(w->bytes, least);
  append(pairs);
  append(high);
  append(low);
  for (size_t c = 0; c < 256; ++c) {
    const size_t block = c / 32, i = c % 32;
    const int six = block < 4 ? pairs[block] % 64 : pairs[block + 4] % 16 + 16 * (pairs[block - 4] / 64);
    const int six_minimum = block < 4 ? pairs[block + 4] % 64 : pairs[block + 4] / 16 + 16 * (pairs[block] / 64);
    int quant = low[block / 2 * 32 + i] >> (block % 2 * 4) & 15;
    if (!high.empty()) quant += (high[i] >> block & 1) * 16;
    value_of(scale * six, quant, minimum * six_minimum);
  }
}

Weights MakeWeights(RowLayout layout, int64_t rows, int64_t columns, Random& random) {
  Weights w;
  std::uniform_int_distribution<int> byte(0, 255);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  const auto half = [&](float value) {
    const hwy::float16_t narrow = hwy::F16FromF32(value);
    Append(w.bytes, narrow);
    return static_cast<double>(hwy::F32FromF16(narrow));
  };
  for (int64_t r = 0; r < rows; ++r) {
    if (!IsQuantised(FormatOf(layout))) {
      for (int64_t c = 0; c < columns; ++c) {
        if (layout == RowLayout::kFloat32) {
          const float value = normal(random);
          Append(w.bytes, value);
          w.values.push_back(value);
        } else if (layout == RowLayout::kFloat16) {
          w.values.push_back(half(normal(random)));
        } else {
          const hwy::bfloat16_t narrow = hwy::BF16FromF32(normal(random));
          Append(w.bytes, narrow);
          w.values.push_back(hwy::F32FromBF16(narrow));
        }
      }
      continue;
    }
    if (IsSuper(layout)) {
      for (int64_t b = 0; b < columns / 256; ++b) AppendSuperBlock(layout, random, &w);
      continue;
    }
    for (int64_t b = 0; b < columns / kQuantBlock; ++b) {
      const double scale = half(0.01f * normal(random));
      const bool has_minimum = layout == RowLayout::kQ4_1 || layout == RowLayout::kQ5_1;
      const double minimum = has_minimum ? half(0.1f * normal(random)) : 0.0;
      int quants[kQuantBlock];
      if (layout == RowLayout::kQ8_0) {
        for (int& q : quants) {
          q = byte(random) - 128;
          Append(w.bytes, static_cast<int8_t>(q));
        }
      } else {
        const bool fifth = layout == RowLayout::kQ5_0 || layout == RowLayout::kQ5_1;
        const auto fifths = fifth ? static_cast<uint32_t>(random()) : 0;
        if (fifth) Append(w.bytes, fifths);
        const int offset = has_minimum ? 0 : fifth ? 16 : 8;
        for (int i = 0; i < kQuantBlock / 2; ++i) {
          const auto both = static_cast<uint8_t>(byte(random));
          Append(w.bytes, both);
          quants[i] = (both & 15) + static_cast<int>(fifths >> i & 1) * 16 - offset;
          quants[i + kQuantBlock / 2] = (both >> 4) + static_cast<int>(fifths >> (i + 16) & 1) * 16 - offset;
        }
      }
      if (layout == RowLayout::kIQ4_NL) {
        for (int& q : quants) q = kIQ4Values[q + 8];
      }
      for (const int q : quants) w.values.push_back(q * scale + minimum);
    }
  }
  w.errors.resize(w.values.size());
  return w;
}

struct Packed {
  Packed(RowLayout layout, int64_t rows, int64_t columns, const Weights& weights) {
    matrix = {FormatOf(layout), rows, columns, nullptr};
    const int64_t bytes = PackedGroupBytes(matrix.format, columns) * matrix.groups();
    memory = hwy::AllocateAligned<std::byte>(static_cast<size_t>(bytes));
    EXPECT_EQ(static_cast<int64_t>(weights.bytes.size()), rows * UnpackedRowBytes(layout, columns));
    const int64_t middle = matrix.groups() / 2;
    PackGroups(matrix, layout, weights.bytes.data(), middle, matrix.groups(), memory.get());
    PackGroups(matrix, layout, weights.bytes.data(), 0, middle, memory.get());
    matrix.data = memory.get();
  }
  // What it stands for, [rows, columns].
  std::vector<double> values() const {
    std::vector<float> all(static_cast<size_t>(matrix.rows * matrix.columns));
    for (int64_t r = 0; r < matrix.rows; ++r) UnpackRow(matrix, r, all.data() + r * matrix.columns);
    return {all.begin(), all.end()};
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
    half_sums.resize(scales.size());
    bfloats.resize(quants.size());
    floats.resize(quants.size());
    activations.columns = columns;
    activations.quants = quants.data();
    activations.scales = scales.data();
    activations.scaled_sums = scaled_sums.data();
    activations.sums = sums.data();
    activations.half_sums = HasHalfScales(format) ? half_sums.data() : nullptr;
    activations.bfloats = bfloats.data();
    activations.values = floats.data();
    // In two pieces, as threads put them.
    const int64_t middle = IsQuantised(format) ? columns / 2 / kQuantBlock * kQuantBlock : columns / 2 / 2 * 2;
    for (int64_t t = 0; t < tokens; ++t) {
      PackActivations(FormOf(format), x.data() + t * columns + middle, t, middle, columns, activations);
      PackActivations(FormOf(format), x.data() + t * columns, t, 0, middle, activations);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < columns; ++c) {
        const size_t tile = static_cast<size_t>(t / kTileTokens * kTileTokens * columns);
        const auto slot = static_cast<size_t>(t % kTileTokens);
        const auto column = static_cast<size_t>(c);
        if (IsQuantised(format)) {
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
  std::vector<int32_t> sums, half_sums;
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
  for (const RowLayout layout : kLayouts) {
    Random random(1);
    const int64_t rows = 37, columns = IsSuper(layout) ? 512 : 96;
    const Weights weights = MakeWeights(layout, rows, columns, random);
    const Packed packed(layout, rows, columns, weights);
    const std::vector<double> values = packed.values();
    for (size_t i = 0; i < values.size(); ++i) {
      const double expected = weights.values[i];
      ASSERT_NEAR(values[i], expected, weights.errors[i] + 1e-6 * std::abs(expected) + 1e-7)
          << "layout " << static_cast<int>(layout) << " element " << i;
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
    for (const RowLayout layout : kLayouts) {
      const WeightFormat format = FormatOf(layout);
      for (const int64_t rows : {1, 16, 33}) {
        for (int64_t columns : {32, 96, 576}) {
          if (IsSuper(layout)) columns = columns / 96 * 256 + 256;
          for (const int64_t tokens : {1, 2, 3, 5, 8, 9, 19}) {
            SCOPED_TRACE(::testing::Message() << "layout " << static_cast<int>(layout) << " rows " << rows << " columns "
                                              << columns << " tokens " << tokens);
            Random random(3);
            const Packed packed(layout, rows, columns, MakeWeights(layout, rows, columns, random));
            const std::vector<double> weights = packed.values();
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
                      weights[static_cast<size_t>(r * columns + c)] * x.values[static_cast<size_t>(t * columns + c)];
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
  const int64_t rows = 48, tokens = 24;
  for (const RowLayout layout : kLayouts) {
    const int64_t columns = std::max<int64_t>(64, ColumnStep(layout));
    const Packed packed(layout, rows, columns, MakeWeights(layout, rows, columns, random));
    const Rows x(FormatOf(layout), RandomRows(tokens * columns, random), tokens, columns);
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
