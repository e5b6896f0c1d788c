#include "formats/figure.h"

#include <sys/wait.h>

#include <csignal>
#include <cstdio>
#include <filesystem>

namespace latte::formats {
namespace {

class IgnoredPipeSignal {
 public:
  IgnoredPipeSignal() {
    struct sigaction ignore = {};
    ignore.sa_handler = SIG_IGN;
    sigaction(SIGPIPE, &ignore, &previous_);
  }
  ~IgnoredPipeSignal() { sigaction(SIGPIPE, &previous_, nullptr); }
  IgnoredPipeSignal(const IgnoredPipeSignal&) = delete;
  IgnoredPipeSignal& operator=(const IgnoredPipeSignal&) = delete;

 private:
  struct sigaction previous_ = {};
};

}  // namespace

std::string in_quotes(std::string_view text) {
  std::string out = "'";
  for (const char c : text) {
    if (c == '\'') out += '\'';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + "'";
}

std::string draw(const std::string& what, const std::string& prefix,
                 const std::function<std::string(const std::string& svg, const std::string& png)>& script) {
  const std::string drawn[] = {prefix + ".new.svg", prefix + ".new.png"};
  const std::string text = script(drawn[0], drawn[1]);
  const IgnoredPipeSignal ignored;
  std::FILE* gnuplot = popen("gnuplot 2>/dev/null", "w");
  if (gnuplot == nullptr) return "no " + what + ": gnuplot can't be started";
  const bool written = std::fwrite(text.data(), 1, text.size(), gnuplot) == text.size();
  const int status = pclose(gnuplot);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 127) {
    return "no " + what + ": gnuplot isn't installed (apt-get install gnuplot-nox)";
  }
  std::error_code error;
  if (written && status == 0) {
    std::filesystem::rename(drawn[0], prefix + ".svg", error);
    if (!error) std::filesystem::rename(drawn[1], prefix + ".png", error);
    if (!error) return {};
  }
  for (const std::string& path : drawn) std::filesystem::remove(path, error);
  return "no " + what + ": gnuplot failed to draw " + prefix + ".svg and .png";
}

}  // namespace latte::formats
