// latte::causal_attention and latte::bidirectional_attention.
#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/check.h"
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

}  // namespace latte
