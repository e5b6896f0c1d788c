// One pass of a batch of tokens through all layers: a fixed schedule of stages that all threads run together.
//
// A layer has five stages with a barrier behind each: the attention's matrices, attention, the output matrix, the gated
// feed-forward's first half, its second half. What comes between products (norms, residual sums, quantising) belongs to rows:
// a single token's is repeated by every thread, which is cheaper than to meet once more; of several tokens each thread takes
// some, and then they meet.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/latent.h"
#include "runtime/engine.h"

namespace latte::runtime {

// One an engine: members stand in the order of a layer.
class Engine::Pass {  // NOLINT(clang-analyzer-optin.performance.Padding)
 public:
  Pass(const Model& model, const EngineOptions& options);

  // Checked parts, of at most batch_tokens tokens in all. Sessions advance.
  std::span<const float> run(std::span<const StepPart> parts);

  int threads() const { return pool_.size(); }
  int64_t batch_tokens() const { return batch_tokens_; }

 private:
  struct Part {
    Session* session;
    int64_t first;  // row of its first token
    int64_t count;
    int64_t position;
    int64_t prompt;  // counts those of several tokens
  };
  // What a thread has for itself. For a batch of one token it holds the thread's own copy of the row and of the inputs.
  struct Own {
    float* row = nullptr;         // [E]
    float* sum = nullptr;         // [E]
    float* heads = nullptr;       // [H, D]
    float* query = nullptr;       // [H, Dk], rotated, with the scores' scale
    float* sink_query = nullptr;  // [H, Dk]
    float* key = nullptr;         // [Dk]
    float* value = nullptr;       // [D], with a floor D + 1
    float* keys = nullptr;        // [kBlockTokens + kKeyConvWidth - 1, Dk], where latents have a convolution
    float* gate = nullptr;        // [kBlockTokens, F]
    float* up = nullptr;          // [kBlockTokens, F]
    Inputs inputs, output_inputs, down_inputs, query_inputs, key_inputs;
  };
  // Cosines and sines [rows, rotary_dims / 2], and the sines of the way back.
  struct Turns {
    float* cos = nullptr;
    float* sin = nullptr;
    float* back = nullptr;
  };

  void start(std::span<const StepPart> parts);
  void work(int thread);
  void turn_rows(int thread);
  template <class Row>
  const Inputs& rows(int thread, const Inputs& shared, const Inputs& own, const Row& row);
  // Products of the same inputs by several matrices, without those that aren't there: their groups are shared out as if they
  // were one.
  struct Piece {
    const Matrix* matrix;
    float* out;  // of row 0
    int64_t stride;
  };
  void products(int thread, std::span<const Piece> pieces, const Inputs& inputs);
  void attention_products(int thread, int64_t layer, const Inputs& inputs);
  void mixed_products(int thread, int64_t layer, const Inputs& inputs);
  void norm_row(const NormWeights& norm, const float* x, float* out) const;
  void feed_forward(int thread, const LayerWeights& layer, const Inputs& inputs);
  void product(int thread, const Matrix& matrix, const Inputs& inputs, int64_t tokens, float* out, int64_t stride);
  void add_residual(const NormWeights& post_norm, int64_t row, float* x, float* spare) const;

  void turn(int64_t rotary, int64_t position, float* cos, float* sin) const;

  // pass_sums.cc
  void mix(int thread, int64_t layer);
  void sum_token(const Own& own, int64_t layer, const Part& part, int64_t kv_head);
  void sum_tokens(int64_t layer, const Part& part, int64_t kv_head);
  void prepare_sums(int64_t layer, const Part& part, int64_t kv_head);
  void finish_sums(int64_t layer, const Part& part, int64_t kv_head);
  void attend_linear(int64_t layer, const Part& part, int64_t kv_head);
  void read_evicted(int64_t layer, const Part& part, int64_t t, int64_t kv_head, float* key, float* value) const;
  void rotate_evicted_back(int64_t layer, const Part& part, int64_t t, float* key) const;
  void convolve_keys(const Own& own, int64_t layer, const Part& part, int64_t first, int64_t last, int64_t kv_head);
  void keep_recent_keys(int64_t layer, const Part& part, int64_t kv_head);
  void gather_evicted(int64_t layer, const Part& part, int64_t first, int64_t last, int64_t kv_head);
  void gather_evicted_of_steps(int thread, int64_t layer);
  void latent_logits(const Own& own, int64_t layer, const Part& part, int64_t first, int64_t last, int64_t kv_head);
  void gates_to_shares(int64_t layer, const Part& part, int64_t kv_head);
  kernels::LatentArgs latent_args(int64_t layer, const Part& part) const;
  // Logits of a row and head in query_logits_: the latents', behind the window's where tokens are read.
  static int64_t query_logits(const LayerShape& layer) { return layer.latents + (layer.tokens ? 1 : 0); }

