// latte bench decode: how fast a model reads and writes at growing depths, beside llama.cpp on the same file.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "cli/latte_bench_contestants.h"
#include "cli/latte_bench_files.h"
#include "cli/latte_bench_plot.h"
#include "cli/latte_commands.h"
#include "cli/latte_text.h"
#include "formats/adapter.h"
#include "formats/atomic_file.h"
#include "formats/gguf.h"
#include "runtime/error.h"
#include "runtime/quantize.h"

namespace latte::cli {
namespace {

using runtime::Model;
using runtime::Session;

struct Options {
  std::string model;
  std::string adapter;
  std::vector<int64_t> depths = {0, 1024, 2048, 8192, 32768, 131072};
  std::vector<std::string> types;      // empty: the file as it is
  std::vector<std::string> engines;    // empty: all that can run the model
  std::vector<std::string> attention;  // empty: converted and not; of latte train's models, their own
  std::vector<int64_t> batches = {1};
  int64_t window = 512, sinks = 4, latents = 64;
  int64_t prompt = 512, tokens = 64;
  int64_t full_depth = 32768;
  double seconds = 120.0;  // for a contestant to reach a depth
  double budget = 2.0;     // of timing, for each contestant and depth
  int threads = 0;
  int64_t sessions = 0;
  std::string plot;
  bool json = false;
};

double SecondsOf(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double Median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Runs `work` and books the memory that it left behind.
double Booked(Contestant& contestant, const std::function<void()>& work) {
  const double before = ResidentMegabytes();
  const double seconds = SecondsOf(work);
  contestant.resident += ResidentMegabytes() - before;
  return seconds;
}

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options) {
    threads_ = options.threads > 0 ? options.threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    for (std::vector<int64_t>* list : {&options_.depths, &options_.batches}) {
      std::sort(list->begin(), list->end());
      list->erase(std::unique(list->begin(), list->end()), list->end());
    }
    for (std::string& type : options_.types) {
      std::transform(type.begin(), type.end(), type.begin(), [](unsigned char c) { return std::toupper(c); });
    }
  }

  nlohmann::json Run() {
    if (!runtime::is_checkpoint(options_.model)) formats::GgufFile(options_.model);  // fails in front of the table
    if (!options_.json && options_.sessions == 0) {
      std::printf("%-10s %-10s %-6s %8s %6s %16s %16s %12s %10s\n", "engine", "attention", "type", "depth", "batch",
                  "prefill tokens/s", "decode tokens/s", "resident MB", "state MB");
    }
    if (runtime::is_checkpoint(options_.model)) return RunTrained(), Result();
    if (options_.engines.empty()) options_.engines = {"latte", "llama.cpp"};
    if (options_.attention.empty()) options_.attention = {"macchiato", "full"};
    if (options_.types.empty()) {
      RunFile(options_.model, NameOfType(options_.model));
    }
    for (const std::string& type : options_.types) {
      const formats::TensorType wanted = TypeNamed(type);
      if (type == NameOfType(options_.model)) {
        RunFile(options_.model, type);
        continue;
      }
      const auto place =
          std::filesystem::temp_directory_path() / ("latte-bench-" + std::to_string(::getpid()) + "-" + type + ".gguf");
      const TemporaryFile file(place.string());
      {
        const InterruptsWait wait;
        runtime::quantize_model(options_.model, file.path(), wanted);
      }
      if (options_.adapter.empty()) {
        RunFile(file.path(), type);
        continue;
      }
      // An adapter fits its base alone: what latte runs converted is the two merged, and then quantised alike.
      const TemporaryFile merged(file.path() + ".merged"), quantised(file.path() + ".latte");
      const formats::AdapterFile adapter(options_.adapter);
      const formats::GgufFile base(options_.model);
      adapter.check_fits(base);
      {
        const InterruptsWait wait;
        formats::write_merged(merged.path(), adapter.spec(), base, adapter.file().tensors());
        runtime::quantize_model(merged.path(), quantised.path(), wanted);
      }
      RunFile(file.path(), type, quantised.path());
    }
    return Result();
  }

 private:
  static formats::TensorType TypeNamed(const std::string& type) {
    return *formats::tensor_type_named(type);  // CheckType() has seen it
  }
  nlohmann::json Result() const { return {{"rows", rows_}, {"model", options_.model}, {"threads", threads_}}; }

