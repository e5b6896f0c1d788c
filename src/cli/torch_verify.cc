// latte verify: this machine's kernels, on every SIMD target, against reference files (tests/golden/README.md describes the
// format).
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "cli/torch_commands.h"
#include "formats/error.h"
#include "formats/safetensors.h"
#include "ops/ops.h"
#include "ops/targets.h"

namespace latte::cli {
namespace {

struct Options {
  std::vector<std::string> files;
  std::string attention = "auto";
  bool json = false;
};

const char* const kGradients[] = {"dx", "dwq", "dwk", "dwv", "dwo"};

// A reference file: everything in float64.
struct Reference {
  std::string path;
  int64_t heads = 0;
  bool causal = true;
  std::map<std::string, at::Tensor> tensors;
  OptionalTensor mask;

  const at::Tensor& operator[](const std::string& name) const { return tensors.at(name); }
};

int64_t PositiveNumber(const formats::SafetensorsFile& file, const std::string& key) {
  const std::string& text = file.metadata_at(key);
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value <= 0 || value > std::numeric_limits<int32_t>::max()) {
    throw formats::FormatError(file.path(), "metadata " + key + ": got " + formats::quote(text) + ", expected a positive number");
  }
  return value;
}

Reference ReadReference(const std::string& path) {
  const formats::SafetensorsFile file(path);
  const int64_t batch = PositiveNumber(file, "batch"), time = PositiveNumber(file, "time");
  const int64_t dim = PositiveNumber(file, "model_dim"), latents = PositiveNumber(file, "latents");
  Reference reference;
  reference.path = path;
  reference.heads = PositiveNumber(file, "heads");
  if (dim % reference.heads != 0 || latents % reference.heads != 0) {
    throw formats::FormatError(path, "model_dim and latents must be multiples of heads");
  }
  const std::map<std::string, std::vector<int64_t>> shapes = {
      {"x", {batch, time, dim}}, {"dy", {batch, time, dim}}, {"y", {batch, time, dim}}, {"dx", {batch, time, dim}},
      {"wq", {dim, latents}},    {"wk", {dim, latents}},     {"wv", {dim, dim}},        {"wo", {dim, dim}},
      {"dwq", {dim, latents}},   {"dwk", {dim, latents}},    {"dwv", {dim, dim}},       {"dwo", {dim, dim}},
  };
  std::vector<formats::TensorSpec> expected;
  for (const auto& [name, shape] : shapes) expected.push_back({name, formats::DType::kFloat64, shape});
  const bool padded = file.find("mask") != nullptr;
  if (padded) expected.push_back({"mask", formats::DType::kFloat64, {batch, time}});
  file.require(expected);
  for (const formats::TensorView& view : file.tensors()) {
    at::Tensor tensor = at::empty(view.shape, at::kDouble);
    std::memcpy(tensor.data_ptr<double>(), view.data.data(), view.data.size());
    reference.tensors[view.name] = tensor;
  }
  if (padded) reference.mask = reference["mask"] != 0;
  return reference;
}

at::Tensor Heads(const at::Tensor& x, int64_t heads) { return x.unflatten(-1, {heads, x.size(-1) / heads}); }

// What the operator gets and gives: [B, T, H, *].
struct Run {
  at::Tensor query_logits, key_logits, values, out, grad_out;
  at::Tensor grad_query_logits, grad_key_logits, grad_values;
};

// Projects in float64, rounds the operator's inputs once to `dtype`, and runs it forward and backward. With `exact` the rounded
// numbers are computed on in float64 instead, which takes the composed path.
Run RunOperator(const Reference& reference, at::ScalarType dtype, bool exact) {
  Run run;
  const auto rounded = [&](const at::Tensor& x) {
    const at::Tensor once = x.to(dtype);
    return (exact ? once.to(at::kDouble) : once).contiguous();
  };
  run.query_logits = rounded(Heads(reference["x"].matmul(reference["wq"]), reference.heads)).requires_grad_();
  run.key_logits = rounded(Heads(reference["x"].matmul(reference["wk"]), reference.heads)).requires_grad_();
  run.values = rounded(Heads(reference["x"].matmul(reference["wv"]), reference.heads)).requires_grad_();
  run.grad_out = rounded(Heads(reference["dy"].matmul(reference["wo"].t()), reference.heads));
  if (reference.causal) {
    CausalAttentionOptions options;
    options.key_mask = reference.mask;
    run.out = std::get<0>(causal_attention(run.query_logits, run.key_logits, run.values, options));
  } else {
    BidirectionalAttentionOptions options;
    options.key_mask = reference.mask;
    run.out = bidirectional_attention(run.query_logits, run.key_logits, run.values, options);
  }
  run.out.backward(run.grad_out);
  run.grad_query_logits = run.query_logits.grad();
  run.grad_key_logits = run.key_logits.grad();
  run.grad_values = run.values.grad();
  return run;
}

// The layer's output and gradients around the operator, in float64.
std::map<std::string, at::Tensor> Layer(const Reference& reference, const Run& run) {
  const auto joined = [](const at::Tensor& x) { return x.detach().to(at::kDouble).flatten(-2); };
  const auto weight_gradient = [&](const at::Tensor& grad) {
    return reference["x"].flatten(0, 1).t().matmul(joined(grad).flatten(0, 1));
  };
  std::map<std::string, at::Tensor> layer;
  layer["y"] = joined(run.out).matmul(reference["wo"]);
  layer["dx"] = joined(run.grad_query_logits).matmul(reference["wq"].t()) +
                joined(run.grad_key_logits).matmul(reference["wk"].t()) + joined(run.grad_values).matmul(reference["wv"].t());
  layer["dwq"] = weight_gradient(run.grad_query_logits);
  layer["dwk"] = weight_gradient(run.grad_key_logits);
  layer["dwv"] = weight_gradient(run.grad_values);
  layer["dwo"] = joined(run.out).flatten(0, 1).t().matmul(reference["dy"].flatten(0, 1));
  return layer;
}

// ‖a - b‖ as a share of what is allowed, tol (‖b‖ + √n); a true gradient may be zero. Infinite where anything is not finite.
double ErrorShare(const at::Tensor& a, const at::Tensor& b, double tolerance) {
  const double error = (a.detach().to(at::kDouble) - b.detach().to(at::kDouble)).norm().item<double>();
  const double norm = b.detach().to(at::kDouble).norm().item<double>();
  const double share = error / (tolerance * (norm + std::sqrt(static_cast<double>(b.numel()))));
  return std::isfinite(share) ? share : std::numeric_limits<double>::infinity();
}

// Which attention a file holds: by its metadata, else its name, else whichever comes nearer in float64.
bool IsCausal(Reference reference, const std::string& attention) {
  std::string kind = attention;
  if (kind == "auto") {
    const formats::SafetensorsFile file(reference.path);
    const auto found = file.metadata().find("attention");
    kind = found != file.metadata().end() ? found->second : std::filesystem::path(reference.path).filename().string();
  }
  if (kind.rfind("causal", 0) == 0) return true;
  if (kind.rfind("bidirectional", 0) == 0) return false;
  double shares[2];
  for (const bool causal : {false, true}) {
    reference.causal = causal;
    shares[causal ? 1 : 0] = ErrorShare(Layer(reference, RunOperator(reference, at::kDouble, true))["y"], reference["y"], 1.0);
  }
  return shares[1] <= shares[0];
}

struct Row {
  std::string file, target, dtype;
  double tolerance = 0.0;
  std::vector<std::pair<std::string, double>> shares;  // of the tolerance, one a tensor
  bool passed = true;
};

Row Check(const Reference& reference, const Target& target, at::ScalarType dtype) {
  Row row{reference.path, target.name, dtype == at::kFloat ? "float32" : dtype == at::kBFloat16 ? "bfloat16" : "float16"};
  Run run;
  {
    const PinnedTarget pinned(target);
    run = RunOperator(reference, dtype, false);
  }
  const double largest =
      std::max(run.query_logits.detach().abs().max().item<double>(), run.key_logits.detach().abs().max().item<double>());
  row.tolerance = 1e-5 * std::max(1.0, largest / 64);
  if (dtype == at::kFloat) {
    const auto layer = Layer(reference, run);
    row.shares.emplace_back("y", ErrorShare(layer.at("y"), reference["y"], row.tolerance));
    for (const char* name : kGradients) row.shares.emplace_back(name, ErrorShare(layer.at(name), reference[name], row.tolerance));
  } else {
    // One rounding of each output is all that may separate them: half a unit in the last place.
    row.tolerance += dtype == at::kBFloat16 ? 0x1p-8 : 0x1p-11;
    const Run exact = RunOperator(reference, dtype, true);
    row.shares.emplace_back("out", ErrorShare(run.out, exact.out, row.tolerance));
    row.shares.emplace_back("dq", ErrorShare(run.grad_query_logits, exact.grad_query_logits, row.tolerance));
    row.shares.emplace_back("dk", ErrorShare(run.grad_key_logits, exact.grad_key_logits, row.tolerance));
    row.shares.emplace_back("dv", ErrorShare(run.grad_values, exact.grad_values, row.tolerance));
  }
  for (const auto& [name, share] : row.shares) row.passed = row.passed && share <= 1.0;
  return row;
}

void Print(const Row& row) {
  std::printf("  %-10s %-9s tol %.1e ", row.target.c_str(), row.dtype.c_str(), row.tolerance);
  for (const auto& [name, share] : row.shares) std::printf(" %s %8.1e", name.c_str(), share * row.tolerance);
  std::printf("  %s\n", row.passed ? "ok" : "EXCEEDS");
}

int Verify(const Options& options) {
  std::vector<Reference> references;
  for (const std::string& path : options.files) {
    try {
      references.push_back(ReadReference(path));
      references.back().causal = IsCausal(references.back(), options.attention);
    } catch (const std::exception& problem) {
      std::fprintf(stderr, "latte: error: %s\n", problem.what());
      return 2;
    }
  }
  bool passed = true;
  nlohmann::json rows = nlohmann::json::array();
  for (const Reference& reference : references) {
    if (!options.json) {
      std::printf("%s (%s, %ld heads); relative errors, ‖a−b‖ / (‖b‖ + √n):\n", reference.path.c_str(),
                  reference.causal ? "causal" : "bidirectional", static_cast<long>(reference.heads));
    }
    for (const Target& target : SupportedTargets()) {
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
        const Row row = Check(reference, target, dtype);
        passed = passed && row.passed;
        if (!options.json) Print(row);
        nlohmann::json errors;
        for (const auto& [name, share] : row.shares) {
          errors[name] = std::isfinite(share) ? nlohmann::json(share * row.tolerance) : nlohmann::json(nullptr);
        }
        rows.push_back({{"file", row.file},
                        {"target", row.target},
                        {"dtype", row.dtype},
                        {"tolerance", row.tolerance},
                        {"errors", errors},
                        {"passed", row.passed}});
      }
    }
  }
  if (options.json) std::printf("%s\n", nlohmann::json{{"rows", rows}, {"passed", passed}}.dump(2).c_str());
  if (!options.json) std::printf("%s\n", passed ? "All within tolerance." : "Some errors exceed their tolerance.");
  return passed ? 0 : 1;
}

}  // namespace

void AddVerify(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("verify", "Check this machine's kernels against reference files, on every SIMD target");
  command->add_option("files", options->files, "Reference files (safetensors)")->required()->type_name("FILE");
  command->add_option("--attention", options->attention, "What the files hold; by default their metadata or name tells")
      ->check(CLI::IsMember({"auto", "causal", "bidirectional"}))
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(
      "Exit code: 0 all within tolerance, 1 some error exceeds it, 2 a file can't be read.\n\n"
      "Example:\n  latte verify tests/golden/*.safetensors");
  command->callback([options, &exit_code] { exit_code = Verify(*options); });
}

}  // namespace latte::cli
