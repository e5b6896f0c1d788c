#include "data/task_data.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "data/random.h"
#include "formats/error.h"

namespace latte {
namespace {

template <typename T>
std::span<const T> values_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), static_cast<size_t>(tensor.numel())};
}

// Calls visit(span) on tokens of either width.
template <typename Visit>
void visit_tokens(const at::Tensor& tokens, const Visit& visit) {
  if (tokens.scalar_type() == at::kByte) {
    visit(values_of<uint8_t>(tokens));
  } else {
    visit(values_of<int32_t>(tokens));
  }
}

// A tensor that owns `values`.
template <typename T>
at::Tensor tensor_of(std::vector<T> values, at::ScalarType dtype) {
  auto owner = std::make_shared<std::vector<T>>(std::move(values));
  if (owner->empty()) return at::empty({0}, dtype);
  return at::from_blob(
      owner->data(), {static_cast<int64_t>(owner->size())}, [owner](void*) {}, dtype);
}

template <typename T>
void check_values(std::span<const T> values, int64_t least, int64_t most, const std::string& path, const std::string& what) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] < least || values[i] > most) {
      throw formats::FormatError(path, what + " " + std::to_string(i) + " is " + std::to_string(values[i]) + ", expected " +
                                           std::to_string(least) + " to " + std::to_string(most));
    }
  }
}

void check_target_positions(const TaskExamples& split, const std::string& path, const std::string& where) {
  const auto positions = values_of<int64_t>(split.target_positions);
  if (positions.empty()) throw formats::FormatError(path, where + "has no target");
  if (split.targets.numel() != split.target_positions.numel()) {
    throw formats::FormatError(path, where + std::to_string(split.targets.numel()) + " targets, expected " +
                                         std::to_string(positions.size()) + ", one a position");
  }
  check_values(positions, 0, split.tokens.numel() - 1, path, where + "target position");
  const auto repeated = std::adjacent_find(positions.begin(), positions.end(), std::greater_equal<>());
  if (repeated != positions.end()) {
    throw formats::FormatError(path, where + "target position " + std::to_string(repeated + 1 - positions.begin()) + " is " +
                                         std::to_string(repeated[1]) + ", expected more than " + std::to_string(repeated[0]) +
                                         ", the one before");
  }
}

void check_offsets(std::span<const int64_t> offsets, int64_t total, const std::string& path, const std::string& where) {
  if (offsets.size() < 2) throw formats::FormatError(path, where + "holds no sequence");
  if (offsets.front() != 0 || offsets.back() != total) {
    throw formats::FormatError(path, where + "offsets go from " + std::to_string(offsets.front()) + " to " +
                                         std::to_string(offsets.back()) + ", expected 0 to " + std::to_string(total) +
                                         ", the number of tokens");
  }
  for (size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] <= offsets[i - 1]) {
      throw formats::FormatError(path, where + "offset " + std::to_string(i) + " is " + std::to_string(offsets[i]) +
                                           ", expected more than " + std::to_string(offsets[i - 1]) + ", the one before");
    }
  }
}

}  // namespace

std::string_view to_string(TaskKind kind) {
  constexpr std::string_view kNames[] = {"classify", "pairs", "tokens"};
  return kNames[static_cast<size_t>(kind)];
}

int64_t TaskData::longest() const {
  int64_t longest = 0;
  for (const auto& [name, split] : splits) {
    const auto offsets = values_of<int64_t>(split.offsets);
    for (size_t i = 1; i < offsets.size(); ++i) longest = std::max(longest, offsets[i] - offsets[i - 1]);
  }
  return crop > 0 ? std::min(longest, crop) : longest;
}

std::vector<int64_t> TaskData::stretches(const TaskExamples& split, int64_t example) const {
  const auto offsets = values_of<int64_t>(split.offsets);
  const int64_t length = offsets[static_cast<size_t>(example) + 1] - offsets[static_cast<size_t>(example)];
  std::vector<int64_t> begins = {0};
  if (crop > 0 && length > crop) {
    const int64_t count = (length + crop - 1) / crop;
    for (int64_t i = 1; i < count; ++i) begins.push_back(i * (length - crop) / (count - 1));
  }
  return begins;
}

