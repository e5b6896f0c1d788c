#include "extend/retrieval.h"

#include <algorithm>
#include <random>
#include <set>

#include "extend/evaluate.h"
#include "extend/options.h"

namespace latte::extend {
namespace {

constexpr const char* kFiller =
    "The morning was calm and the road lay empty. A dog slept beside the well. Bread was baked in the village, and smoke rose "
    "over the roofs. Nobody was in a hurry. The river went by as it always does.\n";

std::mt19937_64 random_of(uint64_t seed) {
  std::seed_seq sequence{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0x1a7e11u};
  return std::mt19937_64(sequence);
}

std::string digits(std::mt19937_64& random, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += static_cast<char>('0' + random() % 10);
  return text;
}

std::string made_up_name(std::mt19937_64& random) {
  constexpr std::string_view kConsonants = "bdfgklmnprstvz", kVowels = "aeiou";
  std::string name;
  for (int i = 0; i < 3; ++i) {
    name += kConsonants[random() % kConsonants.size()];
    name += kVowels[random() % kVowels.size()];
  }
  name[0] = static_cast<char>(name[0] - 'a' + 'A');
  return name;
}

void append(std::vector<int64_t>& tokens, const std::vector<int64_t>& more) {
  tokens.insert(tokens.end(), more.begin(), more.end());
}

// `count` tokens of filler.
std::vector<int64_t> filler(const formats::Tokenizer& tokenizer, int64_t count) {
  const auto once = tokenizer.encode(kFiller, false);
  std::vector<int64_t> tokens;
  while (static_cast<int64_t>(tokens.size()) < count) append(tokens, once);
  tokens.resize(static_cast<size_t>(count));
  return tokens;
}

// For filler, in a text that has to hold so many other tokens.
int64_t room_left(int64_t length, int64_t taken, const std::string& by) {
  if (taken <= length) return length - taken;
  throw OptionError("a task's length is " + std::to_string(length) + ", expected at least " + std::to_string(taken) +
                    ", the tokens that " + by + " with the questions take");
}

}  // namespace

RetrievalCase passkey_case(const formats::Tokenizer& tokenizer, int64_t length, double depth, uint64_t seed) {
  auto random = random_of(seed);
  const std::string key = digits(random, 5);
  const auto begin = tokenizer.encode("There is an important number hidden in a long text. Find it and keep it in mind.\n", true);
  const auto hidden = tokenizer.encode("\nThe pass key is " + key + ". Remember it: " + key + " is the pass key.\n", false);
  const auto question = tokenizer.encode("\nWhat is the pass key? The pass key is ", false);
  const auto answer = tokenizer.encode(key, false);
  const int64_t rest =
      room_left(length, static_cast<int64_t>(begin.size() + hidden.size() + question.size() + answer.size()), "a passkey");
  const auto before = static_cast<int64_t>(depth * static_cast<double>(rest));
  RetrievalCase retrieval;
  append(retrieval.tokens, begin);
  append(retrieval.tokens, filler(tokenizer, before));
  append(retrieval.tokens, hidden);
  append(retrieval.tokens, filler(tokenizer, rest - before));
  append(retrieval.tokens, question);
  retrieval.answers.emplace_back(retrieval.tokens.size(), retrieval.tokens.size() + answer.size());
  append(retrieval.tokens, answer);
  return retrieval;
}

RetrievalCase recall_case(const formats::Tokenizer& tokenizer, int64_t length, int64_t pairs, uint64_t seed) {
  auto random = random_of(seed);
  std::set<std::string> used;
  std::vector<std::pair<std::string, std::string>> entries;
  while (static_cast<int64_t>(entries.size()) < pairs) {
    std::string name = made_up_name(random);
    if (used.insert(name).second) entries.emplace_back(std::move(name), digits(random, 2));
  }
  std::string list = "A list of names and numbers.\n";
  for (const auto& [name, value] : entries) list += name + ": " + value + "\n";
  std::shuffle(entries.begin(), entries.end(), random);
  const auto begin = tokenizer.encode(list, true);
  const auto again = tokenizer.encode("\nThe same names and numbers again.\n", false);
  std::vector<int64_t> questions;
  std::vector<std::pair<int64_t, int64_t>> answers;
  for (const auto& [name, value] : entries) {
    append(questions, tokenizer.encode(name + ": ", false));
    const auto answer = tokenizer.encode(value, false);
    answers.emplace_back(questions.size(), questions.size() + answer.size());
    append(questions, answer);
    append(questions, tokenizer.encode("\n", false));
  }
  RetrievalCase retrieval;
  append(retrieval.tokens, begin);
  const int64_t rest =
      room_left(length, static_cast<int64_t>(begin.size() + again.size() + questions.size()), std::to_string(pairs) + " pairs");
  append(retrieval.tokens, filler(tokenizer, rest));
  append(retrieval.tokens, again);
  for (const auto& [from, to] : answers) {
    const auto offset = static_cast<int64_t>(retrieval.tokens.size());
    retrieval.answers.emplace_back(offset + from, offset + to);
  }
  append(retrieval.tokens, questions);
  return retrieval;
}

RetrievalScore& RetrievalScore::operator+=(const RetrievalScore& other) {
  asked += other.asked;
  right += other.right;
  right_tokens.resize(std::max(right_tokens.size(), other.right_tokens.size()));
  for (size_t i = 0; i < other.right_tokens.size(); ++i) right_tokens[i] += other.right_tokens[i];
  return *this;
}

RetrievalScore score_answers(models::Decoder& model, const RetrievalCase& retrieval) {
  const torch::NoGradGuard no_grad;
  // Hidden states of the positions before each answer's tokens.
  std::vector<int64_t> asked;
  for (const auto& [begin, end] : retrieval.answers) {
    for (int64_t i = begin; i < end; ++i) asked.push_back(i - 1);
  }
  const auto tokens = torch::tensor(at::ArrayRef<int64_t>(retrieval.tokens), torch::kLong);
  std::vector<at::Tensor> hidden;
  size_t next = 0;
  read_in_pieces(model, tokens, [&](int64_t begin, const at::Tensor& piece) {
    std::vector<int64_t> here;
    while (next < asked.size() && asked[next] < begin + piece.size(0)) here.push_back(asked[next++] - begin);
    if (!here.empty()) hidden.push_back(piece.index_select(0, torch::tensor(here, torch::kLong)));
    return true;
  });
  const auto guesses = head_of(model).logits(at::cat(hidden)).argmax(-1);
  RetrievalScore score;
  int64_t at = 0;
  for (const auto& [begin, end] : retrieval.answers) {
    RetrievalScore one{1, 1, std::vector<int64_t>(static_cast<size_t>(end - begin))};
    for (int64_t i = begin; i < end; ++i, ++at) {
      const bool right = guesses[at].item<int64_t>() == retrieval.tokens[static_cast<size_t>(i)];
      one.right_tokens[static_cast<size_t>(i - begin)] = right ? 1 : 0;
      if (!right) one.right = 0;
    }
    score += one;
  }
  return score;
}

}  // namespace latte::extend
