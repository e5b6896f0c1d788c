#include "extend/match.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "extend/latent_start.h"
#include "train/optimizer.h"

namespace latte::extend {
namespace {

// Higher than through the whole model: these losses have little noise.
constexpr double kMatrixRate = 8e-3, kGateRate = 4e-3, kVectorRate = 4e-2;
constexpr int64_t kWarmup = 5;
constexpr int64_t kSamplesASequence = 200;
constexpr int64_t kKeyStride = 16;
constexpr int64_t kFewestFar = 20;         // tokens that say how far a gate must open, and
constexpr int64_t kSparsestFar = 500;      // of how many one at least must
constexpr int64_t kPositionsAtOnce = 512;  // of softmax attention's probabilities, which take their number times the length

// One layer's activations for one sequence, [1, T, …] each.
struct Activations {
  at::Tensor x;    // the attention's input, normed
  at::Tensor out;  // the attention's output, projected
};

// Another attention, which leaves behind what went in and came out.
class RecordingAttention : public models::DecoderAttentionImpl {
 public:
  RecordingAttention(models::DecoderAttention inner, Activations& into) : inner_(std::move(inner)), into_(into) {}
  models::DecoderAttentionResult forward(const at::Tensor& x, const models::AttentionWeights& weights,
                                         const models::DecoderAttentionOptions& options) override {
    auto result = inner_->forward(x, weights, options);
    into_ = {x, result.out};
    return result;
  }

 private:
  models::DecoderAttention inner_;
  Activations& into_;
};

// Tokens of which something lies beyond window and sinks, at random, rising.
at::Tensor sample_positions(int64_t time, const FarOptions& far, int64_t count) {
  const int64_t first = std::min(time - 1, far.window + far.sinks);
  const auto order = torch::randperm(time - first, torch::kLong).slice(0, 0, count);
  return std::get<0>(order.sort()) + first;
}

// Sequences read and steps taken, of all that there are.
class Progress {
 public:
  Progress(const MatchWatch& watch, int64_t total) : watch_(watch), total_(total) {}
  bool goes_on() const { return goes_on_; }
  void step() { goes_on_ = watch_.progress(++done_, total_) && goes_on_; }
  void report(const MatchResult& result) { goes_on_ = watch_.layer(result) && goes_on_; }

 private:
  const MatchWatch& watch_;
  int64_t done_ = 0, total_;
  bool goes_on_ = true;
};

// Some key-value heads of a layer with their queries, or all of them: an attention of their own, whose latents put() takes to the
// layer's.
class MatchedHeads {
 public:
  MatchedHeads(const models::Decoder& model, int64_t layer, ConvertedAttention whole, const std::vector<int64_t>& kv_heads)
      : whole_(std::move(whole)), attention_(whole_) {
    if (kv_heads.empty()) return;
    const LatentSizes& sizes = whole_->latents()->sizes();
    const int64_t group = sizes.num_heads / sizes.num_kv_heads;
    kv_heads_ = torch::tensor(at::ArrayRef<int64_t>(kv_heads), torch::kLong);
    heads_ = (kv_heads_.unsqueeze(1) * group + torch::arange(group, torch::kLong)).flatten();
    formats::DecoderConfig config = model->config();
    LatentSizes of_these = sizes;
    of_these.num_heads = config.num_heads = heads_.size(0);
    of_these.num_kv_heads = config.num_kv_heads = kv_heads_.size(0);
    attention_ = std::make_shared<ConvertedAttentionImpl>(config, model->rope(layer), whole_->far(), LatentLogits(of_these));
  }

  const ConvertedAttention& attention() const { return attention_; }
  at::Tensor numbers() const {  // int64 [H]
    return all() ? torch::arange(whole_->latents()->sizes().num_heads, torch::kLong) : heads_;
  }
  bool all() const { return !heads_.defined(); }
  // Those of a tensor whose dimension `dim` is heads of queries, or of keys and values.
  at::Tensor of_queries(const at::Tensor& x, int64_t dim) const { return all() ? x : x.index_select(dim, heads_); }
  at::Tensor of_keys(const at::Tensor& x, int64_t dim) const { return all() ? x : x.index_select(dim, kv_heads_); }

