#include "ops/check.h"

#include <limits>
#include <sstream>
#include <string>

namespace latte {
namespace {

std::string Text(c10::SymIntArrayRef sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i > 0 ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

}  // namespace

void Checker::Rank(const char* argument, const at::Tensor& tensor, int64_t rank, const char* letters) const {
  TORCH_CHECK_TYPE(tensor.defined(), "[latte.", op_, "] ", argument, ": got None, expected a tensor ", letters);
  TORCH_CHECK_VALUE(tensor.dim() == rank, "[latte.", op_, "] ", argument, ": got shape ", Text(tensor.sym_sizes()), ", expected ",
                    letters);
}

void Checker::Shape(const char* argument, const at::Tensor& tensor, const char* letters,
                    std::initializer_list<c10::SymInt> expected) const {
  const auto sizes = tensor.sym_sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == expected.begin()[i];
  TORCH_CHECK_VALUE(same, "[latte.", op_, "] ", argument, ": got shape ", Text(sizes), ", expected ", letters, " = ",
                    Text(c10::SymIntArrayRef(expected)));
}

void Checker::Floating(const char* argument, const at::Tensor& tensor) const {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble, "[latte.", op_,
                   "] ", argument, ": got dtype ", dtype, ", expected Float, BFloat16, Half or Double");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, "[latte.", op_, "] ", argument, ": got layout ", tensor.layout(),
                   ", expected Strided");
}

void Checker::Dtype(const char* argument, const at::Tensor& tensor, at::ScalarType expected) const {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, "[latte.", op_, "] ", argument, ": got dtype ", tensor.scalar_type(),
                   ", expected ", expected);
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, "[latte.", op_, "] ", argument, ": got layout ", tensor.layout(),
                   ", expected Strided");
}

void Checker::Device(const char* argument, const at::Tensor& tensor, const at::Tensor& like) const {
  TORCH_CHECK_TYPE(tensor.device() == like.device(), "[latte.", op_, "] ", argument, ": got device ", tensor.device(),
                   ", expected ", like.device());
}

void Checker::AtLeast(const char* argument, const c10::SymInt& value, int64_t least) const {
  TORCH_CHECK_VALUE(value >= least, "[latte.", op_, "] ", argument, ": got ", value, ", expected at least ", least);
}

void Checker::Absent(const char* argument, bool present, const char* reason) const {
  TORCH_CHECK_VALUE(!present, "[latte.", op_, "] ", argument, ": got one, expected none ", reason);
}

void Checker::Heads(const c10::SymInt& heads, const c10::SymInt& kv_heads) const {
  AtLeast("Hkv, the heads of the keys", kv_heads, 1);
  TORCH_CHECK_VALUE(heads >= 1 && heads % kv_heads == 0, "[latte.", op_, "] heads: got H = ", heads, " and Hkv = ", kv_heads,
                    ", expected a positive multiple of Hkv");
}

void Checker::KeyMask(const OptionalTensor& key_mask, const at::Tensor& like) const {
  if (!Present(key_mask)) return;
  Shape("key_mask", *key_mask, "[B, T]", {like.sym_size(0), like.sym_size(1)});
  Dtype("key_mask", *key_mask, at::kBool);
  Device("key_mask", *key_mask, like);
}

void Checker::CuSeqlens(const OptionalTensor& cu_seqlens, const at::Tensor& like) const {
  if (!Present(cu_seqlens)) return;
  Rank("cu_seqlens", *cu_seqlens, 1, "[N + 1]");
  Dtype("cu_seqlens", *cu_seqlens, at::kLong);
  Device("cu_seqlens", *cu_seqlens, like);
  AtLeast("cu_seqlens' length", cu_seqlens->sym_size(0), 1);
  TORCH_CHECK_VALUE(like.sym_size(0) == 1, "[latte.", op_, "] cu_seqlens: got a batch of B = ", like.sym_size(0),
                    ", expected B = 1 with packed sequences");
}

