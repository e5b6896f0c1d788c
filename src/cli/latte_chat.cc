// latte chat MODEL.gguf: a conversation.
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/latte_commands.h"
#include "cli/latte_line.h"
#include "cli/latte_text.h"
#include "formats/error.h"
#include "formats/vocabulary.h"
#include "runtime/error.h"
#include "runtime/prompt_cache.h"

namespace latte::cli {
namespace {

struct Options {
  ModelChoice model;
  SamplingChoice sampling;
  std::string system;
  int64_t tokens = 1024;
  std::optional<std::string> history;
  int64_t cache_megabytes = 1024;
  std::string cache_folder;
  int64_t cache_disk_megabytes = 8192;
  bool stats = false;
};

constexpr const char* kCommands = "/save FILE, /load FILE, /retry, /undo, /reset, /help, /exit";

runtime::PromptCacheOptions CacheOptionsOf(const Options& options) {
  runtime::PromptCacheOptions cache;
  cache.memory_bytes = static_cast<uint64_t>(options.cache_megabytes) << 20;
  cache.folder = options.cache_folder;
  cache.disk_bytes = static_cast<uint64_t>(options.cache_disk_megabytes) << 20;
  return cache;
}

class Conversation {
 public:
  explicit Conversation(const Options& options)
      : options_(options),
        lines_(options.history ? *options.history : LineReader::DefaultHistory()),
        loaded_(options.model),
        sampler_(NewSampler()),
        session_(loaded_.model, loaded_.session_options),
        cache_(loaded_.model, CacheOptionsOf(options)) {
    const formats::Tokenizer* tokenizer = loaded_.text.tokenizer();
    if (tokenizer == nullptr || tokenizer->chat_template().empty()) {
      throw std::runtime_error(options.model.model + ": the model has no chat template; latte generate continues texts with it");
    }
    Reset();
  }

  int Run() {
    if (lines_.terminal()) {
      std::printf("A line ending in \\ goes on, and so does all between two lines of \"\"\". %s\nCtrl-C stops an answer.\n",
                  kCommands);
    }
    // From the beginning: Ctrl-C may come between Enter and the answer too.
    const Interrupt interrupt;
    while (const std::optional<std::string> message = Ask()) {
      try {
        if (*message == "/exit" || *message == "/quit") break;
        if (message->starts_with("/")) {
          Command(*message);
        } else if (message->find_first_not_of(" \t\n") != std::string::npos) {
          messages_.push_back({"user", *message});
          Answer();
        }
      } catch (const formats::FileError& error) {
        Complain(error);
      } catch (const formats::FormatError& error) {
        Complain(error);
      } catch (const runtime::StateError& error) {
        Complain(error);
      } catch (const runtime::MemoryError& error) {
        Complain(error);
      } catch (const std::invalid_argument& error) {  // a full context, text that the vocabulary can't express
        Complain(error);
      }
    }
    return left_ ? 130 : 0;
  }

 private:
  static void Complain(const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "latte: %s\n", error.what());
  }

  // The next message; nothing at the end of input, and where a second Ctrl-C follows one at the prompt or in an answer.
  std::optional<std::string> Ask() {
    for (;;) {
      std::optional<std::string> message = ReadMessage();
      if (!interrupted_) return message;
      left_ = !lines_.terminal() || Interrupt::Count() > 1;
      if (left_) return std::nullopt;
      std::printf("(Ctrl-C again leaves, and so does Ctrl-D)\n");
    }
  }

  // One of one or several lines; nothing at the end of input, and with interrupted_.
  std::optional<std::string> ReadMessage() {
    std::optional<std::string> line = ReadLine("> ");
    if (!line) return std::nullopt;
    std::string message;
    if (*line == "\"\"\"") {
      while ((line = ReadLine(". ")) && *line != "\"\"\"") message += *line + "\n";
      if (!message.empty()) message.pop_back();
    } else {
      while (line && line->ends_with('\\')) {
        line->pop_back();
        message += *line + "\n";
        line = ReadLine(". ");
      }
      if (line) message += *line;
    }
    if (interrupted_) return std::nullopt;
    lines_.Keep(message);
    return message;
  }

  std::optional<std::string> ReadLine(const char* prompt) {
    const int before = Interrupt::Count();
    std::optional<std::string> line;
    {
      const InterruptedReads reads;
      line = lines_.Read(prompt);
    }
    interrupted_ = !line && Interrupt::Count() > before;
    if (line) Interrupt::Forget(before);  // what came behind Enter is meant for the answer
    return line;
  }