  void put() const {
    if (all()) return;
    const torch::NoGradGuard no_grad;
    const auto from = attention_->latents()->named_tensors();
    auto to = whole_->latents()->named_tensors();
    for (size_t i = 0; i < to.size(); ++i) {
      const bool of_queries =
          from[i].second.size(0) == heads_.size(0) && to[i].second.size(0) == whole_->latents()->sizes().num_heads;
      to[i].second.index_copy_(0, of_queries ? heads_ : kv_heads_, from[i].second);
    }
  }

 private:
  ConvertedAttention whole_, attention_;
  at::Tensor heads_, kv_heads_;  // numbers in the layer; undefined: all
};

class LayerMatcher {
 public:
  LayerMatcher(models::Decoder& model, int64_t layer, const ConvertedAttention& converted, std::vector<Activations> sequences,
               const ExtendOptions& options, Progress& progress)
      : model_(model),
        layer_(layer),
        matched_(model, layer, converted, options.matched_heads(layer)),
        converted_(matched_.attention()),
        sequences_(std::move(sequences)),
        options_(options),
        progress_(progress) {
    const torch::NoGradGuard no_grad;  // a student's weights train later
    const auto& weights = model->layer(layer).attention_weights();
    const auto& config = model->config();
    const auto whole = weights.output->weight.detach().to(torch::kFloat32).unflatten(1, {config.num_heads, config.head_dim});
    output_weight_ = matched_.of_queries(whole, 1).flatten(1);
    for (Activations& sequence : sequences_) {
      const auto heads = weights.project(sequence.x, config.head_dim);
      heads_.push_back({matched_.of_queries(heads.query, 2).to(torch::kFloat32),
                        matched_.of_keys(heads.key, 2).to(torch::kFloat32),
                        matched_.of_keys(heads.value, 2).to(torch::kFloat32)});
      sequence.x = sequence.x.to(torch::kFloat32);
      sequence.out = matched_.all() ? sequence.out.to(torch::kFloat32)
                                    : at::linear(softmax_attention(heads_.size() - 1).flatten(2), output_weight_);
    }
    if (options.match_share > 0) weigh();
  }

  MatchResult run() {
    MatchResult result;
    result.layer = layer_;
    torch::manual_seed(static_cast<uint64_t>(options_.seed + layer_));  // whichever layers came before it in this call
    start(result);
    converted_->set_latents_off(true);
    result.window_error = error();
    converted_->set_latents_off(false);
    fit();
    if (!progress_.goes_on()) return result;
    if (options_.match_open > 0) open_gates();
    result.error = error();
    matched_.put();
    return result;
  }

 private:
  const FarOptions& far() const { return converted_->far(); }

  // Softmax attention's output, [1, T, H, Dk].
  at::Tensor softmax_attention(size_t i) {
    const auto& rope = *model_->rope(layer_);
    const auto positions = torch::arange(heads_[i].query.size(1), torch::kLong);
    const auto per_head = [](const at::Tensor& x, int64_t times) { return x.transpose(1, 2).repeat_interleave(times, 1); };
    const int64_t group = group_of(i);
    const auto out = at::scaled_dot_product_attention(
        per_head(rope.rotate(heads_[i].query, positions), 1), per_head(rope.rotate(heads_[i].key, positions), group),
        per_head(heads_[i].value, group), {}, 0.0, /*is_causal=*/true, model_->config().attention_scale);
    return out.transpose(1, 2);
  }

  // What softmax attention reads far, [T - first, H], of every token that has anything there.
  at::Tensor shares_of(size_t i) {
    const auto& rope = *model_->rope(layer_);
    const int64_t time = sequences_[i].x.size(1);
    const auto positions = torch::arange(time, torch::kLong);
    const auto query = rope.rotate(heads_[i].query, positions), key = rope.rotate(heads_[i].key, positions);
    std::vector<at::Tensor> shares;
    for (int64_t begin = first_far(i); begin < time; begin += kPositionsAtOnce) {
      const auto some = positions.slice(0, begin, std::min(time, begin + kPositionsAtOnce));
      shares.push_back(far_shares(query[0], key[0], some, model_->config().attention_scale, far()));
    }
    return at::cat(shares);
  }

