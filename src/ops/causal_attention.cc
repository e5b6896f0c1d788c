// latte::causal_attention, latte::bidirectional_attention and latte::merge_states.
#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/check.h"
#include "ops/composed.h"
#include "ops/core.h"

namespace latte {
namespace {

std::tuple<at::Tensor, at::Tensor> Causal(const at::Tensor& query_logits, const at::Tensor& key_logits, const at::Tensor& values,
                                          const OptionalTensor& log_decay, const OptionalTensor& key_mask,
                                          const OptionalTensor& initial_state, bool output_final_state,
                                          const OptionalTensor& cu_seqlens) {
  const LatentInputs in{Autocast(query_logits), Autocast(key_logits), Autocast(values), {}, Autocast(log_decay), key_mask,
                        initial_state,          cu_seqlens,           /*causal=*/true};
  CheckLatent("causal_attention", in);
  return CallLatentAttention(in, output_final_state);
}

at::Tensor Bidirectional(const at::Tensor& query_logits, const at::Tensor& key_logits, const at::Tensor& values,
                         const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens) {
  const LatentInputs in{Autocast(query_logits), Autocast(key_logits), Autocast(values), {}, {}, key_mask, {}, cu_seqlens,
                        /*causal=*/false};
  CheckLatent("bidirectional_attention", in);
  return std::get<0>(CallLatentAttention(in, /*output_final_state=*/false));
}

at::Tensor Merge(const at::Tensor& left, const at::Tensor& right) {
  const Checker check("merge_states");
  check.Rank("left", left, 4, "[N, Hkv, L, D + 3]");
  check.AtLeast("D + 3, the columns of left", left.sym_size(3), 4);
  check.Shape("right", right, "[N, Hkv, L, D + 3]", {left.sym_size(0), left.sym_size(1), left.sym_size(2), left.sym_size(3)});
  TORCH_CHECK_TYPE(left.scalar_type() == at::kFloat || left.scalar_type() == at::kDouble, "[latte.merge_states] left: got dtype ",
                   left.scalar_type(), ", expected Float or Double");
  check.Dtype("right", right, left.scalar_type());
  check.Device("right", right, left);
  const NoAutocast guard;
  // Columns S and z, m, G.
  const auto maximum_at = left.sym_size(3) - 2;
  const auto column = [&](const at::Tensor& x, const c10::SymInt& index) { return x.narrow_symint(-1, index, 1); };
  const auto left_maximum = column(left, maximum_at) + column(right, maximum_at + 1);
  const auto right_maximum = column(right, maximum_at);
  const auto maximum = at::maximum(left_maximum, right_maximum).detach();
  const auto reference = composed::FiniteOrZero(maximum);
  const auto sums = left.narrow_symint(-1, 0, maximum_at) * (left_maximum - reference).exp() +
                    right.narrow_symint(-1, 0, maximum_at) * (right_maximum - reference).exp();
  return at::cat({sums, maximum, column(left, maximum_at + 1) + column(right, maximum_at + 1)}, -1);
}

TORCH_LIBRARY_FRAGMENT(latte, m) {
  m.def(
      "causal_attention(Tensor query_logits, Tensor key_logits, Tensor values, *, Tensor? log_decay=None, "
      "Tensor? key_mask=None, Tensor? initial_state=None, bool output_final_state=False, Tensor? cu_seqlens=None) "
      "-> (Tensor, Tensor)",
      TORCH_FN(Causal));
  m.def(
      "bidirectional_attention(Tensor query_logits, Tensor key_logits, Tensor values, *, Tensor? key_mask=None, "
      "Tensor? cu_seqlens=None) -> Tensor",
      TORCH_FN(Bidirectional));
  m.def("merge_states(Tensor left, Tensor right) -> Tensor", TORCH_FN(Merge));
}

}  // namespace

std::tuple<at::Tensor, OptionalTensor> causal_attention(const at::Tensor& query_logits, const at::Tensor& key_logits,
                                                        const at::Tensor& values, const CausalAttentionOptions& options) {
  auto [out, state] = Causal(query_logits, key_logits, values, options.log_decay, options.key_mask, options.initial_state,
                             options.output_final_state, options.cu_seqlens);
  return {out, options.output_final_state ? OptionalTensor(state) : OptionalTensor()};
}

at::Tensor bidirectional_attention(const at::Tensor& query_logits, const at::Tensor& key_logits, const at::Tensor& values,
                                   const BidirectionalAttentionOptions& options) {
  return Bidirectional(query_logits, key_logits, values, options.key_mask, options.cu_seqlens);
}

at::Tensor merge_states(const at::Tensor& left, const at::Tensor& right) { return Merge(left, right); }

}  // namespace latte
