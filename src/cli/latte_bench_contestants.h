// Who runs in latte bench decode: an engine with one kind of attention that reads to a depth, goes back to it, reads and writes.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cli/latte_llama_peer.h"
#include "runtime/engine.h"

namespace latte::cli {

class Contestant {
 public:
  virtual ~Contestant() = default;
  // To the depth text.size(), with room for `more` tokens behind it; depths grow from call to call. Gives up after `seconds`, and
  // returns whether it came there.
  virtual bool Reach(std::span<const int32_t> text, int64_t more, double seconds) = 0;
  virtual void GoBack() = 0;  // to that depth
  virtual void Read(std::span<const int32_t> tokens) = 0;
  virtual void Write(int32_t token) = 0;  // one token, logits and all, in every session
  virtual void Rest() = 0;                // lets go of what one depth took and the next doesn't need
  virtual double StateMegabytes() const { return 0.0; }
  // Goes to the first depth that was reached with all of the state in use, if its state was kept: for comparing two depths in
  // turns.
  virtual bool GoToFirst() { return false; }

  std::string engine, attention;
  bool flash = false;  // llama.cpp's flash attention
  int64_t batch = 1;
  double resident = 0.0;              // megabytes that came with what it did
  bool out = false;                   // too slow for greater depths
  std::vector<double> reading_rates;  // tokens a second of the stretches that Reach() read
};

class LatteContestant final : public Contestant {
 public:
  LatteContestant(std::shared_ptr<const runtime::Model> model, int threads, int64_t most_tokens, std::string attention_name);

  bool Reach(std::span<const int32_t> text, int64_t more, double seconds) override;
  void GoBack() override;
  void Read(std::span<const int32_t> tokens) override { engine_.prefill(*session_, tokens); }
  void Write(int32_t token) override;
  void Rest() override;
  double StateMegabytes() const override { return static_cast<double>(session_->bytes_in_use()) / 1e6; }
  bool GoToFirst() override;

  const runtime::Model& model() const { return *model_; }
  // Makes `count` sessions, copies of one that has read `text`, steps each of them once with the others, and returns the
  // megabytes that each took of the process. Throws MemoryError.
  double MegabytesOfSessions(int64_t count, std::span<const int32_t> text);

 private:
  std::shared_ptr<const runtime::Model> model_;
  runtime::Engine engine_;
  runtime::SessionOptions session_options_;
  std::optional<runtime::Session> session_, marked_, first_;  // marked_ and first_: of what can't be taken back
  int64_t depth_ = 0;
  std::vector<runtime::Session> others_;
};

class LlamaContestant final : public Contestant {
 public:
  LlamaContestant(const std::string& path, int threads, bool flash_attention);

  bool Reach(std::span<const int32_t> text, int64_t more, double seconds) override;
  void GoBack() override { peer_.go_back(depth_); }
  void Read(std::span<const int32_t> tokens) override { peer_.read(tokens); }
  void Write(int32_t token) override { peer_.read({&token, 1}); }
  void Rest() override { peer_.stop(); }

 private:
  LlamaPeer peer_;
  int64_t depth_ = 0;
};

}  // namespace latte::cli
