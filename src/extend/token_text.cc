#include "extend/token_text.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>

#include "formats/error.h"
#include "formats/mapped_file.h"
#include "formats/vocabulary.h"

namespace latte::extend {

std::vector<int64_t> read_tokens(const std::string& path, const formats::Tokenizer& tokenizer) {
  const formats::MappedFile file(path);
  try {
    return tokenizer.encode(file.text());
  } catch (const formats::TokenError& error) {
    throw formats::FormatError(path, error.what());
  }
}

TokenText::TokenText(const std::vector<std::string>& paths, const formats::Tokenizer& tokenizer, double held_out_fraction,
                     int64_t context)
    : context_(context) {
  std::string sizes;
  for (const std::string& path : paths) {
    const std::vector<int64_t> tokens = read_tokens(path, tokenizer);
    const auto all = torch::tensor(at::ArrayRef<int64_t>(tokens), torch::kLong).to(torch::kInt);
    const auto size = static_cast<int64_t>(tokens.size());
    const auto cut = size - static_cast<int64_t>(std::floor(static_cast<double>(size) * held_out_fraction));
    const auto add = [&](std::vector<Part>& parts, int64_t& starts, int64_t begin, int64_t end) {
      if (end - begin <= context) return;
      parts.push_back({all.slice(0, begin, end), end - begin - context});
      starts += end - begin - context;
    };
    add(train_, train_starts_, 0, cut);
    add(held_out_, held_out_starts_, cut, size);
    train_tokens_ += cut;
    held_out_tokens_ += size - cut;
    sizes += (sizes.empty() ? "" : ", ") + path + " has " + std::to_string(cut);
  }
  if (train_.empty()) {
    throw formats::FormatError("text", "none has " + std::to_string(context + 1) +
                                           " tokens to train on, a context and one more (" + sizes +
                                           "): a shorter context or more text");
  }
}

at::Tensor TokenText::stretch(const std::vector<Part>& parts, int64_t start, int64_t length) {
  for (const Part& part : parts) {
    if (start < part.starts) return part.tokens.slice(0, start, start + length).to(torch::kLong);
    start -= part.starts;
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor TokenText::sample(int64_t batch, int64_t length, uint64_t seed, uint64_t index) const {
  TORCH_INTERNAL_ASSERT(length <= context_);
  std::seed_seq sequence{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(index),
                         static_cast<uint32_t>(index >> 32)};
  std::mt19937_64 random(sequence);
  std::vector<at::Tensor> rows;
  for (int64_t i = 0; i < batch; ++i) {
    // Not uniform_int_distribution, whose numbers differ between standard libraries; the bias is below 2^-40.
    rows.push_back(stretch(train_, static_cast<int64_t>(random() % static_cast<uint64_t>(train_starts_)), length + 1));
  }
  return at::stack(rows);
}

at::Tensor TokenText::held_out(int64_t count) const {
  std::vector<at::Tensor> rows;
  const int64_t fitting = std::min(count, (held_out_starts_ + context_) / (context_ + 1));
  for (int64_t i = 0; i < fitting; ++i) rows.push_back(stretch(held_out_, held_out_starts_ * i / fitting, context_ + 1));
  return rows.empty() ? torch::empty({0, context_ + 1}, torch::kLong) : at::stack(rows);
}

}  // namespace latte::extend
