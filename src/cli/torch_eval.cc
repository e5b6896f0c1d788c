// latte eval: how a pretrained model reads long texts, by the kind of its attention.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/torch_commands.h"
#include "extend/evaluate.h"
#include "extend/options.h"
#include "extend/plot.h"
#include "extend/retrieval.h"
#include "extend/token_text.h"
#include "extend/variants.h"
#include "formats/atomic_file.h"
#include "formats/error.h"
#include "formats/utf8.h"
#include "train/interrupt.h"
#include "train/options.h"
#include "train/progress.h"

namespace latte::cli {
namespace {

using extend::AttentionKind;
using extend::OptionError;
using nlohmann::json;

struct Options {
  extend::VariantSources sources;
  std::string text;
  std::vector<int64_t> lengths = {2048, 8192};
  int64_t windows = 4;
  int64_t quadratic_limit = 16384;
  std::vector<std::string> attention;
  std::vector<std::string> tasks = {"text"};
  std::vector<int64_t> task_lengths = {1024, 2048};
  std::vector<double> depths = {0.1, 0.3, 0.5, 0.7, 0.9};
  int64_t trials = 4;
  int64_t pairs = 16;
  std::optional<int64_t> window, sinks;
  std::optional<double> rope_factor;
  std::string dtype = "auto";
  std::string plot;
  bool kl = true;
  int threads = 0;
  bool json_output = false;
  bool quiet = false;
};

bool Has(const std::vector<std::string>& list, const char* name) {
  return std::find(list.begin(), list.end(), name) != list.end();
}

bool IsQuadratic(AttentionKind kind) {
  return kind == AttentionKind::kFull || kind == AttentionKind::kFullNtk || kind == AttentionKind::kFullYarn ||
         kind == AttentionKind::kFullUptrained;
}

// What was named, or all that the files allow.
std::vector<AttentionKind> KindsOf(const Options& options, std::optional<AttentionKind> merged, bool stretched) {
  std::vector<AttentionKind> kinds;
  for (const std::string& name : options.attention) kinds.push_back(extend::attention_kind_named(name));
  // First, since the others' rows say how far they are from it.
  std::stable_partition(kinds.begin(), kinds.end(), [](AttentionKind kind) { return kind == AttentionKind::kFull; });
  if (!kinds.empty()) {
    for (AttentionKind kind : kinds) {
      if (const auto missing = missing_source(kind, options.sources, merged)) throw OptionError(*missing);
    }
    return kinds;
  }
  for (AttentionKind kind : extend::all_attention_kinds()) {
    const bool scaled = kind == AttentionKind::kFullNtk || kind == AttentionKind::kFullYarn;
    if (!missing_source(kind, options.sources, merged) && (stretched || !scaled)) kinds.push_back(kind);
  }
  if (kinds.empty()) throw OptionError("no kind of attention can be had of " + options.sources.model + " alone");
  return kinds;
}

json NumberOrNull(const std::optional<double>& value) { return value && std::isfinite(*value) ? json(*value) : json(nullptr); }

// Full attention's row of the same stretches.
const extend::TextRow* FullOf(const extend::TextRow& row, const std::vector<extend::TextRow>& rows) {
  const auto full = std::find_if(rows.begin(), rows.end(), [&](const extend::TextRow& other) {
    return other.attention == AttentionKind::kFull && other.length == row.length;
  });
  return full == rows.end() || row.attention == AttentionKind::kFull ? nullptr : &*full;
}

json ToJson(const extend::TextRow& row, const extend::TextRow* full) {
  json buckets = json::array();
  for (const extend::Bucket& bucket : row.buckets) {
    buckets.push_back({{"from", bucket.from},
                       {"to", bucket.to},
                       {"perplexity", std::exp(bucket.loss)},
                       {"stderr", NumberOrNull(bucket.standard_error)},
                       {"kl", NumberOrNull(bucket.kl)}});
  }
  json object = {{"attention", extend::name_of(row.attention)},
                 {"length", row.length},
                 {"windows", row.windows},
                 {"window", row.window},
                 {"perplexity", row.perplexity},
                 {"stderr", NumberOrNull(row.standard_error)},
                 {"loss", row.loss},
                 {"stretch_losses", row.stretch_losses},
                 {"kl", NumberOrNull(row.kl)},
                 {"seconds", row.seconds},
                 {"state_bytes", row.state_bytes},
                 {"buckets", buckets}};
  if (full != nullptr) {
    const extend::LossDifference difference = loss_difference(row, *full);
    object["over_full"] = {
        {"loss", difference.loss}, {"stderr", NumberOrNull(difference.standard_error)}, {"windows", difference.windows}};
  }
  if (!row.latent_shares.empty()) object["latent_shares"] = row.latent_shares;
  return object;
}

json ToJson(const extend::RetrievalRow& row) {
  json object = {{"attention", extend::name_of(row.attention)},
                 {"length", row.length},
                 {"asked", row.score.asked},
                 {"right", row.score.right},
                 {"right_tokens", row.score.right_tokens},
                 {"accuracy", static_cast<double>(row.score.right) / static_cast<double>(std::max<int64_t>(1, row.score.asked))}};
  if (row.task == "passkey") object["depth"] = row.depth;
  if (row.task == "recall") object["pairs"] = row.pairs;
  return object;
}

double MeanShare(const extend::TextRow& row) {
  double sum = 0.0;
  size_t count = 0;
  for (const auto& layer : row.latent_shares) {
    for (double share : layer) sum += share;
    count += layer.size();
  }
  return count > 0 ? sum / static_cast<double>(count) : 0.0;
}

std::string Format(const char* pattern, double value) {
  std::array<char, 48> text{};
  std::snprintf(text.data(), text.size(), pattern, value);
  return text.data();
}

// One line of what buckets may have; nothing where none of them does.
void PrintOptional(const char* name, const std::vector<extend::Bucket>& buckets, std::optional<double> extend::Bucket::*value,
                   const char* pattern) {
  if (std::none_of(buckets.begin(), buckets.end(), [&](const auto& bucket) { return (bucket.*value).has_value(); })) return;
  std::printf("%-22s", name);
  for (const extend::Bucket& bucket : buckets) {
    const auto& held = bucket.*value;
    std::printf("%s", held ? Format(pattern, *held).c_str() : "       -");  // beyond the trained context
  }
  std::printf("\n");
}

// Of the perplexity, in percent, with its standard error: "+3.1 ± 0.4".
std::string OverFull(const extend::TextRow& row, const extend::TextRow* full) {
  if (full == nullptr) return "-";
  const extend::LossDifference difference = loss_difference(row, *full);
  const double ratio = std::exp(difference.loss);
  const std::string percent = Format("%+.1f", 100 * (ratio - 1));
  return difference.standard_error ? percent + " ± " + Format("%.1f", 100 * ratio * *difference.standard_error) : percent;
}

// To so many columns; "±" is two bytes and one column.
std::string RightAligned(const std::string& text, size_t columns) {
  const size_t wide = formats::count_code_points(text);
  return std::string(columns > wide ? columns - wide : 0, ' ') + text;
}

void Print(const extend::TextRow& row, const extend::TextRow* full) {
  std::printf("%-22s %7lld %3lld  %10.3f %9s %s %9s  %8.2f %9.2f %7s\n", std::string(extend::name_of(row.attention)).c_str(),
              static_cast<long long>(row.length), static_cast<long long>(row.windows), row.perplexity,
              row.standard_error ? Format("%.3f", *row.standard_error).c_str() : "-",
              RightAligned(OverFull(row, full), 14).c_str(), row.kl ? Format("%.4f", *row.kl).c_str() : "-", row.seconds,
              static_cast<double>(row.state_bytes) / 1e6,
              row.latent_shares.empty() ? "-" : Format("%.1f%%", 100 * MeanShare(row)).c_str());
  std::fflush(stdout);
}

class Evaluation {
 public:
  explicit Evaluation(Options& options) : options_(options), base_(options.sources.model), tokenizer_(base_.metadata()) {}

