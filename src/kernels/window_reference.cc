#include "kernels/window_reference.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "hwy/base.h"

namespace latte::kernels {
namespace {

double Element(DType dtype, const void* data, int64_t offset) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[offset];
    case DType::kBFloat16:
      return hwy::F32FromBF16(static_cast<const hwy::bfloat16_t*>(data)[offset]);
    case DType::kFloat16:
      return hwy::F32FromF16(static_cast<const hwy::float16_t*>(data)[offset]);
  }
  return 0.0;
}

// A tensor [rows, time, heads, inner] in doubles, with room for its gradient.
struct Dense {
  Dense(DType dtype, const View& view, int64_t rows, int64_t time, int64_t heads, int64_t inner)
      : time(time), heads(heads), inner(inner) {
    if (!view) return;
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t t = 0; t < time; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t i = 0; i < inner; ++i) {
            values.push_back(Element(dtype, view.data, b * view.batch_stride + t * view.time_stride + h * view.head_stride + i));
          }
        }
      }
    }
    grad.assign(values.size(), 0.0);
  }

  size_t Row(int64_t b, int64_t t, int64_t h) const { return static_cast<size_t>(((b * time + t) * heads + h) * inner); }

  int64_t time, heads, inner;
  std::vector<double> values;
  std::vector<double> grad;
};

// A key that one token reads.
struct Read {
  Dense* query;
  Dense* key;
  Dense* value;
  size_t query_row, key_row, value_row;
  double weight;
};

bool Real(const MaskView& mask, int64_t b, int64_t t) { return !mask || mask.data[b * mask.batch_stride + t * mask.time_stride]; }

double Dot(const double* a, const double* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

WindowReference ReferenceWindow(const WindowArgs& args, const double* grad_out) {
  const int64_t batch = args.cu_seqlens == nullptr ? args.sequences : 1;
  const bool resumes = args.causal && args.position != nullptr;
  const int64_t past_rows = resumes ? args.past : 0;
  const int64_t sink_rows = resumes ? args.sinks : 0;
  Dense query(args.dtype, args.query, batch, args.time, args.heads, args.key_dim);
  Dense sink_query(args.dtype, args.sink_query, batch, args.time, args.heads, args.key_dim);
  Dense key(args.dtype, args.key, batch, args.time, args.kv_heads, args.key_dim);
  Dense values(args.dtype, args.values, batch, args.time, args.kv_heads, args.head_dim);
  Dense past_key(args.dtype, args.past_key, args.sequences, past_rows, args.kv_heads, args.key_dim);
  Dense past_values(args.dtype, args.past_values, args.sequences, past_rows, args.kv_heads, args.head_dim);
  Dense sink_key(args.dtype, args.sink_key, args.sequences, sink_rows, args.kv_heads, args.key_dim);
  Dense sink_values(args.dtype, args.sink_values, args.sequences, sink_rows, args.kv_heads, args.head_dim);

  WindowReference result;
  result.out.assign(static_cast<size_t>(batch * args.time * args.heads * args.head_dim), 0.0);
  result.lse.assign(static_cast<size_t>(batch * args.time * args.heads), -std::numeric_limits<double>::infinity());

  for (int64_t n = 0; n < args.sequences; ++n) {
    const Sequence sequence = SequenceAt(n, args.time, args.cu_seqlens);
    const int64_t position = resumes ? args.position[n] : 0;
    const int64_t end = position + sequence.length;
    for (int64_t t = position; t < end; ++t) {
      for (int64_t h = 0; h < args.heads; ++h) {
        const int64_t kv_head = h / (args.heads / args.kv_heads);
        const int64_t row = sequence.begin + t - position;
        std::vector<Read> reads;
        for (int64_t s = 0; s < end; ++s) {
          const bool in_window = args.causal ? s <= t && s > t - args.window : s > t - args.window && s - args.window < t;
          const bool far_sink = args.causal && s < args.sinks && s <= t - args.window;
          if (!in_window && !far_sink) continue;
          Dense& from = far_sink && args.sink_query ? sink_query : query;
          Read read{&from, &key, &values, from.Row(sequence.batch, row, h), 0, 0, 0.0};
          if (s >= position) {
            const int64_t key_time = sequence.begin + s - position;
            if (!Real(args.key_mask, sequence.batch, key_time)) continue;
            read.key_row = key.Row(sequence.batch, key_time, kv_head);
            read.value_row = values.Row(sequence.batch, key_time, kv_head);
          } else {
            const int64_t key_time = far_sink ? s : args.past - (position - s);
            if (key_time < 0 || !Real(far_sink ? args.sink_mask : args.past_mask, n, key_time)) continue;
            read.key = far_sink ? &sink_key : &past_key;
            read.value = far_sink ? &sink_values : &past_values;
            read.key_row = read.key->Row(n, key_time, kv_head);
            read.value_row = read.value->Row(n, key_time, kv_head);
          }
          read.weight = static_cast<double>(args.scale) *
                        Dot(read.query->values.data() + read.query_row, read.key->values.data() + read.key_row, args.key_dim);
          reads.push_back(read);
        }
        if (reads.empty()) continue;

        double max = -std::numeric_limits<double>::infinity();
        for (const Read& read : reads) max = std::max(max, read.weight);
        double sum = 0.0;
        for (Read& read : reads) sum += read.weight = std::exp(read.weight - max);
        const size_t head = static_cast<size_t>((sequence.batch * args.time + row) * args.heads + h);
        double* out = result.out.data() + head * static_cast<size_t>(args.head_dim);
        result.lse[head] = max + std::log(sum);
        for (Read& read : reads) {
          read.weight /= sum;
          for (int64_t d = 0; d < args.head_dim; ++d) out[d] += read.weight * read.value->values[read.value_row + d];
        }
        if (grad_out == nullptr) continue;

        const double* grad = grad_out + head * static_cast<size_t>(args.head_dim);
        const double delta = Dot(grad, out, args.head_dim);
        for (const Read& read : reads) {
          for (int64_t d = 0; d < args.head_dim; ++d) read.value->grad[read.value_row + d] += read.weight * grad[d];
          const double grad_score = static_cast<double>(args.scale) * read.weight *
                                    (Dot(grad, read.value->values.data() + read.value_row, args.head_dim) - delta);
          for (int64_t d = 0; d < args.key_dim; ++d) {
            read.query->grad[read.query_row + d] += grad_score * read.key->values[read.key_row + d];
            read.key->grad[read.key_row + d] += grad_score * read.query->values[read.query_row + d];
          }
        }
      }
    }
  }
  result.grad_query = std::move(query.grad);
  result.grad_sink_query = std::move(sink_query.grad);
  result.grad_key = std::move(key.grad);
  result.grad_values = std::move(values.grad);
  result.grad_past_key = std::move(past_key.grad);
  result.grad_past_values = std::move(past_values.grad);
  result.grad_sink_key = std::move(sink_key.grad);
  result.grad_sink_values = std::move(sink_values.grad);
  return result;
}

}  // namespace latte::kernels
