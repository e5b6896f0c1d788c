// latte train: a language model from a plain text, or an encoder on a task (torch_train_task.cc).
#include <ATen/Parallel.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/fail.h"
#include "cli/torch_commands.h"
#include "cli/torch_train.h"
#include "data/task_options.h"
#include "formats/error.h"
#include "formats/language_model_config.h"
#include "train/interrupt.h"
#include "train/ranks.h"
#include "train/run.h"

namespace latte::cli {
namespace {

using nlohmann::json;
using train::OptionError;
using train::TrainerOptions;

// The default model, where it differs from LanguageModelConfig's: small enough for a few minutes on two cores.
const json kDefaultModel = {{"attention", "macchiato"}, {"num_layers", 4}, {"embed_dim", 128}, {"num_heads", 4}};

struct Options {
  json model = json::object();     // fields of LanguageModelConfig that the command line names
  json training = json::object();  // and of TrainerOptions
  json task = json::object();      // and of TaskOptions
  std::string config_file;
  bool paper = false;
  std::string out;
  int threads = 0;
  bool resume = false;
  bool overwrite = false;
  int64_t sequence_parallel = 1;
  int64_t timeout = 600;
  bool json_output = false;
  bool quiet = false;
};

// An option that only leaves its value in `object`, so that what wasn't named can come from a file or a checkpoint.
template <typename T>
CLI::Option* Add(CLI::App& command, json& object, const std::string& flag, const std::string& field, const std::string& help,
                 const json& shown_default) {
  CLI::Option* option = command.add_option_function<T>(
      flag, [&object, field](const T& value) { object[field] = value; }, help);
  if (!shown_default.is_null()) {
    option->default_str(shown_default.is_string() ? shown_default.get<std::string>() : shown_default.dump());
  }
  return option;
}

void AddModelOptions(CLI::App& command, json& model) {
  const json shown = [] {
    formats::LanguageModelConfig config;
    config.vocab_size = 1;
    json object = config.to_json();
    object.merge_patch(kDefaultModel);
    return object;
  }();
  const auto number = [&](const char* flag, const char* field, const char* help, bool with_default = true) {
    return Add<int64_t>(command, model, flag, field, help, with_default ? shown.at(field) : json())->group("Model");
  };
  const auto name = [&](const char* flag, const char* field, const char* help, std::vector<std::string> choices,
                        bool with_default = true) {
    return Add<std::string>(command, model, flag, field, help, with_default ? shown.at(field) : json())
        ->check(CLI::IsMember(std::move(choices)))
        ->group("Model");
  };
  name("--attention", "attention", "What reads the past; with --task by default latte",
       {"macchiato", "latte", "window", "softmax", "linear", "gated_linear", "linformer"});
  name("--position", "position", "How it knows where a token stands; by default what suits the attention",
       {"none", "learned", "sinusoidal", "rotary", "vapor", "conv", "rg_lru"}, false);
  number("--layers", "num_layers", "Blocks");
  number("--embed-dim", "embed_dim", "Size of the residual stream");
  number("--heads", "num_heads", "Query heads; a divisor of --embed-dim");
  number("--kv-heads", "num_kv_heads", "Key-value heads; a divisor of --heads, by default as many", false);
  number("--latents", "num_latents", "Latents a head (latte, macchiato); by default the head's size", false);
  command
      .add_flag_function(
          "--shared-latents,!--unshared-latents", [&model](int64_t count) { model["shared_latents"] = count > 0; },
          "The heads of a layer read the same latents (latte, macchiato); by default each its own")
      ->group("Model");
  number("--projected", "projected", "Keys and values that are left of a sequence (linformer)");
  number("--window", "window", "Tokens of standard attention (window, macchiato)");
  number("--sinks", "sinks", "First tokens that stay readable (window, macchiato)");
  name("--mlp", "mlp", "The MLP: GELU, or gated by SiLU", {"gelu", "gated"});
  name("--norm", "norm", "Layer norm, RMS norm or, for bidirectional tasks, batch norm", {"layer", "rms", "batch"});
  Add<double>(command, model, "--dropout", "dropout", "Dropout's probability", shown.at("dropout"))->group("Model");
  command
      .add_flag_function(
          "--forget,!--no-forget", [&model](int64_t count) { model["forget"] = count > 0; },
          "Latents forget by a learned decay (latte, macchiato), or with --no-forget keep all; by default they forget, "
          "where they read the past alone")
      ->group("Model");
  number("--decay-rank", "decay_rank", "Rank of the map to the latents' decays (latte, macchiato); 0: a whole matrix");
}

void AddTaskOptions(CLI::App& command, json& model, json& task) {
  std::string names;
  for (const std::string_view name : task_names()) names += (names.empty() ? "" : ", ") + std::string(name);
  Add<std::string>(command, task, "--task", "name", "In place of a text, a task: " + names + "; docs/tasks.md describes them",
                   json())
      ->type_name("NAME")
      ->group("Task");
  Add<std::string>(command, task, "--data", "data",
                   "What the task reads; of a generated task, a file to keep its examples in, made where it isn't there", json())
      ->type_name("PATH")
      ->group("Task");
  command
      .add_option_function<std::vector<std::string>>(
          "--set", [&task](const std::vector<std::string>& settings) { SetTaskFields(settings, task); },
          "A field of the task: --set max_length=200")
      ->type_name("FIELD=VALUE")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group("Task");
  Add<std::string>(command, model, "--pooling", "pooling", "What a classifier reads: the mean, the first or the last token",
                   "mean")
      ->check(CLI::IsMember({"mean", "first", "last"}))
      ->group("Task");
  Add<std::string>(command, model, "--pooled-norm", "pooled_norm",
                   "Of what a classifier has pooled: none, or batch norm, which the mean over a long sequence needs; by default "
                   "none, but batch norm of the mean in text, retrieval, image and pathfinder where no --config is given",
                   json())
      ->check(CLI::IsMember({"none", "batch"}))
      ->group("Task");
  command
      .add_flag_function(
          "--causal,!--bidirectional", [&model](int64_t count) { model["causal"] = count > 0; },
          "The encoder reads the past alone, or with --bidirectional, its default, both sides")
      ->group("Task");
}

void AddTrainingOptions(CLI::App& command, json& training) {
  const json shown = TrainerOptions().to_json();
  const auto number = [&](const char* flag, const char* field, const char* help) {
    Add<int64_t>(command, training, flag, field, help, shown.at(field))->group("Training");
  };
  const auto real = [&](const char* flag, const char* field, const char* help) {
    Add<double>(command, training, flag, field, help, shown.at(field))->group("Training");
  };
  Add<std::string>(command, training, "--text", "text", "The text, any plain file", json())->type_name("FILE")->group("Data");
  Add<std::string>(command, training, "--tokens", "tokens",
                   "A token is a character (of UTF-8), a byte, or what a file of latte tokenize holds", shown.at("tokens"))
      ->check(CLI::IsMember({"chars", "bytes", "corpus"}))
      ->group("Data");
  Add<double>(command, training, "--validation-fraction", "validation_fraction", "Of the text, its end, to validate on",
              shown.at("validation_fraction"))
      ->group("Data");
  Add<double>(command, training, "--test-fraction", "test_fraction", "Of the text, what comes behind that, to test on at the end",
              shown.at("test_fraction"))
      ->group("Data");
  number("--context", "context", "Tokens a sequence");
  number("--batch", "batch", "Sequences at once");
  number("--accumulate", "accumulate", "Batches a step: more memory for none");
  number("--steps", "steps", "Updates of the weights");
  real("--lr", "lr", "Learning rate after the warm-up");
  Add<double>(command, training, "--min-lr", "min_lr", "Learning rate at the end of the cosine; by default --lr / 10", json())
      ->group("Training");
  number("--warmup", "warmup", "Steps of linear warm-up");
  real("--weight-decay", "weight_decay", "AdamW's decay, of matrices");
  real("--beta1", "beta1", "AdamW's decay of the mean");
  real("--beta2", "beta2", "AdamW's decay of the variance");
  real("--clip", "clip", "Greatest gradient norm; 0: any");
  number("--eval-every", "eval_every", "Steps between validations; 0: at the end");
  number("--eval-batches", "eval_batches", "Batches a validation");
  number("--save-every", "save_every", "Steps between checkpoints; 0: at the end");
  number("--seed", "seed", "Of initialisation, data and dropout");
  Add<std::string>(
      command, training, "--dtype", "dtype",
      "Of matrix products. auto is bfloat16 where the processor multiplies it (AVX512-BF16, AMX, Arm's bf16) and float32 "
      "elsewhere, where bfloat16 would be many times slower",
      shown.at("dtype"))
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}))
      ->group("Training");
}

