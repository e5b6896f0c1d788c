// The operators in plain ATen: for float64, for devices other than the CPU, and for second derivatives. They are exact for the
// same inputs as the fused kernels, and are their oracle in tests.
//
// Forward functions are differentiable any number of times where autograd is on; memory is then linear in T with a large
// constant. The …Backward functions give first derivatives in memory linear in T with a small constant: they go back block by
// block and recompute each one.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <vector>

#include "ops/inputs.h"

namespace latte::composed {

struct LatentOutputs {
  at::Tensor out;          // [B, T, H, D], dtype of query_logits
  at::Tensor final_state;  // [N, Hkv, L, D + 3], AccumulateType; undefined if bidirectional
};
// The maximum's column of final_state carries no gradient: it only says what S and z are relative to. That of initial_state
// receives its true gradient.
LatentOutputs LatentAttention(const LatentInputs& inputs);

struct LatentGradients {  // undefined where the input is absent
  at::Tensor query_logits, key_logits, values, window_out, log_decay, initial_state;
};
LatentGradients LatentAttentionBackward(const LatentInputs& inputs, const at::Tensor& grad_out,
                                        const OptionalTensor& grad_final_state);

// `left` followed by `right`, [N, Hkv, L, D + 3] each. The maximum's column carries no gradient.
at::Tensor MergeStates(const at::Tensor& left, const at::Tensor& right);

struct WindowOutputs {
  at::Tensor out;  // [B, T, H, D], AccumulateType
  at::Tensor lse;  // [B, T, H], AccumulateType; carries no gradient
};
WindowOutputs WindowAttention(const WindowInputs& inputs);

struct WindowGradients {  // undefined where the input is absent
  at::Tensor query, sink_query, key, values, past_key, past_values, sink_key, sink_values;
};
WindowGradients WindowAttentionBackward(const WindowInputs& inputs, const at::Tensor& grad_out);

struct ChannelOutputs {
  at::Tensor out;          // [B, T, C]
  at::Tensor final_state;  // [N, K - 1, C] or [N, C]
};
ChannelOutputs CausalConv1d(const Conv1dInputs& inputs);
ChannelOutputs RgLru(const RgLruInputs& inputs);
at::Tensor Vapor(const at::Tensor& x, const OptionalTensor& positions, double base, bool inverse);

// Runs `function` on copies of `inputs` that autograd follows and returns the gradients of Σ outputs · grad_outputs; undefined
// inputs give undefined gradients, undefined grad_outputs count as zero. `Gradients` is for backends' kernels, which run below
// autograd: it turns autograd on. `DifferentiableGradients` keeps the graph from its results to `inputs` and grad_outputs.
using Function = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>& inputs)>;
std::vector<at::Tensor> Gradients(const Function& function, const std::vector<at::Tensor>& inputs,
                                  const std::vector<at::Tensor>& grad_outputs);
std::vector<at::Tensor> DifferentiableGradients(const Function& function, const std::vector<at::Tensor>& inputs,
                                                const std::vector<at::Tensor>& grad_outputs);

// Where a sequence lies: row and tokens of the inputs, rows of the states. One piece is the whole batch without cu_seqlens.
struct Piece {
  int64_t begin, length;  // tokens
  int64_t state_begin, state_rows;

  at::Tensor Tokens(const at::Tensor& x) const { return x.narrow(1, begin, length); }
  OptionalTensor Tokens(const OptionalTensor& x) const { return Present(x) ? OptionalTensor(Tokens(*x)) : OptionalTensor(); }
  at::Tensor States(const at::Tensor& x) const { return x.narrow(0, state_begin, state_rows); }
  OptionalTensor States(const OptionalTensor& x) const { return Present(x) ? OptionalTensor(States(*x)) : OptionalTensor(); }
};
// Checks cu_seqlens' data in the name of `op`.
std::vector<Piece> Pieces(const char* op, const at::Tensor& like, const OptionalTensor& cu_seqlens);

// torch.cat that is content with nothing to join, for which `empty` is given.
at::Tensor Join(const std::vector<at::Tensor>& parts, int64_t dim, const std::function<at::Tensor()>& empty);

// softmax over the last dimension; a row that is all -inf gives 0.
at::Tensor SoftmaxOrZero(const at::Tensor& logits);
// exp(x - maximum) needs a finite maximum where nothing was seen.
at::Tensor FiniteOrZero(const at::Tensor& maximum);

}  // namespace latte::composed