  // Of these tokens each head's weight, and what softmax attention gives it.
  void weigh() {
    for (size_t i = 0; i < sequences_.size(); ++i) {
      weights_.push_back(1.0 - options_.match_share + options_.match_share * shares_of(i));
      wanted_.push_back(softmax_attention(i)[0].slice(0, first_far(i)).clone());  // [T - first, H, Dk]
      norms_.push_back(std::max(weighted_square(wanted_[i], i).item<double>(), 1e-30));
    }
  }

  // Lowers gates: options.match_open.
  void open_gates() {
    const torch::NoGradGuard no_grad;
    auto& latents = *converted_->latents();
    std::vector<at::Tensor> shares, leads;  // of the gate over what latents give, in nats
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const auto inputs = latents.forward(sequences_[i].x, heads_[i].query, heads_[i].key, 0, far());
      const auto logits = inputs.query_logits[0].slice(0, first_far(i));  // [T - first, H, 1 + L]
      at::Tensor given = logits.slice(-1, 1);
      if (inputs.floor) given = given + log_kept(inputs).slice(0, first_far(i)).repeat_interleave(group_of(i), 1);
      leads.push_back(logits.select(-1, 0) - given.logsumexp(-1));
      shares.push_back(shares_of(i));
    }
    const auto share = at::cat(shares), lead = at::cat(leads);
    for (int64_t h = 0; h < share.size(1); ++h) {
      const auto there = lead.select(1, h).masked_select(share.select(1, h) > 0.5);
      if (there.size(0) < std::max(kFewestFar, share.size(0) / kSparsestFar)) continue;  // a head that doesn't look far
      const double excess =
          std::get<0>(there.sort())[static_cast<int64_t>(options_.match_open * static_cast<double>(there.size(0) - 1))]
              .item<double>();
      if (std::isfinite(excess) && excess > 0) latents.gate_bias[h] -= excess;
    }
  }

  int64_t group_of(size_t i) const { return heads_[i].query.size(2) / heads_[i].key.size(2); }

  // ln of what latents keep of their shares, ln(z / (z + exp floor)): [T, Hkv, L].
  at::Tensor log_kept(const LatentInputs& inputs) const {
    const auto& logits = inputs.key_logits[0];
    const int64_t read = std::max<int64_t>(0, logits.size(0) - far().window);
    const int64_t sinks = std::min(far().sinks, read);
    const auto unread = at::full_like(logits.slice(0, 0, logits.size(0) - read + sinks), -INFINITY);
    const auto z = at::logcumsumexp(at::cat({unread, logits.slice(0, sinks, read)}), 0);
    return z - at::logaddexp(z, *inputs.floor);
  }

  int64_t first_far(size_t i) const { return std::min(sequences_[i].x.size(1) - 1, far().window + far().sinks); }

  // What fit() minimises, in relation to what is wanted.
  at::Tensor loss(size_t i) {
    if (weights_.empty()) {
      const auto [squared, norm] = squared_error(i);
      return squared / std::max(norm, 1e-30);
    }
    const auto out = converted_->mix(sequences_[i].x, heads_[i], {})[0];
    return weighted_square(out.slice(0, out.size(0) - wanted_[i].size(0)) - wanted_[i], i) / norms_[i];
  }

  // Of what heads [N, H, Dk] add to the output, each by itself.
  at::Tensor weighted_square(const at::Tensor& heads, size_t i) const {
    const auto each = output_weight_.unflatten(1, {heads.size(1), heads.size(2)}).permute({1, 2, 0});  // [H, Dk, E]
    return (at::matmul(heads.transpose(0, 1), each).square().sum(-1) * weights_[i].t()).sum();
  }