  // A model of latte train runs with the attention that it was trained with, in float32 or in types that are made while loading.
  void RunTrained() {
    if (!options_.adapter.empty()) {
      throw std::runtime_error(options_.model + ": --adapter is for GGUF files, this is a checkpoint of latte train");
    }
    if (std::find(options_.engines.begin(), options_.engines.end(), "llama.cpp") != options_.engines.end()) {
      throw std::runtime_error(options_.model + ": llama.cpp can't run models of latte train: leave --engines out");
    }
    if (!options_.attention.empty()) {
      throw std::runtime_error(options_.model +
                               ": a model of latte train has the attention that it was trained with: leave --attention out");
    }
    for (const std::string& type : options_.types.empty() ? std::vector<std::string>{"F32"} : options_.types) {
      type_ = type;
      runtime::ModelOptions model_options;
      model_options.type = TypeNamed(type);
      const double before = ResidentMegabytes();
      const auto model = Model::open(options_.model, model_options);
      const std::string attention = NameOfAttention(model->shape());
      LeaveOutDeeper(model->shape());
      std::vector<std::unique_ptr<Contestant>> contestants;
      AddLatte(model, attention, before, contestants);
      if (options_.sessions == 0) RunDepths(contestants);
    }
  }

  // Depths that learned positions don't reach.
  void LeaveOutDeeper(const runtime::ModelShape& shape) {
    const int64_t most = shape.learned_positions;
    if (most == 0 || options_.sessions > 0) return;
    const int64_t behind = std::max(options_.prompt, options_.tokens + 1);
    const auto kept =
        std::remove_if(options_.depths.begin(), options_.depths.end(), [&](int64_t depth) { return depth + behind > most; });
    if (kept == options_.depths.begin()) {
      throw std::runtime_error(options_.model + ": has " + std::to_string(most) + " learned positions, fewer than --depths and " +
                               std::to_string(behind) + " tokens behind them: choose smaller --depths, --prompt, --tokens");
    }
    for (auto depth = kept; depth != options_.depths.end(); ++depth) {
      std::fprintf(stderr, "latte: a depth is left out: the model has %lld learned positions\n", static_cast<long long>(most));
    }
    options_.depths.erase(kept, options_.depths.end());
  }

  // `before`: megabytes in front of the model. Reports, rather than adds, where memory of sessions is asked for.
  void AddLatte(const std::shared_ptr<const Model>& model, const std::string& attention, double before,
                std::vector<std::unique_ptr<Contestant>>& contestants) {
    vocabulary_ = model->shape().vocab_size;
    const int64_t deepest = DeepestOf(!model->shape().constant_state());
    auto contestant =
        std::make_unique<LatteContestant>(model, threads_, deepest + options_.prompt + 2 * options_.tokens, attention);
    contestant->resident = ResidentMegabytes() - before;
    if (options_.sessions > 0) {
      ReportSessions(*contestant);
    } else {
      contestants.push_back(std::move(contestant));
    }
  }

  // The type that most weights have.
  static std::string NameOfType(const std::string& path) {
    const formats::GgufFile file(path);
    std::map<formats::TensorType, size_t> bytes;
    for (const auto& tensor : file.tensors()) bytes[tensor.type] += tensor.name.starts_with("blk.") ? tensor.data.size() : 0;
    const auto most = std::max_element(bytes.begin(), bytes.end(), [](auto& a, auto& b) { return a.second < b.second; });
    std::string name(most == bytes.end() ? "" : formats::name_of(most->first));
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
    return name;
  }

  // `converted`: the file of latte's converted model where it isn't `path` with the adapter.
  void RunFile(const std::string& path, const std::string& type, const std::string& converted = "") {
    type_ = type;
    std::vector<std::unique_ptr<Contestant>> contestants;
    const auto wants = [](const std::vector<std::string>& list, const char* name) {
      return std::find(list.begin(), list.end(), name) != list.end();
    };
    const bool latte = wants(options_.engines, "latte");
    for (const std::string& attention : options_.attention) {
      if (!latte) continue;
      runtime::ModelOptions model_options;
      if (attention == "macchiato") {
        if (converted.empty()) model_options.adapter = options_.adapter;
        model_options.adapter_in_base_type = true;
        if (options_.adapter.empty()) model_options.attention = {options_.window, options_.sinks, options_.latents};
      } else if (attention == "window") {
        model_options.attention = {options_.window, options_.sinks, 0};
      }
      const double before = ResidentMegabytes();
      const auto model = Model::open(attention == "macchiato" && !converted.empty() ? converted : path, model_options);
      AddLatte(model, attention, before, contestants);
    }
    if (options_.sessions > 0) return;
    if (wants(options_.engines, "llama.cpp")) {
      for (const bool flash : {true, false}) {
        const double before = ResidentMegabytes();
        contestants.push_back(std::make_unique<LlamaContestant>(path, threads_, flash));
        contestants.back()->resident = ResidentMegabytes() - before;
      }
    }
    RunDepths(contestants);
  }

