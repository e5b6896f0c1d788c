// Weight matrices in their own type: repacked for the kernels where they know the type, else ggml's rows and dot products.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats/gguf.h"
#include "kernels/quant_matmul.h"
#include "runtime/memory.h"
#include "runtime/threads.h"

namespace latte::runtime {

// The forms that a product's input rows are needed in.
struct InputForms {
  bool int8 = false;
  bool half_sums = false;  // of int8
  bool bfloat16 = false;
  bool float32 = false;
  std::vector<int> ggml;  // ggml's types, each once

  void add(const InputForms& other);
  // Whether parts of a row can be put on their own, at multiples of 32 columns.
  bool by_columns() const { return ggml.empty(); }
};

// Rows of activations in every form that is asked for.
class Inputs {
 public:
  Inputs() = default;
  Inputs(int64_t tokens, int64_t columns, const InputForms& forms, Arena& arena);

  // Columns [first, last) of a token's row, in the forms given, a subset of the constructor's; x points to column `first`.
  void put(const InputForms& forms, const float* x, int64_t token, int64_t first, int64_t last) const;
  void put(const InputForms& forms, const float* x, int64_t token) const { put(forms, x, token, 0, packed_.columns); }

 private:
  friend class Matrix;
  const std::byte* ggml_row(int type, int64_t token) const;

  struct GgmlRows {
    int type;
    size_t row_bytes;
    std::byte* data;
  };
  kernels::Activations packed_;
  std::vector<GgmlRows> ggml_;
};

class Matrix {
 public:
  Matrix() = default;
  // [rows, columns]; `tensor`'s data must outlive the matrix where is_mapped().
  Matrix(const formats::GgufTensorSpec& spec, const std::byte* data, int64_t rows, int64_t columns, Arena& arena,
         ThreadPool& pool);

  explicit operator bool() const { return rows_ > 0; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t groups() const { return (rows_ + kernels::kGroupRows - 1) / kernels::kGroupRows; }
  bool is_mapped() const { return ggml_data_ != nullptr; }
  const InputForms& forms() const { return forms_; }
  size_t bytes() const;  // what a product reads
  // [rows], added to every product; outlives the matrix.
  void set_bias(const float* bias) { bias_ = bias; }

  // out[(t - first_token) * stride + r] = product, for tokens [first_token, last_token), the first a multiple of kTileTokens, and
  // the rows of groups [first_group, last_group).
  void multiply(const Inputs& inputs, int64_t first_token, int64_t last_token, int64_t first_group, int64_t last_group,
                float* out, int64_t stride) const;

  // One row dequantised.
  void row(int64_t index, float* out) const;

 private:
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  InputForms forms_;
  kernels::PackedMatrix packed_;  // without is_mapped()
  int ggml_type_ = 0;
  size_t ggml_row_bytes_ = 0;
  const std::byte* ggml_data_ = nullptr;
  const float* bias_ = nullptr;
};

}  // namespace latte::runtime