  void start(MatchResult& result) {
    const auto& rope = *model_->rope(layer_);
    std::vector<at::Tensor> x, query, share, count, key;
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const int64_t time = sequences_[i].x.size(1);
      const auto positions = torch::arange(time, torch::kLong);
      const auto chosen = sample_positions(time, far(), kSamplesASequence);
      const auto rotated_query = rope.rotate(heads_[i].query, positions), rotated_key = rope.rotate(heads_[i].key, positions);
      share.push_back(far_shares(rotated_query[0], rotated_key[0], chosen, model_->config().attention_scale, far()));
      x.push_back(sequences_[i].x[0].index_select(0, chosen));
      query.push_back(heads_[i].query[0].index_select(0, chosen));
      count.push_back((chosen + 1 - far().window - far().sinks).clamp(0, far().far_limit));
      const int64_t first_read = far().evicted ? std::min(far().sinks, time - 1) : 0;
      key.push_back(heads_[i].key[0].slice(0, first_read, time, kKeyStride));
    }
    const LayerSamples samples{at::cat(x), at::cat(query), at::cat(share), at::cat(count), at::cat(key)};
    const auto shares = samples.far_share.to(torch::kFloat64).mean(0).contiguous();
    result.far_share = shares.mean().item<double>();
    result.far_shares.assign(shares.data_ptr<double>(), shares.data_ptr<double>() + shares.numel());
    const auto numbers = matched_.numbers().contiguous();
    result.heads.assign(numbers.data_ptr<int64_t>(), numbers.data_ptr<int64_t>() + numbers.numel());
    start_latents(converted_->latents(), samples, rope, model_->config().attention_scale, static_cast<uint64_t>(options_.seed),
                  options_.form_anew());
  }

  // ‖student − softmax‖² and ‖softmax‖² over the tokens that have anything far.
  std::pair<at::Tensor, double> squared_error(size_t i) {
    const int64_t first = first_far(i);
    const auto out = converted_->mix(sequences_[i].x, heads_[i], {});
    const auto wanted = sequences_[i].out.slice(1, first);
    const auto got = at::linear(out.slice(1, first).flatten(2), output_weight_);
    return {(got - wanted).square().sum(), wanted.square().sum().item<double>()};
  }

  double error() {
    const torch::NoGradGuard no_grad;
    double error = 0.0, whole = 0.0;
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const auto [squared, norm] = squared_error(i);
      error += squared.item<double>();
      whole += norm;
    }
    return error / std::max(whole, 1e-30);
  }

  void fit() {
    auto& latents = *converted_->latents();
    train::AdamW::NamedTensors matrices = {{"query", latents.query_weight}, {"key", latents.key_weight}};
    const LatentForm form = options_.form_anew();
    if (form.conv) matrices.emplace_back("conv", latents.conv_weight);
    train::AdamW::NamedTensors vectors = {{"query_bias", latents.query_bias},
                                          {"key_bias", latents.key_bias},
                                          {"gate_bias", latents.gate_bias},
                                          {"gate_slope", latents.gate_slope}};
    if (form.decay) vectors.emplace_back("decay", latents.decay);
    if (form.floor) vectors.emplace_back("floor", latents.floor);
    const train::AdamWOptions plain{.beta1 = 0.9, .beta2 = 0.95, .weight_decay = 0.0};
    train::AdamW matrix_optimizer(matrices, plain), vector_optimizer(vectors, plain);
    train::AdamW gate_optimizer({{"gate", latents.gate_weight}}, {.beta1 = 0.9, .beta2 = 0.95, .weight_decay = 1.0});
    const auto windows = options_.training_windows();
    const int64_t used = far().window;
    for (int64_t step = 0; step < options_.match_steps && progress_.goes_on(); ++step) {
      // The window in use counts most: every other step, and the last third.
      const bool vary = step % 2 == 1 && step * 3 < options_.match_steps * 2;
      converted_->set_window(vary ? windows[static_cast<size_t>(step / 2) % windows.size()] : used);
      loss(static_cast<size_t>(step) % sequences_.size()).backward();
      const double factor = std::min(1.0, static_cast<double>(step + 1) / static_cast<double>(kWarmup)) *
                            (1.0 - static_cast<double>(step) / static_cast<double>(options_.match_steps));
      matrix_optimizer.step(kMatrixRate * factor, step + 1);
      vector_optimizer.step(kVectorRate * factor, step + 1);
      gate_optimizer.step(kGateRate * factor, step + 1);
      for (train::AdamW* optimizer : {&matrix_optimizer, &vector_optimizer, &gate_optimizer}) optimizer->zero_grad();
      progress_.step();
    }
    converted_->set_window(used);
  }

  models::Decoder& model_;
  int64_t layer_;
  MatchedHeads matched_;
  ConvertedAttention converted_;  // of the matched heads
  std::vector<Activations> sequences_;
  std::vector<models::AttentionWeights::Heads> heads_;
  at::Tensor output_weight_;
  std::vector<at::Tensor> weights_, wanted_;  // with options.match_share, as norms_
  std::vector<double> norms_;
  const ExtendOptions& options_;
  Progress& progress_;
};

