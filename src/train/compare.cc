#include "train/compare.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <map>
#include <optional>
#include <string_view>

#include "data/task_options.h"
#include "formats/error.h"
#include "formats/language_model_config.h"
#include "formats/option_fields.h"
#include "models/encoder.h"
#include "train/options.h"

namespace latte::train {
namespace {

using formats::fields::check_range;
using formats::fields::check_that;
using formats::fields::fail;
using formats::fields::read_object;
using nlohmann::json;

constexpr double kMostDifference = 0.05;

std::string number(double value, const char* pattern) {
  char text[32];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

// Letters, digits, dots and dashes of a title.
std::string file_name(const std::string& title) {
  std::string name;
  for (const char c : title) {
    const bool plain = std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '.' || c == '_';
    if (plain) {
      name += c;
    } else if (!name.empty() && name.back() != '-') {
      name += '-';
    }
  }
  return name;
}

// What a run is judged by, the larger the better; none of a run that diverged, whose validation needn't be a number.
std::optional<double> validation_of(const json& report, bool task) {
  const auto found = [&](const char* field) { return report.value(field, json()); };
  if (report.value("diverged", false) || !found("val_loss").is_number()) return {};
  const json value = found(task ? "val_accuracy" : "val_loss");
  if (!value.is_number()) return {};
  return task ? value.get<double>() : -value.get<double>();
}

// Of a text the loss of its test part, where it has one.
double metric_of(const json& report, bool task) {
  if (!task) {
    const json test = report.value("test_loss", json());
    return (test.is_number() ? test : report.at("val_loss")).get<double>();
  }
  const json& splits = report.at("splits");
  return splits.at(splits.contains("test") ? "test" : "validation").at("accuracy").get<double>();
}

double mean_of(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

// Mean accuracy at the lengths that weren't trained at, [length, accuracy] in rising order: of splits test_LENGTH.
json accuracy_by_length(const std::vector<json>& reports) {
  constexpr std::string_view kPrefix = "test_";
  std::map<int64_t, std::vector<double>> values;
  for (const json& report : reports) {
    for (const auto& [name, split] : report.at("splits").items()) {
      if (name.starts_with(kPrefix)) {
        int64_t length = 0;  // the file of a task's examples names no other
        std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), length);
        values[length].push_back(split.at("accuracy").get<double>());
      }
    }
  }
  json means = json::array();
  for (const auto& [length, accuracies] : values) means.push_back({length, mean_of(accuracies)});
  return means;
}

json summary_of(const std::string& title, const std::vector<json>& reports, bool task) {
  std::vector<double> values, losses, seconds, step_seconds, rates;
  std::optional<double> memory;  // who tells of a run that ended before doesn't know it
  for (const json& report : reports) {
    values.push_back(metric_of(report, task));
    losses.push_back(report.at("val_loss").get<double>());
    seconds.push_back(report.at("seconds").get<double>());
    step_seconds.push_back(report.value("step_seconds", 0.0));
    rates.push_back(report.at("tokens").get<double>() / std::max(seconds.back(), 1e-9));
    const json peak = report.value("peak_memory", json());
    if (peak.is_number()) memory = std::max(memory.value_or(0.0), peak.get<double>());
  }
  const double mean = mean_of(values);
  double squares = 0.0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  const auto count = static_cast<double>(values.size());
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  const json perplexity = {{"mean", std::exp(mean)}, {"least", std::exp(*least)}, {"most", std::exp(*most)}};
  return {{"title", title},
          {"accuracy_by_length", task ? accuracy_by_length(reports) : json::array()},
          {"parameters", reports.front().at("parameters")},
          {"values", values},
          {"mean", mean},
          {"least", *least},
          {"most", *most},
          {"perplexity", task ? json() : perplexity},  // exp of the losses' mean, least and most
          {"deviation", values.size() > 1 ? std::sqrt(squares / (count - 1)) : 0.0},
          {"val_loss", mean_of(losses)},
          {"seconds", mean_of(seconds)},
          {"step_seconds", mean_of(step_seconds)},
          {"tokens_per_second", mean_of(rates)},
          {"peak_memory", memory ? json(*memory) : json()}};
}

void check_titles(const std::vector<CompareEntry>& entries) {
  for (size_t i = 0; i < entries.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (entries[i].title == entries[j].title)
        throw OptionError("attentions has " + formats::quote(entries[i].title) + " twice");
    }
  }
}

}  // namespace

