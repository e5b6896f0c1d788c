// Blocks of kBlock queries against the keys that any of them reads. The past is laid before the keys, so that only differences
// of positions matter; sinks are gathered from the past or from this call's own first tokens.
#include <limits>

#include "ops/autocast.h"
#include "ops/composed.h"

namespace latte::composed {
namespace {

constexpr int64_t kBlock = 64;
constexpr double kNever = -std::numeric_limits<double>::infinity();

// One piece's keys and sinks, in AccumulateType: P tokens of the past and T of this call.
struct Context {
  int64_t past = 0;
  at::Tensor key, values;            // [b, P + T, Hkv, …]
  at::Tensor sink_key, sink_values;  // [b, S, Hkv, …]
  at::Tensor mask;                   // bool [b, P + T]
  at::Tensor sink_mask;              // bool [b, S]
  at::Tensor position;               // int64 [b]
};

struct Inputs {  // of one piece, in AccumulateType
  at::Tensor query, sink_query, key, values, past_key, past_values, sink_key, sink_values;
};

Context ContextOf(const WindowInputs& in, const Piece& piece, const Inputs& x) {
  Context context;
  const int64_t rows = x.key.size(0), time = x.key.size(1);
  const auto integers = x.key.options().dtype(at::kLong), booleans = x.key.options().dtype(at::kBool);
  const auto mask = Present(in.key_mask) ? piece.Tokens(*in.key_mask) : at::ones({rows, time}, booleans);
  context.key = x.key;
  context.values = x.values;
  context.mask = mask;
  context.position = at::zeros({rows}, integers);
  at::Tensor old_sink_mask = at::zeros({rows, in.sinks}, booleans);
  at::Tensor old_sink_key, old_sink_values;
  if (Present(in.position)) {
    context.position = piece.States(*in.position);
    context.past = x.past_key.size(1);
    context.key = at::cat({x.past_key, x.key}, 1);
    context.values = at::cat({x.past_values, x.values}, 1);
    // Rows from before the sequence began hold nothing.
    const auto age = at::arange(context.past, 0, -1, integers);
    const auto past_mask = piece.States(*in.past_mask).logical_and(age.unsqueeze(0) <= context.position.unsqueeze(1));
    context.mask = at::cat({past_mask, mask}, 1);
    old_sink_mask = piece.States(*in.sink_mask);
    old_sink_key = x.sink_key;
    old_sink_values = x.sink_values;
  } else {
    old_sink_key = at::zeros({rows, in.sinks, x.key.size(2), x.key.size(3)}, x.key.options());
    old_sink_values = at::zeros({rows, in.sinks, x.values.size(2), x.values.size(3)}, x.values.options());
  }
  // Sink s is an old one if the sequence had reached it before this call, else this call's token s - position.
  const auto sink = at::arange(in.sinks, integers).unsqueeze(0);
  const auto token = sink - context.position.unsqueeze(1);  // [b, S]
  const auto known = token < 0;
  const auto index = at::where(token.ge(0).logical_and(token < time), token + in.sinks, sink);
  const auto gather = [&](const at::Tensor& old, const at::Tensor& now) {
    const auto source = at::cat({old, now}, 1);
    const auto wide = index.unsqueeze(-1).unsqueeze(-1).expand({rows, in.sinks, source.size(2), source.size(3)});
    return source.gather(1, wide);
  };
  context.sink_key = gather(old_sink_key, x.key);
  context.sink_values = gather(old_sink_values, x.values);
  context.sink_mask = at::cat({old_sink_mask.logical_and(known), mask}, 1).gather(1, index);
  if (Present(in.key_mask) || Present(in.position)) {  // a weight of 0 doesn't silence NaN
    const auto silence = [](at::Tensor& rows_of, const at::Tensor& kept) {
      rows_of = rows_of.masked_fill(kept.logical_not().unsqueeze(-1).unsqueeze(-1), 0.0);
    };
    silence(context.key, context.mask);
    silence(context.values, context.mask);
    silence(context.sink_key, context.sink_mask);
    silence(context.sink_values, context.sink_mask);
  }
  return context;
}

struct Block {
  int64_t begin, length;          // queries
  int64_t key_begin, key_length;  // in Context::key
};

Block BlockAt(const WindowInputs& in, int64_t past, int64_t time, int64_t begin) {
  Block block{begin, std::min(kBlock, time - begin), 0, 0};
  // past + begin and past + time are tokens that exist; a window beyond them reads no more.
  const int64_t back = std::min(in.window - 1, past + begin);
  const int64_t last = past + begin + block.length;
  const int64_t end = in.causal ? last : last + std::min(in.window - 1, past + time - last);
  block.key_begin = past + begin - back;
  block.key_length = end - block.key_begin;
  return block;
}

// {out [b, C, H, D], lse [b, C, H]} of one block of queries.
std::vector<at::Tensor> Attend(const WindowInputs& in, const Context& context, const Block& block, const at::Tensor& query,
                               const at::Tensor& sink_query, const at::Tensor& key, const at::Tensor& values,
                               const at::Tensor& sink_key, const at::Tensor& sink_values) {
  const int64_t rows = query.size(0), heads = query.size(2), kv_heads = key.size(2), group = heads / kv_heads;
  const auto integers = query.options().dtype(at::kLong);
  const auto fold = [&](const at::Tensor& x) {  // [b, C, H, X] -> [b, Hkv, C * R, X]
    return x.reshape({rows, block.length, kv_heads, group, x.size(3)}).transpose(1, 2).flatten(2, 3);
  };
  const auto unfold = [&](const at::Tensor& x) {  // back
    return x.unflatten(2, {block.length, group}).transpose(1, 2).reshape({rows, block.length, heads, x.size(3)});
  };
  const auto query_at = at::arange(block.begin, block.begin + block.length, integers) + context.past;
  const auto key_at = at::arange(block.key_begin, block.key_begin + block.key_length, integers);
  const auto distance = query_at.unsqueeze(1) - key_at.unsqueeze(0);  // [C, K]
  const auto inside = in.causal ? distance.ge(0).logical_and(distance < in.window) : distance.abs() < in.window;
  const auto key_mask = context.mask.narrow(1, block.key_begin, block.key_length);
  auto readable = inside.unsqueeze(0).logical_and(key_mask.unsqueeze(1));  // [b, C, K]
  auto scores = at::matmul(fold(query), key.permute({0, 2, 3, 1}));        // [b, Hkv, C * R, K]
  auto all_values = values.transpose(1, 2);
  if (in.sinks > 0) {
    const auto sink_scores = at::matmul(fold(sink_query.defined() ? sink_query : query), sink_key.permute({0, 2, 3, 1}));
    scores = at::cat({sink_scores, scores}, -1);
    all_values = at::cat({sink_values.transpose(1, 2), all_values}, 2);
    // Read here once they have left the window.
    const auto text_position = context.position.unsqueeze(1) + (query_at - context.past).unsqueeze(0);  // [b, C]
    const auto left = at::arange(in.sinks, integers) <= (text_position - in.window).unsqueeze(-1);      // [b, C, S]
    readable = at::cat({left.logical_and(context.sink_mask.unsqueeze(1)), readable}, -1);
  }
  const auto closed = readable.logical_not().unsqueeze(2).expand({-1, -1, group, -1}).flatten(1, 2).unsqueeze(1);
  const auto logits = (scores * in.scale).masked_fill(closed, kNever);
  const auto out = at::matmul(SoftmaxOrZero(logits), all_values);
  return {unfold(out), unfold(logits.detach().logsumexp(-1, true)).squeeze(-1)};
}

Inputs InputsOf(const WindowInputs& in, const Piece& piece) {
  const auto dtype = AccumulateType(in.query.scalar_type());
  const auto tokens = [&](const OptionalTensor& x) { return Present(x) ? piece.Tokens(*x).to(dtype) : at::Tensor(); };
  const auto states = [&](const OptionalTensor& x) { return Present(x) ? piece.States(*x).to(dtype) : at::Tensor(); };
  const bool past = Present(in.position);
  return {tokens(in.query),
          in.sinks > 0 ? tokens(in.sink_query) : at::Tensor(),
          tokens(in.key),
          tokens(in.values),
          past ? states(in.past_key) : at::Tensor(),
          past ? states(in.past_values) : at::Tensor(),
          past ? states(in.sink_key) : at::Tensor(),
          past ? states(in.sink_values) : at::Tensor()};
}

at::Tensor Cut(const at::Tensor& x, int64_t begin, int64_t length) { return x.defined() ? x.narrow(1, begin, length) : x; }

constexpr const char* kName = "window_attention_core";

}  // namespace

WindowOutputs WindowAttention(const WindowInputs& in) {
  const NoAutocast no_autocast;
  std::vector<at::Tensor> outs, lses;
  for (const auto& piece : Pieces(kName, in.query, in.cu_seqlens)) {
    const auto x = InputsOf(in, piece);
    const auto context = ContextOf(in, piece, x);
    for (int64_t begin = 0; begin < piece.length; begin += kBlock) {
      const auto block = BlockAt(in, context.past, piece.length, begin);
      const auto result = Attend(in, context, block, Cut(x.query, begin, block.length), Cut(x.sink_query, begin, block.length),
                                 Cut(context.key, block.key_begin, block.key_length),
                                 Cut(context.values, block.key_begin, block.key_length), context.sink_key, context.sink_values);
      outs.push_back(result[0]);
      lses.push_back(result[1]);
    }
  }
  const auto options = in.query.options().dtype(AccumulateType(in.query.scalar_type()));
  const int64_t rows = in.query.size(0), heads = in.query.size(2);
  return {Join(outs, 1,
               [&] {
                 return at::zeros({rows, 0, heads, in.values.size(3)}, options);
               }),
          Join(lses, 1, [&] {
            return at::zeros({rows, 0, heads}, options);
          })};
}

WindowGradients WindowAttentionBackward(const WindowInputs& in, const at::Tensor& grad_out) {
  const NoAutocast no_autocast;
  const auto zeros = [](const OptionalTensor& x) { return Present(x) ? at::zeros(x->sizes(), x->options()) : at::Tensor(); };
  WindowGradients grads{zeros(in.query),    zeros(in.sink_query),  zeros(in.key),      zeros(in.values),
                        zeros(in.past_key), zeros(in.past_values), zeros(in.sink_key), zeros(in.sink_values)};
  const auto compute = AccumulateType(in.query.scalar_type());
  for (const auto& piece : Pieces(kName, in.query, in.cu_seqlens)) {
    const auto x = InputsOf(in, piece);
    const auto context = ContextOf(in, piece, x);
    std::vector<at::Tensor> sums{at::zeros_like(context.key), at::zeros_like(context.values), at::zeros_like(context.sink_key),
                                 at::zeros_like(context.sink_values)};
    for (int64_t begin = 0; begin < piece.length; begin += kBlock) {
      const auto block = BlockAt(in, context.past, piece.length, begin);
      const auto function = [&](const std::vector<at::Tensor>& y) {
        return Attend(in, context, block, y[0], y[1], y[2], y[3], y[4], y[5]);
      };
      const auto keys = [&](const at::Tensor& y) { return y.narrow(1, block.key_begin, block.key_length); };
      const auto result = Gradients(function,
                                    {Cut(x.query, begin, block.length), Cut(x.sink_query, begin, block.length), keys(context.key),
                                     keys(context.values), context.sink_key, context.sink_values},
                                    {grad_out.narrow(1, piece.begin + begin, block.length).to(compute), {}});
      const auto put = [&](at::Tensor& target, const at::Tensor& value) {
        if (target.defined() && value.defined()) target.narrow(1, piece.begin + begin, block.length).copy_(value);
      };
      put(grads.query, result[0]);
      put(grads.sink_query, result[1]);
      keys(sums[0]).add_(result[2]);
      keys(sums[1]).add_(result[3]);
      sums[2].add_(result[4]);
      sums[3].add_(result[5]);
    }
    // From the context back to what it was made of.
    const auto function = [&](const std::vector<at::Tensor>& y) {
      const auto made = ContextOf(in, piece, {x.query, x.sink_query, y[0], y[1], y[2], y[3], y[4], y[5]});
      return std::vector<at::Tensor>{made.key, made.values, made.sink_key, made.sink_values};
    };
    const auto result = Gradients(function, {x.key, x.values, x.past_key, x.past_values, x.sink_key, x.sink_values}, sums);
    piece.Tokens(grads.key).copy_(result[0]);
    piece.Tokens(grads.values).copy_(result[1]);
    const auto put = [&](const at::Tensor& target, const at::Tensor& value) {
      if (target.defined() && value.defined()) piece.States(target).copy_(value);
    };
    put(grads.past_key, result[2]);
    put(grads.past_values, result[3]);
    put(grads.sink_key, result[4]);
    put(grads.sink_values, result[5]);
  }
  return grads;
}

}  // namespace latte::composed
