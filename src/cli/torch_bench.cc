// latte bench attention: latent attention beside torch's scaled_dot_product_attention, in one process and one run.
#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/torch_bench_distributed.h"
#include "cli/torch_commands.h"
#include "kernels/limits.h"
#include "ops/ops.h"

namespace latte::cli {
namespace {

struct Options {
  std::vector<int64_t> tokens = {128, 512, 2048, 8192, 32768, 65536};
  std::vector<std::string> attention = {"causal", "bidirectional", "macchiato"};
  std::vector<std::string> dtypes = {"float32", "bfloat16"};
  int64_t batch = 1, heads = 8, kv_heads = 0, head_dim = 64, latents = 64, window = 128;
  int threads = 0;
  double rival_seconds = 40.0;
  double repeat_seconds = 0.5;
  double total_seconds = 540.0;
  bool json = false;
};

double Seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Something to time, and the seconds its runs took.
struct Contestant {
  std::function<void()> work;
  std::vector<double> runs = {};
  double spent = 0.0;

  double Median() {
    std::nth_element(runs.begin(), runs.begin() + static_cast<std::ptrdiff_t>(runs.size() / 2), runs.end());
    return runs[runs.size() / 2];
  }
};

// Times each contestant for about `budget` seconds, at least three runs, in turns: whoever has had the least time is next, so
// that a machine whose speed changes meanwhile changes it for all of them. A first run that isn't counted warms up, unless it
// takes longer than the budget: then it is the only one.
void Race(std::vector<Contestant*> contestants, double budget) {
  for (Contestant* contestant : contestants) {
    const double first = Seconds(contestant->work);
    if (first <= budget) continue;
    contestant->runs.push_back(first);
    contestant->spent = budget;
  }
  std::erase_if(contestants, [](const Contestant* contestant) { return !contestant->runs.empty(); });
  const auto done = [budget](const Contestant* contestant) {
    return contestant->spent >= budget && contestant->runs.size() >= 3;
  };
  while (true) {
    std::erase_if(contestants, done);
    if (contestants.empty()) return;
    Contestant* next = *std::min_element(contestants.begin(), contestants.end(),
                                         [](const Contestant* a, const Contestant* b) { return a->spent < b->spent; });
    next->runs.push_back(Seconds(next->work));
    next->spent += next->runs.back();
  }
}

// Which rows of the rival there is time for: our own are measured in any case, and their share of the total is kept free.
class RivalTime {
 public:
  explicit RivalTime(const Options& options) : options_(options) {
    const size_t passes = 2, rows = options.tokens.size() * options.attention.size() * options.dtypes.size() * passes;
    own_rows_ = static_cast<int64_t>(rows);
  }

  void OwnRowsDone(size_t count) {
    own_rows_ -= static_cast<int64_t>(count);
    admitted_ = 0.0;
  }

  // Why a row that may take `expected` seconds (none: nothing is known of it) isn't run; empty where it is.
  std::string WhyNot(std::optional<double> expected) {
    if (expected && *expected > options_.rival_seconds) return Skipped("over", options_.rival_seconds);
    const double turn = 2 * options_.repeat_seconds;  // a measurement of something short, with its warming up
    constexpr double kRuns = 2.0;                     // timed, and once more for its memory
    const double needed = std::max(kRuns * expected.value_or(0.0), turn) + turn * static_cast<double>(own_rows_);
    if (spent() + admitted_ + needed > options_.total_seconds) return Skipped("no time left of", options_.total_seconds);
    admitted_ += kRuns * expected.value_or(0.0);
    return "";
  }

 private:
  static std::string Skipped(const char* why, double seconds) {
    char text[64];
    std::snprintf(text, sizeof text, "sdpa skipped: %s %g s", why, seconds);
    return text;
  }
  double spent() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

  const Options& options_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  int64_t own_rows_;
  double admitted_ = 0.0;  // seconds of rivals that were let in and haven't run
};

// Peak of what torch's CPU allocator hands out on this thread, above what it held at the start.
class MemoryMeter : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    held_ += size;
    peak_ = std::max(peak_, held_);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t peak() const { return peak_; }

 private:
  int64_t held_ = 0, peak_ = 0;
};

int64_t PeakBytes(const std::function<void()>& work) {
  const auto meter = std::make_shared<MemoryMeter>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, meter);
  work();
  return meter->peak();
}

struct Limits {
  double flops = 0.0;      // a second, fused multiply-adds on all threads
  double bandwidth = 0.0;  // bytes a second, reading
};

