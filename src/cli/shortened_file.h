// What both programs do when a file that they have mapped becomes shorter: the kernel answers reads behind its new end with
// SIGBUS.
#pragma once

#include <unistd.h>

#include <csignal>
#include <string_view>

namespace latte::cli {

// From here on such a read ends the program with a line on standard error and exit code 1, rather than with a core dump.
inline void ExplainShortenedFiles() {
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO;
  action.sa_sigaction = [](int signal, siginfo_t* info, void*) {
    if (info->si_code != BUS_ADRERR) {  // of the hardware: the read is repeated, and ends the process
      std::signal(signal, SIG_DFL);
      return;
    }
    constexpr std::string_view kMessage =
        "latte: error: a file became shorter while it was in use, or its disk failed; give a changed file a new name, or replace "
        "it "
        "by renaming\n";
    (void)!::write(STDERR_FILENO, kMessage.data(), kMessage.size());
    ::_exit(1);
  };
  ::sigaction(SIGBUS, &action, nullptr);
}

}  // namespace latte::cli
