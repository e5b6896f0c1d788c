// latte bench decode: how fast a model reads and writes at growing depths, beside llama.cpp on the same file.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cli/latte_commands.h"
#include "cli/latte_llama_peer.h"
#include "cli/latte_text.h"
#include "formats/adapter.h"
#include "formats/gguf.h"
#include "runtime/engine.h"
#include "runtime/quantize.h"

namespace latte::cli {
namespace {

using runtime::Engine;
using runtime::Model;
using runtime::Session;

struct Options {
  std::string model;
  std::string adapter;
  std::vector<int64_t> depths = {0, 1024, 2048, 8192, 32768, 131072};
  std::vector<std::string> types;  // empty: the file as it is
  std::vector<std::string> engines = {"latte", "llama.cpp"};
  std::vector<std::string> attention = {"macchiato", "full"};
  std::vector<int64_t> batches = {1};
  int64_t window = 512, sinks = 4, latents = 64;
  int64_t prompt = 512, tokens = 64;
  int64_t full_depth = 32768;
  double seconds = 120.0;  // for a contestant to reach a depth
  double budget = 2.0;     // of timing, for each contestant and depth
  int threads = 0;
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

// An engine with one attention: reads on, goes back, writes.
class Contestant {
 public:
  virtual ~Contestant() = default;
  virtual void Start(int64_t most_tokens) = 0;
  virtual void Read(std::span<const int32_t> tokens) = 0;  // several tokens at once
  virtual void Write(int32_t token) = 0;                   // one token, logits and all, in every session
  virtual void Mark() = 0;                                 // GoBack() returns here
  virtual void GoBack() = 0;
  virtual void Stop() = 0;
  virtual double StateMegabytes() const { return 0.0; }

  std::string engine, attention;
  int64_t batch = 1;
  double resident = 0.0;  // megabytes that came with what it did
  bool out = false;       // too slow for greater depths
};

class Latte final : public Contestant {
 public:
  Latte(std::shared_ptr<const Model> model, std::shared_ptr<Engine> engine)
      : model_(std::move(model)), engine_(std::move(engine)) {
    this->engine = "latte";
  }
  void Start(int64_t most_tokens) override {
    runtime::SessionOptions options;
    options.context = most_tokens;
    session_.emplace(model_, options);
  }
  void Read(std::span<const int32_t> tokens) override { engine_->prefill(*session_, tokens); }
  void Write(int32_t token) override {
    if (batch == 1) {
      engine_->decode(*session_, token);
      return;
    }
    std::vector<runtime::StepPart> parts;
    while (others_.size() < static_cast<size_t>(batch)) others_.push_back(*session_);
    for (Session& session : others_) parts.push_back({&session, {&token, 1}});
    engine_->step(parts);
  }
  void Mark() override { marked_.emplace(*session_); }
  void GoBack() override {
    others_.clear();
    *session_ = *marked_;
  }
  void Stop() override {
    others_.clear();
    session_.reset();
    marked_.reset();
  }
  double StateMegabytes() const override { return static_cast<double>(session_->bytes_in_use()) / 1e6; }

 private:
  std::shared_ptr<const Model> model_;
  std::shared_ptr<Engine> engine_;
  std::optional<Session> session_, marked_;
  std::vector<Session> others_;
};

class Llama final : public Contestant {
 public:
  Llama(const std::string& path, int threads) : peer_(path, threads) {
    engine = "llama.cpp";
    attention = "full";
  }
  void Start(int64_t most_tokens) override { peer_.start((most_tokens + 255) / 256 * 256, true); }
  void Read(std::span<const int32_t> tokens) override { peer_.read(tokens); }
  void Write(int32_t token) override { peer_.read({&token, 1}); }
  void Mark() override { marked_ = peer_.position(); }
  void GoBack() override { peer_.go_back(marked_); }
  void Stop() override { peer_.stop(); }

 private:
  LlamaPeer peer_;
  int64_t marked_ = 0;
};

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
    std::sort(options_.depths.begin(), options_.depths.end());
  }

