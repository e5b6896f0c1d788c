// What language models and encoders are built of, from their configuration.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>

#include "formats/language_model_config.h"
#include "nn/blocks.h"

namespace latte::models {

std::shared_ptr<nn::AttentionImpl> make_attention(const formats::LanguageModelConfig& config);

nn::BlockOptions block_options(const formats::LanguageModelConfig& config);

// Linear maps and embeddings normal with deviation 0.02, what writes to the residual stream (out_proj and down_proj)
// 0.02 / sqrt(2 num_layers), biases zero. Everything else keeps its own rule.
void initialise(torch::nn::Module& model, int64_t num_layers);

// [time, embed_dim] of like's dtype: sin and cos of position · 10000^(-2 i / embed_dim) (arXiv 1706.03762), with the deviation of
// fresh embeddings.
at::Tensor sinusoidal_positions(int64_t begin, int64_t time, const at::Tensor& like);

}  // namespace latte::models