double TaskData::majority_share(const TaskExamples& split) const {
  std::vector<int64_t> counts(static_cast<size_t>(num_classes));
  const at::Tensor& answers = kind != TaskKind::kTokens ? split.labels : mask_fraction > 0 ? split.tokens : split.targets;
  visit_tokens(answers, [&](const auto& values) {
    for (const auto value : values) ++counts[static_cast<size_t>(value)];
  });
  return static_cast<double>(*std::max_element(counts.begin(), counts.end())) /
         static_cast<double>(std::max<int64_t>(answers.numel(), 1));
}

void TaskData::check(const std::string& path) const {
  if (vocab_size < 1 || num_classes < 1) {
    throw formats::FormatError(path, "vocab_size is " + std::to_string(vocab_size) + " and num_classes " +
                                         std::to_string(num_classes) + ", expected positive numbers");
  }
  for (const char* needed : {"train", "validation"}) {
    if (!splits.contains(needed)) throw formats::FormatError(path, std::string("there is no split ") + needed);
  }
  for (const auto& [name, split] : splits) {
    const std::string where = "split " + formats::quote(name) + ": ";
    check_offsets(values_of<int64_t>(split.offsets), split.tokens.numel(), path, where);
    const int64_t tokens_end = mask_fraction > 0 ? std::min(vocab_size, num_classes) : vocab_size;
    visit_tokens(split.tokens, [&](const auto& tokens) { check_values(tokens, 0, tokens_end - 1, path, where + "token"); });
    if (kind == TaskKind::kTokens) {
      if (mask_fraction > 0) continue;
      check_target_positions(split, path, where);
      check_values(values_of<int32_t>(split.targets), 0, num_classes - 1, path, where + "target");
      continue;
    }
    const int64_t parts = kind == TaskKind::kPairs ? 2 : 1;
    if (split.sequences() % parts != 0) {
      throw formats::FormatError(path, where + std::to_string(split.sequences()) + " sequences, expected pairs of them");
    }
    if (split.labels.numel() != split.sequences() / parts) {
      throw formats::FormatError(path, where + std::to_string(split.labels.numel()) + " labels, expected " +
                                           std::to_string(split.sequences() / parts) + ", one an example");
    }
    check_values(values_of<int32_t>(split.labels), 0, num_classes - 1, path, where + "label");
  }
}

TaskBatch TaskData::batch(const TaskExamples& split, std::span<const int64_t> chosen, uint64_t seed,
                          std::span<const int64_t> begins) const {
  const auto offsets = values_of<int64_t>(split.offsets);
  const int64_t parts = kind == TaskKind::kPairs ? 2 : 1;
  struct Row {
    int64_t begin, length;  // in the split's tokens
  };
  std::vector<Row> rows;
  int64_t time = 0;
  for (size_t i = 0; i < chosen.size(); ++i) {
    const int64_t example = chosen[i];
    if (example < 0 || example >= examples(split)) {
      throw std::invalid_argument("example " + std::to_string(example) + ", expected 0 to " +
                                  std::to_string(examples(split) - 1));
    }
    for (int64_t part = 0; part < parts; ++part) {
      const auto sequence = static_cast<size_t>(example * parts + part);
      Row row{offsets[sequence], offsets[sequence + 1] - offsets[sequence]};
      if (crop > 0 && row.length > crop) {
        row.begin += begins.empty() ? RandomStream(seed, static_cast<uint64_t>(example)).below(row.length - crop + 1) : begins[i];
        row.length = crop;
      }
      rows.push_back(row);
      time = std::max(time, row.length);
    }
  }
  const auto count = static_cast<int64_t>(rows.size());
  TaskBatch batch;
  batch.tokens = at::zeros({count, time}, at::kLong);
  auto padding = at::ones({count, time}, at::kBool);
  auto* tokens = batch.tokens.mutable_data_ptr<int64_t>();
  auto* padded = padding.mutable_data_ptr<bool>();
  visit_tokens(split.tokens, [&](const auto& source) {
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto length = static_cast<size_t>(rows[i].length);
      std::copy_n(source.begin() + rows[i].begin, length, tokens + i * static_cast<size_t>(time));
      std::fill_n(padded + i * static_cast<size_t>(time), length, false);
      batch.real_tokens += static_cast<int64_t>(length);
    }
  });
  if (batch.real_tokens < count * time) batch.padding = padding;
  if (kind != TaskKind::kTokens) {
    const auto labels = values_of<int32_t>(split.labels);
    batch.targets = at::empty({static_cast<int64_t>(chosen.size())}, at::kLong);
    auto* out = batch.targets.mutable_data_ptr<int64_t>();
    for (const int64_t example : chosen) *out++ = labels[static_cast<size_t>(example)];
    return batch;
  }
  batch.targets = at::full({count, time}, kNoTarget, at::kLong);
  auto* out = batch.targets.mutable_data_ptr<int64_t>();
  if (mask_fraction == 0) {
    const auto positions = values_of<int64_t>(split.target_positions);
    const auto targets = values_of<int32_t>(split.targets);
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto first = std::lower_bound(positions.begin(), positions.end(), rows[i].begin) - positions.begin();
      for (auto at = static_cast<size_t>(first); at < positions.size(); ++at) {
        const int64_t t = positions[at] - rows[i].begin;
        if (t >= rows[i].length) break;
        out[static_cast<int64_t>(i) * time + t] = targets[at];
      }
    }
    return batch;
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    RandomStream random(seed, static_cast<uint64_t>(chosen[i]));
    for (int64_t t = 0; t < rows[i].length; ++t) {
      const int64_t at = static_cast<int64_t>(i) * time + t;
      const bool asked = random.uniform() < mask_fraction;
      const double fate = random.uniform();
      if (!asked) continue;
      out[at] = tokens[at];
      if (fate < 0.8) {
        tokens[at] = vocab_size - 1;
      } else if (fate < 0.9) {
        tokens[at] = random.below(vocab_size - 1);
      }
    }
  }
  return batch;
}

