#include "kernels/cached_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cached_attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include "hwy/highway.h"
#include "kernels/load-inl.h"
#include "kernels/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kCacheBlock>;
using VF = hn::Vec<DF>;

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int64_t kSlotsTogether = 256;  // whose scores are kept

template <class T>
HWY_INLINE VF LoadAs(DF df, const T* from) {
  if constexpr (hwy::IsSame<T, float>()) {
    return hn::LoadU(df, from);
  } else {
    return Promote(df, hn::LoadU(hn::Rebind<T, DF>(), from));
  }
}

template <class T>
HWY_INLINE VF LoadSomeAs(DF df, const T* from, size_t n) {
  if constexpr (hwy::IsSame<T, float>()) {
    return hn::LoadN(df, from, n);
  } else {
    return Promote(df, hn::LoadN(hn::Rebind<T, DF>(), from, n));
  }
}

// Scores of the slots of whole blocks [first_block, last_block) by kGroup queries: scores[g * kSlotsTogether + …].
template <class T, int kGroup>
HWY_INLINE void Scores(const KeyValueCache& cache, int64_t first_block, int64_t last_block, const float* queries, float* scores) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const int64_t dim = cache.key_dim;
  const T* keys = static_cast<const T*>(cache.keys) + first_block * dim * kCacheBlock;
  const int64_t vectors = (last_block - first_block) * (kCacheBlock / lanes);
  const auto start = [&](int64_t v) {
    const int64_t slot = v * lanes;
    return keys + slot / kCacheBlock * dim * kCacheBlock + slot % kCacheBlock;
  };
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2) {
    const T* left = start(v);
    const T* right = start(v + 1);
    VF sum[kGroup], other[kGroup];
    for (int g = 0; g < kGroup; ++g) sum[g] = other[g] = hn::Zero(df);
    for (int64_t i = 0; i < dim; ++i) {
      const VF a = LoadAs(df, left + i * kCacheBlock);
      const VF b = LoadAs(df, right + i * kCacheBlock);
      for (int g = 0; g < kGroup; ++g) {
        const VF q = hn::Set(df, queries[g * dim + i]);
        sum[g] = hn::MulAdd(q, a, sum[g]);
        other[g] = hn::MulAdd(q, b, other[g]);
      }
    }
    for (int g = 0; g < kGroup; ++g) {
      hn::StoreU(sum[g], df, scores + g * kSlotsTogether + v * lanes);
      hn::StoreU(other[g], df, scores + g * kSlotsTogether + (v + 1) * lanes);
    }
  }
  if (v < vectors) {
    const T* left = start(v);
    VF sum[kGroup];
    for (int g = 0; g < kGroup; ++g) sum[g] = hn::Zero(df);
    for (int64_t i = 0; i < dim; ++i) {
      const VF a = LoadAs(df, left + i * kCacheBlock);
      for (int g = 0; g < kGroup; ++g) sum[g] = hn::MulAdd(hn::Set(df, queries[g * dim + i]), a, sum[g]);
    }
    for (int g = 0; g < kGroup; ++g) hn::StoreU(sum[g], df, scores + g * kSlotsTogether + v * lanes);
  }
}

// Turns n scores (padded to whole vectors by -inf) into weights, and rescales the part to the new maximum.
HWY_INLINE void Weigh(int64_t n, float* scores, int64_t head_dim, float* part) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  VF most = hn::Set(df, part[head_dim + 1]);
  for (int64_t i = 0; i < n; i += lanes) most = hn::Max(most, hn::LoadU(df, scores + i));
  const float max = hn::ReduceMax(df, most);
  const float old = part[head_dim + 1];
  if (max != old) {
    const float factor = old == kMinusInf ? 0.0f : std::exp(old - max);
    for (int64_t j = 0; j <= head_dim; ++j) part[j] *= factor;
    part[head_dim + 1] = max;
  }
  if (max == kMinusInf) {  // every score is: nothing to weigh, and -inf - -inf isn't a number
    std::fill_n(scores, n, 0.0f);
    return;
  }
  const VF subtract = hn::Set(df, max);
  VF sum = hn::Zero(df);
  ForEachExp(
      df, static_cast<size_t>((n + lanes - 1) / lanes * lanes),
      [&](size_t i) HWY_ATTR { return hn::Sub(hn::LoadU(df, scores + i), subtract); },
      [&](size_t i, VF e) HWY_ATTR {
        hn::StoreU(e, df, scores + i);
        sum = hn::Add(sum, e);
      });
  part[head_dim] += hn::ReduceSum(df, sum);
}

