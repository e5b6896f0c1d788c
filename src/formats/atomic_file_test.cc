#include "formats/atomic_file.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <string>

#include "formats/error.h"
#include "formats/mapped_file.h"
#include "formats/test_files.h"

namespace latte::formats {
namespace {

enum class Call { kNone, kOpen, kWrite, kFsync, kClose, kRename, kOpenFolder, kFsyncFolder };

// The system's calls, one of which fails.
class FaultyOperations : public FileOperations {
 public:
  FaultyOperations(Call faulty, int error_number) : faulty_(faulty), error_number_(error_number) {}

  int open(const char* path, int flags, mode_t mode) override {
    const bool folder = (flags & O_DIRECTORY) != 0;
    if (fails(folder ? Call::kOpenFolder : Call::kOpen)) return -1;
    const int fd = FileOperations::open(path, flags, mode);
    if (folder) folder_ = fd;
    return fd;
  }
  ssize_t write(int fd, const void* data, size_t size) override {
    if (fails(Call::kWrite)) return -1;
    return FileOperations::write(fd, data, size);
  }
  int fsync(int fd) override {
    if (fails(fd == folder_ ? Call::kFsyncFolder : Call::kFsync)) return -1;
    return FileOperations::fsync(fd);
  }
  int close(int fd) override {
    const int result = FileOperations::close(fd);
    return fails(Call::kClose) ? -1 : result;
  }
  int rename(const char* from, const char* to) override {
    if (fails(Call::kRename)) return -1;
    return FileOperations::rename(from, to);
  }

 private:
  bool fails(Call call) const {
    if (call == faulty_) errno = error_number_;
    return call == faulty_;
  }

  Call faulty_;
  int error_number_;
  int folder_ = -1;
};

// Writes a few bytes at a time and is interrupted before each.
class HaltingOperations : public FileOperations {
 public:
  ssize_t write(int fd, const void* data, size_t size) override {
    if (interrupt_ = !interrupt_; interrupt_) {
      errno = EINTR;
      return -1;
    }
    return FileOperations::write(fd, data, size < 3 ? size : 3);
  }

