// The kernels' arguments for the core operators' inputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/latent.h"
#include "kernels/window.h"
#include "ops/check.h"
#include "ops/cpu.h"
#include "ops/inputs.h"

namespace latte::cpu {

// Copies of the inputs where their layout isn't the kernels', kept alive beside the arguments that point at them; `op` is named
// in errors.
struct LatentCall {
  LatentInputs in;
  kernels::LatentArgs args;
  int64_t work = 0;  // multiplications of a slice, about

  LatentCall(const char* op, const LatentInputs& given) : in(given) {
    in.query_logits = Readable(in.query_logits);
    in.key_logits = Readable(in.key_logits);
    in.values = Readable(in.values);
    in.window_out = Readable(in.window_out);
    in.log_decay = Readable(in.log_decay);
    in.initial_state = Contiguous(in.initial_state);
    in.cu_seqlens = Contiguous(in.cu_seqlens);
    args.dtype = DTypeOf(in.query_logits);
    args.causal = in.causal;
    args.sequences = Present(in.cu_seqlens) ? in.cu_seqlens->numel() - 1 : in.query_logits.size(0);
    args.time = in.query_logits.size(1);
    args.heads = in.query_logits.size(2);
    args.kv_heads = in.key_logits.size(2);
    args.latents = in.key_logits.size(3);
    args.head_dim = in.values.size(3);
    if (Present(in.cu_seqlens)) {
      Checker(op).CuSeqlensData(*in.cu_seqlens, args.time);
      args.cu_seqlens = in.cu_seqlens->const_data_ptr<int64_t>();
    }
    args.query_logits = ViewOf(in.query_logits);
    args.key_logits = ViewOf(in.key_logits);
    args.values = ViewOf(in.values);
    args.log_decay = ViewOf(in.log_decay);
    args.window_out = ViewOf(in.window_out);
    args.key_mask = MaskOf(in.key_mask);
    args.initial_state = FloatsOf(in.initial_state);
    work = args.time * args.latents * args.head_dim * (args.heads / args.kv_heads);
  }
};

struct WindowCall {
  WindowInputs in;
  kernels::WindowArgs args;
  int64_t work = 0;  // multiplications of a slice, about

  WindowCall(const char* op, const WindowInputs& given) : in(given) {
    for (auto* x : {&in.query, &in.key, &in.values}) *x = Readable(*x);
    for (auto* x : {&in.sink_query, &in.past_key, &in.past_values, &in.sink_key, &in.sink_values}) *x = Readable(*x);
    in.position = Contiguous(in.position);
    in.cu_seqlens = Contiguous(in.cu_seqlens);
    args.dtype = DTypeOf(in.query);
    args.causal = in.causal;
    args.sequences = Present(in.cu_seqlens) ? in.cu_seqlens->numel() - 1 : in.query.size(0);
    args.time = in.query.size(1);
    args.heads = in.query.size(2);
    args.kv_heads = in.key.size(2);
    args.key_dim = in.query.size(3);
    args.head_dim = in.values.size(3);
    args.window = in.window;
    args.sinks = in.sinks;
    args.scale = static_cast<float>(in.scale);
    if (Present(in.cu_seqlens)) {
      Checker(op).CuSeqlensData(*in.cu_seqlens, args.time);
      args.cu_seqlens = in.cu_seqlens->const_data_ptr<int64_t>();
    }
    // A window wider than the text reads the text: sums of positions and W must not overflow. The same holds for sinks.
    const int64_t past = Present(in.position) ? in.past_key->size(1) : 0;
    int64_t furthest = 0;
    if (Present(in.position)) {
      Checker(op).PositionData(*in.position);
      args.position = in.position->const_data_ptr<int64_t>();
      for (int64_t n = 0; n < args.sequences; ++n) furthest = std::max(furthest, args.position[n]);
    }
    args.window = std::min(args.window, furthest + args.time + 1);
    if (!Present(in.position)) args.sinks = std::min(args.sinks, args.time);
    args.query = ViewOf(in.query);
    args.key = ViewOf(in.key);
    args.values = ViewOf(in.values);
    args.key_mask = MaskOf(in.key_mask);
    if (in.sinks > 0) args.sink_query = ViewOf(in.sink_query);
    if (Present(in.position)) {
      args.past = past;
      args.past_key = ViewOf(in.past_key);
      args.past_values = ViewOf(in.past_values);
      args.past_mask = MaskOf(in.past_mask);
      args.sink_key = ViewOf(in.sink_key);
      args.sink_values = ViewOf(in.sink_values);
      args.sink_mask = MaskOf(in.sink_mask);
    }
    work = args.time * (std::min(args.window, past + args.time) + args.sinks) * (args.key_dim + args.head_dim) *
           (args.heads / args.kv_heads);
  }
};

}  // namespace latte::cpu
