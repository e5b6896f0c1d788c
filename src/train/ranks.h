// The processes that train one model together, as torchrun starts them, over libtorch's c10d (Gloo).
//
// WORLD_SIZE = data parallel × sequence parallel. Rank r stands at r % sequence_parallel in its sequence and at
// r / sequence_parallel among the shares of a batch. Every rank holds the whole model; gradients are averaged over all ranks.
// Collectives have to be called by all ranks in the same order.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "data/text.h"
#include "nn/blocks.h"
#include "nn/sequence_peers.h"

namespace latte::train {

// Another rank, or the store where ranks meet, is gone: one line that says which.
class RanksError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct RanksOptions {
  int64_t sequence_parallel = 1;         // ranks that share a sequence; a divisor of WORLD_SIZE
  std::chrono::seconds timeout{600};     // longest wait for a rank that neither answers nor ends
  int64_t bucket_bytes = 4 << 20;        // gradients that travel together
  int64_t first_bucket_bytes = 1 << 20;  // smaller, so that the first travels early
};

// Of this rank, since it started or since clear().
struct RanksTraffic {
  double gradient_seconds = 0.0;  // waited for gradients that had not come when the backward pass was over
  double sequence_seconds = 0.0;  // waited for states and edges of a shared sequence
  int64_t gradient_bytes = 0;     // sent, by the ring: 2 (R - 1) / R of the gradients' size
  int64_t sequence_bytes = 0;     // sent
  int64_t messages = 0;           // sent by sequence parallelism
  int64_t buckets = 0;            // of gradients, sent
  int64_t early_buckets = 0;      // of them, those that set off before the first parameter had its gradient, the pass's last
  void clear() { *this = {}; }
};

class Ranks {
 public:
  // From RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; null where WORLD_SIZE is not set. GLOO_SOCKET_IFNAME names the network
  // interface, else the host's name does. Throws OptionError (an environment or options that can't be) and RanksError (the ranks
  // don't meet).
  static std::unique_ptr<Ranks> from_environment(const RanksOptions& options);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int64_t rank() const;
  int64_t size() const;
  bool leads() const { return rank() == 0; }  // the rank that reads checkpoints and writes everything
  int64_t sequence_parallel() const;
  int64_t data_parallel() const { return size() / sequence_parallel(); }
  int64_t restarts() const;  // torchrun's, of this job
  // That this job has a run of its own in that folder, remembered over restarts where torchrun's agent holds the store.
  void set_begun(const std::string& run);
  // On rank 0: whether an earlier attempt of this job said so; true where nobody could have remembered.
  bool has_begun(const std::string& run) const;

  // Throws OptionError unless sequences and tokens divide evenly.
  void check_divides(int64_t batch, int64_t context) const;
  // This rank's sequences, its stretch of each. `batch` holds all of them.
  TokenBatch share(const TokenBatch& batch) const;
  // This rank's stretch of sequences that are all its own.
  TokenBatch stretch(const TokenBatch& batch) const;
  // Of `count` items, those of this rank's sequences: first and one past the last.
  std::pair<int64_t, int64_t> share(int64_t count) const;
  // Null where this process is alone.
  nn::BatchPeers* batch_peers() const;
  // Null unless sequences are shared.
  nn::SequencePeers* sequence_peers() const;

  // The sum over all ranks of each number.
  std::vector<double> sum(std::vector<double> values);
  bool any(bool flag) { return sum({flag ? 1.0 : 0.0})[0] > 0; }
  // Rank 0's tensors, into all ranks'. Contiguous, on the CPU.
  void broadcast(const std::vector<at::Tensor>& tensors);
  // Rank 0's text.
  std::string broadcast(const std::string& text);
  void barrier();
  // The last barrier: no rank ends before all have come here, and from here on none gives signs of life, which would meet a store
  // that has ended.
  void finish();

  // From here on, a backward pass announced by average_gradients() leaves the mean of all ranks' gradients in `parameters`, in
  // buckets that travel while the pass goes on. The order of their sums is fixed: the same number of ranks, the same bits.
  void watch(const std::vector<at::Tensor>& parameters);
  void average_gradients(const at::Tensor& loss);
  // After that backward pass.
  void gradients_arrived();

  RanksTraffic& traffic();
  // Bytes that this process has sent over TCP connections that are still open, by the kernel's count.
  static int64_t tcp_bytes_sent();

  // To call while an exception is handled: throws RanksError, which names the ranks that no longer answer, where others are why;
  // else tells the others and throws the same again. Takes some seconds.
  [[noreturn]] void explain_failure();

 private:
  struct Parts;
  explicit Ranks(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

}  // namespace latte::train
