// The kinds of attention that `latte eval` compares in one pretrained model.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "extend/converted_model.h"

namespace latte::extend {

enum class AttentionKind : uint8_t {
  kFull,                  // as pretrained
  kFullNtk,               // rotary positions stretched by NTK: no training, quadratic
  kFullYarn,              // by YaRN
  kFullUptrained,         // the pretrained attention trained on the same text: an adapter that converts no block
  kWindow,                // a window alone
  kWindowSinks,           // window and sinks
  kWindowSinksUptrained,  // the control: trained alike, without latents
  kMacchiato,
  kMacchiatoLatentsOff,
};

std::string_view name_of(AttentionKind kind);                 // "full-ntk"
AttentionKind attention_kind_named(const std::string& name);  // OptionError for an unknown name
std::vector<AttentionKind> all_attention_kinds();

struct VariantSources {
  std::string model;         // GGUF file
  std::string adapter;       // Macchiato's; may be empty, as the others
  std::string control;       // window-sinks-uptrained's
  std::string full_adapter;  // full-uptrained's
  // Of window and window-sinks, the window of adapters too; the adapter's (or the control's) unless given, else 512 and 4.
  std::optional<int64_t> window, sinks;
  double rope_factor = 1.0;  // of full-ntk and full-yarn
  bool convertible = true;   // the model's attention
  at::ScalarType dtype = torch::kBFloat16;
};

struct Variant {
  AttentionKind kind = AttentionKind::kFull;
  ConvertedModel model;  // `converted` may be empty
  bool converted(size_t block) const { return block < model.converted.size() && model.converted[block] != nullptr; }
};

// What a whole converted model is: kMacchiato, kWindowSinksUptrained or kFullUptrained; none of an original. Reads the file's
// metadata. Throws formats::FileError and formats::FormatError.
std::optional<AttentionKind> merged_kind(const std::string& model);

// Whether the sources, whose model is `merged`, allow the kind; if not, what is missing: "macchiato needs --adapter".
std::optional<std::string> missing_source(AttentionKind kind, const VariantSources& sources, std::optional<AttentionKind> merged);

// That each of the sources' adapters fits the model, whose file is hashed for it, and is what the kinds want of it. Throws
// OptionError, formats::FileError and formats::FormatError.
void check_adapters(const VariantSources& sources, const std::vector<AttentionKind>& kinds);

// Throws OptionError for what missing_source names, and as load_decoder and load_converted do.
Variant load_variant(AttentionKind kind, const VariantSources& sources);

}  // namespace latte::extend
