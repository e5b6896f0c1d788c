// What macchiato_attention and window_attention remember besides the latents: the last W tokens and the sinks. Plain ATen where
// gradients are to flow through them, latte::window_state where not: a decoding step should cost two copies, not forty operators.
#include <torch/library.h>

#include <cstring>

#include "ops/check.h"
#include "ops/core.h"
#include "ops/cpu.h"

namespace latte {
namespace {

enum CacheIndex : int64_t { kKeys, kValues, kMask, kSinkKeys, kSinkValues, kSinkMask, kPosition, kCaches };
using Caches = std::vector<at::Tensor>;  // in that order
using State = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kName = "window_state";

// The caches of a sequence that begins: zeros that nothing reads.
WindowInputs WithPast(WindowInputs in) {
  if (Present(in.position)) return in;
  const auto sequences = SequenceCount(in.query, in.cu_seqlens);
  const auto booleans = in.query.options().dtype(at::kBool);
  const auto rows = [&](const c10::SymInt& count, const at::Tensor& like) {
    return at::zeros_symint({sequences, count, like.sym_size(2), like.sym_size(3)}, like.options());
  };
  in.position = at::zeros_symint({sequences}, in.query.options().dtype(at::kLong));
  in.past_key = rows(in.window, in.key);
  in.past_values = rows(in.window, in.values);
  in.past_mask = at::zeros_symint({sequences, in.window}, booleans);
  in.sink_key = rows(in.sinks, in.key);
  in.sink_values = rows(in.sinks, in.values);
  in.sink_mask = at::zeros_symint({sequences, in.sinks}, booleans);
  return in;
}

// Rows of x along dimension 1, chosen for each n by index [N, R].
at::Tensor GatherRows(const at::Tensor& x, const at::Tensor& index) {
  auto wide = index;
  for (int64_t d = 2; d < x.dim(); ++d) wide = wide.unsqueeze(-1);
  auto shape = index.sym_sizes().vec();
  for (int64_t d = 2; d < x.dim(); ++d) shape.push_back(x.sym_size(d));
  return x.gather(1, wide.expand_symint(shape));
}

// What follows the last W tokens and the sinks after this call's tokens. Rows of a batch move by slices, packed sequences, whose
// lengths are data, by indices.
Caches Composed(const WindowInputs& given) {
  const auto in = WithPast(given);
  const auto options = in.query.options();
  const auto time = in.query.sym_size(1);
  const auto mask = Present(in.key_mask) ? *in.key_mask : at::ones_symint({in.query.sym_size(0), time}, options.dtype(at::kBool));
  const auto integers = options.dtype(at::kLong);
  const auto sink = at::arange(in.sinks, integers).unsqueeze(0);
  const auto token = sink - in.position->unsqueeze(1);  // [N, S]: which of this call's tokens is sink s
  Caches state(kCaches);
  if (!Present(in.cu_seqlens)) {
    const auto window = [&](const at::Tensor& old, const at::Tensor& now) {
      return at::cat({old.slice_symint(1, time), now.slice_symint(1, -in.window)}, 1);
    };
    state[kKeys] = window(*in.past_key, in.key);
    state[kValues] = window(*in.past_values, in.values);
    state[kMask] = window(*in.past_mask, mask);
    const auto index = at::where(token.ge(0).logical_and(token.lt(c10::Scalar(time))), token + in.sinks, sink);
    const auto sinks = [&](const at::Tensor& old, const at::Tensor& now) {
      return GatherRows(at::cat({old, now.slice_symint(1, 0, in.sinks)}, 1), index);
    };
    state[kSinkKeys] = sinks(*in.sink_key, in.key);
    state[kSinkValues] = sinks(*in.sink_values, in.values);
    state[kSinkMask] = sinks(*in.sink_mask, mask);
    state[kPosition] = *in.position + c10::Scalar(time);
    return state;
  }
  // index [N, R] of this call's tokens, where `taken`; elsewhere the old rows `old_index` remain.
  const auto begins = in.cu_seqlens->slice(0, 0, -1).unsqueeze(1);
  const auto lengths = in.cu_seqlens->slice(0, 1).unsqueeze(1) - begins;  // [N, 1]
  const auto last = at::arange(in.window, integers).unsqueeze(0);
  const auto recent = lengths - in.window + last;  // [N, W]: the sequence's token in that row
  const auto choose = [&](const at::Tensor& old, const at::Tensor& now, const at::Tensor& index, const at::Tensor& taken,
                          const at::Tensor& old_index) {
    // One row more keeps the index valid where there is no token.
    const auto row = now.select(0, 0);
    const auto padded = at::cat({row, at::zeros_symint(old.sym_sizes().slice(1), old.options()).slice(0, 0, 1)}, 0);
    const auto safe = at::where(taken, begins + index, at::zeros_like(index));
    auto shape = index.sym_sizes().vec();
    for (int64_t d = 2; d < old.dim(); ++d) shape.push_back(old.sym_size(d));
    const auto fresh = padded.index_select(0, safe.reshape({-1})).reshape_symint(shape);
    auto wide = taken;
    for (int64_t d = 2; d < old.dim(); ++d) wide = wide.unsqueeze(-1);
    return at::where(wide, fresh, GatherRows(old, old_index));
  };
  const auto window_taken = recent.ge(0);
  const auto window_old = at::where(window_taken, at::zeros_like(recent), last + lengths);
  state[kKeys] = choose(*in.past_key, in.key, recent, window_taken, window_old);
  state[kValues] = choose(*in.past_values, in.values, recent, window_taken, window_old);
  state[kMask] = choose(*in.past_mask, mask, recent, window_taken, window_old);
  const auto sink_taken = token.ge(0).logical_and(token < lengths);
  const auto sink_old = sink.expand_symint(token.sym_sizes());
  state[kSinkKeys] = choose(*in.sink_key, in.key, token, sink_taken, sink_old);
  state[kSinkValues] = choose(*in.sink_values, in.values, token, sink_taken, sink_old);
  state[kSinkMask] = choose(*in.sink_mask, mask, token, sink_taken, sink_old);
  state[kPosition] = *in.position + lengths.squeeze(1);
  return state;
}

#define LATTE_WINDOW_STATE_PARAMETERS                                                                       \
  const at::Tensor &query, const at::Tensor &key, const at::Tensor &values, const OptionalTensor &key_mask, \
      const OptionalTensor &position, const OptionalTensor &past_key, const OptionalTensor &past_values,    \
      const OptionalTensor &past_mask, const OptionalTensor &sink_key, const OptionalTensor &sink_values,   \
      const OptionalTensor &sink_mask, const OptionalTensor &cu_seqlens, int64_t window, int64_t sinks

WindowInputs InputsOf(LATTE_WINDOW_STATE_PARAMETERS) {
  WindowInputs in{query,     key,      values,      {},        key_mask,   position, past_key, past_values,
                  past_mask, sink_key, sink_values, sink_mask, cu_seqlens, window,   sinks};
  CheckWindow(kName, in);
  if (Present(in.past_key)) Checker(kName).Past(*in.past_key, window);
  return in;
}
#define LATTE_WINDOW_STATE_INPUTS                                                                                      \
  InputsOf(query, key, values, key_mask, position, past_key, past_values, past_mask, sink_key, sink_values, sink_mask, \
           cu_seqlens, window, sinks)

State Tuple(const Caches& x) { return {x[0], x[1], x[2], x[3], x[4], x[5], x[6]}; }

Caches Empty(const WindowInputs& in) {
  const auto sequences = SequenceCount(in.query, in.cu_seqlens);
  const auto options = in.query.options();
  const auto rows = [&](const c10::SymInt& count, const at::Tensor& like) {
    return at::empty_symint({sequences, count, like.sym_size(2), like.sym_size(3)}, options);
  };
  const auto mask = [&](const c10::SymInt& count) { return at::empty_symint({sequences, count}, options.dtype(at::kBool)); };
  return {rows(in.window, in.key),
          rows(in.window, in.values),
          mask(in.window),
          rows(in.sinks, in.key),
          rows(in.sinks, in.values),
          mask(in.sinks),
          at::empty_symint({sequences}, options.dtype(at::kLong))};
}

State StateMeta(LATTE_WINDOW_STATE_PARAMETERS) { return Tuple(Empty(LATTE_WINDOW_STATE_INPUTS)); }
State StateComposed(LATTE_WINDOW_STATE_PARAMETERS) {
  auto caches = Composed(LATTE_WINDOW_STATE_INPUTS);
  for (auto& cache : caches) cache = cache.contiguous();
  return Tuple(caches);
}

// Copies rows [X, Y] or single mask bytes from a strided tensor to a contiguous one.
class RowCopier {
 public:
  // `from` [N, rows, X, Y] or [N, rows], its last dimension contiguous if it has four; undefined: zeros are written.
  RowCopier(const at::Tensor& from, const at::Tensor& to)
      : size_(to.element_size()),
        heads_(to.dim() == 4 ? to.size(2) : 1),
        row_bytes_(to.dim() == 4 ? to.size(3) * size_ : size_),
        to_rows_(to.size(1)),
        to_(static_cast<char*>(to.mutable_data_ptr())) {
    if (!from.defined() || from.numel() == 0) return;
    from_ = static_cast<const char*>(from.const_data_ptr());
    stride_[0] = from.stride(0) * size_;
    stride_[1] = from.stride(1) * size_;
    stride_[2] = to.dim() == 4 ? from.stride(2) * size_ : 0;
    together_ = stride_[1] == heads_ * row_bytes_ && (heads_ == 1 || stride_[2] == row_bytes_);
  }

