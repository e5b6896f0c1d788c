#include "runtime/matrix.h"

#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <optional>

#include "runtime/error.h"

namespace latte::runtime {
namespace {

std::optional<kernels::RowLayout> layout_of(formats::TensorType type) {
  switch (type) {
    case formats::TensorType::kF32:
      return kernels::RowLayout::kFloat32;
    case formats::TensorType::kF16:
      return kernels::RowLayout::kFloat16;
    case formats::TensorType::kBF16:
      return kernels::RowLayout::kBFloat16;
    case formats::TensorType::kQ4_0:
      return kernels::RowLayout::kQ4_0;
    case formats::TensorType::kQ4_1:
      return kernels::RowLayout::kQ4_1;
    case formats::TensorType::kQ5_0:
      return kernels::RowLayout::kQ5_0;
    case formats::TensorType::kQ5_1:
      return kernels::RowLayout::kQ5_1;
    case formats::TensorType::kQ8_0:
      return kernels::RowLayout::kQ8_0;
    case formats::TensorType::kIQ4_NL:
      return kernels::RowLayout::kIQ4_NL;
    case formats::TensorType::kIQ4_XS:
      return kernels::RowLayout::kIQ4_XS;
    case formats::TensorType::kQ2_K:
      return kernels::RowLayout::kQ2_K;
    case formats::TensorType::kQ3_K:
      return kernels::RowLayout::kQ3_K;
    case formats::TensorType::kQ4_K:
      return kernels::RowLayout::kQ4_K;
    case formats::TensorType::kQ5_K:
      return kernels::RowLayout::kQ5_K;
    case formats::TensorType::kQ6_K:
      return kernels::RowLayout::kQ6_K;
    default:
      return std::nullopt;
  }
}

}  // namespace

void InputForms::add(const InputForms& other) {
  int8 |= other.int8;
  half_sums |= other.half_sums;
  bfloat16 |= other.bfloat16;
  float32 |= other.float32;
  for (const int type : other.ggml) {
    if (std::find(ggml.begin(), ggml.end(), type) == ggml.end()) ggml.push_back(type);
  }
}

Inputs::Inputs(int64_t tokens, int64_t columns, const InputForms& forms, Arena& arena) {
  const int64_t padded = (tokens + kernels::kTileTokens - 1) / kernels::kTileTokens * kernels::kTileTokens;
  packed_.columns = columns;
  if (forms.int8) {
    const int64_t blocks = columns / kernels::kQuantBlock;
    packed_.quants = arena.take_array<int8_t>(padded * columns);
    packed_.scales = arena.take_array<float>(padded * blocks);
    packed_.scaled_sums = arena.take_array<float>(padded * blocks);
    packed_.sums = arena.take_array<int32_t>(padded * blocks);
    if (forms.half_sums) packed_.half_sums = arena.take_array<int32_t>(padded * blocks);
  }
  if (forms.bfloat16) packed_.bfloats = arena.take_array<uint16_t>(padded * columns);
  if (forms.float32) packed_.values = arena.take_array<float>(padded * columns);
  for (const int type : forms.ggml) {
    const size_t row_bytes = ggml_row_size(static_cast<ggml_type>(type), columns);
    ggml_.push_back({type, row_bytes, arena.take(row_bytes * static_cast<size_t>(tokens))});
  }
}

void Inputs::put(const InputForms& forms, const float* x, int64_t token, int64_t first, int64_t last) const {
  using kernels::ActivationForm;
  if (forms.int8) kernels::PackActivations(ActivationForm::kInt8, x, token, first, last, packed_);
  if (forms.bfloat16) kernels::PackActivations(ActivationForm::kBFloat16, x, token, first, last, packed_);
  if (forms.float32) kernels::PackActivations(ActivationForm::kFloat32, x, token, first, last, packed_);
  for (const int type : forms.ggml) {
    std::byte* row = const_cast<std::byte*>(ggml_row(type, token));
    if (type == GGML_TYPE_F32) {
      std::copy(x, x + (last - first), reinterpret_cast<float*>(row) + first);
    } else {
      ggml_get_type_traits_cpu(static_cast<ggml_type>(type))->from_float(x, row, last - first);
    }
  }
}

const std::byte* Inputs::ggml_row(int type, int64_t token) const {
  const auto rows = std::find_if(ggml_.begin(), ggml_.end(), [&](const GgmlRows& r) { return r.type == type; });
  return rows->data + static_cast<size_t>(token) * rows->row_bytes;
}

Matrix::Matrix(const formats::GgufTensorSpec& spec, const std::byte* data, int64_t rows, int64_t columns, Arena& arena,
               ThreadPool& pool)
    : rows_(rows), columns_(columns) {
  ggml_type_ = static_cast<int>(spec.type);
  const auto layout = layout_of(spec.type);
  if (layout && columns % kernels::ColumnStep(*layout) == 0) {
    const kernels::WeightFormat format = kernels::FormatOf(*layout);
    packed_ = {format, rows, columns, nullptr};
    std::byte* packed = arena.take(static_cast<size_t>(kernels::PackedGroupBytes(format, columns) * groups()));
    pool.run([&](int thread) {
      const Share share = share_of(groups(), thread, pool.size());
      kernels::PackGroups(packed_, *layout, data, share.begin, share.end, packed);
    });
    packed_.data = packed;
    const auto form = kernels::FormOf(format);
    forms_.int8 = form == kernels::ActivationForm::kInt8;
    forms_.half_sums = kernels::HasHalfScales(format);
    forms_.bfloat16 = form == kernels::ActivationForm::kBFloat16;
    forms_.float32 = form == kernels::ActivationForm::kFloat32;
    return;
  }
  const auto type = static_cast<ggml_type>(ggml_type_);
  const ggml_type_traits_cpu* traits = ggml_get_type_traits_cpu(type);
  if (traits == nullptr || traits->vec_dot == nullptr ||
      (traits->vec_dot_type != GGML_TYPE_F32 && ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float == nullptr)) {
    throw ModelError("tensor " + spec.name + ": no products with weights of type " + std::string(formats::name_of(spec.type)));
  }
  forms_.ggml = {static_cast<int>(traits->vec_dot_type)};
  ggml_row_bytes_ = ggml_row_size(type, columns);
  ggml_data_ = data;
}

size_t Matrix::bytes() const {
  if (ggml_data_ != nullptr) return ggml_row_bytes_ * static_cast<size_t>(rows_);
  return static_cast<size_t>(kernels::PackedGroupBytes(packed_.format, columns_) * groups());
}

void Matrix::multiply(const Inputs& inputs, int64_t first_token, int64_t last_token, int64_t first_group, int64_t last_group,
                      float* out, int64_t stride) const {
  const int64_t first_row = first_group * kernels::kGroupRows;
  const int64_t last_row = std::min(rows_, last_group * kernels::kGroupRows);
  if (ggml_data_ == nullptr) {
    kernels::MatMulPacked(packed_, inputs.packed_, first_token, last_token, first_group, last_group, out, stride);
  } else {
    const ggml_type_traits_cpu* traits = ggml_get_type_traits_cpu(static_cast<ggml_type>(ggml_type_));
    for (int64_t r = first_row; r < last_row; ++r) {
      const std::byte* weights = ggml_data_ + static_cast<size_t>(r) * ggml_row_bytes_;
      for (int64_t t = first_token; t < last_token; ++t) {
        traits->vec_dot(static_cast<int>(columns_), out + (t - first_token) * stride + r, 0, weights, 0,
                        inputs.ggml_row(traits->vec_dot_type, t), 0, 1);
      }
    }
  }
  if (bias_ == nullptr) return;
  for (int64_t t = 0; t < last_token - first_token; ++t) {
    for (int64_t r = first_row; r < last_row; ++r) out[t * stride + r] += bias_[r];
  }
}

void Matrix::row(int64_t index, float* out) const {
  if (ggml_data_ == nullptr) return kernels::UnpackRow(packed_, index, out);
  const ggml_type_traits* traits = ggml_get_type_traits(static_cast<ggml_type>(ggml_type_));
  const std::byte* row = ggml_data_ + static_cast<size_t>(index) * ggml_row_bytes_;
  if (ggml_type_ == GGML_TYPE_F32) {
    std::copy_n(reinterpret_cast<const float*>(row), columns_, out);
  } else {
    traits->to_float(row, out, columns_);
  }
}

}  // namespace latte::runtime
