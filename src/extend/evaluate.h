// How well a model reads long texts, by the kind of its attention: perplexity by length and position, KL to the original, what it
// costs.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "extend/kl_loss.h"
#include "extend/variants.h"

namespace latte::extend {

struct Bucket {
  int64_t from = 0, to = 0;              // positions
  double loss = 0.0;                     // nats a token
  std::optional<double> standard_error;  // of exp(loss), as a row's
  std::optional<double> kl;              // as a row's
};

struct TextRow {
  AttentionKind attention = AttentionKind::kFull;
  int64_t length = 0;
  int64_t window = 0;   // tokens of standard attention; 0: all of them
  int64_t windows = 0;  // stretches of that length that were read
  double loss = 0.0;    // nats a token, over all tokens of all stretches
  double perplexity = 0.0;
  std::vector<double> stretch_losses;    // of each stretch, for comparing rows stretch by stretch
  std::optional<double> standard_error;  // of the perplexity, from the spread between stretches: two or more
  std::optional<double> kl;              // of the full model to this one, nats a token; within the trained context only
  double seconds = 0.0;                  // of reading, a stretch
  int64_t state_bytes = 0;               // what is carried on after a stretch
  std::vector<Bucket> buckets;
  // Latents' share of probability, [layer][head], of tokens that have anything beyond the window; empty for layers without.
  std::vector<std::vector<double>> latent_shares;
};

// A row's loss less another's, nats a token, over the stretches that both have read: without the texts' own spread.
struct LossDifference {
  double loss = 0.0;
  std::optional<double> standard_error;  // two stretches or more
  int64_t windows = 0;
};
// Throws std::invalid_argument where the rows aren't of one length.
LossDifference loss_difference(const TextRow& row, const TextRow& other);

// Reads texts in pieces with a state between them, so that memory beyond the state's doesn't grow, but for the original's hidden
// states of what is compared with it, which are kept for the next kind of attention.
class TextEvaluator {
 public:
  // Stretches are taken from the start of `tokens`, one after the other. `original` reads what of each is within its trained
  // context, for KL; without it there is none.
  TextEvaluator(const std::vector<int64_t>& tokens, models::Decoder original);

  // How many stretches of `length` tokens, each followed by one more, the text has.
  int64_t windows(int64_t length) const;

  // Throws std::invalid_argument where windows(length) is 0. `goes_on` is told the tokens read so far; where it returns false,
  // the row is of the stretches finished by then (windows 0: none).
  TextRow evaluate(
      Variant& variant, int64_t length, int64_t windows,
      const std::function<bool(int64_t tokens)>& goes_on = [](int64_t) { return true; });

 private:
  // Of a stretch's tokens within the original's context. Undefined where there is no original, and once goes_on() returned false.
  at::Tensor original_hidden(int64_t length, int64_t window, const std::function<bool()>& goes_on);

  at::Tensor tokens_;
  models::Decoder original_{nullptr};
  std::map<std::pair<int64_t, int64_t>, at::Tensor> original_hidden_;  // by first token and number
};

// Reads `tokens` [T] in pieces and calls `visit` with each piece's first position and hidden states [n, E], until it returns
// false. Returns the bytes of the state after them.
int64_t read_in_pieces(models::Decoder& model, const at::Tensor& tokens,
                       const std::function<bool(int64_t, const at::Tensor&)>& visit);

OutputHead head_of(const models::Decoder& model);

}  // namespace latte::extend
