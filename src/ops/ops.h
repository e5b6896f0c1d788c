// The operators of latte as C++ functions on torch tensors. Python's `latte.causal_attention` and the rest have the same names,
// arguments and meanings; `torch.ops.latte.*` are the operators underneath, which autograd, autocast and torch.compile see.
//
// Shapes: B batch, T tokens, H query heads, Hkv key-value heads (H is a multiple; query head h reads key-value head h / (H /
// Hkv)), L latents a head, D head size of the values, Dk of query and key. With cu_seqlens (int64 [N + 1]) B is 1 and N sequences
// lie end to end; states then have N rows, else N = B. Inputs float32, bfloat16 or float16 (accumulated and kept as state in
// float32), or float64 throughout. Masks are bool, true = a real token. Errors: c10::ValueError for shapes and values,
// c10::TypeError for dtypes and devices, with what came and what was expected.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace latte {

using OptionalTensor = std::optional<at::Tensor>;

struct CausalAttentionOptions {
  OptionalTensor log_decay;      // [B, T, Hkv, L] <= 0: forgetting
  OptionalTensor key_mask;       // [B, T]
  OptionalTensor initial_state;  // [N, Hkv, L, D + 3], from output_final_state
  bool output_final_state = false;
  OptionalTensor cu_seqlens;  // [N + 1]
};

// Causal latent attention (arXiv 2402.17512, equation 10). query_logits [B,T,H,L], key_logits [B,T,Hkv,L], values [B,T,Hkv,D].
// Returns out [B,T,H,D] and, if asked for, the state after the last token.
std::tuple<at::Tensor, OptionalTensor> causal_attention(const at::Tensor& query_logits, const at::Tensor& key_logits,
                                                        const at::Tensor& values, const CausalAttentionOptions& options = {});

struct BidirectionalAttentionOptions {
  OptionalTensor key_mask;    // [B, T]
  OptionalTensor cu_seqlens;  // [N + 1]
};

// Bidirectional latent attention (equation 6). Shapes as in causal_attention.
at::Tensor bidirectional_attention(const at::Tensor& query_logits, const at::Tensor& key_logits, const at::Tensor& values,
                                   const BidirectionalAttentionOptions& options = {});

// The decoding state of macchiato_attention and window_attention: opaque outside latte's own operators. N sequences.
struct MacchiatoState {
  at::Tensor latents;      // [N, Hkv, L, D + 3]; of window_attention: empty
  at::Tensor keys;         // [N, W, Hkv, Dk], the last W tokens', the newest last
  at::Tensor values;       // [N, W, Hkv, D]
  at::Tensor mask;         // bool [N, W]
  at::Tensor sink_keys;    // [N, S, Hkv, Dk]
  at::Tensor sink_values;  // [N, S, Hkv, D]
  at::Tensor sink_mask;    // bool [N, S]
  at::Tensor position;     // int64 [N]: tokens seen
};

struct MacchiatoAttentionOptions {
  int64_t window = 128;
  int64_t sinks = 0;
  OptionalTensor sink_query;  // [B, T, H, Dk]
  bool causal = true;
  std::optional<double> scale;  // 1 / sqrt(Dk) unless given
  OptionalTensor log_decay;
  OptionalTensor key_mask;
  std::optional<MacchiatoState> initial_state;
  bool output_final_state = false;
  OptionalTensor cu_seqlens;
};

// Latte-Macchiato (section 3.4): one mixture of L latents and a window of standard attention. query_logits [B,T,H,L+1], index 0
// the window's; query [B,T,H,Dk], key [B,T,Hkv,Dk].
std::tuple<at::Tensor, std::optional<MacchiatoState>> macchiato_attention(const at::Tensor& query, const at::Tensor& key,
                                                                          const at::Tensor& values,
                                                                          const at::Tensor& query_logits,
                                                                          const at::Tensor& key_logits,
                                                                          const MacchiatoAttentionOptions& options);

// The window of macchiato_attention alone, W tokens and S sinks of standard attention; log_decay is not read.
std::tuple<at::Tensor, std::optional<MacchiatoState>> window_attention(const at::Tensor& query, const at::Tensor& key,
                                                                       const at::Tensor& values,
                                                                       const MacchiatoAttentionOptions& options);

// Joins the latent states of two stretches that follow each other, [N, Hkv, L, D + 3] each. Associative.
at::Tensor merge_states(const at::Tensor& left, const at::Tensor& right);

struct CausalConv1dOptions {
  OptionalTensor bias;           // [C]
  OptionalTensor key_mask;       // [B, T]
  OptionalTensor initial_state;  // [N, K - 1, C]
  bool output_final_state = false;
  OptionalTensor cu_seqlens;
};

// Causal depthwise convolution over time: x [B, T, C], weight [C, K] -> out [B, T, C].
std::tuple<at::Tensor, OptionalTensor> causal_conv1d(const at::Tensor& x, const at::Tensor& weight,
                                                     const CausalConv1dOptions& options = {});

struct RgLruOptions {
  OptionalTensor key_mask;       // [B, T]
  OptionalTensor initial_state;  // [N, C]
  bool output_final_state = false;
  OptionalTensor cu_seqlens;
};

// Griffin's real-gated linear recurrence (arXiv 2402.19427, equations 1 to 4): x and the gates' logits [B, T, C], lambda [C].
std::tuple<at::Tensor, OptionalTensor> rg_lru(const at::Tensor& x, const at::Tensor& recurrence_logits,
                                              const at::Tensor& input_logits, const at::Tensor& lambda,
                                              const RgLruOptions& options = {});

// Rotates x [B, T, H, D] by its positions (VAPOR; rotate-half pairs); positions int64 [B, T] or [T], 0 … T - 1 unless given.
at::Tensor vapor(const at::Tensor& x, const OptionalTensor& positions = {}, double base = 10000.0, bool inverse = false);

// torch.nn.functional.linear: x [..., K], weight [M, K], bias [M] -> [..., M]. Float32 on the CPU goes to the faster of torch's
// matrix libraries; the results differ by rounding. Differentiable any number of times.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = {});

}  // namespace latte
