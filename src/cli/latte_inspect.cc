// latte inspect: what a model's file holds, and whether latte can run it.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/latte_commands.h"
#include "formats/adapter.h"
#include "formats/error.h"
#include "formats/gguf.h"
#include "formats/json_file.h"
#include "formats/pretrained.h"
#include "formats/tokenizer.h"

namespace latte::cli {
namespace {

using formats::DecoderConfig;
using formats::GgufMetadata;
using formats::GgufTensorSpec;
using nlohmann::json;

struct Options {
  std::string model;
  bool tensors = true;
  bool json_output = false;
};

struct Report {
  std::string path;
  std::string format;  // "GGUF 3", "Hugging Face"
  uint64_t bytes = 0;  // on disk
  GgufMetadata metadata;
  std::vector<GgufTensorSpec> tensors;
  std::optional<DecoderConfig> config;
  std::optional<formats::AdapterSpec> adapter;  // of an adapter or a merged model
  std::vector<std::string> problems;            // why latte can't run it
};

uint64_t bytes_of(const GgufTensorSpec& spec) {
  const int64_t columns = spec.shape.empty() ? 1 : spec.shape.back();
  return formats::tensor_bytes(spec.type, spec.elements() / columns, columns).value_or(0);
}

// Notes what `action` finds wrong with the model; the file itself is sound.
template <typename Action>
void check(Report& report, const Action& action) {
  try {
    action();
  } catch (const formats::FormatError& error) {
    report.problems.emplace_back(error.what());
  }
}

Report inspect(const std::string& path) {
  Report report;
  report.path = path;
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    const auto model = formats::open_pretrained(path);
    report.format = "Hugging Face";
    report.metadata = model->metadata();
    report.tensors = model->tensors();
    report.config = model->config();
    for (const auto& entry : std::filesystem::directory_iterator(path, ignored)) {
      if (entry.path().extension() == ".safetensors") report.bytes += entry.file_size(ignored);
    }
    return report;
  }
  const formats::GgufFile file(path);
  report.format = "GGUF " + std::to_string(file.version());
  report.bytes = file.size();
  report.metadata = file.metadata();
  report.tensors.assign(file.tensors().begin(), file.tensors().end());
  if (report.metadata.has("latte.version")) check(report, [&] { report.adapter = formats::AdapterSpec::from(report.metadata); });
  if (is_adapter(report.metadata)) return report;
  check(report, [&] { report.config = formats::open_pretrained(path)->config(); });
  if (report.metadata.has("tokenizer.ggml.model")) check(report, [&] { formats::Tokenizer tokenizer(report.metadata); });
  return report;
}

struct TypeShare {
  int64_t tensors = 0;
  uint64_t bytes = 0;
};

std::map<std::string, TypeShare> types_of(const Report& report) {
  std::map<std::string, TypeShare> shares;
  for (const GgufTensorSpec& spec : report.tensors) {
    TypeShare& share = shares[std::string(formats::name_of(spec.type))];
    ++share.tensors;
    share.bytes += bytes_of(spec);
  }
  return shares;
}

int64_t parameters_of(const Report& report) {
  int64_t count = 0;
  for (const GgufTensorSpec& spec : report.tensors) count += spec.elements();
  return count;
}

// Names as they are, unless a file has put into them what a terminal would act on.
std::string plain(const std::string& name) {
  const bool printable = std::all_of(name.begin(), name.end(), [](unsigned char c) { return c > 0x20 && c < 0x7F; });
  return printable && !name.empty() ? name : formats::quote(name);
}

// What latte extend writes beside the weights, whole; null where there is none, a string where it isn't JSON.
json recipe_json(const formats::AdapterSpec& adapter) {
  if (adapter.recipe.empty()) return nullptr;
  constexpr int kDeepest = 8;  // as deep as it is written; a file may say anything
  const auto shallow = [](int depth, json::parse_event_t, json&) { return depth <= kDeepest; };
  json recipe = json::parse(adapter.recipe, shallow, /*allow_exceptions=*/false);
  return recipe.is_discarded() ? json(formats::quote(adapter.recipe)) : recipe;
}

std::string size_text(uint64_t bytes) {
  char text[32];
  constexpr double kKiB = 1024.0, kMiB = kKiB * 1024.0, kGiB = kMiB * 1024.0;
  const auto size = static_cast<double>(bytes);
  if (size >= kGiB) {
    std::snprintf(text, sizeof(text), "%.2f GiB", size / kGiB);
  } else if (size >= kMiB) {
    std::snprintf(text, sizeof(text), "%.1f MiB", size / kMiB);
  } else {
    std::snprintf(text, sizeof(text), "%.1f KiB", size / kKiB);
  }
  return text;
}

const char* name_of(formats::RopeScalingKind kind) {
  switch (kind) {
    case formats::RopeScalingKind::kNone:
      return "none";
    case formats::RopeScalingKind::kLinear:
      return "linear";
    case formats::RopeScalingKind::kNtk:
      return "ntk";
    case formats::RopeScalingKind::kYarn:
      return "yarn";
  }
  return "";
}

int64_t local_layers(const DecoderConfig& config) {
  int64_t count = 0;
  for (int64_t i = 0; i < config.num_layers; ++i) count += config.is_local(i) ? 1 : 0;
  return count;
}

json config_json(const DecoderConfig& config) {
  json out = {{"name", config.architecture},
              {"num_layers", config.num_layers},
              {"embed_dim", config.embed_dim},
              {"hidden_dim", config.hidden_dim},
              {"num_heads", config.num_heads},
              {"num_kv_heads", config.num_kv_heads},
              {"head_dim", config.head_dim},
              {"context_length", config.context_length},
              {"vocab_size", config.vocab_size},
              {"norm_eps", config.norm_eps},
              {"rope_base", config.rope.base},
              {"rope_scaling", name_of(config.rope.scaling.kind)},
              {"tie_embeddings", config.tie_embeddings},
              {"local_layers", local_layers(config)}};
  if (config.rope.scaling.kind != formats::RopeScalingKind::kNone) out["rope_scaling_factor"] = config.rope.scaling.factor;
  if (config.window > 0) out["window"] = config.window;
  if (config.attention_softcap > 0) out["attention_softcap"] = config.attention_softcap;
  if (config.logit_softcap > 0) out["logit_softcap"] = config.logit_softcap;
  return out;
}

json vocabulary_json(const GgufMetadata& metadata) {
  if (!metadata.has("tokenizer.ggml.model")) return nullptr;
  json out = json::object();
  for (const auto& [key, value] : metadata.entries()) {
    if (!key.starts_with("tokenizer.")) continue;
    const std::string name = key.starts_with("tokenizer.ggml.") ? key.substr(15) : key.substr(10);
    if (const auto* array = std::get_if<formats::GgufArray>(&value)) {
      out[name] = std::visit([](const auto& held) { return held.size(); }, *array);
    } else {
      out[name] = std::visit(
          [](const auto& held) -> json {
            if constexpr (std::is_same_v<std::decay_t<decltype(held)>, formats::GgufArray>)
              return nullptr;
            else
              return held;
          },
          value);
    }
  }
  return out;
}

// Blocks whose latents have a tensor of this name behind "blk.N.latte_".
int64_t blocks_with(const Report& report, const std::string& name) {
  return std::count_if(report.tensors.begin(), report.tensors.end(), [&](const GgufTensorSpec& spec) {
    return formats::is_added_tensor(spec.name) && spec.name.ends_with("latte_" + name);
  });
}

void print_json(const Report& report) {
  json out = {{"path", report.path},
              {"format", report.format},
              {"bytes", report.bytes},
              {"parameters", parameters_of(report)},
              {"architecture", report.config ? config_json(*report.config) : json(nullptr)},
              {"vocabulary", vocabulary_json(report.metadata)},
              {"problems", report.problems}};
  if (report.adapter) {
    out["adapter"] = {{"merged", !is_adapter(report.metadata)}, {"window", report.adapter->window},
                      {"sinks", report.adapter->sinks},         {"evicted", report.adapter->evicted},
                      {"latents", report.adapter->latents},     {"base_hash", report.adapter->base_hash},
                      {"base_name", report.adapter->base_name}};
    out["adapter"]["blocks"] = {{"decay", blocks_with(report, "decay")},
                                {"floor", blocks_with(report, "floor")},
                                {"conv", blocks_with(report, "conv.weight")}};
    out["adapter"]["recipe"] = recipe_json(*report.adapter);
  }
  json& metadata = out["metadata"] = json::object();
  for (const auto& [key, value] : report.metadata.entries()) metadata[key] = formats::describe(value);
  json& types = out["types"] = json::object();
  for (const auto& [name, share] : types_of(report)) types[name] = {{"tensors", share.tensors}, {"bytes", share.bytes}};
  json& tensors = out["tensors"] = json::array();
  for (const GgufTensorSpec& spec : report.tensors) {
    tensors.push_back(
        {{"name", spec.name}, {"type", formats::name_of(spec.type)}, {"shape", spec.shape}, {"bytes", bytes_of(spec)}});
  }
  std::puts(out.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace).c_str());
}