  void RunDepths(std::vector<std::unique_ptr<Contestant>>& contestants) {
    std::mt19937 random(1);
    std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(std::min<int64_t>(vocabulary_, 20000)) - 1);
    text_.resize(static_cast<size_t>(options_.depths.back()));
    prompt_.resize(static_cast<size_t>(options_.prompt));
    for (int32_t& t : text_) t = token(random);
    for (int32_t& t : prompt_) t = token(random);
    for (const int64_t depth : options_.depths) RunDepth(contestants, depth);
  }

  // The greatest depth that a contestant is to reach.
  int64_t DeepestOf(bool full) const {
    int64_t deepest = 0;
    for (const int64_t depth : options_.depths) {
      if (!full || depth <= options_.full_depth) deepest = std::max(deepest, depth);
    }
    return deepest;
  }

  struct Runner {
    Contestant* contestant;
    int64_t batch;
    std::vector<double> reads, writes, first_reads, first_writes;
    double spent = 0.0;
    double resident = 0.0;  // the contestant's, with so many sessions
  };

  void RunDepth(std::vector<std::unique_ptr<Contestant>>& contestants, int64_t depth) {
    std::vector<Runner> runners;
    std::vector<Contestant*> there;
    for (const auto& contestant : contestants) {
      if (contestant->out) continue;
      if (contestant->attention == "full" && depth > options_.full_depth) {
        std::fprintf(stderr, "latte: %s (full) goes no deeper than --full-depth %lld\n", contestant->engine.c_str(),
                     static_cast<long long>(options_.full_depth));
        contestant->out = true;
        continue;
      }
      const double resident = contestant->resident;
      bool reached = true;
      Booked(*contestant, [&] {
        reached = contestant->Reach(std::span(text_).first(static_cast<size_t>(depth)), options_.prompt + 2 * options_.tokens,
                                    options_.seconds);
      });
      if (!reached) {
        std::fprintf(stderr, "latte: %s (%s) can't reach depth %lld within %.0f seconds: skipped\n", contestant->engine.c_str(),
                     contestant->attention.c_str(), static_cast<long long>(depth), options_.seconds);
        contestant->resident = resident;
        contestant->out = true;
        continue;
      }
      there.push_back(contestant.get());
      for (const int64_t batch : options_.batches) {
        if (batch == 1 || contestant->engine == "latte") runners.push_back({contestant.get(), batch, {}, {}, {}, {}});
      }
    }
    // In turns, so that a machine whose speed changes meanwhile changes it for all of them.
    for (int round = 0; round < 24; ++round) {
      bool any = false;
      for (Runner& runner : runners) {
        if (runner.spent > options_.budget && (round >= 3 || runner.spent > 4 * options_.budget)) continue;
        any = true;
        Measure(runner, round);
      }
      if (!any) break;
    }
    for (const int64_t batch : options_.batches) Report(runners, batch, depth);
    for (Contestant* contestant : there) Booked(*contestant, [&] { contestant->Rest(); });
  }

  // One round; the first warms up, unless it took so long that it needn't.
  void Measure(Runner& runner, int round) {
    Contestant& contestant = *runner.contestant;
    const int64_t batch = contestant.batch = runner.batch;
    try {
      Booked(contestant, [&] {
        contestant.GoBack();
        double read = 0.0;
        if (batch == 1) {
          read = SecondsOf([&] { contestant.Read(prompt_); });
          contestant.GoBack();
        }
        const auto write = [&] {
          contestant.Write(prompt_[0]);  // buffers are made anew after a prompt
          return SecondsOf([&] {
            for (int64_t i = 0; i < options_.tokens; ++i) contestant.Write(prompt_[static_cast<size_t>(i) % prompt_.size()]);
          });
        };
        const double written = write();
        if (batch == 1 && contestant.GoToFirst()) {
          runner.first_reads.push_back(SecondsOf([&] { contestant.Read(prompt_); }));
          contestant.GoToFirst();
          runner.first_writes.push_back(write());
        }
        runner.spent += read + written;
        if (round == 0 && runner.spent < options_.budget) return;
        if (batch == 1) runner.reads.push_back(read);
        runner.writes.push_back(written);
      });
      runner.resident = contestant.resident;
    } catch (const runtime::MemoryError& error) {
      std::fprintf(stderr, "latte: %s: %s (%s, batch %lld) skipped\n", error.what(), contestant.engine.c_str(),
                   contestant.attention.c_str(), static_cast<long long>(batch));
      contestant.GoBack();
      runner.spent = 1e9;
    }
  }

