#include "extend/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>

#include "extend/kl_loss.h"

namespace latte::extend {
namespace {

constexpr int64_t kPiece = 2048, kLeastPiece = 128;
constexpr int64_t kMostScores = int64_t{1} << 24;  // a head, of queries times keys, where torch forms them
constexpr int64_t kFirstBucket = 128;

using Clock = std::chrono::steady_clock;

int64_t bytes_of(const at::Tensor& tensor) { return tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : 0; }

int64_t bytes_of(const models::DecoderState& state) {
  int64_t total = 0;
  for (const auto& layer : state.layers) {
    total += bytes_of(layer.keys) + bytes_of(layer.values);
    if (layer.macchiato) {
      const MacchiatoState& s = *layer.macchiato;
      for (const at::Tensor* tensor : {&s.latents, &s.keys, &s.values, &s.mask, &s.sink_keys, &s.sink_values, &s.sink_mask}) {
        total += bytes_of(*tensor);
      }
    }
    for (const auto& [name, tensor] : layer.more) total += bytes_of(tensor);
  }
  return total;
}

// 0 … 128 … 256 … 512 …: 128, then doubling, up to `length`.
std::vector<Bucket> buckets_of(int64_t length) {
  std::vector<Bucket> buckets;
  for (int64_t from = 0, to = kFirstBucket; from < length; from = to, to *= 2) {
    buckets.push_back({from, std::min(to, length), 0.0, std::nullopt, std::nullopt});
  }
  return buckets;
}

// Of each block, its heads' means over all that was read so far; of a block without latents nothing.
std::vector<std::vector<double>> mean_shares(const std::vector<ConvertedAttention>& converted) {
  std::vector<std::vector<double>> shares;
  for (const auto& attention : converted) {
    auto& heads = shares.emplace_back();
    if (!attention || !attention->latents()) continue;
    const auto mean = attention->mean_shares();
    heads.assign(mean.data_ptr<double>(), mean.data_ptr<double>() + mean.numel());
  }
  return shares;
}

// Of exp(mean loss), from the spread of stretches' mean losses [windows]; of one stretch nothing is known.
std::optional<double> perplexity_error(const at::Tensor& losses) {
  if (losses.numel() < 2) return {};
  const double spread = losses.std().item<double>() / std::sqrt(static_cast<double>(losses.numel()));
  return std::exp(losses.mean().item<double>()) * spread;
}

}  // namespace

OutputHead head_of(const models::Decoder& model) {
  const auto parameters = model->named_parameters();
  const at::Tensor* output = parameters.find("output.weight");
  return {output ? *output : parameters["token_embd.weight"], model->config().logit_softcap};
}

int64_t read_in_pieces(models::Decoder& model, const at::Tensor& tokens,
                       const std::function<bool(int64_t, const at::Tensor&)>& visit) {
  const torch::NoGradGuard no_grad;
  std::optional<models::DecoderState> state;
  const bool forms_scores = model->config().attention_softcap > 0;
  const int64_t piece =
      forms_scores ? std::clamp(kMostScores / std::max<int64_t>(1, tokens.size(0)), kLeastPiece, kPiece) : kPiece;
  for (int64_t begin = 0; begin < tokens.size(0); begin += piece) {
    models::DecoderForwardOptions options;
    options.logits = models::DecoderForwardOptions::kNoLogits;
    options.state = state ? &*state : nullptr;
    options.output_state = true;
    auto result = model->forward(tokens.slice(0, begin, std::min(tokens.size(0), begin + piece)).unsqueeze(0), options);
    state = std::move(result.state);
    if (!visit(begin, result.hidden[0])) break;
  }
  return state ? bytes_of(*state) : 0;
}

TextEvaluator::TextEvaluator(const std::vector<int64_t>& tokens, models::Decoder original)
    : tokens_(torch::tensor(at::ArrayRef<int64_t>(tokens), torch::kLong)), original_(std::move(original)) {}

int64_t TextEvaluator::windows(int64_t length) const {
  return length > 0 ? std::max<int64_t>(0, tokens_.size(0) - 1) / length : 0;
}

at::Tensor TextEvaluator::original_hidden(int64_t length, int64_t window, const std::function<bool()>& goes_on) {
  if (!original_) return {};
  const int64_t begin = window * length, known = std::min(length, original_->config().context_length);
  if (const auto before = original_hidden_.find({begin, known}); before != original_hidden_.end()) return before->second;
  std::vector<at::Tensor> pieces;
  bool stopped = false;
  read_in_pieces(original_, tokens_.slice(0, begin, begin + known), [&](int64_t, const at::Tensor& piece) {
    pieces.push_back(piece);
    stopped = !goes_on();
    return !stopped;
  });
  if (stopped) return {};
  return original_hidden_[{begin, known}] = at::cat(pieces);
}

TextRow TextEvaluator::evaluate(Variant& variant, int64_t length, int64_t windows, const std::function<bool(int64_t)>& goes_on) {
  windows = std::min(windows, this->windows(length));
  if (windows <= 0) {
    throw std::invalid_argument("the text has " + std::to_string(tokens_.size(0)) + " tokens, expected at least " +
                                std::to_string(length + 1) + " for a stretch of " + std::to_string(length));
  }
  TextRow row;
  row.attention = variant.kind;
  row.length = length;
  const auto& converted = variant.model.converted;
  if (std::any_of(converted.begin(), converted.end(), [](const auto& attention) { return attention != nullptr; })) {
    row.window = variant.model.spec.window;
  }
  for (const auto& attention : converted) {
    if (attention) attention->record_shares(variant.kind == AttentionKind::kMacchiato);
  }
  const OutputHead head = head_of(variant.model.model);
  std::vector<at::Tensor> losses, kls;  // [length] each
  double seconds = 0.0;
  bool stopped = false;
  for (int64_t window = 0; window < windows && !stopped; ++window) {
    const auto original = original_hidden(length, window, [&] {
      stopped = !goes_on(window * length);
      return !stopped;
    });
    if (stopped) break;
    const auto tokens = tokens_.slice(0, window * length, (window + 1) * length);
    const auto targets = tokens_.slice(0, window * length + 1, (window + 1) * length + 1);
    std::vector<at::Tensor> next_token, kl;
    double elsewhere = 0.0;  // of the logits, which cost the same whatever the attention
    const auto start = Clock::now();
    const int64_t state_bytes = read_in_pieces(variant.model.model, tokens, [&](int64_t begin, const at::Tensor& hidden) {
      const auto pause = Clock::now();
      const int64_t end = begin + hidden.size(0);
      const int64_t known = original.defined() ? std::clamp(original.size(0), begin, end) : begin;  // the original reads so far
      if (known > begin) {
        const auto piece = token_losses(hidden.slice(0, 0, known - begin), targets.slice(0, begin, known), head,
                                        original.slice(0, begin, known));
        next_token.push_back(piece.next_token);
        kl.push_back(piece.kl);
      }
      if (end > known) {
        next_token.push_back(token_losses(hidden.slice(0, known - begin), targets.slice(0, known, end), head).next_token);
      }
      stopped = !goes_on(window * length + end);
      elsewhere += std::chrono::duration<double>(Clock::now() - pause).count();
      return !stopped;
    });
    if (stopped && at::cat(next_token).size(0) < length) break;
    ++row.windows;
    row.state_bytes = state_bytes;
    seconds += std::chrono::duration<double>(Clock::now() - start).count() - elsewhere;
    losses.push_back(at::cat(next_token));
    if (!kl.empty()) kls.push_back(at::cat(kl));
    if (variant.kind == AttentionKind::kMacchiato) row.latent_shares = mean_shares(converted);
  }
  for (const auto& attention : converted) {
    if (attention) attention->record_shares(false);
  }
  if (row.windows == 0) return row;
  row.seconds = seconds / static_cast<double>(row.windows);

  const auto all = at::stack(losses).to(torch::kFloat64);                               // [windows, length]
  const auto all_kl = kls.empty() ? at::Tensor() : at::stack(kls).to(torch::kFloat64);  // [windows, of length what is known]
  const int64_t known = all_kl.defined() ? all_kl.size(1) : 0;
  row.loss = all.mean().item<double>();
  row.perplexity = std::exp(row.loss);
  const auto each = all.mean(1);
  row.stretch_losses.assign(each.data_ptr<double>(), each.data_ptr<double>() + each.numel());
  row.standard_error = perplexity_error(each);
  if (known == length) row.kl = all_kl.mean().item<double>();
  row.buckets = buckets_of(length);
  for (Bucket& bucket : row.buckets) {
    const auto losses_there = all.slice(1, bucket.from, bucket.to).mean(1);
    bucket.loss = losses_there.mean().item<double>();
    bucket.standard_error = perplexity_error(losses_there);
    if (bucket.to <= known) bucket.kl = all_kl.slice(1, bucket.from, bucket.to).mean().item<double>();
  }
  return row;
}

LossDifference loss_difference(const TextRow& row, const TextRow& other) {
  if (row.length != other.length) {
    throw std::invalid_argument("stretches of " + std::to_string(row.length) + " and of " + std::to_string(other.length) +
                                " tokens, expected the same");
  }
  LossDifference difference;
  const size_t common = std::min(row.stretch_losses.size(), other.stretch_losses.size());
  difference.windows = static_cast<int64_t>(common);
  const auto count = static_cast<double>(common);
  for (size_t i = 0; i < common; ++i) difference.loss += (row.stretch_losses[i] - other.stretch_losses[i]) / count;
  if (common < 2) return difference;
  double squares = 0.0;
  for (size_t i = 0; i < common; ++i) {
    squares += std::pow(row.stretch_losses[i] - other.stretch_losses[i] - difference.loss, 2);
  }
  difference.standard_error = std::sqrt(squares / (count - 1.0) / count);
  return difference;
}

}  // namespace latte::extend