void print_config(const DecoderConfig& config) {
  std::printf("architecture  %s: %" PRId64 " layers of %" PRId64 ", %" PRId64 " heads of %" PRId64 " (%" PRId64
              " for keys and values), MLP %" PRId64 "\n",
              config.architecture.c_str(), config.num_layers, config.embed_dim, config.num_heads, config.head_dim,
              config.num_kv_heads, config.hidden_dim);
  std::printf("attention     ");
  if (const int64_t local = local_layers(config); local > 0) {
    std::printf("%" PRId64 " layers read the last %" PRId64 " tokens, %" PRId64 " everything\n", local, config.window,
                config.num_layers - local);
  } else {
    std::puts("every layer reads everything");
  }
  std::printf("context       %" PRId64 " tokens trained, rotary base %g", config.context_length, config.rope.base);
  if (config.rope.scaling.kind != formats::RopeScalingKind::kNone) {
    std::printf(", %s scaling by %g", name_of(config.rope.scaling.kind), config.rope.scaling.factor);
  }
  std::puts("");
}

void print_adapter(const Report& report) {
  const formats::AdapterSpec& adapter = *report.adapter;
  int64_t with_latents = 0;
  for (int32_t latents : adapter.latents) with_latents += latents > 0 ? 1 : 0;
  std::printf("%s  window %" PRId64 ", sinks %" PRId64 ", %" PRId64 " of %zu blocks with latents%s, %" PRId64 " converted\n",
              is_adapter(report.metadata) ? "adapter     " : "merged      ", adapter.window, adapter.sinks, with_latents,
              adapter.latents.size(), adapter.evicted ? " (of what left the window)" : "", adapter.converted_blocks());
  std::printf("latents       %" PRId64 " blocks forget, %" PRId64 " have floors, %" PRId64 " a convolution of keys\n",
              blocks_with(report, "decay"), blocks_with(report, "floor"), blocks_with(report, "conv.weight"));
  std::printf("base          %s, hash %s\n", formats::quote(adapter.base_name).c_str(),
              formats::quote(adapter.base_hash).c_str());
  const json recipe = recipe_json(adapter);
  if (!recipe.is_null()) std::printf("recipe        %s\n", recipe.dump(-1, ' ', /*ensure_ascii=*/true).c_str());
}

