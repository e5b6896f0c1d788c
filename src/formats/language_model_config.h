// The shape of a LanguageModel, as a value and as JSON (what a checkpoint's config holds).
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace latte::formats {

// A configuration that can't be: one line that names the field, what it holds and what it may.
class ConfigError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct LanguageModelConfig {
  int64_t vocab_size = 0;
  int64_t num_layers = 6;
  int64_t embed_dim = 384;
  int64_t num_heads = 6;
  std::optional<int64_t> num_kv_heads;  // num_heads unless given

  std::string attention = "softmax";  // softmax | window | latte | macchiato | linear | gated_linear; encoders: linformer
  // How the model knows where a token stands; see position_name() for what each attention takes unless given.
  //   none     nothing (a causal model still sees order)                                  every attention
  //   learned  an embedding added to the token's, up to max_positions                     every attention
  //   sinusoidal  sines and cosines added to it (arXiv 1706.03762)                        every attention
  //   rotary   queries and keys rotated by their position                                 softmax, window, macchiato
  //   vapor    values rotated by their position, what is read of them rotated back        every attention
  //   conv     a short causal convolution before the latents' logits                      every attention
  //   rg_lru   Griffin's recurrence there                                                 every attention
  // Without latents the last two stand before the projections of queries and keys, and nothing else tells them where a token
  // stands. Macchiato's window is rotary with the last four, and reads values as they are.
  std::optional<std::string> position;
  std::optional<int64_t> num_latents;  // latte, macchiato: for each head; embed_dim / num_heads unless given
  int64_t window = 32;                 // window, macchiato: tokens
  int64_t sinks = 0;                   // window, macchiato: first tokens that stay readable
  int64_t conv_width = 4;              // position conv
  std::optional<bool> forget;          // latte, macchiato: latents with a learned decay; see forgets()
  int64_t decay_rank = 16;             // latte, macchiato: of the map to those decays; 0: a whole matrix
  // latte, macchiato: the heads of a layer read the same latents, so that keys are scored once: key logits and values have a
  // single head, whatever num_kv_heads says. The default gives every key-value head its own.
  bool shared_latents = false;
  int64_t projected = 64;      // linformer: keys and values that are left of a sequence
  double rope_base = 10000.0;  // of rotary positions

  std::string norm = "layer";  // layer | rms; encoders: batch
  std::string mlp = "gelu";    // gelu | gated
  double mlp_ratio = 4.0;      // see hidden_dim()
  double dropout = 0.0;
  bool bias = false;  // of linear maps and layer norms
  int64_t max_positions = 1024;
  bool tie_embeddings = true;  // the output projection is the token embedding

  // The position in use. Unless given: rotary for the attentions that read tokens alone. For latte and macchiato conv: latents
  // alone are blind to order within what they have gathered, and a convolution tells them of the nearest tokens, which carry most
  // of the information on the next, at 2 K multiplications a channel.
  std::string position_name() const;
  // Whether latents forget. Unless given: wherever there are latents, since what the next token depends on is mostly near.
  // Trained on Shakespeare's characters for 1,000 steps, forgetting takes 0.07 nats off latte's validation loss and 0.05 off
  // macchiato's.
  bool forgets() const;
  // embed_dim · mlp_ratio; for a gated MLP 2/3 of it, rounded up to a multiple of 8, so that both have about as many parameters.
  int64_t hidden_dim() const;
  // Parameters of the model, a tied output projection counted once; computed without building it. Takes a valid configuration.
  int64_t parameter_count() const;
  int64_t kv_heads() const;  // key-value heads in use

  // kEncoder also takes what looks at a whole sequence: attention linformer and norm batch.
  enum class Role : uint8_t { kLanguageModel, kEncoder };
  // Throws ConfigError.
  void validate(Role role = Role::kLanguageModel) const;

  // Every field, with defaults filled in.
  nlohmann::json to_json() const;
  // Takes an object of these fields, of which only vocab_size must be there. Throws ConfigError: not an object, an unknown field,
  // a wrong type, or an impossible value.
  static LanguageModelConfig from_json(const nlohmann::json& json, Role role = Role::kLanguageModel);

  bool operator==(const LanguageModelConfig&) const = default;
};

// The model's configuration out of a checkpoint, for from_json: a field that checkpoints have not always held gets the value of
// that time where it is missing. Anything but an object is passed on.
nlohmann::json saved_model_config(nlohmann::json model);

// Whether a model of this attention can have that position; neither need exist.
bool takes_position(std::string_view attention, std::string_view position);

}  // namespace latte::formats
