// Products of the small matrices that live in a kernel's scratch memory (a chunk's tokens by its latents or head size), in
// registers. General matrix products belong to a library; these never leave the cache and their calling cost would be most of a
// library's. Included once per SIMD target.
#if defined(LATTE_KERNELS_TILE_MATMUL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_TILE_MATMUL_INL_H_
#undef LATTE_KERNELS_TILE_MATMUL_INL_H_
#else
#define LATTE_KERNELS_TILE_MATMUL_INL_H_
#endif

#include <cstddef>
#include <utility>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A left operand of any layout: element (m, k) at data[m * row + k * column].
struct Left {
  const float* data;
  size_t row;
  size_t column;
};

// Rows and vectors of the block of sums held in registers: 12 of 16, or 24 of 32.
constexpr size_t kBlockRows = 6;
constexpr size_t kBlockVectors = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64 ? 4 : 2;

// `x`, in a register. GCC would rather read it from memory again for every product of four rows or fewer, and then the loads, not
// the products, set the pace.
template <class V>
HWY_INLINE V InRegister(V x) {
#if HWY_ARCH_X86 && (HWY_COMPILER_GCC || HWY_COMPILER_CLANG)
  auto raw = x.raw;
#if HWY_TARGET <= HWY_AVX3
  __asm__("" : "+v"(raw));
#else
  __asm__("" : "+x"(raw));
#endif
  return V{raw};
#else
  return x;
#endif
}

// How products are made: an element of each operand is a float32 …
struct Floats {
  template <class D, class V>
  static HWY_INLINE V MulAdd(D, V a, V b, V sum) {
    return hn::MulAdd(a, b, sum);
  }
};

// Whether the target multiplies pairs of bfloat16 faster than floats. Sapphire Rapids has the instruction at half the rate of its
// multiply-adds, so that rounding and pairing are for nothing there.
constexpr bool kHasPairs = HWY_TARGET == HWY_AVX3_ZEN4;

// … or a pair of bfloat16 in its place, neighbours along k, the earlier in the low half: K is then half as large.
struct Pairs {
  template <class D, class V>
  static HWY_INLINE V MulAdd(D d, V a, V b, V sum) {
    const hn::Repartition<hwy::bfloat16_t, D> dbf;
    V unused = hn::Zero(d);  // the instruction adds both products to the one sum
    return hn::ReorderWidenMulAccumulate(d, hn::BitCast(dbf, a), hn::BitCast(dbf, b), sum, unused);
  }
};

// What MatMul asks for on its way, if nothing is wanted (prefetch-inl.h has what else there is).
struct Nothing {
  HWY_INLINE Nothing Take(size_t) const { return {}; }
  HWY_INLINE void operator()() const {}
};

template <bool kAccumulate, class Product, class D, class Ahead, size_t... R, size_t... C>
HWY_INLINE void MatMulBlock(D d, size_t K, Left a, const float* HWY_RESTRICT b, size_t b_row, float* HWY_RESTRICT c, size_t c_row,
                            Ahead& ahead, std::index_sequence<R...>, std::index_sequence<C...>) {
  using V = hn::Vec<D>;
  constexpr size_t kRows = sizeof...(R);
  constexpr size_t kVectors = sizeof...(C);
  const size_t lanes = hn::Lanes(d);
  V sum[kRows][kVectors];
  const auto load_sums = [&](auto r) HWY_ATTR {
    if constexpr (kAccumulate) {
      ((sum[r][C] = hn::LoadU(d, c + r * c_row + C * lanes)), ...);
    } else {
      ((sum[r][C] = hn::Zero(d)), ...);
    }
  };
  (load_sums(std::integral_constant<size_t, R>()), ...);
  const float* HWY_RESTRICT ak = a.data;
  auto lines = ahead.Take(K);
  for (size_t k = 0; k < K; ++k) {
    lines();
    V bk[kVectors];
    ((bk[C] = InRegister(hn::LoadU(d, b + C * lanes))), ...);
    const auto add_row = [&](auto r) HWY_ATTR {
      const V ark = hn::Set(d, ak[r * a.row]);
      ((sum[r][C] = Product::MulAdd(d, ark, bk[C], sum[r][C])), ...);
    };
    (add_row(std::integral_constant<size_t, R>()), ...);
    ak += a.column;
    b += b_row;
  }
  const auto store_sums = [&](auto r) HWY_ATTR { (hn::StoreU(sum[r][C], d, c + r * c_row + C * lanes), ...); };
  (store_sums(std::integral_constant<size_t, R>()), ...);
}

