#include "train/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>

#include "formats/error.h"
#include "train/training_checkpoint.h"

namespace latte::train {

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
    // What AtomicFile leaves of a process that was killed.
    if (name.starts_with(".") && name.ends_with(".tmp")) std::filesystem::remove(entry.path(), ignored);
  }
}

}  // namespace latte::train
