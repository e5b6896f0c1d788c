// The parts of a pre-norm transformer around its attention: normalisation, MLP and the block.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>

#include "nn/attention.h"
#include "nn/module_utils.h"

namespace latte::nn {

// The ranks that share a batch.
class BatchPeers {
 public:
  virtual ~BatchPeers() = default;
  // The sum over all ranks, in place, of a contiguous tensor. Collective: all ranks call it in the same order.
  virtual void sum(at::Tensor& values) = 0;
};

enum class NormKind : uint8_t { kLayer, kRms, kBatch };

// LayerNorm or RMSNorm over the last dimension, or BatchNorm over all others. Parameters `weight` [dim] and, with bias, for all
// but RMSNorm `bias` [dim]; BatchNorm's buffers `running_mean` and `running_var` [dim] follow training by a tenth a step.
class NormImpl : public torch::nn::Module {
 public:
  NormImpl(NormKind kind, int64_t dim, bool bias, double eps = 1e-5);
  // padding: x's dimensions but the last, bool, true = padding, or floating, -inf = padding. BatchNorm leaves it out of its
  // statistics; the others don't look.
  at::Tensor forward(const at::Tensor& x, const OptionalTensor& padding = {});

  at::Tensor weight;
  at::Tensor bias;
  at::Tensor running_mean;  // kBatch only
  at::Tensor running_var;
  // kBatch: training's statistics are over all ranks' rows, forward and backward; null: over this process's. Outlives the module.
  BatchPeers* peers = nullptr;

 private:
  at::Tensor batch_norm(const at::Tensor& x, const OptionalTensor& padding);
  at::Tensor normalise(const at::Tensor& rows);  // in training, of real tokens [N, dim]
  at::Tensor normalise_with_peers(const at::Tensor& rows);

  NormKind kind_;
  double eps_;
};
TORCH_MODULE(Norm);

enum class MlpKind : uint8_t {
  kGelu,   // down(gelu(up(x)))
  kGated,  // down(silu(gate(x)) * up(x)): SwiGLU
};

class MlpImpl : public torch::nn::Module {
 public:
  MlpImpl(MlpKind kind, int64_t dim, int64_t hidden_dim, bool bias);
  at::Tensor forward(const at::Tensor& x);

  Linear gate_proj{nullptr};  // kGated only
  Linear up_proj{nullptr};
  Linear down_proj{nullptr};
};
TORCH_MODULE(Mlp);

struct BlockOptions {
  int64_t embed_dim = 0;
  int64_t hidden_dim = 0;  // of the MLP
  NormKind norm = NormKind::kLayer;
  MlpKind mlp = MlpKind::kGelu;
  bool bias = true;
  double dropout = 0.0;  // on both residual branches
};

// x + attention(norm(x)), then x + mlp(norm(x)).
class BlockImpl : public torch::nn::Module {
 public:
  // `attention` takes [B, T, E]: batch_first.
  BlockImpl(const BlockOptions& options, std::shared_ptr<AttentionImpl> attention);
  // x [B, T, E]; the options are the attention's, and so are the result's weights and state.
  AttentionResult forward(const at::Tensor& x, const AttentionForwardOptions& options = {});

  Norm attention_norm{nullptr};
  std::shared_ptr<AttentionImpl> attention;
  Norm mlp_norm{nullptr};
  Mlp mlp{nullptr};

 private:
  double dropout_;
};
TORCH_MODULE(Block);

}  // namespace latte::nn