  int run() {
    prepare();
    const train::InterruptGuard interrupt;
    if (!options_.json_output && evaluator_) {
      std::printf("%-22s %7s %3s  %10s %9s %14s %9s  %8s %9s %7s\n", "attention", "length", "n", "perplexity", "stderr",
                  "% over full", "KL", "seconds", "state MB", "latents");
    }
    try {
      for (AttentionKind kind : kinds_) {
        if (interrupted()) break;
        extend::Variant variant = load_variant(kind, options_.sources);
        if (evaluator_) read_text(variant);
        if (Has(options_.tasks, "passkey")) passkey(variant);
        if (Has(options_.tasks, "recall")) recall(variant);
      }
    } catch (...) {  // what was measured is told all the same; a table has shown its rows
      if (options_.json_output && !(rows_.empty() && retrieval_.empty())) print_json();
      throw;
    }
    if (options_.json_output) {
      print_json();
    } else {
      print_positions();
      print_shares();
    }
    if (!options_.plot.empty() && !rows_.empty()) {
      const std::string problem = extend::plot_rows(rows_, options_.plot);
      if (!problem.empty()) std::fprintf(stderr, "latte: %s\n", problem.c_str());
    }
    return interrupted() ? train::InterruptGuard::kExitCode : 0;
  }

