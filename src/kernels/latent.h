// Latent attention, causal and bidirectional: forward, backward and one-token step (arXiv 2402.17512, equations 6 to 12;
// the running maximum and the chunked form are described in docs/mathematics.md).
//
// Work is split in slices, one per sequence and key-value head: any thread may run any slice, a slice belongs to one thread, and
// the result doesn't depend on the split. A slice holds the H / Hkv query heads that read its key-value head.
//
// The state of a key-value head is a float32 matrix [L, D + 3], row l: S[l, 0 … D-1], z[l], m[l], G[l], where m is the running
// maximum of the key logits, z = Σ exp(k - m), S = Σ exp(k - m) v and G the total log decay since the stretch began. A state that
// has seen nothing has S = z = G = 0 and m = -inf.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace latte::kernels {

constexpr int64_t kStateExtra = 3;       // z, m, G behind S in each row of a state
constexpr int64_t kSegmentTokens = 256;  // distance of the states that a forward pass keeps for its backward pass

struct LatentArgs {
  DType dtype = DType::kFloat32;
  bool causal = true;
  int64_t sequences = 0;                // N: batch rows, or the sequences that cu_seqlens packs in one row
  int64_t time = 0;                     // T, of a batch row
  int64_t heads = 0;                    // H, a multiple of kv_heads
  int64_t kv_heads = 0;                 // Hkv
  int64_t latents = 0;                  // L
  int64_t head_dim = 0;                 // D
  const int64_t* cu_seqlens = nullptr;  // [N + 1] or null

  View query_logits;  // [B, T, H, L], or [B, T, H, L + 1] with `window_out`: index 0 is the window's
  View key_logits;    // [B, T, Hkv, L]
  View values;        // [B, T, Hkv, D]
  View log_decay;     // [B, T, Hkv, L] <= 0, optional, causal only
  View window_out;    // [B, T, H, D] float32 whatever dtype is; optional: what latent 0 reads (Latte-Macchiato; see macchiato.h)
  MaskView key_mask;  // [B, T], optional
  const float* initial_state = nullptr;  // [N, Hkv, L, D + 3], contiguous, optional, causal only
};

// Outputs overlap no input.
struct LatentOutputs {
  MutableView out;               // [B, T, H, D], dtype
  float* final_state = nullptr;  // [N, Hkv, L, D + 3] or null. Bidirectional: always null
  // States at the start of every kSegmentTokens tokens (causal), or the state of the whole sequence (bidirectional), which the
  // backward pass needs: LatentSavedFloats() for all slices together, or null in inference.
  float* saved = nullptr;
};

struct LatentGradients {
  View grad_out;                            // [B, T, H, D], dtype
  const float* grad_final_state = nullptr;  // [N, Hkv, L, D + 3] or null
  const float* final_state = nullptr;       // needed with grad_final_state and log_decay
  const float* saved = nullptr;             // from the forward pass

  MutableView grad_query_logits;
  MutableView grad_key_logits;
  MutableView grad_values;
  MutableView grad_log_decay;           // absent when log_decay is
  MutableView grad_window_out;          // float32, absent when window_out is
  float* grad_initial_state = nullptr;  // [N, Hkv, L, D + 3] or null
};

// Slices to run: sequences * kv_heads.
int64_t LatentSlices(const LatentArgs& args);
// Floats that `saved` holds, all slices together: about L (D + 3) / kSegmentTokens a token and key-value head.
int64_t LatentSavedFloats(const LatentArgs& args);

// Run the slices [first, last). A thread does best with neighbouring slices in one call: heads of one sequence share memory
// pages.
void LatentForward(const LatentArgs& args, const LatentOutputs& outputs, int64_t first, int64_t last);
void LatentBackward(const LatentArgs& args, const LatentGradients& gradients, int64_t first, int64_t last);

// One token (T = 1) of one slice, which updates `state` [L, D + 3] in place. `args.initial_state` is not read.
void LatentStep(const LatentArgs& args, const LatentOutputs& outputs, float* state, int64_t slice);

// Joins two stretches: `left` [L, D + 3] followed by `right`, written to `out`, which may be either.
void MergeStates(int64_t latents, int64_t head_dim, const float* left, const float* right, float* out);

}  // namespace latte::kernels