  double PrefillOf(const Runner& runner) const {
    return runner.reads.empty() ? 0.0 : static_cast<double>(options_.prompt) / Median(runner.reads);
  }
  double DecodeOf(const Runner& runner) const {
    return static_cast<double>(options_.tokens * runner.batch) / Median(runner.writes);
  }

  void Report(std::vector<Runner>& runners, int64_t batch, int64_t depth) {
    const Runner* other = nullptr;  // llama.cpp with flash attention
    for (Runner& runner : runners) {
      if (runner.batch != batch || runner.writes.empty()) continue;
      if (runner.contestant->engine == "latte") {
        Report(runner, depth, PrefillOf(runner), DecodeOf(runner));
        if (!runner.first_writes.empty()) {
          rows_.back()["prefill_over_first_depth"] = Median(runner.first_reads) / Median(runner.reads);
          rows_.back()["decode_over_first_depth"] = Median(runner.first_writes) / Median(runner.writes);
        }
      } else if (other == nullptr && runner.contestant->flash) {
        other = &runner;
      } else {
        ReportBetter(other, runner, depth);
        other = nullptr;
      }
    }
    if (other != nullptr) ReportBetter(other, *other, depth);
  }

  // llama.cpp's flash attention on and off: a row has what the better of both reached at reading and at writing. Who is clearly
  // behind in both needn't go deeper.
  void ReportBetter(const Runner* with, const Runner& without, int64_t depth) {
    if (with == nullptr) with = &without;
    const double reads[] = {PrefillOf(*with), PrefillOf(without)}, writes[] = {DecodeOf(*with), DecodeOf(without)};
    const bool first = writes[0] >= writes[1];
    constexpr double kClearly = 0.85;
    if (depth > 0) {
      if (reads[0] < kClearly * reads[1] && writes[0] < kClearly * writes[1]) with->contestant->out = true;
      if (reads[1] < kClearly * reads[0] && writes[1] < kClearly * writes[0]) without.contestant->out = true;
    }
    Report(first ? *with : without, depth, std::max(reads[0], reads[1]), std::max(writes[0], writes[1]));
  }

  void Report(const Runner& runner, int64_t depth, double prefill, double decode) {
    const Contestant& contestant = *runner.contestant;
    nlohmann::json row = {{"engine", contestant.engine},
                          {"attention", contestant.attention},
                          {"type", type_},
                          {"depth", depth},
                          {"batch", runner.batch},
                          {"decode_tokens_per_second", decode},
                          {"resident_mb", runner.resident}};
    if (prefill > 0.0) row["prefill_tokens_per_second"] = prefill;
    if (!contestant.reading_rates.empty()) {
      const auto [slowest, fastest] = std::minmax_element(contestant.reading_rates.begin(), contestant.reading_rates.end());
      row["reading_tokens_per_second"] = Median(contestant.reading_rates);
      row["reading_slowest"] = *slowest;
      row["reading_fastest"] = *fastest;
      row["reading_rates"] = contestant.reading_rates;
    }
    if (contestant.engine == "latte") row["state_mb"] = contestant.StateMegabytes();
    if (contestant.engine == "llama.cpp") row["flash_attention"] = contestant.flash;
    if (contestant.attention == "macchiato")
      row["latents_trained"] = !options_.adapter.empty() || runtime::is_checkpoint(options_.model);
    if (!options_.json) {
      std::printf("%-10s %-10s %-6s %8lld %6lld %16.1f %16.1f %12.1f %10.2f\n", contestant.engine.c_str(),
                  contestant.attention.c_str(), type_.c_str(), static_cast<long long>(depth),
                  static_cast<long long>(runner.batch), prefill, decode, runner.resident, contestant.StateMegabytes());
      std::fflush(stdout);
    }
    rows_.push_back(std::move(row));
  }

  void ReportSessions(LatteContestant& contestant) {
    constexpr int64_t kRead = 1024;
    const auto vocabulary = static_cast<int32_t>(std::min<int64_t>(vocabulary_, 20000));
    std::vector<int32_t> text(kRead);
    for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<int32_t>(i * 7919) % vocabulary;
    const double each = contestant.MegabytesOfSessions(options_.sessions, text);
    runtime::SessionOptions session_options;
    session_options.context = kRead + 1;
    const auto needed = static_cast<double>(Session::bytes_needed(contestant.model(), session_options)) / 1e6;
    rows_.push_back({{"engine", "latte"},
                     {"attention", contestant.attention},
                     {"type", type_},
                     {"sessions", options_.sessions},
                     {"depth", kRead + 1},
                     {"session_mb", needed},
                     {"resident_mb_per_session", each}});
    if (options_.json) return;
    std::printf("%lld sessions (%s) at depth %lld: %.2f MB each by the process's size, %.2f MB by Session::bytes_needed\n",
                static_cast<long long>(options_.sessions), contestant.attention.c_str(), static_cast<long long>(kRead) + 1, each,
                needed);
  }

