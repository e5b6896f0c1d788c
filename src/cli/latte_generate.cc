// latte generate: a text that continues a prompt, written as it comes.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/latte_commands.h"
#include "cli/latte_text.h"
#include "formats/atomic_file.h"
#include "formats/mapped_file.h"

namespace latte::cli {
namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::json;

struct Options {
  ModelChoice model;
  SamplingChoice sampling;
  std::optional<std::string> prompt;
  std::string prompt_file, save, load;
  int64_t tokens = 200;
  bool echo = false, stats = false, logprobs = false, json = false;
};

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The cost of a token and the size of the state, near positions a decade apart.
class CostMeter {
 public:
  struct Row {
    int64_t position = 0;
    int64_t tokens = 0;         // measured, the last before `position`
    double milliseconds = 0.0;  // a token, the median
    uint64_t state_bytes = 0;
  };

  explicit CostMeter(const runtime::Session& session) : session_(session) { Skip(); }

  void Add(double seconds) {
    recent_[static_cast<size_t>(count_++) % recent_.size()] = 1e3 * seconds;
    if (session_.position() < next_) return;
    rows_.push_back(Measure());
    Skip();
  }

  // At the end, unless a decade was reached just before.
  void Finish() {
    if (count_ == 0 || (!rows_.empty() && rows_.back().position > session_.position() * 9 / 10)) return;
    rows_.push_back(Measure());
  }

  const std::vector<Row>& rows() const { return rows_; }

 private:
  void Skip() {
    while (next_ <= session_.position()) next_ *= 10;
  }

  Row Measure() const {
    const auto size = std::min(static_cast<size_t>(count_), recent_.size());
    std::vector<double> times(recent_.begin(), recent_.begin() + static_cast<std::ptrdiff_t>(size));
    const auto middle = times.begin() + static_cast<std::ptrdiff_t>(size / 2);
    std::nth_element(times.begin(), middle, times.end());
    return {session_.position(), static_cast<int64_t>(size), *middle, session_.bytes_in_use()};
  }

