#include "train/run_folder.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <stdexcept>
#include <string_view>

#include "formats/error.h"
#include "train/training_checkpoint.h"

namespace latte::train {
namespace {

// The process whose AtomicFile a file `.NAME.PID-N.tmp` was; 0 for another name.
pid_t writer_of(std::string_view name) {
  constexpr std::string_view kEnd = ".tmp";
  if (!name.starts_with(".") || !name.ends_with(kEnd)) return 0;
  name.remove_suffix(kEnd.size());
  const size_t dot = name.rfind('.'), dash = name.rfind('-');
  if (dot == 0 || dash == std::string_view::npos || dash < dot) return 0;
  pid_t process = 0;
  const auto [end, error] = std::from_chars(name.data() + dot + 1, name.data() + dash, process);
  return error == std::errc() && end == name.data() + dash ? process : 0;
}

}  // namespace

RunFolder::RunFolder(const std::string& path) : path_(path) {
  std::error_code error;
  std::filesystem::create_directories(path_, error);
  if (error) throw formats::FileError("make", path, error.value());
  const std::string lock = (path_ / ".lock").string();
  lock_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (lock_ < 0) throw formats::FileError("open", lock, errno);
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    ::close(lock_);
    throw std::runtime_error("another process trains in " + path);
  }
  remove_remnants();
}

RunFolder::~RunFolder() { ::close(lock_); }

std::string RunFolder::checkpoint() const { return *this / formats::kCheckpointName; }

void RunFolder::remove_remnants() const {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(path_, ignored)) {
    const std::string name = entry.path().filename().string();
    // Checkpoints are written by who holds the lock alone; other files, a task's examples say, perhaps by another rank just now.
    const pid_t writer = writer_of(name);
    const bool left = writer > 0 && ::kill(writer, 0) != 0 && errno == ESRCH;
    if (left || (writer > 0 && name.starts_with(".checkpoint.safetensors."))) std::filesystem::remove(entry.path(), ignored);
  }
}

}  // namespace latte::train
