#include "kernels/quant_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quant_matmul.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/load-inl.h"
#include "kernels/quant_layout.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kGroupRows>;
using DI = hn::RebindToSigned<DF>;
using DU8 = hn::Repartition<uint8_t, DF>;
using DI8 = hn::Repartition<int8_t, DF>;
using D16 = hn::Rebind<hwy::float16_t, DF>;
using DBF = hn::Repartition<hwy::bfloat16_t, DF>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;

// Four of a token's quants in every lane.
HWY_INLINE hn::Vec<DI8> Broadcast4(const int8_t* quants) {
  int32_t four;
  std::memcpy(&four, quants, sizeof(four));
  return hn::BitCast(DI8(), hn::Set(DI(), four));
}

HWY_INLINE void StoreSums(VF sum, int64_t rows, float* out) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  if (rows >= static_cast<int64_t>(lanes)) {
    hn::StoreU(sum, df, out);
  } else if (rows > 0) {
    hn::StoreN(sum, df, out, static_cast<size_t>(rows));
  }
}

// What the inner loops share: the lanes [lane, lane + Lanes) of one group, for kTokens tokens.
struct Place {
  const std::byte* group;
  int64_t columns;
  int64_t blocks;
  size_t lane;
  int64_t token;   // the first of a tile
  int64_t tokens;  // real ones from there on
  int64_t rows;    // real ones from this lane on
  float* out;      // of the first token and lane
  int64_t out_stride;
};

// Shifts every byte, by kBits to the left or -kBits to the right; what comes in from its neighbour must be masked.
template <int kBits>
HWY_INLINE hn::Vec<DU8> ShiftBytes(hn::Vec<DU8> v) {
  const hn::Repartition<uint16_t, DU8> d16;
  const DU8 d;
  if constexpr (kBits > 0) return hn::BitCast(d, hn::ShiftLeft<kBits>(hn::BitCast(d16, v)));
  if constexpr (kBits < 0) return hn::BitCast(d, hn::ShiftRight<-kBits>(hn::BitCast(d16, v)));
  return v;
}

// Adds the bits above the fourth to the eight quads of a block.
template <WeightFormat kFormat>
HWY_INLINE void AddHighBits(const uint8_t* high, hn::Vec<DU8>* HWY_RESTRICT w) {
  const DU8 d;
  if constexpr (kBitsOf(kFormat) == 5) {
    const auto bits = hn::LoadU(d, high), fifth = hn::Set(d, uint8_t{0x10});
    w[0] = hn::OrAnd(w[0], ShiftBytes<4>(bits), fifth);
    w[1] = hn::OrAnd(w[1], ShiftBytes<3>(bits), fifth);
    w[2] = hn::OrAnd(w[2], ShiftBytes<2>(bits), fifth);
    w[3] = hn::OrAnd(w[3], ShiftBytes<1>(bits), fifth);
    w[4] = hn::OrAnd(w[4], bits, fifth);
    w[5] = hn::OrAnd(w[5], ShiftBytes<-1>(bits), fifth);
    w[6] = hn::OrAnd(w[6], ShiftBytes<-2>(bits), fifth);
    w[7] = hn::OrAnd(w[7], ShiftBytes<-3>(bits), fifth);
  } else if constexpr (kBitsOf(kFormat) == 6) {
    const auto both = hn::Set(d, uint8_t{0x30});
    for (int64_t plane = 0; plane < 2; ++plane, w += 4) {
      const auto bits = hn::LoadU(d, high + plane * 64);
      w[0] = hn::OrAnd(w[0], ShiftBytes<4>(bits), both);
      w[1] = hn::OrAnd(w[1], ShiftBytes<2>(bits), both);
      w[2] = hn::OrAnd(w[2], bits, both);
      w[3] = hn::OrAnd(w[3], ShiftBytes<-2>(bits), both);
    }
  }
}