 private:
  static bool interrupted() { return train::InterruptGuard::interrupted(); }

  void prepare() {
    extend::VariantSources& sources = options_.sources;
    const auto merged = extend::merged_kind(sources.model);
    for (const auto& [flag, file] :
         {std::pair("--adapter", sources.adapter), {"--control", sources.control}, {"--full-adapter", sources.full_adapter}}) {
      if (merged && !file.empty()) {
        throw OptionError(std::string(flag) + " is for an original model: " + sources.model + " is a converted one");
      }
    }
    sources.window = options_.window;
    sources.sinks = options_.sinks;
    sources.dtype = train::resolve_dtype(options_.dtype) == "bfloat16" ? torch::kBFloat16 : torch::kFloat32;
    const auto config = formats::decoder_config(base_);
    sources.convertible = extend::is_convertible(config);
    const bool text = Has(options_.tasks, "text");
    int64_t longest = 0;
    for (int64_t length : lengths_of_tasks()) longest = std::max(longest, length);
    const double context = static_cast<double>(config.context_length);
    sources.rope_factor = options_.rope_factor.value_or(std::max(1.0, static_cast<double>(longest) / context));
    kinds_ = KindsOf(options_, merged, sources.rope_factor > 1.0);
    // Whatever is wrong with what is read or written last shows now, not after an hour of measuring.
    check_adapters(sources, kinds_);
    if (!options_.plot.empty()) formats::AtomicFile(options_.plot + ".svg").abandon();
    for (int64_t length : options_.task_lengths) {
      for (int64_t trial = 0; trial < options_.trials; ++trial) {
        const auto seed = static_cast<uint64_t>(trial);
        if (Has(options_.tasks, "passkey")) extend::passkey_case(tokenizer_, length, 0.0, seed);
        if (Has(options_.tasks, "recall")) extend::recall_case(tokenizer_, length, options_.pairs, seed);
      }
    }
    if (!text) return;
    if (options_.text.empty()) throw OptionError("--text is missing");
    models::Decoder original(nullptr);
    if (options_.kl && !merged) original = models::load_decoder(sources.model, models::DecoderOptions{.dtype = sources.dtype});
    const std::vector<int64_t> text_tokens = extend::read_tokens(options_.text, tokenizer_);
    evaluator_.emplace(text_tokens, original);
    for (int64_t length : options_.lengths) {
      if (evaluator_->windows(length) > 0) continue;
      throw formats::FormatError(options_.text, std::to_string(text_tokens.size()) + " tokens, expected a stretch of " +
                                                    std::to_string(length) + " and the one behind it: --lengths asks for less");
    }
  }

  std::vector<int64_t> lengths_of_tasks() const {
    std::vector<int64_t> lengths;
    if (Has(options_.tasks, "text")) lengths = options_.lengths;
    if (Has(options_.tasks, "passkey") || Has(options_.tasks, "recall")) {
      lengths.insert(lengths.end(), options_.task_lengths.begin(), options_.task_lengths.end());
    }
    return lengths;
  }

  void read_text(extend::Variant& variant) {
    for (int64_t length : options_.lengths) {
      if (interrupted()) return;
      // Beyond, one stretch shows what there is to see, and the cost grows with the square.
      const bool once = IsQuadratic(variant.kind) && length > options_.quadratic_limit;
      const int64_t stretches = std::min(once ? 1 : options_.windows, evaluator_->windows(length));
      train::ProgressLine line(0, stretches * length, options_.quiet);
      const auto row = evaluator_->evaluate(variant, length, stretches, [&](int64_t tokens) {
        line.update(tokens, std::string(extend::name_of(variant.kind)) + ", tokens");
        return !interrupted();
      });
      line.finish();
      if (row.windows == 0) return;
      rows_.push_back(row);
      if (!options_.json_output) Print(row, FullOf(row, rows_));
    }
  }

