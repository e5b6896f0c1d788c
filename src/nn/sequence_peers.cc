#include "nn/sequence_peers.h"

#include <torch/torch.h>

#include <limits>

#include "ops/autocast.h"

namespace latte::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr double kGriffinPower = 8.0;  // the constant c of arXiv 2402.19427, equation 3

// Autograd passes on and keeps integers, not pointers.
SequencePeers& peers_at(int64_t address) {
  return *reinterpret_cast<SequencePeers*>(address);  // NOLINT(performance-no-int-to-ptr)
}

SequencePeers& peers_of(AutogradContext* context) { return peers_at(context->saved_data["peers"].toInt()); }

void remember(AutogradContext* context, SequencePeers& peers) {
  context->saved_data["peers"] = static_cast<int64_t>(reinterpret_cast<intptr_t>(&peers));
}

// The columns of a state [N, H, L, D + 3]: S and z together, m, G.
at::Tensor sums_of(const at::Tensor& state) { return state.narrow(-1, 0, state.size(-1) - 2); }
at::Tensor maximum_of(const at::Tensor& state) { return state.narrow(-1, state.size(-1) - 2, 1); }
at::Tensor decay_of(const at::Tensor& state) { return state.narrow(-1, state.size(-1) - 1, 1); }

at::Tensor empty_state(const at::Tensor& like) {
  auto state = at::zeros_like(like, at::MemoryFormat::Contiguous);
  maximum_of(state).fill_(-std::numeric_limits<double>::infinity());
  return state;
}

// What lies before each rank, in the order of the ranks or, with `backwards`, against it: shifted by one rank, then joined over
// doubling distances.
at::Tensor exclusive_scan(SequencePeers& peers, const at::Tensor& own, bool backwards) {
  const int64_t count = peers.size();
  const int64_t place = backwards ? count - 1 - peers.rank() : peers.rank();
  const auto rank_at = [&](int64_t at) { return backwards ? count - 1 - at : at; };
  at::Tensor gathered = empty_state(own);
  peers.exchange(own, place + 1 < count ? rank_at(place + 1) : -1, gathered, place > 0 ? rank_at(place - 1) : -1);
  // The first place has nothing to give, and no place needs it.
  for (int64_t distance = 1; distance < count - 1; distance *= 2) {
    const bool sends = place >= 1 && place + distance < count, receives = place - distance >= 1;
    if (!sends && !receives) continue;
    at::Tensor earlier = at::empty_like(gathered);
    peers.exchange(gathered, sends ? rank_at(place + distance) : -1, earlier, receives ? rank_at(place - distance) : -1);
    if (receives) gathered = merge_states(earlier, gathered).contiguous();
  }
  return gathered;
}

// The gradient of what lies before rank q, in the unit of its maximum M_q, reaches every rank r < q through the decays of the
// stretches between them, in the unit of m_r. Summed over q that is the same scan against the order of the ranks, of states with
// −M_q in the maximum's place (docs/distributed.md).
class StateBeforeFunction : public torch::autograd::Function<StateBeforeFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& state, int64_t address) {
    auto& peers = peers_at(address);
    const auto own = state.contiguous();
    auto before = exclusive_scan(peers, own, /*backwards=*/false);
    remember(context, peers);
    context->save_for_backward({own, before});
    return before;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &own = saved[0], &before = saved[1];
    const auto nothing = maximum_of(before).isneginf();
    auto gradient =
        at::cat({sums_of(grads[0]).masked_fill(nothing, 0.0),
                 maximum_of(before).neg().masked_fill(nothing, -std::numeric_limits<double>::infinity()), decay_of(own)},
                -1);
    const auto later = exclusive_scan(peers_of(context), gradient.contiguous(), /*backwards=*/true);
    const auto sums = sums_of(later), unit = maximum_of(later);
    const auto to_own = (maximum_of(own) + unit).exp();  // at most 1: M_q is at least m_r less the decays between
    const auto to_before = (maximum_of(before) + decay_of(own) + unit).exp();
    const auto grad_decay = to_before * (sums_of(before) * sums).sum(-1, /*keepdim=*/true);
    return {at::cat({to_own * sums, at::zeros_like(unit), grad_decay}, -1), at::Tensor()};
  }
};

class NeighbourFunction : public torch::autograd::Function<NeighbourFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& edge, int64_t address) {
    auto& peers = peers_at(address);
    remember(context, peers);
    return pass(peers, edge, /*backwards=*/false);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    return {pass(peers_of(context), grads[0], /*backwards=*/true), at::Tensor()};
  }

 private:
  static at::Tensor pass(SequencePeers& peers, const at::Tensor& edge, bool backwards) {
    const int64_t next = peers.rank() + 1 < peers.size() ? peers.rank() + 1 : -1, last = peers.rank() - 1;
    at::Tensor received = at::zeros_like(edge, at::MemoryFormat::Contiguous);
    peers.exchange(edge.contiguous(), backwards ? last : next, received, backwards ? next : last);
    return received;
  }
};