void print_vocabulary(const Report& report) {
  const json vocabulary = vocabulary_json(report.metadata);
  if (vocabulary.is_null()) {
    if (report.config) std::printf("vocabulary    %" PRId64 " tokens, no tokeniser in the file\n", report.config->vocab_size);
    return;
  }
  const auto text = [&](const char* key) {
    return vocabulary.contains(key) ? formats::shown(vocabulary[key]) : std::string("none");
  };
  std::printf("vocabulary    %s tokens, kind %s, beginning %s, end %s, chat template %s\n", text("tokens").c_str(),
              text("model").c_str(), text("bos_token_id").c_str(), text("eos_token_id").c_str(),
              vocabulary.contains("chat_template") ? "yes" : "no");
}

void print_text(const Report& report, bool tensors) {
  std::printf("%s: %s, %s\n", plain(report.path).c_str(), report.format.c_str(), size_text(report.bytes).c_str());
  if (report.config) print_config(*report.config);
  if (report.adapter) print_adapter(report);
  print_vocabulary(report);
  const int64_t parameters = parameters_of(report);
  uint64_t bytes = 0;
  for (const GgufTensorSpec& spec : report.tensors) bytes += bytes_of(spec);
  std::printf("parameters    %" PRId64 " in %zu tensors, %s", parameters, report.tensors.size(), size_text(bytes).c_str());
  if (parameters > 0) std::printf(", %.2f bits each", 8.0 * static_cast<double>(bytes) / static_cast<double>(parameters));
  std::puts("");
  for (const auto& [name, share] : types_of(report)) {
    std::printf("  %-10s  %5" PRId64 " tensors  %10s\n", name.c_str(), share.tensors, size_text(share.bytes).c_str());
  }
  std::puts("\nmetadata");
  for (const auto& [key, value] : report.metadata.entries()) {
    std::printf("  %s = %s\n", plain(key).c_str(), formats::describe(value).c_str());
  }
  if (!tensors) return;
  std::puts("\ntensors");
  for (const GgufTensorSpec& spec : report.tensors) {
    std::printf("  %-34s  %-24s  %10s\n", plain(spec.name).c_str(), formats::describe(spec).c_str(),
                size_text(bytes_of(spec)).c_str());
  }
}

int run(const Options& options) {
  const Report report = inspect(options.model);
  options.json_output ? print_json(report) : print_text(report, options.tensors);
  if (report.problems.empty()) return 0;
  std::string problems;
  for (const std::string& problem : report.problems) problems += (problems.empty() ? "" : "; ") + problem;
  std::fflush(stdout);
  std::fprintf(stderr, "latte: error: %s\n", problems.c_str());
  return 1;
}

}  // namespace

void AddInspect(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("inspect", "Show what a model's file holds");
  command->add_option("MODEL", options->model, "A GGUF file (model, adapter) or a Hugging Face folder")->required();
  command->add_flag("!--no-tensors", options->tensors, "Leave the list of tensors out");
  command->add_flag("--json", options->json_output, "One JSON object on one line");
  command->footer(
      "Exit code 1 where the file is damaged, or holds a model or a vocabulary that latte can't run.\n\n"
      "Examples:\n  latte inspect SmolLM2-135M-Instruct.Q4_1.gguf\n  latte inspect model.gguf --no-tensors\n"
      "  latte inspect model.gguf --json | jq .architecture");
  command->callback([options, &exit_code] { exit_code = run(*options); });
}

}  // namespace latte::cli
