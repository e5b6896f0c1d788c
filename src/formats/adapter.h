// What turns a pretrained model into a linear-time one: an adapter, a GGUF file with the weights that were added and changed, or
// a merged model, the base's GGUF file with the same in place. Both say in their metadata how the attention was replaced:
//
//   general.type       "adapter"            (adapter only; a merged model keeps what the base has)
//   general.architecture                    the base's: "llama", "gemma3"
//   adapter.type       "latte"              (adapter only)
//   latte.version      uint32 1, or 2 with latte.evicted
//   latte.window       uint32, W            tokens of standard attention
//   latte.sinks        uint32, S            first tokens of the text that stay readable
//   latte.far_limit    uint32               largest count of tokens beyond the window that is told apart (below)
//   latte.evicted      bool, absent: false   latents read a token when it leaves the window, sinks never (below)
//   latte.latents      int32 array, one a block: L > 0 latents a key-value head beside window and sinks (Macchiato); 0 window and
//                      sinks alone; -1 attention as in the base
//   latte.base.hash    string               XXH3 (128 bits) of the base file's bytes, 32 hexadecimal digits
//   latte.base.name    string               the base's general.name, for messages
//   latte.recipe       string               how it was made, JSON; for people
//
// A block N with latents has these tensors, of any type that can be dequantised (E embedding length, H query heads, Hkv
// key-value heads, Dk size of a head; row-major, so ggml's ne[] is the reverse):
//
//   blk.N.latte_query.weight [H, L, Dk]     blk.N.latte_query.bias [H, L]
//   blk.N.latte_key.weight   [Hkv, L, Dk]   blk.N.latte_key.bias   [Hkv, L]
//   blk.N.latte_gate.weight  [H, E]         blk.N.latte_gate.bias  [H]      blk.N.latte_gate.slope [H]
//   blk.N.latte_decay        [Hkv, L]       optional: without it nothing is forgotten
//   blk.N.latte_floor        [Hkv, L]       optional, finite, with latte.evicted (below)
//   blk.N.latte_conv.weight  [Hkv, Dk, 4]   optional, finite, with latte.evicted (below)
//
// Every other tensor is one of the base's, under its name and with its shape, that takes the base's place. With x the input of
// the block's attention (normalised), q[t,h] and k[t,g] its query and key heads before rotation, in the order of the base file's
// rows (after the norms of models that normalise them), and t the position in the text, the inputs of macchiato_attention are
//
//   far[t]                = min(t + 1 - W - S, latte.far_limit)                tokens the window doesn't see
//   query_logits[t, h, 0] = gate.weight[h] · x[t] + gate.bias[h] - gate.slope[h] · ln(max(far[t], 1) / 1024)
//   query_logits[t, h, l] = query.weight[h, l - 1] · q[t, h] + query.bias[h, l - 1]     for l ≥ 1; -inf where far[t] <= 0
//   key_logits[t, g, l]   = key.weight[g, l] · k[t, g] + key.bias[g, l]
//   log_decay[t, g, l]    = -exp(decay[g, l])
//
// with the values as they are, or, where latte.evicted, with key logits and values of token t - W in token t's place, key logits
// -inf where that is a sink or before the text: window, sinks and latents then share nothing; and sink_query the query rotated as
// if at position min(t, W + S - 1).
//
// With a floor, latent l's average has read, before all tokens, a value of zeros with the key logit floor[g, l]; so of p(l|t),
// the softmax of the query logits, it gives the share
//
//   kept[t, h, l] = p(l|t) z / (z + exp(floor[g, l])),   z = Σ exp(key_logits[s, g, l]) over the tokens that it has read
//
// to what it has read, and the window has 1 - Σ_l kept[t, h, l]: a latent that holds nothing like its key reads nothing, as
// softmax attention then rests on sinks. Forgetting wears the floor off: of a block that has both, latents with a floor have a
// decay of -1e4, which is none, and latents without one a floor of -1e4.
//
// With a convolution, key logits read Σ_j conv.weight[g, :, j] k[t - 3 + j, g] in place of k[t, g]: of each channel a weighted
// sum over the last four keys. Those of sinks and before the text are zeros.
//
// (Readers from before there were floors or convolutions refuse these tensors by their names.)
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"

