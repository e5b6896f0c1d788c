// Ranks of sequence parallelism as threads of a test.
#pragma once

#include <torch/torch.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "nn/sequence_peers.h"

namespace latte::nn {

class ThreadPeers {
 public:
  explicit ThreadPeers(int64_t size) : size_(size) {}

  // Runs `work` on as many threads as there are ranks; rethrows what the first of them threw.
  void run(const std::function<void(SequencePeers&)>& work) {
    std::vector<std::thread> threads;
    std::exception_ptr failure;
    for (int64_t rank = 0; rank < size_; ++rank) {
      threads.emplace_back([&, rank] {
        Peer peer(*this, rank);
        try {
          work(peer);
        } catch (...) {
          const std::lock_guard lock(mutex_);
          if (!failed_) failure = std::current_exception();
          failed_ = true;
          arrived_.notify_all();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (failure) std::rethrow_exception(failure);
  }

  int64_t messages() const { return messages_; }
  bool idle() const { return boxes_.empty(); }  // every message was received

 private:
  class Peer : public SequencePeers {
   public:
    Peer(ThreadPeers& all, int64_t rank) : all_(all), rank_(rank) {}
    int64_t rank() const override { return rank_; }
    int64_t size() const override { return all_.size_; }
    void exchange(const at::Tensor& out, int64_t to, at::Tensor& in, int64_t from) override {
      TORCH_CHECK(out.is_contiguous() && in.is_contiguous() && to < size() && from < size() && to != rank_ && from != rank_);
      std::unique_lock lock(all_.mutex_);
      if (to >= 0) {
        all_.boxes_[{rank_, to}].push_back(out.detach().clone());
        ++all_.messages_;
        all_.arrived_.notify_all();
      }
      if (from < 0) return;
      const std::pair key(from, rank_);
      all_.arrived_.wait(lock, [&] { return all_.failed_ || all_.boxes_.contains(key); });
      if (all_.failed_) throw std::runtime_error("another rank failed");
      auto& box = all_.boxes_[key];
      const torch::NoGradGuard no_grad;
      TORCH_CHECK(in.sizes() == box.front().sizes() && in.scalar_type() == box.front().scalar_type());
      in.copy_(box.front());
      box.pop_front();
      if (box.empty()) all_.boxes_.erase(key);
    }

   private:
    ThreadPeers& all_;
    int64_t rank_;
  };

  int64_t size_, messages_ = 0;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::map<std::pair<int64_t, int64_t>, std::deque<at::Tensor>> boxes_;
  bool failed_ = false;
};

}  // namespace latte::nn
