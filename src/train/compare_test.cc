#include "train/compare.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "formats/test_files.h"
#include "train/options.h"

namespace latte::train {
namespace {

using nlohmann::json;

json task_config() {
  return {{"task", {{"name", "listops"}}},
          {"model", {{"num_layers", 2}, {"embed_dim", 32}, {"num_heads", 4}, {"num_latents", 8}}},
          {"training", {{"lr", 0.002}, {"seed", 7}, {"steps", 10}}}};
}

json report(double validation, double test) {
  return {{"val_accuracy", validation},
          {"val_loss", 1.0},
          {"splits", {{"test", {{"accuracy", test}}}}},
          {"parameters", 100},
          {"seconds", 2.0},
          {"step_seconds", 0.25},
          {"tokens", 5000},
          {"peak_memory", 3000000}};
}

TEST(Compare, ShowsTheLengthsThatWereNotTrainedAt) {
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax")};
  options.learning_rates = {0.001};
  options.seeds = 2;
  double accuracy = 0.25;
  const json result = compare(task_config(), options, [&](const CompareRun&) {
    json run = report(0.5, 0.5);
    run["splits"]["test_1024"] = {{"accuracy", accuracy}};
    run["splits"]["test_128"] = {{"accuracy", 1.0}};
    accuracy += 0.5;
    return run;
  });
  EXPECT_EQ(result.at("entries").at(0).at("accuracy_by_length"), json::parse("[[128, 1.0], [1024, 0.5]]"));
  const std::string table = comparison_table(result);
  EXPECT_NE(table.find("| accuracy at 128, % | accuracy at 1024, % |\n"), std::string::npos) << table;
  EXPECT_NE(table.find(" | 100.00 | 50.00 |\n"), std::string::npos) << table;
}

TEST(Compare, ATextIsJudgedByItsTestPartWhereItHasOne) {
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax")};
  options.learning_rates = {0.001};
  const json config = {{"training", {{"text", "a.txt"}}}, {"model", json::object()}};
  json run = report(0.5, 0.5);
  run.erase("splits");
  run["test_loss"] = nullptr;
  EXPECT_EQ(compare(config, options, [&](const CompareRun&) { return run; }).at("entries").at(0).at("mean"), 1.0);
  run["test_loss"] = 1.5;
  EXPECT_EQ(compare(config, options, [&](const CompareRun&) { return run; }).at("entries").at(0).at("mean"), 1.5);
}

TEST(Compare, SweepsRatesOnOneSeedAndRunsTheOthersAtTheBest) {
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax"), CompareOptions::parse_entry("latte:num_latents=4")};
  options.learning_rates = {0.001, 0.01};
  options.seeds = 3;
  std::vector<std::string> names;
  const auto run = [&](const CompareRun& asked) {
    names.push_back(asked.name);
    const double lr = asked.config.at("training").at("lr");
    const int64_t seed = asked.config.at("training").at("seed");
    EXPECT_EQ(asked.config.at("training").at("min_lr"), lr / 10);
    const bool latte = asked.config.at("model").at("attention") == "latte";
    EXPECT_EQ(asked.config.at("model").value("num_latents", 0), latte ? 4 : 0);
    // softmax is best at 0.01, latte at 0.001.
    return report((lr > 0.005) != latte ? 0.9 : 0.5, 0.5 + 0.1 * static_cast<double>(seed - 7));
  };
  const json result = compare(task_config(), options, run);
  EXPECT_EQ(names, (std::vector<std::string>{"softmax-lr0.001-seed7", "softmax-lr0.01-seed7", "softmax-lr0.01-seed8",
                                             "softmax-lr0.01-seed9", "latte-num_latents-4-lr0.001-seed7",
                                             "latte-num_latents-4-lr0.01-seed7", "latte-num_latents-4-lr0.001-seed8",
                                             "latte-num_latents-4-lr0.001-seed9"}));
  const json& softmax = result.at("entries").at(0);
  EXPECT_EQ(softmax.at("lr"), 0.01);
  EXPECT_NEAR(softmax.at("mean").get<double>(), 0.6, 1e-12);
  EXPECT_NEAR(softmax.at("deviation").get<double>(), 0.1, 1e-12);
  EXPECT_NEAR(softmax.at("least").get<double>(), 0.5, 1e-12);
  EXPECT_NEAR(softmax.at("most").get<double>(), 0.7, 1e-12);
  EXPECT_NEAR(softmax.at("tokens_per_second").get<double>(), 2500, 1e-9);
  EXPECT_EQ(result.at("entries").at(1).at("lr"), 0.001);
  const std::string table = comparison_table(result);
  EXPECT_CONTAINS(table, "| softmax | 100 | 0.01 | 10 | 60.00 ± 10.00 | 50.00 … 70.00 | 1.0000 | 250 | 2 | 2500 | 3 |");
}

TEST(Compare, WithoutRatesItTriesHalfOnceAndTwiceTheConfigurations) {
  json config = task_config();
  config["training"]["min_lr"] = 0.0005;
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax")};
  options.seeds = 1;
  std::vector<std::pair<double, double>> rates;
  const auto run = [&](const CompareRun& asked) {
    rates.emplace_back(asked.config.at("training").at("lr"), asked.config.at("training").at("min_lr"));
    return report(0.5, 0.5);
  };
  compare(config, options, run);
  EXPECT_EQ(rates, (std::vector<std::pair<double, double>>{{0.001, 0.00025}, {0.002, 0.0005}, {0.004, 0.001}}));
  rates.clear();
  options.learning_rates = {0.0001};  // below the configuration's last rate
  compare(config, options, run);
  ASSERT_EQ(rates.size(), 1U);
  EXPECT_NEAR(rates[0].second, 0.000025, 1e-15);
  config["training"].update({{"lr", 0.003}, {"min_lr", 0.003}});  // a constant one stays one, whatever rounding does
  options.learning_rates = {0.007};
  rates.clear();
  compare(config, options, run);
  EXPECT_EQ(rates[0].second, 0.007);
  config["training"]["min_lr"] = 0;  // a schedule that ends at nothing does at every rate
  rates.clear();
  compare(config, options, run);
  EXPECT_EQ(rates[0].second, 0.0);
}

TEST(Compare, WhatAnAttentionHasNoUseForIsLeftOut) {
  json config = task_config();
  config["model"].update({{"position", "conv"}, {"sinks", 2}, {"causal", true}});
  CompareOptions options;
  for (const char* name : {"macchiato", "latte", "softmax", "linear", "window:position=vapor", "softmax:position=conv"})
    options.entries.push_back(CompareOptions::parse_entry(name));
  options.seeds = 1;
  compare(config, options, [](const CompareRun& asked) {
    const json& model = asked.config.at("model");
    const bool latents = model.at("attention") == "macchiato" || model.at("attention") == "latte";
    const bool named = asked.name.find("position") != std::string::npos;
    EXPECT_EQ(model.contains("position"), latents || named) << asked.name;
    if (named) EXPECT_EQ(model.at("position"), model.at("attention") == "window" ? "vapor" : "conv");
    EXPECT_EQ(model.contains("num_latents"), latents);
    EXPECT_EQ(model.contains("sinks"), model.at("attention") == "macchiato" || model.at("attention") == "window");
    return report(0.5, 0.5);
  });
}

TEST(Compare, EqualTimeIsAsManyStepsAsATrialSaysFit) {
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax"), CompareOptions::parse_entry("latte")};
  options.seeds = 2;
  options.seconds = 60;
  options.learning_rates = {0.002};
  std::vector<std::pair<std::string, int64_t>> runs;
  const json result = compare(task_config(), options, [&](const CompareRun& asked) {
    const json& training = asked.config.at("training");
    runs.emplace_back(asked.name, training.at("steps"));
    EXPECT_EQ(asked.name.ends_with("-trial"), training.value("eval_every", -1) == 0);
    json made = report(0.5, 0.5);
    made["step_seconds"] = asked.config.at("model").at("attention") == "latte" ? 0.1 : 0.7;
    return made;
  });
  EXPECT_EQ(runs, (std::vector<std::pair<std::string, int64_t>>{{"softmax-trial", kTrialSteps},
                                                                {"softmax-lr0.002-seed7", 86},
                                                                {"softmax-lr0.002-seed8", 86},
                                                                {"latte-trial", kTrialSteps},
                                                                {"latte-lr0.002-seed7", 600},
                                                                {"latte-lr0.002-seed8", 600}}));
  EXPECT_EQ(result.at("entries").at(0).at("steps"), 86);
  EXPECT_EQ(result.at("entries").at(1).at("steps"), 600);
  EXPECT_NEAR(result.at("entries").at(0).at("step_seconds").get<double>(), 0.7, 1e-12);

  const auto error = formats::error_text<OptionError>([&] {
    compare(task_config(), options, [&](const CompareRun&) {
      json made = report(0.5, 0.5);
      made["step_seconds"] = 0.0;
      return made;
    });
  });
  EXPECT_CONTAINS(error, "softmax-trial ended without a step");
  options.seconds = 1e30;  // more than can be counted
  int64_t most = 0;
  compare(task_config(), options, [&](const CompareRun& asked) {
    most = std::max(most, asked.config.at("training").at("steps").get<int64_t>());
    return report(0.5, 0.5);
  });
  EXPECT_EQ(most, 1'000'000'000'000);
  options.seconds = -1;
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { options.validate(); }), "seconds is -1");
}