  // Perplexity by position, of the longest stretches.
  void print_positions() const {
    if (rows_.empty()) return;
    const int64_t longest = *std::max_element(options_.lengths.begin(), options_.lengths.end());
    bool named = false;
    for (const extend::TextRow& row : rows_) {
      if (row.length != longest || row.buckets.size() < 2) continue;
      if (!named) {
        std::printf("\nperplexity up to position\n%-22s", "attention");
        for (const extend::Bucket& bucket : row.buckets) std::printf(" %7lld", static_cast<long long>(bucket.to));
        std::printf("\n");
        named = true;
      }
      std::printf("%-22s", std::string(extend::name_of(row.attention)).c_str());
      for (const extend::Bucket& bucket : row.buckets) std::printf(" %7.2f", std::exp(bucket.loss));
      std::printf("\n");
      PrintOptional("  standard error", row.buckets, &extend::Bucket::standard_error, " %7.2f");
      PrintOptional("  KL to the original", row.buckets, &extend::Bucket::kl, " %7.4f");
    }
  }

  // Of the longest stretches, a line a layer and a column a head.
  void print_shares() const {
    const extend::TextRow* last = nullptr;
    for (const extend::TextRow& row : rows_) {
      if (!row.latent_shares.empty() && (last == nullptr || row.length >= last->length)) last = &row;
    }
    if (last == nullptr) return;
    std::printf("\nlatents' share of probability, %% by head, of tokens with anything beyond the window (%lld tokens)\n",
                static_cast<long long>(last->length));
    for (size_t layer = 0; layer < last->latent_shares.size(); ++layer) {
      if (last->latent_shares[layer].empty()) continue;
      std::printf("layer %-4zu", layer);
      for (const double share : last->latent_shares[layer]) std::printf(" %5.1f", 100 * share);
      std::printf("\n");
    }
  }

  void passkey(extend::Variant& variant) {
    for (int64_t length : options_.task_lengths) {
      for (double depth : options_.depths) {
        extend::RetrievalRow row{variant.kind, "passkey", length, depth, 0, {}};
        for (int64_t trial = 0; trial < options_.trials && !interrupted(); ++trial) {
          const auto retrieval = extend::passkey_case(tokenizer_, length, depth, static_cast<uint64_t>(trial));
          row.score += extend::score_answers(variant.model.model, retrieval);
        }
        if (row.score.asked > 0) keep(row, "passkey at depth " + Format("%.2f", depth));
      }
    }
  }

  void recall(extend::Variant& variant) {
    for (int64_t length : options_.task_lengths) {
      extend::RetrievalRow row{variant.kind, "recall", length, 0.0, options_.pairs, {}};
      for (int64_t trial = 0; trial < options_.trials && !interrupted(); ++trial) {
        const auto retrieval = extend::recall_case(tokenizer_, length, options_.pairs, static_cast<uint64_t>(trial));
        row.score += extend::score_answers(variant.model.model, retrieval);
      }
      if (row.score.asked > 0) keep(row, "recall of " + std::to_string(options_.pairs));
    }
  }

  void keep(const extend::RetrievalRow& row, const std::string& what) {
    retrieval_.push_back(row);
    if (options_.json_output) return;
    std::printf("%-22s %7lld  %-24s %3lld of %lld\n", std::string(extend::name_of(row.attention)).c_str(),
                static_cast<long long>(row.length), what.c_str(), static_cast<long long>(row.score.right),
                static_cast<long long>(row.score.asked));
    std::fflush(stdout);
  }

  void print_json() const {
    json rows = json::array(), passkey = json::array(), recall = json::array();
    for (const auto& row : rows_) rows.push_back(ToJson(row, FullOf(row, rows_)));
    for (const auto& row : retrieval_) (row.task == "passkey" ? passkey : recall).push_back(ToJson(row));
    json object = {{"model", options_.sources.model},
                   {"adapter", options_.sources.adapter},
                   {"text", options_.text},
                   {"rope_factor", options_.sources.rope_factor},
                   {"dtype", options_.sources.dtype == torch::kBFloat16 ? "bfloat16" : "float32"},
                   {"threads", at::get_num_threads()},
                   {"rows", rows}};
    if (!passkey.empty()) object["passkey"] = passkey;
    if (!recall.empty()) object["recall"] = recall;
    std::printf("%s\n", object.dump(2, ' ', false, json::error_handler_t::replace).c_str());
  }

