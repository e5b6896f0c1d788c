// The gloo headers that c10d's names are Debian's, of another version than what libtorch holds: nothing of gloo itself is called
// or built here, it is only passed on by pointer.
#include "train/ranks.h"

#ifdef LATTE_GLOO
#define USE_C10D_GLOO
#endif

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <new>
#include <string_view>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <utility>

#include "formats/error.h"
#include "train/heartbeat.h"
#include "train/memory_error.h"
#include "train/options.h"
#include "train/run.h"

namespace latte::train {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

int64_t number_from_environment(const char* name, int64_t least, int64_t most) {
  const std::string text = environment(name);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size() || value < least || value > most) {
    throw OptionError("the environment's " + std::string(name) + " is " + formats::quote(text) + ", expected an integer in " +
                      std::to_string(least) + " … " + std::to_string(most) + ": torchrun sets it");
  }
  return value;
}

std::string plain(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  // The first line says it; what follows is c10d's place in its source.
  return text.substr(0, text.find('\n'));
}

std::vector<uint8_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }

// torchrun's agent then holds the store itself, so that it outlives the ranks.
bool agent_holds_store() { return environment("TORCHELASTIC_USE_AGENT_STORE") == "True"; }

}  // namespace

struct Ranks::Parts : nn::SequencePeers, nn::BatchPeers {
  RanksOptions options;
  int64_t rank_in_job = 0, ranks_in_job = 1, restart_count = 0;
  RanksTraffic traffic;
  c10::intrusive_ptr<c10d::Store> store;         // of this attempt
  c10::intrusive_ptr<c10d::Store> agent;         // torchrun's agent's, of all attempts; null where the first rank holds the store
  c10::intrusive_ptr<c10d::ProcessGroup> group;  // all ranks
  c10::intrusive_ptr<c10d::Backend> sequence;    // those that share this rank's sequences
  std::unique_ptr<c10d::Reducer> reducer;
  std::unique_ptr<Heartbeat> heartbeat;
  int64_t texts = 0;                // sent by broadcast(text)
  Clock::time_point last_bucket{};  // when the last one set off
  int64_t buckets_before = 0;       // this backward pass

  int64_t rank() const override { return rank_in_job % options.sequence_parallel; }
  int64_t size() const override { return options.sequence_parallel; }
  void exchange(const at::Tensor& out, int64_t to, at::Tensor& in, int64_t from) override;
  void sum(at::Tensor& values) override;

  c10d::TCPStoreOptions store_settings() const;  // of a client
  void connect();
  void connect_to_agent();
  c10::intrusive_ptr<c10d::Backend> make_backend(const std::string& name, int64_t rank, int64_t size);
};

#ifdef LATTE_GLOO
c10::intrusive_ptr<c10d::Backend> Ranks::Parts::make_backend(const std::string& name, int64_t rank, int64_t size) {
  using c10d::ProcessGroupGloo;
  const auto settings = ProcessGroupGloo::Options::create(std::chrono::milliseconds(options.timeout));
  const std::string interface = environment("GLOO_SOCKET_IFNAME");
  settings->devices.push_back(interface.empty() ? ProcessGroupGloo::createDefaultDevice()
                                                : ProcessGroupGloo::createDeviceForInterface(interface));
  return c10::make_intrusive<ProcessGroupGloo>(c10::make_intrusive<c10d::PrefixStore>(name, store), static_cast<int>(rank),
                                               static_cast<int>(size), settings);
}
#else
c10::intrusive_ptr<c10d::Backend> Ranks::Parts::make_backend(const std::string&, int64_t, int64_t) {
  throw OptionError("WORLD_SIZE is " + std::to_string(ranks_in_job) +
                    ", but this latte was built without Gloo: install libgloo-dev and build again");
}
#endif

c10d::TCPStoreOptions Ranks::Parts::store_settings() const {
  c10d::TCPStoreOptions settings;
  settings.port = static_cast<uint16_t>(number_from_environment("MASTER_PORT", 1, 65535));
  settings.timeout = options.timeout;
  settings.waitWorkers = false;
  settings.isServer = false;
  return settings;
}

