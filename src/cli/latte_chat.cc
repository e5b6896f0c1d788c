// latte chat MODEL.gguf: a conversation.
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <string>

#include "cli/latte_commands.h"
#include "cli/latte_text.h"
#include "formats/error.h"
#include "formats/vocabulary.h"
#include "runtime/error.h"

namespace latte::cli {
namespace {

struct Options {
  ModelChoice model;
  SamplingChoice sampling;
  std::string system;
  int64_t tokens = 1024;
};

class Conversation {
 public:
  explicit Conversation(const Options& options)
      : options_(options),
        loaded_(options.model),
        sampler_(MakeSampler(loaded_, options.sampling)),
        session_(loaded_.model, loaded_.session_options) {
    if (!options.system.empty()) messages_.push_back({"system", options.system});
  }

  int Run() {
    const bool terminal = ::isatty(STDIN_FILENO) != 0;
    if (terminal) std::puts("A line ending in \\ goes on. /save FILE, /load FILE, /reset, /exit; Ctrl-C stops an answer.");
    std::string line;
    while (Ask(terminal, line)) {
      try {
        if (line == "/exit" || line == "/quit") break;
        if (line.starts_with("/")) {
          Command(line);
        } else if (!line.empty()) {
          Answer(line);
        }
      } catch (const formats::FileError& error) {
        std::fprintf(stderr, "latte: %s\n", error.what());
      } catch (const formats::FormatError& error) {
        std::fprintf(stderr, "latte: %s\n", error.what());
      } catch (const runtime::StateError& error) {
        std::fprintf(stderr, "latte: %s\n", error.what());
      } catch (const std::invalid_argument& error) {  // a full context, text that the vocabulary can't express
        std::fprintf(stderr, "latte: %s\n", error.what());
      }
    }
    return 0;
  }

 private:
  static bool Ask(bool terminal, std::string& line) {
    line.clear();
    for (std::string part;;) {
      if (terminal) std::fputs(line.empty() ? "> " : ". ", stdout);
      std::fflush(stdout);
      if (!std::getline(std::cin, part)) return !line.empty();
      const bool more = part.ends_with('\\');
      if (more) part.pop_back();
      line += part;
      if (!more) return true;
      line += '\n';
    }
  }

  void Command(const std::string& line) {
    const size_t space = line.find(' ');
    const std::string name = line.substr(0, space);
    const std::string file = space == std::string::npos ? "" : line.substr(space + 1);
    if (name == "/reset") {
      session_.truncate(0);
      read_.clear();
      std::erase_if(messages_, [](const formats::ChatMessage& message) { return message.role != "system"; });
    } else if (name == "/save" && !file.empty()) {
      session_.save(file);
    } else if (name == "/load" && !file.empty()) {
      session_ = runtime::Session::load(file, loaded_.model);
      // The state says more than the messages: from here on only what is new is read.
      messages_.clear();
      read_.clear();
      loaded_state_ = true;
    } else {
      std::fprintf(stderr, "latte: %s isn't a command: /save FILE, /load FILE, /reset, /exit\n", formats::quote(line).c_str());
    }
  }

  // Reads what the template adds to what was read, or, where it changed that, all of it.
  std::span<const float> Read() {
    std::string text = loaded_.tokenizer.apply_chat(messages_);
    const bool goes_on = !read_.empty() && text.starts_with(read_);
    const bool fresh = !goes_on && !loaded_state_;
    if (fresh) session_.truncate(0);
    loaded_state_ = false;
    const std::string added = goes_on ? text.substr(read_.size()) : text;
    const std::vector<int32_t> tokens = Narrow(loaded_.tokenizer.encode(added, fresh, true));
    const auto logits = loaded_.engine.prefill(session_, tokens);
    read_ = std::move(text);
    return logits;
  }

  void Answer(const std::string& line) {
    messages_.push_back({"user", line});
    Interrupt::Clear();
    const Interrupt interrupt;
    std::string answer;
    try {
      std::span<const float> logits = Read();
      StopFilter filter(options_.sampling.stop);
      const auto show = [&](const std::string& piece) {
        answer += piece;
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        std::fflush(stdout);
      };
      for (int64_t i = 0; i < options_.tokens && !Interrupt::Seen() && session_.room() > 0; ++i) {
        const int32_t token = sampler_.choose(logits);
        if (loaded_.tokenizer.ends_generation(token)) break;
        const std::string piece = loaded_.tokenizer.piece(token);
        show(filter.Add(piece));
        if (filter.stopped()) break;
        logits = loaded_.engine.decode(session_, token);
        read_ += piece;
      }
      show(filter.Rest());
    } catch (const runtime::SessionError&) {
      messages_.pop_back();
      throw;
    }
    std::fputs("\n", stdout);
    messages_.push_back({"assistant", answer});
    if (!options_.sampling.grammar_file.empty()) sampler_ = MakeSampler(loaded_, options_.sampling);  // from its start again
  }

  const Options& options_;
  Loaded loaded_;
  runtime::Sampler sampler_;
  runtime::Session session_;
  std::vector<formats::ChatMessage> messages_;
  std::string read_;  // the text that the session has read and written
  bool loaded_state_ = false;
};

}  // namespace

void AddChat(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("chat", "Talk with a model");
  AddModelOptions(*command, options->model);
  AddSamplingOptions(*command, options->sampling);
  command->add_option("--system", options->system, "What the model is told beforehand");
  command->add_option("--tokens,-n", options->tokens, "Longest answer")->check(CLI::Range(1, 1 << 24));
  command->callback([options, &exit_code] { exit_code = Conversation(*options).Run(); });
}

}  // namespace latte::cli
