#include "extend/options.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>

#include "formats/option_fields.h"

namespace latte::extend {
namespace {

using namespace formats::fields;
using nlohmann::json;

template <typename Options, typename Visit>
void for_each_field(Options& options, const Visit& visit) {
  visit("model", options.model);
  visit("text", options.text);
  visit("held_out_fraction", options.held_out_fraction);
  visit("from", options.from);
  visit("attention", options.attention);
  visit("window", options.window);
  visit("sinks", options.sinks);
  visit("latents", options.latents);
  visit("layer_latents", options.layer_latents);
  visit("far_limit", options.far_limit);
  visit("forget", options.forget);
  visit("floor", options.floor);
  visit("position", options.position);
  visit("evicted", options.evicted);
  visit("train", options.train);
  visit("lora_rank", options.lora_rank);
  visit("loss", options.loss);
  visit("text_share", options.text_share);
  visit("match_sequences", options.match_sequences);
  visit("match_steps", options.match_steps);
  visit("match_layers", options.match_layers);
  visit("match_share", options.match_share);
  visit("match_open", options.match_open);
  visit("tokens", options.tokens);
  visit("context", options.context);
  visit("first_context", options.first_context);
  visit("batch", options.batch);
  visit("least_window", options.least_window);
  visit("lr", options.lr);
  visit("latent_lr", options.latent_lr);
  visit("vector_lr", options.vector_lr);
  visit("gate_lr", options.gate_lr);
  visit("final_lr", options.final_lr);
  visit("warmup", options.warmup);
  visit("clip", options.clip);
  visit("seed", options.seed);
  visit("dtype", options.dtype);
  visit("storage", options.storage);
  visit("eval_every", options.eval_every);
  visit("eval_sequences", options.eval_sequences);
  visit("save_every", options.save_every);
  visit("teacher_cache", options.teacher_cache);
}

void check_choice(std::string_view field, const std::string& value, std::initializer_list<std::string_view> choices) {
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return;
  std::string expected;
  for (std::string_view choice : choices) expected += (expected.empty() ? "" : ", ") + std::string(choice);
  fail(field, formats::quote(value), "one of " + expected);
}

struct LayerRange {
  int64_t first, last;
  int64_t number;  // of latents, or of a key-value head; -1: none
};

// "15-24:256,3:16" -> ranges of blocks with their latents; or "15-24,3:1" with key-value heads, which may be left out.
std::vector<LayerRange> parse_layers(std::string_view field, const std::string& text, bool with_latents) {
  std::vector<LayerRange> ranges;
  const auto number = [&](std::string_view digits) {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size() || value < 0 || value > kLargestSize) {
      fail(field, formats::quote(text),
           std::string(with_latents ? "FIRST-LAST:LATENTS or BLOCK:LATENTS"
                                    : "FIRST-LAST or BLOCK, or with a key-value head BLOCK:HEAD") +
               ", separated by commas");
    }
    return value;
  };
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view part = std::string_view(text).substr(begin, end - begin);
    const size_t colon = std::min(part.find(':'), part.size());
    const size_t dash = std::min(part.find('-'), colon);
    LayerRange range{number(part.substr(0, dash)), 0, -1};
    range.last = dash < colon ? number(part.substr(dash + 1, colon - dash - 1)) : range.first;
    if (with_latents || colon < part.size()) range.number = number(colon < part.size() ? part.substr(colon + 1) : "");
    if (range.last < range.first) fail(field, formats::quote(text), "blocks in rising order");
    if (with_latents && range.number > 65536) fail(field, formats::quote(text), "at most 65536 latents each");
    ranges.push_back(range);
    begin = end + 1;
  }
  return ranges;
}

std::vector<LayerRange> layers_with_latents(const ExtendOptions& options) {
  return parse_layers("layer_latents", options.layer_latents, true);
}

std::vector<LayerRange> layers_to_match(const ExtendOptions& options) {
  return parse_layers("match_layers", options.match_layers, false);
}

ExtendOptions options_in(const json& object) {
  ExtendOptions options;
  read_object("extend option", object, [&](const auto& visit) { for_each_field(options, visit); });
  return options;
}

}  // namespace

