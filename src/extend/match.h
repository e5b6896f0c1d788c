// The first stage of a conversion: each layer's latents are fitted on the model's own activations, so that window, sinks and
// latents give what softmax attention gives. Costs one forward pass and the attention operators alone, no product with the
// model's large matrices.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "extend/converted_attention.h"
#include "extend/options.h"
#include "models/decoder.h"

namespace latte::extend {

struct MatchResult {
  int64_t layer = 0;
  double far_share = 0.0;          // of softmax attention's probability, beyond window and sinks, mean over the heads matched
  std::vector<int64_t> heads;      // these
  std::vector<double> far_shares;  // of each of them
  double window_error = 0.0;  // ‖window and sinks − softmax‖² / ‖softmax‖² of what these heads add to the attention's output
  double error = 0.0;         // the same with the latents
};

struct MatchWatch {
  std::function<bool(const MatchResult&)> layer = [](const MatchResult&) { return true; };
  std::function<bool(int64_t done, int64_t total)> progress = [](int64_t, int64_t) { return true; };
};

// The latents of options.match_layers (all, where that is empty) start afresh and are fitted, but for layers before `first`,
// which an earlier call has fitted: in two calls they come out as in one. `converted[i]` are the student's layers, empty where a
// layer isn't converted. `sequences` int64 [T] each. After each layer `watch.layer` is called, and after each sequence read and
// each step `watch.progress`; where one returns false no more is done, and a layer at work stays half fitted.
//
// match_latents(): activations are those of `original`, whose attention is the pretrained one and whose weights are the
// student's. rematch_latents(): those of `student`, each layer fitted before the next one reads; what softmax attention
// (`original`'s) would make of the student's own weights is the aim. For a model that was trained since, or whose layers lack
// something.
void match_latents(models::Decoder& original, const std::vector<ConvertedAttention>& converted,
                   const std::vector<at::Tensor>& sequences, const ExtendOptions& options, const MatchWatch& watch,
                   int64_t first = 0);
void rematch_latents(models::Decoder& student, models::Decoder& original, const std::vector<ConvertedAttention>& converted,
                     const std::vector<at::Tensor>& sequences, const ExtendOptions& options, const MatchWatch& watch,
                     int64_t first = 0);

}  // namespace latte::extend