// parts[g] += weights · values of n slots from `values` on, for a tile of kVectors vectors of the values' channels.
template <class T, int kGroup, int kVectors>
HWY_INLINE void ValuesTile(const T* values, int64_t stride, int64_t n, const float* weights, float* parts, int64_t part_stride) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  VF sum[kGroup][kVectors];
  for (int g = 0; g < kGroup; ++g) {
    for (int j = 0; j < kVectors; ++j) sum[g][j] = hn::LoadU(df, parts + g * part_stride + j * lanes);
  }
  for (int64_t s = 0; s < n; ++s, values += stride) {
    VF row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = LoadAs(df, values + j * lanes);
    for (int g = 0; g < kGroup; ++g) {
      const VF w = hn::Set(df, weights[g * kSlotsTogether + s]);
      for (int j = 0; j < kVectors; ++j) sum[g][j] = hn::MulAdd(w, row[j], sum[g][j]);
    }
  }
  for (int g = 0; g < kGroup; ++g) {
    for (int j = 0; j < kVectors; ++j) hn::StoreU(sum[g][j], df, parts + g * part_stride + j * lanes);
  }
}

template <class T, int kGroup>
HWY_INLINE void AddValues(const KeyValueCache& cache, int64_t first, int64_t n, const float* weights, float* parts) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const int64_t dim = cache.head_dim;
  const int64_t part_stride = dim + kPartExtra;
  const T* values = static_cast<const T*>(cache.values) + first * dim;
  int64_t j = 0;
  for (; j + 4 * lanes <= dim; j += 4 * lanes) ValuesTile<T, kGroup, 4>(values + j, dim, n, weights, parts + j, part_stride);
  for (; j + lanes <= dim; j += lanes) ValuesTile<T, kGroup, 1>(values + j, dim, n, weights, parts + j, part_stride);
  if (j == dim) return;
  const size_t rest = static_cast<size_t>(dim - j);
  for (int g = 0; g < kGroup; ++g) {
    VF sum = hn::LoadN(df, parts + g * part_stride + j, rest);
    for (int64_t s = 0; s < n; ++s) {
      sum = hn::MulAdd(hn::Set(df, weights[g * kSlotsTogether + s]), LoadSomeAs(df, values + s * dim + j, rest), sum);
    }
    hn::StoreN(sum, df, parts + g * part_stride + j, rest);
  }
}

template <class T, int kGroup>
void AttendGroup(const KeyValueCache& cache, int64_t first, int64_t last, const float* queries, float* parts) {
  HWY_ALIGN float scores[kGroup * kSlotsTogether];
  while (first < last) {
    const int64_t block = first / kCacheBlock;
    const int64_t end = std::min(last, block * kCacheBlock + kSlotsTogether);
    const int64_t end_block = (end + kCacheBlock - 1) / kCacheBlock;
    Scores<T, kGroup>(cache, block, end_block, queries, scores);
    const int64_t skip = first - block * kCacheBlock;
    const int64_t columns = (end_block - block) * kCacheBlock;
    for (int g = 0; g < kGroup; ++g) {
      float* row = scores + g * kSlotsTogether;
      std::fill(row, row + skip, kMinusInf);
      std::fill(row + (end - block * kCacheBlock), row + columns, kMinusInf);
      Weigh(columns, row, cache.head_dim, parts + g * (cache.head_dim + kPartExtra));
    }
    AddValues<T, kGroup>(cache, first, end - first, scores + skip, parts);
    first = end;
  }
}