template <WeightFormat kFormat, int kTokens>
HWY_INLINE void QuantTile(const Place& at, const Activations& x) {
  const DF df;
  const DI di;
  const DU8 du8;
  const D16 d16;
  constexpr int64_t kQuads = kQuantBlock / 4;
  constexpr int64_t kBytes = kBlockQuantBytes(kFormat);
  constexpr int64_t kScales = kBlockScales(kFormat);
  constexpr int32_t kOffset = kOffsetOf(kFormat);
  constexpr bool kHighBits = kBitsOf(kFormat) > 4 && kBitsOf(kFormat) < 8;
  // One token: the high half of four bits stays where it is, 16 times too large, which costs less than to shift each vector.
  constexpr bool kInPlace = kTokens == 1 && (kFormat == WeightFormat::kQ4_0 || kFormat == WeightFormat::kQ4_1);
  const auto* quants = reinterpret_cast<const uint8_t*>(at.group) + at.lane * 4;
  const auto* scales = reinterpret_cast<const hwy::float16_t*>(at.group + at.blocks * kBytes) + at.lane;
  const auto low = hn::Set(du8, uint8_t{0x0F});

  // A single token's product is bound by memory, and a group is short: what comes behind it is asked for early.
  constexpr int64_t kLines = (kBytes + 2 * kScales + 63) / 64;
  constexpr int64_t kAhead = 4096;
  const std::byte* ahead = at.group + kAhead;
  const int8_t* xq = x.quants + at.token * at.columns;
  const int64_t first = at.token * at.blocks;
  VF sum[kTokens];
  for (int64_t t = 0; t < kTokens; ++t) sum[t] = hn::Zero(df);
  for (int64_t b = 0; b < at.blocks; ++b, quants += kBytes, scales += kScales, xq += kTileTokens * kQuantBlock) {
    const float* xs = x.scales + first + b * kTileTokens;
    hn::Vec<DU8> w[kQuads];
    if constexpr (kFormat == WeightFormat::kQ8_0) {
      for (int64_t i = 0; i < kQuads; ++i) w[i] = hn::LoadU(du8, quants + i * 64);
    } else if constexpr (kBitsOf(kFormat) == 2) {
      const auto two = hn::Set(du8, uint8_t{0x03});
      for (int64_t plane = 0; plane < 2; ++plane) {
        const auto bits = hn::LoadU(du8, quants + plane * 64);
        hn::Vec<DU8>* out = w + plane * 4;
        out[0] = hn::And(bits, two);
        out[1] = hn::And(ShiftBytes<-2>(bits), two);
        out[2] = hn::And(ShiftBytes<-4>(bits), two);
        out[3] = hn::And(ShiftBytes<-6>(bits), two);
      }
    } else {
      for (int64_t i = 0; i < kQuads / 2; ++i) {
        const auto both = hn::LoadU(du8, quants + i * 64);
        w[i] = hn::And(both, low);
        w[kQuads / 2 + i] = kInPlace ? hn::AndNot(low, both) : hn::ShiftRight<4>(both);
      }
      if constexpr (kHighBits) AddHighBits<kFormat>(quants + kQuads / 2 * 64, w);
      if constexpr (kFormat == WeightFormat::kIQ4_NL) {
        const auto table = hn::LoadDup128(du8, kIQ4Table);
        for (int64_t i = 0; i < kQuads; ++i) w[i] = hn::TableLookupBytes(table, w[i]);
      }
    }
    if constexpr (kTokens == 1) {
      for (int64_t line = 0; line < kLines; ++line) hwy::Prefetch(ahead + line * 64);
      ahead += kLines * 64;
    }
    const VF scale = Promote(df, hn::LoadU(d16, scales));
    if constexpr (kScalesOf(kFormat) == 2) {
      const VF second_scale = Promote(df, hn::LoadU(d16, scales + kGroupRows));
      VF minimum = hn::Zero(df), second_minimum = hn::Zero(df);
      if constexpr (kHasMinimum(kFormat)) {
        minimum = Promote(df, hn::LoadU(d16, scales + 2 * kGroupRows));
        second_minimum = Promote(df, hn::LoadU(d16, scales + 3 * kGroupRows));
      }
      for (int64_t t = 0; t < kTokens; ++t) {
        const int8_t* q = xq + t * kQuantBlock;
        const int32_t sum_of_first = x.half_sums[first + b * kTileTokens + t];
        const int32_t sum_of_second = x.sums[first + b * kTileTokens + t] - sum_of_first;
        VI dot = hn::Set(di, -kOffset * sum_of_first);
        VI second = hn::Set(di, -kOffset * sum_of_second);
        for (int64_t i = 0; i < kQuads / 2; ++i) {
          dot = hn::SumOfMulQuadAccumulate(di, w[i], Broadcast4(q + 4 * i), dot);
          second = hn::SumOfMulQuadAccumulate(di, w[kQuads / 2 + i], Broadcast4(q + 16 + 4 * i), second);
        }
        VF both = hn::MulAdd(hn::ConvertTo(df, dot), scale, hn::Mul(hn::ConvertTo(df, second), second_scale));
        if constexpr (kHasMinimum(kFormat)) {
          both = hn::MulAdd(minimum, hn::Set(df, static_cast<float>(sum_of_first)), both);
          both = hn::MulAdd(second_minimum, hn::Set(df, static_cast<float>(sum_of_second)), both);
        }
        sum[t] = hn::MulAdd(both, hn::Set(df, xs[t]), sum[t]);
      }
      continue;
    }
    for (int64_t t = 0; t < kTokens; ++t) {
      const int8_t* q = xq + t * kQuantBlock;
      VI dot = kOffset == 0 ? hn::Zero(di) : hn::Set(di, -kOffset * x.sums[first + b * kTileTokens + t]);
      if constexpr (kTokens == 1) {
        VI other = hn::Zero(di);
        for (int64_t i = 0; i < kQuads / 2; ++i) {
          dot = hn::SumOfMulQuadAccumulate(di, w[i], Broadcast4(q + 4 * i), dot);
          other = hn::SumOfMulQuadAccumulate(di, w[kQuads / 2 + i], Broadcast4(q + 16 + 4 * i), other);
        }
        dot = hn::Add(dot, kInPlace ? hn::ShiftRight<4>(other) : other);
      } else {
        for (int64_t i = 0; i < kQuads; ++i) dot = hn::SumOfMulQuadAccumulate(di, w[i], Broadcast4(q + 4 * i), dot);
      }
      sum[t] = hn::MulAdd(hn::ConvertTo(df, dot), hn::Mul(scale, hn::Set(df, xs[t])), sum[t]);
    }
    if constexpr (kHasMinimum(kFormat)) {
      const VF minimum = Promote(df, hn::LoadU(d16, scales + kGroupRows));
      const float* xm = x.scaled_sums + first + b * kTileTokens;
      for (int64_t t = 0; t < kTokens; ++t) sum[t] = hn::MulAdd(minimum, hn::Set(df, xm[t]), sum[t]);
    }
  }
  for (int64_t t = 0; t < std::min<int64_t>(kTokens, at.tokens); ++t) StoreSums(sum[t], at.rows, at.out + t * at.out_stride);
}