// What `attention` makes of every sequence in layer `index`, in `hidden`'s place; what went in and came out of it, if asked for.
void advance(models::Decoder& model, int64_t index, const models::DecoderAttention& attention, std::vector<at::Tensor>& hidden,
             std::vector<Activations>* activations, bool keep, Progress& progress) {
  const torch::NoGradGuard no_grad;
  Activations seen;
  const auto before = model->layer(index).attention();
  model->set_attention(index, std::make_shared<RecordingAttention>(attention, seen));
  for (at::Tensor& x : hidden) {
    if (!progress.goes_on()) break;
    const auto attended = model->layer(index).attend(x);
    if (activations) activations->push_back(seen);
    if (keep) x = model->layer(index).finish(x, attended.out);
    progress.step();
  }
  model->set_attention(index, before);
}

bool is_matched(const std::vector<ConvertedAttention>& converted, int64_t layer, const ExtendOptions& options) {
  const ConvertedAttention& attention = converted[static_cast<size_t>(layer)];
  return attention && attention->latents() && options.matches(layer);
}

std::vector<at::Tensor> embedded(models::Decoder& model, const std::vector<at::Tensor>& sequences) {
  const torch::NoGradGuard no_grad;
  std::vector<at::Tensor> hidden;
  for (const at::Tensor& tokens : sequences) hidden.push_back(model->embed(tokens.unsqueeze(0)));
  return hidden;
}

}  // namespace

void match_latents(models::Decoder& original, const std::vector<ConvertedAttention>& converted,
                   const std::vector<at::Tensor>& sequences, const ExtendOptions& options, const MatchWatch& watch,
                   int64_t first) {
  auto hidden = embedded(original, sequences);
  const auto matched = [&](int64_t i) { return i >= first && is_matched(converted, i, options); };
  int64_t layers = 0, count = 0;  // what follows the last one has nothing to read
  for (int64_t i = 0; i < original->config().num_layers; ++i) {
    if (!matched(i)) continue;
    layers = i + 1;
    ++count;
  }
  Progress progress(watch, layers * static_cast<int64_t>(sequences.size()) + count * options.match_steps);
  for (int64_t i = 0; i < layers && progress.goes_on(); ++i) {
    std::vector<Activations> activations;
    advance(original, i, original->layer(i).attention(), hidden, matched(i) ? &activations : nullptr, /*keep=*/true, progress);
    if (!matched(i) || !progress.goes_on()) continue;
    const auto result =
        LayerMatcher(original, i, converted[static_cast<size_t>(i)], std::move(activations), options, progress).run();
    if (progress.goes_on()) progress.report(result);
  }
}

void rematch_latents(models::Decoder& student, models::Decoder& original, const std::vector<ConvertedAttention>& converted,
                     const std::vector<at::Tensor>& sequences, const ExtendOptions& options, const MatchWatch& watch,
                     int64_t first) {
  const auto matched = [&](int64_t i) { return i >= first && is_matched(converted, i, options); };
  int64_t layers = 0, count = 0;  // what follows the last one has nothing to read
  for (int64_t i = 0; i < student->config().num_layers; ++i) {
    if (!matched(i)) continue;
    layers = i + 1;
    ++count;
  }
  auto hidden = embedded(student, sequences);
  Progress progress(
      watch, (std::max<int64_t>(0, layers - 1) + count) * static_cast<int64_t>(sequences.size()) + count * options.match_steps);
  for (int64_t i = 0; i < layers && progress.goes_on(); ++i) {
    if (matched(i)) {
      std::vector<Activations> activations;
      advance(student, i, original->layer(i).attention(), hidden, &activations, /*keep=*/false, progress);
      if (!progress.goes_on()) return;
      const auto result =
          LayerMatcher(student, i, converted[static_cast<size_t>(i)], std::move(activations), options, progress).run();
      if (progress.goes_on()) progress.report(result);
    }
    if (i + 1 < layers) advance(student, i, student->layer(i).attention(), hidden, nullptr, /*keep=*/true, progress);
  }
}

}  // namespace latte::extend
