// latte::vapor: a rotation, linear in x, whose derivative of any order is a rotation back or forth.
#include "kernels/vapor.h"

#include <torch/library.h>

#include "ops/check.h"
#include "ops/composed.h"
#include "ops/cpu.h"

namespace latte {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kName = "vapor";

at::Tensor Meta(const at::Tensor& x, const OptionalTensor& positions, double base, bool inverse) {
  CheckVapor(kName, x, positions, base);
  return at::empty_symint(x.sym_sizes(), x.options());
}

at::Tensor Composed(const at::Tensor& x, const OptionalTensor& positions, double base, bool inverse) {
  CheckVapor(kName, x, positions, base);
  return composed::Vapor(x, positions, base, inverse).contiguous();
}

at::Tensor Cpu(const at::Tensor& x, const OptionalTensor& positions, double base, bool inverse) {
  if (!cpu::Fused(x)) return Composed(x, positions, base, inverse);
  CheckVapor(kName, x, positions, base);
  const auto readable = cpu::Readable(x);
  auto out = cpu::Like(x);
  kernels::VaporArgs args;
  args.dtype = cpu::DTypeOf(x);
  args.batch = x.size(0);
  args.time = x.size(1);
  args.heads = x.size(2);
  args.head_dim = x.size(3);
  args.base = base;
  args.inverse = inverse;
  args.x = cpu::ViewOf(readable);
  if (Present(positions)) {
    args.positions = positions->const_data_ptr<int64_t>();
    args.positions_batch_stride = positions->dim() == 2 ? positions->stride(0) : 0;
    args.positions_time_stride = positions->stride(-1);
  }
  const auto view = cpu::WriteTo(out);
  const int64_t slices = kernels::VaporSlices(args);
  cpu::ForEachSlice(slices, 4 * x.numel() / std::max<int64_t>(1, slices),
                    [&](int64_t slice) { kernels::VaporRotate(args, view, slice); });
  return out;
}

at::Tensor Call(const at::Tensor& x, const OptionalTensor& positions, double base, bool inverse) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("latte::vapor", "").typed<decltype(Meta)>();
  return op.call(x, positions, base, inverse);
}

class VaporFunction : public torch::autograd::Function<VaporFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const OptionalTensor& positions, double base,
                            bool inverse) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({OrUndefined(positions)});
    context->saved_data["base"] = base;
    context->saved_data["inverse"] = inverse;
    return Call(x, positions, base, inverse);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& data = context->saved_data;
    const auto positions = OrAbsent(context->get_saved_variables()[0]);
    return {Call(grads[0], positions, data["base"].toDouble(), !data["inverse"].toBool()), {}, {}, {}};
  }
};

at::Tensor Autograd(const at::Tensor& x, const OptionalTensor& positions, double base, bool inverse) {
  if (AnyTransformed(x)) return Composed(x, positions, base, inverse);
  if (at::GradMode::is_enabled() && x.requires_grad()) return VaporFunction::apply(x, positions, base, inverse);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return Call(x, positions, base, inverse);
}

TORCH_LIBRARY_FRAGMENT(latte, m) {
  m.def("vapor(Tensor x, Tensor? positions=None, float base=10000.0, bool inverse=False) -> Tensor");
}
TORCH_LIBRARY_IMPL(latte, CompositeExplicitAutograd, m) { m.impl("vapor", TORCH_FN(Composed)); }
TORCH_LIBRARY_IMPL(latte, CPU, m) { m.impl("vapor", TORCH_FN(Cpu)); }
TORCH_LIBRARY_IMPL(latte, Meta, m) { m.impl("vapor", TORCH_FN(Meta)); }
TORCH_LIBRARY_IMPL(latte, Autograd, m) { m.impl("vapor", TORCH_FN(Autograd)); }

}  // namespace

at::Tensor vapor(const at::Tensor& x, const OptionalTensor& positions, double base, bool inverse) {
  return Call(x, positions, base, inverse);
}

}  // namespace latte