TrainerOptions TrainingOptions(json fields) {
  FillMinLr(fields);
  TrainerOptions options = TrainerOptions::from_json(fields);
  if (options.text.empty()) throw OptionError("--text is missing");
  return options;
}

void CheckSameModel(const formats::LanguageModelConfig& asked, const formats::LanguageModelConfig& found) {
  const json ours = asked.to_json(), theirs = found.to_json();
  for (const auto& [field, value] : ours.items()) {
    if (!theirs.contains(field) || theirs.at(field) != value) {
      throw OptionError(field + " is " + value.dump() + ", but the checkpoint's model has " +
                        (theirs.contains(field) ? theirs.at(field).dump() : "none"));
    }
  }
}

train::RunResult Resume(const json& model, const json& training, const train::RunOptions& run) {
  const auto record = train::read_record(run);
  json all = record.options.to_json();
  MergeTraining(all, training);
  json wanted = record.model.to_json();
  MergeFields(wanted, model);
  wanted["vocab_size"] = record.model.vocab_size;
  CheckSameModel(formats::LanguageModelConfig::from_json(wanted), record.model);
  return train::resume_run(TrainingOptions(all), run);
}

train::RunResult Start(const json& model, const json& training, train::RunOptions run) {
  const TrainerOptions options = TrainingOptions(training);
  json fields = kDefaultModel;
  MergeFields(fields, model);
  fields["vocab_size"] = 1;  // the run takes the text's
  if (fields.value("position", json()) == "learned" && !fields.contains("max_positions"))
    fields["max_positions"] = options.context;
  const auto config = formats::LanguageModelConfig::from_json(fields);
  if (run.out.empty()) run.out = "runs/" + std::filesystem::path(options.text).stem().string() + "-" + config.attention;
  if (Restarted(run)) {
    if (train::read_record(run).options == options) return Resume(model, training, run);
    if (!run.overwrite) throw OptionError(OtherRun(run));
  }
  return train::start_run(config, options, run);
}

