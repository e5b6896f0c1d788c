// What takes the place of softmax attention in a converted layer: the pretrained heads over a window and sinks, alone or mixed
// with latents (Macchiato). Its state has a constant size.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "extend/latent_logits.h"
#include "formats/adapter.h"
#include "models/decoder.h"

namespace latte::extend {

// Whether a window can take the place of its attention: not where scores are capped (Gemma 2).
bool is_convertible(const formats::DecoderConfig& config);

class ConvertedAttentionImpl : public models::DecoderAttentionImpl {
 public:
  // Without `latents` window and sinks alone. Throws c10::ValueError for a model that isn't convertible. Its parameters are named
  // blk.N.attention.latents.NAME in a model.
  ConvertedAttentionImpl(const formats::DecoderConfig& config, std::shared_ptr<const models::Rope> rope, const FarOptions& far,
                         LatentLogits latents = LatentLogits(nullptr));

  models::DecoderAttentionResult forward(const at::Tensor& x, const models::AttentionWeights& weights,
                                         const models::DecoderAttentionOptions& options) override;

  // The heads' outputs [B, T, H, D] from heads that aren't rotated, before the output projection; `next` is filled if not null.
  at::Tensor mix(const at::Tensor& x, const models::AttentionWeights::Heads& heads,
                 const models::DecoderAttentionOptions& options, models::DecoderAttentionState* next = nullptr);

  LatentLogits& latents() { return latents_; }  // may be empty
  const FarOptions& far() const { return far_; }
  // Training draws windows. A state belongs to the window that it was made with.
  void set_window(int64_t window) { far_.window = window; }
  // Query logits of latents as if -inf: window and sinks alone.
  void set_latents_off(bool off) { latents_off_ = off; }

  // While on, adds up the latents' share of probability, Σ_l p(l|t) less what floors leave to the window, over the tokens that
  // have anything beyond the window.
  void record_shares(bool on);
  at::Tensor mean_shares() const;  // float64 [H]; zero where nothing was recorded

 private:
  // The mixture of `window_out` and of latents that read what left the window; sets their part of the states.
  at::Tensor read_evicted(const at::Tensor& value, LatentInputs inputs, const at::Tensor& window_out,
                          const models::DecoderAttentionOptions& options, MacchiatoState* after,
                          models::DecoderAttentionState* next);

  // The latents' shares [B, T, H], the first token's at `position`.
  void record(const at::Tensor& shares, int64_t position);

  formats::DecoderConfig config_;
  std::shared_ptr<const models::Rope> rope_;
  FarOptions far_;
  LatentLogits latents_{nullptr};
  bool latents_off_ = false;
  bool recording_ = false;
  at::Tensor share_sum_;  // float64 [H]
  int64_t share_count_ = 0;
};
using ConvertedAttention = std::shared_ptr<ConvertedAttentionImpl>;

FarOptions far_options(const formats::AdapterSpec& spec);

// Replaces the attention of every block of `spec` that is converted, with closed latents. Empty pointers stand for the others.
// `forms` has one entry a block.
std::vector<ConvertedAttention> convert(models::Decoder& model, const formats::AdapterSpec& spec,
                                        const std::vector<LatentForm>& forms);

}  // namespace latte::extend
