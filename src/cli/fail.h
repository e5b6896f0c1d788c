// How both programs end in failure.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>

namespace latte::cli {

// Writes the message on one line, whatever it holds, and returns exit_code.
inline int Fail(std::string message, int exit_code) {
  const size_t end = message.find_last_not_of(" \n");
  message.erase(end == std::string::npos ? 0 : end + 1);
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::fflush(stdout);
  std::fprintf(stderr, "latte: error: %s\n", message.c_str());
  return exit_code;
}

}  // namespace latte::cli
