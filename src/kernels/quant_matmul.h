// Products of activations with weight matrices in ggml's block formats, for inference: out[t, r] = Σ_c x[t, c] w[r, c].
//
// A matrix is repacked once. Rows go in groups of kGroupRows that lie side by side in a vector's lanes, so that neither a product
// of one token (bound by memory) nor one of many (bound by arithmetic) ever sums across lanes. Within a group the quants of all
// columns come first, then the scales:
//   quants: blocks of 32 columns. 8 bits: byte [quad][row][4], columns 4 quad … 4 quad + 3. Fewer: their low 4 bits as byte
//           [quad < 4][row][4], its low half columns 4 quad …, its high half columns 16 + 4 quad …; then the fifth bits, byte
//           [row][4] with quad in bit `quad`, or the fifth and sixth, byte [quad / 4][row][4] with quad in bits 2 (quad % 4) …
//           Two bits lie as those last ones do, alone.
//   scales: float16 [block][row]; formats with minima: [block][scale, minimum][row]; with two scales, of columns 0 … 15 and
//           16 … 31: [block][2][row], and behind them as many minima
// Float formats: bfloat16 [pair of columns][row][2], float16 and float32 [column][row].
// Rows that fill up the last group are zero. Groups start at multiples of 64 bytes.
//
// Quantised formats meet activations quantised to 8 bits in blocks of 32, as ggml does; bfloat16 meets bfloat16; sums are exact
// within a block and float32 across blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace latte::kernels {

constexpr int64_t kGroupRows = 16;
constexpr int64_t kQuantBlock = 32;  // columns that share a scale

// How a row lies in ggml's files.
enum class RowLayout : uint8_t {
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kIQ4_NL,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_XS,
  kBFloat16,
  kFloat16,
  kFloat32
};

// How it is packed. Names are those of ggml's first type of that form: _0 is scale * (quant - offset), _1 scale * quant +
// minimum, kQ3_K (in four bits) and kQ6_K like _0 and kQ2_K like _1 with a scale for 16 columns, kIQ4_NL scale * (a table's
// entry).
enum class WeightFormat : uint8_t {
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kIQ4_NL,
  kQ2_K,
  kQ3_K,
  kQ6_K,
  kQ8_0,
  kBFloat16,
  kFloat16,
  kFloat32
};

// The scales and minima of K types and IQ4_XS, products of two numbers, are rounded to float16, by half a unit; all else stays
// exact.
constexpr WeightFormat FormatOf(RowLayout layout) {
  switch (layout) {
    case RowLayout::kQ4_0:
      return WeightFormat::kQ4_0;
    case RowLayout::kQ4_1:
    case RowLayout::kQ4_K:
      return WeightFormat::kQ4_1;
    case RowLayout::kQ5_0:
      return WeightFormat::kQ5_0;
    case RowLayout::kQ5_1:
    case RowLayout::kQ5_K:
      return WeightFormat::kQ5_1;
    case RowLayout::kIQ4_NL:
    case RowLayout::kIQ4_XS:
      return WeightFormat::kIQ4_NL;
    case RowLayout::kQ2_K:
      return WeightFormat::kQ2_K;
    case RowLayout::kQ3_K:
      return WeightFormat::kQ3_K;
    case RowLayout::kQ6_K:
      return WeightFormat::kQ6_K;
    case RowLayout::kQ8_0:
      return WeightFormat::kQ8_0;
    case RowLayout::kBFloat16:
      return WeightFormat::kBFloat16;
    case RowLayout::kFloat16:
      return WeightFormat::kFloat16;
    case RowLayout::kFloat32:
      break;
  }
  return WeightFormat::kFloat32;
}

constexpr bool IsQuantised(WeightFormat format) { return format <= WeightFormat::kQ8_0; }
// Whether a scale is of 16 columns, so that products need Activations::half_sums.
constexpr bool HasHalfScales(WeightFormat format) {
  return format == WeightFormat::kQ2_K || format == WeightFormat::kQ3_K || format == WeightFormat::kQ6_K;
}

// A multiple of this many columns is needed.
constexpr int64_t ColumnStep(RowLayout layout) {
  if (layout >= RowLayout::kQ2_K && layout <= RowLayout::kIQ4_XS) return 256;
  const WeightFormat format = FormatOf(layout);
  return IsQuantised(format) ? kQuantBlock : format == WeightFormat::kBFloat16 ? 2 : 1;
}

struct PackedMatrix {
  WeightFormat format = WeightFormat::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;              // a multiple of the layout's ColumnStep()
  const std::byte* data = nullptr;  // PackedBytes(), aligned to 64

  int64_t groups() const { return (rows + kGroupRows - 1) / kGroupRows; }
};

int64_t PackedGroupBytes(WeightFormat format, int64_t columns);
int64_t UnpackedRowBytes(RowLayout layout, int64_t columns);

// Packs groups [first, last) of a matrix in FormatOf(layout) whose rows lie at `rows` in that layout (little-endian, no alignment
// needed) into `packed`, the whole matrix's memory.
void PackGroups(const PackedMatrix& matrix, RowLayout layout, const std::byte* rows, int64_t first, int64_t last,
                std::byte* packed);

// One row as float32 [columns], as ggml would dequantise it but for the rounding that FormatOf() tells of.
void UnpackRow(const PackedMatrix& matrix, int64_t row, float* out);

// What a format's products read activations as.
enum class ActivationForm : uint8_t { kInt8, kBFloat16, kFloat32 };

constexpr ActivationForm FormOf(WeightFormat format) {
  return IsQuantised(format)                 ? ActivationForm::kInt8
         : format == WeightFormat::kBFloat16 ? ActivationForm::kBFloat16
                                             : ActivationForm::kFloat32;
}

constexpr int64_t kTileTokens = 8;  // tokens whose activations lie interleaved

// Activations [tokens, columns], tiles of kTileTokens tokens (the last may be partly filled) one behind the other. The arrays of
// forms that aren't used are null.
struct Activations {
  int64_t columns = 0;
  int8_t* quants = nullptr;      // kInt8: [tile][columns / 32][token][32]
  float* scales = nullptr;       // kInt8: [tile][columns / 32][token]
  float* scaled_sums = nullptr;  // likewise: scale * sum of the block's quants
  int32_t* sums = nullptr;       // likewise: sum of the block's quants
  int32_t* half_sums = nullptr;  // likewise, or null: of its first 16, for HasHalfScales()
  uint16_t* bfloats = nullptr;   // kBFloat16: [tile][columns / 2][token][2]
  float* values = nullptr;       // kFloat32: [tile][columns][token]
};

// Puts columns [first, last) of one token in its place: quantised to 8 bits in blocks of 32 (first and last are multiples of
// that), rounded to bfloat16 (even first and last), or as they are. `x` points to column `first`. Non-finite values make the
// block they are in meaningless.
void PackActivations(ActivationForm form, const float* x, int64_t token, int64_t first, int64_t last, const Activations& out);

// out[(t - first_token) * out_stride + r] = product for tokens [first_token, last_token), the first a multiple of kTileTokens,
// and the rows of groups [first_group, last_group). The result of an element doesn't depend on how tokens and groups are split.
void MatMulPacked(const PackedMatrix& matrix, const Activations& x, int64_t first_token, int64_t last_token, int64_t first_group,
                  int64_t last_group, float* out, int64_t out_stride);

}  // namespace latte::kernels