int64_t ExtendOptions::latents_of(int64_t block) const {
  int64_t count = latents;
  for (const LayerRange& range : layers_with_latents(*this)) {
    if (block >= range.first && block <= range.last) count = range.number;
  }
  return count;
}

formats::LatentForm ExtendOptions::form_anew() const {
  return {.decay = forget && !floor, .floor = floor, .conv = position == "conv"};
}

bool ExtendOptions::matches(int64_t block) const {
  if (match_layers.empty()) return from.empty();
  const auto ranges = layers_to_match(*this);
  return std::any_of(ranges.begin(), ranges.end(),
                     [&](const LayerRange& range) { return block >= range.first && block <= range.last; });
}

std::vector<int64_t> ExtendOptions::matched_heads(int64_t block) const {
  std::vector<int64_t> heads;
  for (const LayerRange& range : layers_to_match(*this)) {
    if (block < range.first || block > range.last) continue;
    if (range.number < 0) return {};
    if (std::find(heads.begin(), heads.end(), range.number) == heads.end()) heads.push_back(range.number);
  }
  return heads;
}

void ExtendOptions::check_blocks(int64_t blocks, int64_t kv_heads) const {
  const auto check = [&](const char* field, const std::string& text, const std::vector<LayerRange>& ranges) {
    for (const LayerRange& range : ranges) {
      if (range.last >= blocks)
        fail(field, formats::quote(text), "blocks in 0 … " + std::to_string(blocks - 1) + ", the model's");
    }
  };
  for (const LayerRange& range : layers_to_match(*this)) {
    if (range.number >= kv_heads) {
      fail("match_layers", formats::quote(match_layers), "key-value heads in 0 … " + std::to_string(kv_heads - 1));
    }
  }
  check("layer_latents", layer_latents, layers_with_latents(*this));
  check("match_layers", match_layers, layers_to_match(*this));
}

std::vector<int64_t> ExtendOptions::training_windows() const {
  std::vector<int64_t> windows;
  for (int64_t size = least_window; size > 0 && size < window; size *= 2) windows.push_back(size);
  windows.push_back(window);
  return windows;
}

int64_t ExtendOptions::context_of(int64_t step) const {
  if (first_context == 0) return context;
  int64_t lengths = 1;
  for (int64_t length = first_context; length < context; length *= 2) ++lengths;
  const int64_t stage = std::min(lengths - 1, step * lengths / std::max<int64_t>(1, steps()));
  return std::min(context, first_context << stage);
}

