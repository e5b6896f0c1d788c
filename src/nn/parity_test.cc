// The C++ modules against tests/golden/modules.json, which Python's modules are held against too (python/tests/test_parity.py):
// the same names, shapes and outputs. python/tests/make_modules_golden.py writes the file and says what the inputs are.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "nn/attention.h"

namespace latte::nn {
namespace {

using nlohmann::json;

const json& Golden() {
  static const json golden = json::parse(std::ifstream(LATTE_SOURCE_DIR "/tests/golden/modules.json"));
  return golden;
}

at::Tensor Counting(int64_t begin, int64_t count) { return torch::arange(begin, begin + count, torch::kFloat64); }

at::Tensor TensorOf(const json& values, at::IntArrayRef sizes) {
  return torch::tensor(values.get<std::vector<double>>(), torch::kFloat64).view(sizes);
}

// Parameters by the bytes of their names, as the file's formula numbers them.
std::map<std::string, at::Tensor> SortedParameters(const torch::nn::Module& module) {
  std::map<std::string, at::Tensor> sorted;
  for (const auto& item : module.named_parameters()) sorted.emplace(item.key(), item.value());
  return sorted;
}

void FillByFormula(torch::nn::Module& module) {
  torch::NoGradGuard no_grad;
  int64_t begin = 0;
  for (auto& [name, parameter] : SortedParameters(module)) {
    parameter.copy_((0.4 * torch::sin(0.7 * Counting(begin, parameter.numel()) + 0.1)).view(parameter.sizes()));
    begin += parameter.numel();
  }
}

// Fails on an option that it doesn't know, so that none is passed over in silence.
MacchiatoAttentionOptions OptionsOf(const json& options) {
  MacchiatoAttentionOptions parsed;
  parsed.batch_first = true;
  for (const auto& [name, value] : options.items()) {
    if (name == "embed_dim") {
      parsed.embed_dim = value;
    } else if (name == "num_heads") {
      parsed.num_heads = value;
    } else if (name == "bias") {
      parsed.bias = value;
    } else if (name == "num_latents") {
      parsed.num_latents = value.get<int64_t>();
    } else if (name == "num_kv_heads") {
      parsed.num_kv_heads = value.get<int64_t>();
    } else if (name == "position") {
      parsed.position = parse_latent_position(value.get<std::string>());
    } else if (name == "conv_width") {
      parsed.conv_width = value;
    } else if (name == "forget") {
      parsed.forget = value;
    } else if (name == "decay_rank") {
      parsed.decay_rank = value;
    } else if (name == "window") {
      parsed.window = value;
    } else if (name == "sinks") {
      parsed.sinks = value;
    } else if (name == "rope") {
      parsed.rope = value;
    } else if (name == "rope_base") {
      parsed.rope_base = value;
    } else {
      ADD_FAILURE() << "unknown option " << name;
    }
  }
  return parsed;
}

std::shared_ptr<AttentionImpl> Build(const json& test_case) {
  const auto options = OptionsOf(test_case.at("options"));
  if (test_case.at("module") == "LatteAttention") return std::make_shared<LatteAttentionImpl>(options);
  return std::make_shared<MacchiatoAttentionImpl>(options);
}

// ‖got − expected‖ ≤ tolerance (‖expected‖ + 0.01 √n).
void ExpectClose(const at::Tensor& got, const at::Tensor& expected, double tolerance) {
  ASSERT_EQ(got.sizes(), expected.sizes());
  const double error = (got.to(torch::kFloat64) - expected).norm().item<double>();
  EXPECT_LE(error, tolerance * (expected.norm().item<double>() + 0.01 * std::sqrt(static_cast<double>(expected.numel()))));
}

class Parity : public testing::TestWithParam<std::string> {
 protected:
  const json& Case() const {
    const auto& cases = Golden().at("cases");
    return *std::find_if(cases.begin(), cases.end(), [](const json& one) { return one.at("name") == GetParam(); });
  }
};

TEST_P(Parity, NamesAndShapes) {
  std::map<std::string, std::vector<int64_t>> got;
  for (const auto& [name, parameter] : SortedParameters(*Build(Case()))) got.emplace(name, parameter.sizes().vec());
  EXPECT_EQ(got, (Case().at("parameters").get<std::map<std::string, std::vector<int64_t>>>()));
}

TEST_P(Parity, Outputs) {
  torch::NoGradGuard no_grad;
  const int64_t batch = Golden().at("batch"), tokens = Golden().at("tokens");
  const int64_t embed_dim = Case().at("options").at("embed_dim"), heads = Case().at("options").at("num_heads");
  const auto n = Counting(0, batch * tokens * embed_dim);
  const auto x = (torch::sin(0.37 * n) + 0.5 * torch::cos(1.3 * n)).view({batch, tokens, embed_dim});
  AttentionForwardOptions options;
  options.is_causal = Case().at("causal");
  options.need_weights = true;
  options.average_attn_weights = false;
  if (const auto mask = Case().at("mask").get<std::string>(); !mask.empty()) {
    const auto number = 3 * torch::arange(batch).unsqueeze(1) + torch::arange(tokens).unsqueeze(0);
    const auto padding = torch::remainder(number, 5) == 4;
    const auto bias = 2.0 * torch::sin(1.7 * number.to(torch::kFloat64));
    options.key_padding_mask = mask == "padded" ? padding : bias.masked_fill(padding, -std::numeric_limits<double>::infinity());
  }
  for (const auto& [dtype, tolerance] : {std::pair{torch::kFloat64, 1e-12}, std::pair{torch::kFloat32, 1e-5}}) {
    const auto module = Build(Case());
    module->to(torch::kFloat64);
    FillByFormula(*module);
    module->to(dtype);
    const auto result = module->forward(x.to(dtype), options);
    ExpectClose(result.out, TensorOf(Case().at("out"), {batch, tokens, embed_dim}), tolerance);
    ExpectClose(result.weights, TensorOf(Case().at("weights"), {batch, heads, tokens, tokens}), tolerance);
  }
}

std::vector<std::string> CaseNames() {
  std::vector<std::string> names;
  for (const auto& one : Golden().at("cases")) names.push_back(one.at("name"));
  return names;
}

INSTANTIATE_TEST_SUITE_P(Modules, Parity, testing::ValuesIn(CaseNames()), [](const auto& param) { return param.param; });

TEST(ParityFile, Version) {
  EXPECT_EQ(Golden().at("version"), 2);
  EXPECT_GE(Golden().at("cases").size(), 10u);
}

}  // namespace
}  // namespace latte::nn
