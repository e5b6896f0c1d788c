// What `latte extend` is told: as a value and as JSON (what a checkpoint and an adapter's recipe hold).
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "formats/adapter.h"
#include "train/options.h"

namespace latte::extend {

using train::OptionError;

struct ExtendOptions {
  std::string model;                // GGUF file
  std::vector<std::string> text;    // plain files
  double held_out_fraction = 0.02;  // of each text, its end: for validation

  std::string from;  // an adapter to start from, in place of the first stage (but match_layers); its window may differ

  // What takes the place of softmax attention.
  std::string attention = "macchiato";  // macchiato | window-sinks (the control) | full (attention as it is: the other control)
  int64_t window = 512;                 // where time has its knee (docs/extending.md, window and latents against cost)
  int64_t sinks = 4;
  int64_t latents = 64;  // a key-value head
  // Blocks with another number of latents, as "15-24:256" or "3:16,20-24:512": where the original looks sharply, more help.
  std::string layer_latents;
  int64_t far_limit = 8192;  // formats/adapter.h
  bool forget = true;        // latents have a decay each; with `from` those that are made anew, the others as there
  // A latent must rise above a trained weight, or leaves its share to the window; such latents forget nothing
  // (formats/adapter.h). With `from` in the layers of match_layers, elsewhere as there.
  bool floor = false;
  // What the latents know of order beside the keys' own content: none | conv, a causal convolution of keys, so that a latent may
  // look for several tokens in a row (formats/adapter.h). With `from` in the layers of match_layers, elsewhere as there.
  std::string position = "none";
  bool evicted = true;  // latents read what left the window; else everything, sinks and window included

  // latents | attention: those and the attention's own weights | lora: those and low-rank changes of the attention's weights
  // (Hu et al. 2021, arXiv 2106.09685) | all: those and every weight of the blocks
  std::string train = "attention";
  int64_t lora_rank = 16;
  std::string loss = "kl";  // kl: to the original model; text: the next token
  double text_share = 0.0;  // of the next token in a loss "kl"; the rest is KL

  // First stage, of the latents alone: each layer's attention output is matched to the original's.
  int64_t match_sequences = 16;  // of `context` tokens; 0: latents start closed
  int64_t match_steps = 96;      // a layer
  // Blocks to match, as "17-18,23"; "": all, and with `from` none. Those of `from` are made anew and matched to what softmax
  // attention makes of the weights that `from` has. With `from` also key-value heads of blocks, as "17:1,18:2": the others of
  // these blocks stay as they are. These blocks may have another number of latents than there, beside heads that stay a larger
  // one.
  std::string match_layers;
  // Weight of a head's output at a token, in matching: 1 - match_share + match_share · (softmax attention's probability beyond
  // window and sinks there). 0: all count alike. Near 1: those count that find something far, so that gates open for it. Where
  // they open in vain, latents give their nearest misses, which costs the more the longer the text is (docs/extending.md,
  // retrieval).
  double match_share = 0.0;
  // After matching, a head's gate is lowered until of the tokens for which softmax attention reads mostly beyond window and sinks
  // this share reads as much of latents as the gate leaves to the window. 0: gates stay as they were fitted.
  double match_open = 0.0;

  // Second stage, through the whole model.
  int64_t tokens = 300000;
  int64_t context = 2048;
  // Sequences grow from here to `context`, doubling, each length for an equal share of the steps; a step keeps its number of
  // tokens. 0: all are of `context` tokens.
  int64_t first_context = 0;
  int64_t batch = 1;
  // Smallest window in training: each step draws one, from here in powers of two up to `window`, so that latents must carry. 0:
  // always `window`.
  int64_t least_window = 64;
  double lr = 3e-4;         // of pretrained weights; `latte extend --train lora` has 1e-3 unless it is named
  double latent_lr = 1e-3;  // of the latents' matrices; the gates' is a third of it
  double vector_lr = 2e-3;  // of their biases, slopes and decays
  double gate_lr = 0.0;     // of the gates' biases; 0: as other vectors. A gate that is shut by nats takes long to open otherwise
  double final_lr = 0.05;   // of each, at the end of the cosine
  int64_t warmup = 10;      // steps
  double clip = 1.0;        // gradient norm; 0: none
  int64_t seed = 1;
  std::string dtype = "auto";  // of matrix products: auto | float32 | bfloat16

  std::string storage = "q8_0";  // of the adapter's matrices: q8_0 | bf16 | f32
  int64_t eval_every = 25;       // steps; 0: at the end only
  int64_t eval_sequences = 2;    // a validation
  int64_t save_every = 25;       // steps, fewer where they take more than three minutes; 0: at the end only
  std::string teacher_cache;     // a folder for what the original says of each stretch, which other runs on them read; "": none

  int64_t latents_of(int64_t block) const;
  formats::LatentForm form_anew() const;                    // of latents that aren't those of `from`
  bool matches(int64_t block) const;                        // whether its latents are matched
  std::vector<int64_t> matched_heads(int64_t block) const;  // the key-value heads named of a block that is; empty: all
  // Throws OptionError where layer_latents or match_layers name a block that a model of so many hasn't.
  void check_blocks(int64_t blocks, int64_t kv_heads) const;
  int64_t steps() const { return (tokens + context * batch - 1) / (context * batch); }
  std::vector<int64_t> training_windows() const;  // rising
  int64_t context_of(int64_t step) const;         // tokens a sequence, at the step that follows `step` finished ones

  void validate() const;  // throws OptionError

  nlohmann::json to_json() const;                              // every field
  static ExtendOptions from_json(const nlohmann::json& json);  // throws OptionError
  // What a checkpoint or an adapter's recipe holds, which may be of before some option was there, or was refused: not validated.
  // Throws OptionError where it isn't of options.
  static ExtendOptions from_recipe(nlohmann::json json);

  bool operator==(const ExtendOptions&) const = default;
};

// The factor on every learning rate at the step that follows `step` finished ones.
double learning_rate_factor(const ExtendOptions& options, int64_t step);

}  // namespace latte::extend