Limits MeasureLimits() {
  const int threads = at::get_num_threads();
  const at::Tensor block = at::ones({64 << 20});  // 256 MiB: no cache holds it
  Limits limits;
  for (int repeat = 0; repeat < 3; ++repeat) {
    std::vector<int64_t> operations(static_cast<size_t>(threads));
    const double busy = Seconds([&] {
      at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) operations[static_cast<size_t>(i)] = kernels::RunMultiplyAdds(20'000'000);
      });
    });
    double total = 0.0;
    for (const int64_t count : operations) total += static_cast<double>(count);
    limits.flops = std::max(limits.flops, total / busy);
    const double reading = Seconds([&] {
      at::parallel_for(0, block.numel(), block.numel() / threads, [&](int64_t begin, int64_t end) {
        kernels::ReadMemory(block.const_data_ptr<float>() + begin, end - begin);
      });
    });
    limits.bandwidth = std::max(limits.bandwidth, static_cast<double>(block.nbytes()) / reading);
  }
  return limits;
}

// Tensors of one length, and the work to time on them.
struct Problem {
  Problem(const Options& options, int64_t tokens, at::ScalarType dtype) : options(options), tokens(tokens) {
    const auto draw = [&](int64_t heads, int64_t size) {
      return at::randn({options.batch, tokens, heads, size}, at::TensorOptions().dtype(dtype));
    };
    query_logits = draw(options.heads, options.latents);
    gated_logits = draw(options.heads, options.latents + 1);
    key_logits = draw(options.kv_heads, options.latents);
    values = draw(options.kv_heads, options.head_dim);
    query = draw(options.heads, options.head_dim);
    key = draw(options.kv_heads, options.head_dim);
    grad_out = draw(options.heads, options.head_dim);
  }

  std::vector<at::Tensor*> Inputs() { return {&query_logits, &gated_logits, &key_logits, &values, &query, &key}; }
  void RequireGrad(bool required) {
    for (at::Tensor* input : Inputs()) input->requires_grad_(required);
  }
  void ClearGradients() {
    for (at::Tensor* input : Inputs()) input->mutable_grad() = at::Tensor();
  }

  at::Tensor Latent(const std::string& attention) const {
    if (attention == "causal") return std::get<0>(causal_attention(query_logits, key_logits, values));
    if (attention == "bidirectional") return bidirectional_attention(query_logits, key_logits, values);
    MacchiatoAttentionOptions macchiato;
    macchiato.window = options.window;
    return std::get<0>(macchiato_attention(query, key, values, gated_logits, key_logits, macchiato));
  }
  at::Tensor Sdpa(bool causal) const {
    // Heads first is what it wants; the transposed views are free.
    return at::scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), values.transpose(1, 2), {}, 0.0, causal,
                                            std::nullopt, options.heads != options.kv_heads)
        .transpose(1, 2);
  }
  void Run(const std::function<at::Tensor()>& forward, bool backward) {
    if (!backward) {
      const at::NoGradGuard no_grad;
      forward();
      return;
    }
    ClearGradients();
    forward().backward(grad_out);
  }

  const Options& options;
  int64_t tokens;
  at::Tensor query_logits, gated_logits, key_logits, values, query, key, grad_out;
};

struct Row {
  std::string attention, dtype, pass;
  int64_t tokens = 0;
  double seconds = 0.0;
  std::optional<double> sdpa_seconds;
  std::string sdpa_note;  // why there is none
  double flops = 0.0, bytes = 0.0;
  int64_t peak_bytes = 0;
  std::optional<int64_t> sdpa_peak_bytes;
};

// Floating-point operations of the chunked form with chunks of 32, and the bytes it must read and write. A backward pass counts
// as two and a half forward passes of arithmetic, as in FlashAttention's benchmarks (Dao 2023, arXiv 2307.08691, section 4.1); it
// reads what went in and the gradient of what came out, and writes a gradient of each input.
void CountWork(const Options& options, Row& row, size_t element) {
  const double l = static_cast<double>(options.latents), d = static_cast<double>(options.head_dim);
  const double places = static_cast<double>(options.batch * row.tokens);
  double flops = 4 * l * d;
  if (row.attention != "bidirectional") flops += 32 * (l + d);
  if (row.attention == "macchiato")
    flops += 2 * std::min<double>(static_cast<double>(options.window), static_cast<double>(row.tokens)) * 2 * d;
  const bool backward = row.pass != "forward";
  row.flops = places * static_cast<double>(options.heads) * flops * (backward ? 3.5 : 1.0);
  double inputs = static_cast<double>(options.heads) * l + static_cast<double>(options.kv_heads) * (l + d);
  if (row.attention == "macchiato") inputs += static_cast<double>(options.heads + options.kv_heads) * d;
  const double outputs = static_cast<double>(options.heads) * d;
  row.bytes = places * static_cast<double>(element) * (backward ? 3 * inputs + 2 * outputs : inputs + outputs);
}