TEST(Compare, ARateThatDivergesCountsForNothing) {
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax"), CompareOptions::parse_entry("latte")};
  options.learning_rates = {0.001, 0.01, 0.1};
  options.seeds = 3;
  const json diverged = {{"diverged", true}};
  std::vector<std::string> names;
  const json result = compare(task_config(), options, [&](const CompareRun& asked) {
    names.push_back(asked.name);
    const double lr = asked.config.at("training").at("lr");
    if (asked.config.at("model").at("attention") == "latte") return diverged;
    json run = report(0.5 + lr, 0.6);
    if (lr == 0.1) run["val_loss"] = nullptr;  // as JSON has what is no number
    return asked.name.ends_with("seed9") ? diverged : run;
  });
  ASSERT_EQ(names.size(), 3 + 2 + 3);
  const json& softmax = result.at("entries").at(0);
  EXPECT_EQ(softmax.at("lr"), 0.01);
  EXPECT_EQ(softmax.at("at_edge"), false);
  EXPECT_EQ(softmax.at("diverged_runs"), json({"softmax-lr0.01-seed9"}));
  EXPECT_EQ(softmax.at("runs"), json({"softmax-lr0.01-seed7", "softmax-lr0.01-seed8"}));
  EXPECT_EQ(softmax.at("values"), json({0.6, 0.6}));
  EXPECT_TRUE(softmax.at("sweep").at(2).at("value").is_null());
  EXPECT_FALSE(result.at("entries").at(1).contains("lr"));
  const std::string table = comparison_table(result);
  EXPECT_CONTAINS(table, "| softmax | 100 | 0.01 | 10 | 60.00 ± 0.00 (1 more diverged) |");
  EXPECT_CONTAINS(table, "| latte | | diverged at every rate | 10 |");
  options.seconds = 60;
  double least = 1.0;
  const json timed = compare(task_config(), options, [&](const CompareRun& asked) {
    least = std::min(least, asked.config.at("training").at("lr").get<double>());
    return diverged;
  });
  EXPECT_EQ(least, 0.001);
  EXPECT_CONTAINS(comparison_table(timed), "| softmax | | diverged at every rate | 0 |");
}

