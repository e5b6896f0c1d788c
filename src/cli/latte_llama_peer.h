// llama.cpp beside latte in one process: the same file, threads and tokens, through libllama.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

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
  // Brings an empty context to depth text.size(). A cache of keys and values costs the same whatever they are: beyond the first
  // 2048 tokens it is filled with copies of theirs, moved to the positions that follow, in moments instead of minutes. Models
  // with windows of their own are read. Returns whether it got there within `seconds`.
  bool fill(std::span<const int32_t> text, double seconds);
  void go_back(int64_t position);
  int64_t position() const { return position_; }

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
  std::vector<uint8_t> beginning_;  // the state of the first tokens, and how flash attention was set for it
  bool beginning_flash_ = false;
  bool flash_ = false;
  int threads_;
  int64_t position_ = 0;
};

}  // namespace latte::cli