 private:
  bool interrupt_ = false;
};

class AtomicFileTest : public ::testing::Test {
 protected:
  TestFolder folder_;
  const std::string path_ = folder_ / "file.txt";
};

TEST_F(AtomicFileTest, AppearsWithCommitOnly) {
  AtomicFile file(path_);
  file.write("one ");
  file.write("two");
  EXPECT_FALSE(std::filesystem::exists(path_));
  EXPECT_EQ(file.size(), 7u);
  file.commit();
  EXPECT_EQ(read_bytes(path_), "one two");
  EXPECT_EQ(folder_.names(), std::set<std::string>{"file.txt"});
  EXPECT_THROW(file.write("three"), std::logic_error);
  EXPECT_THROW(file.commit(), std::logic_error);
}

TEST_F(AtomicFileTest, ReplacesTheOldFileAndKeepsItsPermissions) {
  write_bytes(path_, "old and longer");
  ASSERT_EQ(::chmod(path_.c_str(), 0640), 0);
  write_file(path_, "new");
  EXPECT_EQ(read_bytes(path_), "new");
  struct stat status {};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0640u);
}

TEST_F(AtomicFileTest, DestructorAbandons) {
  write_bytes(path_, "old");
  {
    AtomicFile file(path_);
    file.write("new");
  }
  EXPECT_EQ(read_bytes(path_), "old");
  EXPECT_EQ(folder_.names(), std::set<std::string>{"file.txt"});
}

TEST_F(AtomicFileTest, ShortAndInterruptedWritesGoOn) {
  HaltingOperations operations;
  AtomicFile file(path_, operations);
  file.write("all of this arrives");
  file.commit();
  EXPECT_EQ(read_bytes(path_), "all of this arrives");
}

TEST_F(AtomicFileTest, EveryFailureBeforeTheRenameLeavesTheOldFile) {
  for (Call call : {Call::kOpen, Call::kWrite, Call::kFsync, Call::kClose, Call::kRename}) {
    for (int error_number : {ENOSPC, EIO, EDQUOT}) {
      write_bytes(path_, "old");
      FaultyOperations operations(call, error_number);
      try {
        AtomicFile file(path_, operations);
        file.write("new");
        file.commit();
        ADD_FAILURE() << "call " << static_cast<int>(call);
      } catch (const FileError& error) {
        EXPECT_EQ(error.error_number(), error_number);
        EXPECT_EQ(error.path(), path_);
        EXPECT_EQ(std::string(error.what()), "cannot write " + path_ + ": " + std::generic_category().message(error_number));
      }
      EXPECT_EQ(read_bytes(path_), "old");
      EXPECT_EQ(folder_.names(), std::set<std::string>{"file.txt"}) << "call " << static_cast<int>(call);
    }
  }
}

TEST_F(AtomicFileTest, FailingToSyncTheFolderIsReported) {
  for (Call call : {Call::kOpenFolder, Call::kFsyncFolder}) {
    FaultyOperations operations(call, EIO);
    AtomicFile file(path_, operations);
    file.write("new");
    EXPECT_THROW(file.commit(), FileError);
    EXPECT_EQ(read_bytes(path_), "new");
  }
  FaultyOperations unsupported(Call::kFsyncFolder, EINVAL);  // what some network file systems answer
  AtomicFile file(path_, unsupported);
  EXPECT_NO_THROW(file.commit());
}

// A real limit: the kernel refuses in the middle of the file.
TEST_F(AtomicFileTest, LimitOnFileSizes) {
  write_bytes(path_, "old");
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{4096, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  int error_number = 0;
  uint64_t written = 0;
  {
    AtomicFile file(path_);
    try {
      for (int i = 0; i < 10; ++i) file.write(std::string(1000, 'x'));
    } catch (const FileError& error) {
      error_number = error.error_number();
    }
    written = file.size();
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(error_number, EFBIG);
  EXPECT_EQ(written, 4096u);
  EXPECT_EQ(read_bytes(path_), "old");
  EXPECT_EQ(folder_.names(), std::set<std::string>{"file.txt"});
}

// A real full disk: whatever is written, /dev/full answers ENOSPC.
TEST_F(AtomicFileTest, FullDisk) {
  class FullDisk : public FileOperations {
   public:
    ssize_t write(int, const void* data, size_t size) override {
      const int full = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
      const ssize_t written = ::write(full, data, size);
      const int error_number = errno;
      ::close(full);
      errno = error_number;
      return written;
    }
  } full;
  if (::access("/dev/full", W_OK) != 0) GTEST_SKIP() << "no /dev/full";
  write_bytes(path_, "old");
  const std::string text = error_text<FileError>([&] {
    AtomicFile file(path_, full);
    file.write("new");
    file.commit();
  });
  EXPECT_EQ(text, "cannot write " + path_ + ": No space left on device");
  EXPECT_EQ(read_bytes(path_), "old");
}

TEST_F(AtomicFileTest, RefusesWhatIsNoRegularFile) {
  EXPECT_CONTAINS(error_text<FileError>([&] { AtomicFile file(folder_ / ""); }), "Is a directory");
  EXPECT_CONTAINS(error_text<FileError>([&] { AtomicFile file(folder_ / "."); }), "Is a directory");
  EXPECT_CONTAINS(error_text<FileError>([] { AtomicFile file("/dev/null"); }), "isn't a regular file");
  EXPECT_CONTAINS(error_text<FileError>([&] { AtomicFile file(folder_ / "no/such/folder"); }), "No such file or directory");
  EXPECT_CONTAINS(error_text<FileError>([] { AtomicFile file(""); }), "cannot write");
  EXPECT_EQ(folder_.names(), std::set<std::string>{});
}

TEST_F(AtomicFileTest, RefusesAReadOnlyFile) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write any file";
  write_bytes(path_, "old");
  ASSERT_EQ(::chmod(path_.c_str(), 0444), 0);
  EXPECT_CONTAINS(error_text<FileError>([&] { AtomicFile file(path_); }), "Permission denied");
}

TEST_F(AtomicFileTest, FollowsLinks) {
  std::filesystem::create_directory(folder_ / "real");
  write_bytes(folder_ / "real/file", "old");
  std::filesystem::create_symlink("real/file", folder_ / "link");
  write_file(folder_ / "link", "new");
  EXPECT_TRUE(std::filesystem::is_symlink(folder_ / "link"));
  EXPECT_EQ(read_bytes(folder_ / "real/file"), "new");
}

TEST_F(AtomicFileTest, LongNamesAndWhatAKilledProcessLeft) {
  const std::string name(255, 'n');
  write_file(folder_ / name, "text");
  EXPECT_EQ(folder_.names(), std::set<std::string>{name});
  for (int i = 0; i < 50; ++i)
    write_bytes(folder_ / (".stale." + std::to_string(::getpid()) + "-" + std::to_string(i) + ".tmp"), "");
  write_file(folder_ / "stale", "text");
  EXPECT_EQ(read_bytes(folder_ / "stale"), "text");
  EXPECT_EQ(folder_.names().size(), 52u);
}

TEST_F(AtomicFileTest, TwoWritersOfOneFile) {
  AtomicFile first(path_), second(path_);
  first.write("first");
  second.write("second");
  first.commit();
  EXPECT_EQ(read_bytes(path_), "first");
  second.commit();
  EXPECT_EQ(read_bytes(path_), "second");
}

TEST_F(AtomicFileTest, ErrorsStayOnOneLine) {
  const std::string text = error_text<FileError>([] { MappedFile file("no\nsuch\x1b[31mfile"); });
  EXPECT_EQ(text, "cannot open \"no\\x0asuch\\x1b[31mfile\": No such file or directory");
  EXPECT_EQ(quote("caf\xc3\xa9 \xff \xc2\x85"), "\"caf\xc3\xa9 \\xff \\x85\"");
  EXPECT_EQ(quote(std::string(1000, 'a')), "\"" + std::string(64, 'a') + "…\"");
}

TEST_F(AtomicFileTest, MappedFile) {
  write_bytes(path_, "mapped");
  MappedFile file(path_);
  EXPECT_EQ(file.text(), "mapped");
  write_file(path_, "other content");
  EXPECT_EQ(file.text(), "mapped");  // the old file lives as long as it is mapped
  MappedFile moved(std::move(file));
  EXPECT_EQ(moved.text(), "mapped");
  write_bytes(folder_ / "empty", "");
  moved = MappedFile(folder_ / "empty");
  EXPECT_EQ(moved.size(), 0u);

  EXPECT_CONTAINS(error_text<FileError>([&] { MappedFile f(folder_ / "none"); }), "No such file or directory");
  EXPECT_CONTAINS(error_text<FileError>([&] { MappedFile f(folder_ / ""); }), "Is a directory");
  EXPECT_CONTAINS(error_text<FileError>([] { MappedFile f("/dev/zero"); }), "isn't a regular file");
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_CONTAINS(error_text<FileError>([&] { MappedFile f(folder_ / "pipe"); }), "isn't a regular file");
}

}  // namespace
}  // namespace latte::formats
