// latte::merge_states: checks, the CPU's kernel, the meta function and autograd.
#include <torch/library.h>

#include "kernels/latent.h"
#include "ops/check.h"
#include "ops/composed.h"
#include "ops/cpu.h"
#include "ops/ops.h"

namespace latte {
namespace {

constexpr const char* kName = "merge_states";

void Check(const at::Tensor& left, const at::Tensor& right) {
  const Checker check(kName);
  check.Rank("left", left, 4, "[N, Hkv, L, D + 3]");
  check.AtLeast("D + 3, the columns of left", left.sym_size(3), kernels::kStateExtra + 1);
  check.Shape("right", right, "[N, Hkv, L, D + 3]", {left.sym_size(0), left.sym_size(1), left.sym_size(2), left.sym_size(3)});
  TORCH_CHECK_TYPE(left.scalar_type() == at::kFloat || left.scalar_type() == at::kDouble, "[latte.merge_states] left: got dtype ",
                   left.scalar_type(), ", expected Float or Double");
  check.Dtype("right", right, left.scalar_type());
  check.Device("right", right, left);
}

at::Tensor MergeMeta(const at::Tensor& left, const at::Tensor& right) {
  Check(left, right);
  return at::empty_symint(left.sym_sizes(), left.options());
}

at::Tensor MergeComposed(const at::Tensor& left, const at::Tensor& right) {
  Check(left, right);
  return composed::MergeStates(left, right);
}

at::Tensor MergeCpu(const at::Tensor& left, const at::Tensor& right) {
  if (!cpu::Fused(left)) return MergeComposed(left, right);
  Check(left, right);
  const auto before = left.contiguous(), after = right.contiguous();
  const auto merged = at::empty(left.sizes(), left.options());
  const auto *first = before.const_data_ptr<float>(), *second = after.const_data_ptr<float>();
  auto* out = merged.mutable_data_ptr<float>();
  const int64_t latents = left.size(2), size = latents * left.size(3);
  cpu::ForEachSlice(left.size(0) * left.size(1), size, [&](int64_t slice) {
    const int64_t at = slice * size;
    kernels::MergeStates(latents, left.size(3) - kernels::kStateExtra, first + at, second + at, out + at);
  });
  return merged;
}

at::Tensor Call(const at::Tensor& left, const at::Tensor& right) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("latte::merge_states", "").typed<decltype(MergeMeta)>();
  return op.call(left, right);
}

// A kernel of its own would not pay for derivatives: ATen's have them all.
at::Tensor MergeAutograd(const at::Tensor& left, const at::Tensor& right) {
  const bool needs_grad = at::GradMode::is_enabled() && (NeedsGrad(left) || NeedsGrad(right));
  if (needs_grad || AnyTransformed(left, right)) return MergeComposed(left, right);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return Call(left, right);
}

TORCH_LIBRARY_FRAGMENT(latte, m) { m.def("merge_states(Tensor left, Tensor right) -> Tensor"); }
TORCH_LIBRARY_IMPL(latte, CompositeExplicitAutograd, m) { m.impl("merge_states", TORCH_FN(MergeComposed)); }
TORCH_LIBRARY_IMPL(latte, CPU, m) { m.impl("merge_states", TORCH_FN(MergeCpu)); }
TORCH_LIBRARY_IMPL(latte, Meta, m) { m.impl("merge_states", TORCH_FN(MergeMeta)); }
TORCH_LIBRARY_IMPL(latte, Autograd, m) { m.impl("merge_states", TORCH_FN(MergeAutograd)); }
// torch.func.vmap goes through ATen as well.
TORCH_LIBRARY_IMPL(latte, FuncTorchBatched, m) { m.impl("merge_states", TORCH_FN(MergeComposed)); }

}  // namespace

at::Tensor merge_states(const at::Tensor& left, const at::Tensor& right) { return Call(left, right); }

}  // namespace latte
