#include "cli/latte_line.h"

#include <unistd.h>

#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>

#ifdef LATTE_HAS_LIBEDIT
#include <editline/readline.h>
#endif

namespace latte::cli {

namespace {

constexpr int kKept = 1000;

}  // namespace

LineReader::LineReader(std::string history)
    : history_(std::move(history)), terminal_(::isatty(STDIN_FILENO) != 0 && ::isatty(STDOUT_FILENO) != 0) {
#ifdef LATTE_HAS_LIBEDIT
  if (!terminal_) return;
  std::setlocale(LC_CTYPE, "");  // characters of several bytes
  ::using_history();
  ::stifle_history(kKept);
  if (history_.empty()) return;
  std::error_code ignored;
  std::filesystem::create_directories(std::filesystem::path(history_).parent_path(), ignored);
  ::read_history(history_.c_str());
#endif
}

std::optional<std::string> LineReader::Read(const char* prompt) {
#ifdef LATTE_HAS_LIBEDIT
  if (terminal_) {
    std::fflush(stdout);
    char* read = ::readline(prompt);
    if (read == nullptr) {
      std::fputs("\n", stdout);
      return std::nullopt;
    }
    std::string line = read;
    std::free(read);
    return line;
  }
#endif
  if (terminal_) std::fputs(prompt, stdout);
  std::fflush(stdout);
  std::string line;
  if (!std::getline(std::cin, line)) {
    if (terminal_) {  // a signal; at its end a terminal says so again
      std::fputs("\n", stdout);
      std::cin.clear();
      std::clearerr(stdin);
    }
    return std::nullopt;
  }
  return line;
}

void LineReader::Keep(const std::string& text) {
#ifdef LATTE_HAS_LIBEDIT
  if (!terminal_ || text.empty()) return;
  ::add_history(text.c_str());
  if (!history_.empty()) ::write_history(history_.c_str());
#else
  static_cast<void>(text);
#endif
}

std::string LineReader::DefaultHistory() {
  const char* state = std::getenv("XDG_STATE_HOME");
  if (state != nullptr && state[0] == '/') return std::string(state) + "/latte/chat_history";
  const char* home = std::getenv("HOME");
  return home == nullptr || home[0] != '/' ? "" : std::string(home) + "/.local/state/latte/chat_history";
}

}  // namespace latte::cli