nlohmann::json ToJson(const Row& row, const Limits& limits) {
  nlohmann::json json = {{"attention", row.attention},
                         {"dtype", row.dtype},
                         {"pass", row.pass},
                         {"tokens", row.tokens},
                         {"milliseconds", row.seconds * 1e3},
                         {"peak_memory_mb", static_cast<double>(row.peak_bytes) / 1e6}};
  json["sdpa_milliseconds"] = row.sdpa_seconds ? nlohmann::json(*row.sdpa_seconds * 1e3) : nlohmann::json(nullptr);
  json["speedup"] = row.sdpa_seconds ? nlohmann::json(*row.sdpa_seconds / row.seconds) : nlohmann::json(nullptr);
  json["sdpa_peak_memory_mb"] =
      row.sdpa_peak_bytes ? nlohmann::json(static_cast<double>(*row.sdpa_peak_bytes) / 1e6) : nlohmann::json(nullptr);
  if (!row.sdpa_note.empty()) json["sdpa_note"] = row.sdpa_note;
  json["gflops"] = row.flops / row.seconds / 1e9;
  json["fma_fraction"] = row.flops / row.seconds / limits.flops;
  json["bandwidth_fraction"] = row.bytes / row.seconds / limits.bandwidth;
  return json;
}

void PrintHeader(const Options& options, const Limits& limits) {
  std::printf("torch %s, %d threads; batch %ld, %ld heads (%ld key-value), head size %ld, %ld latents a head, window %ld\n",
              TORCH_VERSION, at::get_num_threads(), static_cast<long>(options.batch), static_cast<long>(options.heads),
              static_cast<long>(options.kv_heads), static_cast<long>(options.head_dim), static_cast<long>(options.latents),
              static_cast<long>(options.window));
  std::printf("limits measured here: %.0f GFLOP/s of float32 multiply-adds, %.1f GB/s reading\n", limits.flops / 1e9,
              limits.bandwidth / 1e9);
  std::printf(
      "memory is the peak of torch's allocator above the inputs: outputs, gradients and what backward needs; a kernel's own "
      "scratch (some MB a thread, whatever the length) comes on top\n\n");
  std::printf("%-14s %-9s %-18s %7s %11s %11s %9s %6s %6s %9s %9s\n", "attention", "dtype", "pass", "tokens", "latte ms",
              "sdpa ms", "faster", "fma", "read", "latte MB", "sdpa MB");
}

void Print(const Row& row, const Limits& limits) {
  char sdpa[32] = "-", faster[32] = "-", fma[16] = "", read[16] = "", sdpa_memory[32] = "-";
  if (row.sdpa_seconds) {
    std::snprintf(sdpa, sizeof sdpa, "%.2f", *row.sdpa_seconds * 1e3);
    std::snprintf(faster, sizeof faster, "%.1fx", *row.sdpa_seconds / row.seconds);
  }
  if (row.sdpa_peak_bytes) {
    std::snprintf(sdpa_memory, sizeof sdpa_memory, "%.1f", static_cast<double>(*row.sdpa_peak_bytes) / 1e6);
  }
  std::snprintf(fma, sizeof fma, "%.0f%%", 100 * row.flops / row.seconds / limits.flops);
  std::snprintf(read, sizeof read, "%.0f%%", 100 * row.bytes / row.seconds / limits.bandwidth);
  std::printf("%-14s %-9s %-18s %7ld %11.3f %11s %9s %6s %6s %9.1f %9s  %s\n", row.attention.c_str(), row.dtype.c_str(),
              row.pass.c_str(), static_cast<long>(row.tokens), row.seconds * 1e3, sdpa, faster, fma, read,
              static_cast<double>(row.peak_bytes) / 1e6, sdpa_memory, row.sdpa_note.c_str());
  std::fflush(stdout);
}

