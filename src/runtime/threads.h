// A pool of pinned threads that run one function together and meet at barriers. A token's pass has some 150 short stages, so
// threads wait by spinning; between passes they spin for a moment and then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace latte::runtime {

// Its padding keeps what threads wait for on cache lines apart.
class ThreadPool {  // NOLINT(clang-analyzer-optin.performance.Padding)
 public:
  // `threads` >= 1, the caller of run() counted. Thread i runs on CPU cpus[i]; unless given, on the i-th CPU that this process
  // may use, or, where there are fewer, unpinned. The caller is pinned during run() only.
  explicit ThreadPool(int threads, std::vector<int> cpus = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Runs work(0) here and work(i) on the other threads; returns when all have. If some throw, the others stop at their next
  // barrier, and one of the exceptions is thrown here. One caller at a time.
  void run(const std::function<void(int)>& work);

  // Within work: returns when every thread has come.
  void barrier();

 private:
  struct Stopped {};  // thrown by barrier() when another thread has failed

  void loop(int index);
  void perform(int index);

  const int size_;
  std::vector<int> cpus_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
  bool quit_ = false;

  alignas(128) std::atomic<uint32_t> epoch_{0};     // counts runs
  alignas(128) std::atomic<int> running_{0};        // workers that haven't finished this run
  alignas(128) std::atomic<int> arrived_{0};        // at the barrier
  alignas(128) std::atomic<uint32_t> released_{0};  // barriers passed
  alignas(128) std::atomic<bool> failed_{false};
};

// Part `index` of `parts` of the units [0, count): sizes differ by one at most.
struct Share {
  int64_t begin;
  int64_t end;
};
inline Share share_of(int64_t count, int index, int parts) { return {count * index / parts, count * (index + 1) / parts}; }

}  // namespace latte::runtime