// Over a binomial tree, there and back.
class FirstFunction : public torch::autograd::Function<FirstFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& rows, int64_t address) {
    auto& peers = peers_at(address);
    remember(context, peers);
    at::Tensor first = rows.clone(at::MemoryFormat::Contiguous);
    const int64_t rank = peers.rank(), size = peers.size();
    for (int64_t known = 1; known < size; known *= 2) {
      if (rank < known && rank + known < size) peers.exchange(first, rank + known, first, -1);
      if (rank >= known && rank < 2 * known) peers.exchange(first, -1, first, rank - known);
    }
    return first;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& peers = peers_of(context);
    at::Tensor sum = grads[0].clone(at::MemoryFormat::Contiguous), more = at::empty_like(sum);
    const int64_t rank = peers.rank(), size = peers.size();
    int64_t known = 1;
    while (known * 2 < size) known *= 2;
    for (; known >= 1; known /= 2) {
      if (rank < known && rank + known < size) {
        peers.exchange(sum, -1, more, rank + known);
        sum = sum + more;
      }
      if (rank >= known && rank < 2 * known) peers.exchange(sum, rank - known, more, -1);
    }
    return {rank == 0 ? sum : at::zeros_like(sum), at::Tensor()};
  }
};

int64_t address_of(SequencePeers& peers) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(&peers)); }

void check_rows(const char* what, const at::Tensor& x, int64_t count) {
  TORCH_CHECK_VALUE(x.size(1) >= count, "sequence parallelism: ", what, " reaches over ", count,
                    " tokens, but a rank's stretch holds ", x.size(1));
}

}  // namespace

at::Tensor stretch_state(const at::Tensor& key_logits, const at::Tensor& values, const OptionalTensor& log_decay) {
  const NoAutocast no_autocast;
  const auto dtype = AccumulateType(values.scalar_type());
  auto logits = key_logits.to(dtype).permute({0, 2, 3, 1});  // [B, Hkv, L, T]
  at::Tensor total;
  if (Present(log_decay)) {
    // A token is lowered by the decays behind it. Summed from the end, so that what weighs most is rounded least.
    const auto decay = log_decay->to(dtype).permute({0, 2, 3, 1});
    const auto from_here = decay.flip(-1).cumsum(-1).flip(-1);
    logits = logits + from_here - decay;
    total = from_here.narrow(-1, 0, 1);
  } else {
    total = at::zeros({logits.size(0), logits.size(1), logits.size(2), 1}, logits.options());
  }
  const auto maximum = logits.detach().amax(-1, /*keepdim=*/true);
  const auto weights = (logits - maximum.masked_fill(maximum.isneginf(), 0.0)).exp();
  const auto sums = at::matmul(weights, values.to(dtype).transpose(1, 2));  // [B, Hkv, L, D]
  return at::cat({sums, weights.sum(-1, /*keepdim=*/true), maximum, total}, -1);
}

at::Tensor state_before(SequencePeers& peers, const at::Tensor& state) {
  return StateBeforeFunction::apply(state, address_of(peers));
}

at::Tensor rows_before(SequencePeers& peers, const at::Tensor& x, int64_t count) {
  check_rows("an edge", x, count);
  return NeighbourFunction::apply(x.narrow(1, x.size(1) - count, count), address_of(peers));
}

at::Tensor first_rows(SequencePeers& peers, const at::Tensor& x, int64_t count) {
  check_rows("a sink", x, count);
  return FirstFunction::apply(x.narrow(1, 0, count), address_of(peers));
}

at::Tensor rg_lru_before(SequencePeers& peers, const at::Tensor& x, const at::Tensor& recurrence_logits,
                         const at::Tensor& input_logits, const at::Tensor& lambda) {
  const auto own = *std::get<1>(rg_lru(x, recurrence_logits, input_logits, lambda,
                                       {.key_mask = {}, .initial_state = {}, .output_final_state = true, .cu_seqlens = {}}));
  const NoAutocast no_autocast;
  const auto log_keep =
      -kGriffinPower * torch::softplus(lambda.to(own.scalar_type())) * recurrence_logits.to(own.scalar_type()).sigmoid().sum(1);
  // A channel is a latent that reads one number and decays; its maximum is no more than a mark that it isn't empty.
  const auto none = at::zeros_like(own);
  const auto state = at::stack({own, none, none, log_keep}, -1).unsqueeze(1);  // [B, 1, C, 1 + 3]
  return state_before(peers, state).select(-1, 0).squeeze(1);
}

MacchiatoState window_before(SequencePeers& peers, const at::Tensor& key, const at::Tensor& values, const at::Tensor& latents,
                             int64_t window, int64_t sinks) {
  check_rows("a window", key, window);
  const int64_t batch = key.size(0), time = key.size(1), key_size = key.size(3);
  const auto both = at::cat({key, values.to(key.scalar_type())}, -1);  // one message
  const bool begins = peers.rank() == 0;
  const auto mask = [&](int64_t count) { return at::full({batch, count}, !begins, key.options().dtype(at::kBool)); };
  const auto edge = rows_before(peers, both, window);
  const auto first = sinks > 0 ? first_rows(peers, both, sinks) : both.narrow(1, 0, 0);
  MacchiatoState state;
  state.latents = latents;
  state.keys = edge.narrow(-1, 0, key_size);
  state.values = edge.narrow(-1, key_size, values.size(3));
  state.mask = mask(window);
  state.sink_keys = first.narrow(-1, 0, key_size);
  state.sink_values = first.narrow(-1, key_size, values.size(3));
  state.sink_mask = mask(sinks);
  state.position = at::full({batch}, peers.rank() * time, key.options().dtype(at::kLong));
  return state;
}

}  // namespace latte::nn
