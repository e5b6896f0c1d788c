// What a model computes: of a GGUF file by the table of architectures (formats/decoder_config.h), or of a checkpoint of latte
// train by its config.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/gguf.h"
#include "formats/language_model_config.h"
#include "kernels/token_rows.h"

namespace latte::runtime {

struct Rotary {
  double base = 10000.0;
  double scale = 1.0;  // of the positions; 0: nothing turns
};

enum class Norm : uint8_t { kRms, kLayer };

// What the input of the latents' logits, without latents of queries and keys, goes through first.
enum class Mixer : uint8_t { kNone, kConv, kRgLru };

enum class Linear : uint8_t { kNone, kNormalised, kGated };  // nn/linear_attention.h has the formulas

// How a layer attends. `window` 0: every token; `latents` > 0: a mixture of them and of the window (Macchiato), without `tokens`
// latents alone (Latte).
struct LayerShape {
  int64_t window = 0;
  int64_t sinks = 0;
  int64_t latents = 0;
  int64_t rotary = 0;     // index in ModelShape::rotary
  bool tokens = true;     // reads tokens, all or a window's
  bool evicted = false;   // the latents read a token when it leaves the window, sinks never (formats/adapter.h)
  bool floor = false;     // latents have one (formats/adapter.h); their values have a channel more, of ones
  bool key_conv = false;  // latents' keys go through a convolution (formats/adapter.h)
  Linear linear = Linear::kNone;

  bool has_sums() const { return latents > 0 || linear != Linear::kNone; }  // whose state sums up the past
};

// The attention that a caller wants instead of the model's own, in its layers that read every token.
struct AttentionChoice {
  int64_t window = 0;  // 0: as the model has it
  int64_t sinks = 0;
  int64_t latents = 0;  // > 0: with random weights, to measure speed and memory by
  int64_t far_limit = 8192;
};

struct ModelShape {
  std::string architecture;
  int64_t embed_dim = 0;     // E
  int64_t num_heads = 0;     // H
  int64_t num_kv_heads = 0;  // Hkv
  int64_t key_dim = 0;       // Dk
  int64_t head_dim = 0;      // D
  int64_t hidden_dim = 0;    // F
  int64_t vocab_size = 0;
  int64_t context = 0;  // trained tokens
  float epsilon = 1e-5f;
  float embedding_scale = 1.0f;
  float attention_scale = 1.0f;
  kernels::Gate gate = kernels::Gate::kSilu;
  bool post_norms = false;   // a norm behind attention and feed-forward, before the residual sum
  bool query_norms = false;  // of each query and key head
  kernels::RotaryPairs pairs = kernels::RotaryPairs::kNeighbours;
  int64_t rotary_dims = 0;  // channels of a head that are rotated
  std::vector<Rotary> rotary;
  int64_t far_limit = 8192;  // formats/adapter.h
  std::vector<LayerShape> layers;

  // Of latte train's models.
  Norm norm = Norm::kRms;
  bool gated = true;              // the feed-forward's first half has two matrices
  bool latents_of_input = false;  // the latents' logits come from the layer's input, not from heads of queries and keys
  Mixer mixer = Mixer::kNone;     // of that input
  int64_t conv_width = 0;         // K
  int64_t vapor = -1;             // values are rotated by so many-th of `rotary`; where there are latents, theirs alone; -1: not
  bool sinusoidal = false;        // sines and cosines are added to the embeddings
  int64_t learned_positions = 0;  // so many are added to the embeddings, and a session ends there; 0: none

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t latent_dim(const LayerShape& layer) const { return head_dim + (layer.floor ? 1 : 0); }  // channels that latents average
  bool constant_state() const;                                                                    // no layer reads every token
  // Whether a layer's queries and keys come from its mixed input, and its tokens' values are rotated: what else has the latents.
  bool mixes_heads(const LayerShape& layer) const { return mixer != Mixer::kNone && layer.latents == 0; }
  bool turns_tokens(const LayerShape& layer) const { return vapor >= 0 && layer.latents == 0; }

  // Throws FormatError for an architecture that isn't in the table, metadata that lack something or don't fit, and tensors that
  // are missing or too many; ModelError for what the table knows and the engine doesn't (soft caps, YaRN).
  static ModelShape from(const formats::GgufFile& file);
  // Throws ModelError for heads that are too large.
  static ModelShape from(const formats::LanguageModelConfig& config);
};

}  // namespace latte::runtime