CompareEntry CompareOptions::parse_entry(const std::string& text) {
  CompareEntry entry{text, json::object()};
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(':', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    const size_t equals = part.find('=');
    if (begin == 0) {
      if (part.empty() || equals != std::string::npos) fail("attention", formats::quote(text), "NAME or NAME:FIELD=VALUE…");
      entry.model["attention"] = part;
    } else {
      if (equals == std::string::npos || equals == 0 || part.substr(0, equals) == "attention") {
        fail("attention", formats::quote(text), "NAME or NAME:FIELD=VALUE…, the attention's name in front alone");
      }
      json value = json::parse(part.substr(equals + 1), nullptr, /*allow_exceptions=*/false);
      entry.model[part.substr(0, equals)] = value.is_discarded() ? json(part.substr(equals + 1)) : value;
    }
    begin = end + 1;
  }
  return entry;
}

CompareOptions CompareOptions::from_json(const json& object) {
  CompareOptions options;
  std::vector<std::string> attentions;
  read_object("comparison's field", object, [&](const auto& visit) {
    visit("attentions", attentions);
    visit("positions", options.positions);
    visit("seeds", options.seeds);
    visit("learning_rates", options.learning_rates);
    visit("match_parameters", options.match_parameters);
    visit("seconds", options.seconds);
  });
  for (const std::string& text : attentions) options.entries.push_back(parse_entry(text));
  return options;
}

void CompareOptions::validate() const {
  if (entries.empty()) throw OptionError("attentions is empty, expected at least one");
  check_range("seeds", seeds, 1, 1000);
  for (const double lr : learning_rates) check_that(lr > 0, "learning_rates", lr, "positive numbers");
  check_that(seconds >= 0, "seconds", seconds, "a number >= 0");
  check_titles(entries);
}

int64_t longest_sequence(const json& config) {
  if (config.contains("task")) return TaskOptions::from_json(config.at("task")).longest_sequence();
  return config.value("training", json::object()).value("context", TrainerOptions().context);
}

int64_t parameters_of(const json& fields, bool task) {
  json model = fields;
  model["vocab_size"] = 1;
  if (!task) return formats::LanguageModelConfig::from_json(model).parameter_count();
  model["num_outputs"] = 1;
  return models::EncoderConfig::from_json(model).parameter_count();
}

json match_parameters(json model, bool task, int64_t parameters, const std::string& title) {
  const double before = model.value("mlp_ratio", 4.0);
  const int64_t ours = parameters_of(model, task);
  json other = model;
  constexpr double kHalf = 32.0;  // of the largest there is
  const double ratio_there = before > kHalf ? before / 2 : before * 2;
  other["mlp_ratio"] = ratio_there;
  // Linear in the MLP's size.
  const double slope = static_cast<double>(parameters_of(other, task) - ours) / (ratio_there - before);
  const double ratio = before + static_cast<double>(parameters - ours) / slope;
  if (ours != parameters && ratio > 0) model["mlp_ratio"] = ratio;
  const int64_t found = parameters_of(model, task);
  if (std::abs(static_cast<double>(found - parameters)) > kMostDifference * static_cast<double>(parameters)) {
    throw OptionError(title + " has " + std::to_string(found) +
                      " parameters, which its MLP can't bring within 5% of the first's " + std::to_string(parameters));
  }
  return model;
}

std::vector<CompareEntry> CompareOptions::crossed() const {
  if (positions.empty()) return entries;
  for (const std::string& position : positions) {
    try {  // softmax takes all there are
      parameters_of({{"attention", "softmax"}, {"position", position}}, /*task=*/true);
    } catch (const formats::ConfigError& error) {
      throw OptionError("positions: " + std::string(error.what()));
    }
  }
  std::vector<CompareEntry> all;
  for (const CompareEntry& entry : entries) {
    const std::string attention = entry.model.at("attention");
    const bool known = formats::takes_position(attention, "none");  // another is refused with its model
    if (entry.model.contains("position") || !known) {
      all.push_back(entry);
      continue;
    }
    const size_t before = all.size();
    for (const std::string& position : positions) {
      if (!formats::takes_position(attention, position)) continue;
      all.push_back({entry.title + ":position=" + position, entry.model});
      all.back().model["position"] = position;
    }
    if (all.size() == before) throw OptionError("positions has none that attention " + formats::quote(attention) + " takes");
  }
  check_titles(all);
  return all;
}