  nlohmann::json Run() {
    if (!options_.json) {
      std::printf("%-10s %-10s %-6s %8s %6s %16s %16s %12s %10s\n", "engine", "attention", "type", "depth", "batch",
                  "prefill tokens/s", "decode tokens/s", "resident MB", "state MB");
    }
    if (options_.types.empty()) {
      RunFile(options_.model, NameOfType(options_.model));
    }
    for (const std::string& type : options_.types) {
      const auto wanted = formats::tensor_type_named(Lower(type));
      if (!wanted) throw std::runtime_error("--types: " + type + " isn't a type");
      if (type == NameOfType(options_.model)) {
        RunFile(options_.model, type);
        continue;
      }
      const auto file =
          std::filesystem::temp_directory_path() / ("latte-bench-" + std::to_string(::getpid()) + "-" + type + ".gguf");
      const Removed removed{file};
      runtime::quantize_model(options_.model, file.string(), *wanted);
      if (options_.adapter.empty()) {
        RunFile(file.string(), type);
        continue;
      }
      // An adapter fits its base alone: what latte runs converted is the two merged, and then quantised alike.
      const Removed merged{file.string() + ".merged"}, quantised{file.string() + ".latte"};
      const formats::AdapterFile adapter(options_.adapter);
      const formats::GgufFile base(options_.model);
      adapter.check_fits(base);
      formats::write_merged(merged.path.string(), adapter.spec(), base, adapter.file().tensors());
      runtime::quantize_model(merged.path.string(), quantised.path.string(), *wanted);
      RunFile(file.string(), type, quantised.path.string());
    }
    return {{"rows", rows_}, {"model", options_.model}, {"threads", threads_}};
  }

 private:
  struct Removed {
    std::filesystem::path path;
    ~Removed() {
      std::error_code ignored;
      std::filesystem::remove(path, ignored);
    }
  };
  static std::string Lower(std::string text) {
    // ggml writes "q4_0", but "q4_K".
    for (char& c : text) c = c == 'K' ? c : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return text;
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
      auto model = Model::open(attention == "macchiato" && !converted.empty() ? converted : path, model_options);
      vocabulary_ = model->shape().vocab_size;
      runtime::EngineOptions engine_options;
      engine_options.threads = threads_;
      auto contestant = std::make_unique<Latte>(model, std::make_shared<Engine>(model, engine_options));
      contestant->attention = attention;
      contestant->resident = ResidentMegabytes() - before;
      contestants.push_back(std::move(contestant));
    }
    if (wants(options_.engines, "llama.cpp")) {
      const double before = ResidentMegabytes();
      contestants.push_back(std::make_unique<Llama>(path, threads_));
      contestants.back()->resident = ResidentMegabytes() - before;
    }
    for (const int64_t depth : options_.depths) RunDepth(contestants, depth);
  }

  void RunDepth(std::vector<std::unique_ptr<Contestant>>& contestants, int64_t depth) {
    std::mt19937 random(1);
    std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(std::min<int64_t>(vocabulary_, 20000)) - 1);
    std::vector<int32_t> text(static_cast<size_t>(depth)), prompt(static_cast<size_t>(options_.prompt));
    for (int32_t& t : text) t = token(random);
    for (int32_t& t : prompt) t = token(random);
    struct Runner {
      Contestant* contestant;
      std::vector<double> reads, writes;
      double spent = 0.0;
      double reading = 0.0;  // tokens a second on the way to this depth
    };
    std::vector<Runner> runners;
    for (const auto& contestant : contestants) {
      if (contestant->out || (contestant->attention == "full" && depth > options_.full_depth)) continue;
      const double resident = contestant->resident;
      bool reached = true;
      double reading = 0.0;
      Booked(*contestant, [&] {
        contestant->Start(depth + options_.prompt + 64 * options_.tokens);
        const auto start = std::chrono::steady_clock::now();
        constexpr size_t kStretch = 2048;
        for (size_t i = 0; i < text.size() && reached; i += kStretch) {
          contestant->Read(std::span(text).subspan(i, std::min(kStretch, text.size() - i)));
          const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
          reached = spent < options_.seconds || i + kStretch >= text.size();
          reading = static_cast<double>(std::min(text.size(), i + kStretch)) / spent;
        }
        contestant->Mark();
      });
      if (!reached) {
        std::fprintf(stderr, "latte: %s (%s) can't reach depth %lld within %.0f seconds: skipped\n", contestant->engine.c_str(),
                     contestant->attention.c_str(), static_cast<long long>(depth), options_.seconds);
        contestant->Stop();
        contestant->resident = resident;
        contestant->out = true;
        continue;
      }
      runners.push_back({contestant.get(), {}, {}, 0.0, reading});
    }
    for (const int64_t batch : options_.batches) {
      for (Runner& runner : runners) {
        runner.contestant->batch = batch;
        runner.reads.clear();
        runner.writes.clear();
        runner.spent = 0.0;
      }
      // In turns, so that a machine whose speed changes meanwhile changes it for all of them.
      for (int round = 0; round < 24; ++round) {
        bool any = false;
        for (Runner& runner : runners) {
          if (round >= 3 && runner.spent > options_.budget) continue;
          if (batch > 1 && runner.contestant->engine != "latte") continue;
          any = true;
          Contestant& contestant = *runner.contestant;
          Booked(contestant, [&] {
            contestant.GoBack();
            if (batch == 1) {
              const double read = SecondsOf([&] { contestant.Read(prompt); });
              if (round > 0) runner.reads.push_back(read);
              runner.spent += read;
              contestant.GoBack();
            }
            contestant.Write(prompt[0]);  // buffers are made anew after a prompt
            const double written = SecondsOf([&] {
              for (int64_t i = 0; i < options_.tokens; ++i) contestant.Write(prompt[static_cast<size_t>(i) % prompt.size()]);
            });
            if (round > 0) runner.writes.push_back(written);
            runner.spent += written;
          });
        }
        if (!any) break;
      }
      for (Runner& runner : runners) {
        if (!runner.writes.empty()) Report(*runner.contestant, depth, runner.reads, runner.writes, runner.reading);
      }
    }
    for (Runner& runner : runners) Booked(*runner.contestant, [&] { runner.contestant->Stop(); });
  }

  void Report(const Contestant& contestant, int64_t depth, const std::vector<double>& reads, const std::vector<double>& writes,
              double reading) {
    const double prefill = reads.empty() ? 0.0 : static_cast<double>(options_.prompt) / Median(reads);
    const double decode = static_cast<double>(options_.tokens * contestant.batch) / Median(writes);
    nlohmann::json row = {{"engine", contestant.engine},
                          {"attention", contestant.attention},
                          {"type", type_},
                          {"depth", depth},
                          {"batch", contestant.batch},
                          {"decode_tokens_per_second", decode},
                          {"resident_mb", contestant.resident}};
    if (!reads.empty()) row["prefill_tokens_per_second"] = prefill;
    if (depth > 0) row["reading_tokens_per_second"] = reading;
    if (contestant.engine == "latte") row["state_mb"] = contestant.StateMegabytes();
    if (contestant.attention == "macchiato") row["latents_trained"] = !options_.adapter.empty();
    if (!options_.json) {
      std::printf("%-10s %-10s %-6s %8lld %6lld %16.1f %16.1f %12.1f %10.2f\n", contestant.engine.c_str(),
                  contestant.attention.c_str(), type_.c_str(), static_cast<long long>(depth),
                  static_cast<long long>(contestant.batch), prefill, decode, contestant.resident, contestant.StateMegabytes());
      std::fflush(stdout);
    }
    rows_.push_back(std::move(row));
  }

  Options options_;
  int threads_;
  int64_t vocabulary_ = 20000;
  std::string type_;
  nlohmann::json rows_ = nlohmann::json::array();
};

}  // namespace

