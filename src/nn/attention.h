// Latent attention as modules that take torch.nn.MultiheadAttention's place in self-attention: LatteAttention and
// MacchiatoAttention (arXiv 2402.17512). Python's latte.nn has modules of the same names, parameters and meanings.
//
// Shapes: B batch, T tokens, E embed_dim, H query heads, Hkv key-value heads (query head h reads key-value head h / (H / Hkv)),
// D = E / H, L latents a head. Errors: c10::ValueError, for dtypes c10::TypeError, with what came and what was expected.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "nn/module_utils.h"
#include "nn/recurrent.h"
#include "nn/sequence_peers.h"
#include "ops/ops.h"

namespace latte::nn {

// What an attention module carries from one stretch of a sequence to the next. A module fills the fields it needs; of all but
// SoftmaxAttention without a window the size doesn't depend on how many tokens were seen.
struct AttentionState {
  at::Tensor latents;                       // LatteAttention: [B, Hkv, L, D + 3]; LinearAttention has its sums here
  std::optional<MacchiatoState> macchiato;  // MacchiatoAttention (keys D + 1 wide once a mask adds), SoftmaxAttention's window
  at::Tensor keys;                          // SoftmaxAttention: [B, position, Hkv, D], rotated
  at::Tensor values;                        // SoftmaxAttention: [B, position, Hkv, D]
  at::Tensor mask;                          // SoftmaxAttention: bool [B, position]; undefined where every token is real
  at::Tensor conv;                          // position "conv": [B, K - 1, E]
  at::Tensor rg_lru;                        // position "rg_lru": [B, E]
  int64_t position = 0;                     // tokens seen, padding included
};

struct AttentionForwardOptions {
  // [B, T] ([T] without a batch): bool, true = PADDING, torch.nn.MultiheadAttention's meaning, the inverse of the operators'
  // masks; or floating, -inf = padding. LatteAttention and MacchiatoAttention add what is finite to a token's key logits for
  // every latent and, in a window, to its scores, with gradients; the others take zeros alone.
  OptionalTensor key_padding_mask;
  bool is_causal = false;
  // Return p(s|t): quadratic in T, for looking at. Needs the whole sequence, so it excludes `state`.
  bool need_weights = false;
  bool average_attn_weights = true;  // over the heads
  // Causal only: what came before, and whether to return what comes after, which is also done where a state is given.
  std::optional<AttentionState> state;
  bool output_state = false;
  // Causal only, without masks and states: x is this rank's stretch of a sequence that its peers hold the rest of.
  SequencePeers* peers = nullptr;
};

struct AttentionResult {
  at::Tensor out;                       // as the input
  at::Tensor weights;                   // [B, T, T] or [B, H, T, T] (without a batch: no B); undefined unless asked for
  std::optional<AttentionState> state;  // if asked for or given
};

// How attention knows where a token stands, other than by rotated queries and keys.
enum class LatentPosition : uint8_t {
  kNone,
  kVapor,  // values are rotated by their position, what is read of them is rotated back by the reader's
  kConv,   // a short causal convolution on the input of the query and key logits; without latents, of queries and keys
  kRgLru,  // Griffin's real-gated linear recurrence there
};

// "none", "vapor", "conv" and "rg_lru"; ValueError for anything else.
LatentPosition parse_latent_position(std::string_view name);
std::string to_string(LatentPosition position);

constexpr double kVaporBase = 10000.0;  // of the rotation's angles

// What every attention module has in common: layouts, masks and checks. Subclasses implement attend().
class AttentionImpl : public torch::nn::Module {
 public:
  // x [T, B, E], with batch_first [B, T, E], without a batch [T, E].
  AttentionResult forward(const at::Tensor& x, const AttentionForwardOptions& options = {});

  CausalConv1d conv{nullptr};  // position kConv only
  RgLru rg_lru{nullptr};       // position kRgLru only

 protected:
  AttentionImpl(std::string name, int64_t embed_dim, bool batch_first);

  // Makes `conv` or `rg_lru`, where `position` is one of them.
  void register_mixer(LatentPosition position, int64_t conv_width, bool bias);
  void reset_mixer();
  // x [B, T, E] behind conv or rg_lru, x itself without them. Fills the new state's conv and rg_lru.
  at::Tensor mix(const at::Tensor& x, const OptionalTensor& key_mask, const AttentionForwardOptions& options,
                 AttentionState& next);

  // x [B, T, E]; key_mask bool [B, T], true = a real token. Weights are returned as [B, H, T, T], of any floating dtype.
  virtual AttentionResult attend(const at::Tensor& x, const OptionalTensor& key_mask, const AttentionForwardOptions& options) = 0;
  // Whether attend() adds the finite floats of options.key_padding_mask [B, T].
  virtual bool takes_key_bias() const { return false; }

  std::string class_name_;

