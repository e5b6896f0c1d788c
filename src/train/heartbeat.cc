#include "train/heartbeat.h"

#include <unistd.h>

#include <array>
#include <chrono>
#include <vector>

namespace latte::train {
namespace {

constexpr auto kPeriod = std::chrono::milliseconds(500);
constexpr int64_t kSilence = 6;                      // signs of this rank's own without one of another's
constexpr auto kPatience = std::chrono::seconds(5);  // with a store that has not answered the other thread
constexpr const char* kStoreIsGone = "the store where the ranks met no longer answers: rank 0, torchrun or the network has ended";

std::string name_of(const char* what, int64_t rank) { return std::string(what) + "/" + std::to_string(rank); }

std::string text_of(c10d::Store& store, const std::string& key) {
  if (!store.check({key})) return "";
  const std::vector<uint8_t> bytes = store.get(key);
  return {bytes.begin(), bytes.end()};
}

std::string host_and_process() {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  return "process " + std::to_string(getpid()) + " on " + host.data();
}

}  // namespace

Heartbeat::Heartbeat(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t ranks)
    : store_(std::move(store)), rank_(rank), ranks_(ranks) {
  const std::string who = host_and_process();
  store_->set(name_of("who", rank), std::vector<uint8_t>(who.begin(), who.end()));
  beat();
  thread_ = std::thread([this] { run(); });
}

Heartbeat::~Heartbeat() { stop(); }

void Heartbeat::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Heartbeat::beat() {
  ++beats_;
  store_->add(name_of("beat", rank_), 1);
}

void Heartbeat::run() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, kPeriod, [this] { return stop_; })) {
    try {
      beat();
    } catch (const std::exception&) {
      return;  // the store is gone; a collective will say so
    }
  }
}

std::string Heartbeat::whose_fault() {
  failed_ = true;
  const auto beats_of = [this](int64_t rank) { return store_->add(name_of("beat", rank), 0); };
  try {
    std::vector<int64_t> before;
    std::unique_lock lock(mutex_, kPatience);
    if (!lock) return kStoreIsGone;
    for (int64_t rank = 0; rank < ranks_; ++rank) before.push_back(beats_of(rank));
    const int64_t start = beats_;
    while (beats_ < start + kSilence) {
      // This thread beats as well: the other one ends where the store doesn't answer.
      wake_.wait_for(lock, kPeriod, [] { return false; });
      beat();
    }
    std::string words, silent;
    for (int64_t rank = 0; rank < ranks_; ++rank) {
      if (rank == rank_) continue;
      const std::string word = text_of(*store_, name_of("word", rank));
      if (!word.empty() && words.empty()) words = "rank " + std::to_string(rank) + " failed: " + word;
      if (word.empty() && beats_of(rank) == before[static_cast<size_t>(rank)]) {
        silent +=
            (silent.empty() ? "rank " : ", rank ") + std::to_string(rank) + " (" + text_of(*store_, name_of("who", rank)) + ")";
      }
    }
    if (!silent.empty()) return silent + " no longer answers";
    if (!words.empty()) return words;
    return "";
  } catch (const std::exception&) {
    return kStoreIsGone;
  }
}

void Heartbeat::leave_word(const std::string& error) noexcept {
  failed_ = true;
  try {
    const std::unique_lock lock(mutex_, kPatience);
    if (!lock) return;
    store_->set(name_of("word", rank_), std::vector<uint8_t>(error.begin(), error.end()));
  } catch (const std::exception&) {
    return;
  }
}

}  // namespace latte::train