// Who tells of a run that ended before doesn't know what memory it took.
TEST(Compare, MemoryThatNobodyKnowsIsNone) {
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax")};
  options.learning_rates = {0.001};
  options.seeds = 1;
  const json result = compare(task_config(), options, [](const CompareRun&) {
    json run = report(0.5, 0.5);
    run["peak_memory"] = nullptr;
    return run;
  });
  EXPECT_TRUE(result.at("entries").at(0).at("peak_memory").is_null());
  EXPECT_CONTAINS(comparison_table(result), "| 2500 | - |");
}

TEST(Compare, ABestRateAtTheSweepsEdgeIsSaid) {
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax")};
  options.seeds = 1;
  const auto at_edge = [&](std::vector<double> rates) {
    options.learning_rates = std::move(rates);
    const json result = compare(task_config(), options, [&](const CompareRun& asked) {
      return report(asked.config.at("training").at("lr").get<double>(), 0.6);
    });
    EXPECT_EQ(comparison_table(result).find("(the sweep's edge)") != std::string::npos, result.at("entries").at(0).at("at_edge"));
    return result.at("entries").at(0).at("at_edge").get<bool>();
  };
  EXPECT_TRUE(at_edge({0.001, 0.002, 0.004}));
  EXPECT_FALSE(at_edge({0.002, 0.004}));
}