  void Copy(int64_t from_n, int64_t from_row, int64_t n, int64_t row, int64_t count) const {
    if (count <= 0) return;
    char* to = to_ + (n * to_rows_ + row) * heads_ * row_bytes_;
    if (from_ == nullptr) {
      std::memset(to, 0, static_cast<size_t>(count * heads_ * row_bytes_));
      return;
    }
    const char* from = from_ + from_n * stride_[0] + from_row * stride_[1];
    if (together_) {
      std::memcpy(to, from, static_cast<size_t>(count * heads_ * row_bytes_));
      return;
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t h = 0; h < heads_; ++h, to += row_bytes_) {
        std::memcpy(to, from + r * stride_[1] + h * stride_[2], static_cast<size_t>(row_bytes_));
      }
    }
  }

 private:
  int64_t size_, heads_, row_bytes_, to_rows_;
  char* to_;
  const char* from_ = nullptr;
  int64_t stride_[3] = {};
  bool together_ = false;
};

State StateCpu(LATTE_WINDOW_STATE_PARAMETERS) {
  const auto in = LATTE_WINDOW_STATE_INPUTS;
  const int64_t time = query.size(1);
  const auto ends = cpu::Contiguous(cu_seqlens), before = cpu::Contiguous(position);
  if (Present(ends)) Checker(kName).CuSeqlensData(*ends, time);
  if (Present(before)) Checker(kName).PositionData(*before);
  const auto caches = Empty(in);
  const int64_t sequences = caches[kPosition].size(0);
  auto* after = caches[kPosition].mutable_data_ptr<int64_t>();
  const auto mask = Present(key_mask) ? *key_mask : at::ones({query.size(0), time}, query.options().dtype(at::kBool));
  const auto roll = [&](const at::Tensor& now, const OptionalTensor& old, const at::Tensor& window_rows,
                        const OptionalTensor& old_sinks, const at::Tensor& sink_rows) {
    const auto readable = cpu::Readable(now), past = OrUndefined(cpu::Readable(old)),
               held = OrUndefined(cpu::Readable(old_sinks));
    const RowCopier fresh(readable, window_rows), kept(past, window_rows);
    const RowCopier fresh_sinks(readable, sink_rows), kept_sinks(held, sink_rows);
    for (int64_t n = 0; n < sequences; ++n) {
      const int64_t row = Present(ends) ? 0 : n;
      const int64_t begin = Present(ends) ? ends->const_data_ptr<int64_t>()[n] : 0;
      const int64_t length = Present(ends) ? ends->const_data_ptr<int64_t>()[n + 1] - begin : time;
      const int64_t seen = Present(before) ? before->const_data_ptr<int64_t>()[n] : 0;
      const int64_t taken = std::min(window, length);
      kept.Copy(n, length, n, 0, window - taken);
      fresh.Copy(row, begin + length - taken, n, window - taken, taken);
      // Sinks 0 … first - 1 are old ones, up to `last` this call's first tokens; later ones have not come yet.
      const int64_t first = std::min(sinks, seen), last = std::min(sinks, first + length);
      kept_sinks.Copy(n, 0, n, 0, first);
      fresh_sinks.Copy(row, begin, n, first, last - first);
      kept_sinks.Copy(n, last, n, last, sinks - last);
      after[n] = seen + length;
    }
  };
  roll(key, past_key, caches[kKeys], sink_key, caches[kSinkKeys]);
  roll(values, past_values, caches[kValues], sink_values, caches[kSinkValues]);
  roll(mask, past_mask, caches[kMask], sink_mask, caches[kSinkMask]);
  return Tuple(caches);
}

TORCH_LIBRARY_FRAGMENT(latte, m) {
  m.def(
      "window_state(Tensor query, Tensor key, Tensor values, Tensor? key_mask, Tensor? position, Tensor? past_key, "
      "Tensor? past_values, Tensor? past_mask, Tensor? sink_key, Tensor? sink_values, Tensor? sink_mask, Tensor? cu_seqlens, "
      "int window, int sinks) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(latte, CompositeExplicitAutograd, m) { m.impl("window_state", TORCH_FN(StateComposed)); }
TORCH_LIBRARY_IMPL(latte, CPU, m) { m.impl("window_state", TORCH_FN(StateCpu)); }
TORCH_LIBRARY_IMPL(latte, Meta, m) { m.impl("window_state", TORCH_FN(StateMeta)); }

}  // namespace

std::vector<at::Tensor> NextWindowState(const WindowInputs& in) {
  const bool needs_grad =
      at::GradMode::is_enabled() && (NeedsGrad(in.key) || NeedsGrad(in.values) || NeedsGrad(in.past_key) ||
                                     NeedsGrad(in.past_values) || NeedsGrad(in.sink_key) || NeedsGrad(in.sink_values));
  if (needs_grad || AnyTransformed(in.key, in.values, in.past_key, in.past_values, in.sink_key, in.sink_values)) {
    return Composed(in);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("latte::window_state", "").typed<decltype(StateMeta)>();
  const auto [keys, values, mask, sink_keys, sink_values, sink_mask, position] =
      op.call(in.query, in.key, in.values, in.key_mask, in.position, in.past_key, in.past_values, in.past_mask, in.sink_key,
              in.sink_values, in.sink_mask, in.cu_seqlens, in.window, in.sinks);
  return {keys, values, mask, sink_keys, sink_values, sink_mask, position};
}

}  // namespace latte