  Options options_;
  int threads_;
  int64_t vocabulary_ = 20000;
  std::string type_;
  std::vector<int32_t> text_, prompt_;
  nlohmann::json rows_ = nlohmann::json::array();
};

}  // namespace

void AddBenchDecode(CLI::App& bench, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = bench.add_subcommand(
      "decode", "Tokens a second, reading and writing, at growing depths, beside llama.cpp on the same file");
  command->add_option("--model", options->model, "GGUF file, or a run's folder of latte train (or its checkpoint)")->required();
  command->add_option("--adapter", options->adapter,
                      "Adapter of the converted model; without it, random latents, which cost the same");
  command->add_option("--depths", options->depths, "Tokens read before")
      ->delimiter(',')
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  command->add_option("--types", options->types, "Weight types, such as Q4_1,Q4_0,BF16; made from the model")
      ->delimiter(',')
      ->check(CheckType);
  command->add_option("--engines", options->engines, "Whom to measure; all that can run the model")
      ->delimiter(',')
      ->check(CLI::IsMember({"latte", "llama.cpp"}));
  command->add_option("--attention", options->attention, "latte's, of a GGUF file; macchiato,full")
      ->delimiter(',')
      ->check(CLI::IsMember({"macchiato", "window", "full"}));
  command->add_option("--batch", options->batches, "Sessions in one step (latte)")
      ->delimiter(',')
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  command->add_option("--window", options->window, "Without an adapter: tokens of standard attention")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--sinks", options->sinks, "Likewise: first tokens that stay readable")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  command->add_option("--latents", options->latents, "Likewise: latents a key-value head")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--prompt", options->prompt, "Tokens read at each depth")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  command->add_option("--tokens", options->tokens, "Tokens written at each depth, a round")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  command->add_option("--full-depth", options->full_depth, "Greatest depth of attention that reads everything")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  command->add_option("--seconds", options->seconds, "Longest way to a depth; who needs longer drops out")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "0: one a CPU")->check(CLI::Range(0, 1024))->capture_default_str();
  command
      ->add_option("--sessions", options->sessions,
                   "Instead of speed: the memory of so many live sessions, each with a text read and stepped in turn")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--plot", options->plot, "Draw the speeds over the depths as PREFIX.svg and PREFIX.png (gnuplot)");
  command->add_flag("--json", options->json, "One JSON object");
  command->footer(
      "llama.cpp runs with and without flash attention, and its row has the better of both. Beyond 2048 tokens its cache is "
      "filled\n"
      "with copies of what it read, which costs it the same as a text of its own. In JSON, prefill_ and\n"
      "decode_over_first_depth are latte's rates over those at the first depth of 1000 tokens or more, taken in turns, and\n"
      "reading_rates those of each 2048 tokens on the way. Models of latte train run with their own attention, in F32 unless\n"
      "--types says otherwise, and llama.cpp can't run them.\n\n"
      "Examples:\n"
      "  latte bench decode --model SmolLM2-135M-Instruct.Q4_1.gguf --depths 0,2048,8192,32768\n"
      "  latte bench decode --model model.gguf --adapter adapter.gguf --types Q4_1,BF16 --plot figures/decode --json\n"
      "  latte bench decode --model model.gguf --engines latte --batch 1,8,64 --depths 1024\n"
      "  latte bench decode --model model.gguf --attention macchiato --sessions 1000\n"
      "  latte bench decode --model runs/demo --depths 0,1000,100000");
  command->callback([options, &exit_code] {
    if (!options->plot.empty()) const formats::AtomicFile place(options->plot + ".svg");  // fails now rather than at the end
    const nlohmann::json result = Bench(*options).Run();
    if (!options->plot.empty()) {
      const std::string problem = PlotDecode(result, options->plot);
      if (!problem.empty()) std::fprintf(stderr, "latte: %s\n", problem.c_str());
    }
    if (options->json) std::printf("%s\n", result.dump(1).c_str());
    exit_code = 0;
  });
}

}  // namespace latte::cli