namespace {

bool forgets(json model, bool task) {
  model["vocab_size"] = 1;
  if (!task) return formats::LanguageModelConfig::from_json(model).forgets();
  model["num_outputs"] = 1;
  return models::EncoderConfig::from_json(model).forgets();
}

// The configuration's model for an entry: what suits one attention may not exist for another.
json model_of(const json& config, const CompareEntry& entry) {
  json model = config.value("model", json::object());
  const std::string attention = entry.model.at("attention");
  const bool latents = attention == "latte" || attention == "macchiato";
  for (const char* field : {"num_latents", "shared_latents", "forget", "decay_rank"}) {
    if (!latents) model.erase(field);
  }
  if (attention != "window" && attention != "macchiato") model.erase("sinks");
  if (attention == "linformer") model.erase("num_kv_heads");  // its keys and values are mixed for all heads alike
  const auto position_of = [&] {                              // what is no name is refused with the rest of the model
    const json found = model.value("position", json());
    return found.is_string() ? found.get<std::string>() : std::string();
  };
  const std::string position = position_of();
  // The configuration's, where it was chosen for latents: the others' default is what they are known by, and an entry that
  // wants it names it (softmax:position=conv).
  const bool of_latents = position == "conv" || position == "vapor" || position == "rg_lru";
  const bool rotates = attention == "softmax" || attention == "window" || attention == "macchiato";
  if ((of_latents && !latents) || (position == "rotary" && !rotates)) model.erase("position");  // its default
  for (const auto& [field, value] : entry.model.items()) model[field] = value;
  for (const char* field : {"vocab_size", "num_outputs"}) {
    if (config.contains("task") && model.contains(field)) {
      throw formats::ConfigError("model config: " + std::string(field) + " is the task's to say");
    }
  }
  const bool bounded = attention == "linformer" || position_of() == "learned";
  if (bounded && !model.contains("max_positions")) model["max_positions"] = longest_sequence(config);
  // A run's configuration says it, as what is left out has had another meaning in runs from before it.
  if (latents && !model.contains("decay_rank") && forgets(model, config.contains("task"))) {
    model["decay_rank"] = formats::LanguageModelConfig().decay_rank;
  }
  return model;
}

void check_training(const json& config) {
  json training = config.value("training", json::object());
  if (!training.contains("min_lr")) training["min_lr"] = 0;
  const TrainerOptions options = TrainerOptions::from_json(training);
  if (config.contains("task")) {
    (void)TaskOptions::from_json(config.at("task"));
    refuse_text_fields(training);
    return;
  }
  if (options.text.empty()) throw OptionError("text is missing: the configuration's training or --data names one");
  check_that(options.validation_fraction > 0, "validation_fraction", options.validation_fraction,
             "a positive number: a comparison needs a validation");
}

// What a run of this model would be refused for once it has begun.
void check_run(const json& config, const json& model) {
  // What a task reads may be shorter than its fields say.
  const bool known = !config.contains("task") || is_generated(config.at("task").at("name").get<std::string>());
  if (known && (model.value("position", json()) == "learned" || model.at("attention") == "linformer")) {
    const int64_t longest = longest_sequence(config), reach = model.at("max_positions").get<int64_t>();
    if (reach < longest) {
      fail("max_positions", std::to_string(reach), "at least " + std::to_string(longest) + ", the longest sequence");
    }
  }
  const int64_t batch = config.value("training", json::object()).value("batch", TrainerOptions().batch);
  const bool pairs = config.contains("task") && config.at("task").at("name") == "retrieval";
  if (model.value("pooled_norm", json()) == "batch" && batch < 2 && !pairs) {
    fail("batch", std::to_string(batch), "2 or more with pooled_norm batch");
  }
}

// The runs of one comparison: the same configuration, but for the model, the rate, the seed and, with seconds, the steps.
class Comparison {
 public:
  Comparison(const json& config, const CompareOptions& options, const CompareRunner& run)
      : config_(config), options_(options), run_(run), training_(config.value("training", json::object())) {
    rates_ = options.learning_rates;
    if (rates_.empty()) rates_ = {configured_rate() / 2, configured_rate(), configured_rate() * 2};
    first_seed_ = training_.value("seed", TrainerOptions().seed);
  }