template <int kTokens>
HWY_INLINE void BFloatTile(const Place& at, const Activations& x) {
  const DF df;
  const DBF dbf;
  const auto* weights = reinterpret_cast<const hwy::bfloat16_t*>(at.group) + at.lane * 2;
  VF sum[kTokens], odd[kTokens];
  for (int64_t t = 0; t < kTokens; ++t) sum[t] = odd[t] = hn::Zero(df);
  const uint16_t* row = x.bfloats + at.token * at.columns;
  const auto step = [&](int64_t c, VF* HWY_RESTRICT sums) {
    const auto w = hn::LoadU(dbf, weights + c * kGroupRows);
    for (int64_t t = 0; t < kTokens; ++t) {
      uint32_t two;
      std::memcpy(&two, row + c * kTileTokens + t * 2, sizeof(two));
      const auto v = hn::BitCast(dbf, hn::Set(hn::RebindToUnsigned<DF>(), two));
#if HWY_TARGET == HWY_AVX3_ZEN4 || HWY_TARGET == HWY_AVX3_SPR
      VF unused = hn::Zero(df);
      sums[t] = hn::ReorderWidenMulAccumulate(df, w, v, sums[t], unused);
#else
      sums[t] = hn::MulAdd(hn::PromoteEvenTo(df, w), hn::PromoteEvenTo(df, v), sums[t]);
      sums[t] = hn::MulAdd(hn::PromoteOddTo(df, w), hn::PromoteOddTo(df, v), sums[t]);
#endif
    }
  };
  int64_t c = 0;
  if constexpr (kTokens == 1) {  // four sums, or each product would wait for the one before
    VF third[1] = {hn::Zero(df)}, fourth[1] = {hn::Zero(df)};
    for (; c + 8 <= at.columns; c += 8) {
      step(c, sum);
      step(c + 2, odd);
      step(c + 4, third);
      step(c + 6, fourth);
    }
    sum[0] = hn::Add(hn::Add(sum[0], odd[0]), hn::Add(third[0], fourth[0]));
  }
  for (; c < at.columns; c += 2) step(c, sum);
  for (int64_t t = 0; t < std::min<int64_t>(kTokens, at.tokens); ++t) StoreSums(sum[t], at.rows, at.out + t * at.out_stride);
}

