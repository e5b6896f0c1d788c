#include "cli/latte_text.h"

#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <random>

#include "formats/error.h"
#include "formats/mapped_file.h"
#include "formats/token_corpus.h"
#include "runtime/json_schema.h"

namespace latte::cli {
namespace {

runtime::ModelOptions ModelOptionsOf(const ModelChoice& choice) {
  runtime::ModelOptions options;
  options.adapter = choice.adapter;
  options.threads = choice.threads;
  if (!choice.type.empty()) options.type = formats::tensor_type_named(choice.type);
  if (choice.adapter.empty() && choice.window > 0) options.attention = {choice.window, choice.sinks, 0};
  return options;
}

std::atomic<int> interrupts = 0;  // lock-free, as a signal's handler needs it

// A signal that comes just before a read blocks doesn't wake it: so this repeats until the reading is over.
void Wake(bool on) {
  constexpr suseconds_t kPeriod = 50000;  // microseconds
  itimerval timer = {};
  if (on) timer.it_value.tv_usec = timer.it_interval.tv_usec = kPeriod;
  ::setitimer(ITIMER_REAL, &timer, nullptr);
}

void CountInterrupt(int) {
  interrupts.fetch_add(1);
  Wake(true);
}

void Ignore(int) {}

void OnInterrupt(int) {
  if (interrupts.fetch_add(1) > 0) ::_exit(130);
}

void OnSignal(void (*handler)(int), int flags, int signal = SIGINT) {
  struct sigaction action = {};
  action.sa_handler = handler;
  action.sa_flags = flags;
  ::sigaction(signal, &action, nullptr);
}

std::string TypesToWrite() {
  std::string names;
  for (uint32_t i = 0; i < 256; ++i) {
    const auto type = static_cast<formats::TensorType>(i);
    if (!formats::is_known(type) || !formats::can_quantize(type)) continue;
    names += (names.empty() ? "" : ", ") + std::string(formats::name_of(type));
  }
  return names;
}

}  // namespace

std::string CheckType(const std::string& name) {
  const auto type = formats::tensor_type_named(name);
  if (type && (formats::can_quantize(*type) || *type == formats::TensorType::kF32)) return {};
  return name + ": no type that can be written; one of " + TypesToWrite();
}

void AddModelOptions(CLI::App& command, ModelChoice& choice) {
  command.add_option("model,--model", choice.model, "GGUF file, or a run's folder of latte train (or its checkpoint)")
      ->required();
  auto* adapter = command.add_option("--adapter", choice.adapter, "Adapter that converts it");
  auto* window = command.add_option("--window", choice.window, "Unconverted models: read the last tokens and the sinks alone")
                     ->check(CLI::Range(1, 1 << 24))
                     ->excludes(adapter);
  command.add_option("--sinks", choice.sinks, "With --window: first tokens that stay readable")
      ->check(CLI::Range(0, 4096))
      ->needs(window)
      ->capture_default_str();
  command
      .add_option("--type", choice.type,
                  "Bring matrices to this type while loading (q4_0, q8_0, bf16 …); latte quantize does it once for all")
      ->check(CheckType);
  command.add_option("--context", choice.context, "Room for so many tokens, where attention reads all; 0: as trained")
      ->check(CLI::Range(0, 1 << 24));
  command
      .add_option("--tokenizer", choice.tokenizer,
                  "Checkpoints trained on latte tokenize's tokens: the GGUF file it took them from")
      ->check(CLI::ExistingFile);
  command.add_option("--threads", choice.threads, "0: one a CPU")->check(CLI::Range(0, 1024));
}

void AddSamplingOptions(CLI::App& command, SamplingChoice& choice) {
  runtime::SamplingOptions& sampling = choice.sampling;
  command.add_option("--temperature", sampling.temperature, "0: always the likeliest")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command.add_option("--top-k", sampling.top_k, "Among so many of the likeliest; 0: all")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  command.add_option("--top-p", sampling.top_p, "Among the likeliest of this share; 1: all")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--min-p", sampling.min_p, "At least this share of the likeliest; 0: all")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--repeat-penalty", sampling.repeat_penalty, "Of tokens among the last ones")
      ->check(CLI::Range(0.1, 10.0))
      ->capture_default_str();
  command.add_option("--frequency-penalty", sampling.frequency_penalty, "Likewise, for each time")
      ->check(CLI::Range(-10.0, 10.0))
      ->capture_default_str();
  command.add_option("--presence-penalty", sampling.presence_penalty, "Likewise, once")
      ->check(CLI::Range(-10.0, 10.0))
      ->capture_default_str();
  command.add_option("--penalty-tokens", sampling.penalty_tokens, "How many the last ones are")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command.add_option("--seed", choice.seed, "Same seed, same text");
  auto* grammar = command.add_option("--grammar", choice.grammar_file, "GBNF file that the text keeps to");
  command.add_option("--json-schema", choice.json_schema, "The text is JSON of this schema: a file, or the schema itself ({…})")
      ->excludes(grammar);
  command.add_option("--stop", choice.stop, "End before this text (may be given again)")->allow_extra_args(false);
}

TokenText::TokenText(const runtime::Model& model, const std::string& tokenizer) {
  if (const formats::GgufMetadata* metadata = model.metadata()) {
    tokenizer_.emplace(*metadata);
    return;
  }
  vocabulary_ = *model.vocabulary();
  if (vocabulary_.kind() != formats::Vocabulary::Kind::kTokens) return;
  if (tokenizer.empty()) {
    throw std::runtime_error(model.path() + ": trained on the tokens of a pretrained model: --tokenizer names its GGUF file");
  }
  const formats::GgufFile file(tokenizer);
  const auto expected =
      formats::Vocabulary::tokens(vocabulary_.size(), formats::tokenizer_id(formats::Tokenizer(file.metadata())));
  if (!(expected == vocabulary_))
    throw std::runtime_error(tokenizer + ": not the tokeniser that " + model.path() + " was trained with");
  tokenizer_.emplace(file.metadata());
}