  const runtime::Session& session_;
  std::vector<double> recent_ = std::vector<double>(100);
  std::vector<Row> rows_;
  int64_t count_ = 0;
  int64_t next_ = 100;
};

struct Figures {
  double load_seconds = 0.0, read_rate = 0.0, write_rate = 0.0;
  int64_t read = 0, written = 0;
};

json ToJson(const Figures& figures, const std::vector<CostMeter::Row>& rows) {
  json positions = json::array();
  for (const CostMeter::Row& row : rows) {
    positions.push_back({{"position", row.position},
                         {"tokens", row.tokens},
                         {"milliseconds_per_token", row.milliseconds},
                         {"state_mb", static_cast<double>(row.state_bytes) / 1e6}});
  }
  return {{"load_seconds", figures.load_seconds},
          {"prefill_tokens_per_second", figures.read_rate},
          {"decode_tokens_per_second", figures.write_rate},
          {"resident_mb", ResidentMegabytes()},
          {"positions", positions}};
}

// A token that was chosen.
struct Choice {
  int32_t token = 0;
  double logprob = 0.0;
  std::string text;
};

std::string InQuotes(const std::string& text) { return json(text).dump(-1, ' ', false, json::error_handler_t::replace); }

void Print(const Figures& figures, const std::vector<CostMeter::Row>& rows, const std::string& reason, uint32_t seed) {
  std::fprintf(stderr, "\n%12s %14s %14s\n", "position", "ms a token", "state");
  for (const CostMeter::Row& row : rows) {
    std::fprintf(stderr, "%12lld %14.3f %11.3f MB\n", static_cast<long long>(row.position), row.milliseconds,
                 static_cast<double>(row.state_bytes) / 1e6);
  }
  std::fprintf(stderr,
               "load %.2f s; read %lld tokens at %.0f tokens/s; wrote %lld at %.1f tokens/s (%s); process %.0f MB; seed %u\n",
               figures.load_seconds, static_cast<long long>(figures.read), figures.read_rate,
               static_cast<long long>(figures.written), figures.write_rate, reason.c_str(), ResidentMegabytes(), seed);
}

// Of a text that isn't given: a model without a token for it begins with a new line, or a space where its characters have none.
std::vector<int32_t> Beginning(const TokenText& text) {
  const auto bos = text.tokenizer() == nullptr ? std::nullopt : text.tokenizer()->bos();
  // Where a file names none, libllama has a number that is a letter's in some vocabularies.
  if (bos && text.tokenizer()->piece(*bos).empty()) {
    return {static_cast<int32_t>(*bos)};
  }
  for (const char* begin : {"\n", " "}) {
    try {
      return text.Encode(begin, false);
    } catch (const formats::TokenError&) {
      continue;
    }
  }
  throw std::runtime_error("the model has neither a new line nor a space to begin a text with: --prompt gives its beginning");
}

// What is read first.
std::vector<int32_t> ReadPrompt(const Options& options, const TokenText& text, std::string& prompt) {
  const bool continues = !options.load.empty();
  const bool given = options.prompt || !options.prompt_file.empty();
  if (continues && !given) throw std::runtime_error("--load goes on with a text: --prompt or --prompt-file gives it");
  if (!options.prompt_file.empty()) prompt = std::string(formats::MappedFile(options.prompt_file).text());
  if (options.prompt) prompt = *options.prompt;
  try {
    std::vector<int32_t> tokens = text.Encode(prompt, !continues);
    if (tokens.empty() && !given) tokens = Beginning(text);
    if (tokens.empty()) throw std::runtime_error("the prompt is empty");
    return tokens;
  } catch (const formats::TokenError& error) {
    throw std::runtime_error("the prompt: " + std::string(error.what()));
  }
}

int Generate(Options& options) {
  if (!options.save.empty()) const formats::AtomicFile place(options.save);  // fails now rather than behind a long text
  const auto loading = Clock::now();
  Loaded loaded(options.model);
  runtime::Sampler sampler = MakeSampler(loaded, options.sampling);
  Figures figures;
  figures.load_seconds = SecondsSince(loading);
  std::string prompt;
  const std::vector<int32_t> tokens = ReadPrompt(options, loaded.text, prompt);
  if (options.model.context == 0 && loaded.model->vocabulary() != nullptr) {
    // These models say nothing of how far their attention carries: there is room for what is asked.
    loaded.session_options.context = static_cast<int64_t>(tokens.size()) + options.tokens + 1;
  }
  sampler.note(tokens);
  runtime::Session session = options.load.empty() ? runtime::Session(loaded.model, loaded.session_options)
                                                  : runtime::Session::load(options.load, loaded.model);
  const Interrupt interrupt;
  const auto reading = Clock::now();
  const int64_t before = session.position();
  std::span<const float> logits;
  {
    PromptProgress progress(static_cast<int64_t>(tokens.size()));
    logits = loaded.engine.prefill(session, tokens, [&](int64_t read) { return progress(read); });
  }
  figures.read = session.position() - before;  // fewer than there are after Ctrl-C
  figures.read_rate = static_cast<double>(figures.read) / std::max(SecondsSince(reading), 1e-9);

  std::vector<Choice> choices;  // with --logprobs
  StopFilter filter(options.sampling.stop);
  std::string text;
  const auto show = [&](const std::string& piece) {
    text += piece;
    if (!options.json) Write(piece);
  };
  if (options.echo) show(prompt);
  CostMeter meter(session);
  const auto writing = Clock::now();
  std::string reason = "length";
  while (figures.written < options.tokens && !Interrupt::Seen()) {
    const auto begin = Clock::now();
    const int32_t token = sampler.choose(logits);
    ++figures.written;
    if (options.logprobs) choices.push_back({token, runtime::log_probability(logits, token), loaded.text.Piece(token)});
    if (loaded.text.EndsGeneration(token)) {
      reason = "end";
      break;
    }
    show(filter.Add(loaded.text.Piece(token)));
    if (filter.stopped()) {
      reason = "stop";
      break;
    }
    if (session.room() < 1) {
      reason = "full";
      break;
    }
    logits = loaded.engine.decode(session, token);
    meter.Add(SecondsSince(begin));
  }
  if (Interrupt::Seen()) reason = "interrupted";
  figures.write_rate = static_cast<double>(figures.written) / std::max(SecondsSince(writing), 1e-9);
  meter.Finish();
  show(filter.Rest());
  if (options.json) {
    json out = {{"text", text},
                {"finish_reason", reason},
                {"prompt_tokens", figures.read},
                {"tokens", figures.written},
                {"seed", *options.sampling.seed}};
    if (options.logprobs) {
      json& logprobs = out["logprobs"] = json::array();
      for (const Choice& c : choices) logprobs.push_back({{"token", c.token}, {"logprob", c.logprob}, {"text", c.text}});
    }
    if (options.stats) out["stats"] = ToJson(figures, meter.rows());
    Write(out.dump(-1, ' ', false, json::error_handler_t::replace) + "\n");
  } else {
    Write("\n");
    for (const Choice& c : choices) std::fprintf(stderr, "%8d %9.4f  %s\n", c.token, c.logprob, InQuotes(c.text).c_str());
    if (options.stats) Print(figures, meter.rows(), reason, *options.sampling.seed);
  }
  if (!options.save.empty()) session.save(options.save);
  if (reason == "full" && figures.written < options.tokens) {
    const std::string where = "the text ended at token " + std::to_string(session.position()) + ": ";
    throw std::runtime_error(where + (loaded.model->shape().learned_positions > 0
                                          ? "the model has learned positions and no more of them"
                                          : "the session is full, --context gives it more room"));
  }
  return reason == "interrupted" ? 130 : 0;
}

}  // namespace

