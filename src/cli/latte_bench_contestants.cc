#include "cli/latte_bench_contestants.h"

#include <algorithm>
#include <chrono>

#include "cli/latte_text.h"
#include "runtime/error.h"
#include "runtime/memory.h"

namespace latte::cli {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

LatteContestant::LatteContestant(std::shared_ptr<const runtime::Model> model, int threads, int64_t most_tokens,
                                 std::string attention_name)
    : model_(std::move(model)), engine_(model_, {threads, {}, 512}) {
  engine = "latte";
  attention = std::move(attention_name);
  session_options_.context = most_tokens;
}

bool LatteContestant::Reach(std::span<const int32_t> text, int64_t more, double seconds) {
  if (!session_) session_.emplace(model_, session_options_);
  if (session_->position() > static_cast<int64_t>(text.size())) session_->truncate(0);
  reading_rates.clear();
  const auto start = Clock::now();
  constexpr size_t kStretch = 2048;
  for (auto read = static_cast<size_t>(session_->position()); read < text.size();) {
    if (SecondsSince(start) > seconds) return false;
    const auto begin = Clock::now();
    const size_t count = std::min(kStretch, text.size() - read);
    engine_.prefill(*session_, text.subspan(read, count));
    read += count;
    if (count == kStretch || reading_rates.empty()) reading_rates.push_back(static_cast<double>(count) / SecondsSince(begin));
  }
  depth_ = session_->position();
  const auto& layers = model_->shape().layers;
  const bool forgets = std::any_of(layers.begin(), layers.end(),
                                   [](const runtime::LayerShape& layer) { return layer.window > 0 || layer.has_sums(); });
  if (forgets) marked_.emplace(*session_);
  return true;
}

void LatteContestant::GoBack() {
  others_.clear();
  if (marked_) {
    *session_ = *marked_;
  } else {
    session_->truncate(depth_);
  }
}

bool LatteContestant::GoToFirst() {
  if (!first_ || first_->position() == depth_) return false;
  *session_ = *first_;
  return true;
}

void LatteContestant::Write(int32_t token) {
  if (batch == 1) {
    engine_.decode(*session_, token);
    return;
  }
  while (others_.size() < static_cast<size_t>(batch)) others_.push_back(*session_);
  std::vector<runtime::StepPart> parts;
  for (runtime::Session& session : others_) parts.push_back({&session, {&token, 1}});
  engine_.step(parts);
}

void LatteContestant::Rest() {
  GoBack();
  constexpr int64_t kFull = 1000;  // tokens after which the usual windows are full
  if (marked_ && model_->shape().constant_state() && !first_ && depth_ >= kFull) {
    first_ = std::move(marked_);
    resident -= static_cast<double>(first_->bytes()) / 1e6;  // kept for the comparison alone
  }
  marked_.reset();
}

double LatteContestant::MegabytesOfSessions(int64_t count, std::span<const int32_t> text) {
  runtime::SessionOptions options;
  options.context = static_cast<int64_t>(text.size()) + 1;
  runtime::Session first(model_, options);
  engine_.prefill(first, text);
  engine_.decode(first, text[0]);
  const uint64_t needed = static_cast<uint64_t>(count) * runtime::Session::bytes_needed(*model_, options);
  if (const uint64_t available = runtime::available_memory(); needed > available) {
    throw runtime::MemoryError("no memory for " + std::to_string(count) + " sessions: " + std::to_string(needed >> 20) +
                               " MB are needed, " + std::to_string(available >> 20) + " MB are free");
  }
  const double before = ResidentMegabytes();
  std::vector<runtime::Session> sessions;
  sessions.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) sessions.push_back(first);
  constexpr size_t kTogether = 64;
  for (size_t i = 0; i < sessions.size(); i += kTogether) {
    std::vector<runtime::StepPart> parts;
    for (size_t j = i; j < std::min(sessions.size(), i + kTogether); ++j) {
      parts.push_back({&sessions[j], {&text[j % text.size()], 1}});
    }
    engine_.step(parts);
  }
  return (ResidentMegabytes() - before) / static_cast<double>(count);
}

LlamaContestant::LlamaContestant(const std::string& path, int threads, bool flash_attention) : peer_(path, threads) {
  engine = "llama.cpp";
  attention = "full";
  flash = flash_attention;
}

bool LlamaContestant::Reach(std::span<const int32_t> text, int64_t more, double seconds) {
  peer_.start((static_cast<int64_t>(text.size()) + more + 255) / 256 * 256, flash);
  depth_ = static_cast<int64_t>(text.size());
  return peer_.fill(text, seconds);
}

}  // namespace latte::cli
