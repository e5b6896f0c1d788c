// Signs of life of the ranks of a job, by way of the store where they met: so that those who lose another can say which.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>

namespace latte::train {

class Heartbeat {
 public:
  // `store` is a connection that nobody else uses.
  Heartbeat(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t ranks);
  ~Heartbeat();
  Heartbeat(const Heartbeat&) = delete;
  Heartbeat& operator=(const Heartbeat&) = delete;

  // After a collective has failed: which ranks ended with an error of their own, or give no sign of life while this one gives
  // several; time is counted in this rank's own signs, so that a machine that stands still accuses nobody. Empty where all are
  // well.
  std::string whose_fault();
  // Why this rank ends, for the others.
  void leave_word(const std::string& error) noexcept;
  // No more signs of life from here on.
  void stop();
  // Whether one has failed: whose_fault() or leave_word() was called.
  bool failed() const { return failed_; }

 private:
  void run();
  void beat();

  c10::intrusive_ptr<c10d::Store> store_;
  int64_t rank_, ranks_;
  std::atomic<bool> failed_ = false;
  std::timed_mutex mutex_;  // of what follows, and of the store
  std::condition_variable_any wake_;
  bool stop_ = false;
  int64_t beats_ = 0;
  std::thread thread_;
};

}  // namespace latte::train
