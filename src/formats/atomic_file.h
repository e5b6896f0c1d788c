// Files that are either whole or not there: the content goes to a temporary file in the same folder, which takes the name of the
// real one when all of it has reached the disk. Until then, and after any failure, the old file stays as it was.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace latte::formats {

// The system calls of AtomicFile, so that tests can make any of them fail. Each behaves as its namesake in POSIX, errno included.
class FileOperations {
 public:
  virtual ~FileOperations() = default;
  virtual int open(const char* path, int flags, mode_t mode);
  virtual ssize_t write(int fd, const void* data, size_t size);
  virtual int fsync(int fd);
  virtual int close(int fd);
  virtual int rename(const char* from, const char* to);
  virtual int unlink(const char* path);

  static FileOperations& system();
};

// A new file `.NAME.PID-N.tmp` in the folder of `target`, of which the name is NAME. Never one that is there: another process may
// have left it behind, or whoever may write to the folder have put a link in its place.
struct TemporaryFile {
  std::string path;
  int fd = -1;  // negative where it couldn't be made; errno says why
};
TemporaryFile create_beside(const std::string& target, int flags, mode_t mode, FileOperations& operations);

// One writer, one thread. A link at `path` is followed; permissions of an existing file are kept. What the process leaves behind
// when it is killed while it writes is one file `.NAME.PID-N.tmp`.
class AtomicFile {
 public:
  // Throws FileError: no such folder, no permission, or `path` exists and isn't a regular file.
  explicit AtomicFile(const std::string& path, FileOperations& operations = FileOperations::system());
  ~AtomicFile();  // abandons what wasn't committed
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  // Appends to the temporary file, unbuffered. Throws FileError (a full disk, a limit on file sizes, a failing disk); the
  // temporary file is gone then, and later calls throw std::logic_error. RLIMIT_FSIZE is an error (EFBIG) only where the
  // process ignores SIGXFSZ.
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);

  // Puts the file in its place. Throws FileError, as write(). If it is the last step that fails (fsync of the folder), the new
  // file is in its place, but might not outlive a power cut.
  void commit();

  // Removes the temporary file. Does nothing after commit() or a failure.
  void abandon() noexcept;

  uint64_t size() const { return size_; }  // bytes written

 private:
  [[noreturn]] void fail(std::string_view action, int error_number);
  void require_open() const;

  FileOperations& operations_;
  std::string path_;       // as given, for messages
  std::string target_;     // with links followed
  std::string folder_;     // of target_
  std::string temporary_;  // empty when there is none
  int fd_ = -1;
  uint64_t size_ = 0;
};

// Writes a whole file. Throws FileError.
void write_file(const std::string& path, std::string_view text, FileOperations& operations = FileOperations::system());

}  // namespace latte::formats