  // An entry's row; null where a run was interrupted.
  json row(const std::string& title, const json& model) const {
    const auto steps = steps_of(title, model);
    if (!steps) return nullptr;
    json sweep = json::array(), names = json::array(), diverged = json::array();
    if (*steps == 0) return {{"title", title}, {"steps", 0}, {"sweep", sweep}, {"runs", names}};
    std::vector<json> reports;
    double best = 0.0, best_value = 0.0;
    for (const double lr : rates_) {
      const CompareRun first = at(title, model, *steps, lr, first_seed_);
      json report = run_(first);
      if (report.is_null()) return nullptr;
      const auto value = validation_of(report, is_task());
      sweep.push_back({{"lr", lr}, {"value", value ? json(std::abs(*value)) : json()}});
      if (value && (reports.empty() || *value > best_value)) {
        reports = {std::move(report)};
        names = {first.name};
        best = lr;
        best_value = *value;
      }
    }
    if (reports.empty()) return {{"title", title}, {"steps", *steps}, {"sweep", sweep}, {"runs", names}};
    for (int64_t seed = 1; seed < options_.seeds; ++seed) {
      const CompareRun next = at(title, model, *steps, best, first_seed_ + seed);
      json report = run_(next);
      if (report.is_null()) return nullptr;
      if (validation_of(report, is_task())) {
        reports.push_back(std::move(report));
        names.push_back(next.name);
      } else {
        diverged.push_back(next.name);
      }
    }
    json entry = summary_of(title, reports, is_task());
    const auto [least, most] = std::minmax_element(rates_.begin(), rates_.end());
    entry["at_edge"] = rates_.size() > 2 && (best == *least || best == *most);
    entry["diverged_runs"] = diverged;
    entry["lr"] = best;
    entry["steps"] = *steps;
    entry["sweep"] = sweep;
    entry["runs"] = names;
    return entry;
  }

 private:
  bool is_task() const { return config_.contains("task"); }
  double configured_rate() const { return training_.value("lr", TrainerOptions().lr); }

  CompareRun at(const std::string& title, const json& model, int64_t steps, double lr, int64_t seed) const {
    json config = config_;
    config.erase("compare");
    config.erase("about");
    config["model"] = model;
    json& fields = config["training"];
    fields["lr"] = lr;
    // The same schedule at every rate.
    const auto scaled = [&](double min_lr) { return std::min(lr, min_lr * (lr / configured_rate())); };
    fields["min_lr"] = fields.contains("min_lr") ? scaled(fields["min_lr"]) : lr / 10;
    fields["seed"] = seed;
    fields["steps"] = steps;
    return {file_name(title) + "-lr" + json(lr).dump() + "-seed" + std::to_string(seed), config};
  }

  // The configuration's, or with seconds as many as a trial at the least rate says that fit, 0 where it diverged; none where it
  // was interrupted.
  std::optional<int64_t> steps_of(const std::string& title, const json& model) const {
    if (options_.seconds <= 0) return training_.value("steps", TrainerOptions().steps);
    CompareRun trial = at(title, model, kTrialSteps, *std::min_element(rates_.begin(), rates_.end()), first_seed_);
    trial.name = file_name(title) + "-trial";
    for (const char* field : {"eval_every", "save_every"}) trial.config["training"][field] = 0;
    trial.config["training"]["eval_batches"] = 1;
    const json report = run_(trial);
    if (report.is_null()) return {};
    if (report.value("diverged", false)) return 0;
    const double step_seconds = report.value("step_seconds", 0.0);
    if (!(step_seconds > 0)) throw OptionError(trial.name + " ended without a step: there is no time to go by");
    const double steps = std::round(options_.seconds / step_seconds);
    constexpr double kMostSteps = 1e12;
    return static_cast<int64_t>(std::clamp(steps, 1.0, kMostSteps));
  }

  const json& config_;
  const CompareOptions& options_;
  const CompareRunner& run_;
  json training_;
  std::vector<double> rates_;
  int64_t first_seed_ = 0;
};

}  // namespace

