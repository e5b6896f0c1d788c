#include "kernels/cached_attention.h"

#include <gtest/gtest.h>

#include "kernels/recurrent_test_util.h"

namespace latte::kernels {
namespace {

using namespace testing;

// A cache with room for `slots`, filled with rounded random rows.
struct Filled {
  Filled(DType dtype, int64_t key_dim, int64_t head_dim, int64_t slots, int64_t used, Random& random, float spread) {
    const int64_t whole = (slots + kCacheBlock - 1) / kCacheBlock * kCacheBlock;
    key_bytes.assign(static_cast<size_t>(whole * key_dim * SizeOf(dtype)), 0x7F);  // NaN where nothing was stored
    value_bytes.assign(static_cast<size_t>(whole * head_dim * SizeOf(dtype)), 0x7F);
    cache = {dtype, key_dim, head_dim, whole, key_bytes.data(), value_bytes.data()};
    std::normal_distribution<float> normal(0.0f, 1.0f);
    for (int64_t s = 0; s < used; ++s) {
      std::vector<float> key(static_cast<size_t>(key_dim)), value(static_cast<size_t>(head_dim));
      for (float& k : key) k = Rounded(dtype, spread * normal(random));
      for (float& v : value) v = Rounded(dtype, normal(random));
      StoreSlot(cache, s, key.data(), value.data());
      keys.push_back(key);
      values.push_back(value);
    }
  }
  static float Rounded(DType dtype, float x) {
    if (dtype == DType::kFloat16) return hwy::F32FromF16(hwy::F16FromF32(x));
    if (dtype == DType::kBFloat16) return hwy::F32FromBF16(hwy::BF16FromF32(x));
    return x;
  }
  std::vector<uint8_t> key_bytes, value_bytes;
  KeyValueCache cache;
  std::vector<std::vector<float>> keys, values;
};

std::vector<double> Reference(const Filled& filled, int64_t first, int64_t last, const float* query) {
  std::vector<double> scores, out(static_cast<size_t>(filled.cache.head_dim), 0.0);
  double max = -1e300, sum = 0.0;
  for (int64_t s = first; s < last; ++s) {
    double score = 0.0;
    for (size_t i = 0; i < filled.keys[static_cast<size_t>(s)].size(); ++i) {
      score += static_cast<double>(query[i]) * filled.keys[static_cast<size_t>(s)][i];
    }
    scores.push_back(score);
    max = std::max(max, score);
  }
  for (double& score : scores) sum += (score = std::exp(score - max));
  for (int64_t s = first; s < last; ++s) {
    for (size_t j = 0; j < out.size(); ++j) {
      out[j] += scores[static_cast<size_t>(s - first)] / sum * filled.values[static_cast<size_t>(s)][j];
    }
  }
  return out;
}

struct Case {
  int64_t key_dim, head_dim, group, slots, first, last;
};

TEST(CachedAttention, EqualsSoftmaxInFloat64) {
  const Case cases[] = {{1, 1, 1, 1, 0, 1},         {64, 64, 3, 516, 0, 516}, {64, 64, 3, 516, 100, 371},
                        {64, 64, 1, 17, 3, 17},     {20, 36, 5, 300, 7, 290}, {256, 256, 4, 40, 0, 33},
                        {8, 130, 7, 260, 250, 260}, {64, 64, 9, 1000, 0, 999}};
  ForEachTarget([&] {
    for (const Case& c : cases) {
      for (const DType dtype : kDTypes) {
        for (const float spread : {0.5f, 40.0f}) {  // scores of some hundreds: one key takes all
          SCOPED_TRACE(::testing::Message() << Name(dtype) << " Dk " << c.key_dim << " D " << c.head_dim << " group " << c.group
                                            << " slots " << c.first << " to " << c.last << " spread " << spread);
          Random random(5);
          const Filled filled(dtype, c.key_dim, c.head_dim, c.slots, c.last, random, spread);
          std::normal_distribution<float> normal(0.0f, 0.3f);
          std::vector<float> queries(static_cast<size_t>(c.group * c.key_dim));
          for (float& q : queries) q = normal(random);
          const int64_t part_size = c.head_dim + kPartExtra;
          std::vector<float> whole(static_cast<size_t>(c.group * part_size)), left(whole), right(whole);
          for (auto* parts : {&whole, &left, &right}) {
            for (int64_t g = 0; g < c.group; ++g) ClearPart(c.head_dim, parts->data() + g * part_size);
          }
          const int64_t middle = (c.first + c.last) / 2;
          AttendSlots(filled.cache, c.first, c.last, c.group, queries.data(), whole.data());
          AttendSlots(filled.cache, c.first, middle, c.group, queries.data(), left.data());
          AttendSlots(filled.cache, middle, c.last, c.group, queries.data(), right.data());
          for (int64_t g = 0; g < c.group; ++g) {
            const float* query = queries.data() + g * c.key_dim;
            const std::vector<double> expected = Reference(filled, c.first, c.last, query);
            std::vector<float> out(static_cast<size_t>(c.head_dim));
            // A score is a sum of Dk float32 terms; exp passes its absolute error on.
            double largest = 0.0;
            for (int64_t s = c.first; s < c.last; ++s) {
              double magnitude = 0.0;
              for (int64_t i = 0; i < c.key_dim; ++i) {
                magnitude += std::abs(query[i] * filled.keys[static_cast<size_t>(s)][static_cast<size_t>(i)]);
              }
              largest = std::max(largest, magnitude);
            }
            const double tolerance = 0x1p-23 * (64.0 + 8.0 * largest);
            ReadPart(c.head_dim, whole.data() + g * part_size, 1.0f, false, out.data());
            for (size_t j = 0; j < out.size(); ++j) ASSERT_NEAR(out[j], expected[j], tolerance) << "head " << g;
            // Joined pieces, half of it added to what is there.
            JoinParts(c.head_dim, right.data() + g * part_size, left.data() + g * part_size);
            std::fill(out.begin(), out.end(), 1.0f);
            ReadPart(c.head_dim, left.data() + g * part_size, 0.5f, true, out.data());
            for (size_t j = 0; j < out.size(); ++j) ASSERT_NEAR(out[j], 1.0 + 0.5 * expected[j], tolerance) << "head " << g;
          }
        }
      }
    }
  });
}

TEST(CachedAttention, PartsThatSawNothingAddNothing) {
  std::vector<float> part(6), other(6), out = {1, 2, 3, 4};
  ClearPart(4, part.data());
  ClearPart(4, other.data());
  JoinParts(4, other.data(), part.data());
  ReadPart(4, part.data(), 1.0f, true, out.data());
  EXPECT_EQ(out, (std::vector<float>{1, 2, 3, 4}));
  ReadPart(4, part.data(), 1.0f, false, out.data());
  EXPECT_EQ(out, (std::vector<float>{0, 0, 0, 0}));
}

TEST(CachedAttention, LoadsWhatItStored) {
  ForEachTarget([] {
    for (const DType dtype : kDTypes) {
      Random random(6);
      const Filled filled(dtype, 20, 37, 50, 45, random, 1.0f);
      const int64_t first = 5, last = 41;
      std::vector<float> keys(static_cast<size_t>((last - first) * 21), -7.0f),
          values(static_cast<size_t>((last - first) * 40), -7.0f);
      LoadSlots(filled.cache, first, last, keys.data(), 21, values.data(), 40);
      for (int64_t s = first; s < last; ++s) {
        const auto at = static_cast<size_t>(s - first);
        for (size_t i = 0; i < 21; ++i) {
          EXPECT_EQ(keys[at * 21 + i], i < 20 ? filled.keys[static_cast<size_t>(s)][i] : -7.0f);
        }
        for (size_t i = 0; i < 40; ++i) {
          EXPECT_EQ(values[at * 40 + i], i < 37 ? filled.values[static_cast<size_t>(s)][i] : -7.0f);
        }
      }
    }
  });
}

}  // namespace
}  // namespace latte::kernels