void Checker::Past(const at::Tensor& past_key, int64_t window) const {
  TORCH_CHECK_VALUE(past_key.sym_size(1) == window, "[latte.", op_, "] past_key: got P = ", past_key.sym_size(1),
                    ", expected the window, ", window);
}

void Checker::CuSeqlensData(const at::Tensor& cu_seqlens, int64_t time) const {
  const auto* ends = cu_seqlens.const_data_ptr<int64_t>();
  const int64_t count = cu_seqlens.numel();
  TORCH_CHECK_VALUE(ends[0] == 0, "[latte.", op_, "] cu_seqlens: got a first entry of ", ends[0], ", expected 0");
  for (int64_t i = 1; i < count; ++i) {
    TORCH_CHECK_VALUE(ends[i] >= ends[i - 1], "[latte.", op_, "] cu_seqlens: got ", ends[i], " after ", ends[i - 1],
                      ", expected no entry below the one before it");
  }
  TORCH_CHECK_VALUE(ends[count - 1] == time, "[latte.", op_, "] cu_seqlens: got a last entry of ", ends[count - 1],
                    ", expected T = ", time);
}

void Checker::PositionData(const at::Tensor& position) const {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 4;
  const auto* positions = position.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < position.numel(); ++i) {
    TORCH_CHECK_VALUE(positions[i] >= 0 && positions[i] <= kMost, "[latte.", op_, "] position: got ", positions[i],
                      ", expected the number of tokens seen, 0 or more");
  }
}

void CheckLatent(const char* op, const LatentInputs& in) {
  const Checker check(op);
  check.Rank("query_logits", in.query_logits, 4, "[B, T, H, L]");
  check.Rank("key_logits", in.key_logits, 4, "[B, T, Hkv, L]");
  check.Rank("values", in.values, 4, "[B, T, Hkv, D]");
  const auto batch = in.query_logits.sym_size(0), time = in.query_logits.sym_size(1), heads = in.query_logits.sym_size(2);
  const auto kv_heads = in.key_logits.sym_size(2), latents = in.key_logits.sym_size(3), head_dim = in.values.sym_size(3);
  const bool window = in.gated || Present(in.window_out);
  check.AtLeast("L, the latents of key_logits", latents, 1);
  check.AtLeast("D, the head size of values", head_dim, 1);
  check.Heads(heads, kv_heads);
  check.Shape("key_logits", in.key_logits, "[B, T, Hkv, L]", {batch, time, kv_heads, latents});
  check.Shape("query_logits", in.query_logits, window ? "[B, T, H, L + 1]" : "[B, T, H, L]",
              {batch, time, heads, window ? latents + 1 : latents});
  check.Shape("values", in.values, "[B, T, Hkv, D]", {batch, time, kv_heads, head_dim});
  const auto dtype = in.query_logits.scalar_type();
  check.Floating("query_logits", in.query_logits);
  check.Dtype("key_logits", in.key_logits, dtype);
  check.Dtype("values", in.values, dtype);
  check.Device("key_logits", in.key_logits, in.query_logits);
  check.Device("values", in.values, in.query_logits);
  if (Present(in.window_out)) {
    check.Shape("window_out", *in.window_out, "[B, T, H, D]", {batch, time, heads, head_dim});
    check.Dtype("window_out", *in.window_out, AccumulateType(dtype));
    check.Device("window_out", *in.window_out, in.query_logits);
  }
  if (Present(in.log_decay)) {
    check.Absent("log_decay", !in.causal, "when causal is false");
    check.Shape("log_decay", *in.log_decay, "[B, T, Hkv, L]", {batch, time, kv_heads, latents});
    check.Dtype("log_decay", *in.log_decay, dtype);
    check.Device("log_decay", *in.log_decay, in.query_logits);
  }
  check.KeyMask(in.key_mask, in.query_logits);
  check.CuSeqlens(in.cu_seqlens, in.query_logits);
  if (Present(in.initial_state)) {
    check.Absent("initial_state", !in.causal, "when causal is false");
    check.Shape("initial_state", *in.initial_state, "[N, Hkv, L, D + 3]",
                {SequenceCount(in.query_logits, in.cu_seqlens), kv_heads, latents, head_dim + 3});
    check.Dtype("initial_state", *in.initial_state, AccumulateType(dtype));
    check.Device("initial_state", *in.initial_state, in.query_logits);
  }
}