template <class T, int kTokens>
HWY_INLINE void FloatTile(const Place& at, const Activations& x) {
  const DF df;
  const auto* weights = reinterpret_cast<const T*>(at.group) + at.lane;
  const float* row = x.values + at.token * at.columns;
  const auto step = [&](int64_t c, VF(&sums)[kTokens]) HWY_ATTR {
    VF w;
    if constexpr (hwy::IsSame<T, float>()) {
      w = hn::LoadU(df, weights + c * kGroupRows);
    } else {
      w = Promote(df, hn::LoadU(D16(), weights + c * kGroupRows));
    }
    for (int64_t t = 0; t < kTokens; ++t) sums[t] = hn::MulAdd(w, hn::Set(df, row[c * kTileTokens + t]), sums[t]);
  };
  // Sums of blocks are added up, rather than one sum of all: models have activations a thousand times as large as the others, and
  // each term that follows such a one would be rounded to its precision.
  constexpr int64_t kBlock = 32;
  VF sum[kTokens];
  for (int64_t t = 0; t < kTokens; ++t) sum[t] = hn::Zero(df);
  for (int64_t begin = 0; begin < at.columns; begin += kBlock) {
    const int64_t end = std::min(at.columns, begin + kBlock);
    VF even[kTokens], odd[kTokens];
    for (int64_t t = 0; t < kTokens; ++t) even[t] = odd[t] = hn::Zero(df);
    int64_t c = begin;
    if constexpr (kTokens <= 2) {  // or each product would wait for the one before
      for (; c + 2 <= end; c += 2) {
        step(c, even);
        step(c + 1, odd);
      }
    }
    for (; c < end; ++c) step(c, even);
    for (int64_t t = 0; t < kTokens; ++t) sum[t] = hn::Add(sum[t], kTokens <= 2 ? hn::Add(even[t], odd[t]) : even[t]);
  }
  for (int64_t t = 0; t < std::min<int64_t>(kTokens, at.tokens); ++t) StoreSums(sum[t], at.rows, at.out + t * at.out_stride);
}

template <WeightFormat kFormat, int kTokens>
HWY_INLINE void Tile(const Place& at, const Activations& x) {
  if constexpr (IsQuantised(kFormat)) {
    QuantTile<kFormat, kTokens>(at, x);
  } else if constexpr (kFormat == WeightFormat::kBFloat16) {
    BFloatTile<kTokens>(at, x);
  } else if constexpr (kFormat == WeightFormat::kFloat16) {
    FloatTile<hwy::float16_t, kTokens>(at, x);
  } else {
    FloatTile<float, kTokens>(at, x);
  }
}

template <WeightFormat kFormat>
void Product(const PackedMatrix& matrix, const Activations& x, int64_t first_token, int64_t last_token, int64_t first_group,
             int64_t last_group, float* out, int64_t out_stride) {
  const int64_t group_bytes = PackedGroupBytes(kFormat, matrix.columns);
  const size_t lanes = hn::Lanes(DF());
  for (int64_t g = first_group; g < last_group; ++g) {
    for (size_t lane = 0; lane < kGroupRows; lane += lanes) {
      const int64_t row = g * kGroupRows + static_cast<int64_t>(lane);
      Place at{matrix.data + g * group_bytes,
               matrix.columns,
               matrix.columns / kQuantBlock,
               lane,
               first_token,
               last_token - first_token,
               matrix.rows - row,
               out + row,
               out_stride};
      for (; at.token < last_token; at.token += kTileTokens, at.out += kTileTokens * out_stride) {
        at.tokens = last_token - at.token;
        switch (at.tokens) {
          case 1:
            Tile<kFormat, 1>(at, x);
            break;
          case 2:
            Tile<kFormat, 2>(at, x);
            break;
          case 3:
          case 4:
            Tile<kFormat, 4>(at, x);
            break;
          default:
            Tile<kFormat, 8>(at, x);
        }
      }
    }
  }
}

void MatMul(const PackedMatrix& matrix, const Activations& x, int64_t first_token, int64_t last_token, int64_t first_group,
            int64_t last_group, float* out, int64_t out_stride) {
  const auto run = [&](auto product) { product(matrix, x, first_token, last_token, first_group, last_group, out, out_stride); };
  switch (matrix.format) {
    case WeightFormat::kQ4_0:
      return run(Product<WeightFormat::kQ4_0>);
    case WeightFormat::kQ4_1:
      return run(Product<WeightFormat::kQ4_1>);
    case WeightFormat::kQ5_0:
      return run(Product<WeightFormat::kQ5_0>);
    case WeightFormat::kQ5_1:
      return run(Product<WeightFormat::kQ5_1>);
    case WeightFormat::kIQ4_NL:
      return run(Product<WeightFormat::kIQ4_NL>);
    case WeightFormat::kQ2_K:
      return run(Product<WeightFormat::kQ2_K>);
    case WeightFormat::kQ3_K:
      return run(Product<WeightFormat::kQ3_K>);
    case WeightFormat::kQ6_K:
      return run(Product<WeightFormat::kQ6_K>);
    case WeightFormat::kQ8_0:
      return run(Product<WeightFormat::kQ8_0>);
    case WeightFormat::kBFloat16:
      return run(Product<WeightFormat::kBFloat16>);
    case WeightFormat::kFloat16:
      return run(Product<WeightFormat::kFloat16>);
    case WeightFormat::kFloat32:
      return run(Product<WeightFormat::kFloat32>);
  }
}

