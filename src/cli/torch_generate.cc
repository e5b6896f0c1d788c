// latte generate: text from a checkpoint of latte train, one token after the other through the model's decoding state.
#include <ATen/Parallel.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cli/torch_commands.h"
#include "formats/error.h"
#include "formats/mapped_file.h"
#include "train/decoder.h"
#include "train/interrupt.h"
#include "train/sampling.h"
#include "train/training_checkpoint.h"

namespace latte::cli {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string checkpoint;
  std::string prompt = "\n";
  std::string prompt_file;
  int64_t tokens = 500;
  train::SamplingOptions sampling;
  std::optional<int64_t> seed;
  int threads = 1;
  bool stats = false;
  bool json_output = false;
};

// The cost of a token and the size of the state, at positions a decade apart.
class CostMeter {
 public:
  struct Row {
    int64_t position = 0;
    int64_t tokens = 0;         // measured, the last before `position`
    double milliseconds = 0.0;  // a token, the median
    int64_t state_bytes = 0;
  };

  void Add(double milliseconds, const train::Decoder& decoder) {
    recent_[static_cast<size_t>(count_++) % recent_.size()] = milliseconds;
    if (decoder.position() < next_) return;
    rows_.push_back(Measure(decoder));
    while (next_ <= decoder.position()) next_ *= 10;
  }

  // At the end, unless a decade was reached just before.
  void Finish(const train::Decoder& decoder) {
    if (count_ == 0 || (!rows_.empty() && rows_.back().position > decoder.position() * 9 / 10)) return;
    rows_.push_back(Measure(decoder));
  }

  const std::vector<Row>& rows() const { return rows_; }

 private:
  Row Measure(const train::Decoder& decoder) const {
    const auto size = std::min(static_cast<size_t>(count_), recent_.size());
    std::vector<double> times(recent_.begin(), recent_.begin() + static_cast<std::ptrdiff_t>(size));
    const auto middle = times.begin() + static_cast<std::ptrdiff_t>(size / 2);
    std::nth_element(times.begin(), middle, times.end());
    return {decoder.position(), static_cast<int64_t>(size), *middle, decoder.state_bytes()};
  }

  std::vector<double> recent_ = std::vector<double>(100);
  std::vector<Row> rows_;
  int64_t count_ = 0;
  int64_t next_ = 100;
};

int64_t PeakBytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

void PrintStats(const std::vector<CostMeter::Row>& rows, int64_t tokens, double seconds, uint64_t seed) {
  std::fprintf(stderr, "\n%12s %14s %14s\n", "position", "ms a token", "state");
  for (const CostMeter::Row& row : rows) {
    std::fprintf(stderr, "%12lld %14.3f %10.1f KiB\n", static_cast<long long>(row.position), row.milliseconds,
                 static_cast<double>(row.state_bytes) / 1024);
  }
  std::fprintf(stderr, "%lld tokens in %.2f s (%.0f a second), peak memory %.0f MiB, seed %llu\n", static_cast<long long>(tokens),
               seconds, static_cast<double>(tokens) / std::max(seconds, 1e-9), static_cast<double>(PeakBytes()) / (1 << 20),
               static_cast<unsigned long long>(seed));
}

json ToJson(const std::vector<CostMeter::Row>& rows) {
  json array = json::array();
  for (const CostMeter::Row& row : rows) {
    array.push_back({{"position", row.position},
                     {"tokens", row.tokens},
                     {"milliseconds_per_token", row.milliseconds},
                     {"state_bytes", row.state_bytes}});
  }
  return array;
}

// The text on standard output, token by token where someone watches.
class Output {
 public:
  explicit Output(bool streams) : streams_(streams), watched_(isatty(STDOUT_FILENO) != 0) {}

  void Write(const std::string& text) {
    if (!streams_) {
      kept_ += text;
      return;
    }
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size())
      throw formats::FileError("write", "standard output", errno);
    if (watched_) Flush();
  }

  static void Flush() {
    if (std::fflush(stdout) != 0) throw formats::FileError("write", "standard output", errno);
  }

  const std::string& kept() const { return kept_; }

 private:
  bool streams_;
  bool watched_;
  std::string kept_;
};

std::vector<int64_t> ReadPrompt(const Options& options, const formats::Vocabulary& vocabulary) {
  std::string text = options.prompt;
  if (!options.prompt_file.empty()) text = formats::MappedFile(options.prompt_file).text();
  if (text.empty()) throw std::runtime_error("the prompt is empty");
  try {
    return vocabulary.encode(text);
  } catch (const formats::TokenError& error) {
    throw std::runtime_error("the prompt: " + std::string(error.what()));
  }
}

