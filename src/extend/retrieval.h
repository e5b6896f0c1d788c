// What a model can fetch from far back: a passkey hidden in filler, and many values by their names (multi-query associative
// recall). An answer counts when the model's most likely next token is the right one at each of its tokens, as greedy decoding
// would write it.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "extend/variants.h"
#include "formats/tokenizer.h"

namespace latte::extend {

// A text of tokens in which some positions' next tokens are asked for.
struct RetrievalCase {
  std::vector<int64_t> tokens;                       // the answers are in it
  std::vector<std::pair<int64_t, int64_t>> answers;  // [begin, end) of each answer's tokens
};

// `length` tokens of filler with a five-digit key at `depth` (0: the start, 1: the end), and the question at the end. Throws
// OptionError where the key and the question alone are longer; so does recall_case.
RetrievalCase passkey_case(const formats::Tokenizer& tokenizer, int64_t length, double depth, uint64_t seed);

// `length` tokens: `pairs` names with numbers, filler, and then the names again, each to be answered.
RetrievalCase recall_case(const formats::Tokenizer& tokenizer, int64_t length, int64_t pairs, uint64_t seed);

struct RetrievalScore {
  int64_t asked = 0;                  // answers
  int64_t right = 0;                  // of them, every token of which is right
  std::vector<int64_t> right_tokens;  // right first, second … tokens of answers

  RetrievalScore& operator+=(const RetrievalScore& other);
};

struct RetrievalRow {
  AttentionKind attention = AttentionKind::kFull;
  std::string task;  // passkey | recall
  int64_t length = 0;
  double depth = 0.0;  // passkey
  int64_t pairs = 0;   // recall
  RetrievalScore score;
};

RetrievalScore score_answers(models::Decoder& model, const RetrievalCase& retrieval);

}  // namespace latte::extend