void Quantize(const float* x, int64_t token, int64_t first, int64_t last, const Activations& out) {
  const DF df;
  const DI di;
  const hn::Rebind<int8_t, DF> d8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const int64_t tile_blocks = token / kTileTokens * (out.columns / kQuantBlock);
  for (int64_t b = first / kQuantBlock; b < last / kQuantBlock; ++b, x += kQuantBlock) {
    const int64_t place = (tile_blocks + b) * kTileTokens + token % kTileTokens;
    VF max = hn::Zero(df);
    for (int64_t i = 0; i < kQuantBlock; i += lanes) max = hn::Max(max, hn::Abs(hn::LoadU(df, x + i)));
    const float largest = hn::ReduceMax(df, max);
    const VF inverse = hn::Set(df, largest > 0.0f ? 127.0f / largest : 0.0f);
    VI sum = hn::Zero(di);
    for (int64_t i = 0; i < kQuantBlock; i += lanes) {
      if (i == kQuantBlock / 2 && out.half_sums != nullptr) out.half_sums[place] = hn::ReduceSum(di, sum);
      // What isn't a number becomes one: a sum of 8-bit numbers fits into 32 bits.
      const VI nearest = hn::NearestInt(hn::Mul(hn::LoadU(df, x + i), inverse));
      const VI q = hn::Min(hn::Max(nearest, hn::Set(di, -127)), hn::Set(di, 127));
      sum = hn::Add(sum, q);
      hn::StoreU(hn::DemoteTo(d8, q), d8, out.quants + place * kQuantBlock + i);
    }
    out.scales[place] = largest / 127.0f;
    out.sums[place] = hn::ReduceSum(di, sum);
    out.scaled_sums[place] = out.scales[place] * static_cast<float>(out.sums[place]);
  }
}

void RoundToBFloat(const float* x, int64_t token, int64_t first, int64_t last, const Activations& out) {
  const DF df;
  const hn::Rebind<hwy::bfloat16_t, DF> dbf;
  uint16_t rounded[kGroupRows];
  uint16_t* tile = out.bfloats + token / kTileTokens * kTileTokens * out.columns + token % kTileTokens * 2;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  for (int64_t c = first; c < last; c += lanes, x += lanes) {
    const int64_t n = std::min(lanes, last - c);
    hn::StoreU(hn::DemoteTo(dbf, hn::LoadN(df, x, static_cast<size_t>(n))), dbf, reinterpret_cast<hwy::bfloat16_t*>(rounded));
    for (int64_t i = 0; i < n; i += 2) std::memcpy(tile + (c + i) * kTileTokens, rounded + i, 4);
  }
}

void Pack(ActivationForm form, const float* x, int64_t token, int64_t first, int64_t last, const Activations& out) {
  switch (form) {
    case ActivationForm::kInt8:
      return Quantize(x, token, first, last, out);
    case ActivationForm::kBFloat16:
      return RoundToBFloat(x, token, first, last, out);
    case ActivationForm::kFloat32:
      float* tile = out.values + token / kTileTokens * kTileTokens * out.columns + token % kTileTokens;
      for (int64_t c = first; c < last; ++c) tile[c * kTileTokens] = x[c - first];
  }
}

}  // namespace
}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latte::kernels {
namespace {

HWY_EXPORT(MatMul);
HWY_EXPORT(Pack);

}  // namespace

void PackActivations(ActivationForm form, const float* x, int64_t token, int64_t first, int64_t last, const Activations& out) {
  HWY_DYNAMIC_DISPATCH(Pack)(form, x, token, first, last, out);
}

void MatMulPacked(const PackedMatrix& matrix, const Activations& x, int64_t first_token, int64_t last_token, int64_t first_group,
                  int64_t last_group, float* out, int64_t out_stride) {
  HWY_DYNAMIC_DISPATCH(MatMul)(matrix, x, first_token, last_token, first_group, last_group, out, out_stride);
}

}  // namespace latte::kernels
#endif
