// Rows of any DType to and from float32. Included once per SIMD target.
#if defined(LATTE_KERNELS_LOAD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LATTE_KERNELS_LOAD_INL_H_
#undef LATTE_KERNELS_LOAD_INL_H_
#else
#define LATTE_KERNELS_LOAD_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/types.h"

HWY_BEFORE_NAMESPACE();
namespace latte::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// dst[0, n) = src[0, n) as float32, dst[n, padded) = pad. padded >= n is a multiple of the vector length, dst is aligned to it.
template <class D>
HWY_INLINE void LoadFloatRow(D d, const float* src, size_t n, float* dst, size_t padded, float pad) {
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::Store(hn::LoadU(d, src + i), d, dst + i);
  if (i < n) {
    hn::Store(hn::LoadNOr(hn::Set(d, pad), d, src + i, n - i), d, dst + i);
    i += lanes;
  }
  for (; i < padded; i += lanes) hn::Store(hn::Set(d, pad), d, dst + i);
}

// Highway's float16 conversion without F16C takes infinities for numbers; they and NaN are put right here.
constexpr bool kHalfLacksInfinity = HWY_ARCH_X86 && HWY_TARGET > HWY_AVX2;

template <class D, class V16>
HWY_INLINE hn::Vec<D> Promote(D d, V16 v16) {
  const auto v = hn::PromoteTo(d, v16);
  if constexpr (kHalfLacksInfinity && hwy::IsSame<hn::TFromV<V16>, hwy::float16_t>()) {
    const auto special = hn::Ge(hn::Abs(v), hn::Set(d, 65536.0f));
    const auto exponent = hn::BitCast(d, hn::Set(hn::RebindToUnsigned<D>(), 0x7F800000u));
    return hn::Or(v, hn::IfThenElseZero(special, exponent));
  }
  return v;
}

template <class T16, class D>
HWY_INLINE void LoadHalfRow(D d, const T16* src, size_t n, float* dst, size_t padded, float pad) {
  const hn::Rebind<T16, D> d16;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::Store(Promote(d, hn::LoadU(d16, src + i)), d, dst + i);
  if (i < n) {
    const auto valid = hn::FirstN(d, n - i);
    const auto v = Promote(d, hn::LoadN(d16, src + i, n - i));
    hn::Store(hn::IfThenElse(valid, v, hn::Set(d, pad)), d, dst + i);
    i += lanes;
  }
  for (; i < padded; i += lanes) hn::Store(hn::Set(d, pad), d, dst + i);
}

// Row that starts `offset` elements into `data`.
template <class D>
HWY_INLINE void LoadRow(D d, DType dtype, const void* data, int64_t offset, size_t n, float* dst, size_t padded,
                        float pad = 0.0f) {
  switch (dtype) {
    case DType::kFloat32:
      return LoadFloatRow(d, static_cast<const float*>(data) + offset, n, dst, padded, pad);
    case DType::kBFloat16:
      return LoadHalfRow(d, static_cast<const hwy::bfloat16_t*>(data) + offset, n, dst, padded, pad);
    case DType::kFloat16:
      return LoadHalfRow(d, static_cast<const hwy::float16_t*>(data) + offset, n, dst, padded, pad);
  }
}

template <class T16, class D>
HWY_INLINE void StoreHalfRow(D d, const float* src, size_t n, T16* dst) {
  const hn::Rebind<T16, D> d16;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(hn::DemoteTo(d16, hn::LoadU(d, src + i)), d16, dst + i);
  if (i < n) hn::StoreN(hn::DemoteTo(d16, hn::LoadN(d, src + i, n - i)), d16, dst + i, n - i);
}

// row[0, n) rounded to bfloat16, to nearest even; n is a multiple of the vector length.
template <class D>
HWY_INLINE void RoundToBFloat16(D d, size_t n, float* row) {
  const hn::Rebind<hwy::bfloat16_t, D> dbf;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) hn::StoreU(hn::PromoteTo(d, hn::DemoteTo(dbf, hn::LoadU(d, row + i))), d, row + i);
}

// data[offset, offset + n) = src[0, n), rounded to nearest even.
template <class D>
HWY_INLINE void StoreRow(D d, DType dtype, const float* src, size_t n, void* data, int64_t offset) {
  switch (dtype) {
    case DType::kFloat32: {
      float* dst = static_cast<float*>(data) + offset;
      const size_t lanes = hn::Lanes(d);
      size_t i = 0;
      for (; i + lanes <= n; i += lanes) hn::StoreU(hn::LoadU(d, src + i), d, dst + i);
      if (i < n) hn::StoreN(hn::LoadN(d, src + i, n - i), d, dst + i, n - i);
      return;
    }
    case DType::kBFloat16:
      return StoreHalfRow(d, src, n, static_cast<hwy::bfloat16_t*>(data) + offset);
    case DType::kFloat16:
      return StoreHalfRow(d, src, n, static_cast<hwy::float16_t*>(data) + offset);
  }
}

}  // namespace latte::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