void Ranks::Parts::connect() {
  const std::string host = environment("MASTER_ADDR");
  if (host.empty()) throw OptionError("the environment's MASTER_ADDR is not set: torchrun sets it");
  c10d::TCPStoreOptions settings = store_settings();
  settings.isServer = rank_in_job == 0 && !agent_holds_store();
  try {
    // Apart for each attempt: a restarted job must not read what the one before has left.
    const std::string prefix = "latte/" + std::to_string(restart_count);
    const auto whole = c10::make_intrusive<c10d::TCPStore>(host, settings);
    if (agent_holds_store()) agent = whole;
    store = c10::make_intrusive<c10d::PrefixStore>(prefix, whole);
    // A connection of its own: a rank that waits for an answer still has to give signs of life.
    settings.isServer = false;
    const auto own = c10::make_intrusive<c10d::TCPStore>(host, settings);
    heartbeat = std::make_unique<Heartbeat>(c10::make_intrusive<c10d::PrefixStore>(prefix, own), rank_in_job, ranks_in_job);
    const auto backend = make_backend("all", rank_in_job, ranks_in_job);
    group = c10::make_intrusive<c10d::ProcessGroup>(store, static_cast<int>(rank_in_job), static_cast<int>(ranks_in_job));
    group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, backend);
    group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
    if (options.sequence_parallel > 1) {
      sequence = make_backend("sequence/" + std::to_string(rank_in_job / options.sequence_parallel), rank(), size());
    }
  } catch (const OptionError&) {
    throw;
  } catch (const std::exception& error) {
    throw RanksError("rank " + std::to_string(rank_in_job) + " of " + std::to_string(ranks_in_job) +
                     " did not meet the others at " + host + ":" + std::to_string(settings.port) + ": " + plain(error));
  }
}

void Ranks::Parts::connect_to_agent() {
  if (!agent_holds_store()) return;
  const c10d::TCPStoreOptions settings = store_settings();
  try {
    agent = c10::make_intrusive<c10d::TCPStore>(environment("MASTER_ADDR"), settings);
  } catch (const std::exception& error) {
    throw RanksError("the store of torchrun at " + environment("MASTER_ADDR") + ":" + std::to_string(settings.port) +
                     " doesn't answer: " + plain(error));
  }
}

void Ranks::Parts::exchange(const at::Tensor& out, int64_t to, at::Tensor& in, int64_t from) {
  const auto start = Clock::now();
  c10::intrusive_ptr<c10d::Work> sent, received;
  std::vector<at::Tensor> outward = {out}, inward = {in};
  if (to >= 0) {
    sent = sequence->send(outward, static_cast<int>(to), 0);
    traffic.sequence_bytes += static_cast<int64_t>(out.nbytes());
    ++traffic.messages;
  }
  if (from >= 0) received = sequence->recv(inward, static_cast<int>(from), 0);
  if (received) received->wait();
  if (sent) sent->wait();
  traffic.sequence_seconds += seconds_since(start);
}

void Ranks::Parts::sum(at::Tensor& values) {
  std::vector<at::Tensor> tensors = {values};
  group->allreduce(tensors)->wait();
}