json compare(const json& config, const CompareOptions& options, const CompareRunner& run) {
  options.validate();
  const bool task = config.contains("task");
  check_training(config);
  const std::vector<CompareEntry> entries = options.crossed();
  std::optional<int64_t> parameters;  // the first entry's
  std::vector<json> models;           // all of them, before the first one trains
  for (const CompareEntry& entry : entries) {
    try {
      const json model = model_of(config, entry);
      const int64_t ours = parameters_of(model, task);
      check_run(config, model);
      if (!parameters) {
        parameters = ours;
      } else if (options.match_parameters && entry.model.contains("mlp_ratio") &&
                 entry.model.at("mlp_ratio") != entries.front().model.value("mlp_ratio", json())) {
        throw OptionError(
            "mlp_ratio is what brings an attention to the first's number of parameters: name it there, or set "
            "match_parameters to false in the configuration's compare");
      }
      models.push_back(options.match_parameters ? match_parameters(model, task, *parameters, entry.title) : model);
    } catch (const std::invalid_argument& error) {  // ConfigError, OptionError
      const std::string what = error.what();
      throw OptionError(what.starts_with(entry.title) ? what : entry.title + ": " + what);
    }
  }
  const Comparison comparison(config, options, run);
  json rows = json::array();
  for (size_t i = 0; i < entries.size(); ++i) {
    json row = comparison.row(entries[i].title, models[i]);
    if (row.is_null()) return nullptr;
    rows.push_back(std::move(row));
  }
  return {{"metric", task ? "accuracy" : "loss"}, {"seeds", options.seeds}, {"entries", rows}};
}

namespace {

std::string perplexity_text(const json& entry) {
  const json& perplexity = entry.at("perplexity");
  const auto shown = [&](const char* field) { return number(perplexity.at(field).get<double>(), "%.2f"); };
  return shown("mean") + (entry.at("values").size() > 1 ? ", " + shown("least") + " … " + shown("most") : "");
}

}  // namespace

std::string comparison_table(const json& comparison) {
  const bool accuracy = comparison.at("metric") == "accuracy";
  std::string table =
      accuracy ? "| attention | parameters | learning rate | steps | accuracy, % | its range over seeds | validation loss "
               : "| attention | parameters | learning rate | steps | loss | its range over seeds | perplexity, its range ";
  table += "| a step, ms | training, s | tokens/s | peak memory, MB |";
  std::string rule = "|---|---|---|---|---|---|---|---|---|---|---|";
  for (const json& entry : comparison.at("entries")) {
    if (!entry.contains("accuracy_by_length")) continue;  // it diverged
    for (const json& length : entry.at("accuracy_by_length")) {
      table += " accuracy at " + length.at(0).dump() + ", % |";
      rule += "---|";
    }
    break;
  }
  table += "\n" + rule + "\n";
  for (const json& entry : comparison.at("entries")) {
    if (!entry.contains("lr")) {
      table += "| " + entry.at("title").get<std::string>() + " | | diverged at every rate | " +
               std::to_string(entry.at("steps").get<int64_t>()) + " |\n";
      continue;
    }
    const double scale = accuracy ? 100 : 1;
    const char* pattern = accuracy ? "%.2f" : "%.4f";
    const auto shown = [&](const char* field) { return number(scale * entry.at(field).get<double>(), pattern); };
    table +=
        "| " + entry.at("title").get<std::string>() + " | " + std::to_string(entry.at("parameters").get<int64_t>()) + " | " +
        entry.at("lr").dump() + (entry.at("at_edge") ? " (the sweep's edge)" : "") + " | " +
        std::to_string(entry.at("steps").get<int64_t>()) + " | " + shown("mean") +
        (entry.at("values").size() > 1 ? " ± " + shown("deviation") : "") +
        (entry.at("diverged_runs").empty() ? "" : " (" + std::to_string(entry.at("diverged_runs").size()) + " more diverged)") +
        " | " + shown("least") + " … " + shown("most") + " | " +
        (accuracy ? number(entry.at("val_loss").get<double>(), "%.4f") : perplexity_text(entry)) + " | " +
        number(1e3 * entry.at("step_seconds").get<double>(), "%.4g") + " | " + number(entry.at("seconds").get<double>(), "%.0f") +
        " | " + number(entry.at("tokens_per_second").get<double>(), "%.0f") + " | " +
        (entry.at("peak_memory").is_null() ? "-" : number(entry.at("peak_memory").get<double>() / 1e6, "%.0f")) + " |";
    for (const json& length : entry.at("accuracy_by_length")) {
      table.append(" ").append(number(100 * length.at(1).get<double>(), "%.2f")).append(" |");
    }
    table += "\n";
  }
  return table;
}

}  // namespace latte::train
