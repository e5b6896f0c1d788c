// latte extend: a pretrained model becomes linear-time.
#include <ATen/Parallel.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/torch_commands.h"
#include "extend/run.h"
#include "formats/adapter.h"
#include "formats/error.h"
#include "formats/json_file.h"
#include "train/interrupt.h"
#include "train/progress.h"

namespace latte::cli {
namespace {

using extend::ExtendOptions;
using extend::OptionError;
using nlohmann::json;

struct Options {
  json fields = json::object();  // of ExtendOptions that the command line names
  std::string config_file;
  extend::RunOptions run;
  int threads = 0;
  bool resume = false;
  bool json_output = false;
};

class FieldOptions {
 public:
  FieldOptions(CLI::App& command, json& fields) : command_(command), fields_(fields) {}

  template <typename T>
  CLI::Option* add(const char* flag, const char* field, const char* help, const char* group) {
    json& fields = fields_;
    CLI::Option* option = command_.add_option_function<T>(
        flag, [&fields, field](const T& value) { fields[field] = value; }, help);
    const json& shown = defaults_.at(field);
    if (!shown.is_array()) option->default_str(shown.is_string() ? shown.get<std::string>() : shown.dump());
    return option->group(group);
  }
  CLI::Option* choice(const char* flag, const char* field, const char* help, const char* group,
                      std::vector<std::string> choices) {
    return add<std::string>(flag, field, help, group)->check(CLI::IsMember(std::move(choices)));
  }

