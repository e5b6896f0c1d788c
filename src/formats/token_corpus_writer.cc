#include "formats/token_corpus_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <stdexcept>
#include <vector>

#include "formats/atomic_file.h"
#include "formats/error.h"
#include "formats/mapped_file.h"

namespace latte::formats {
namespace {

// A new file beside `target`. Never one that is there, as whoever may write to the folder could have put a link there.
int create_beside(const std::filesystem::path& target, FileOperations& operations) {
  constexpr int kAttempts = 1000;       // of finding a name that no killed process left behind
  constexpr size_t kLongestName = 200;  // leaves room for the rest within NAME_MAX
  const std::string begin = "." + target.filename().string().substr(0, kLongestName) + "." + std::to_string(::getpid()) + "-";
  for (int attempt = 0;; ++attempt) {
    const auto gathered = target.parent_path() / (begin + std::to_string(attempt) + ".tokens.tmp");
    const int fd = operations.open(gathered.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd >= 0) {
      operations.unlink(gathered.c_str());  // it ends with this process, however that ends
      return fd;
    }
    if (errno != EINTR && (errno != EEXIST || attempt == kAttempts)) throw FileError("create", gathered.string(), errno);
  }
}

}  // namespace

TokenCorpusWriter::TokenCorpusWriter(const std::string& path, int64_t vocab_size, const std::string& tokenizer,
                                     FileOperations& operations)
    : path_(path), tokenizer_(tokenizer), vocab_size_(vocab_size), operations_(operations) {
  { const AtomicFile writable(path, operations_); }  // a path that can't be written is refused before hours of work
  fd_ = create_beside(path, operations_);
}

TokenCorpusWriter::~TokenCorpusWriter() { operations_.close(fd_); }

void TokenCorpusWriter::add(std::span<const int64_t> tokens) {
  for (const int64_t token : tokens) {
    if (token < 0 || token >= vocab_size_) {
      throw std::invalid_argument("token " + std::to_string(token) + ", expected 0 to " + std::to_string(vocab_size_ - 1));
    }
  }
  if (is_narrow_corpus(vocab_size_)) {
    add_as<uint16_t>(tokens);
  } else {
    add_as<int32_t>(tokens);
  }
  size_ += static_cast<int64_t>(tokens.size());
}

template <typename T>
void TokenCorpusWriter::add_as(std::span<const int64_t> tokens) {
  const std::vector<T> narrow(tokens.begin(), tokens.end());
  auto bytes = std::as_bytes(std::span(narrow));
  while (!bytes.empty()) {
    const ssize_t written = operations_.write(fd_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) throw FileError("write the tokens of", path_, written < 0 ? errno : ENOSPC);
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
}

void TokenCorpusWriter::commit() {
  const MappedFile gathered("/proc/self/fd/" + std::to_string(fd_));
  TensorView view;
  view.name = "tokens";
  view.dtype = is_narrow_corpus(vocab_size_) ? DType::kInt16 : DType::kInt32;
  view.shape = {size_};
  view.data = gathered.bytes();
  write_safetensors(path_, {&view, 1}, token_corpus_metadata(vocab_size_, tokenizer_), operations_);
}

}  // namespace latte::formats