  void Command(const std::string& line) {
    const size_t space = line.find(' ');
    const std::string name = line.substr(0, space);
    const std::string file = space == std::string::npos ? "" : line.substr(space + 1);
    if (name == "/reset") {
      Reset();
    } else if (name == "/help") {
      std::printf("%s\n", kCommands);
    } else if (name == "/undo" || name == "/retry") {
      if (messages_.empty() || messages_.back().role != "assistant") {
        std::fprintf(stderr, "latte: there is no answer to take back\n");
        return;
      }
      messages_.pop_back();
      if (name == "/retry") return Answer();
      messages_.pop_back();
    } else if (name == "/save" && !file.empty()) {
      Save(file);
    } else if (name == "/load" && !file.empty()) {
      Load(file);
    } else {
      std::fprintf(stderr, "latte: %s isn't a command: %s\n", formats::quote(line).c_str(), kCommands);
    }
  }

  void Reset() {
    messages_.clear();
    if (!options_.system.empty()) messages_.push_back({"system", options_.system});
    foreign_ = false;
  }

  // With the state go the messages, and the text and tokens that the state stands for.
  void Save(const std::string& file) {
    nlohmann::json note = {{"text", text_}, {"tokens", tokens_}, {"messages", nlohmann::json::array()}};
    for (const auto& message : messages_) note["messages"].push_back({{"role", message.role}, {"content", message.content}});
    session_.save(file, note.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }

  void Load(const std::string& file) {
    std::string note;
    runtime::Session session = runtime::Session::load(file, loaded_.model, &note);
    std::vector<formats::ChatMessage> messages;
    std::vector<int32_t> tokens;
    std::string text;
    const bool foreign = note.empty();  // of latte generate: what was said isn't known, and only what is new is read
    if (!foreign) {
      try {
        const auto json = nlohmann::json::parse(note);
        text = json.at("text").get<std::string>();
        tokens = json.at("tokens").get<std::vector<int32_t>>();
        for (const auto& message : json.at("messages")) {
          messages.push_back({message.at("role").get<std::string>(), message.at("content").get<std::string>()});
        }
      } catch (const nlohmann::json::exception&) {
        throw runtime::StateError(file + ": its note isn't a conversation");
      }
      if (static_cast<int64_t>(tokens.size()) != session.position()) {
        throw runtime::StateError(file + ": its conversation isn't what its state has read");
      }
    }
    session_ = std::move(session);
    messages_ = std::move(messages);
    tokens_ = std::move(tokens);
    text_ = std::move(text);
    foreign_ = foreign;
    if (!foreign) Remember();
  }

  // Notes which tokens the text was read as: an answer's needn't be those that its text would give.
  void NoteTokens() {
    constexpr size_t kMost = 256;
    if (known_.size() >= kMost) known_.erase(known_.begin());
    known_.emplace_back(text_, tokens_);
  }

  // And keeps the state.
  void Remember() {
    NoteTokens();
    cache_.put(tokens_, session_);
  }

  // Reads what the conversation has come to, from the longest beginning that is known.
  std::span<const float> Read() {
    const std::string text = loaded_.text.tokenizer()->apply_chat(messages_);
    if (foreign_) {
      const std::vector<int32_t> added = loaded_.text.Encode(text, false, true);
      foreign_ = false;
      text_.clear();  // matches nothing: the next turn reads its messages from their start
      tokens_.clear();
      known_to_cache_ = false;
      return Prefill(added);
    }
    std::vector<int32_t> tokens;
    size_t known = 0;
    for (const auto& [beginning, its_tokens] : known_) {
      if (beginning.size() <= known || !text.starts_with(beginning)) continue;
      known = beginning.size();
      tokens = its_tokens;
    }
    for (const int32_t token : loaded_.text.Encode(std::string_view(text).substr(known), known == 0, true)) {
      tokens.push_back(token);
    }
    if (tokens.empty()) throw std::invalid_argument("the chat template gives nothing to read");
    known_to_cache_ = true;
    if (auto state = cache_.longest(tokens)) {
      session_ = std::move(*state);
    } else {
      session_.truncate(0);
    }
    const auto done = static_cast<size_t>(session_.position());
    tokens_.assign(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(done));
    text_ = text;
    return Prefill({tokens.begin() + static_cast<std::ptrdiff_t>(done), tokens.end()});
  }

  std::span<const float> Prefill(const std::vector<int32_t>& tokens) {
    PromptProgress progress(static_cast<int64_t>(tokens.size()));
    read_ = 0;
    std::span<const float> logits;
    const auto read = [&](std::span<const int32_t> some) {
      const int64_t before = session_.position(), done = read_;
      logits = loaded_.engine.prefill(session_, some, [&](int64_t count) { return progress(done + count); });
      const int64_t count = session_.position() - before;
      tokens_.insert(tokens_.end(), some.begin(), some.begin() + count);
      read_ += count;
      return count == static_cast<int64_t>(some.size());
    };
    // The state that is kept lacks the last token, whose logits another answer (/retry) begins with.
    const std::span<const int32_t> all(tokens);
    whole_ = all.size() == 1 || read(all.first(all.size() - 1));
    if (!whole_) return logits;
    if (known_to_cache_ && all.size() > 1) cache_.put(tokens_, session_);
    whole_ = read(all.last(1));
    if (whole_ && known_to_cache_) NoteTokens();
    return logits;
  }

  // To the last message, which is the user's.
  void Answer() {
    std::string answer;
    int64_t count = 0;
    try {
      std::span<const float> logits = Read();
      StopFilter filter(options_.sampling.stop);
      const auto show = [&](const std::string& piece) {
        answer += piece;
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        std::fflush(stdout);
      };
      bool full = false;
      for (; count < options_.tokens && whole_ && !Interrupt::Seen(); ++count) {
        const int32_t token = sampler_.choose(logits);
        if (loaded_.text.EndsGeneration(token)) break;
        const std::string piece = loaded_.text.Piece(token);
        show(filter.Add(piece));
        if (filter.stopped() || (full = session_.room() < 1)) break;
        logits = loaded_.engine.decode(session_, token);
        tokens_.push_back(token);
        text_ += piece;
      }
      show(filter.Rest());
      std::fputs("\n", stdout);
      std::fflush(stdout);
      if (full) std::fprintf(stderr, "latte: the context is full: /reset begins anew\n");
    } catch (...) {
      messages_.pop_back();
      if (!answer.empty()) std::fputs("\n", stdout);
      Renew();
      throw;
    }
    messages_.push_back({"assistant", answer});
    if (whole_ && known_to_cache_) Remember();
    Renew();
    if (options_.stats) {
      std::fprintf(stderr, "read %lld tokens of %zu, wrote %lld; state %.1f MB; cache: %zu states, %.1f MB, %.1f MB on disk\n",
                   static_cast<long long>(read_), tokens_.size() - static_cast<size_t>(std::min<int64_t>(count, tokens_.size())),
                   static_cast<long long>(count), static_cast<double>(session_.bytes_in_use()) / 1e6, cache_.entries(),
                   static_cast<double>(cache_.memory_used()) / 1e6, static_cast<double>(cache_.disk_used()) / 1e6);
    }
  }

  runtime::Sampler NewSampler() const {
    SamplingChoice choice = options_.sampling;
    return MakeSampler(loaded_, choice);
  }

  // A grammar starts again with each answer.
  void Renew() {
    if (options_.sampling.grammar_file.empty() && options_.sampling.json_schema.empty()) return;
    sampler_ = NewSampler();
  }

  const Options& options_;
  LineReader lines_;
  Loaded loaded_;
  runtime::Sampler sampler_;
  runtime::Session session_;
  runtime::PromptCache cache_;
  std::vector<formats::ChatMessage> messages_;
  std::string text_;             // what the session has read and written
  std::vector<int32_t> tokens_;  // the same
  std::vector<std::pair<std::string, std::vector<int32_t>>> known_;
  bool foreign_ = false;
  bool known_to_cache_ = true;
  bool whole_ = true;         // the last reading wasn't interrupted
  bool interrupted_ = false;  // the last line wasn't finished: Ctrl-C
  bool left_ = false;         // by Ctrl-C
  int64_t read_ = 0;
};

}  // namespace

void AddChat(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("chat", "Talk with a model");
  AddModelOptions(*command, options->model);
  AddSamplingOptions(*command, options->sampling);
  command->add_option("--system", options->system, "What the model is told beforehand");
  command->add_option("--tokens,-n", options->tokens, "Longest answer")->check(CLI::Range(1, 1 << 24));
  command->add_option("--history", options->history,
                      "File of earlier messages, for the terminal's arrow keys; '': none (~/.local/state/latte/chat_history)");
  command->add_option("--cache-memory", options->cache_megabytes, "MB of states that are kept, so that nothing is read twice")
      ->check(CLI::Range(0, 1 << 24));
  command->add_option("--cache-folder", options->cache_folder, "Folder for states beyond that; removed at the end")
      ->check(CLI::ExistingDirectory);
  command->add_option("--cache-disk", options->cache_disk_megabytes, "MB of it")->check(CLI::Range(0, 1 << 30));
  command->add_flag("--stats", options->stats, "After each answer: tokens read and written, memory");
  command->footer(
      "In the conversation:\n"
      "  /save FILE, /load FILE   keep the conversation with the model's state, and go on from it\n"
      "  /retry, /undo            another answer; take the last question and answer back\n"
      "  /reset, /exit            begin anew; leave (so does Ctrl-D)\n"
      "  Ctrl-C                   stops an answer, or drops what is typed; a second one leaves\n"
      "  A line ending in \\ goes on, and so does all between two lines of \"\"\".\n\n"
      "Examples:\n"
      "  latte chat SmolLM2-135M-Instruct.Q4_1.gguf --system 'You are a patient teacher.'\n"
      "  latte chat model.gguf --adapter adapter.gguf --cache-memory 200 --cache-folder /var/tmp\n"
      "  echo 'Name three rivers.' | latte chat model.gguf --temperature 0");
  command->callback([options, &exit_code] { exit_code = Conversation(*options).Run(); });
}

}  // namespace latte::cli
