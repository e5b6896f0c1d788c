#include "data/text.h"

#include <ATen/core/PhiloxRNGEngine.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string_view>

#include "formats/error.h"
#include "formats/mapped_file.h"
#include "formats/utf8.h"

namespace latte {
namespace {

std::string_view name_of(Split split) {
  return split == Split::kTrain ? "training" : split == Split::kTest ? "test" : "validation";
}

// At least as many as `text` has tokens; in UTF-8 exactly as many.
size_t count_tokens(const Vocabulary& vocabulary, std::string_view text) {
  if (vocabulary.kind() == Vocabulary::Kind::kBytes) return text.size();
  return formats::count_code_points(text);
}

template <typename Token>
std::vector<Token> encode_as(const Vocabulary& vocabulary, std::string_view text) {
  std::vector<Token> tokens;
  tokens.reserve(count_tokens(vocabulary, text));
  vocabulary.encode(text, [&](int64_t token) { tokens.push_back(static_cast<Token>(token)); });
  return tokens;
}

// A number in [0, count), each as likely as the others to one part in 2^64 / count.
int64_t draw(at::Philox4_32& engine, int64_t count) {
  const uint64_t high = engine();
  const uint64_t bits = high << 32 | engine();
  return static_cast<int64_t>(static_cast<unsigned __int128>(bits) * static_cast<uint64_t>(count) >> 64);
}

std::string too_short(Split split, int64_t size, int64_t time) {
  return std::to_string(size) + " " + std::string(name_of(split)) + " tokens, expected at least " + std::to_string(time) +
         " + 1 for a context of " + std::to_string(time);
}

}  // namespace

TextCorpus::TextCorpus(const std::string& path, const TextCorpusOptions& options) {
  if (!(options.validation_fraction >= 0 && options.validation_fraction < 1)) {
    throw std::invalid_argument("validation fraction is " + std::to_string(options.validation_fraction) +
                                ", expected 0 <= fraction < 1");
  }
  if (!(options.test_fraction >= 0 && options.validation_fraction + options.test_fraction < 1)) {
    throw std::invalid_argument("test fraction is " + std::to_string(options.test_fraction) +
                                ", expected >= 0 and less than 1 with the validation fraction");
  }
  if (options.context < 1) throw std::invalid_argument("context is " + std::to_string(options.context) + ", expected >= 1");

  if (options.kind == Vocabulary::Kind::kTokens) {
    auto& corpus = tokens_.emplace<formats::TokenCorpus>(path);
    vocabulary_ = corpus.vocabulary();
    if (options.vocabulary && !(vocabulary_ == *options.vocabulary)) {
      throw formats::FormatError(path, "its vocabulary is " + vocabulary_.description() + ", expected the model's, " +
                                           options.vocabulary->description());
    }
    size_ = corpus.size();
    divide(path, options);
    corpus.check();  // now: a token met on the way would cost the steps before it, and what --overwrite has replaced
    return;
  }
  const formats::MappedFile file(path);
  const std::string_view text = file.text();
  if (text.empty()) throw formats::FormatError(path, "the text is empty");
  try {
    if (options.vocabulary) {
      vocabulary_ = *options.vocabulary;
    } else if (options.kind == Vocabulary::Kind::kCharacters) {
      vocabulary_ = Vocabulary::characters_of(text);
    }
    if (vocabulary_.size() <= int64_t{std::numeric_limits<uint8_t>::max()} + 1) {
      tokens_ = encode_as<uint8_t>(vocabulary_, text);
    } else if (vocabulary_.size() <= int64_t{std::numeric_limits<uint16_t>::max()} + 1) {
      tokens_ = encode_as<uint16_t>(vocabulary_, text);
    } else {
      tokens_ = encode_as<int32_t>(vocabulary_, text);
    }
  } catch (const formats::TokenError& error) {
    throw formats::FormatError(path, error.what());
  }
  size_ = std::visit([](const auto& tokens) { return static_cast<int64_t>(tokens.size()); }, tokens_);
  divide(path, options);
}

void TextCorpus::divide(const std::string& path, const TextCorpusOptions& options) {
  // Each rounded alone, so that 5% and 5% of enwik8's 100,000,000 bytes leave 90,000,000.
  test_size_ = std::llround(static_cast<double>(size_) * options.test_fraction);
  train_size_ = static_cast<int64_t>(static_cast<double>(size_) * (1.0 - options.validation_fraction)) - test_size_;
  for (Split split : {Split::kTrain, Split::kValidation, Split::kTest}) {
    if (split == Split::kValidation && options.validation_fraction == 0) continue;
    if (split == Split::kTest && options.test_fraction == 0) continue;
    if (size(split) <= options.context) {
      throw formats::FormatError(path, "the text is too short: " + too_short(split, size(split), options.context));
    }
  }
}

TokenBatch TextCorpus::sample_batch(Split split, int64_t batch, int64_t time, uint64_t seed, uint64_t index) const {
  require_context(split, time);
  if (batch < 1) throw std::invalid_argument("batch is " + std::to_string(batch) + ", expected >= 1");
  at::Philox4_32 engine(seed, index);
  std::vector<int64_t> offsets(static_cast<size_t>(batch));
  for (int64_t& offset : offsets) offset = draw(engine, size(split) - time);
  return batch_at(split, offsets, time);
}

std::vector<int64_t> TextCorpus::windows(Split split, int64_t time, int64_t limit) const {
  require_context(split, time);
  if (limit < 1) throw std::invalid_argument("limit of windows is " + std::to_string(limit) + ", expected >= 1");
  const int64_t all = (size(split) - 1) / time;
  const int64_t count = std::min(all, limit);
  std::vector<int64_t> offsets(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    offsets[static_cast<size_t>(i)] = static_cast<int64_t>(static_cast<__int128>(i) * all / count) * time;
  }
  return offsets;
}

TokenBatch TextCorpus::batch_at(Split split, std::span<const int64_t> offsets, int64_t time) const {
  require_context(split, time);
  const int64_t last = size(split) - time - 1;
  for (int64_t offset : offsets) {
    if (offset < 0 || offset > last) {
      throw std::invalid_argument("offset " + std::to_string(offset) + " in the " + std::string(name_of(split)) +
                                  " tokens, expected 0 to " + std::to_string(last));
    }
  }
  const auto batch = static_cast<int64_t>(offsets.size());
  TokenBatch result = {at::empty({batch, time}, at::kLong), at::empty({batch, time}, at::kLong)};
  auto* x = result.x.mutable_data_ptr<int64_t>();
  auto* y = result.y.mutable_data_ptr<int64_t>();
  const int64_t begin = split == Split::kTrain ? 0 : split == Split::kTest ? size_ - test_size_ : train_size_;
  std::visit(
      [&](const auto& tokens) {
        for (int64_t offset : offsets) {
          if constexpr (requires { tokens.vocabulary(); }) {
            std::vector<int64_t> read(static_cast<size_t>(time + 1));
            tokens.copy(begin + offset, time + 1, read.data());
            x = std::copy_n(read.begin(), time, x);
            y = std::copy_n(read.begin() + 1, time, y);
            continue;
          } else {
            const auto* source = tokens.data() + begin + offset;
            x = std::copy_n(source, time, x);
            y = std::copy_n(source + 1, time, y);
          }
        }
      },
      tokens_);
  return result;
}

void TextCorpus::require_context(Split split, int64_t time) const {
  if (time < 1) throw std::invalid_argument("time is " + std::to_string(time) + ", expected >= 1");
  if (size(split) <= time) throw std::invalid_argument(too_short(split, size(split), time));
}

}  // namespace latte
