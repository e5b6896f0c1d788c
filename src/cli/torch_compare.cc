// latte compare: several attentions trained alike, each run in a process and a folder of its own.
#include <ATen/Parallel.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "cli/torch_commands.h"
#include "cli/torch_train.h"
#include "formats/atomic_file.h"
#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/json_file.h"
#include "formats/mapped_file.h"
#include "train/compare.h"
#include "train/interrupt.h"
#include "train/metrics.h"
#include "train/options.h"
#include "train/plot.h"
#include "train/run.h"
#include "train/run_loop.h"
#include "train/training_checkpoint.h"

namespace latte::cli {
namespace {

using nlohmann::json;

struct Options {
  std::string config_file;
  std::vector<std::string> attentions, positions;
  std::vector<double> learning_rates;
  std::string data;
  std::vector<std::string> settings;
  int64_t seeds = 0;
  int64_t steps = 0;
  double seconds = 0.0;
  std::string out;
  int threads = 0;
  bool paper = false;
  bool json_output = false;
  bool quiet = false;
};

// Runs this program with `arguments`, its output in `output`; returns its exit code.
int RunChild(const std::vector<std::string>& arguments, const std::string& output) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
  // A group of its own: Ctrl-C reaches this process alone, which tells the child once, as a second signal would end it unsaved.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  pid_t child = 0;
  const int error = posix_spawn(&child, "/proc/self/exe", &actions, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) throw formats::FileError("run latte train with its output in", output, error);
  int status = 0;
  for (bool told = false;;) {
    const pid_t ended = waitpid(child, &status, WNOHANG);
    if (ended == child) break;
    if (ended < 0 && errno != EINTR) throw formats::FileError("wait for", arguments.front(), errno);
    if (train::InterruptGuard::interrupted() && !std::exchange(told, true)) ::kill(child, SIGTERM);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// The report of a run that came to its end while nobody waited for it; null where there is none, or not all of it.
json FinishedReport(const std::string& output) {
  try {
    json report = formats::read_json_object(output);
    return report.contains("step") && report.contains("peak_memory") && report.value("interrupted", json()) == false ? report
                                                                                                                     : json();
  } catch (const formats::FileError&) {
    return nullptr;
  } catch (const formats::FormatError&) {
    return nullptr;
  }
}

// Runs on other data, of another task or budget are none that could be gone on with.
std::string DefaultFolder(const Options& options) {
  std::string name = "compare-" + std::filesystem::path(options.config_file).stem().string();
  if (options.paper) name += "-paper";
  if (!options.data.empty()) name += "-" + std::filesystem::path(options.data).filename().string();
  std::vector<std::string> settings = options.settings;
  std::sort(settings.begin(), settings.end());
  for (const std::string& setting : settings) name += "-" + setting;
  if (options.steps > 0) name += "-steps=" + std::to_string(options.steps);
  if (options.seconds > 0) name += "-seconds=" + json(options.seconds).dump();
  std::replace(name.begin(), name.end(), '/', '_');
  constexpr size_t kLongest = 200;  // file systems take 255 bytes
  if (name.size() > kLongest) throw train::OptionError("the folder's name would be too long: --out names one");
  return "runs/" + name;
}

class Runs {
 public:
  Runs(const Options& options, std::string out) : options_(options), out_(std::move(out)) {}

  json operator()(const train::CompareRun& run) const {
    const std::string folder = out_ + "/" + run.name, report_path = folder + "/report.json";
    if (std::filesystem::exists(report_path)) {
      json report = formats::read_json_object(report_path);
      if (report.value("config", json()) != run.config) {
        throw formats::FormatError(report_path, "comes from another configuration: remove the folder or name another with --out");
      }
      RequireSameThreads(report, report_path);
      Note(run.name + (report.value("diverged", false) ? ": it diverged" : ": finished already"));
      return report;
    }
    std::filesystem::create_directories(folder);
    const std::string config_path = folder + "/compare-config.json", output = folder + "/compare-output.json";
    const bool began = std::filesystem::exists(config_path) && std::filesystem::exists(formats::checkpoint_path(folder));
    if (began && formats::read_json_object(config_path) != run.config) {
      throw formats::FormatError(config_path, "is of another configuration: remove the folder or name another with --out");
    }
    formats::write_file(config_path, train::dump(run.config));
    const auto keep = [&](json report) {
      report["config"] = run.config;
      formats::write_file(report_path, train::dump(report));
      std::filesystem::remove(output);
      return report;
    };
    std::vector<std::string> arguments = {"latte", "train", "--config", config_path, "--out", folder, "--json"};
    if (options_.threads > 0) arguments.insert(arguments.end(), {"--threads", std::to_string(options_.threads)});
    if (options_.quiet) arguments.emplace_back("--quiet");
    if (const std::string path = formats::checkpoint_path(folder); std::filesystem::exists(path)) {
      const formats::CheckpointFile checkpoint(path);
      const auto steps = run.config.at("training").value("steps", train::TrainerOptions().steps);
      json report = began ? FinishedReport(output) : json();
      if (!report.is_null() && report.at("step") == steps && checkpoint.step() == steps) {
        RequireSameThreads(report, output);
        Note(run.name + ": finished already");
        return keep(std::move(report));
      }
      RequireSameThreads(json::parse(checkpoint.config()).value("progress", json::object()), path);
      arguments.emplace_back("--resume");  // which only tells what a finished run ended with
    }
    if (train::InterruptGuard::interrupted()) return nullptr;
    Note(run.name);
    const int exit_code = RunChild(arguments, output);
    const bool by_signal = exit_code == 128 + SIGTERM || exit_code == 128 + SIGINT;  // it hadn't begun to train
    if (exit_code == train::InterruptGuard::kExitCode || (by_signal && train::InterruptGuard::interrupted())) return nullptr;
    if (exit_code == train::DivergedError::kExitCode) return keep({{"diverged", true}});
    if (exit_code != 0) {
      throw std::runtime_error(run.name + " ended with exit code " + std::to_string(exit_code) + ": latte train --config " +
                               config_path + " shows why");
    }
    return keep(formats::read_json_object(output));
  }

 private:
  // Times of other numbers of threads don't belong into one table.
  void RequireSameThreads(const json& report, const std::string& path) const {
    const json found = report.value("threads", json());
    const int64_t asked = options_.threads > 0 ? options_.threads : at::get_num_threads();
    if (!found.is_number_integer() || found == asked) return;  // a run that diverged tells none
    throw formats::FormatError(path, "is of a run with --threads " + found.dump() + ", not " + std::to_string(asked) +
                                         ": ask for as many, or name another folder with --out");
  }

  void Note(const std::string& text) const {
    if (!options_.quiet) std::fprintf(stderr, "%s\n", text.c_str());
  }

  const Options& options_;
  std::string out_;
};

// torchrun's environment is of one run, and there are many here, which would wait for each other's ranks.
void LeaveRanks() {
  const char* ranks = std::getenv("WORLD_SIZE");
  if (ranks != nullptr && *ranks != '\0' && std::string_view(ranks) != "1") {
    throw CLI::ValidationError("compare",
                               "WORLD_SIZE is " + formats::quote(ranks) +
                                   ", expected none: a comparison's runs are processes of their own, without torchrun");
  }
  for (const char* name : {"WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"}) ::unsetenv(name);
}

// A configuration's entry that is refused, in the list of them; empty where the command line named it or the message is of
// something else.
std::string EntrysLine(const Options& options, const train::CompareOptions& compare, const std::string& message) {
  if (!options.attentions.empty()) return {};
  for (const train::CompareEntry& entry : compare.entries) {
    if (!message.starts_with(entry.title + ": ")) continue;
    try {
      const formats::MappedFile file(options.config_file);
      const std::string_view text = file.text();
      const size_t list = std::min(text.find("\"attentions\""), text.size());
      const size_t at = text.find(json(entry.title).dump(), list);
      if (at == std::string_view::npos) return {};
      return "line " + std::to_string(LineOf(text, at)) + ": ";
    } catch (const formats::FileError&) {  // gone meanwhile: the message is enough
    }
  }
  return {};
}

int Compare(const Options& options) {
  LeaveRanks();
  json config = ReadTrainConfig(options.config_file, options.paper);
  train::CompareOptions compare;
  std::string out = options.out;
  json result;
  try {
    compare = train::CompareOptions::from_json(config.value("compare", json::object()));
    if (!options.attentions.empty()) {
      compare.entries.clear();
      for (const std::string& text : options.attentions) compare.entries.push_back(train::CompareOptions::parse_entry(text));
    }
    if (!options.positions.empty()) compare.positions = options.positions;
    if (!options.data.empty()) {
      const bool task = config.contains("task");
      config[task ? "task" : "training"][task ? "data" : "text"] = options.data;
    }
    if (!options.settings.empty()) {
      if (!config.contains("task"))
        throw train::OptionError("--set is for a task's fields, and this configuration trains on a text");
      SetTaskFields(options.settings, config["task"]);
    }
    if (!options.learning_rates.empty()) compare.learning_rates = options.learning_rates;
    if (options.seeds > 0) compare.seeds = options.seeds;
    if (options.steps > 0) {
      config["training"]["steps"] = options.steps;
      compare.seconds = 0.0;
    }
    if (options.seconds > 0) compare.seconds = options.seconds;
    if (out.empty()) out = DefaultFolder(options);
    const train::InterruptGuard interrupt;
    result = train::compare(config, compare, Runs(options, out));
  } catch (const std::invalid_argument& error) {  // OptionError, ConfigError
    std::string located = LocatedMessage(options.config_file, error.what());
    if (located == error.what()) located = EntrysLine(options, compare, error.what()) + located;
    throw CLI::ValidationError("compare", located == error.what() ? located : options.config_file + ": " + located);
  }
  if (result.is_null()) {
    std::fprintf(stderr, "interrupted and saved: the same command goes on\n");
    return train::InterruptGuard::kExitCode;
  }
  const std::string table = train::comparison_table(result);
  result["config"] = config;
  formats::write_file(out + "/compare.json", train::dump(result));
  formats::write_file(out + "/compare.md", table);
  std::vector<train::Curve> curves;
  for (const json& entry : result.at("entries")) {
    if (entry.at("runs").empty()) continue;  // it diverged at every rate
    const std::string metrics = out + "/" + entry.at("runs").front().get<std::string>() + "/metrics.jsonl";
    if (std::filesystem::exists(metrics)) curves.push_back({entry.at("title").get<std::string>(), train::read_metrics(metrics)});
  }
  if (const std::string problem = train::plot_losses(curves, out + "/loss"); !problem.empty() && !options.quiet) {
    std::fprintf(stderr, "latte: %s\n", problem.c_str());
  }
  std::fputs(options.json_output ? train::dump(result).c_str() : table.c_str(), stdout);
  return 0;
}

}  // namespace

void AddCompare(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("compare", "Train several attentions alike and compare them");
  command->add_option("config", options->config_file, "A configuration of latte train, with the field compare or --attention")
      ->required()
      ->type_name("CONFIG");
  command
      ->add_option("--attention", options->attentions,
                   "Attentions, with fields of the model after colons: softmax,latte,latte:num_latents=8:shared_latents=true")
      ->delimiter(',')
      ->type_name("NAME,…");
  command
      ->add_option("--position", options->positions,
                   "A second axis: each attention with each of these positions that it takes: none,vapor,conv,rg_lru")
      ->delimiter(',')
      ->type_name("NAME,…");
  command->add_option("--data", options->data, "What the task reads, or the text, in place of the configuration's")
      ->type_name("PATH");
  command->add_option("--set", options->settings, "A field of the task in place of the configuration's: --set pairs=16")
      ->type_name("FIELD=VALUE")
      ->allow_extra_args(false)  // what follows may be the configuration
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--seeds", options->seeds, "Runs of each attention at its best learning rate; by default 3")
      ->check(CLI::Range(int64_t{1}, int64_t{1000}));
  command
      ->add_option("--lr", options->learning_rates,
                   "Learning rates that each attention tries; by default half, once and twice the configuration's")
      ->delimiter(',')
      ->type_name("LR,…");
  CLI::Option* steps = command->add_option("--steps", options->steps, "Steps of a run, in place of the configuration's")
                           ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command
      ->add_option(
          "--seconds", options->seconds,
          "Equal time in place of equal steps: seconds of training, for which each attention gets as many steps as a few "
          "on trial say; on one thread the processor's seconds, whatever else the machine does")
      ->check(CLI::PositiveNumber)
      ->excludes(steps);
  command
      ->add_option("--out", options->out,
                   "The folder of all runs, compare.json, compare.md and loss.svg; by default runs/compare-CONFIG, with --data, "
                   "--set, --steps, --seconds and --paper in its name")
      ->type_name("FOLDER");
  command->add_option("--threads", options->threads, "Threads of a run; by default torch's choice")->check(CLI::Range(1, 4096));
  command->add_flag("--paper", options->paper,
                    "The published settings that the configuration records, in place of the small ones");
  command->add_flag("--json", options->json_output, "Print the result as JSON");
  command->add_flag("--quiet", options->quiet, "No progress");
  command->footer(
      "Every attention gets the same data, steps (or time), learning rates to try and, by its MLP's size, number of parameters. "
      "Ctrl-C saves;\n"
      "the same command goes on, and what is finished isn't run again.\n\n"
      "Examples:\n"
      "  latte compare configs/listops.json --attention softmax,latte --seeds 3\n"
      "  latte compare configs/characters.json --attention softmax,latte,macchiato --position none,vapor,conv,rg_lru\n"
      "  latte compare configs/text.json --attention softmax,latte --seconds 600 --seeds 2 --threads 1\n"
      "  latte compare configs/associative_recall.json --set pairs=16 --attention "
      "latte:num_latents=8,latte:num_latents=32,macchiato:window=16");
  command->callback([options, &exit_code] { exit_code = Compare(*options); });
}

}  // namespace latte::cli