// The slope of log time, or memory, over log tokens between the two longest rows that a series has.
std::optional<double> Exponent(const std::vector<std::pair<int64_t, double>>& series) {
  if (series.size() < 2) return std::nullopt;
  const auto& [t0, s0] = series[series.size() - 2];
  const auto& [t1, s1] = series.back();
  if (s0 <= 0 || s1 <= 0) return std::nullopt;
  return std::log(s1 / s0) / std::log(static_cast<double>(t1) / static_cast<double>(t0));
}

// Each once, in the order of their first appearance.
void KeepFirst(std::vector<std::string>& names) {
  std::vector<std::string> kept;
  for (const std::string& name : names) {
    if (std::find(kept.begin(), kept.end(), name) == kept.end()) kept.push_back(name);
  }
  names = std::move(kept);
}

// Microseconds a head and token of decoding, through the operator.
double StepMicroseconds(const Options& options) {
  const at::InferenceMode inference;
  Problem problem(options, 1, at::kFloat);
  CausalAttentionOptions step;
  step.output_final_state = true;
  const auto read = [&] { return std::get<1>(causal_attention(problem.query_logits, problem.key_logits, problem.values, step)); };
  step.initial_state = read();
  const int steps = 2000;
  Contestant decoding{[&] {
    for (int i = 0; i < steps; ++i) step.initial_state = read();
  }};
  Race({&decoding}, 1.0);
  return decoding.Median() / steps / static_cast<double>(options.heads * options.batch) * 1e6;
}

int BenchAttention(const Options& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  RivalTime time(options);
  const Limits limits = MeasureLimits();
  if (!options.json) PrintHeader(options, limits);
  nlohmann::json rows = nlohmann::json::array(), exponents = nlohmann::json::array();
  for (const std::string& dtype_name : options.dtypes) {
    const at::ScalarType dtype = dtype_name == "float32" ? at::kFloat : dtype_name == "bfloat16" ? at::kBFloat16 : at::kHalf;
    for (const bool backward : {false, true}) {
      std::map<std::string, std::vector<std::pair<int64_t, double>>> series, memory;
      std::map<bool, std::pair<int64_t, double>> rival_last;  // causal or not: the longest run so far
      for (const int64_t tokens : options.tokens) {
        Problem problem(options, tokens, dtype);
        problem.RequireGrad(backward);
        std::map<std::string, Contestant> ours;
        std::map<bool, Contestant> rivals;  // causal or not
        std::map<bool, std::string> note;
        for (const std::string& attention : options.attention) {
          ours[attention].work = [&, attention] { problem.Run([&] { return problem.Latent(attention); }, backward); };
          const bool causal = attention != "bidirectional";
          const auto last = rival_last.find(causal);
          std::optional<double> expected;
          if (last != rival_last.end()) {
            const double ratio = static_cast<double>(tokens) / static_cast<double>(last->second.first);
            expected = last->second.second * ratio * ratio;
          }
          if (note.contains(causal)) continue;
          note[causal] = time.WhyNot(expected);
          if (note[causal].empty()) {
            rivals[causal].work = [&, causal] { problem.Run([&] { return problem.Sdpa(causal); }, backward); };
          }
        }
        std::vector<Contestant*> contestants;
        for (auto& [attention, contestant] : ours) contestants.push_back(&contestant);
        for (auto& [causal, contestant] : rivals) contestants.push_back(&contestant);
        Race(contestants, options.repeat_seconds);
        std::map<bool, int64_t> rival_bytes;
        for (auto& [causal, contestant] : rivals) {
          const std::string name = causal ? "sdpa" : "sdpa bidirectional";
          rival_last[causal] = {tokens, contestant.Median()};
          series[name].emplace_back(tokens, contestant.Median());
          problem.ClearGradients();  // what was allocated outside the meter mustn't be freed inside
          rival_bytes[causal] = PeakBytes(contestant.work);
          memory[name].emplace_back(tokens, static_cast<double>(rival_bytes[causal]));
        }
        for (const std::string& attention : options.attention) {
          Row row{attention, dtype_name, backward ? "forward + backward" : "forward", tokens};
          const bool causal = attention != "bidirectional";
          row.seconds = ours[attention].Median();
          problem.ClearGradients();
          row.peak_bytes = PeakBytes(ours[attention].work);
          memory[attention].emplace_back(tokens, static_cast<double>(row.peak_bytes));
          if (rivals.count(causal)) {
            row.sdpa_seconds = rivals[causal].Median();
            row.sdpa_peak_bytes = rival_bytes[causal];
          }
          row.sdpa_note = note[causal];
          CountWork(options, row, dtype == at::kFloat ? 4 : 2);
          series[attention].emplace_back(tokens, row.seconds);
          rows.push_back(ToJson(row, limits));
          if (!options.json) Print(row, limits);
        }
        time.OwnRowsDone(options.attention.size());
      }
      for (const auto& [name, points] : series) {
        const std::optional<double> exponent = Exponent(points), of_memory = Exponent(memory[name]);
        if (!exponent) continue;
        exponents.push_back({{"attention", name},
                             {"dtype", dtype_name},
                             {"pass", backward ? "forward + backward" : "forward"},
                             {"exponent", *exponent},
                             {"memory_exponent", of_memory ? nlohmann::json(*of_memory) : nlohmann::json(nullptr)}});
        if (options.json) continue;
        std::printf("  time grows as tokens^%.2f, memory as tokens^%.2f: %s\n", *exponent, of_memory.value_or(NAN), name.c_str());
      }
    }
  }
  const double step = StepMicroseconds(options);
  if (options.json) {
    const nlohmann::json result = {
        {"torch", TORCH_VERSION},
        {"threads", at::get_num_threads()},
        {"batch", options.batch},
        {"heads", options.heads},
        {"kv_heads", options.kv_heads},
        {"head_dim", options.head_dim},
        {"latents", options.latents},
        {"window", options.window},
        {"limits", {{"fma_gflops", limits.flops / 1e9}, {"read_gb_per_second", limits.bandwidth / 1e9}}},
        {"rows", rows},
        {"exponents", exponents},
        {"step_microseconds_per_head", step}};
    std::printf("%s\n", result.dump(2).c_str());
  } else {
    std::printf("\none token of decoding: %.2f microseconds a head\n", step);
  }
  return 0;
}

}  // namespace

