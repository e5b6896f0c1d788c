// Lines from whoever sits at the terminal, with editing and history (libedit, where it was there to build with); else as they
// come.
#pragma once

#include <optional>
#include <string>

namespace latte::cli {

class LineReader {
 public:
  // `history` is a file that earlier lines come from and new ones go to; empty: none. Without a terminal nothing is shown or
  // kept.
  explicit LineReader(std::string history);

  bool terminal() const { return terminal_; }
  // Nothing at the end of input, and where a signal came while it was waited for (InterruptedReads).
  std::optional<std::string> Read(const char* prompt);
  // Keeps a text of one or several lines, to be called up and edited again. A file that can't be written is no reason to stop.
  void Keep(const std::string& text);

  // Where history is kept unless told: latte/chat_history in $XDG_STATE_HOME or ~/.local/state; empty without a home.
  static std::string DefaultHistory();

 private:
  std::string history_;
  bool terminal_;
};

}  // namespace latte::cli
