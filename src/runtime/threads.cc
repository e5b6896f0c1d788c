#include "runtime/threads.h"

#include <pthread.h>
#include <sched.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace latte::runtime {
namespace {

constexpr int kSpinsBeforeSleep = 20000;  // some 200 µs: longer than choosing the next token takes
constexpr int kSpinsAtBarrier = 4000;  // where each thread has a CPU, nobody waits this long; else sleeping lets the others run

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (::sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

void pin_to(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  ::sched_setaffinity(0, sizeof(set), &set);  // a wish: where it isn't granted, the system chooses
}

// Pins the calling thread until the end of the scope.
class PinnedHere {
 public:
  explicit PinnedHere(int cpu) {
    if (cpu < 0 || ::sched_getaffinity(0, sizeof(before_), &before_) != 0) return;
    changed_ = true;
    pin_to(cpu);
  }
  ~PinnedHere() {
    if (changed_) ::sched_setaffinity(0, sizeof(before_), &before_);
  }
  PinnedHere(const PinnedHere&) = delete;
  PinnedHere& operator=(const PinnedHere&) = delete;

 private:
  cpu_set_t before_;
  bool changed_ = false;
};

}  // namespace

ThreadPool::ThreadPool(int threads, std::vector<int> cpus) : size_(threads), cpus_(std::move(cpus)) {
  if (cpus_.empty()) cpus_ = allowed_cpus();
  if (cpus_.size() < static_cast<size_t>(size_)) cpus_.assign(static_cast<size_t>(size_), -1);
  for (int i = 1; i < size_; ++i) workers_.emplace_back([this, i] { loop(i); });
}

ThreadPool::~ThreadPool() {
  quit_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& work) {
  const PinnedHere pinned(size_ > 1 ? cpus_[0] : -1);
  work_ = &work;
  failure_ = nullptr;
  failed_.store(false, std::memory_order_relaxed);
  arrived_.store(0, std::memory_order_relaxed);
  running_.store(size_ - 1, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  perform(0);
  int spins = 0;
  for (int left; (left = running_.load(std::memory_order_acquire)) != 0; ++spins) {
    if (spins < kSpinsAtBarrier) {
      relax();
    } else {
      running_.wait(left, std::memory_order_acquire);
    }
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void ThreadPool::barrier() {
  if (size_ == 1) return;
  const uint32_t turn = released_.load(std::memory_order_relaxed);
  if (failed_.load(std::memory_order_acquire)) throw Stopped();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    released_.fetch_add(1, std::memory_order_release);
    released_.notify_all();
    return;
  }
  for (int spins = 0; released_.load(std::memory_order_acquire) == turn; ++spins) {
    if (spins < kSpinsAtBarrier) {
      relax();
    } else {
      released_.wait(turn, std::memory_order_acquire);
    }
  }
  if (failed_.load(std::memory_order_acquire)) throw Stopped();
}

void ThreadPool::loop(int index) {
  if (cpus_[static_cast<size_t>(index)] >= 0) pin_to(cpus_[static_cast<size_t>(index)]);
  for (uint32_t seen = 0;; ++seen) {
    for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; ++spins) {
      if (spins < kSpinsBeforeSleep) {
        relax();
      } else {
        epoch_.wait(seen, std::memory_order_acquire);
      }
    }
    if (quit_) return;
    perform(index);
    running_.fetch_sub(1, std::memory_order_release);
    running_.notify_all();
  }
}

void ThreadPool::perform(int index) {
  try {
    (*work_)(index);
  } catch (const Stopped&) {
  } catch (...) {
    const std::lock_guard lock(failure_mutex_);
    if (!failure_) failure_ = std::current_exception();
    failed_.store(true, std::memory_order_release);
    released_.fetch_add(1, std::memory_order_release);  // lets those go that wait for this thread
    released_.notify_all();
  }
}

}  // namespace latte::runtime
