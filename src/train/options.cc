#include "train/options.h"

#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string_view>
#include <vector>

#include "formats/error.h"

namespace latte::train {
namespace {

using nlohmann::json;

// Products of three of these fit in 63 bits.
constexpr int64_t kLargestSize = int64_t{1} << 20;
constexpr int64_t kLargestCount = int64_t{1} << 40;

[[noreturn]] void fail(std::string_view field, const std::string& got, const std::string& expected) {
  throw OptionError(std::string(field) + " is " + got + ", expected " + expected);
}

std::string shown(const json& value) { return formats::quote(value.dump(-1, ' ', true, json::error_handler_t::replace)); }

// One place that lists the fields, for reading and writing.
template <typename Options, typename Visit>
void for_each_field(Options& options, const Visit& visit) {
  visit("text", options.text);
  visit("tokens", options.tokens);
  visit("validation_fraction", options.validation_fraction);
  visit("context", options.context);
  visit("batch", options.batch);
  visit("accumulate", options.accumulate);
  visit("steps", options.steps);
  visit("seed", options.seed);
  visit("dtype", options.dtype);
  visit("lr", options.lr);
  visit("min_lr", options.min_lr);
  visit("warmup", options.warmup);
  visit("weight_decay", options.weight_decay);
  visit("beta1", options.beta1);
  visit("beta2", options.beta2);
  visit("clip", options.clip);
  visit("eval_every", options.eval_every);
  visit("eval_batches", options.eval_batches);
  visit("save_every", options.save_every);
}

void read(std::string_view field, const json& value, std::string& into) {
  if (!value.is_string()) fail(field, shown(value), "a string");
  into = value.get<std::string>();
}

void read(std::string_view field, const json& value, double& into) {
  if (!value.is_number()) fail(field, shown(value), "a number");
  into = value.get<double>();
}

void read(std::string_view field, const json& value, int64_t& into) {
  const bool too_large = value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()};
  if (!value.is_number_integer() || too_large) fail(field, shown(value), "an integer");
  into = value.get<int64_t>();
}

void check_range(std::string_view field, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    fail(field, std::to_string(value), "an integer in " + std::to_string(least) + " … " + std::to_string(most));
  }
}

void check_that(bool good, std::string_view field, double value, const std::string& expected) {
  if (!good || !std::isfinite(value)) fail(field, json(value).dump(), expected);
}

}  // namespace

formats::Vocabulary::Kind TrainerOptions::vocabulary_kind() const {
  return tokens == "bytes" ? formats::Vocabulary::Kind::kBytes : formats::Vocabulary::Kind::kCharacters;
}

void TrainerOptions::validate() const {
  if (tokens != "chars" && tokens != "bytes") fail("tokens", formats::quote(tokens), "chars or bytes");
  if (dtype != "auto" && dtype != "float32" && dtype != "bfloat16") {
    fail("dtype", formats::quote(dtype), "auto, float32 or bfloat16");
  }
  check_that(validation_fraction >= 0 && validation_fraction < 1, "validation_fraction", validation_fraction,
             "a number in [0, 1)");
  check_range("context", context, 1, kLargestSize);
  check_range("batch", batch, 1, kLargestSize);
  check_range("accumulate", accumulate, 1, kLargestSize);
  check_range("steps", steps, 1, kLargestCount);
  check_range("seed", seed, 0, std::numeric_limits<int64_t>::max());
  check_that(lr > 0, "lr", lr, "a positive number");
  check_that(min_lr >= 0 && min_lr <= lr, "min_lr", min_lr, "a number from 0 to lr, " + json(lr).dump());
  check_range("warmup", warmup, 0, kLargestCount);
  check_that(weight_decay >= 0, "weight_decay", weight_decay, "a number >= 0");
  check_that(beta1 >= 0 && beta1 < 1, "beta1", beta1, "a number in [0, 1)");
  check_that(beta2 >= 0 && beta2 < 1, "beta2", beta2, "a number in [0, 1)");
  check_that(clip >= 0, "clip", clip, "a number >= 0");
  check_range("eval_every", eval_every, 0, kLargestCount);
  check_range("eval_batches", eval_batches, 1, kLargestSize);
  check_range("save_every", save_every, 0, kLargestCount);
}

json TrainerOptions::to_json() const {
  json object = json::object();
  for_each_field(*this, [&](const char* field, const auto& value) { object[field] = value; });
  return object;
}

TrainerOptions TrainerOptions::from_json(const json& object) {
  if (!object.is_object()) throw OptionError("training options: expected a JSON object, got " + shown(object));
  TrainerOptions options;
  std::vector<std::string_view> known;
  for_each_field(options, [&](const char* field, auto& into) {
    known.emplace_back(field);
    if (const auto found = object.find(field); found != object.end()) read(field, *found, into);
  });
  for (const auto& [field, value] : object.items()) {
    if (std::find(known.begin(), known.end(), field) == known.end()) {
      throw OptionError("unknown training option " + formats::quote(field));
    }
  }
  options.validate();
  return options;
}

double learning_rate(const TrainerOptions& options, int64_t step) {
  if (step < options.warmup) return options.lr * static_cast<double>(step + 1) / static_cast<double>(options.warmup);
  const int64_t last = options.steps - 1;
  if (step >= last) return options.steps > options.warmup ? options.min_lr : options.lr;
  const double progress = static_cast<double>(step - options.warmup) / static_cast<double>(last - options.warmup);
  return options.min_lr + 0.5 * (options.lr - options.min_lr) * (1.0 + std::cos(std::numbers::pi * progress));
}

bool has_bfloat16_products() {
  const auto capabilities = at::cpu::get_cpu_capabilities();
  constexpr std::array<const char*, 4> kNames = {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"};
  return std::any_of(kNames.begin(), kNames.end(), [&](const char* name) {
    const auto found = capabilities.find(name);
    return found != capabilities.end() && found->second.isBool() && found->second.toBool();
  });
}

std::string resolve_dtype(const std::string& dtype) {
  if (dtype != "auto") return dtype;
  return has_bfloat16_products() ? "bfloat16" : "float32";
}

}  // namespace latte::train
