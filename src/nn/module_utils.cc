#include "nn/module_utils.h"

#include <cmath>

namespace latte::nn {
namespace {

constexpr int64_t kLargestSize = int64_t{1} << 24;

}  // namespace

void check_size(const std::string& module, const char* name, int64_t value, int64_t least) {
  TORCH_CHECK_VALUE(value >= least && value <= kLargestSize, module, ": ", name, " must be in ", least, " … ", kLargestSize,
                    ", got ", value);
}

void check_heads(const std::string& module, int64_t embed_dim, int64_t num_heads, int64_t num_kv_heads) {
  check_size(module, "embed_dim", embed_dim, 1);
  check_size(module, "num_heads", num_heads, 1);
  check_size(module, "num_kv_heads", num_kv_heads, 1);
  TORCH_CHECK_VALUE(embed_dim % num_heads == 0, module, ": embed_dim must be a multiple of num_heads, got ", embed_dim, " and ",
                    num_heads);
  TORCH_CHECK_VALUE(num_heads % num_kv_heads == 0, module, ": num_heads must be a multiple of num_kv_heads, got ", num_heads,
                    " and ", num_kv_heads);
}

void check_dropout(const std::string& module, double dropout) {
  TORCH_CHECK_VALUE(dropout >= 0.0 && dropout <= 1.0, module, ": dropout must be in [0, 1], got ", dropout);
}

void check_rotation(const std::string& module, const char* what, int64_t head_dim, double base) {
  TORCH_CHECK_VALUE(head_dim % 2 == 0, module, ": ", what, " rotates pairs, so embed_dim / num_heads must be even, got ",
                    head_dim);
  TORCH_CHECK_VALUE(std::isfinite(base) && base > 0.0, module, ": rope_base must be positive, got ", base);
}

void check_causal(const std::string& module, bool is_causal, bool needed, const char* what) {
  TORCH_CHECK_VALUE(is_causal || !needed, module, ": ", what, " needs is_causal = true");
}

void check_state(const std::string& module, bool complete) {
  TORCH_CHECK_VALUE(complete, module, ": the state comes from a module of another kind");
}

Linear make_linear(int64_t in, int64_t out, bool bias) { return Linear(torch::nn::LinearOptions(in, out).bias(bias)); }

void reset_linear(torch::nn::LinearImpl& linear) {
  torch::NoGradGuard no_grad;
  torch::nn::init::xavier_uniform_(linear.weight);
  if (linear.bias.defined()) linear.bias.zero_();
}

}  // namespace latte::nn