json ReportOf(const train::RunResult& result) {
  const auto optional = [](const std::optional<double>& value) { return value ? json(*value) : json(nullptr); };
  const bool tested = result.splits.is_object() && result.splits.contains("test");
  struct rusage usage = {};
  ::getrusage(RUSAGE_SELF, &usage);
  return {{"out", std::filesystem::path(result.checkpoint).parent_path().string()},
          {"checkpoint", result.checkpoint},
          {"step", result.step},
          {"interrupted", result.interrupted},
          {"parameters", result.parameters},
          {"loss", result.loss},
          {"val_loss", optional(result.progress.val_loss)},
          {"best_val_loss", optional(result.progress.best_val_loss)},
          {"test_loss", tested ? result.splits.at("test").at("loss") : json()},
          {"splits", result.splits},
          {"val_accuracy", optional(result.progress.val_accuracy)},
          {"tokens", result.progress.tokens},
          {"seconds", result.progress.seconds},
          {"step_seconds", result.step_seconds},
          {"peak_memory", result.told ? json() : json(int64_t{usage.ru_maxrss} * 1024)},
          {"threads", result.progress.threads},
          {"dtype", result.progress.dtype}};
}

// A task's or a text's, a line each on standard error.
void ShowSplits(const json& splits) {
  for (const auto& [name, split] : splits.items()) {
    const double loss = split.at("loss");
    if (split.contains("accuracy")) {
      std::fprintf(stderr, "%s: %.2f%% right of %lld examples (the most frequent answer: %.2f%%), loss %.4f\n", name.c_str(),
                   100 * split.at("accuracy").get<double>(), static_cast<long long>(split.at("examples").get<int64_t>()),
                   100 * split.at("majority").get<double>(), loss);
    } else {
      std::fprintf(stderr, "%s: loss %.4f on %lld tokens, perplexity %.4f", name.c_str(), loss,
                   static_cast<long long>(split.at("tokens").get<int64_t>()), std::exp(loss));
      if (split.contains("bits_per_byte")) {
        std::fprintf(stderr, ", %.4f bits a byte", split.at("bits_per_byte").get<double>());
      }
      std::fputc('\n', stderr);
    }
  }
}

