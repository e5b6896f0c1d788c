// latte tokenize: texts as a pretrained model's tokens, for training.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cli/latte_commands.h"
#include "formats/error.h"
#include "formats/gguf.h"
#include "formats/mapped_file.h"
#include "formats/token_corpus.h"
#include "formats/token_corpus_writer.h"

namespace latte::cli {
namespace {

struct TokenizeOptions {
  std::string model;
  std::vector<std::string> texts;
  std::string out;
};

// A piece of text at a time, cut where a line ends: the tokeniser takes 2^31 bytes, and much memory for each.
constexpr size_t kPiece = size_t{16} << 20;

size_t EndOfPiece(std::string_view text) {
  if (text.size() <= kPiece) return text.size();
  const size_t line = text.rfind('\n', kPiece);
  return line == std::string_view::npos ? text.size() : line + 1;
}

int Tokenize(const TokenizeOptions& options) {
  const formats::Tokenizer tokenizer{formats::GgufFile(options.model).metadata()};
  formats::TokenCorpusWriter corpus(options.out, tokenizer.size(), formats::tokenizer_id(tokenizer));
  size_t bytes = 0;
  for (const std::string& path : options.texts) {
    const formats::MappedFile file(path);
    bytes += file.size();
    if (const auto bos = tokenizer.bos(); bos && tokenizer.adds_bos()) corpus.add({{*bos}});
    for (std::string_view rest = file.text(); !rest.empty();) {
      const size_t end = EndOfPiece(rest);
      try {
        corpus.add(tokenizer.encode(rest.substr(0, end), /*add_special=*/false));
      } catch (const formats::TokenError& error) {
        throw formats::FormatError(path, error.what());
      }
      rest.remove_prefix(end);
    }
    // A document ends where its file does.
    if (const auto eos = tokenizer.eos()) corpus.add({{*eos}});
  }
  corpus.commit();
  std::fprintf(stderr, "%lld tokens of %zu bytes in %s\n", static_cast<long long>(corpus.size()), bytes, options.out.c_str());
  return 0;
}

}  // namespace

void AddTokenize(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<TokenizeOptions>();
  CLI::App* command = app.add_subcommand("tokenize", "Turn texts into a pretrained model's tokens, to train on");
  command->add_option("model", options->model, "A GGUF file, whose vocabulary is taken")->required()->type_name("GGUF");
  command->add_option("text", options->texts, "Texts; an end-of-sequence token follows each")->required()->type_name("TEXT…");
  command->add_option("--out", options->out, "The file to write")->required()->type_name("FILE");
  command->footer(
      "Examples:\n"
      "  latte tokenize SmolLM2-135M-Instruct.Q4_1.gguf articles/*.txt --out articles.tokens\n"
      "  latte train --text articles.tokens --tokens corpus --context 1024");
  command->callback([options, &exit_code] { exit_code = Tokenize(*options); });
}

}  // namespace latte::cli