  Options& options_;
  formats::GgufFile base_;
  formats::Tokenizer tokenizer_;
  std::vector<AttentionKind> kinds_;
  std::optional<extend::TextEvaluator> evaluator_;
  std::vector<extend::TextRow> rows_;
  std::vector<extend::RetrievalRow> retrieval_;
};

int Eval(Options& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  try {
    return Evaluation(options).run();
  } catch (const OptionError& error) {
    throw CLI::ValidationError("eval", error.what());
  }
}

}  // namespace

void AddEval(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("eval", "Compare a pretrained model's attention on long texts");
  command->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  const auto list = CLI::MultiOptionPolicy::TakeAll;
  const CLI::Range positive(int64_t{1}, int64_t{1} << 24);
  command->add_option("model", options->sources.model, "The pretrained model, a GGUF file")->required()->type_name("MODEL");
  command->add_option("--adapter", options->sources.adapter, "Of latte extend: latents")->type_name("FILE");
  command->add_option("--control", options->sources.control, "Of latte extend --attention window-sinks")->type_name("FILE");
  command->add_option("--full-adapter", options->sources.full_adapter, "Of latte extend --attention full")->type_name("FILE");
  command
      ->add_option("--attention", options->attention,
                   "Some of full, full-ntk, full-yarn, full-uptrained, window, window-sinks, window-sinks-uptrained, macchiato, "
                   "macchiato-latents-off; by default all that the files allow")
      ->delimiter(',')
      ->multi_option_policy(list);
  command->add_option("--tasks", options->tasks, "Some of text, passkey, recall")
      ->delimiter(',')
      ->multi_option_policy(list)
      ->check(CLI::IsMember({"text", "passkey", "recall"}))
      ->capture_default_str();
  command->add_option("--text", options->text, "A long plain text that no model was trained on")
      ->type_name("FILE")
      ->group("Text");
  command->add_option("--lengths", options->lengths, "Tokens a stretch")
      ->delimiter(',')
      ->multi_option_policy(list)
      ->check(positive)
      ->capture_default_str()
      ->group("Text");
  command
      ->add_option("--windows", options->windows, "Stretches of each length, from the start of the text; fewer where it is short")
      ->check(positive)
      ->capture_default_str()
      ->group("Text");
  command->add_option("--quadratic-limit", options->quadratic_limit, "Full attention reads one stretch where they are longer")
      ->check(positive)
      ->capture_default_str()
      ->group("Text");
  command
      ->add_flag("!--no-kl", options->kl,
                 "Leave out KL to the full model, which reads every stretch as well, as far as it was trained")
      ->group("Text");
  command->add_option("--plot", options->plot, "Draw perplexity, time and state against length as PREFIX.svg and PREFIX.png")
      ->type_name("PREFIX")
      ->group("Text");
  command->add_option("--task-lengths", options->task_lengths, "Tokens a case")
      ->delimiter(',')
      ->multi_option_policy(list)
      ->check(positive)
      ->capture_default_str()
      ->group("Retrieval");
  command->add_option("--depths", options->depths, "Where the passkey is: 0 the start, 1 the end")
      ->delimiter(',')
      ->multi_option_policy(list)
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->group("Retrieval");
  command->add_option("--trials", options->trials, "Cases of each length and depth")
      ->check(positive)
      ->capture_default_str()
      ->group("Retrieval");
  command->add_option("--pairs", options->pairs, "Names to recall")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str()
      ->group("Retrieval");
  command
      ->add_option("--window", options->window,
                   "Tokens of standard attention, of adapters too; by default the adapter's own, or 512")
      ->check(positive)
      ->group("Attention");
  command->add_option("--sinks", options->sinks, "Of window-sinks; by default the adapter's, or 4")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 24))
      ->group("Attention");
  command
      ->add_option("--rope-factor", options->rope_factor,
                   "Of full-ntk and full-yarn; by default the longest length by the trained context")
      ->check(CLI::Range(1.0, 1e6))
      ->group("Attention");
  command->add_option("--dtype", options->dtype, "Of matrix products")
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "Threads; by default torch's choice")->check(CLI::Range(1, 4096));
  command->add_flag("--json", options->json_output, "Print the rows as JSON");
  command->add_flag("--quiet", options->quiet, "No progress");
  command->footer(
      "Examples:\n"
      "  latte eval smollm2.gguf --adapter w128.gguf --text book.txt\n"
      "  latte eval smollm2.gguf --adapter w512.gguf --control w512-control.gguf --text book.txt --lengths 2048,8192,65536 "
      "--json\n"
      "  latte eval smollm2.gguf --adapter w128.gguf --tasks passkey,recall --task-lengths 2048");
  command->callback([options, &exit_code] { exit_code = Eval(*options); });
}

}  // namespace latte::cli