TEST(Compare, WhatItsRunsWouldBeRefusedForIsRefusedFirst) {
  const auto error = [](const json& config, const std::vector<std::string>& entries) {
    CompareOptions options;
    for (const std::string& entry : entries) options.entries.push_back(CompareOptions::parse_entry(entry));
    return formats::error_text<OptionError>(
        [&] { compare(config, options, [](const CompareRun&) { return ADD_FAILURE() << "it trained", json(); }); });
  };
  json text = {{"training", {{"text", "a.txt"}, {"context", 16}}}, {"model", json::object()}};
  EXPECT_CONTAINS(error(text, {"softmax", "softmax:position=learned:max_positions=8"}),
                  "softmax:position=learned:max_positions=8: max_positions is 8, expected at least 16");
  text["training"]["validation_fraction"] = 0;
  EXPECT_CONTAINS(error(text, {"softmax"}), "a comparison needs a validation");
  EXPECT_CONTAINS(error({{"training", json::object()}}, {"softmax"}), "text is missing");
  json task = task_config();
  task["model"]["pooled_norm"] = "batch";
  task["training"]["batch"] = 1;
  EXPECT_CONTAINS(error(task, {"softmax"}), "batch is 1, expected 2 or more with pooled_norm batch");
  task["task"] = {{"name", "retrieval"}, {"data", "pairs.tsv"}};  // which has two sequences an example
  CompareOptions pairs;
  pairs.entries = {CompareOptions::parse_entry("softmax")};
  EXPECT_TRUE(compare(task, pairs, [](const CompareRun&) { return json(); }).is_null());
  EXPECT_CONTAINS(error(task_config(), {"softmax", "latte:mlp_ratio=2"}), "latte:mlp_ratio=2: mlp_ratio is what brings");
  CompareOptions crossed;
  crossed.entries = {CompareOptions::parse_entry("softmax:mlp_ratio=2"), CompareOptions::parse_entry("latte")};
  crossed.positions = {"none", "conv"};
  EXPECT_TRUE(compare(task_config(), crossed, [](const CompareRun&) { return json(); }).is_null());
  EXPECT_CONTAINS(formats::error_text<OptionError>([] { CompareOptions::parse_entry("latte:attention=5"); }),
                  "attention is \"latte:attention=5\"");
}

// Linformer mixes the keys and values of all heads alike.
TEST(Compare, LinformerHasAsManyKeyValueHeadsAsHeads) {
  json config = task_config();
  config["model"].update({{"num_kv_heads", 2}, {"projected", 8}});
  config["task"].update({{"max_length", 40}, {"min_length", 4}});
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax"), CompareOptions::parse_entry("linformer")};
  options.seeds = 1;
  compare(config, options, [](const CompareRun& asked) {
    EXPECT_EQ(asked.config.at("model").contains("num_kv_heads"), asked.config.at("model").at("attention") == "softmax");
    return report(0.5, 0.5);
  });
  options.entries = {CompareOptions::parse_entry("linformer:num_kv_heads=2")};
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { compare(config, options, [](const CompareRun&) { return json(); }); }),
                  "num_kv_heads is 2, expected num_heads, 4, with attention linformer");
}

