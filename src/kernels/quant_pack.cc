// Repacking of ggml's rows for quant_matmul.cc.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "hwy/base.h"
#include "kernels/quant_layout.h"

namespace latte::kernels {
namespace {

float FloatOf(uint16_t half) {
  const float value = hwy::F32FromF16(hwy::float16_t::FromBits(half));
  if ((half & 0x7C00) != 0x7C00) return value;
  return (half & 0x3FF) != 0 ? NAN : (half & 0x8000) != 0 ? -INFINITY : INFINITY;
}

uint16_t HalfAt(const std::byte* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return bits;
}

// A finite product beyond float16's range, which no real file has, becomes infinite.
uint16_t HalfOf(float value) {
  constexpr float kLargest = 65504.0f;
  if (!(std::abs(value) <= kLargest)) return std::isnan(value) ? 0x7E00 : value < 0.0f ? 0xFC00 : 0x7C00;
  return hwy::BitCastScalar<uint16_t>(hwy::F16FromF32(value));
}

// 32 columns of a row, as a packed format has them.
struct Block {
  uint8_t quants[kQuantBlock];
  uint16_t scales[2];  // the second: of kScalesOf() 2
  uint16_t minima[2];  // likewise
};

uint8_t ByteAt(const std::byte* bytes, int64_t i) { return static_cast<uint8_t>(bytes[i]); }

// Bytes [16]: low halves are columns 0 … 15, high halves 16 … 31.
void ReadHalves(const std::byte* bytes, Block* out) {
  for (int64_t i = 0; i < kQuantBlock / 2; ++i) {
    out->quants[i] = ByteAt(bytes, i) & 15;
    out->quants[i + kQuantBlock / 2] = ByteAt(bytes, i) >> 4;
  }
}

void ReadFifthBits(const std::byte* bytes, Block* out) {
  for (int64_t i = 0; i < kQuantBlock; ++i) {
    out->quants[i] = static_cast<uint8_t>(out->quants[i] | ((ByteAt(bytes, i / 8) >> (i % 8) & 1) << 4));
  }
}

// The scale and minimum, six bits each, of one of a super-block's eight blocks: blocks 4 … 7 have their upper two bits beside
// those of 0 … 3.
void ReadScale6(const std::byte* super, const std::byte* packed, int64_t block, Block* out) {
  const auto at = [&](int64_t i) { return static_cast<int>(ByteAt(packed, i)); };
  const int scale = block < 4 ? at(block) & 63 : (at(block + 4) & 15) | (at(block - 4) >> 6) << 4;
  const int minimum = block < 4 ? at(block + 4) & 63 : at(block + 4) >> 4 | (at(block) >> 6) << 4;
  out->scales[0] = HalfOf(FloatOf(HalfAt(super)) * static_cast<float>(scale));
  out->minima[0] = HalfOf(-FloatOf(HalfAt(super + 2)) * static_cast<float>(minimum));
}

// Bytes [4][32], blocks 2 i in the low halves of row i and 2 i + 1 in the high ones.
void ReadNibbles(const std::byte* bytes, int64_t block, Block* out) {
  for (int64_t i = 0; i < kQuantBlock; ++i) {
    const int both = ByteAt(bytes, block / 2 * 32 + i);
    out->quants[i] = static_cast<uint8_t>(block % 2 == 0 ? both & 15 : both >> 4);
  }
}

constexpr int64_t kSuperBlock = 256;  // columns of K types that share their first scale
constexpr int64_t kBlocksOfSuper = kSuperBlock / kQuantBlock;

constexpr int64_t BlockBytes(RowLayout layout) {
  switch (layout) {
    case RowLayout::kQ4_0:
    case RowLayout::kIQ4_NL:
      return 18;
    case RowLayout::kQ4_1:
      return 20;
    case RowLayout::kQ5_0:
      return 22;
    case RowLayout::kQ5_1:
      return 24;
    case RowLayout::kQ8_0:
      return 34;
    case RowLayout::kQ2_K:
      return 84;
    case RowLayout::kQ3_K:
      return 110;
    case RowLayout::kIQ4_XS:
      return 136;
    case RowLayout::kQ4_K:
      return 144;
    case RowLayout::kQ5_K:
      return 176;
    case RowLayout::kQ6_K:
      return 210;
    default:
      return 0;
  }
}

// Block `index` of a row in ggml's layout (ggml-common.h).
void ReadBlock(RowLayout layout, const std::byte* row, int64_t index, Block* out) {
  const bool super = ColumnStep(layout) == kSuperBlock;
  const int64_t block = index % kBlocksOfSuper;  // within its super-block
  const std::byte* at = row + (super ? index / kBlocksOfSuper : index) * BlockBytes(layout);
  out->minima[0] = 0;
  if (!super) out->scales[0] = HalfAt(at);
  switch (layout) {
    case RowLayout::kQ4_0:
    case RowLayout::kIQ4_NL:
      return ReadHalves(at + 2, out);
    case RowLayout::kQ4_1:
      out->minima[0] = HalfAt(at + 2);
      return ReadHalves(at + 4, out);
    case RowLayout::kQ5_0:
      ReadHalves(at + 6, out);
      return ReadFifthBits(at + 2, out);
    case RowLayout::kQ5_1:
      out->minima[0] = HalfAt(at + 2);
      ReadHalves(at + 8, out);
      return ReadFifthBits(at + 4, out);
    case RowLayout::kQ8_0:
      for (int64_t i = 0; i < kQuantBlock; ++i) out->quants[i] = ByteAt(at + 2, i) ^ 0x80;
      return;
    case RowLayout::kQ2_K:  // pairs [16] of a scale (low half) and a minimum, bits [2][32] of four blocks each, scale, minimum
      for (int64_t i = 0; i < kQuantBlock; ++i) {
        out->quants[i] = static_cast<uint8_t>(ByteAt(at + 16 + block / 4 * 32, i) >> (2 * (block % 4)) & 3);
      }
      for (int64_t i = 0; i < 2; ++i) {
        const int pair = ByteAt(at, 2 * block + i);
        out->scales[i] = HalfOf(FloatOf(HalfAt(at + 80)) * static_cast<float>(pair & 15));
        out->minima[i] = HalfOf(-FloatOf(HalfAt(at + 82)) * static_cast<float>(pair >> 4));
      }
      return;
    case RowLayout::kQ3_K:  // third bits [32] with block in bit `block`, low bits [2][32] of four blocks each, scales [12], scale
      for (int64_t i = 0; i < kQuantBlock; ++i) {
        const int low = ByteAt(at + 32 + block / 4 * 32, i) >> (2 * (block % 4)) & 3;
        out->quants[i] = static_cast<uint8_t>(low | (ByteAt(at, i) >> block & 1) << 2);
      }
      for (int64_t i = 0; i < 2; ++i) {  // of 16 scales, four bits lie as halves of bytes 0 … 7, two more in bytes 8 … 11
        const int64_t j = 2 * block + i;
        const int low = j < 8 ? ByteAt(at + 96, j) & 15 : ByteAt(at + 96, j - 8) >> 4;
        const int high = ByteAt(at + 104, j % 4) >> (2 * (j / 4)) & 3;
        out->scales[i] = HalfOf(FloatOf(HalfAt(at + 108)) * static_cast<float>((low | high << 4) - 32));
      }
      return;
    case RowLayout::kIQ4_XS: {  // scale, the upper two bits of eight scales, their low halves [4], halves [8][16]
      const int low = ByteAt(at + 4, block / 2) >> (4 * (block % 2)) & 15;
      const int high = HalfAt(at + 2) >> (2 * block) & 3;
      out->scales[0] = HalfOf(FloatOf(HalfAt(at)) * static_cast<float>((low | high << 4) - 32));
      return ReadHalves(at + 8 + block * 16, out);
    }
    case RowLayout::kQ4_K:  // scale, minimum, six-bit pairs [12], halves [4][32]
      ReadScale6(at, at + 4, block, out);
      return ReadNibbles(at + 16, block, out);
    case RowLayout::kQ5_K:  // scale, minimum, six-bit pairs [12], fifth bits [32] with block in bit `block`, halves [4][32]
      ReadScale6(at, at + 4, block, out);
      ReadNibbles(at + 48, block, out);
      for (int64_t i = 0; i < kQuantBlock; ++i) {
        out->quants[i] = static_cast<uint8_t>(out->quants[i] | ((ByteAt(at + 16, i) >> block & 1) << 4));
      }
      return;
    case RowLayout::kQ6_K: {  // low bits [2][2][32], high bits [2][32], scales [16], scale; an axis of 2 is 128 columns
      const int64_t half = block / 4, place = block % 4;
      const std::byte* low = at + half * 64 + place % 2 * 32;
      const std::byte* high = at + 128 + half * 32;
      for (int64_t i = 0; i < kQuantBlock; ++i) {
        const int bits = place < 2 ? ByteAt(low, i) & 15 : ByteAt(low, i) >> 4;
        out->quants[i] = static_cast<uint8_t>(bits | (ByteAt(high, i) >> (2 * place) & 3) << 4);
      }
      const float scale = FloatOf(HalfAt(at + 208));
      for (int64_t i = 0; i < 2; ++i) {
        out->scales[i] = HalfOf(scale * static_cast<float>(static_cast<int8_t>(ByteAt(at + 192, 2 * block + i))));
      }
      return;
    }
    default:
      return;
  }
}

constexpr int64_t kHighBits = 256;  // bytes of a block's low bits, in front of the others

void PackBlock(WeightFormat format, const Block& block, std::byte* quants, std::byte* scales) {
  const int64_t bits = kBitsOf(format);
  for (int64_t quad = 0; quad < kQuantBlock / 4; ++quad) {
    for (int64_t i = 0; i < 4; ++i) {
      const auto q = std::byte{block.quants[4 * quad + i]};
      if (bits == 8) {
        quants[quad * 64 + i] = q;
        continue;
      }
      if (bits == 2) {
        quants[quad / 4 * 64 + i] |= q << (2 * (quad % 4));
        continue;
      }
      quants[quad % 4 * 64 + i] |= quad < 4 ? q & std::byte{15} : q << 4;
      std::byte* high = quants + kHighBits;
      if (bits == 5) high[i] |= q >> 4 << quad;
      if (bits == 6) high[quad / 4 * 64 + i] |= q >> 4 << (2 * (quad % 4));
    }
  }
  const auto put = [&](int64_t place, uint16_t half) { std::memcpy(scales + place * kGroupRows * 2, &half, sizeof(half)); };
  for (int64_t i = 0; i < kScalesOf(format); ++i) {
    put(i, block.scales[i]);
    if (kHasMinimum(format)) put(kScalesOf(format) + i, block.minima[i]);
  }
}

Block UnpackBlock(WeightFormat format, const std::byte* quants, const std::byte* scales) {
  Block block{};
  const int64_t bits = kBitsOf(format);
  for (int64_t quad = 0; quad < kQuantBlock / 4; ++quad) {
    for (int64_t i = 0; i < 4; ++i) {
      const std::byte* high = quants + kHighBits;
      std::byte q = quants[(bits == 8 ? quad : bits == 2 ? quad / 4 : quad % 4) * 64 + i];
      if (bits == 2) {
        q = q >> (2 * (quad % 4)) & std::byte{3};
      } else if (bits < 8) {
        q = quad < 4 ? q & std::byte{15} : q >> 4;
      }
      if (bits == 5) q |= (high[i] >> quad & std::byte{1}) << 4;
      if (bits == 6) q |= (high[quad / 4 * 64 + i] >> (2 * (quad % 4)) & std::byte{3}) << 4;
      block.quants[4 * quad + i] = static_cast<uint8_t>(q);
    }
  }
  for (int64_t i = 0; i < kScalesOf(format); ++i) {
    block.scales[i] = HalfAt(scales + i * kGroupRows * 2);
    if (kHasMinimum(format)) block.minima[i] = HalfAt(scales + (kScalesOf(format) + i) * kGroupRows * 2);
  }
  return block;
}

constexpr int64_t FloatBytes(WeightFormat format) { return format == WeightFormat::kFloat32 ? 4 : 2; }
constexpr int64_t FloatStep(WeightFormat format) { return format == WeightFormat::kBFloat16 ? 2 : 1; }  // columns side by side

}  // namespace

int64_t PackedGroupBytes(WeightFormat format, int64_t columns) {
  if (!IsQuantised(format)) return (columns * kGroupRows * FloatBytes(format) + 63) / 64 * 64;
  return (columns / kQuantBlock * (kBlockQuantBytes(format) + 2 * kBlockScales(format)) + 63) / 64 * 64;
}

int64_t UnpackedRowBytes(RowLayout layout, int64_t columns) {
  const WeightFormat format = FormatOf(layout);
  return IsQuantised(format) ? columns / ColumnStep(layout) * BlockBytes(layout) : columns * FloatBytes(format);
}

void PackGroups(const PackedMatrix& matrix, RowLayout layout, const std::byte* rows, int64_t first, int64_t last,
                std::byte* packed) {
  const WeightFormat format = matrix.format;
  const int64_t group_bytes = PackedGroupBytes(format, matrix.columns);
  const int64_t row_bytes = UnpackedRowBytes(layout, matrix.columns);
  const int64_t blocks = matrix.columns / kQuantBlock;
  for (int64_t g = first; g < last; ++g) {
    std::byte* group = packed + g * group_bytes;
    std::memset(group, 0, static_cast<size_t>(group_bytes));
    for (int64_t lane = 0; lane < kGroupRows && g * kGroupRows + lane < matrix.rows; ++lane) {
      const std::byte* row = rows + (g * kGroupRows + lane) * row_bytes;
      if (IsQuantised(format)) {
        std::byte* quants = group + lane * 4;
        std::byte* scales = group + blocks * kBlockQuantBytes(format) + lane * 2;
        for (int64_t b = 0; b < blocks; ++b, quants += kBlockQuantBytes(format), scales += kBlockScales(format) * 2) {
          Block block{};
          ReadBlock(layout, row, b, &block);
          PackBlock(format, block, quants, scales);
        }
        continue;
      }
      const int64_t step = FloatStep(format) * FloatBytes(format);
      for (int64_t i = 0; i < row_bytes / step; ++i) {
        std::memcpy(group + (i * kGroupRows + lane) * step, row + i * step, static_cast<size_t>(step));
      }
    }
  }
}

void UnpackRow(const PackedMatrix& matrix, int64_t row, float* out) {
  const WeightFormat format = matrix.format;
  const std::byte* group = matrix.data + row / kGroupRows * PackedGroupBytes(format, matrix.columns);
  const int64_t lane = row % kGroupRows;
  if (!IsQuantised(format)) {
    const int64_t step = FloatStep(format);
    for (int64_t c = 0; c < matrix.columns; ++c) {
      const std::byte* at = group + ((c / step * kGroupRows + lane) * step + c % step) * FloatBytes(format);
      switch (format) {
        case WeightFormat::kFloat32:
          std::memcpy(out + c, at, 4);
          break;
        case WeightFormat::kFloat16:
          out[c] = FloatOf(HalfAt(at));
          break;
        default:
          out[c] = hwy::F32FromBF16(hwy::bfloat16_t::FromBits(HalfAt(at)));
      }
    }
    return;
  }
  const int64_t blocks = matrix.columns / kQuantBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    const std::byte* scales = group + blocks * kBlockQuantBytes(format) + (b * kBlockScales(format) + lane) * 2;
    const Block block = UnpackBlock(format, group + b * kBlockQuantBytes(format) + lane * 4, scales);
    for (int64_t i = 0; i < kQuantBlock; ++i) {
      const int64_t part = i * kScalesOf(format) / kQuantBlock;
      const float scale = FloatOf(block.scales[part]);
      const int quant = format == WeightFormat::kIQ4_NL ? kIQ4Table[block.quants[i]] : block.quants[i];
      out[b * kQuantBlock + i] = scale * static_cast<float>(quant - kOffsetOf(format)) + FloatOf(block.minima[part]);
    }
  }
}

}  // namespace latte::kernels
