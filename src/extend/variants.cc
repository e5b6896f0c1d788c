#include "extend/variants.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "extend/options.h"
#include "formats/error.h"

namespace latte::extend {
namespace {

constexpr std::array<std::pair<AttentionKind, std::string_view>, 9> kNames = {{
    {AttentionKind::kFull, "full"},
    {AttentionKind::kFullNtk, "full-ntk"},
    {AttentionKind::kFullYarn, "full-yarn"},
    {AttentionKind::kFullUptrained, "full-uptrained"},
    {AttentionKind::kWindow, "window"},
    {AttentionKind::kWindowSinks, "window-sinks"},
    {AttentionKind::kWindowSinksUptrained, "window-sinks-uptrained"},
    {AttentionKind::kMacchiato, "macchiato"},
    {AttentionKind::kMacchiatoLatentsOff, "macchiato-latents-off"},
}};

// Window and sinks in every block that reads everything.
formats::AdapterSpec window_spec(const VariantSources& sources, const formats::DecoderConfig& config, bool with_sinks) {
  formats::AdapterSpec spec;
  if (const std::string& like = sources.adapter.empty() ? sources.control : sources.adapter; !like.empty()) {
    spec = formats::AdapterFile(like).spec();
  }
  spec.window = sources.window.value_or(spec.window);
  spec.sinks = with_sinks ? sources.sinks.value_or(spec.sinks) : 0;
  spec.latents.clear();
  for (int64_t block = 0; block < config.num_layers; ++block) spec.latents.push_back(config.is_local(block) ? -1 : 0);
  return spec;
}

// What a conversion is: Macchiato, window and sinks alone, or the base's attention with other weights.
AttentionKind kind_of(const formats::AdapterSpec& spec) {
  bool windows = false;
  for (const int32_t count : spec.latents) {
    if (count > 0) return AttentionKind::kMacchiato;
    windows = windows || count == 0;
  }
  return windows ? AttentionKind::kWindowSinksUptrained : AttentionKind::kFullUptrained;
}

std::string misfit(AttentionKind wanted, const std::string& path, AttentionKind found) {
  const char* what = found == AttentionKind::kMacchiato              ? "latents"
                     : found == AttentionKind::kWindowSinksUptrained ? "window and sinks alone"
                                                                     : "the base's attention";
  return std::string(name_of(wanted)) + ": " + path + " has " + what;
}

// The kind whose adapter serves `kind` too.
AttentionKind adapter_of(AttentionKind kind) {
  return kind == AttentionKind::kMacchiatoLatentsOff ? AttentionKind::kMacchiato : kind;
}

void require_kind(const formats::AdapterSpec& spec, const std::string& path, AttentionKind kind) {
  const AttentionKind found = kind_of(spec);
  if (found != adapter_of(kind)) throw OptionError(misfit(kind, path, found));
}

}  // namespace

std::string_view name_of(AttentionKind kind) {
  for (const auto& [known, name] : kNames) {
    if (known == kind) return name;
  }
  return "?";
}

AttentionKind attention_kind_named(const std::string& name) {
  std::string expected;
  for (const auto& [kind, known] : kNames) {
    if (known == name) return kind;
    expected += (expected.empty() ? "" : ", ") + std::string(known);
  }
  throw OptionError("attention is " + formats::quote(name) + ", expected some of " + expected);
}

std::vector<AttentionKind> all_attention_kinds() {
  std::vector<AttentionKind> kinds;
  for (const auto& [kind, name] : kNames) kinds.push_back(kind);
  return kinds;
}

std::optional<AttentionKind> merged_kind(const std::string& model) {
  const auto spec = formats::merged_spec(formats::GgufFile(model));
  return spec ? std::optional(kind_of(*spec)) : std::nullopt;
}

std::optional<std::string> missing_source(AttentionKind kind, const VariantSources& sources,
                                          std::optional<AttentionKind> merged) {
  const auto needs = [&](const std::string& source, const char* flag) -> std::optional<std::string> {
    if (merged) {  // it is its own source, of the one kind that it is
      return merged == adapter_of(kind) ? std::nullopt : std::optional(misfit(kind, sources.model, *merged));
    }
    if (!source.empty()) return std::nullopt;
    return std::string(name_of(kind)) + " needs " + flag + " or a merged model";
  };
  switch (kind) {
    case AttentionKind::kMacchiato:
    case AttentionKind::kMacchiatoLatentsOff:
      return needs(sources.adapter, "--adapter");
    case AttentionKind::kWindowSinksUptrained:
      return needs(sources.control, "--control");
    case AttentionKind::kFullUptrained:
      return needs(sources.full_adapter, "--full-adapter");
    case AttentionKind::kWindow:
    case AttentionKind::kWindowSinks:
      if (!sources.convertible) {
        return std::string(name_of(kind)) + ": " + sources.model + " caps its attention's scores, which a window doesn't";
      }
      [[fallthrough]];
    default:  // a merged file's weights are no longer the original's
      if (!merged) return std::nullopt;
      return std::string(name_of(kind)) + " needs the original model: " + sources.model + " is a converted one";
  }
}

void check_adapters(const VariantSources& sources, const std::vector<AttentionKind>& kinds) {
  const std::tuple<const std::string&, AttentionKind> adapters[] = {
      {sources.adapter, AttentionKind::kMacchiato},
      {sources.control, AttentionKind::kWindowSinksUptrained},
      {sources.full_adapter, AttentionKind::kFullUptrained},
  };
  for (const auto& [path, kind] : adapters) {
    if (path.empty()) continue;
    const formats::AdapterFile adapter(path);
    adapter.check_fits(formats::GgufFile(sources.model));
    // Another may still say which window the original is to be read with.
    const auto wanted = std::find_if(kinds.begin(), kinds.end(), [&](AttentionKind each) { return adapter_of(each) == kind; });
    if (wanted != kinds.end()) require_kind(adapter.spec(), path, *wanted);
  }
}

Variant load_variant(AttentionKind kind, const VariantSources& sources) {
  if (const auto missing = missing_source(kind, sources, merged_kind(sources.model))) throw OptionError(*missing);
  const models::DecoderOptions plain{.dtype = sources.dtype};
  Variant variant;
  variant.kind = kind;
  const auto adapted = [&](const std::string& adapter) {
    variant.model = load_converted(sources.model, adapter, sources.dtype);
    require_kind(variant.model.spec, adapter.empty() ? sources.model : adapter, kind);
    if (!sources.window) return;
    variant.model.spec.window = *sources.window;
    for (const auto& attention : variant.model.converted) {
      if (attention) attention->set_window(*sources.window);
    }
  };
  switch (kind) {
    case AttentionKind::kFull:
      variant.model.model = models::load_decoder(sources.model, plain);
      break;
    case AttentionKind::kFullNtk:
    case AttentionKind::kFullYarn: {
      variant.model.model = models::load_decoder(sources.model, plain);
      formats::RopeScaling scaling;
      scaling.kind = kind == AttentionKind::kFullNtk ? formats::RopeScalingKind::kNtk : formats::RopeScalingKind::kYarn;
      scaling.factor = sources.rope_factor;
      if (scaling.factor > 1.0) variant.model.model->set_rope_scaling(scaling);
      break;
    }
    case AttentionKind::kWindow:
    case AttentionKind::kWindowSinks: {
      variant.model.model = models::load_decoder(sources.model, plain);
      variant.model.spec = window_spec(sources, variant.model.model->config(), kind == AttentionKind::kWindowSinks);
      variant.model.converted =
          convert(variant.model.model, variant.model.spec, std::vector<LatentForm>(variant.model.spec.latents.size()));
      break;
    }
    case AttentionKind::kFullUptrained:
      adapted(sources.full_adapter);
      break;
    case AttentionKind::kWindowSinksUptrained:
      adapted(sources.control);
      break;
    case AttentionKind::kMacchiato:
      adapted(sources.adapter);
      break;
    case AttentionKind::kMacchiatoLatentsOff:
      adapted(sources.adapter);
      for (const auto& attention : variant.model.converted) {
        if (attention) attention->set_latents_off(true);
      }
      break;
  }
  return variant;
}

}  // namespace latte::extend