std::vector<int32_t> TokenText::Encode(std::string_view text, bool add_special, bool parse_special) const {
  const std::vector<int64_t> tokens =
      tokenizer_ ? tokenizer_->encode(text, add_special, parse_special) : vocabulary_.encode(text);
  return {tokens.begin(), tokens.end()};
}

std::string TokenText::Piece(int32_t token) const {
  if (tokenizer_) return tokenizer_->piece(token);
  const int64_t wide = token;
  return vocabulary_.decode({&wide, 1});
}

Loaded::Loaded(const ModelChoice& choice)
    : model(runtime::Model::open(choice.model, ModelOptionsOf(choice))),
      text(*model, choice.tokenizer),
      engine(model, {choice.threads, {}, 512}) {
  session_options.context = choice.context;
}

runtime::Sampler MakeSampler(const Loaded& loaded, SamplingChoice& choice) {
  if (!choice.seed) choice.seed = std::random_device()();
  choice.sampling.seed = *choice.seed;
  if (!choice.grammar_file.empty()) choice.sampling.grammar = std::string(formats::MappedFile(choice.grammar_file).text());
  if (!choice.json_schema.empty()) {
    const bool itself = choice.json_schema.find_first_not_of(" \t\n") != std::string::npos &&
                        choice.json_schema[choice.json_schema.find_first_not_of(" \t\n")] == '{';
    choice.sampling.grammar =
        runtime::grammar_of_schema(itself ? choice.json_schema : std::string(formats::MappedFile(choice.json_schema).text()));
  }
  return runtime::Sampler(loaded.model->shape().vocab_size, loaded.text.tokenizer(), choice.sampling);
}

std::string StopFilter::Add(std::string_view piece) {
  if (stopped_) return {};
  held_ += piece;
  size_t found = std::string::npos;
  for (const std::string& stop : stop_) {
    if (!stop.empty()) found = std::min(found, held_.find(stop));
  }
  if (found != std::string::npos) {
    stopped_ = true;
    std::string out = held_.substr(0, found);
    held_.clear();
    return out;
  }
  size_t keep = 0;  // bytes at the end that may begin a stop string
  for (const std::string& stop : stop_) {
    for (size_t n = std::min(held_.size(), stop.size() - std::min<size_t>(1, stop.size())); n > keep; --n) {
      if (held_.ends_with(std::string_view(stop).substr(0, n))) {
        keep = n;
        break;
      }
    }
  }
  // A character that isn't whole yet: its first byte says how long it is.
  for (size_t back = 1; back <= std::min<size_t>(3, held_.size()); ++back) {
    const auto byte = static_cast<unsigned char>(held_[held_.size() - back]);
    if ((byte & 0xC0) == 0x80) continue;
    const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
    if (length > back) keep = std::max(keep, back);
    break;
  }
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, out.size());
  return out;
}

std::string StopFilter::Rest() { return std::exchange(held_, {}); }

Interrupt::Interrupt() { OnSignal(OnInterrupt, SA_RESTART); }
Interrupt::~Interrupt() { OnSignal(SIG_DFL, 0); }
int Interrupt::Count() { return interrupts.load(); }
void Interrupt::Forget(int count) { interrupts.fetch_sub(count); }

InterruptedReads::InterruptedReads() {
  OnSignal(Ignore, 0, SIGALRM);
  OnSignal(CountInterrupt, 0);
}
InterruptedReads::~InterruptedReads() {
  OnSignal(OnInterrupt, SA_RESTART);
  Wake(false);
  OnSignal(SIG_DFL, 0, SIGALRM);
}

PromptProgress::PromptProgress(int64_t total) : total_(total), shown_(::isatty(STDERR_FILENO) != 0 && total > 2048) {}

PromptProgress::~PromptProgress() {
  if (drawn_) std::fprintf(stderr, "\r%79s\r", "");
}

bool PromptProgress::operator()(int64_t read) {
  if (shown_) {
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    const int filled = static_cast<int>(30 * read / total_);
    std::fprintf(stderr, "\r[%-30.*s] %lld of %lld tokens, %.0f tokens/s ", filled, "##############################",
                 static_cast<long long>(read), static_cast<long long>(total_), static_cast<double>(read) / seconds);
    std::fflush(stderr);
    drawn_ = true;
  }
  return !Interrupt::Seen();
}

std::string NameOfAttention(const runtime::ModelShape& shape) {
  const auto any = [&](const auto& is) { return std::any_of(shape.layers.begin(), shape.layers.end(), is); };
  if (any([](const auto& layer) { return layer.linear == runtime::Linear::kNormalised; })) return "linear";
  if (any([](const auto& layer) { return layer.linear == runtime::Linear::kGated; })) return "gated_linear";
  if (any([](const auto& layer) { return !layer.tokens; })) return "latte";
  if (any([](const auto& layer) { return layer.latents > 0; })) return "macchiato";
  return shape.constant_state() ? "window-sinks" : "full";
}

void Write(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw formats::FileError("write", "standard output", errno);
  }
}

double ResidentMegabytes() {
  std::ifstream statm("/proc/self/statm");
  long total = 0, resident = 0;
  statm >> total >> resident;
  return static_cast<double>(resident) * static_cast<double>(::sysconf(_SC_PAGESIZE)) / 1e6;
}

}  // namespace latte::cli
