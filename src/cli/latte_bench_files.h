// Files that a measurement makes for itself.
#pragma once

#include <atomic>
#include <csignal>
#include <string>

namespace latte::cli {

// A file that goes when this does, and when Ctrl-C ends the program meanwhile. It needn't be there.
class TemporaryFile {
 public:
  explicit TemporaryFile(std::string path);
  ~TemporaryFile();
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::atomic<const char*>* slot_ = nullptr;
};

// While this lives, Ctrl-C waits: a file that is being written has another name yet.
class InterruptsWait {
 public:
  InterruptsWait();
  ~InterruptsWait();
  InterruptsWait(const InterruptsWait&) = delete;
  InterruptsWait& operator=(const InterruptsWait&) = delete;

 private:
  sigset_t before_;
};

}  // namespace latte::cli
