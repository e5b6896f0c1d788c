// latte perplexity and latte quantize.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <system_error>

#include "cli/latte_commands.h"
#include "cli/latte_text.h"
#include "formats/mapped_file.h"
#include "runtime/quantize.h"

namespace latte::cli {
namespace {

struct PerplexityOptions {
  ModelChoice model;
  std::string text;
  std::vector<int64_t> lengths = {2048};
  int64_t windows = 4;
  bool json = false;
};

// Of stretches of the text, one behind the other, each from an empty state: as latte eval does (extend/evaluate.h), so that the
// engines can be compared. A stretch predicts as many tokens as it has, the last of them being the next stretch's first.
int Perplexity(const PerplexityOptions& options) {
  Loaded loaded(options.model);
  const formats::MappedFile text(options.text);
  const std::vector<int32_t> tokens = loaded.text.Encode(text.text(), true);
  const auto vocabulary = static_cast<size_t>(loaded.model->shape().vocab_size);
  const std::string attention = NameOfAttention(loaded.model->shape());
  nlohmann::json rows = nlohmann::json::array();
  for (const int64_t length : options.lengths) {
    const int64_t most = (static_cast<int64_t>(tokens.size()) - 1) / length;
    if (most < 1) {
      throw std::runtime_error(options.text + ": " + std::to_string(tokens.size()) + " tokens, a stretch takes " +
                               std::to_string(length) + " and the one behind them: --lengths asks for less");
    }
    const int64_t windows = std::min(options.windows, most);
    const auto start = std::chrono::steady_clock::now();
    std::vector<double> means;
    for (int64_t w = 0; w < windows; ++w) {
      const auto begin = static_cast<size_t>(w * length);
      runtime::SessionOptions session_options;
      session_options.context = length;
      runtime::Session session(loaded.model, session_options);
      double sum = 0.0;
      constexpr size_t kPiece = 128;  // whose logits are held
      for (size_t i = 0; i < static_cast<size_t>(length); i += kPiece) {
        const size_t count = std::min(kPiece, static_cast<size_t>(length) - i);
        const runtime::StepPart part{&session, std::span(tokens).subspan(begin + i, count), true};
        const auto logits = loaded.engine.step({&part, 1});
        for (size_t t = 0; t < count; ++t) {
          sum -= runtime::log_probability(logits.subspan(t * vocabulary, vocabulary), tokens[begin + i + t + 1]);
        }
      }
      means.push_back(sum / static_cast<double>(length));
    }
    double mean = 0.0, variance = 0.0;
    for (const double m : means) mean += m / static_cast<double>(windows);
    for (const double m : means) variance += std::pow(m - mean, 2) / std::max<double>(1.0, static_cast<double>(windows - 1));
    const double perplexity = std::exp(mean);
    const double error = perplexity * std::sqrt(variance / static_cast<double>(windows));  // unknown of a single stretch
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    rows.push_back({{"attention", attention},
                    {"length", length},
                    {"windows", windows},
                    {"perplexity", perplexity},
                    {"stderr", windows > 1 ? nlohmann::json(error) : nlohmann::json(nullptr)},
                    {"seconds", seconds}});
    if (!options.json) {
      char shown_error[32] = "";
      if (windows > 1) std::snprintf(shown_error, sizeof(shown_error), " ± %.4f", error);
      std::printf("%s, %lld stretch%s of %lld tokens: perplexity %.4f%s (%.0f tokens/s)\n", attention.c_str(),
                  static_cast<long long>(windows), windows > 1 ? "es" : "", static_cast<long long>(length), perplexity,
                  shown_error, static_cast<double>(windows * length) / seconds);
      std::fflush(stdout);
    }
  }
  if (options.json) std::printf("%s\n", nlohmann::json{{"rows", rows}}.dump(1).c_str());
  return 0;
}

struct QuantizeOptions {
  std::string from, to, type = "q4_0", tokenizer;
};

}  // namespace

void AddPerplexity(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<PerplexityOptions>();
  CLI::App* command = app.add_subcommand("perplexity", "Measure how well a model predicts a text");
  AddModelOptions(*command, options->model);
  command->add_option("--text", options->text, "File of plain text")->required();
  command->add_option("--lengths", options->lengths, "Tokens of a stretch; several (2048,8192) give a row each")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command
      ->add_option("--windows", options->windows, "Stretches of each length, from the start of the text; fewer where it is short")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_flag("--json", options->json, "One JSON object: rows of attention, length, windows, perplexity, stderr, seconds");
  command->footer(
      "Each stretch is read from an empty state, and each of its tokens predicts the next. ± is the mean's standard error over "
      "the\n"
      "stretches. The figures are those of latte eval, which runs the model in libtorch, but for activations that quantised "
      "types\n"
      "round to 8 bits here; --type f32 leaves them as they are.\n\n"
      "Examples:\n"
      "  latte perplexity SmolLM2-135M-Instruct.Q4_1.gguf --text book.txt\n"
      "  latte perplexity model.gguf --adapter adapter.gguf --text book.txt --lengths 2048,8192 --windows 8\n"
      "  latte perplexity model.gguf --window 512 --text book.txt --json        # the last 512 tokens and 4 sinks alone\n"
      "  latte perplexity runs/demo --text data/tinyshakespeare.txt --lengths 256  # a model of latte train, on its characters");
  command->callback([options, &exit_code] { exit_code = Perplexity(*options); });
}

void AddQuantize(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<QuantizeOptions>();
  CLI::App* command = app.add_subcommand("quantize", "Bring a model's matrices to another type");
  command->add_option("model", options->from, "GGUF file, merged models (latte extend --merged) too; or a Hugging Face folder")
      ->required();
  command->add_option("out", options->to, "File to write; an older one is replaced when all is written")->required();
  command->add_option("--type", options->type, "ggml's name: q4_0, q4_1, q5_0, q5_1, q8_0, bf16, f16, f32, q2_K … q6_K, iq4_nl …")
      ->check(CheckType)
      ->capture_default_str();
  command
      ->add_option("--tokenizer", options->tokenizer,
                   "Of a folder: a GGUF file with the same tokeniser, which the result takes over (tokenizer.json isn't read)")
      ->type_name("FILE");
  command->footer(
      "Matrices whose rows are no whole blocks of the type become q8_0 or f16, and so does the vocabulary's below 8 bits; what "
      "isn't a\n"
      "matrix stays as it is. All types down to q2_K run on kernels of latte's own; ternary ones run on ggml's, which read "
      "prompts\n"
      "slowly here. latte perplexity says what a type costs.\n\n"
      "Examples:\n"
      "  latte quantize model.f16.gguf model.q4_0.gguf --type q4_0\n"
      "  latte quantize model.gguf model.f32.gguf --type f32        # undone as far as it goes: to compare with\n"
      "  latte quantize SmolLM2-360M/ smollm2-360m.gguf --type bf16 --tokenizer smollm2-135m.gguf\n"
      "  latte perplexity model.q4_0.gguf --text book.txt");
  command->callback([options, &exit_code] {
    std::error_code ignored;
    if (std::filesystem::equivalent(options->from, options->to, ignored)) {
      throw std::runtime_error(options->to + ": is the model itself, which would be lost: give the result another name");
    }
    const auto type = *formats::tensor_type_named(options->type);
    if (std::filesystem::is_directory(options->from, ignored)) {
      runtime::quantize_folder(options->from, options->to, type, options->tokenizer);
    } else if (options->tokenizer.empty()) {
      runtime::quantize_model(options->from, options->to, type);
    } else {
      throw CLI::ValidationError("--tokenizer", options->from + " is a file, which brings its own");
    }
    exit_code = 0;
  });
}

}  // namespace latte::cli