void AddBench(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* bench = app.add_subcommand("bench", "Measure speed and memory beside the peers");
  bench->require_subcommand(1);
  CLI::App* command = bench->add_subcommand("attention", "Latent attention beside torch's scaled_dot_product_attention");
  command->add_option("--tokens", options->tokens, "Sequence lengths")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--attention", options->attention, "Which to run")
      ->delimiter(',')
      ->check(CLI::IsMember({"causal", "bidirectional", "macchiato"}))
      ->capture_default_str();
  command->add_option("--dtypes", options->dtypes, "Element types")
      ->delimiter(',')
      ->check(CLI::IsMember({"float32", "bfloat16", "float16"}))
      ->capture_default_str();
  command->add_option("--batch", options->batch, "Sequences")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--heads", options->heads, "Query heads")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--kv-heads", options->kv_heads, "Key-value heads, a divisor of --heads; by default as many")
      ->check(CLI::PositiveNumber);
  command->add_option("--head-dim", options->head_dim, "Head size")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--latents", options->latents, "Latents a head")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--window", options->window, "Window of macchiato")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--threads", options->threads, "Threads (torch's own setting unless given)")->check(CLI::PositiveNumber);
  command->add_option("--rival-seconds", options->rival_seconds, "Skip a row of the rival that would take longer than this")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--total-seconds", options->total_seconds,
                   "Skip rows of the rival that there is no time for, of so much in all; our own rows are always measured")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--repeat-seconds", options->repeat_seconds, "Repeat each measurement for about this long")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(
      "Times are medians of runs in this process, which take turns. \"fma\" and \"read\" are shares of the limits measured at "
      "the start.\n\n"
      "Examples:\n  latte bench attention\n  latte bench attention --tokens 512,2048 --dtypes float32 --threads 2 --json");
  command->callback([options, &exit_code] {
    if (options->kv_heads == 0) options->kv_heads = options->heads;
    if (options->heads % options->kv_heads != 0) {
      throw CLI::ValidationError(
          "--kv-heads", std::to_string(options->kv_heads) + " is no divisor of --heads, " + std::to_string(options->heads));
    }
    // Lengths in ascending order, each row once: a series of two equal lengths has no slope.
    std::sort(options->tokens.begin(), options->tokens.end());
    options->tokens.erase(std::unique(options->tokens.begin(), options->tokens.end()), options->tokens.end());
    KeepFirst(options->attention);
    KeepFirst(options->dtypes);
    exit_code = BenchAttention(*options);
  });
  AddBenchDistributed(*bench, exit_code);
}

}  // namespace latte::cli