void ExtendOptions::validate() const {
  if (model.empty()) fail("model", "missing", "a GGUF file");
  if (text.empty()) fail("text", "missing", "a file or more");
  check_that(held_out_fraction >= 0 && held_out_fraction < 1, "held_out_fraction", held_out_fraction, "a number in [0, 1)");
  check_choice("attention", attention, {"macchiato", "window-sinks", "full"});
  check_range("window", window, 1, kLargestSize);
  check_range("sinks", sinks, 0, kLargestSize);
  check_range("latents", latents, 1, 65536);
  layers_with_latents(*this);
  check_range("far_limit", far_limit, 1, kLargestSize);
  if (floor && attention != "macchiato") fail("floor", "true", "attention: " + attention + " has no latents");
  if (floor && !evicted) fail("floor", "true", "latents that read what left the window");
  check_choice("position", position, {"none", "conv"});
  if (position != "none" && attention != "macchiato") {
    fail("position", position, "none: attention " + attention + " has no latents");
  }
  if (position != "none" && !evicted) fail("position", position, "none, or latents that read what left the window");
  if (position != "none" && !from.empty() && match_layers.empty()) {
    fail("position", position, "none, or match_layers, the layers of `from` to make anew");
  }
  if (!forget && !from.empty() && match_layers.empty()) {
    fail("forget", "false", "match_layers, the layers of `from` to make anew");
  }
  if (floor && match_sequences == 0) fail("match_sequences", "0", "1 or more: a floor begins with matching");
  if (floor && !from.empty() && match_layers.empty()) fail("floor", "true", "match_layers, the layers of `from` to make anew");
  if (!from.empty() && !match_layers.empty() && match_sequences == 0) {
    fail("match_sequences", "0", "1 or more, with match_layers: the layers are made anew");
  }
  check_choice("train", train, {"latents", "attention", "lora", "all"});
  check_range("lora_rank", lora_rank, 1, 65536);
  if (train == "latents" && attention != "macchiato") fail("train", "latents", "attention: " + attention + " has no latents");
  check_choice("loss", loss, {"kl", "text"});
  check_that(text_share >= 0 && text_share <= 1, "text_share", text_share, "a number in [0, 1]");
  check_range("match_sequences", match_sequences, 0, 1024);
  check_range("match_steps", match_steps, 0, kLargestCount);
  for (const LayerRange& range : layers_to_match(*this)) {
    if (range.number >= 0 && from.empty()) {
      fail("match_layers", formats::quote(match_layers), "whole blocks: key-value heads of blocks go with `from`");
    }
  }
  check_that(match_share >= 0 && match_share <= 1, "match_share", match_share, "a number in [0, 1]");
  check_that(match_open >= 0 && match_open <= 1, "match_open", match_open, "a number in [0, 1]");
  check_range("tokens", tokens, 0, kLargestCount);
  check_range("context", context, 2, kLargestSize);
  check_that(first_context == 0 || (first_context >= 2 && first_context <= context && context % first_context == 0 &&
                                    std::has_single_bit(static_cast<uint64_t>(context / first_context))),
             "first_context", first_context, "0, or the context halved any number of times");
  const bool matches_layers = match_sequences > 0 && (from.empty() || !match_layers.empty());
  const int64_t within = training_windows().front() + sinks, shortest = first_context > 0 ? first_context : context;
  if (attention == "macchiato" && evicted && (tokens > 0 || matches_layers) && shortest <= within) {
    fail(first_context > 0 ? "first_context" : "context", std::to_string(shortest),
         "more than " + std::to_string(within) + ", the smallest window and the sinks: latents read what lies beyond");
  }
  if (attention == "full" && loss == "kl" && text_share == 0 && from.empty()) {
    fail("loss", "kl", "text, or a text_share: full attention is the original itself, from which nothing is to be learnt");
  }
  check_range("batch", batch, 1, kLargestSize);
  check_range("least_window", least_window, 0, kLargestSize);
  check_that(lr > 0, "lr", lr, "a positive number");
  check_that(latent_lr > 0, "latent_lr", latent_lr, "a positive number");
  check_that(vector_lr > 0, "vector_lr", vector_lr, "a positive number");
  check_that(gate_lr >= 0, "gate_lr", gate_lr, "a number >= 0");
  check_that(final_lr >= 0 && final_lr <= 1, "final_lr", final_lr, "a number in [0, 1]");
  check_range("warmup", warmup, 0, kLargestCount);
  check_that(clip >= 0, "clip", clip, "a number >= 0");
  check_range("seed", seed, 0, std::numeric_limits<int64_t>::max());
  check_choice("dtype", dtype, {"auto", "float32", "bfloat16"});
  check_choice("storage", storage, {"q8_0", "bf16", "f32"});
  check_range("eval_every", eval_every, 0, kLargestCount);
  check_range("eval_sequences", eval_sequences, 1, kLargestSize);
  check_range("save_every", save_every, 0, kLargestCount);
}

json ExtendOptions::to_json() const {
  json object = json::object();
  for_each_field(*this, [&](const char* field, const auto& value) { object[field] = value; });
  return object;
}

ExtendOptions ExtendOptions::from_json(const json& object) {
  ExtendOptions options = options_in(object);
  options.validate();
  return options;
}

ExtendOptions ExtendOptions::from_recipe(json object) {
  if (object.is_object()) {
    for (const char* told : {"steps_done", "tokens_done"}) object.erase(told);  // how far the run came
    if (!object.contains("evicted")) object["evicted"] = false;
  }
  return options_in(object);
}

double learning_rate_factor(const ExtendOptions& options, int64_t step) {
  const double steps = static_cast<double>(std::max<int64_t>(1, options.steps()));
  const double cosine = 0.5 * (1.0 + std::cos(std::numbers::pi * std::min(1.0, static_cast<double>(step) / steps)));
  const double warm =
      options.warmup > 0 ? std::min(1.0, static_cast<double>(step + 1) / static_cast<double>(options.warmup)) : 1.0;
  return warm * (options.final_lr + (1.0 - options.final_lr) * cosine);
}

}  // namespace latte::extend
