#include "kernels/recurrent_reference.h"

#include <cmath>

#include "kernels/types.h"

namespace latte::kernels {
namespace {

bool IsReal(const bool* key_mask, int64_t row) { return key_mask == nullptr || key_mask[row]; }

double Sigmoid(double x) { return x >= 0.0 ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x) / (1.0 + std::exp(x)); }

double Softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

}  // namespace

void Conv1dReference(const Conv1dReferenceArgs& args, double* out, double* final_state) {
  const int64_t past = args.width - 1;
  for (int64_t n = 0; n < args.sequences; ++n) {
    const Sequence sequence = SequenceAt(n, args.time, args.cu_seqlens);
    const int64_t first_row = sequence.batch * args.time + sequence.begin;
    for (int64_t c = 0; c < args.channels; ++c) {
      // Input at token t of the sequence, which is negative in the state's reach.
      const auto input = [&](int64_t t) {
        if (t < 0) return args.initial_state == nullptr ? 0.0 : args.initial_state[(n * past + past + t) * args.channels + c];
        return IsReal(args.key_mask, first_row + t) ? args.x[(first_row + t) * args.channels + c] : 0.0;
      };
      for (int64_t t = 0; t < sequence.length; ++t) {
        double y = args.bias == nullptr ? 0.0 : args.bias[c];
        for (int64_t j = 0; j < args.width; ++j) y += args.weight[c * args.width + j] * input(t - past + j);
        out[(first_row + t) * args.channels + c] = y;
      }
      if (final_state == nullptr) continue;
      for (int64_t r = 0; r < past; ++r) {
        final_state[(n * past + r) * args.channels + c] = input(sequence.length - past + r);
      }
    }
  }
}

void RgLruReference(const RgLruReferenceArgs& args, double* out, double* final_state) {
  for (int64_t n = 0; n < args.sequences; ++n) {
    const Sequence sequence = SequenceAt(n, args.time, args.cu_seqlens);
    const int64_t first_row = sequence.batch * args.time + sequence.begin;
    for (int64_t c = 0; c < args.channels; ++c) {
      double h = args.initial_state == nullptr ? 0.0 : args.initial_state[n * args.channels + c];
      for (int64_t row = first_row; row < first_row + sequence.length; ++row) {
        const int64_t i = row * args.channels + c;
        if (IsReal(args.key_mask, row)) {
          const double log_a = -8.0 * Softplus(args.lambda[c]) * Sigmoid(args.recurrence_logits[i]);
          const double gated = Sigmoid(args.input_logits[i]) * args.x[i];
          h = std::exp(log_a) * h + std::sqrt(-std::expm1(2.0 * log_a)) * gated;
        }
        out[i] = h;
      }
      if (final_state != nullptr) final_state[n * args.channels + c] = h;
    }
  }
}

void VaporReference(const VaporReferenceArgs& args, double* out) {
  const int64_t half = args.head_dim / 2;
  for (int64_t row = 0; row < args.batch * args.time; ++row) {
    const int64_t position = args.positions == nullptr ? row % args.time : args.positions[row];
    for (int64_t i = 0; i < half; ++i) {
      const long double exponent = -2.0L * static_cast<long double>(i) / static_cast<long double>(args.head_dim);
      const long double angle = static_cast<long double>(position) * std::pow(static_cast<long double>(args.base), exponent);
      const double cos = static_cast<double>(std::cos(angle));
      const double sin = static_cast<double>(std::sin(args.inverse ? -angle : angle));
      for (int64_t h = 0; h < args.heads; ++h) {
        const int64_t low = (row * args.heads + h) * args.head_dim + i;
        const double x = args.x[low], y = args.x[low + half];
        out[low] = x * cos - y * sin;
        out[low + half] = x * sin + y * cos;
      }
    }
  }
}

}  // namespace latte::kernels