template <class T>
void AttendAs(const KeyValueCache& cache, int64_t first, int64_t last, int64_t group, const float* queries, float* parts) {
  while (group > 0) {
    const int64_t some = group == 4 ? 4 : group == 2 ? 2 : group == 1 ? 1 : 3;
    switch (some) {
      case 1:
        AttendGroup<T, 1>(cache, first, last, queries, parts);
        break;
      case 2:
        AttendGroup<T, 2>(cache, first, last, queries, parts);
        break;
      case 3:
        AttendGroup<T, 3>(cache, first, last, queries, parts);
        break;
      default:
        AttendGroup<T, 4>(cache, first, last, queries, parts);
    }
    group -= some;
    queries += some * cache.key_dim;
    parts += some * (cache.head_dim + kPartExtra);
  }
}

void Attend(const KeyValueCache& cache, int64_t first, int64_t last, int64_t group, const float* queries, float* parts) {
  switch (cache.dtype) {
    case DType::kFloat32:
      return AttendAs<float>(cache, first, last, group, queries, parts);
    case DType::kBFloat16:
      return AttendAs<hwy::bfloat16_t>(cache, first, last, group, queries, parts);
    case DType::kFloat16:
      return AttendAs<hwy::float16_t>(cache, first, last, group, queries, parts);
  }
}

template <class T>
HWY_INLINE void StoreAs(const KeyValueCache& cache, int64_t slot, const float* key, const float* value) {
  T* keys = static_cast<T*>(cache.keys) + slot / kCacheBlock * cache.key_dim * kCacheBlock + slot % kCacheBlock;
  const int64_t chunk = kCacheBlock;
  for (int64_t i = 0; i < cache.key_dim; i += chunk) {
    const int64_t n = std::min(chunk, cache.key_dim - i);
    HWY_ALIGN T narrow[2 * kCacheBlock];  // room for a whole vector of the widest type
    StoreRow(DF(), cache.dtype, key + i, static_cast<size_t>(n), narrow, 0);
    for (int64_t j = 0; j < n; ++j) hwy::CopySameSize(&narrow[j], &keys[(i + j) * kCacheBlock]);
  }
  StoreRow(DF(), cache.dtype, value, static_cast<size_t>(cache.head_dim), cache.values, slot * cache.head_dim);
}

void Store(const KeyValueCache& cache, int64_t slot, const float* key, const float* value) {
  switch (cache.dtype) {
    case DType::kFloat32:
      return StoreAs<float>(cache, slot, key, value);
    case DType::kBFloat16:
      return StoreAs<hwy::bfloat16_t>(cache, slot, key, value);
    case DType::kFloat16:
      return StoreAs<hwy::float16_t>(cache, slot, key, value);
  }
}

void Round(DType dtype, int64_t n, float* x) {
  if (dtype == DType::kFloat32) return;
  const DF df;
  for (int64_t i = 0; i < n; i += kCacheBlock) {
    HWY_ALIGN uint16_t narrow[2 * kCacheBlock];
    const size_t count = static_cast<size_t>(std::min(kCacheBlock, n - i));
    StoreRow(df, dtype, x + i, count, narrow, 0);
    const size_t lanes = hn::Lanes(df);
    HWY_ALIGN float wide[kCacheBlock];
    LoadRow(df, dtype, narrow, 0, count, wide, (count + lanes - 1) / lanes * lanes);
    std::copy_n(wide, count, x + i);
  }
}

