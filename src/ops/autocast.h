// Autocast for the public operators: inputs go to its lower precision, while states, which are float32, and weights that the
// kernels read in float32 stay. Float64 stays too, as in torch's own operators.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include "ops/inputs.h"

namespace latte {

inline at::Tensor Autocast(const at::Tensor& x) {
  if (!x.defined()) return x;  // None, which checks refuse
  const auto device = x.device().type();
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) return x;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device);
}

inline OptionalTensor Autocast(const OptionalTensor& x) { return Present(x) ? OptionalTensor(Autocast(*x)) : x; }

// The composed path picks its dtypes itself.
class NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::autocast_dispatch_keyset};
};

}  // namespace latte
