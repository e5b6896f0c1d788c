// The one table of pretrained decoder architectures: what a file's metadata says about a model, in terms that both engines
// (src/models on libtorch, src/runtime on ggml) build from. Tensors bear the names that GGUF gives them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"

namespace latte::formats {

// Which elements of a head rotate together.
enum class RopePairs : uint8_t {
  kNeighbours,  // (2i, 2i + 1): llama's GGUF files, whose query and key weights were permuted for it
  kHalves,      // (i, i + D/2)
};

// How positions beyond the trained context are squeezed into it.
enum class RopeScalingKind : uint8_t {
  kNone,
  kLinear,  // positions / factor
  kNtk,     // base · factor^(D / (D − 2)): fast pairs stay, the slowest turns factor times slower
  kYarn,    // pairs by how often they turn within the trained context: kept, slowed or in between (arXiv 2309.00071)
};

struct RopeScaling {
  RopeScalingKind kind = RopeScalingKind::kNone;
  double factor = 1.0;           // > 0
  int64_t original_context = 0;  // yarn: the trained context; config's context_length where 0
  double beta_fast = 32.0;       // yarn
  double beta_slow = 1.0;
  double attention_factor = 1.0;  // yarn: multiplies cosine and sine on top of 1 + 0.1 ln(factor)

  bool operator==(const RopeScaling&) const = default;
};

// "none", "linear", "ntk", "yarn"; nothing for anything else.
std::optional<RopeScalingKind> rope_scaling_named(std::string_view name);

struct RopeConfig {
  RopePairs pairs = RopePairs::kNeighbours;
  int64_t dims = 0;  // the head's size: all of it rotates
  double base = 10000.0;
  RopeScaling scaling;
};

enum class Activation : uint8_t { kSilu, kGelu };  // kGelu: the tanh approximation

struct DecoderConfig {
  std::string architecture;  // "llama"
  int64_t vocab_size = 0;
  int64_t num_layers = 0;
  int64_t embed_dim = 0;
  int64_t hidden_dim = 0;  // of the MLP
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t context_length = 0;  // trained
  double norm_eps = 1e-5;
  Activation activation = Activation::kSilu;
  double embedding_scale = 1.0;
  double attention_scale = 1.0;    // of query · key
  double attention_softcap = 0.0;  // c · tanh(score / c); 0: none
  double logit_softcap = 0.0;
  bool qk_norm = false;        // RMSNorm of each head's query and key, before rotation
  bool post_norms = false;     // RMSNorm of attention's and the MLP's output, before it is added
  bool tie_embeddings = true;  // the output projection is the token embedding
  bool rope_factors = false;   // the tensor rope_freqs.weight divides the frequencies
  RopeConfig rope;             // of layers that read everything
  RopeConfig local_rope;       // of local layers
  int64_t window = 0;          // of local layers: tokens {t − window + 1 … t}; 0: no layer is local
  int64_t global_every = 1;    // where some are: the last of so many layers is global

  bool is_local(int64_t layer) const { return window > 0 && (layer + 1) % global_every != 0; }
  const RopeConfig& rope_of(int64_t layer) const { return is_local(layer) ? local_rope : rope; }
};

// The architectures that can be read: "llama", "gemma2", "gemma3".
std::vector<std::string_view> decoder_architectures();

// Throws FormatError, which names the metadata's source: another architecture, or a key that is missing, of another type or out
// of range. `tensors` tells what metadata leaves open (tied embeddings, the vocabulary's size).
DecoderConfig decoder_config(const GgufMetadata& metadata, std::span<const GgufTensorSpec> tensors);
DecoderConfig decoder_config(const GgufFile& file);

struct NamedShape {
  std::string name;
  std::vector<int64_t> shape;
};

// Every tensor that such a model has, in order: names and shapes.
std::vector<NamedShape> decoder_tensors(const DecoderConfig& config);

// Throws one FormatError that lists every tensor that is missing, of another shape, or not of this model.
void require_decoder_tensors(const std::string& source, const DecoderConfig& config, std::span<const GgufTensorSpec> tensors);

}  // namespace latte::formats
