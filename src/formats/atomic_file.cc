#include "formats/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <utility>

#include "formats/error.h"

namespace latte::formats {

int FileOperations::open(const char* path, int flags, mode_t mode) { return ::open(path, flags, mode); }
ssize_t FileOperations::write(int fd, const void* data, size_t size) { return ::write(fd, data, size); }
int FileOperations::fsync(int fd) { return ::fsync(fd); }
int FileOperations::close(int fd) { return ::close(fd); }
int FileOperations::rename(const char* from, const char* to) { return ::rename(from, to); }
int FileOperations::unlink(const char* path) { return ::unlink(path); }

FileOperations& FileOperations::system() {
  static FileOperations operations;
  return operations;
}

TemporaryFile create_beside(const std::string& target, int flags, mode_t mode, FileOperations& operations) {
  static std::atomic<unsigned> counter{0};
  constexpr int kAttempts = 1000;       // of finding a name that no killed process left behind
  constexpr size_t kLongestName = 200;  // leaves room for the rest within NAME_MAX
  const std::filesystem::path path = target;
  const std::string begin = "." + path.filename().string().substr(0, kLongestName) + "." + std::to_string(::getpid()) + "-";
  TemporaryFile made;
  for (int attempt = 0;; ++attempt) {
    made.path = (path.parent_path() / (begin + std::to_string(counter++) + ".tmp")).string();
    made.fd = operations.open(made.path.c_str(), flags | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (made.fd >= 0 || (errno != EINTR && (errno != EEXIST || attempt == kAttempts))) return made;
  }
}

AtomicFile::AtomicFile(const std::string& path, FileOperations& operations) : operations_(operations), path_(path) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  fs::path target = path;
  if (fs::is_symlink(fs::symlink_status(target, ignored))) {
    const fs::path resolved = fs::canonical(target, ignored);
    if (!ignored) target = resolved;  // a link to nothing is replaced
  }
  target_ = target.string();
  folder_ = target.has_parent_path() ? target.parent_path().string() : ".";
  const std::string name = target.filename().string();
  if (name.empty()) fail("write", EISDIR);

  struct stat status {};
  const bool exists = ::stat(target_.c_str(), &status) == 0;
  if (exists && S_ISDIR(status.st_mode)) fail("write", EISDIR);
  // A rename over /dev/null would succeed, for root.
  if (exists && !S_ISREG(status.st_mode)) fail("replace what isn't a regular file,", EINVAL);
  // Neither does a rename ask whether the file that it replaces may be written.
  if (exists && ::faccessat(AT_FDCWD, target_.c_str(), W_OK, AT_EACCESS) != 0) fail("write", errno);

  TemporaryFile made = create_beside(target_, O_WRONLY, 0666, operations_);
  if (made.fd < 0) fail("write", errno);
  fd_ = made.fd;
  temporary_ = std::move(made.path);
  if (exists && ::fchmod(fd_, status.st_mode & 07777) != 0) fail("write", errno);
}

AtomicFile::~AtomicFile() { abandon(); }

void AtomicFile::write(std::span<const std::byte> bytes) {
  require_open();
  constexpr size_t kLargest = size_t{1} << 30;  // Linux writes at most 2 GiB in one call
  while (!bytes.empty()) {
    const ssize_t written = operations_.write(fd_, bytes.data(), std::min(bytes.size(), kLargest));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail("write", written < 0 ? errno : EIO);
    bytes = bytes.subspan(static_cast<size_t>(written));
    size_ += static_cast<uint64_t>(written);
  }
}

void AtomicFile::write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }

void AtomicFile::commit() {
  require_open();
  // A disk that is full or failing may say so only now.
  if (operations_.fsync(fd_) != 0) fail("write", errno);
  const int fd = fd_;
  fd_ = -1;
  if (operations_.close(fd) != 0 && errno != EINTR) fail("write", errno);
  if (operations_.rename(temporary_.c_str(), target_.c_str()) != 0) fail("write", errno);
  temporary_.clear();

  const int folder = operations_.open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (folder < 0) {
    if (errno == EACCES) return;  // a folder that may be written, not read: nothing more can be done
    fail("write the folder of", errno);
  }
  const int error_number = operations_.fsync(folder) == 0 ? 0 : errno;
  operations_.close(folder);
  const bool unsupported = error_number == EINVAL || error_number == ENOTSUP;  // some network file systems
  if (error_number != 0 && !unsupported) fail("write the folder of", error_number);
}

void AtomicFile::abandon() noexcept {
  if (fd_ >= 0) operations_.close(fd_);
  if (!temporary_.empty()) operations_.unlink(temporary_.c_str());
  fd_ = -1;
  temporary_.clear();
}

void AtomicFile::fail(std::string_view action, int error_number) {
  abandon();
  throw FileError(action, path_, error_number);
}

void AtomicFile::require_open() const {
  if (fd_ < 0) throw std::logic_error("AtomicFile: " + path_ + " is already committed or abandoned");
}

void write_file(const std::string& path, std::string_view text, FileOperations& operations) {
  AtomicFile file(path, operations);
  file.write(text);
  file.commit();
}

}  // namespace latte::formats
