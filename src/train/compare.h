// Several attentions trained alike: the same data, steps, sweep of learning rates and number of parameters.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace latte::train {

struct CompareEntry {
  std::string title;
  nlohmann::json model;  // fields laid over the configuration's model
};

struct CompareOptions {
  std::vector<CompareEntry> entries;
  // A second axis: every entry that names no position with each of these that its attention takes; none: one position an entry.
  std::vector<std::string> positions;
  int64_t seeds = 3;
  std::vector<double> learning_rates;  // none: half, once and twice the configuration's
  bool match_parameters = true;        // by the MLP's size, to the first entry's number
  // Equal time in place of equal steps: each entry gets as many steps as fit, by the time of a few on trial; 0: the
  // configuration's steps.
  double seconds = 0.0;

  // "latte", or "latte:num_latents=8:shared_latents=true": an attention and fields of the model. Throws OptionError.
  static CompareEntry parse_entry(const std::string& text);
  // The field `compare` of a configuration: attentions (texts as above), positions, seeds, learning_rates, match_parameters,
  // seconds. Throws OptionError.
  static CompareOptions from_json(const nlohmann::json& json);
  void validate() const;  // throws OptionError
  // The entries with the positions. Throws OptionError where an attention takes none of them.
  std::vector<CompareEntry> crossed() const;
};

struct CompareRun {
  std::string name;       // of its folder
  nlohmann::json config;  // of latte train: model, training and task
};

constexpr int64_t kTrialSteps = 12;

// Trains, or returns the report of a run that is finished: latte train --json's, with peak_memory in bytes, or {"diverged":
// true}. null: interrupted.
using CompareRunner = std::function<nlohmann::json(const CompareRun&)>;

// The most tokens that a sequence of a configuration's task or text has, by its fields: what learned positions and linformer have
// to reach, and so count. Throws OptionError.
int64_t longest_sequence(const nlohmann::json& config);

// Parameters of `model` (fields) for a configuration with or without a task; sizes that only the data knows count for nothing.
int64_t parameters_of(const nlohmann::json& model, bool task);

// `model` with the mlp_ratio that brings it nearest to `parameters`. Throws OptionError where the two then differ by more than
// 5%.
nlohmann::json match_parameters(nlohmann::json model, bool task, int64_t parameters, const std::string& title);

// With options.seconds, a run of kTrialSteps first, named …-trial, which says how many steps an entry gets. Then seed 0 of every
// entry at each learning rate, then the other seeds at the rate with the best validation. Returns
//   {"metric": "accuracy" or "loss", "seeds":…, "entries": [{"title", "lr", "steps", "parameters", "mean", "least", "most",
//    "perplexity" (of a text: exp of "mean", "least" and "most"), "deviation", "values": […], "val_loss" (mean), "seconds",
//    "step_seconds", "tokens_per_second", "peak_memory", "sweep": [{"lr", "value" (null: it diverged)}], "at_edge" (the best rate
//    is the sweep's least or greatest, of three or more), "runs": [names, as "values"],
//    "diverged_runs": [names of further seeds that did, and don't count],
//    "accuracy_by_length": [[length, mean]] of splits test_LENGTH}]}; an entry that diverges at every rate has "title", "steps",
//    "sweep" and "runs" alone.
// or null where a run was interrupted. A task's metric is the accuracy on its test split, a text's the loss on its test part, or
// on its validation part where it has no test_fraction.
nlohmann::json compare(const nlohmann::json& config, const CompareOptions& options, const CompareRunner& run);

// A Markdown table of what compare() returned.
std::string comparison_table(const nlohmann::json& comparison);

}  // namespace latte::train