Ranks::Ranks(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

Ranks::~Ranks() {
  // A failed collective may still hold these and their threads: they are given up with the process, which ends now.
  if (parts_->heartbeat && parts_->heartbeat->failed()) {
    static_cast<void>(parts_->group.release());
    static_cast<void>(parts_->sequence.release());
    static_cast<void>(parts_->reducer.release());
    static_cast<void>(parts_->heartbeat.release());
  }
}

std::unique_ptr<Ranks> Ranks::from_environment(const RanksOptions& options) {
  if (environment("WORLD_SIZE").empty()) {
    if (options.sequence_parallel > 1) {
      throw OptionError("--sequence-parallel is " + std::to_string(options.sequence_parallel) +
                        ", but WORLD_SIZE is not set: start with torchrun --no-python --nproc-per-node N latte train …");
    }
    return nullptr;
  }
  auto parts = std::make_unique<Parts>();
  parts->options = options;
  parts->ranks_in_job = number_from_environment("WORLD_SIZE", 1, 1 << 20);
  parts->rank_in_job = number_from_environment("RANK", 0, parts->ranks_in_job - 1);
  if (!environment("TORCHELASTIC_RESTART_COUNT").empty()) {
    parts->restart_count = number_from_environment("TORCHELASTIC_RESTART_COUNT", 0, 1 << 20);
  }
  if (options.sequence_parallel < 1 || parts->ranks_in_job % options.sequence_parallel != 0) {
    throw OptionError("--sequence-parallel is " + std::to_string(options.sequence_parallel) + ", expected a divisor of the " +
                      std::to_string(parts->ranks_in_job) + " ranks");
  }
  if (parts->ranks_in_job > 1) {
    parts->connect();
  } else {
    parts->connect_to_agent();
  }
  return std::unique_ptr<Ranks>(new Ranks(std::move(parts)));
}

int64_t Ranks::rank() const { return parts_->rank_in_job; }
int64_t Ranks::size() const { return parts_->ranks_in_job; }
int64_t Ranks::sequence_parallel() const { return parts_->options.sequence_parallel; }
int64_t Ranks::restarts() const { return parts_->restart_count; }
RanksTraffic& Ranks::traffic() { return parts_->traffic; }
nn::BatchPeers* Ranks::batch_peers() const { return size() > 1 ? parts_.get() : nullptr; }
nn::SequencePeers* Ranks::sequence_peers() const { return sequence_parallel() > 1 ? parts_.get() : nullptr; }

void Ranks::set_begun(const std::string& run) {
  if (leads() && parts_->agent) parts_->agent->set("latte/begun/" + run, std::vector<uint8_t>{1});
}

bool Ranks::has_begun(const std::string& run) const { return !parts_->agent || parts_->agent->check({"latte/begun/" + run}); }

void Ranks::check_divides(int64_t batch, int64_t context) const {
  if (batch % data_parallel() != 0) {
    throw OptionError("batch is " + std::to_string(batch) + ", expected a multiple of " + std::to_string(data_parallel()) +
                      ", the ranks among which it is shared");
  }
  if (context % sequence_parallel() != 0) {
    throw OptionError("context is " + std::to_string(context) + ", expected a multiple of " +
                      std::to_string(sequence_parallel()) + ", the ranks that share a sequence");
  }
}

std::pair<int64_t, int64_t> Ranks::share(int64_t count) const {
  const int64_t mine = rank() / sequence_parallel(), all = data_parallel();
  return {count * mine / all, count * (mine + 1) / all};
}

TokenBatch Ranks::share(const TokenBatch& batch) const {
  const auto [first, last] = share(batch.x.size(0));
  return stretch({batch.x.slice(0, first, last), batch.y.slice(0, first, last)});
}

TokenBatch Ranks::stretch(const TokenBatch& batch) const {
  const int64_t length = batch.x.size(1) / sequence_parallel(), begin = rank() % sequence_parallel() * length;
  const auto cut = [&](const at::Tensor& x) { return x.narrow(1, begin, length).contiguous(); };
  return {cut(batch.x), cut(batch.y)};
}

std::vector<double> Ranks::sum(std::vector<double> values) {
  if (size() == 1) return values;
  auto tensor = at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, at::kDouble);
  parts_->sum(tensor);
  return values;
}

void Ranks::broadcast(const std::vector<at::Tensor>& tensors) {
  if (size() == 1) return;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    std::vector<at::Tensor> one = {tensor};
    parts_->group->broadcast(one)->wait();
  }
}

std::string Ranks::broadcast(const std::string& text) {
  if (size() == 1) return text;
  const std::string key = "text/" + std::to_string(parts_->texts++);
  if (leads()) {
    parts_->store->set(key, bytes_of(text));
    return text;
  }
  const std::vector<uint8_t> bytes = parts_->store->get(key);
  return {bytes.begin(), bytes.end()};
}

void Ranks::barrier() { sum({0.0}); }

void Ranks::finish() {
  if (parts_->heartbeat) parts_->heartbeat->stop();
  barrier();
}