void TaskBuilder::reserve(int64_t tokens) {
  if (wide_) {
    wide_tokens_.reserve(static_cast<size_t>(tokens));
  } else {
    narrow_tokens_.reserve(static_cast<size_t>(tokens));
  }
}

void TaskBuilder::add(std::span<const int32_t> tokens, int32_t label) {
  add(tokens, std::span<const int32_t>());
  labels_.push_back(label);
}

void TaskBuilder::add(std::span<const int32_t> tokens, std::span<const int32_t> targets) {
  if (wide_) {
    wide_tokens_.insert(wide_tokens_.end(), tokens.begin(), tokens.end());
  } else {
    for (const int32_t token : tokens) narrow_tokens_.push_back(static_cast<uint8_t>(token));
  }
  for (size_t i = 0; i < targets.size(); ++i) {
    if (targets[i] == kNoTarget) continue;
    target_positions_.push_back(offsets_.back() + static_cast<int64_t>(i));
    targets_.push_back(targets[i]);
  }
  offsets_.push_back(offsets_.back() + static_cast<int64_t>(tokens.size()));
}

void TaskBuilder::add_bytes(std::string_view bytes) {
  narrow_tokens_.insert(narrow_tokens_.end(), bytes.begin(), bytes.end());
  offsets_.push_back(offsets_.back() + static_cast<int64_t>(bytes.size()));
}

TaskExamples TaskBuilder::finish() {
  TaskExamples split;
  split.tokens = wide_ ? tensor_of(std::move(wide_tokens_), at::kInt) : tensor_of(std::move(narrow_tokens_), at::kByte);
  split.offsets = tensor_of(std::move(offsets_), at::kLong);
  split.labels = tensor_of(std::move(labels_), at::kInt);
  split.target_positions = tensor_of(std::move(target_positions_), at::kLong);
  split.targets = tensor_of(std::move(targets_), at::kInt);
  *this = TaskBuilder(wide_);
  return split;
}

std::vector<int64_t> EpochOrder::take(int64_t begin, int64_t count) {
  std::vector<int64_t> taken;
  taken.reserve(static_cast<size_t>(count));
  for (int64_t number = begin; number < begin + count; ++number) {
    if (const int64_t epoch = number / examples_; epoch != epoch_) {
      order_.resize(static_cast<size_t>(examples_));
      std::iota(order_.begin(), order_.end(), int64_t{0});
      RandomStream random(seed_, static_cast<uint64_t>(epoch));
      for (int64_t i = examples_ - 1; i > 0; --i) {
        std::swap(order_[static_cast<size_t>(i)], order_[static_cast<size_t>(random.below(i + 1))]);
      }
      epoch_ = epoch;
    }
    taken.push_back(order_[static_cast<size_t>(number % examples_)]);
  }
  return taken;
}

}  // namespace latte
