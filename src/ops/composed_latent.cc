// Chunks of kChunk tokens: every pair's weight exp(k[s] - M[t]) is formed apart, with M[t] the running maximum up to t, so that
// nothing overflows or is lost however far the maximum moves inside the chunk.
#include <limits>

#include "ops/autocast.h"
#include "ops/composed.h"

namespace latte::composed {
namespace {

constexpr int64_t kChunk = 32;
constexpr double kNever = -std::numeric_limits<double>::infinity();
// Stands for a log decay of -inf in sums over a chunk: beyond any two logits' distance, and far from what a double rounds away.
constexpr double kStrongestDecay = -1e6;

// What a chunk reads, in AccumulateType; the optional ones undefined where absent.
struct Chunk {
  at::Tensor query_logits;  // [b, C, H, L or L + 1]
  at::Tensor key_logits;    // [b, C, Hkv, L]
  at::Tensor values;        // [b, C, Hkv, D]
  at::Tensor window_out;    // [b, C, H, D]
  at::Tensor log_decay;     // [b, C, Hkv, L]
  at::Tensor key_mask;      // [b, C]
};

at::Tensor FreshState(int64_t rows, const at::Tensor& key_logits, const at::Tensor& values) {
  const auto options = values.options().dtype(AccumulateType(values.scalar_type()));
  const int64_t head_dim = values.size(3);
  auto state = at::zeros({rows, key_logits.size(2), key_logits.size(3), head_dim + 3}, options);
  state.select(-1, head_dim + 1).fill_(kNever);
  return state;
}

// [b, C, Hkv * R, X] -> [b, Hkv, C, R, X]
at::Tensor GroupHeads(const at::Tensor& x, int64_t kv_heads) {
  return x.reshape({x.size(0), x.size(1), kv_heads, x.size(2) / kv_heads, x.size(3)}).transpose(1, 2);
}

// [b, Hkv, C, R, D] -> [b, C, Hkv * R, D]
at::Tensor UngroupHeads(const at::Tensor& x) {
  return x.transpose(1, 2).reshape({x.size(0), x.size(2), x.size(1) * x.size(3), x.size(4)});
}

// Masked keys weigh exp(-inf).
at::Tensor MaskedKeys(const Chunk& chunk) {
  const auto keys = chunk.key_logits.transpose(1, 2);
  return chunk.key_mask.defined() ? keys.masked_fill(chunk.key_mask.logical_not().unsqueeze(1).unsqueeze(-1), kNever) : keys;
}

// The shares of latents, [b, Hkv, C, R, L], and that of the window, [b, C, H, 1], if there is one.
struct Shares {
  at::Tensor latents, window;
};
Shares SharesOf(const Chunk& chunk, int64_t kv_heads) {
  const auto shares = SoftmaxOrZero(chunk.query_logits);
  if (!chunk.window_out.defined()) return {GroupHeads(shares, kv_heads), {}};
  return {GroupHeads(shares.narrow(-1, 1, shares.size(-1) - 1), kv_heads), shares.narrow(-1, 0, 1)};
}

// {out [b, C, H, D], the state after the chunk}, in AccumulateType.
std::vector<at::Tensor> CausalChunk(const Chunk& chunk, const at::Tensor& state) {
  const int64_t time = chunk.key_logits.size(1), kv_heads = chunk.key_logits.size(2), head_dim = chunk.values.size(3);
  const auto dtype = chunk.values.scalar_type();
  const auto shares = SharesOf(chunk, kv_heads);
  const auto values = chunk.values.transpose(1, 2);  // [b, Hkv, C, D]
  const auto sums = state.narrow(-1, 0, head_dim), normaliser = state.select(-1, head_dim);
  const auto before = state.select(-1, head_dim + 1).unsqueeze(2), decayed = state.select(-1, head_dim + 2);

  auto keys = MaskedKeys(chunk);  // [b, Hkv, C, L]
  at::Tensor total_decay, whole_decay;
  at::Tensor resets;  // decays of -inf up to and with each token, int64 [b, Hkv, C, L]
  if (chunk.log_decay.defined()) {
    auto log_decay = chunk.log_decay.transpose(1, 2);
    if (chunk.key_mask.defined()) {
      log_decay = log_decay.masked_fill(chunk.key_mask.logical_not().unsqueeze(1).unsqueeze(-1), 0.0);
    }
    // In float64: after one strong decay the later, weak ones would be lost in rounding.
    log_decay = log_decay.to(at::kDouble);
    whole_decay = log_decay.sum(2);
    resets = log_decay.isneginf().cumsum(2);
    log_decay = log_decay.clamp_min(kStrongestDecay);
    keys = keys - log_decay.cumsum(2);
    total_decay = log_decay.sum(2);
  }
  const auto maximum = at::maximum(std::get<0>(at::cummax(keys.detach(), 2)), before.detach());  // [b, Hkv, C, L]
  const auto finite = FiniteOrZero(maximum);
  auto unread = at::ones({time, time}, keys.options().dtype(at::kBool)).triu(1).unsqueeze(1);  // [t, 1, s]: true for s > t
  const auto distance = keys.transpose(2, 3).unsqueeze(2) - finite.unsqueeze(-1);              // [b, Hkv, t, L, s]
  auto carry = (before - finite).exp().to(dtype);                                              // [b, Hkv, t, L]
  if (resets.defined()) {  // nothing from before a reset is read after it
    unread = unread.logical_or(resets.transpose(2, 3).unsqueeze(2) != resets.unsqueeze(-1));
    carry = carry.masked_fill(resets > 0, 0.0);
  }
  const auto weights = distance.masked_fill(unread, kNever).exp().to(dtype);
  const auto norm = weights.sum(-1) + carry * normaliser.unsqueeze(2);
  const auto reading = shares.latents / norm.masked_fill(norm == 0, 1.0).unsqueeze(3);  // [b, Hkv, t, R, L]
  const auto own = at::matmul(at::matmul(reading, weights).flatten(2, 3), values);
  const auto carried = at::matmul((reading * carry.unsqueeze(3)).flatten(2, 3), sums);
  auto out = UngroupHeads((own + carried).unflatten(2, {time, reading.size(3)}));
  if (shares.window.defined()) out = out + shares.window * chunk.window_out;

  const auto last_weights = weights.select(2, time - 1), last_carry = carry.select(2, time - 1);
  auto sums_after = at::matmul(last_weights, values) + last_carry.unsqueeze(-1) * sums;
  auto normaliser_after = norm.select(2, time - 1);
  auto maximum_after = maximum.select(2, time - 1);
  auto decayed_after = decayed;
  if (total_decay.defined()) {
    // The whole chunk decays: the maximum takes the value and S and z, through a factor of 1, the gradient.
    const auto one = (total_decay - total_decay.detach()).exp().to(dtype);
    sums_after = sums_after * one.unsqueeze(-1);
    normaliser_after = normaliser_after * one;
    maximum_after = (maximum_after + total_decay.detach()).masked_fill(normaliser_after == 0, kNever);
    decayed_after = decayed + whole_decay.to(dtype);
  }
  const auto state_after = at::cat(
      {sums_after, normaliser_after.unsqueeze(-1), maximum_after.to(dtype).unsqueeze(-1), decayed_after.unsqueeze(-1)}, -1);
  return {out, state_after};
}

// The state after no token at all: itself, with its gradients as of any other stretch (the maximum takes none and gives S and z
// theirs).
at::Tensor UnreadState(const at::Tensor& state) {
  const int64_t head_dim = state.size(-1) - 3;
  const auto maximum = state.narrow(-1, head_dim + 1, 1), finite = FiniteOrZero(maximum);
  const auto one = (finite - finite.detach()).exp();
  return at::cat({state.narrow(-1, 0, head_dim + 1) * one, maximum.detach(), state.narrow(-1, head_dim + 2, 1)}, -1);
}

// All tokens at once: nothing here grows faster than T · L.
at::Tensor BidirectionalPiece(const Chunk& chunk) {
  const int64_t kv_heads = chunk.key_logits.size(2), time = chunk.key_logits.size(1);
  const auto shares = SharesOf(chunk, kv_heads);
  const auto keys = MaskedKeys(chunk);  // [b, Hkv, T, L]
  const auto weights = (keys - FiniteOrZero(keys.detach().amax(2, true))).exp();
  const auto norm = weights.sum(2);  // [b, Hkv, L]
  const auto means = at::matmul(weights.transpose(2, 3), chunk.values.transpose(1, 2)) /
                     norm.masked_fill(norm == 0, 1.0).unsqueeze(-1);  // [b, Hkv, L, D]
  auto out = UngroupHeads(at::matmul(shares.latents.flatten(2, 3), means).unflatten(2, {time, shares.latents.size(3)}));
  if (shares.window.defined()) out = out + shares.window * chunk.window_out;
  return out;
}

Chunk ChunkAt(const LatentInputs& in, const Piece& piece, int64_t begin, int64_t length) {
  const auto dtype = AccumulateType(in.query_logits.scalar_type());
  const auto cut = [&](const at::Tensor& x) { return x.narrow(1, piece.begin + begin, length); };
  const auto cut_optional = [&](const OptionalTensor& x) { return Present(x) ? cut(*x) : at::Tensor(); };
  const auto cast = [&](const at::Tensor& x) { return x.defined() ? x.to(dtype) : x; };
  const auto key_mask = cut_optional(in.key_mask);
  auto values = cast(cut(in.values));
  // A weight of 0 doesn't silence NaN.
  if (key_mask.defined()) values = values.masked_fill(key_mask.logical_not().unsqueeze(-1).unsqueeze(-1), 0.0);
  return {cast(cut(in.query_logits)),  cast(cut(in.key_logits)),         values,
          cut_optional(in.window_out), cast(cut_optional(in.log_decay)), key_mask};
}

at::Tensor StateOf(const LatentInputs& in, const Piece& piece) {
  return Present(in.initial_state) ? piece.States(*in.initial_state) : FreshState(piece.state_rows, in.key_logits, in.values);
}

at::Tensor EmptyOut(const LatentInputs& in) {
  const auto& q = in.query_logits;
  return at::zeros({q.size(0), 0, q.size(2), in.values.size(3)}, q.options());
}

constexpr const char* kName = "latent_attention";

}  // namespace

LatentOutputs LatentAttention(const LatentInputs& in) {
  const NoAutocast no_autocast;
  std::vector<at::Tensor> outs, states;
  const auto dtype = in.query_logits.scalar_type();
  for (const auto& piece : Pieces(kName, in.query_logits, in.cu_seqlens)) {
    if (!in.causal) {
      if (piece.length > 0) outs.push_back(BidirectionalPiece(ChunkAt(in, piece, 0, piece.length)).to(dtype));
      continue;
    }
    auto state = piece.length > 0 ? StateOf(in, piece) : UnreadState(StateOf(in, piece));
    for (int64_t begin = 0; begin < piece.length; begin += kChunk) {
      const auto result = CausalChunk(ChunkAt(in, piece, begin, std::min(kChunk, piece.length - begin)), state);
      outs.push_back(result[0].to(dtype));
      state = result[1];
    }
    states.push_back(state);
  }
  LatentOutputs result;
  result.out = Join(outs, 1, [&] { return EmptyOut(in); });
  if (in.causal) {
    result.final_state = Join(states, 0, [&] { return FreshState(0, in.key_logits, in.values); });
  }
  return result;
}

LatentGradients LatentAttentionBackward(const LatentInputs& in, const at::Tensor& grad_out,
                                        const OptionalTensor& grad_final_state) {
  const NoAutocast no_autocast;
  const auto zeros = [](const OptionalTensor& x) { return Present(x) ? at::zeros(x->sizes(), x->options()) : at::Tensor(); };
  LatentGradients grads{zeros(in.query_logits), zeros(in.key_logits), zeros(in.values),
                        zeros(in.window_out),   zeros(in.log_decay),  zeros(in.initial_state)};
  const auto compute = AccumulateType(in.query_logits.scalar_type());
  for (const auto& piece : Pieces(kName, in.query_logits, in.cu_seqlens)) {
    // Backwards over one chunk, or over a whole sequence where latents read in both directions.
    const auto go_back = [&](int64_t begin, int64_t length, const at::Tensor& state, const at::Tensor& grad_state) {
      const auto chunk = ChunkAt(in, piece, begin, length);
      const auto function = [&](const std::vector<at::Tensor>& x) {
        const Chunk followed{x[0], x[1], x[2], x[3], x[4], chunk.key_mask};
        return in.causal ? CausalChunk(followed, x[5]) : std::vector<at::Tensor>{BidirectionalPiece(followed), {}};
      };
      const auto grad = grad_out.narrow(1, piece.begin + begin, length).to(compute);
      const auto result =
          Gradients(function, {chunk.query_logits, chunk.key_logits, chunk.values, chunk.window_out, chunk.log_decay, state},
                    {grad, grad_state});
      const auto put = [&](at::Tensor& target, const at::Tensor& value) {
        if (target.defined()) target.narrow(1, piece.begin + begin, length).copy_(value);
      };
      put(grads.query_logits, result[0]);
      put(grads.key_logits, result[1]);
      put(grads.values, result[2]);
      put(grads.window_out, result[3]);
      put(grads.log_decay, result[4]);
      return result[5];
    };
    if (!in.causal) {
      if (piece.length > 0) go_back(0, piece.length, {}, {});
      continue;
    }
    std::vector<at::Tensor> states{StateOf(in, piece)};
    for (int64_t begin = 0; begin + kChunk < piece.length; begin += kChunk) {
      states.push_back(CausalChunk(ChunkAt(in, piece, begin, kChunk), states.back())[1]);
    }
    auto grad_state = Present(grad_final_state) ? piece.States(*grad_final_state).clone() : at::zeros_like(states[0]);
    const int64_t maximum = in.values.size(3) + 1;
    for (int64_t i = static_cast<int64_t>(states.size()) - 1; i >= 0 && piece.length > 0; --i) {
      grad_state.select(-1, maximum).zero_();
      const int64_t begin = i * kChunk;
      grad_state = go_back(begin, std::min(kChunk, piece.length - begin), states[i], grad_state);
    }
    if (piece.length == 0) {
      const auto function = [](const std::vector<at::Tensor>& x) { return std::vector<at::Tensor>{UnreadState(x[0])}; };
      grad_state = Gradients(function, {states[0]}, {grad_state})[0];
    }
    if (grads.initial_state.defined()) piece.States(grads.initial_state).copy_(grad_state);
  }
  return grads;
}

at::Tensor MergeStates(const at::Tensor& left, const at::Tensor& right) {
  const NoAutocast no_autocast;
  // Columns S and z, m, G.
  const auto maximum_at = left.sym_size(3) - 2;
  const auto column = [&](const at::Tensor& x, const c10::SymInt& index) { return x.narrow_symint(-1, index, 1); };
  const auto left_maximum = column(left, maximum_at) + column(right, maximum_at + 1);
  const auto right_maximum = column(right, maximum_at);
  const auto maximum = at::maximum(left_maximum, right_maximum).detach();
  const auto reference = FiniteOrZero(maximum);
  const auto sums = left.narrow_symint(-1, 0, maximum_at) * (left_maximum - reference).exp() +
                    right.narrow_symint(-1, 0, maximum_at) * (right_maximum - reference).exp();
  return at::cat({sums, maximum, column(left, maximum_at + 1) + column(right, maximum_at + 1)}, -1);
}

}  // namespace latte::composed
