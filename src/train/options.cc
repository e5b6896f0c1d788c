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
#include "formats/option_fields.h"

namespace latte::train {
namespace {

using namespace formats::fields;
using nlohmann::json;

// One place that lists the fields, for reading and writing.
template <typename Options, typename Visit>
void for_each_field(Options& options, const Visit& visit) {
  visit("text", options.text);
  visit("tokens", options.tokens);
  visit("validation_fraction", options.validation_fraction);
  visit("test_fraction", options.test_fraction);
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

}  // namespace

formats::Vocabulary::Kind TrainerOptions::vocabulary_kind() const {
  if (tokens == "corpus") return formats::Vocabulary::Kind::kTokens;
  return tokens == "bytes" ? formats::Vocabulary::Kind::kBytes : formats::Vocabulary::Kind::kCharacters;
}

void TrainerOptions::validate() const {
  if (tokens != "chars" && tokens != "bytes" && tokens != "corpus")
    fail("tokens", formats::quote(tokens), "chars, bytes or corpus");
  if (dtype != "auto" && dtype != "float32" && dtype != "bfloat16") {
    fail("dtype", formats::quote(dtype), "auto, float32 or bfloat16");
  }
  check_that(validation_fraction >= 0 && validation_fraction < 1, "validation_fraction", validation_fraction,
             "a number in [0, 1)");
  check_that(test_fraction >= 0 && test_fraction + validation_fraction < 1, "test_fraction", test_fraction,
             "a number >= 0, less than 1 with validation_fraction");
  check_range("batch", batch, 1, kLargestSize);
  check_range("accumulate", accumulate, 1, kLargestSize);
  // Ranks may share a sequence that none of them could hold.
  constexpr int64_t kLargestContext = int64_t{1} << 30;
  check_range("context", context, 1, kLargestContext);
  if (batch * accumulate > kLargestCount / context) {
    throw OptionError("batch is " + std::to_string(batch) + ", with accumulate " + std::to_string(accumulate) + " and context " +
                      std::to_string(context) + " more than the 2^40 tokens that a step may have");
  }
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

void refuse_text_fields(const json& training) {
  for (const char* field : kTextFields) {
    if (training.contains(field)) throw OptionError(std::string(field) + " is for --text, not for a task");
  }
}

json TrainerOptions::to_json() const {
  json object = json::object();
  for_each_field(*this, [&](const char* field, const auto& value) { object[field] = value; });
  return object;
}

TrainerOptions TrainerOptions::from_json(const json& object) {
  TrainerOptions options;
  read_object("training option", object, [&](const auto& visit) { for_each_field(options, visit); });
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
