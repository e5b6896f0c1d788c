// llama.cpp beside latte in one process: the same file, threads and tokens, through libllama.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace latte::cli {

class LlamaPeer {
 public:
  // Throws std::runtime_error where libllama can't load the model.
  LlamaPeer(const std::string& path, int threads);
  ~LlamaPeer();

  // A context for `tokens` tokens, empty. Throws std::runtime_error.
  void start(int64_t tokens, bool flash_attention);
  void stop();
  void read(std::span<const int32_t> tokens);  // behind what was read, in batches of 2048
  void go_back(int64_t position);
  int64_t position() const { return position_; }

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
  int threads_;
  int64_t position_ = 0;
};

}  // namespace latte::cli