void AddGenerate(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("generate", "Write text with a model");
  AddModelOptions(*command, options->model);
  AddSamplingOptions(*command, options->sampling);
  auto* prompt = command->add_option("--prompt,-p", options->prompt, "Text to continue; without it the model begins one");
  command->add_option("--prompt-file", options->prompt_file, "File with the text to continue, of any length")->excludes(prompt);
  command->add_option("--tokens,-n", options->tokens, "Tokens to write")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--save", options->save, "Write the state that was reached to this file");
  command->add_option("--load", options->load, "Go on from a state that --save wrote");
  command->add_flag("--echo", options->echo, "Write the prompt, too");
  command->add_flag(
      "--stats", options->stats,
      "Tokens a second and memory; what a token costs near positions 100, 1,000, 10,000 … and the state's size there");
  command->add_flag("--logprobs", options->logprobs,
                    "ln p of each token, from the model's own logits: in JSON, or as a table behind the text on standard error");
  command->add_flag("--json", options->json, "One JSON object instead of the text");
  command->footer(
      "Ctrl-C ends the text, or the reading of a long prompt, and exits with 130; --save then keeps what was reached.\n\n"
      "Examples:\n"
      "  latte generate runs/demo --prompt ROMEO: --echo --temperature 0.8 --seed 1\n"
      "  latte generate runs/demo --tokens 100000 --stats > long.txt\n"
      "  latte generate SmolLM2-135M-Instruct.Q4_1.gguf --prompt 'The lighthouse keeper' --tokens 100 --stats\n"
      "  latte generate model.gguf --adapter adapter.gguf --prompt-file book.txt --save book.state\n"
      "  latte generate model.gguf --adapter adapter.gguf --load book.state --prompt 'In short,' --temperature 0\n"
      "  latte generate model.gguf --prompt 'Anna is 31. As JSON: ' --json-schema \\\n"
      "    '{\"properties\": {\"name\": {\"type\": \"string\"}, \"age\": {\"type\": \"integer\"}}, \"required\": [\"name\", "
      "\"age\"]}'");
  command->callback([options, &exit_code] { exit_code = Generate(*options); });
}

}  // namespace latte::cli