TEST(Compare, AnInterruptedRunEndsIt) {
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax")};
  int runs = 0;
  EXPECT_TRUE(
      compare(task_config(), options, [&](const CompareRun&) { return ++runs == 2 ? json() : report(0.5, 0.5); }).is_null());
  EXPECT_EQ(runs, 2);
}

TEST(Compare, ParametersAreWithinFivePercent) {
  const json base = {{"num_layers", 2}, {"embed_dim", 64}, {"num_heads", 4}};
  json softmax = base;
  softmax["attention"] = "softmax";
  const int64_t wanted = parameters_of(softmax, true);
  for (const json& fields : std::vector<json>{{{"attention", "latte"}, {"num_latents", 64}},
                                              {{"attention", "latte"}, {"num_latents", 4}, {"shared_latents", true}},
                                              {{"attention", "macchiato"}},
                                              {{"attention", "linformer"}, {"max_positions", 200}},
                                              {{"attention", "gated_linear"}, {"causal", true}}}) {
    json model = base;
    model.update(fields);
    const json matched = match_parameters(model, true, wanted, "it");
    EXPECT_NEAR(static_cast<double>(parameters_of(matched, true)), static_cast<double>(wanted),
                0.05 * static_cast<double>(wanted))
        << fields;
  }
  json wide = base;  // of a ratio whose double there isn't
  wide.update({{"attention", "latte"}, {"mlp_ratio", 40}});
  json first = wide;
  first["attention"] = "softmax";
  const int64_t many = parameters_of(first, true);
  EXPECT_NEAR(static_cast<double>(parameters_of(match_parameters(wide, true, many, "wide"), true)), static_cast<double>(many),
              0.05 * static_cast<double>(many));
  json huge = base;
  huge.update({{"attention", "latte"}, {"num_latents", 2000}});
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { match_parameters(huge, true, wanted, "huge"); }), "huge has ");
}

TEST(Compare, PositionsAreASecondAxis) {
  CompareOptions options;
  for (const char* name : {"softmax", "latte:num_latents=4", "linear", "macchiato:position=rotary"})
    options.entries.push_back(CompareOptions::parse_entry(name));
  options.positions = {"none", "rotary", "conv"};
  options.seeds = 1;
  std::vector<std::string> titles;
  const json result = compare(task_config(), options, [&](const CompareRun& asked) {
    const std::string position = asked.config.at("model").at("position");
    EXPECT_NE(asked.name.find("position-" + position), std::string::npos) << asked.name;
    return report(0.5, 0.5);
  });
  for (const json& entry : result.at("entries")) titles.push_back(entry.at("title"));
  // What an attention doesn't take is left out, and what an entry names stays.
  EXPECT_EQ(titles, (std::vector<std::string>{"softmax:position=none", "softmax:position=rotary", "softmax:position=conv",
                                              "latte:num_latents=4:position=none", "latte:num_latents=4:position=conv",
                                              "linear:position=none", "linear:position=conv", "macchiato:position=rotary"}));
  options.positions = {"rotary"};
  const auto run = [](const CompareRun&) { return report(0.5, 0.5); };
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { compare(task_config(), options, run); }),
                  "positions has none that attention \"latte\" takes");

  const auto error = [&](const std::vector<std::string>& attentions, const std::vector<std::string>& positions) {
    CompareOptions asked;
    for (const auto& name : attentions) asked.entries.push_back(CompareOptions::parse_entry(name));
    asked.positions = positions;
    return formats::error_text<OptionError>([&] { compare(task_config(), asked, run); });
  };
  EXPECT_CONTAINS(error({"softmax"}, {"none", "rglru"}), "positions: model config: position is \"rglru\", expected ");
  EXPECT_CONTAINS(error({"softmax", "colour"}, {"none"}), "attention is \"colour\", expected ");
  EXPECT_CONTAINS(error({"softmax", "softmax:position=none"}, {"none"}), "attentions has \"softmax:position=none\" twice");
}

