#include "formats/figure.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <iterator>

#include "formats/error.h"

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

// What gnuplot writes to, in memory: it doesn't notice a full disk, and would leave half a figure.
class MemoryFile {
 public:
  MemoryFile() : fd_(memfd_create("figure", 0)) {  // without CLOEXEC: gnuplot inherits it
    if (fd_ < 0) throw FileError("make", "a file in memory", errno);
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  std::string path() const { return "/dev/fd/" + std::to_string(fd_); }
  std::string content() const {
    struct stat status {};
    if (::fstat(fd_, &status) != 0) return {};
    std::string content(static_cast<size_t>(status.st_size), '\0');
    const ssize_t read = ::pread(fd_, content.data(), content.size(), 0);
    return read == static_cast<ssize_t>(content.size()) ? content : std::string();
  }

 private:
  int fd_;
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
                 const std::function<std::string(const std::string& svg, const std::string& png)>& script,
                 FileOperations& operations) {
  const MemoryFile svg, png;
  const std::string text = script(svg.path(), png.path());
  const IgnoredPipeSignal ignored;
  std::FILE* gnuplot = popen("gnuplot 2>/dev/null", "w");
  if (gnuplot == nullptr) return "no " + what + ": gnuplot can't be started";
  const bool written = std::fwrite(text.data(), 1, text.size(), gnuplot) == text.size();
  const int status = pclose(gnuplot);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 127) {
    return "no " + what + ": gnuplot isn't installed (apt-get install gnuplot-nox)";
  }
  const std::string drawn[] = {svg.content(), png.content()};
  if (written && status == 0 && !drawn[0].empty() && !drawn[1].empty()) {
    const char* endings[] = {".svg", ".png"};
    for (size_t i = 0; i < std::size(drawn); ++i) {
      AtomicFile file(prefix + endings[i], operations);
      file.write(drawn[i]);
      file.commit();
    }
    return {};
  }
  return "no " + what + ": gnuplot failed to draw " + prefix + ".svg and .png";
}

}  // namespace latte::formats
