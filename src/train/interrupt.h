// Ctrl-C and SIGTERM as a flag to look at between steps.
#pragma once

namespace latte::train {

// While one lives, the first SIGINT or SIGTERM sets a flag, and a second one ends the program at once. One at a time.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  static bool interrupted();

  // What a shell shows for a program ended by Ctrl-C.
  static constexpr int kExitCode = 130;
};

}  // namespace latte::train
