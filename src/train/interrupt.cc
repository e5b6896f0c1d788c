#include "train/interrupt.h"

#include <csignal>

namespace latte::train {
namespace {

constexpr int kSignals[] = {SIGINT, SIGTERM};

volatile std::sig_atomic_t flag = 0;

void set_handler(int signal, void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  // System calls go on: a write of a checkpoint must not see EINTR.
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  sigaction(signal, &action, nullptr);
}

// What was ignored stays so: a shell starts background jobs without Ctrl-C.
bool is_ignored(int signal) {
  struct sigaction action = {};
  sigaction(signal, nullptr, &action);
  return action.sa_handler == SIG_IGN;
}

void on_signal(int) {
  flag = 1;
  for (const int signal : kSignals) {
    if (!is_ignored(signal)) set_handler(signal, SIG_DFL);
  }
}

}  // namespace

InterruptGuard::InterruptGuard() {
  flag = 0;
  for (const int signal : kSignals) {
    if (!is_ignored(signal)) set_handler(signal, on_signal);
  }
}

InterruptGuard::~InterruptGuard() {
  for (const int signal : kSignals) {
    if (!is_ignored(signal)) set_handler(signal, SIG_DFL);
  }
}

bool InterruptGuard::interrupted() { return flag != 0; }

}  // namespace latte::train