template <bool kAccumulate, class Product, size_t kVectors, class D, class Ahead>
HWY_INLINE void MatMulRows(D d, size_t rows, size_t K, Left a, const float* b, size_t b_row, float* c, size_t c_row,
                           Ahead& ahead) {
  const std::make_index_sequence<kVectors> vectors;
  switch (rows) {
    case 1:
      return MatMulBlock<kAccumulate, Product>(d, K, a, b, b_row, c, c_row, ahead, std::make_index_sequence<1>(), vectors);
    case 2:
      return MatMulBlock<kAccumulate, Product>(d, K, a, b, b_row, c, c_row, ahead, std::make_index_sequence<2>(), vectors);
    case 3:
      return MatMulBlock<kAccumulate, Product>(d, K, a, b, b_row, c, c_row, ahead, std::make_index_sequence<3>(), vectors);
    case 4:
      return MatMulBlock<kAccumulate, Product>(d, K, a, b, b_row, c, c_row, ahead, std::make_index_sequence<4>(), vectors);
    case 5:
      return MatMulBlock<kAccumulate, Product>(d, K, a, b, b_row, c, c_row, ahead, std::make_index_sequence<5>(), vectors);
    default:
      return MatMulBlock<kAccumulate, Product>(d, K, a, b, b_row, c, c_row, ahead, std::make_index_sequence<6>(), vectors);
  }
}

// A panel of kVectors vectors of columns, all M rows, cut in blocks of nearly equal height.
template <bool kAccumulate, class Product, size_t kVectors, class D, class Ahead>
HWY_NOINLINE void MatMulPanel(D d, size_t M, size_t K, Left a, const float* b, size_t b_row, float* c, size_t c_row,
                              Ahead& ahead) {
  size_t blocks = (M + kBlockRows - 1) / kBlockRows;
  while (M > 0) {
    const size_t rows = (M + blocks - 1) / blocks;
    MatMulRows<kAccumulate, Product, kVectors>(d, rows, K, a, b, b_row, c, c_row, ahead);
    a.data += rows * a.row;
    c += rows * c_row;
    M -= rows;
    --blocks;
  }
}

// c[m, n] = Σ_k a(m, k) b[k, n], or += with kAccumulate, for m < M, k < K and n < N. N is a multiple of the vector length; rows
// of b and c lie b_row and c_row elements apart. c overlaps neither a nor b. Asks for memory on its way, while the arithmetic
// units are busy: calls what ahead.Take(K) returns before each of the K steps of a block of sums. Product = Pairs: elements of a
// and b are pairs, c's are floats.
template <bool kAccumulate, class Product = Floats, class D, class Ahead>
HWY_INLINE void MatMul(D d, size_t M, size_t N, size_t K, Left a, const float* b, size_t b_row, float* c, size_t c_row,
                       Ahead& ahead) {
  const size_t lanes = hn::Lanes(d);
  const auto panel = [&](auto vectors) HWY_ATTR {
    MatMulPanel<kAccumulate, Product, vectors>(d, M, K, a, b, b_row, c, c_row, ahead);
    b += vectors * lanes;
    c += vectors * lanes;
  };
  size_t vectors = N / lanes;
  if constexpr (kBlockVectors == 4) {
    // The last five, six or nine as panels of two and three: one of a single vector waits for its loads.
    for (; vectors >= 4 && vectors != 5 && vectors != 6 && vectors != 9; vectors -= 4) panel(std::integral_constant<size_t, 4>());
    for (; vectors >= 3; vectors -= 3) panel(std::integral_constant<size_t, 3>());
  }
  for (; vectors >= 2; vectors -= 2) panel(std::integral_constant<size_t, 2>());
  if (vectors == 1) panel(std::integral_constant<size_t, 1>());
}

template <bool kAccumulate, class D>
HWY_INLINE void MatMul(D d, size_t M, size_t N, size_t K, Left a, const float* b, size_t b_row, float* c, size_t c_row) {
  Nothing nothing;
  MatMul<kAccumulate>(d, M, N, K, a, b, b_row, c, c_row, nothing);
}

