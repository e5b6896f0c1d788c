// latte generate MODEL.gguf: a text that continues a prompt, written as it comes.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/latte_commands.h"
#include "cli/latte_text.h"
#include "formats/mapped_file.h"

namespace latte::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  ModelChoice model;
  SamplingChoice sampling;
  std::string prompt, prompt_file, save, load;
  int64_t tokens = 200;
  bool stats = false, logprobs = false, json = false;
};

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

int Generate(const Options& options) {
  const auto loading = Clock::now();
  Loaded loaded(options.model);
  runtime::Sampler sampler = MakeSampler(loaded, options.sampling);
  const double load_seconds = SecondsSince(loading);
  std::string prompt = options.prompt;
  if (!options.prompt_file.empty()) prompt = std::string(formats::MappedFile(options.prompt_file).text());
  const bool first = options.load.empty();
  std::vector<int32_t> tokens = Narrow(loaded.tokenizer.encode(prompt, first));
  runtime::Session session =
      first ? runtime::Session(loaded.model, loaded.session_options) : runtime::Session::load(options.load, loaded.model);
  if (tokens.empty()) {
    if (loaded.tokenizer.bos()) {
      tokens.push_back(static_cast<int32_t>(*loaded.tokenizer.bos()));
    } else {
      throw std::runtime_error("an empty prompt: --prompt or --prompt-file gives the text to continue");
    }
  }
  const Interrupt interrupt;
  const auto reading = Clock::now();
  const int64_t before = session.position();
  std::span<const float> logits;
  {
    PromptProgress progress(static_cast<int64_t>(tokens.size()));
    logits = loaded.engine.prefill(session, tokens, [&](int64_t read) { return progress(read); });
  }
  const int64_t read = session.position() - before;  // fewer than there are after Ctrl-C
  const double read_seconds = SecondsSince(reading);

  nlohmann::json written = nlohmann::json::array();
  StopFilter filter(options.sampling.stop);
  std::string text;
  const auto show = [&](const std::string& piece) {
    text += piece;
    if (options.json) return;
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  };
  const auto writing = Clock::now();
  int64_t count = 0;
  std::string reason = "length";
  while (count < options.tokens && !Interrupt::Seen()) {
    if (session.room() < 1) {
      reason = "full";
      break;
    }
    const int32_t token = sampler.choose(logits);
    ++count;
    const std::string piece = loaded.tokenizer.piece(token);
    if (options.logprobs) {
      written.push_back({{"token", token}, {"logprob", runtime::log_probability(logits, token)}});
      if (!options.json) std::fprintf(stderr, "%d\t%.4f\n", token, written.back()["logprob"].get<double>());
    }
    if (loaded.tokenizer.ends_generation(token)) {
      reason = "end";
      break;
    }
    show(filter.Add(piece));
    if (filter.stopped()) {
      reason = "stop";
      break;
    }
    logits = loaded.engine.decode(session, token);
  }
  if (Interrupt::Seen()) reason = "interrupted";
  const double write_seconds = SecondsSince(writing);
  show(filter.Rest());
  if (!options.save.empty()) session.save(options.save);
  const double write_rate = static_cast<double>(count) / std::max(write_seconds, 1e-9);
  const double read_rate = static_cast<double>(read) / std::max(read_seconds, 1e-9);
  if (options.json) {
    nlohmann::json out = {{"text", text}, {"finish_reason", reason}, {"prompt_tokens", read}, {"tokens", count}};
    if (options.logprobs) out["logprobs"] = written;
    if (options.stats) {
      out["stats"] = {{"load_seconds", load_seconds},
                      {"prefill_tokens_per_second", read_rate},
                      {"decode_tokens_per_second", write_rate},
                      {"state_mb", static_cast<double>(session.bytes_in_use()) / 1e6},
                      {"resident_mb", ResidentMegabytes()}};
    }
    std::printf("%s\n", out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    std::printf("\n");
    std::fflush(stdout);  // before what goes to standard error
    if (options.stats) {
      std::fprintf(
          stderr,
          "load %.2f s; read %lld tokens at %.0f tokens/s; wrote %lld at %.1f tokens/s (%s); state %.1f MB, process %.0f MB\n",
          load_seconds, static_cast<long long>(read), read_rate, static_cast<long long>(count), write_rate, reason.c_str(),
          static_cast<double>(session.bytes_in_use()) / 1e6, ResidentMegabytes());
    }
  }
  return reason == "interrupted" ? 130 : 0;
}

}  // namespace

void AddGenerateModel(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("generate", "Write text with a model");
  AddModelOptions(*command, options->model);
  AddSamplingOptions(*command, options->sampling);
  auto* prompt = command->add_option("--prompt,-p", options->prompt, "Text to continue");
  command->add_option("--prompt-file", options->prompt_file, "File with the text to continue, of any length")->excludes(prompt);
  command->add_option("--tokens,-n", options->tokens, "Tokens to write")->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  command->add_option("--save", options->save, "Write the state that was reached to this file");
  command->add_option("--load", options->load, "Go on from a state that --save wrote");
  command->add_flag("--stats", options->stats, "Tokens a second, memory");
  command->add_flag("--logprobs", options->logprobs, "ln p of each token");
  command->add_flag("--json", options->json, "One JSON object instead of the text");
  command->footer(
      "Ctrl-C ends the text, or the reading of a long prompt, and exits with 130; --save then keeps what was reached.\n\n"
      "Examples:\n"
      "  latte generate SmolLM2-135M-Instruct.Q4_1.gguf --prompt 'The lighthouse keeper' --tokens 100 --stats\n"
      "  latte generate model.gguf --adapter adapter.gguf --prompt-file book.txt --save book.state\n"
      "  latte generate model.gguf --adapter adapter.gguf --load book.state --prompt 'In short,' --temperature 0\n"
      "  latte generate model.gguf --prompt 'Anna is 31. As JSON: ' \\\n"
      "    --json-schema '{\"properties\": {\"name\": {\"type\": \"string\"}, \"age\": {\"type\": \"integer\"}}}'");
  command->callback([options, &exit_code] { exit_code = Generate(*options); });
}

}  // namespace latte::cli