  // pass_attention.cc
  void attend(int thread, int64_t layer);
  void read_heads(int64_t layer, int64_t row, float* out) const;
  void attend_token(int thread, int64_t layer, const Part& part);
  void attend_tokens(int thread, int64_t layer, const Part& part);
  int64_t past_rows(int64_t layer, const Part& part) const;
  void gather_past(int thread, int64_t layer, const Part& part);
  void gather_new(int thread, int64_t layer, const Part& part);
  void attend_window(int64_t layer, const Part& part, int64_t kv_head, int64_t first, int64_t last);
  void keep_new(int64_t layer, const Part& part, int64_t kv_head);
  void copy_head(const float* head, const float* norm, float* out) const;
  void copy_value(const LayerShape& layer, const float* value, int64_t row, float* out) const;
  const LayerShape& layer_shape(int64_t layer) const { return shape_.layers[static_cast<size_t>(layer)]; }

  static constexpr int64_t kBlockTokens = 64;  // whose activations stay in the second-level cache between two products

  const Model& model_;
  const ModelShape& shape_;
  ThreadPool pool_;
  const int64_t batch_tokens_;
  Arena arena_;

  std::vector<Part> parts_;
  std::vector<int32_t> tokens_;
  std::vector<int64_t> wanted_;       // rows whose logits are wanted
  std::vector<const Part*> part_of_;  // of each row
  int64_t rows_ = 0;
  bool alone_ = false;  // a single row

  float* x_ = nullptr;                 // [rows, E]: the residual stream
  float* y_ = nullptr;                 // [rows, E]: what is added to it next
  float* heads_ = nullptr;             // [rows, query | key | value | gate], see the strides
  float* hidden_ = nullptr;            // [rows, F], where the second half's inputs can't be put in columns
  float* parts_of_softmax_ = nullptr;  // [rows, threads, H, D + 2], of parts of one token
  float* query_logits_ = nullptr;      // [rows, H, L + 1], without a window [rows, H, L]
  float* key_logits_ = nullptr;        // [rows, Hkv, L]
  float* decay_ = nullptr;             // [rows, Hkv, L], of gated linear attention [rows, Hkv, D]
  float* turned_values_ = nullptr;     // [rows, Hkv, D]
  float* evicted_keys_ = nullptr;      // [rows, Hkv, Dk]: of the token that leaves the window
  float* evicted_values_ = nullptr;    // [rows, Hkv, D], with a floor D + 1
  float* out_gate_ = nullptr;          // [rows, H, D]
  float* normed_ = nullptr;            // [rows, E]: the layer's input
  float* mixed_ = nullptr;             // [rows, E]: the same behind the mixer
  float* recurrence_ = nullptr;        // [rows, E]
  float* recurrence_input_ = nullptr;  // [rows, E]
  float* final_mixer_ = nullptr;       // [K - 1, E]
  float* sums_out_ = nullptr;          // [rows, H, D], with a floor D + 1: what latents or linear attention return
  float* window_out_ = nullptr;        // [Hkv, rows, group, D], of parts of several tokens
  float* sink_queries_ = nullptr;      // [rows, H, Dk]
  float* zeros_ = nullptr;             // [D], with a floor D + 1
  float* final_latents_ = nullptr;     // [Hkv, L, D + 3], with a floor D + 4
  std::vector<Turns> turns_;           // of each rotary: of all rows
  std::vector<Turns> evicted_turns_;   // likewise, of the positions that leave the window; empty where no latents wait for them
  int64_t evicted_window_ = 0;         // the window that they leave
  std::vector<Turns> sink_turns_;      // of each layer: where queries of sinks stay
  int64_t prompts_ = 0;
  int64_t heads_stride_ = 0, key_offset_ = 0, value_offset_ = 0, gate_offset_ = 0;
  int64_t most_latents_ = 0;
  std::vector<Own> own_;
  Inputs inputs_, output_inputs_, down_inputs_;
  Buffer past_;  // keys [Hkv, past_capacity_, Dk], values alike [.., D], of a part of several tokens
  int64_t past_capacity_ = 0;
  float* past_keys_ = nullptr;
  float* past_values_ = nullptr;
  float* sink_keys_ = nullptr;    // [Hkv, S, Dk]
  float* sink_values_ = nullptr;  // [Hkv, S, D]
  std::vector<float> logits_;
  std::unique_ptr<std::atomic<int64_t>[]> next_unit_;  // [layers, parts of several tokens]
};

}  // namespace latte::runtime