// `x`, rounded to the nearest bfloat16, even where two are as near.
template <class D>
HWY_INLINE hn::Vec<D> RoundToBFloat16(D d, hn::Vec<D> x) {
  const hn::Rebind<hwy::bfloat16_t, D> half;
  return hn::PromoteTo(d, hn::DemoteTo(half, x));
}

// out[0, n) = the pairs (row0[i], row1[i]), rounded to nearest even; n is a multiple of the vector length. `out` may be row0.
template <class D>
HWY_INLINE void PairRows(D d, const float* row0, const float* row1, size_t n, float* out) {
  const hn::Repartition<hwy::bfloat16_t, D> dbf;
  const hn::RebindToUnsigned<decltype(dbf)> du16;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto halves = hn::BitCast(du16, hn::OrderedDemote2To(dbf, hn::LoadU(d, row0 + i), hn::LoadU(d, row1 + i)));
    // Low half: row0's; high half: row1's.
    const auto mixed = hn::InterleaveWholeLower(du16, halves, hn::ConcatUpperUpper(du16, halves, halves));
    hn::StoreU(hn::BitCast(d, mixed), d, out + i);
  }
}

// out[0, n / 2) = the pairs (row[2 i], row[2 i + 1]), rounded to nearest even; n is a multiple of the vector length. `out` may be
// the row.
template <class D>
HWY_INLINE void PairColumns(D d, const float* row, size_t n, float* out) {
  const hn::Repartition<hwy::bfloat16_t, D> dbf;
  const hn::Half<decltype(dbf)> half;
  const size_t lanes = hn::Lanes(d);
  auto* pairs = reinterpret_cast<hwy::bfloat16_t*>(out);
  size_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    hn::StoreU(hn::OrderedDemote2To(dbf, hn::LoadU(d, row + i), hn::LoadU(d, row + i + lanes)), dbf, pairs + i);
  }
  if (i < n) hn::StoreU(hn::DemoteTo(half, hn::LoadU(d, row + i)), half, pairs + i);
}

// 4 floats at `row` and, where D has 8 lanes, 4 at the fourth row behind it.
template <class D>
HWY_INLINE hn::Vec<D> LoadRows(D d, const float* row, size_t in_row) {
  if constexpr (D().MaxLanes() == 8) {
    const hn::Half<D> half;
    return hn::Combine(d, hn::LoadU(half, row + 4 * in_row), hn::LoadU(half, row));
  } else {
    return hn::LoadU(d, row);
  }
}

// out[n, m] = in[m, n] for m < M and n < N, both multiples of 4, and M of 8 where vectors hold that many; rows lie in_row and
// out_row elements apart.
HWY_INLINE void Transpose(size_t M, size_t N, const float* HWY_RESTRICT in, size_t in_row, float* HWY_RESTRICT out,
                          size_t out_row) {
  // Blocks of 4 columns and as many rows as there are lanes; each 128-bit part of a vector transposes its own 4 rows.
  constexpr size_t kRows = hn::MaxLanes(hn::ScalableTag<float>()) >= 8 ? 8 : 4;
  const hn::FixedTag<float, kRows> d;
  const hn::Repartition<double, decltype(d)> dd;
  const auto load = [in_row](const float* row) HWY_ATTR { return LoadRows(decltype(d)(), row, in_row); };
  for (size_t m = 0; m < M; m += kRows) {
    for (size_t n = 0; n < N; n += 4) {
      const float* block = in + m * in_row + n;
      const auto r0 = load(block);
      const auto r1 = load(block + in_row);
      const auto r2 = load(block + 2 * in_row);
      const auto r3 = load(block + 3 * in_row);
      const auto lo01 = hn::BitCast(dd, hn::InterleaveLower(d, r0, r1));
      const auto lo23 = hn::BitCast(dd, hn::InterleaveLower(d, r2, r3));
      const auto hi01 = hn::BitCast(dd, hn::InterleaveUpper(d, r0, r1));
      const auto hi23 = hn::BitCast(dd, hn::InterleaveUpper(d, r2, r3));
      float* column = out + n * out_row + m;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, lo01, lo23)), d, column);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, lo01, lo23)), d, column + out_row);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, hi01, hi23)), d, column + 2 * out_row);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, hi01, hi23)), d, column + 3 * out_row);
    }
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
