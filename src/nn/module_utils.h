// What the attention modules check and build in the same way.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>

#include "ops/ops.h"

namespace latte::nn {

// ValueError unless `value`, the module's argument `name`, is in least … 2^24: any product of two sizes then fits in 64 bits.
void check_size(const std::string& module, const char* name, int64_t value, int64_t least);
// ValueError unless embed_dim / num_heads / num_kv_heads are positive and divide.
void check_heads(const std::string& module, int64_t embed_dim, int64_t num_heads, int64_t num_kv_heads);
// ValueError unless in [0, 1].
void check_dropout(const std::string& module, double dropout);
// ValueError unless heads of this size can be rotated with this base; `what` asks for it.
void check_rotation(const std::string& module, const char* what, int64_t head_dim, double base);
// ValueError where something that looks at the past alone is needed in bidirectional attention.
void check_causal(const std::string& module, bool is_causal, bool needed, const char* what);

// ValueError unless a state holds what the module reads from it: it may come from a module of another kind.
void check_state(const std::string& module, bool complete);

// torch::nn::Linear that multiplies with latte::linear.
class LinearImpl : public torch::nn::LinearImpl {
 public:
  using torch::nn::LinearImpl::LinearImpl;
  at::Tensor forward(const at::Tensor& x) {
    return latte::linear(x, weight, bias.defined() ? OptionalTensor(bias) : OptionalTensor());
  }
};
TORCH_MODULE(Linear);

Linear make_linear(int64_t in, int64_t out, bool bias);
// Xavier-uniform weights and zero biases, as torch.nn.MultiheadAttention.
void reset_linear(torch::nn::LinearImpl& linear);

}  // namespace latte::nn
