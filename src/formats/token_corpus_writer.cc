#include "formats/token_corpus_writer.h"

#include <fcntl.h>

#include <cerrno>
#include <stdexcept>
#include <vector>

#include "formats/atomic_file.h"
#include "formats/error.h"
#include "formats/mapped_file.h"

namespace latte::formats {

TokenCorpusWriter::TokenCorpusWriter(const std::string& path, int64_t vocab_size, const std::string& tokenizer,
                                     FileOperations& operations)
    : path_(path), tokenizer_(tokenizer), vocab_size_(vocab_size), operations_(operations) {
  { const AtomicFile writable(path, operations_); }  // a path that can't be written is refused before hours of work
  const TemporaryFile gathered = create_beside(path, O_RDWR, 0600, operations_);
  if (gathered.fd < 0) throw FileError("create", gathered.path, errno);
  operations_.unlink(gathered.path.c_str());  // it ends with this process, however that ends
  fd_ = gathered.fd;
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