template <class T>
HWY_INLINE void LoadAsRows(const KeyValueCache& cache, int64_t first, int64_t last, float* keys, int64_t key_stride,
                           float* values, int64_t value_stride) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const int64_t dim = cache.key_dim;
  for (int64_t block = first / kCacheBlock; block * kCacheBlock < last; ++block) {
    const T* from = static_cast<const T*>(cache.keys) + block * dim * kCacheBlock;
    const int64_t begin = std::max(first, block * kCacheBlock);
    const int64_t end = std::min(last, (block + 1) * kCacheBlock);
    for (int64_t i = 0; i < dim; ++i) {
      HWY_ALIGN float column[kCacheBlock];
      for (int64_t j = 0; j < kCacheBlock; j += lanes) hn::Store(LoadAs(df, from + i * kCacheBlock + j), df, column + j);
      for (int64_t s = begin; s < end; ++s) keys[(s - first) * key_stride + i] = column[s - block * kCacheBlock];
    }
  }
  for (int64_t s = first; s < last; ++s) {
    const T* from = static_cast<const T*>(cache.values) + s * cache.head_dim;
    float* to = values + (s - first) * value_stride;
    int64_t j = 0;
    for (; j + lanes <= cache.head_dim; j += lanes) hn::StoreU(LoadAs(df, from + j), df, to + j);
    if (j < cache.head_dim) {
      const size_t rest = static_cast<size_t>(cache.head_dim - j);
      hn::StoreN(LoadSomeAs(df, from + j, rest), df, to + j, rest);
    }
  }
}

void LoadRows(const KeyValueCache& cache, int64_t first, int64_t last, float* keys, int64_t key_stride, float* values,
              int64_t value_stride) {
  switch (cache.dtype) {
    case DType::kFloat32:
      return LoadAsRows<float>(cache, first, last, keys, key_stride, values, value_stride);
    case DType::kBFloat16:
      return LoadAsRows<hwy::bfloat16_t>(cache, first, last, keys, key_stride, values, value_stride);
    case DType::kFloat16:
      return LoadAsRows<hwy::float16_t>(cache, first, last, keys, key_stride, values, value_stride);
  }
}

}  // namespace
}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {

HWY_EXPORT(Attend);
HWY_EXPORT(Store);
HWY_EXPORT(LoadRows);
HWY_EXPORT(Round);

void StoreSlot(const KeyValueCache& cache, int64_t slot, const float* key, const float* value) {
  HWY_DYNAMIC_DISPATCH(Store)(cache, slot, key, value);
}

void RoundRow(DType dtype, int64_t n, float* x) { HWY_DYNAMIC_DISPATCH(Round)(dtype, n, x); }

void LoadSlots(const KeyValueCache& cache, int64_t first, int64_t last, float* keys, int64_t key_stride, float* values,
               int64_t value_stride) {
  HWY_DYNAMIC_DISPATCH(LoadRows)(cache, first, last, keys, key_stride, values, value_stride);
}

void ClearPart(int64_t head_dim, float* part) {
  std::fill_n(part, head_dim + 1, 0.0f);
  part[head_dim + 1] = -std::numeric_limits<float>::infinity();
}

void AttendSlots(const KeyValueCache& cache, int64_t first, int64_t last, int64_t group, const float* queries, float* parts) {
  HWY_DYNAMIC_DISPATCH(Attend)(cache, first, last, group, queries, parts);
}

void JoinParts(int64_t head_dim, const float* other, float* part) {
  const float max = std::max(part[head_dim + 1], other[head_dim + 1]);
  if (std::isinf(max)) return;
  const float keep = std::exp(part[head_dim + 1] - max);
  const float take = std::exp(other[head_dim + 1] - max);
  for (int64_t j = 0; j <= head_dim; ++j) part[j] = keep * part[j] + take * other[j];
  part[head_dim + 1] = max;
}

void ReadPart(int64_t head_dim, const float* part, float share, bool add, float* out) {
  const float scale = part[head_dim] > 0.0f ? share / part[head_dim] : 0.0f;
  for (int64_t j = 0; j < head_dim; ++j) out[j] = scale * part[j] + (add ? out[j] : 0.0f);
}

}  // namespace latte::kernels
#endif
