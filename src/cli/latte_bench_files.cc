#include "cli/latte_bench_files.h"

#include <unistd.h>

#include <array>
#include <utility>

namespace latte::cli {
namespace {

std::array<std::atomic<const char*>, 8> files;  // lock-free, as a signal's handler needs it

void RemoveAndLeave(int) {
  for (const auto& file : files) {
    if (const char* path = file.load()) ::unlink(path);
  }
  ::_exit(130);
}

}  // namespace

TemporaryFile::TemporaryFile(std::string path) : path_(std::move(path)) {
  for (auto& file : files) {
    const char* none = nullptr;
    if (!file.compare_exchange_strong(none, path_.c_str())) continue;
    slot_ = &file;
    break;
  }
  for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, RemoveAndLeave);
}

TemporaryFile::~TemporaryFile() {
  if (slot_ != nullptr) slot_->store(nullptr);
  ::unlink(path_.c_str());
}

InterruptsWait::InterruptsWait() {
  sigset_t waiting;
  ::sigemptyset(&waiting);
  for (const int signal : {SIGINT, SIGTERM}) ::sigaddset(&waiting, signal);
  ::pthread_sigmask(SIG_BLOCK, &waiting, &before_);
}

InterruptsWait::~InterruptsWait() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

}  // namespace latte::cli
