// Softmax attention over a sliding window and attention sinks: the standard-attention part of Latte-Macchiato, forward and
// backward.
//
// Token t of a sequence (t counts from the sequence's true start: `position` tokens came before this call) reads
//   causal:        {t - W + 1 … t} ∪ {0 … S - 1}, none twice;
//   bidirectional: {s : |t - s| < W} (no sinks, no past).
// A sink that has left the window (s <= t - W) is scored with `sink_query` where that is given. Masked keys are read by nobody; a
// token whose set is empty has out = 0 and lse = -inf.
//
// One token of a sequence (T = 1 with a past) is a step of decoding, which takes a path of its own: no tiles, each row read once.
// What the next one reads is the caller's to move: rows position − P + 1 … position into past_key and past_values (a ring of W
// rows that the caller turns costs one row a token), and rows below S into sink_key and sink_values.
//
// Work is split in slices, one per sequence and key-value head, as in latent.h.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace latte::kernels {

struct WindowArgs {
  DType dtype = DType::kFloat32;
  bool causal = true;
  int64_t sequences = 0;                // N
  int64_t time = 0;                     // T, of a batch row
  int64_t heads = 0;                    // H, a multiple of kv_heads
  int64_t kv_heads = 0;                 // Hkv
  int64_t key_dim = 0;                  // Dk
  int64_t head_dim = 0;                 // D
  int64_t window = 0;                   // W >= 1
  int64_t sinks = 0;                    // S >= 0
  float scale = 1.0f;                   // of the scores
  const int64_t* cu_seqlens = nullptr;  // [N + 1] or null

  View query;         // [B, T, H, Dk]
  View sink_query;    // [B, T, H, Dk], optional
  View key;           // [B, T, Hkv, Dk]
  View values;        // [B, T, Hkv, D]
  MaskView key_mask;  // [B, T], optional

  // What came before this call; all absent when position is null (a fresh start). Row n belongs to sequence n.
  const int64_t* position = nullptr;  // [N]: tokens that came before
  int64_t past = 0;                   // P: rows of past_key; its last row is the token at position - 1
  View past_key;                      // [N, P, Hkv, Dk]; rows of negative position are never read
  View past_values;                   // [N, P, Hkv, D]
  MaskView past_mask;                 // [N, P], optional
  View sink_key;                      // [N, S, Hkv, Dk]: tokens 0 … S - 1; rows >= position are never read
  View sink_values;                   // [N, S, Hkv, D]
  MaskView sink_mask;                 // [N, S], optional
};

struct WindowOutputs {
  float* out = nullptr;  // [B, T, H, D], contiguous, float32
  float* lse = nullptr;  // [B, T, H], contiguous: log Σ exp(score), for the backward pass; null in inference
};

struct WindowGradients {
  const float* out = nullptr;  // from the forward pass
  const float* lse = nullptr;  // from the forward pass
  View grad_out;               // [B, T, H, D] float32, any strides

  MutableView grad_query;       // dtype, each shaped as its input
  MutableView grad_sink_query;  // absent when sink_query is
  MutableView grad_key;
  MutableView grad_values;
  MutableView
      grad_past_key;  // the four of the past: absent or all present; every element is written (zero where nothing was read)
  MutableView grad_past_values;
  MutableView grad_sink_key;
  MutableView grad_sink_values;
};

int64_t WindowSlices(const WindowArgs& args);  // sequences * kv_heads
// Runs the slices [first, last). A thread does best with neighbouring slices in one call, as in latent.h.
void WindowForward(const WindowArgs& args, const WindowOutputs& outputs, int64_t first, int64_t last);
void WindowBackward(const WindowArgs& args, const WindowGradients& gradients, int64_t first, int64_t last);

}  // namespace latte::kernels