int Train(const Options& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  TrainRequest request;
  if (!options.config_file.empty()) {
    const json file = ReadTrainConfig(options.config_file, options.paper);
    request.model = file.value("model", json::object());
    request.training = file.value("training", json::object());
    request.task = file.value("task", json::object());
  }
  // The fields of one task mean nothing to another.
  if (options.task.contains("name") && options.task["name"] != request.task.value("name", json())) request.task = json::object();
  MergeFields(request.model, options.model);
  MergeFields(request.training, options.training);
  MergeFields(request.task, options.task);
  request.resume = options.resume;
  request.configured = !options.config_file.empty();
  std::unique_ptr<train::Ranks> ranks;
  train::RunResult result;
  try {
    if (options.resume && options.out.empty()) throw OptionError("--resume needs --out, the folder of the run");
    ranks = train::Ranks::from_environment(
        {.sequence_parallel = options.sequence_parallel, .timeout = std::chrono::seconds(options.timeout)});
    request.run.out = options.out;
    request.run.overwrite = options.overwrite;
    request.run.quiet = options.quiet;
    request.run.ranks = ranks.get();
    try {
      if (options.resume ? IsTaskRun(request.run) : !request.task.empty()) {
        result = TrainTask(request);
      } else {
        if (!request.task.empty()) throw OptionError("the run in --out isn't a task's");
        result = options.resume ? Resume(request.model, request.training, request.run)
                                : Start(request.model, request.training, request.run);
      }
    } catch (...) {
      if (ranks) ranks->explain_failure();
      throw;
    }
  } catch (const std::invalid_argument& error) {  // OptionError, ConfigError
    const std::string located = LocatedMessage(options.config_file, error.what());
    throw CLI::ValidationError("train", located == error.what() ? located : options.config_file + ": " + located);
  } catch (const train::DivergedError& error) {
    return Fail(error.what(), train::DivergedError::kExitCode);
  }
  if (ranks && !ranks->leads()) return result.interrupted ? train::InterruptGuard::kExitCode : 0;
  if (options.json_output) {
    std::printf("%s\n", ReportOf(result).dump(2, ' ', false, json::error_handler_t::replace).c_str());
  } else if (!options.quiet) {
    std::fprintf(stderr, "%s at step %lld in %s\n", result.interrupted ? "interrupted and saved" : "saved",
                 static_cast<long long>(result.step), result.checkpoint.c_str());
    ShowSplits(result.splits);
  }
  return result.interrupted ? train::InterruptGuard::kExitCode : 0;
}

}  // namespace

void SetTaskFields(const std::vector<std::string>& settings, json& task) {
  for (const std::string& setting : settings) {
    const size_t equals = setting.find('=');
    json value = json::parse(setting.substr(std::min(equals, setting.size() - 1) + 1), nullptr, /*allow_exceptions=*/false);
    if (equals == 0 || equals == std::string::npos || value.is_discarded()) {
      throw CLI::ValidationError("--set", "expected FIELD=VALUE with a number or a list [1,2], got " + formats::quote(setting));
    }
    task[setting.substr(0, equals)] = std::move(value);
  }
}

void AddTrain(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("train", "Train a language model on a text, or an encoder on a task");
  command->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  AddTrainingOptions(*command, options->training);
  AddModelOptions(*command, options->model);
  AddTaskOptions(*command, options->model, options->task);
  command
      ->add_option("--out", options->out,
                   "The run's folder: checkpoint, metrics.jsonl, config.json, loss.svg, loss.png and, where there is a test, "
                   "results.json; by default runs/TEXT-ATTENTION or runs/TASK-ATTENTION")
      ->type_name("FOLDER")
      ->group("Run");
  command
      ->add_flag("--resume", options->resume,
                 "Go on with the run in --out; what isn't named is as it was, but for --min-lr, which keeps its share of --lr")
      ->group("Run");
  command->add_flag("--overwrite", options->overwrite, "Start again in a folder that holds a run")->group("Run");
  command->add_option("--config", options->config_file, "A JSON file as a run's config.json; the command line comes first")
      ->type_name("FILE")
      ->group("Run");
  command
      ->add_flag("--paper", options->paper, "With --config: the published settings that it records, in place of the small ones")
      ->needs("--config")
      ->group("Run");
  command->add_option("--threads", options->threads, "Threads; by default torch's choice")
      ->check(CLI::Range(1, 4096))
      ->group("Run");
  command
      ->add_option("--sequence-parallel", options->sequence_parallel,
                   "Under torchrun: ranks that share a sequence, each a stretch of --context / N; the others share --batch")
      ->check(CLI::Range(1, 1 << 20))
      ->group("Ranks");
  command->add_option("--timeout", options->timeout, "Under torchrun: seconds to wait for a rank that hangs")
      ->check(CLI::Range(1, 1 << 20))
      ->group("Ranks");
  command->add_flag("--json", options->json_output, "Print the result as JSON")->group("Run");
  command->add_flag("--quiet", options->quiet, "No progress")->group("Run");
  command->get_option("--resume")->excludes("--overwrite");
  command->footer(
      "Ctrl-C saves and ends with exit code 130; --resume then goes on, with the same number of threads bit for bit.\n"
      "A loss that isn't finite ends with 3.\n\n"
      "Examples:\n"
      "  latte train --text data/tinyshakespeare.txt --out runs/demo\n"
      "  latte train --out runs/demo --resume --steps 2000\n"
      "  latte train --text book.txt --attention latte --latents 64 --context 1024 --batch 4 --dropout 0.1\n"
      "  latte train --text data.bin --tokens bytes --attention softmax --config runs/demo/config.json\n"
      "  latte train --config configs/listops.json --attention softmax --out runs/listops\n"
      "  torchrun --no-python --nproc-per-node 2 latte train --text book.txt --context 65536 --batch 1 --sequence-parallel 2");
  command->callback([options, &exit_code] { exit_code = Train(*options); });
}

}  // namespace latte::cli
