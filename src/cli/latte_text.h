// What generate and chat share: options, a model with its tokeniser, and an answer that is written as it comes.
#pragma once

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/tokenizer.h"
#include "formats/vocabulary.h"
#include "runtime/engine.h"
#include "runtime/sampler.h"

namespace latte::cli {

struct ModelChoice {
  std::string model;
  std::string tokenizer;  // of a checkpoint whose corpus latte tokenize made
  std::string adapter;
  int64_t window = 0, sinks = 4;  // of an unconverted model
  int64_t context = 0;
  std::string type;
  int threads = 0;
};
void AddModelOptions(CLI::App& command, ModelChoice& choice);

// For CLI11's check(): the name of a type that weights can be brought to.
std::string CheckType(const std::string& name);

struct SamplingChoice {
  runtime::SamplingOptions sampling;
  std::optional<uint32_t> seed;
  std::string grammar_file;
  std::string json_schema;  // a file, or the schema itself
  std::vector<std::string> stop;
};
void AddSamplingOptions(CLI::App& command, SamplingChoice& choice);

// A model's tokens as text: libllama's tokeniser, or the bytes or characters of a checkpoint of latte train.
class TokenText {
 public:
  // `tokenizer`: GGUF file, for a checkpoint that learned from its tokens; else empty. Throws what Tokenizer throws, and
  // std::runtime_error where a file is needed, or is another than the corpus was made with.
  TokenText(const runtime::Model& model, const std::string& tokenizer);

  // As Tokenizer::encode(). Throws formats::TokenError.
  std::vector<int32_t> Encode(std::string_view text, bool add_special, bool parse_special = false) const;
  std::string Piece(int32_t token) const;
  bool EndsGeneration(int32_t token) const { return tokenizer_ && tokenizer_->ends_generation(token); }
  const formats::Tokenizer* tokenizer() const { return tokenizer_ ? &*tokenizer_ : nullptr; }

 private:
  std::optional<formats::Tokenizer> tokenizer_;
  formats::Vocabulary vocabulary_;  // without it
};

// Throws what Model, TokenText and Engine throw.
struct Loaded {
  explicit Loaded(const ModelChoice& choice);

  std::shared_ptr<const runtime::Model> model;
  TokenText text;
  runtime::Engine engine;
  runtime::SessionOptions session_options;
};

// With the grammar read and a seed drawn where there is none. Throws.
runtime::Sampler MakeSampler(const Loaded& loaded, SamplingChoice& choice);

// full, window-sinks, macchiato, latte, linear or gated_linear: what tells a model's attention from others in a report.
std::string NameOfAttention(const runtime::ModelShape& shape);

// To standard output, and on to whoever reads it. Throws FileError.
void Write(std::string_view text);

// Text that may go out: whole characters, and nothing that may yet become a stop string.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stop) : stop_(std::move(stop)) {}

  // Takes `piece`, returns what may be shown. After a stop string stopped() is true, and nothing comes from it on.
  std::string Add(std::string_view piece);
  std::string Rest();  // what was held back, at the end
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stop_;
  std::string held_;
  bool stopped_ = false;
};

// Ctrl-C while this lives: the first is counted, the second ends the program.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;
  static bool Seen() { return Count() > 0; }
  static int Count();
  static void Forget(int count);  // so many of them
};

// Ctrl-C while this lives, within an Interrupt: all are counted, none ends the program, and reading from a terminal returns.
class InterruptedReads {
 public:
  InterruptedReads();
  ~InterruptedReads();
  InterruptedReads(const InterruptedReads&) = delete;
  InterruptedReads& operator=(const InterruptedReads&) = delete;
};

// A line on a terminal that shows how much of a long prompt is read; Ctrl-C ends the reading.
class PromptProgress {
 public:
  explicit PromptProgress(int64_t total);
  ~PromptProgress();
  bool operator()(int64_t read);  // for Engine::prefill()

 private:
  int64_t total_;
  bool shown_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

double ResidentMegabytes();

}  // namespace latte::cli
