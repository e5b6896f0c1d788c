// latte bench distributed: what training on several ranks sends and waits for, measured on those that torchrun has started, and
// the model of how it scales beside ring attention's.
#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/torch_bench_distributed.h"
#include "models/language_model.h"
#include "train/optimizer.h"
#include "train/options.h"
#include "train/ranks.h"

namespace latte::cli {
namespace {

using nlohmann::json;

struct Options {
  std::string attention = "macchiato";
  int64_t layers = 4, embed_dim = 256, heads = 4, kv_heads = 0, latents = 0, window = 128, vocabulary = 256;
  int64_t context = 4096, batch = 2, sequence_parallel = 1, steps = 10, tokens = 100'000'000;
  std::vector<int64_t> ranks = {2, 4, 8, 16, 64, 256, 1024};
  int threads = 0;
  bool json = false;
};

// What one layer sends for one sequence.
struct Sizes {
  double state;  // bytes: a key-value head's L (D + 3) float32, all heads together
  double edge;   // the window's last keys and values, the convolution's last inputs, in float32
  double token;  // keys and values of a token in bfloat16: what ring attention passes on
};

Sizes SizesOf(const formats::LanguageModelConfig& config) {
  const auto head_dim = static_cast<double>(config.embed_dim) / static_cast<double>(config.num_heads);
  const auto kv_heads = static_cast<double>(config.num_kv_heads.value_or(config.num_heads));
  const double latents = static_cast<double>(config.num_latents.value_or(config.embed_dim / config.num_heads));
  Sizes sizes{kv_heads * latents * (head_dim + 3) * 4, 0, kv_heads * 2 * head_dim * 2};
  if (config.attention == "window") sizes.state = 0;
  if (config.attention != "latte") sizes.edge += static_cast<double>(config.window) * kv_heads * 2 * head_dim * 4;
  if (config.position_name() == "conv") sizes.edge += static_cast<double>((config.conv_width - 1) * config.embed_dim) * 4;
  return sizes;
}

// Messages of an exclusive scan, all ranks together: one to the next, then over doubling distances (nn/sequence_peers.h).
int64_t ScanMessages(int64_t ranks) {
  int64_t messages = ranks - 1;
  for (int64_t distance = 1; distance < ranks - 1; distance *= 2) messages += ranks - 1 - distance;
  return messages;
}

// The most that one rank sends.
int64_t ScanRounds(int64_t ranks) {
  int64_t rounds = 1;
  for (int64_t distance = 1; distance < ranks - 1; distance *= 2) ++rounds;
  return ranks > 1 ? rounds : 0;
}

// Forward and backward, a layer, a sequence of `tokens`, in bytes that a rank sends.
json Model(const Sizes& sizes, int64_t ranks, int64_t tokens) {
  const auto rounds = static_cast<double>(ScanRounds(ranks));
  const double latent = 2 * (rounds * sizes.state + sizes.edge);
  // Keys and values of a stretch go once around, backwards together with their gradients.
  const double ring = 3 * static_cast<double>(ranks - 1) / static_cast<double>(ranks) * static_cast<double>(tokens) * sizes.token;
  return {{"ranks", ranks},     {"tokens_a_rank", tokens / ranks},  {"messages", 2 * ScanRounds(ranks)}, {"latent_bytes", latent},
          {"ring_bytes", ring}, {"ring_over_latent", ring / latent}};
}

std::string Bytes(double bytes) {
  const char* units[] = {"B", "kB", "MB", "GB", "TB", "PB"};
  size_t unit = 0;
  while (bytes >= 999.5 && unit + 1 < std::size(units)) bytes /= 1000, ++unit;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 || bytes >= 99.95 ? "%.0f %s" : "%.1f %s", bytes, units[unit]);
  return text;
}

json Measure(const Options& options, const formats::LanguageModelConfig& config, train::Ranks& ranks) {
  using Clock = std::chrono::steady_clock;
  torch::manual_seed(1);
  models::LanguageModel model(config);
  model->sequence_peers = ranks.sequence_peers();
  train::AdamW::NamedTensors named;
  std::vector<at::Tensor> parameters;
  for (const auto& item : model->named_parameters()) {
    named.emplace_back(item.key(), item.value());
    parameters.push_back(item.value());
  }
  train::AdamW optimizer(named, {});
  ranks.watch(parameters);
  const at::Tensor text = at::randint(config.vocab_size, {options.batch, options.context + 1}, at::kLong);
  const TokenBatch batch = ranks.share({text.slice(1, 0, -1), text.slice(1, 1)});

  std::vector<double> steps;
  int64_t sent = 0;
  constexpr int64_t kWarmUp = 2;
  for (int64_t step = 0; step < options.steps + kWarmUp; ++step) {
    if (step == kWarmUp) {
      ranks.barrier();
      ranks.traffic().clear();
      sent = train::Ranks::tcp_bytes_sent();
    }
    const auto start = Clock::now();
    optimizer.zero_grad();
    const at::Tensor loss = torch::nn::functional::cross_entropy(model(batch.x).flatten(0, 1), batch.y.flatten());
    ranks.average_gradients(loss);
    loss.backward();
    ranks.gradients_arrived();
    optimizer.step(1e-4, step + 1);
    if (step >= kWarmUp) steps.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  sent = train::Ranks::tcp_bytes_sent() - sent;
  double seconds = 0;
  for (const double step : steps) seconds += step;
  const train::RanksTraffic& traffic = ranks.traffic();
  // Means over ranks and steps.
  std::vector<double> means =
      ranks.sum({seconds, traffic.gradient_seconds, traffic.sequence_seconds, static_cast<double>(traffic.gradient_bytes),
                 static_cast<double>(traffic.sequence_bytes), static_cast<double>(traffic.messages), static_cast<double>(sent),
                 static_cast<double>(traffic.buckets), static_cast<double>(traffic.early_buckets)});
  for (double& mean : means) mean /= static_cast<double>(ranks.size() * options.steps);
  const Sizes sizes = SizesOf(config);
  const int64_t stretches = ranks.sequence_parallel();
  const double sequences = static_cast<double>(options.batch * options.layers) / static_cast<double>(ranks.data_parallel());
  const double expected =
      2 * sequences *
      (static_cast<double>(ScanMessages(stretches)) * sizes.state + static_cast<double>(stretches - 1) * sizes.edge) /
      static_cast<double>(stretches);
  return {{"ranks", ranks.size()},
          {"sequence_parallel", stretches},
          {"data_parallel", ranks.data_parallel()},
          {"parameters", config.parameter_count()},
          {"threads", at::get_num_threads()},
          {"step_seconds", means[0]},
          {"compute_seconds", means[0] - means[1] - means[2]},
          {"gradient_wait_seconds", means[1]},
          {"sequence_wait_seconds", means[2]},
          {"gradient_bytes", means[3]},
          {"sequence_bytes", means[4]},
          {"sequence_bytes_by_the_model", expected},
          {"sequence_messages", means[5]},
          {"tcp_bytes", means[6]},
          {"buckets", means[7]},
          {"early_buckets", means[8]}};
}

void Print(const json& report) {
  const json& shape = report.at("shape");
  std::printf("%s, %lld layers of width %lld, %lld key-value heads of %lld, %lld latents, window %lld\n",
              shape.at("attention").get<std::string>().c_str(), shape.at("layers").get<long long>(),
              shape.at("embed_dim").get<long long>(), shape.at("kv_heads").get<long long>(),
              shape.at("head_dim").get<long long>(), shape.at("latents").get<long long>(), shape.at("window").get<long long>());
  if (report.contains("measured")) {
    const json& measured = report.at("measured");
    const auto number = [&](const char* field) { return measured.at(field).get<double>(); };
    std::printf("\nmeasured on %lld ranks (%lld data parallel x %lld sequence parallel), %lld x %lld tokens a step\n",
                measured.at("ranks").get<long long>(), measured.at("data_parallel").get<long long>(),
                measured.at("sequence_parallel").get<long long>(), shape.at("batch").get<long long>(),
                shape.at("context").get<long long>());
    std::printf("  a step              %9.1f ms\n", 1e3 * number("step_seconds"));
    std::printf("  computing           %9.1f ms\n", 1e3 * number("compute_seconds"));
    std::printf("  waiting, gradients  %9.1f ms   (what the backward pass did not cover)\n",
                1e3 * number("gradient_wait_seconds"));
    std::printf("  buckets             %9.0f, of which %.0f set off before the pass had its last gradient\n", number("buckets"),
                number("early_buckets"));
    std::printf("  waiting, sequences  %9.1f ms   (slower ranks included)\n", 1e3 * number("sequence_wait_seconds"));
    std::printf("  sent a rank         %9s gradients, %s states and edges (by the model %s) in %.0f messages; TCP %s\n",
                Bytes(number("gradient_bytes")).c_str(), Bytes(number("sequence_bytes")).c_str(),
                Bytes(number("sequence_bytes_by_the_model")).c_str(), number("sequence_messages"),
                Bytes(number("tcp_bytes")).c_str());
  }
  std::printf("\na sequence of %lld tokens, on paper: what a rank sends a layer, forward and backward\n",
              report.at("tokens").get<long long>());
  std::printf("  state %s, edge %s, whatever the length; ring attention: keys and values in bfloat16\n",
              Bytes(report.at("state_bytes").get<double>()).c_str(), Bytes(report.at("edge_bytes").get<double>()).c_str());
  std::printf("  %6s %13s %9s %10s %10s %10s\n", "ranks", "tokens a rank", "messages", "latents", "ring", "ratio");
  for (const json& row : report.at("model")) {
    std::printf("  %6lld %13lld %9lld %10s %10s %9.3gx\n", row.at("ranks").get<long long>(),
                row.at("tokens_a_rank").get<long long>(), row.at("messages").get<long long>(),
                Bytes(row.at("latent_bytes").get<double>()).c_str(), Bytes(row.at("ring_bytes").get<double>()).c_str(),
                row.at("ring_over_latent").get<double>());
  }
}

formats::LanguageModelConfig ConfigOf(const Options& options) {
  formats::LanguageModelConfig config;
  config.vocab_size = options.vocabulary;
  config.num_layers = options.layers;
  config.embed_dim = options.embed_dim;
  config.num_heads = options.heads;
  if (options.kv_heads > 0) config.num_kv_heads = options.kv_heads;
  if (options.latents > 0) config.num_latents = options.latents;
  config.attention = options.attention;
  config.window = options.window;
  config.validate();
  return config;
}

int BenchDistributed(const Options& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  std::unique_ptr<train::Ranks> ranks;
  formats::LanguageModelConfig config;
  json report;
  try {
    config = ConfigOf(options);
    ranks = train::Ranks::from_environment({.sequence_parallel = options.sequence_parallel});
    if (ranks) ranks->check_divides(options.batch, options.context);
    const Sizes sizes = SizesOf(config);
    report = {{"shape",
               {{"attention", config.attention},
                {"layers", config.num_layers},
                {"embed_dim", config.embed_dim},
                {"kv_heads", config.num_kv_heads.value_or(config.num_heads)},
                {"head_dim", config.embed_dim / config.num_heads},
                {"latents", config.num_latents.value_or(config.embed_dim / config.num_heads)},
                {"window", config.window},
                {"batch", options.batch},
                {"context", options.context}}},
              {"tokens", options.tokens},
              {"state_bytes", sizes.state},
              {"edge_bytes", sizes.edge},
              {"model", json::array()}};
    for (const int64_t count : options.ranks) report["model"].push_back(Model(sizes, count, options.tokens));
  } catch (const train::OptionError& error) {
    throw CLI::ValidationError("bench distributed", error.what());
  } catch (const formats::ConfigError& error) {
    throw CLI::ValidationError("bench distributed", error.what());
  }
  if (ranks) {
    try {
      report["measured"] = Measure(options, config, *ranks);
      ranks->finish();
    } catch (...) {
      ranks->explain_failure();
    }
    if (!ranks->leads()) return 0;
  }
  if (options.json) {
    std::printf("%s\n", report.dump(2).c_str());
  } else {
    Print(report);
  }
  return 0;
}

}  // namespace

void AddBenchDistributed(CLI::App& bench, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      bench.add_subcommand("distributed", "What training on several ranks sends and waits for, and how that scales");
  const auto number = [&](const char* flag, int64_t& value, const char* help) {
    command->add_option(flag, value, help)->check(CLI::Range(int64_t{1}, int64_t{1} << 40))->capture_default_str();
  };
  command->add_option("--attention", options->attention, "What reads the past")
      ->check(CLI::IsMember({"macchiato", "latte", "window"}))
      ->capture_default_str();
  number("--layers", options->layers, "Blocks");
  number("--embed-dim", options->embed_dim, "Size of the residual stream");
  number("--heads", options->heads, "Query heads");
  command->add_option("--kv-heads", options->kv_heads, "Key-value heads; by default as many")->check(CLI::PositiveNumber);
  command->add_option("--latents", options->latents, "Latents a head; by default the head's size")->check(CLI::PositiveNumber);
  number("--window", options->window, "Tokens of standard attention");
  number("--context", options->context, "Tokens a sequence, measured");
  number("--batch", options->batch, "Sequences a step, all ranks together");
  number("--sequence-parallel", options->sequence_parallel, "Ranks that share a sequence");
  number("--steps", options->steps, "Steps to measure");
  number("--tokens", options->tokens, "Tokens of the sequence on paper");
  command->add_option("--ranks", options->ranks, "Ranks on paper")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "Threads a rank (torch's own setting unless given)")
      ->check(CLI::PositiveNumber);
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(
      "Without torchrun only the model is printed.\n\n"
      "Examples:\n  latte bench distributed --latents 128 --tokens 1000000\n"
      "  torchrun --no-python --nproc-per-node 2 latte bench distributed --sequence-parallel 2 --context 32768 --batch 1");
  command->callback([options, &exit_code] { exit_code = BenchDistributed(*options); });
}

}  // namespace latte::cli