void AddBenchDecode(CLI::App& bench, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = bench.add_subcommand(
      "decode", "Tokens a second, reading and writing, at growing depths, beside llama.cpp on the same file");
  command->add_option("--model", options->model, "GGUF file")->required();
  command->add_option("--adapter", options->adapter,
                      "Adapter of the converted model; without it, random latents, which cost the same");
  command->add_option("--depths", options->depths, "Tokens read before")->delimiter(',')->check(CLI::Range(0, 1 << 24));
  command->add_option("--types", options->types, "Weight types, such as Q4_1,Q4_0,BF16; made from the file")->delimiter(',');
  command->add_option("--engines", options->engines, "Whom to measure")
      ->delimiter(',')
      ->check(CLI::IsMember({"latte", "llama.cpp"}));
  command->add_option("--attention", options->attention, "latte's")
      ->delimiter(',')
      ->check(CLI::IsMember({"macchiato", "window", "full"}));
  command->add_option("--batch", options->batches, "Sessions in one step (latte)")->delimiter(',')->check(CLI::Range(1, 512));
  command->add_option("--window", options->window, "Without an adapter: tokens of standard attention")
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--sinks", options->sinks, "Likewise: first tokens that stay readable")->check(CLI::Range(0, 1024));
  command->add_option("--latents", options->latents, "Likewise: latents a key-value head")->check(CLI::Range(1, 4096));
  command->add_option("--prompt", options->prompt, "Tokens read at each depth")->check(CLI::Range(1, 1 << 16));
  command->add_option("--tokens", options->tokens, "Tokens written at each depth, a round")->check(CLI::Range(1, 1 << 16));
  command->add_option("--full-depth", options->full_depth, "Greatest depth of attention that reads everything");
  command->add_option("--seconds", options->seconds, "Longest way to a depth; who needs longer drops out");
  command->add_option("--threads", options->threads, "0: one a CPU")->check(CLI::Range(0, 1024));
  command->add_flag("--json", options->json, "One JSON object");
  command->callback([options, &exit_code] {
    const nlohmann::json result = Bench(*options).Run();
    if (options->json) std::printf("%s\n", result.dump(1).c_str());
    exit_code = 0;
  });
}

}  // namespace latte::cli