namespace latte::formats {

constexpr uint32_t kAdapterVersion = 2;  // the newest; 1 is read as well
constexpr double kFarUnit = 1024.0;      // of far[t] in the gate
constexpr int64_t kKeyConvWidth = 4;     // tokens that a convolution of keys reads
constexpr float kAbsent = -1e4f;         // a latent's decay or floor where it has none: exp of it is 0

struct AdapterSpec {
  int64_t window = 512;
  int64_t sinks = 4;
  int64_t far_limit = 8192;
  bool evicted = false;          // latents read what left the window, else everything
  std::vector<int32_t> latents;  // one a block
  std::string base_hash;
  std::string base_name;
  std::string recipe;

  int64_t converted_blocks() const;  // blocks whose latents aren't -1

  // Reads the keys above. Throws FormatError: a key missing or of a wrong type, another version, an impossible size.
  static AdapterSpec from(const GgufMetadata& metadata);
  // Sets them.
  void put_into(GgufMetadata& metadata) const;

  bool operator==(const AdapterSpec&) const = default;
};

// The sizes of a base that an adapter has to fit.
struct BaseShape {
  std::string architecture;
  int64_t blocks = 0;
  int64_t embed_dim = 0;     // E
  int64_t num_heads = 0;     // H
  int64_t num_kv_heads = 0;  // Hkv
  int64_t head_dim = 0;      // Dk

  // Throws FormatError for metadata that lacks them.
  static BaseShape from(const GgufMetadata& metadata);
};

// Which of the tensors that may be absent a block with latents has.
struct LatentForm {
  bool decay = true;
  bool floor = false;
  bool conv = false;
};

// The tensors that block `block` must have, with type F32; none where it has no latents.
std::vector<GgufTensorSpec> adapter_tensors(const AdapterSpec& spec, const BaseShape& base, int64_t block, LatentForm form);

// An adapter file, read and checked as a whole.
class AdapterFile {
 public:
  // Throws FileError, or FormatError for a file that isn't an adapter.
  explicit AdapterFile(const std::string& path);

  const AdapterSpec& spec() const { return spec_; }
  const GgufFile& file() const { return file_; }

  // Throws FormatError, one line that lists all there is to say, where the adapter wasn't made for this base: another
  // architecture or hash, missing and unknown tensors, shapes that differ.
  void check_fits(const GgufFile& base) const;

 private:
  GgufFile file_;
  AdapterSpec spec_;
};

bool is_adapter(const GgufMetadata& metadata);

// Whether a tensor of this name belongs to latents: "blk.N.latte_…".
bool is_added_tensor(std::string_view name);

// Whether shapes are the same but for leading dimensions of 1, which ggml's own writers don't keep; and such a shape with `dims`
// dimensions.
bool same_shape(const std::vector<int64_t>& a, const std::vector<int64_t>& b);
std::vector<int64_t> with_dims(std::vector<int64_t> shape, size_t dims);

// The tensors of a model's file without the latents' of a merged one, which whoever converts attention reads on their own.
std::vector<GgufTensorSpec> base_tensors(const GgufFile& model);

// The spec of a merged model; nothing for a model that keeps its attention. Throws FormatError: a spec that is wrong, or tensors
// that are missing or don't fit it.
std::optional<AdapterSpec> merged_spec(const GgufFile& model);

// Write atomically. `tensors` are the added and the changed ones. Throw FileError, and FormatError where they don't fit the base.
void write_adapter(const std::string& path, const AdapterSpec& spec, const GgufFile& base, std::span<const GgufTensor> tensors,
                   FileOperations& operations = FileOperations::system());
void write_merged(const std::string& path, const AdapterSpec& spec, const GgufFile& base, std::span<const GgufTensor> tensors,
                  FileOperations& operations = FileOperations::system());

}  // namespace latte::formats