void CheckWindow(const char* op, const WindowInputs& in) {
  const Checker check(op);
  check.Rank("query", in.query, 4, "[B, T, H, Dk]");
  check.Rank("key", in.key, 4, "[B, T, Hkv, Dk]");
  check.Rank("values", in.values, 4, "[B, T, Hkv, D]");
  const auto batch = in.query.sym_size(0), time = in.query.sym_size(1), heads = in.query.sym_size(2);
  const auto key_dim = in.query.sym_size(3), kv_heads = in.key.sym_size(2), head_dim = in.values.sym_size(3);
  check.AtLeast("Dk, the head size of query", key_dim, 1);
  check.AtLeast("D, the head size of values", head_dim, 1);
  check.Heads(heads, kv_heads);
  check.AtLeast("window", in.window, 1);
  check.AtLeast("sinks", in.sinks, 0);
  check.Absent("sinks", !in.causal && in.sinks > 0, "when causal is false");
  check.Shape("key", in.key, "[B, T, Hkv, Dk]", {batch, time, kv_heads, key_dim});
  check.Shape("values", in.values, "[B, T, Hkv, D]", {batch, time, kv_heads, head_dim});
  const auto dtype = in.query.scalar_type();
  check.Floating("query", in.query);
  check.Dtype("key", in.key, dtype);
  check.Dtype("values", in.values, dtype);
  check.Device("key", in.key, in.query);
  check.Device("values", in.values, in.query);
  if (Present(in.sink_query)) {
    check.Shape("sink_query", *in.sink_query, "[B, T, H, Dk]", {batch, time, heads, key_dim});
    check.Dtype("sink_query", *in.sink_query, dtype);
    check.Device("sink_query", *in.sink_query, in.query);
  }
  check.KeyMask(in.key_mask, in.query);
  check.CuSeqlens(in.cu_seqlens, in.query);
  if (!Present(in.position)) return;
  check.Absent("initial_state", !in.causal, "when causal is false");
  const auto sequences = SequenceCount(in.query, in.cu_seqlens);
  const auto present = [&](const char* argument, const OptionalTensor& tensor, at::ScalarType expected) {
    TORCH_CHECK_VALUE(Present(tensor), "[latte.", op, "] ", argument, ": got none, expected one with position");
    check.Dtype(argument, *tensor, expected);
    check.Device(argument, *tensor, in.query);
  };
  present("position", in.position, at::kLong);
  present("past_key", in.past_key, dtype);
  present("past_values", in.past_values, dtype);
  present("past_mask", in.past_mask, at::kBool);
  present("sink_key", in.sink_key, dtype);
  present("sink_values", in.sink_values, dtype);
  present("sink_mask", in.sink_mask, at::kBool);
  check.Shape("position", *in.position, "[N]", {sequences});
  check.Rank("past_key", *in.past_key, 4, "[N, P, Hkv, Dk]");
  const auto past = in.past_key->sym_size(1);
  check.AtLeast("P, the tokens of past_key", past, in.window - 1);
  check.Shape("past_key", *in.past_key, "[N, P, Hkv, Dk]", {sequences, past, kv_heads, key_dim});
  check.Shape("past_values", *in.past_values, "[N, P, Hkv, D]", {sequences, past, kv_heads, head_dim});
  check.Shape("past_mask", *in.past_mask, "[N, P]", {sequences, past});
  check.Shape("sink_key", *in.sink_key, "[N, S, Hkv, Dk]", {sequences, in.sinks, kv_heads, key_dim});
  check.Shape("sink_values", *in.sink_values, "[N, S, Hkv, D]", {sequences, in.sinks, kv_heads, head_dim});
  check.Shape("sink_mask", *in.sink_mask, "[N, S]", {sequences, in.sinks});
}