namespace {

// Sends a bucket of gradients off, divided, so that the sum is the mean.
class MeanHook : public c10d::CppCommHookInterface<c10d::ProcessGroup*> {
 public:
  MeanHook(c10d::ProcessGroup* group, RanksTraffic& traffic, Clock::time_point& last)
      : CppCommHookInterface(group), traffic_(traffic), last_(last) {}

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    std::vector<at::Tensor> tensors = {bucket.getBufferRef()};
    const int64_t ranks = state_->getSize();
    tensors[0].div_(ranks);
    traffic_.gradient_bytes += static_cast<int64_t>(tensors[0].nbytes()) / ranks * (ranks - 1) * 2;
    ++traffic_.buckets;
    last_ = Clock::now();
    return state_->allreduce(tensors)->getFuture();
  }

 private:
  RanksTraffic& traffic_;
  Clock::time_point& last_;
};

}  // namespace

void Ranks::watch(const std::vector<at::Tensor>& parameters) {
  if (size() == 1) return;
  // The last parameters get their gradients first.
  std::vector<at::Tensor> order(parameters.rbegin(), parameters.rend());
  const std::vector<bool> sparse(order.size(), false);
  const auto& options = parts_->options;
  const auto first = static_cast<size_t>(options.first_bucket_bytes), more = static_cast<size_t>(options.bucket_bytes);
  auto [buckets, limits] = c10d::compute_bucket_assignment_by_size(order, {first, more}, sparse);
  // Never rebuilt by the order in which gradients happen to come: what sums with what must not depend on how long a job runs.
  parts_->reducer = std::make_unique<c10d::Reducer>(
      std::move(order), std::move(buckets), parts_->group, sparse, options.bucket_bytes, /*find_unused_parameters=*/false,
      /*gradient_as_bucket_view=*/false, std::unordered_map<size_t, std::string>(), options.first_bucket_bytes,
      /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false, std::vector<int64_t>());
  parts_->reducer->register_comm_hook(std::make_unique<MeanHook>(parts_->group.get(), parts_->traffic, parts_->last_bucket));
  parameters.front().register_hook([parts = parts_.get()](const at::Tensor&) {
    parts->traffic.early_buckets += parts->traffic.buckets - parts->buckets_before;
  });
}

void Ranks::average_gradients(const at::Tensor& loss) {
  parts_->buckets_before = parts_->traffic.buckets;
  if (size() > 1) parts_->reducer->prepare_for_backward({loss});
}

void Ranks::gradients_arrived() {
  parts_->buckets_before = parts_->traffic.buckets;  // passes that send nothing may follow
  if (size() > 1) parts_->traffic.gradient_seconds += seconds_since(parts_->last_bucket);
}

int64_t Ranks::tcp_bytes_sent() {
  int64_t total = 0;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", ignored)) {
    const std::string name = entry.path().filename().string();
    int fd = -1;
    std::from_chars(name.data(), name.data() + name.size(), fd);
    tcp_info info = {};
    socklen_t size = sizeof(info);
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) continue;
    if (size >= offsetof(tcp_info, tcpi_bytes_sent) + sizeof(info.tcpi_bytes_sent)) {
      total += static_cast<int64_t>(info.tcpi_bytes_sent);
    }
  }
  return total;
}

void Ranks::explain_failure() {
  std::string error = "an unknown error", fault;
  bool own = size() == 1;
  try {
    throw;
  } catch (const std::invalid_argument& caught) {
    own = true;
    error = plain(caught);
  } catch (const formats::FileError& caught) {
    own = true;
    error = plain(caught);
  } catch (const DivergedError& caught) {  // of all ranks alike
    own = true;
    error = plain(caught);
  } catch (const std::bad_alloc&) {
    own = true;
    error = "out of memory";
  } catch (const std::exception& caught) {
    error = plain(caught);
    if (tells_of_memory(error)) {
      own = true;
      error = "out of memory";
    }
  }
  if (!own) fault = parts_->heartbeat->whose_fault();
  if (fault.empty()) {
    if (parts_->heartbeat) parts_->heartbeat->leave_word(error);
    throw;
  }
  throw RanksError("rank " + std::to_string(rank()) + " of " + std::to_string(size()) + " stops: " + fault + " (" + error + ")");
}

}  // namespace latte::train