// What a run's configuration leaves out is what its time took for granted: decays had no rank once.
TEST(Compare, RunsSayTheRankOfTheirDecays) {
  json config = {{"model", {{"num_layers", 1}, {"embed_dim", 8}, {"num_heads", 2}, {"num_latents", 4}}},
                 {"training", {{"text", "a.txt"}, {"steps", 10}}}};
  const auto rank_of = [&](const std::string& entry, const json& asked_config) {
    CompareOptions options;
    options.entries = {CompareOptions::parse_entry(entry)};
    options.seeds = 1;
    json found;
    compare(asked_config, options, [&](const CompareRun& asked) {
      found = asked.config.at("model").value("decay_rank", json());
      return json();
    });
    return found;
  };
  EXPECT_EQ(rank_of("latte", config), 16);
  EXPECT_EQ(rank_of("macchiato:decay_rank=0", config), 0);
  EXPECT_EQ(rank_of("latte:forget=false", config), json());
  EXPECT_EQ(rank_of("softmax", config), json());
  EXPECT_EQ(rank_of("latte", task_config()), json());  // both directions: nothing to forget
}

// Linformer's map and learned positions are as long as the task's longest sequence, not as a default that may be far longer.
TEST(Compare, WhatReachesToTheLongestSequenceCountsThat) {
  json config = task_config();
  config["task"].update({{"max_length", 40}, {"min_length", 4}});
  config["model"]["projected"] = 8;
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax"), CompareOptions::parse_entry("linformer"),
                     CompareOptions::parse_entry("latte:position=learned"),
                     CompareOptions::parse_entry("latte:position=learned:max_positions=50")};
  options.learning_rates = {0.002};
  options.seeds = 1;
  std::vector<int64_t> reaches;
  compare(config, options, [&](const CompareRun& asked) {
    reaches.push_back(asked.config.at("model").value("max_positions", 0));
    return report(0.5, 0.5);
  });
  EXPECT_EQ(reaches, (std::vector<int64_t>{0, 39, 39, 50}));
  EXPECT_EQ(longest_sequence({{"training", {{"context", 77}}}}), 77);
}

TEST(Compare, AnEntrysErrorNamesTheEntry) {
  CompareOptions options;
  options.entries = {CompareOptions::parse_entry("softmax"), CompareOptions::parse_entry("latte:num_latents=0")};
  const auto run = [](const CompareRun&) { return report(0.5, 0.5); };
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { compare(task_config(), options, run); }),
                  "latte:num_latents=0: model config: num_latents is 0");
  json config = task_config();
  config["training"]["lr"] = "fast";
  options.entries.pop_back();
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { compare(config, options, run); }), "lr is \"fast\", expected a number");
  // What the first run would be told is told before anything trains.
  config = task_config();
  config["training"]["context"] = 16;
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { compare(config, options, run); }), "context is for --text");
  options.entries = {CompareOptions::parse_entry("softmax"), CompareOptions::parse_entry("latte:vocab_size=7")};
  EXPECT_CONTAINS(formats::error_text<OptionError>([&] { compare(task_config(), options, run); }),
                  "latte:vocab_size=7: model config: vocab_size is the task's to say");
}

TEST(Compare, OptionsSayWhatIsWrong) {
  const auto error = [](const json& object) {
    return formats::error_text<OptionError>([&] { CompareOptions::from_json(object).validate(); });
  };
  EXPECT_CONTAINS(error({{"attentions", json::array()}}), "attentions is empty");
  EXPECT_CONTAINS(error({{"attentions", {"latte", "latte"}}}), "attentions has \"latte\" twice");
  EXPECT_CONTAINS(error({{"attentions", {"latte:window"}}}), "attention is \"latte:window\"");
  EXPECT_CONTAINS(error({{"attentions", {"latte"}}, {"seeds", 0}}), "seeds is 0");
  EXPECT_CONTAINS(error({{"attentions", {"latte"}}, {"learning_rates", {-1.0}}}), "learning_rates");
  EXPECT_CONTAINS(error({{"colours", 3}}), "unknown comparison's field \"colours\"");
  EXPECT_EQ(CompareOptions::parse_entry("latte:position=vapor:forget=false").model,
            (json{{"attention", "latte"}, {"position", "vapor"}, {"forget", false}}));
}

}  // namespace
}  // namespace latte::train
