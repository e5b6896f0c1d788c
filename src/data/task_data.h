// Labelled sequences to train on: what every task's generator or loader makes, and batches of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace latte {

enum class TaskKind : uint8_t {
  kClassify,  // a sequence has a label
  kPairs,     // two sequences have a label: sequences 2 i and 2 i + 1 are example i
  kTokens,    // some tokens of a sequence have a target, a token
};

std::string_view to_string(TaskKind kind);  // classify | pairs | tokens

// One split. All tensors contiguous, on the CPU.
struct TaskExamples {
  at::Tensor tokens;            // uint8 or int32 [total], sequence after sequence
  at::Tensor offsets;           // int64 [sequences + 1]: where each begins in `tokens`, and the end of the last
  at::Tensor labels;            // kClassify, kPairs: int32 [examples]
  at::Tensor target_positions;  // kTokens: int64 [targets], those of `tokens` that have one, growing; empty where all have
  at::Tensor targets;           // kTokens: int32 [targets]; empty where a token is its own target

  int64_t sequences() const { return offsets.size(0) - 1; }
};

constexpr int64_t kNoTarget = -1;  // of a token, in a batch

struct TaskBatch {
  at::Tensor tokens;                  // int64 [B, T]; kPairs: [2 B, T]
  std::optional<at::Tensor> padding;  // bool [B, T], true = padding, which is at the end; none where there is none
  at::Tensor targets;                 // int64 [B], or for kTokens [B, T] with kNoTarget
  int64_t real_tokens = 0;            // without padding
};

struct TaskData {
  std::string name;
  TaskKind kind = TaskKind::kClassify;
  int64_t vocab_size = 0;
  int64_t num_classes = 0;  // of labels; for kTokens vocab_size
  // Not 0: kTokens whose targets are the tokens themselves; a batch asks for this share of them, and of these 4 in 5 become the
  // last token of the vocabulary, 1 in 10 any other and 1 in 10 stay (arXiv 1810.04805).
  double mask_fraction = 0.0;
  // kClassify: longer sequences are read in stretches of so many tokens; 0: whole.
  int64_t crop = 0;
  std::map<std::string, TaskExamples, std::less<>> splits;  // train, validation and any to test on

  int64_t examples(const TaskExamples& split) const { return split.sequences() / (kind == TaskKind::kPairs ? 2 : 1); }
  int64_t longest() const;  // sequence, in tokens, that a batch can hold
  // Of a split: the share of the most frequent label (kTokens: of all targets), what a model that has learnt nothing gets.
  double majority_share(const TaskExamples& split) const;

  // Throws formats::FormatError, in the name of `path`, for whatever doesn't fit: offsets that don't grow or leave the tokens,
  // an empty sequence, a token, label, target or target's position out of range, a split without examples or targets.
  void check(const std::string& path) const;

  // Where the stretches begin that cover an example, evenly spread, the last one at its end: {0} where it is read whole.
  std::vector<int64_t> stretches(const TaskExamples& split, int64_t example) const;

  // Throws std::invalid_argument for an example that isn't there.
  // `seed`: what is masked, and which stretch of a long sequence is read, depends on it and on the example.
  // `begins`: where each example's stretch begins, in place of that.
  TaskBatch batch(const TaskExamples& split, std::span<const int64_t> examples, uint64_t seed = 0,
                  std::span<const int64_t> begins = {}) const;
};

// Collects sequences into a split.
class TaskBuilder {
 public:
  // `wide`: tokens beyond 255.
  explicit TaskBuilder(bool wide = false) : wide_(wide) {}
  void reserve(int64_t tokens);                              // room for about so many: a large split is never held twice
  void add(std::span<const int32_t> tokens, int32_t label);  // kClassify, kPairs (each of the two)
  void add(std::span<const int32_t> tokens, std::span<const int32_t> targets);  // kTokens: one a token, or kNoTarget
  void add_bytes(std::string_view bytes);                                       // a sequence without a label
  void add_label(int32_t label) { labels_.push_back(label); }
  TaskExamples finish();

 private:
  bool wide_;
  std::vector<uint8_t> narrow_tokens_;
  std::vector<int32_t> wide_tokens_, labels_, targets_;
  std::vector<int64_t> offsets_{0}, target_positions_;
};

// Examples in the order of training: each epoch is a permutation that depends on the seed and the epoch alone, so that training
// goes on by going on with the next number.
class EpochOrder {
 public:
  EpochOrder(int64_t examples, uint64_t seed) : examples_(examples), seed_(seed) {}
  // The `count` examples from number `begin` on, over epochs.
  std::vector<int64_t> take(int64_t begin, int64_t count);

 private:
  int64_t examples_;
  uint64_t seed_;
  int64_t epoch_ = -1;
  std::vector<int64_t> order_;
};

}  // namespace latte