void CheckConv1d(const char* op, const Conv1dInputs& in) {
  const Checker check(op);
  check.Rank("x", in.x, 3, "[B, T, C]");
  check.Rank("weight", in.weight, 2, "[C, K]");
  const auto channels = in.x.sym_size(2), width = in.weight.sym_size(1);
  const auto dtype = AccumulateType(in.x.scalar_type());
  check.AtLeast("C, the channels of x", channels, 1);
  check.AtLeast("K, the width of weight", width, 1);
  check.Shape("weight", in.weight, "[C, K]", {channels, width});
  check.Floating("x", in.x);
  check.Dtype("weight", in.weight, dtype);
  check.Device("weight", in.weight, in.x);
  if (Present(in.bias)) {
    check.Shape("bias", *in.bias, "[C]", {channels});
    check.Dtype("bias", *in.bias, dtype);
    check.Device("bias", *in.bias, in.x);
  }
  check.KeyMask(in.key_mask, in.x);
  check.CuSeqlens(in.cu_seqlens, in.x);
  if (Present(in.initial_state)) {
    check.Shape("initial_state", *in.initial_state, "[N, K - 1, C]", {SequenceCount(in.x, in.cu_seqlens), width - 1, channels});
    check.Dtype("initial_state", *in.initial_state, dtype);
    check.Device("initial_state", *in.initial_state, in.x);
  }
}

void CheckRgLru(const char* op, const RgLruInputs& in) {
  const Checker check(op);
  check.Rank("x", in.x, 3, "[B, T, C]");
  const auto batch = in.x.sym_size(0), time = in.x.sym_size(1), channels = in.x.sym_size(2);
  const auto dtype = in.x.scalar_type();
  check.AtLeast("C, the channels of x", channels, 1);
  check.Floating("x", in.x);
  check.Shape("recurrence_logits", in.recurrence_logits, "[B, T, C]", {batch, time, channels});
  check.Dtype("recurrence_logits", in.recurrence_logits, dtype);
  check.Device("recurrence_logits", in.recurrence_logits, in.x);
  check.Shape("input_logits", in.input_logits, "[B, T, C]", {batch, time, channels});
  check.Dtype("input_logits", in.input_logits, dtype);
  check.Device("input_logits", in.input_logits, in.x);
  check.Shape("lambda", in.lambda, "[C]", {channels});
  check.Dtype("lambda", in.lambda, AccumulateType(dtype));
  check.Device("lambda", in.lambda, in.x);
  check.KeyMask(in.key_mask, in.x);
  check.CuSeqlens(in.cu_seqlens, in.x);
  if (Present(in.initial_state)) {
    check.Shape("initial_state", *in.initial_state, "[N, C]", {SequenceCount(in.x, in.cu_seqlens), channels});
    check.Dtype("initial_state", *in.initial_state, AccumulateType(dtype));
    check.Device("initial_state", *in.initial_state, in.x);
  }
}

void CheckVapor(const char* op, const at::Tensor& x, const OptionalTensor& positions, double base) {
  const Checker check(op);
  check.Rank("x", x, 4, "[B, T, H, D]");
  check.Floating("x", x);
  TORCH_CHECK_VALUE(x.sym_size(3) % 2 == 0, "[latte.", op, "] x: got D = ", x.sym_size(3), ", expected an even head size");
  TORCH_CHECK_VALUE(base > 0.0 && base <= std::numeric_limits<double>::max(), "[latte.", op, "] base: got ", base,
                    ", expected a positive number");
  if (!Present(positions)) return;
  check.Dtype("positions", *positions, at::kLong);
  check.Device("positions", *positions, x);
  if (positions->dim() == 1) {
    check.Shape("positions", *positions, "[T]", {x.sym_size(1)});
  } else {
    check.Shape("positions", *positions, "[B, T]", {x.sym_size(0), x.sym_size(1)});
  }
}

}  // namespace latte
