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

class Engine::Pass {
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
    float* gate = nullptr;        // [kBlockTokens, F]
    float* up = nullptr;          // [kBlockTokens, F]
    Inputs inputs, output_inputs, down_inputs, query_inputs, key_inputs;
  };
  // Cosines and sines [rows, rotary_dims / 2].
  struct Turns {
    float* cos = nullptr;
    float* sin = nullptr;
  };

  void start(std::span<const StepPart> parts);
  void work(int thread);
  void turn_rows(int thread);
  template <class Row>
  const Inputs& rows(int thread, const Inputs& shared, const Inputs& own, const Row& row);
  void attention_products(int thread, int64_t layer, const Inputs& inputs);
  void feed_forward(int thread, const LayerWeights& layer, const Inputs& inputs);
  void product(int thread, const Matrix& matrix, const Inputs& inputs, int64_t tokens, float* out, int64_t stride);
  void add_residual(const float* post_norm, int64_t row, float* x, float* spare) const;

  void turn(int64_t rotary, int64_t position, float* cos, float* sin) const;

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
  void latent_logits(const Own& own, int64_t layer, const Part& part, int64_t first, int64_t last, int64_t kv_head);
  void step_latents(const Own& own, int64_t layer, const Part& part, int64_t kv_head);
  void forward_latents(int64_t layer, const Part& part, int64_t kv_head);
  void gates_to_shares(int64_t layer, const Part& part, int64_t kv_head);
  kernels::LatentArgs latent_args(int64_t layer, const Part& part) const;
  void copy_head(const float* head, const float* norm, float* out) const;
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
  float* query_logits_ = nullptr;      // [rows, H, L + 1]
  float* key_logits_ = nullptr;        // [rows, Hkv, L]
  float* latent_out_ = nullptr;        // [rows, H, D]
  float* window_out_ = nullptr;        // [Hkv, rows, group, D], of parts of several tokens
  float* sink_queries_ = nullptr;      // [rows, H, Dk]
  float* zeros_ = nullptr;             // [D]
  float* final_latents_ = nullptr;     // [Hkv, L, D + 3]
  std::vector<Turns> turns_;           // of each rotary: of all rows
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
