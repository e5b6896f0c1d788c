// Windowed attention as its definition reads, in double and quadratic time: the oracle of the tests and of nothing else.
#pragma once

#include <vector>

#include "kernels/window.h"

namespace latte::kernels {

// Contiguous row-major arrays shaped as the tensors of window.h of the same name. Those of absent tensors are empty.
struct WindowReference {
  std::vector<double> out;  // [B, T, H, D]
  std::vector<double> lse;  // [B, T, H]

  // With grad_out alone:
  std::vector<double> grad_query;
  std::vector<double> grad_sink_query;
  std::vector<double> grad_key;
  std::vector<double> grad_values;
  std::vector<double> grad_past_key;
  std::vector<double> grad_past_values;
  std::vector<double> grad_sink_key;
  std::vector<double> grad_sink_values;
};

// B is 1 with cu_seqlens, else the number of sequences. `grad_out` is null or contiguous [B, T, H, D].
WindowReference ReferenceWindow(const WindowArgs& args, const double* grad_out = nullptr);

}  // namespace latte::kernels