 private:
  int64_t embed_dim_;
  bool batch_first_;
};

struct LatteAttentionOptions {
  int64_t embed_dim = 0;
  int64_t num_heads = 0;
  // Acts on the heads' output before out_proj: the probabilities that MultiheadAttention's dropout acts on are never formed.
  double dropout = 0.0;
  bool bias = true;
  bool batch_first = false;
  std::optional<int64_t> num_latents;   // L, for each head; D unless given
  std::optional<int64_t> num_kv_heads;  // H unless given
  LatentPosition position = LatentPosition::kNone;
  int64_t conv_width = 4;  // K of position kConv
  bool forget = false;     // latents forget by a learned decay of each token (causal only)
  // Of the map to the decays, as in gated linear attention (arXiv 2312.06635, section 4.4): E * L Hkv multiplications a token
  // become R (E + L Hkv). 0: a whole matrix.
  int64_t decay_rank = 0;
};

// What LatteAttention and MacchiatoAttention share: the latents' projections and positions.
class LatentAttentionImpl : public AttentionImpl {
 public:
  void reset_parameters();
  // Of a low rank: makes logits of decays as large as what decay_down gives, and a head's latents remember from 5 tokens
  // (a bias of -3) to 300 (3) in even steps: equal ones would take long to part, with two small matrices behind them.
  void reset_decay();

  Linear query_logits_proj{nullptr};  // E -> H * L; Macchiato: H * (L + 1), laid out [H, L + 1], index 0 the window's
  Linear key_logits_proj{nullptr};    // E -> Hkv * L
  Linear value_proj{nullptr};         // E -> Hkv * D
  Linear out_proj{nullptr};           // H * D -> E
  Linear decay_proj{nullptr};         // E -> Hkv * L; forget with decay_rank 0
  Linear decay_down{nullptr};         // E -> decay_rank -> Hkv * L; forget with another: without a bias, and with one
  Linear decay_up{nullptr};

 protected:
  bool takes_key_bias() const override { return true; }

  // Inputs of the operators.
  struct Latents {
    at::Tensor query_logits;   // [B, T, H, L], Macchiato [B, T, H, L + 1]
    at::Tensor key_logits;     // [B, T, Hkv, L], key_bias added
    OptionalTensor key_bias;   // [B, T]
    at::Tensor values;         // [B, T, Hkv, D], not rotated
    OptionalTensor log_decay;  // [B, T, Hkv, L]
    at::Tensor positions;      // int64 [T]
  };

  LatentAttentionImpl(const std::string& name, const LatteAttentionOptions& options, int64_t gates);

  // Fills the new state's position, conv and rg_lru as well.
  Latents project(const at::Tensor& x, const OptionalTensor& key_mask, const AttentionForwardOptions& options,
                  AttentionState& next);
  // [B, T, Hkv, L] of x [B, T, E]: the sigmoid's 16th root, so that a fresh module forgets slowly.
  at::Tensor log_decay(const at::Tensor& x);
  // Dropout and out_proj on the heads' output [B, T, H, D].
  at::Tensor finish(const at::Tensor& heads_out);

  // Makes decay_proj, or decay_down and decay_up.
  void register_decay();

  LatteAttentionOptions latte_;
  int64_t head_dim_;
  int64_t num_latents_;
  int64_t num_kv_heads_;
};

// Pure latent attention, linear in T. Causal with is_causal, else bidirectional (positions kConv and kRgLru still look back
// only).
class LatteAttentionImpl : public LatentAttentionImpl {
 public:
  explicit LatteAttentionImpl(const LatteAttentionOptions& options);

 private:
  AttentionResult attend(const at::Tensor& x, const OptionalTensor& key_mask, const AttentionForwardOptions& options) override;
};
TORCH_MODULE(LatteAttention);

struct MacchiatoAttentionOptions : LatteAttentionOptions {
  int64_t window = 128;  // W
  int64_t sinks = 0;     // S, causal only
  bool rope = true;      // rotate the window's queries and keys by their position
  double rope_base = 10000.0;
};

// Queries and keys of a window, rotated: what window_attention and macchiato_attention take.
struct RotatedWindow {
  at::Tensor query;           // [B, T, H, D]
  at::Tensor key;             // [B, T, Hkv, D]
  OptionalTensor sink_query;  // [B, T, H, D]; with sinks only
};
// Rotates by `positions` int64 [T]; sink_query as if at position min(t, window + sinks - 1), so that the distance to a sink never
// leaves the trained range.
RotatedWindow rotate_window(const at::Tensor& query, const at::Tensor& key, const at::Tensor& positions, double base,
                            int64_t window, int64_t sinks);

// int64 [count]: begin, begin + 1 …
at::Tensor positions_from(int64_t begin, int64_t count, const at::Device& device);

// A mixture of L latents and standard attention over a window of W tokens and S sinks.
class MacchiatoAttentionImpl : public LatentAttentionImpl {
 public:
  explicit MacchiatoAttentionImpl(const MacchiatoAttentionOptions& options);

  Linear query_proj{nullptr};  // E -> H * D
  Linear key_proj{nullptr};    // E -> Hkv * D

 private:
  AttentionResult attend(const at::Tensor& x, const OptionalTensor& key_mask, const AttentionForwardOptions& options) override;
  std::tuple<at::Tensor, std::optional<MacchiatoState>> attend_vapor(const Latents& latents, const RotatedWindow& window,
                                                                     const latte::MacchiatoAttentionOptions& options);

  MacchiatoAttentionOptions macchiato_;
};
TORCH_MODULE(MacchiatoAttention);

}  // namespace latte::nn
