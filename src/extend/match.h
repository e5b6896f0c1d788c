// The first stage of a conversion: each layer's latents are fitted on the original's own activations, so that window, sinks and
// latents give what softmax attention gave. Costs the original's forward pass and the attention operators alone, no product with
// the model's large matrices.
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
  double far_share = 0.0;     // of the original's probability, beyond window and sinks, mean over heads
  double window_error = 0.0;  // ‖window and sinks − original‖² / ‖original‖² of the attention's output
  double error = 0.0;         // the same with the latents
};

// `original` gives the activations; its attention is the pretrained one. `converted[i]` are the student's layers (empty where a
// layer isn't converted), whose pretrained weights equal the original's. `sequences` int64 [T] each. After each layer `report` is
// called; where it returns false the rest stays as it is.
void match_latents(models::Decoder& original, const std::vector<ConvertedAttention>& converted,
                   const std::vector<at::Tensor>& sequences, const ExtendOptions& options,
                   const std::function<bool(const MatchResult&)>& report);

}  // namespace latte::extend
