#include "data/task_options.h"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>

#include "formats/error.h"
#include "formats/option_fields.h"

namespace latte {
namespace {

using namespace formats::fields;
using nlohmann::json;

constexpr std::array<std::string_view, 9> kNames{
    "listops",           "text",   "retrieval",      "image", "pathfinder", "associative_recall",
    "selective_copying", "needle", "masked_language"};

bool is_probe(std::string_view name) { return name == "associative_recall" || name == "selective_copying" || name == "needle"; }

// One place that says which fields a task has, for reading and writing.
template <typename Options, typename Visit>
void for_each_field(Options& options, const Visit& visit) {
  const std::string& name = options.name;
  visit("name", options.name);
  visit("data", options.data);
  if (is_generated(name)) {
    visit("seed", options.seed);
    visit("train", options.train);
    visit("validation", options.validation);
    visit("test", options.test);
  }
  if (name == "listops") {
    visit("min_length", options.min_length);
    visit("max_length", options.max_length);
    visit("max_depth", options.max_depth);
    visit("max_arguments", options.max_arguments);
  }
  if (name == "text" || name == "retrieval" || name == "masked_language" || is_probe(name)) visit("length", options.length);
  if (name == "text") visit("crop", options.crop);
  if (name == "text" || name == "image" || name == "masked_language") visit("validation_fraction", options.validation_fraction);
  if (is_probe(name)) visit("test_lengths", options.test_lengths);
  if (name == "pathfinder") {
    visit("size", options.size);
    visit("contour_length", options.contour_length);
    visit("distractors", options.distractors);
    visit("levels", options.levels);
  }
  if (name == "associative_recall") {
    visit("pairs", options.pairs);
    visit("keys", options.keys);
  }
  if (name == "selective_copying") visit("copies", options.copies);
  if (name == "selective_copying" || name == "needle") visit("symbols", options.symbols);
  if (name == "masked_language") visit("mask_fraction", options.mask_fraction);
}

std::string joined_names() {
  std::string text;
  for (const std::string_view name : kNames) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

}  // namespace

std::span<const std::string_view> task_names() { return kNames; }

bool is_generated(std::string_view task) { return task == "listops" || task == "pathfinder" || is_probe(task); }

TaskOptions TaskOptions::defaults(const std::string& name) {
  TaskOptions options;
  options.name = name;
  if (std::find(kNames.begin(), kNames.end(), name) == kNames.end())
    fail("task", formats::quote(name), "one of " + joined_names());
  if (name == "listops") {
    options.train = 96000;
    options.validation = options.test = 2000;
  } else if (name == "pathfinder") {
    options.train = 160000;
    options.validation = options.test = 20000;
  } else if (is_probe(name)) {
    options.train = 100000;
    options.validation = options.test = 3000;
  }
  if (name == "text" || name == "retrieval") options.length = 4000;
  if (name == "associative_recall") {
    options.length = 256;
    options.pairs = 16;
    options.keys = 4096;
  }
  if (name == "selective_copying") options.length = 4096;
  if (name == "needle") options.length = 256;
  if (name == "masked_language") options.length = 512;
  return options;
}

void TaskOptions::validate() const {
  (void)defaults(name);
  if (is_generated(name)) {
    check_range("seed", seed, 0, std::numeric_limits<int64_t>::max());
    constexpr int64_t kMostExamples = 100'000'000;
    check_range("train", train, 1, kMostExamples);
    check_range("validation", validation, 1, kMostExamples);
    check_range("test", test, 1, kMostExamples);
  } else if (data.empty()) {
    throw formats::OptionError("task " + name + " reads its examples: data is missing");
  }
  if (name == "listops") {
    check_range("max_length", max_length, 4, kLargestSize);
    check_range("min_length", min_length, 0, max_length - 2);
    check_range("max_depth", max_depth, 2, 64);
    check_range("max_arguments", max_arguments, 2, 256);
  }
  if (name == "text" || name == "retrieval" || name == "masked_language") check_range("length", length, 1, kLargestSize);
  check_that(validation_fraction > 0 && validation_fraction < 1, "validation_fraction", validation_fraction,
             "a number between 0 and 1");
  if (name == "pathfinder") {
    check_range("size", size, 16, 512);
    check_range("contour_length", contour_length, 2, 64);
    check_range("distractors", distractors, 0, 64);
    check_range("levels", levels, 2, 256);
  }
  if (is_probe(name)) {
    std::vector<int64_t> lengths = test_lengths;
    lengths.push_back(length);
    int64_t least = 4;
    if (name == "associative_recall") {
      check_range("keys", keys, 1, 1 << 20);
      check_range("pairs", pairs, 1, std::min(keys, kLargestSize / 4));
      least = 4 * pairs;
    }
    if (name == "selective_copying") {
      check_range("copies", copies, 1, kLargestSize / 2 - 1);
      least = 2 * copies + 1;
    }
    if (name != "associative_recall") check_range("symbols", symbols, 2, 128);
    for (const int64_t each : lengths) check_range(each == length ? "length" : "test_lengths", each, least, kLargestSize);
  }
  if (name == "masked_language") {
    check_that(mask_fraction > 0 && mask_fraction < 1, "mask_fraction", mask_fraction, "a number between 0 and 1");
  }
}

int64_t TaskOptions::longest_sequence() const {
  if (name == "listops") return max_length - 1;
  if (name == "pathfinder") return size * size;
  if (name == "image") return 32 * 32;
  int64_t longest = length;
  for (const int64_t each : test_lengths) longest = std::max(longest, each);
  return longest;
}

json TaskOptions::to_json() const {
  json object = json::object();
  for_each_field(*this, [&](const char* field, const auto& value) { object[field] = value; });
  return object;
}

TaskOptions TaskOptions::from_json(const json& object) {
  if (!object.is_object() || !object.contains("name")) throw formats::OptionError("task: expected a JSON object with a name");
  std::string name;
  read("task", object.at("name"), name);
  TaskOptions options = defaults(name);
  read_object("option of task " + name, object, [&](const auto& visit) { for_each_field(options, visit); });
  options.validate();
  return options;
}

}  // namespace latte