int Generate(const Options& options) {
  at::set_num_threads(options.threads);
  try {
    options.sampling.validate();
  } catch (const std::invalid_argument& error) {
    throw CLI::ValidationError("generate", error.what());
  }
  const train::LoadedModel loaded = train::load_model(options.checkpoint);
  const formats::Vocabulary& vocabulary = loaded.record.vocabulary;
  const std::vector<int64_t> prompt = ReadPrompt(options, vocabulary);
  const uint64_t seed = options.seed ? static_cast<uint64_t>(*options.seed) : std::random_device()();

  const train::InterruptGuard interrupt;
  train::Decoder decoder(loaded.model);
  train::Sampler sampler(options.sampling, seed);
  CostMeter meter;
  Output output(!options.json_output);
  // Without a prompt of one's own, the newline that stands for one isn't part of the text.
  if (options.prompt != Options().prompt || !options.prompt_file.empty()) output.Write(vocabulary.decode(prompt));

  const auto start = Clock::now();
  at::Tensor logits = decoder.read(prompt);
  int64_t count = 0;
  int64_t limit = options.tokens;
  // The last token that is written is read as well.
  if (loaded.model->position_embedding) limit = std::min(limit, loaded.record.model.max_positions - decoder.position());
  for (; count < limit && !train::InterruptGuard::interrupted(); ++count) {
    const auto begin = Clock::now();
    const int64_t token = sampler.sample(logits);
    output.Write(vocabulary.decode({&token, 1}));
    logits = decoder.read({&token, 1});
    meter.Add(std::chrono::duration<double, std::milli>(Clock::now() - begin).count(), decoder);
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  meter.Finish(decoder);

  if (options.json_output) {
    const json result = {{"text", output.kept()},
                         {"prompt_tokens", prompt.size()},
                         {"tokens", count},
                         {"seed", seed},
                         {"seconds", seconds},
                         {"tokens_per_second", static_cast<double>(count) / std::max(seconds, 1e-9)},
                         {"peak_memory_bytes", PeakBytes()},
                         {"stats", ToJson(meter.rows())}};
    // Bytes that aren't UTF-8 become replacement characters.
    output = Output(true);
    output.Write(result.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
  } else {
    output.Write("\n");
  }
  Output::Flush();
  if (options.stats && !options.json_output) PrintStats(meter.rows(), count, seconds, seed);
  if (train::InterruptGuard::interrupted()) return train::InterruptGuard::kExitCode;
  if (count < options.tokens) {
    throw std::runtime_error("this model has learned positions and ends at token " +
                             std::to_string(loaded.record.model.max_positions));
  }
  return 0;
}

}  // namespace

void AddGenerate(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("generate", "Write text with a trained model");
  command->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  command->add_option("checkpoint,--checkpoint", options->checkpoint, "A run's folder, or its checkpoint.safetensors")
      ->required()
      ->type_name("PATH");
  CLI::Option* prompt = command->add_option("--prompt", options->prompt, "The text to go on with; by default a new line");
  command->add_option("--prompt-file", options->prompt_file, "A file that holds it")->type_name("FILE")->excludes(prompt);
  command->add_option("--tokens", options->tokens, "Tokens to write")->check(CLI::NonNegativeNumber)->capture_default_str();
  command
      ->add_option("--temperature", options->sampling.temperature,
                   "Below 1 bolder, above wilder; 0: always the most likely token")
      ->capture_default_str();
  command->add_option("--top-k", options->sampling.top_k, "Draw from the k most likely tokens; 0: from all")
      ->capture_default_str();
  command->add_option("--top-p", options->sampling.top_p, "Draw from the fewest tokens whose probabilities reach this sum")
      ->capture_default_str();
  command->add_option("--seed", options->seed, "The same seed writes the same text; by default another each time")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--threads", options->threads, "Threads; more than one pays for large models only")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_flag(
      "--stats", options->stats,
      "Print (on standard error) what a token costs near positions 100, 1,000, 10,000 … and the state's size there");
  command->add_flag("--json", options->json_output, "Print text and figures as JSON at the end");
  command->footer(
      "Ctrl-C ends the text.\n\n"
      "Examples:\n"
      "  latte generate runs/demo --prompt ROMEO: --temperature 0.8 --seed 1\n"
      "  latte generate runs/demo --tokens 100000 --stats > long.txt\n"
      "  latte generate runs/demo --prompt-file scene.txt --top-k 20 --top-p 0.95 --json");
  command->callback([options, &exit_code] { exit_code = Generate(*options); });
}

}  // namespace latte::cli