 private:
  CLI::App& command_;
  json& fields_;
  json defaults_ = ExtendOptions().to_json();
};

void AddFields(CLI::App& command, json& fields) {
  FieldOptions options(command, fields);
  constexpr const char* kAttention = "Attention";
  options.choice("--attention", "attention",
                 "What takes softmax attention's place: a window, sinks and latents; window and sinks alone; or nothing",
                 kAttention, {"macchiato", "window-sinks", "full"});
  options.add<int64_t>("--window", "window", "Tokens of standard attention", kAttention);
  options.add<int64_t>("--sinks", "sinks", "First tokens of the text that stay readable", kAttention);
  options.add<int64_t>("--latents", "latents", "Latents a key-value head", kAttention);
  options.add<std::string>("--layer-latents", "layer_latents", "Blocks with another number of latents, as 15-24:256,3:16",
                           kAttention);
  options.add<int64_t>("--far-limit", "far_limit", "Tokens beyond the window that gates tell apart", kAttention);
  command
      .add_flag_function(
          "--floor,!--no-floor", [&fields](int64_t count) { fields["floor"] = count > 0; },
          "A latent must rise above a trained weight, or leaves its share to the window; such latents keep all they read. With "
          "--from in the layers of --match-layers")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
      ->group(kAttention);
  options.choice(
      "--position", "position",
      "In front of the latents' key logits: nothing, or a convolution over the last four keys, so that a latent can look "
      "for several tokens in a row. With --from in the layers of --match-layers",
      kAttention, {"none", "conv"});
  command
      .add_flag_function(
          "--forget,!--no-forget", [&fields](int64_t count) { fields["forget"] = count > 0; },
          "Latents forget, each at a rate of its own (the default), or keep all they read. With --from those of "
          "--match-layers, the others as there")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
      ->group(kAttention);
  command
      .add_flag_function(
          "--latents-read-evicted,!--latents-read-all", [&fields](int64_t count) { fields["evicted"] = count > 0; },
          "Latents read what left the window alone (the default), or sinks and window too")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
      ->group(kAttention);

  constexpr const char* kMatching = "First stage: each layer's attention is matched to the original's";
  options.add<int64_t>("--match-sequences", "match_sequences", "Sequences it reads; 0 leaves the latents closed", kMatching);
  options.add<int64_t>("--match-steps", "match_steps", "Steps a layer", kMatching);
  options.add<std::string>(
      "--match-layers", "match_layers",
      "Blocks to match, as 17-18,23; by default all, and with --from none. Latents of these blocks of --from "
      "are made anew, and matched to softmax attention with its weights; 18:2 is a key-value head of one",
      kMatching);

  options.add<double>("--match-share", "match_share",
                      "How far a token's weight follows the share that the head reads far: 0 all count alike, near 1 those that "
                      "find something there, and gates open for them",
                      kMatching);
  options.add<double>("--match-open", "match_open",
                      "Then lower each head's gate until, of the tokens that read mostly far, this share reads as much of "
                      "latents as the gate leaves to the window; 0: no",
                      kMatching);

  constexpr const char* kTraining = "Second stage: the model as a whole";
  options.choice("--train", "train",
                 "The latents alone, or as well: the attention's weights; low-rank changes of those; all weights of the blocks",
                 kTraining, {"latents", "attention", "lora", "all"});
  options.add<int64_t>("--lora-rank", "lora_rank", "Rank of these changes", kTraining);
  options.choice("--loss", "loss", "KL to the original model, or the next token of the text", kTraining, {"kl", "text"});
  options.add<double>("--text-share", "text_share", "Share of the next token of the text in a loss kl", kTraining);
  options.add<int64_t>("--tokens", "tokens", "Tokens to train on", kTraining);
  options.add<int64_t>("--context", "context", "Tokens a sequence", kTraining);
  options.add<int64_t>("--first-context", "first_context",
                       "Sequences grow from here to --context, doubling; a step keeps its tokens. 0: no", kTraining);
  options.add<int64_t>("--batch", "batch", "Sequences a step", kTraining);
  options.add<int64_t>("--least-window", "least_window",
                       "Steps draw their window from here up to --window, in powers of two, so that latents must carry; 0: no",
                       kTraining);
  options.add<double>("--lr", "lr", "Learning rate of pretrained weights; of low-rank changes 0.001 unless named", kTraining);
  options.add<double>("--latent-lr", "latent_lr", "Of the latents' matrices", kTraining);
  options.add<double>("--vector-lr", "vector_lr", "Of their biases, decays and floors", kTraining);
  options.add<double>("--gate-lr", "gate_lr", "Of the gates' biases; 0: as of other biases", kTraining);
  options.add<double>("--final-lr", "final_lr", "Share of each that is left at the end of the cosine", kTraining);
  options.add<int64_t>("--warmup", "warmup", "Steps of linear warm-up", kTraining);
  options.add<double>("--clip", "clip", "Greatest gradient norm; 0: any", kTraining);
  options.add<int64_t>("--seed", "seed", "Of initialisation, texts and windows", kTraining);
  options.choice("--dtype", "dtype", "Of matrix products; auto is bfloat16 where the processor multiplies it", kTraining,
                 {"auto", "float32", "bfloat16"});

  constexpr const char* kRun = "Run";
  options.choice("--storage", "storage", "Of the adapter's matrices", kRun, {"q8_0", "bf16", "f32"});
  options.add<std::string>("--teacher-cache", "teacher_cache",
                           "A folder that keeps what the original says of each stretch, for other runs on the same stretches",
                           kRun);
  options.add<int64_t>("--eval-every", "eval_every", "Steps between validations on held-out text; 0: at the end", kRun);
  options.add<int64_t>("--eval-sequences", "eval_sequences", "Sequences a validation", kRun);
  options.add<double>("--held-out-fraction", "held_out_fraction", "Of each text, its end, to validate on", kRun);
  options.add<int64_t>("--save-every", "save_every", "Steps between checkpoints, and three minutes at most; 0: at the end", kRun);
}

json LossJson(const std::optional<extend::Validation>& loss) {
  if (!loss) return nullptr;
  return {{"kl", loss->kl}, {"next_token_loss", loss->next_token}, {"perplexity", std::exp(loss->next_token)}};
}

json ReportJson(const extend::Report& report) {
  json layers = json::array();
  for (const auto& layer : report.layers) {
    layers.push_back({{"layer", layer.layer},
                      {"far_share", layer.far_share},
                      {"heads", layer.heads},
                      {"far_shares", layer.far_shares},
                      {"window_error", layer.window_error},
                      {"error", layer.error}});
  }
  return {{"out", report.out},
          {"interrupted", report.interrupted},
          {"step", report.step},
          {"steps", report.steps},
          {"tokens", report.tokens},
          {"seconds", report.seconds},
          {"match_seconds", report.match_seconds},
          {"tokens_per_second", report.tokens_per_second},
          {"parameters", report.parameters},
          {"adapter_bytes", report.adapter_bytes},
          {"held_out",
           {{"window_sinks", LossJson(report.window_sinks)},
            {"matched", LossJson(report.matched)},
            {"trained", LossJson(report.trained)},
            {"latents_off", LossJson(report.latents_off)}}},
          {"layers", layers}};
}

void PrintReport(const extend::Report& report) {
  if (report.matching) {
    std::fprintf(stderr, "interrupted in matching and saved, the first %lld layers done: --resume goes on\n",
                 static_cast<long long>(report.matched_layers));
    return;
  }
  const auto line = [](const char* what, const std::optional<extend::Validation>& loss) {
    if (loss) std::fprintf(stderr, "  %-34s %8.4f %12.2f\n", what, loss->kl, std::exp(loss->next_token));
  };
  std::fprintf(stderr, "%s at step %lld of %lld: %lld tokens in %s (matching %s, then %.0f tokens/s), %.1f MB in %s\n",
               report.interrupted ? "interrupted and saved" : "done", static_cast<long long>(report.step),
               static_cast<long long>(report.steps), static_cast<long long>(report.tokens),
               train::format_seconds(report.seconds).c_str(), train::format_seconds(report.match_seconds).c_str(),
               report.tokens_per_second, static_cast<double>(report.adapter_bytes) / 1e6, report.out.c_str());
  if (!report.window_sinks) return;
  std::fprintf(stderr, "  held-out text                            KL   perplexity\n");
  line(report.full ? "untrained" : "window and sinks, untrained", report.window_sinks);
  line("after matching", report.matched);
  line("trained", report.trained);
  line("trained, latents switched off", report.latents_off);
}

// A window that isn't named is the one of the adapter to start from.
void TakeWindowOfStart(json& fields) {
  if (fields.contains("window") || !fields.contains("from") || !fields["from"].is_string()) return;
  const std::string from = fields["from"];
  if (!from.empty()) fields["window"] = formats::AdapterFile(from).spec().window;
}

// Low-rank changes begin at nothing, and want a larger rate than weights that are good already (docs/extending.md, what trains).
void TakeRateOfChanges(json& fields) {
  constexpr double kRate = 1e-3;
  if (!fields.contains("lr") && fields.contains("train") && fields["train"] == "lora") fields["lr"] = kRate;
}

// The fields of a configuration. An adapter's recipe, which tells how far its run came, has all of them.
json fields_in(const std::string& path) {
  const json object = formats::read_json_object(path);
  return object.contains("steps_done") ? ExtendOptions::from_recipe(object).to_json() : object;
}

int Extend(Options& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  extend::Report report;
  try {
    json fields = json::object();
    if (options.resume) fields = extend::options_of_run(options.run.out).to_json();
    options.run.config = options.config_file;
    if (!options.config_file.empty()) fields.update(fields_in(options.config_file));
    fields.update(options.fields);
    if (!options.resume) {
      TakeWindowOfStart(fields);
      TakeRateOfChanges(fields);
    }
    const ExtendOptions settings = ExtendOptions::from_json(fields);
    report = options.resume ? extend::resume_extend(settings, options.run) : extend::run_extend(settings, options.run);
  } catch (const OptionError& error) {
    throw CLI::ValidationError("extend", error.what());
  }
  if (options.json_output) {
    std::printf("%s\n", ReportJson(report).dump(2, ' ', false, json::error_handler_t::replace).c_str());
  } else if (!options.run.quiet) {
    PrintReport(report);
  }
  return report.interrupted ? train::InterruptGuard::kExitCode : 0;
}

}  // namespace

void AddExtend(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("extend", "Turn a pretrained model into a linear-time one");
  command->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  json& fields = options->fields;
  command
      ->add_option_function<std::string>(
          "model", [&fields](const std::string& path) { fields["model"] = path; }, "The pretrained model, a GGUF file")
      ->type_name("MODEL");
  command
      ->add_option_function<std::string>(
          "--from", [&fields](const std::string& path) { fields["from"] = path; },
          "An adapter to start from in place of the first stage, with its window unless --window names another")
      ->type_name("FILE")
      ->group("Data");
  command
      ->add_option_function<std::vector<std::string>>(
          "--text", [&fields](const std::vector<std::string>& paths) { fields["text"] = paths; }, "Plain files to train on")
      ->type_name("FILE")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group("Data");
  AddFields(*command, fields);
  command
      ->add_option(
          "--out", options->run.out,
          "The adapter: a GGUF file of the new and changed weights. Checkpoint and metrics go to the folder NAME.gguf.run")
      ->type_name("NAME.gguf")
      ->required()
      ->group("Run");
  command->add_option("--merged", options->run.merged, "Also write the whole model, converted")->type_name("FILE")->group("Run");
  command->add_flag("--resume", options->resume, "Go on with the run of --out; what isn't named is as it was, but for --merged")
      ->group("Run");
  command->add_flag("--overwrite", options->run.overwrite, "Start again where a run is")->group("Run");
  command
      ->add_option("--config", options->config_file,
                   "A JSON file of options, as a recipe in an adapter; the command line comes first")
      ->type_name("FILE")
      ->group("Run");
  command->add_option("--threads", options->threads, "Threads; by default torch's choice")
      ->check(CLI::Range(1, 4096))
      ->group("Run");
  command->add_flag("--json", options->json_output, "Print the report as JSON")->group("Run");
  command->add_flag("--quiet", options->run.quiet, "No progress")->group("Run");
  command->get_option("--resume")->excludes("--overwrite");
  command->footer(
      "Ctrl-C saves and ends with exit code 130; --resume then goes on. The control that a conversion has to beat is the same\n"
      "command with --attention window-sinks.\n\n"
      "Examples:\n"
      "  latte extend smollm2.gguf --text book.txt --out smollm2-w512.gguf\n"
      "  latte extend smollm2.gguf --text book.txt news.txt --window 128 --tokens 2000000 --out w128.gguf\n"
      "  latte extend --resume --out w128.gguf");
  command->callback([options, &exit_code] { exit_code = Extend(*options); });
}

}  // namespace latte::cli
