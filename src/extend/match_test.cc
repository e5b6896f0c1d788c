// The first stage: latents that are fitted to what softmax attention reads.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "extend/converted_model.h"
#include "extend/test_extend.h"
#include "formats/error.h"
#include "nn/test_close.h"

namespace latte::extend {
namespace {

using formats::error_text;
using formats::FormatError;
using nn::close;

class MatchTest : public ExtendTest {};

TEST_F(MatchTest, MatchingLowersTheError) {
  options_.match_steps = 40;
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  std::vector<MatchResult> layers;
  std::vector<int64_t> done;
  trainer.match({.layer = [&](const MatchResult& result) { return layers.push_back(result), true; },
                 .progress =
                     [&](int64_t step, int64_t total) {
                       EXPECT_EQ(total, 2 * (2 + 40));
                       return done.push_back(step), true;
                     }});
  EXPECT_EQ(done.size(), 84U);
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()) && done.back() == 84);
  ASSERT_EQ(layers.size(), 2U);
  for (const MatchResult& layer : layers) {
    EXPECT_GT(layer.far_share, 0.3);
    ASSERT_EQ(layer.far_shares.size(), 4U);
    EXPECT_EQ(layer.heads, (std::vector<int64_t>{0, 1, 2, 3}));
    EXPECT_NEAR(std::accumulate(layer.far_shares.begin(), layer.far_shares.end(), 0.0) / 4, layer.far_share, 1e-6);
    EXPECT_LT(layer.error, 0.6 * layer.window_error) << "layer " << layer.layer;
  }
}

TEST_F(MatchTest, GoesOnBehindTheLayersThatWereMatched) {
  run_extend(options_, run());
  for (const bool anew : {false, true}) {
    options_.from = anew ? run().out : "";
    options_.match_layers = anew ? "0-1" : "";
    const TokenText text = this->text();
    ExtendTrainer whole(options_, text), half(options_, text), other(options_, text);
    whole.match({});
    half.match({.layer = [](const MatchResult&) { return false; }});
    half.save(folder_ / "half.safetensors", "{}");
    other.load(formats::CheckpointFile(folder_ / "half.safetensors"));
    std::vector<int64_t> layers;
    other.match({.layer = [&](const MatchResult& result) { return layers.push_back(result.layer), true; }}, 1);
    EXPECT_EQ(layers, std::vector<int64_t>{1});
    auto expected = copies_of(whole), got = copies_of(other);
    for (const auto& [name, tensor] : expected) EXPECT_TRUE(got[name].equal(tensor)) << name;
  }
}

TEST_F(MatchTest, MatchesSomeLayersOfAnAdapterAnew) {
  run_extend(options_, run());
  options_.from = run().out;
  options_.match_layers = "1";
  options_.match_steps = 40;
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  auto before = copies_of(trainer);
  std::vector<MatchResult> layers;
  trainer.match({.layer = [&](const MatchResult& result) { return layers.push_back(result), true; }});
  ASSERT_EQ(layers.size(), 1U);
  EXPECT_EQ(layers[0].layer, 1);
  EXPECT_LT(layers[0].error, 0.6 * layers[0].window_error);
  for (const auto& item : trainer.student().model->named_parameters()) {
    const bool anew = item.key().starts_with("blk.1.") && item.key().find("latents") != std::string::npos;
    EXPECT_EQ(item.value().equal(before[item.key()]), !anew) << item.key();
  }
  for (const auto& item : trainer.student().model->named_parameters()) {
    if (item.key().find("latents") != std::string::npos) continue;
    EXPECT_FALSE(item.value().grad().defined()) << item.key();  // nothing of the matching is left in what trains
  }
  trainer.step();

  options_.match_layers = "1-2";
  EXPECT_CONTAINS(error_text<OptionError>([&] { ExtendTrainer(options_, text); }), "blocks in 0 … 1");
  options_.match_layers = "0:x";
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "FIRST-LAST or BLOCK");
}

TEST_F(MatchTest, LayersMadeAnewMayHaveAFloor) {
  run_extend(options_, run());
  options_.from = run().out;
  options_.match_layers = "1";
  options_.floor = true;
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  const auto latents_of = [&](size_t block) { return trainer.student().converted[block]->latents(); };
  EXPECT_TRUE(latents_of(0)->decay.defined() && !latents_of(0)->floor.defined());
  EXPECT_TRUE(!latents_of(1)->decay.defined() && latents_of(1)->floor.defined());
  std::vector<MatchResult> layers;
  trainer.match({.layer = [&](const MatchResult& result) { return layers.push_back(result), true; }});
  ASSERT_EQ(layers.size(), 1U);
  EXPECT_LT(layers[0].error, 0.7 * layers[0].window_error);
  const auto matched = latents_of(1)->floor.detach().clone();
  trainer.step();
  EXPECT_FALSE(latents_of(1)->floor.equal(matched));

  const std::string path = folder_ / "floor.gguf";
  formats::write_adapter(path, trainer.spec(), formats::GgufFile(options_.model), trainer.adapter_tensors().tensors());
  const auto loaded = load_converted(options_.model, path, torch::kFloat32);
  EXPECT_TRUE(loaded.converted[1]->latents()->floor.equal(latents_of(1)->floor));
  options_.from = path;
  options_.match_layers.clear();
  options_.floor = false;  // of what isn't made anew the adapter tells
  ExtendTrainer again(options_, text);
  EXPECT_TRUE(again.student().converted[1]->latents()->floor.equal(latents_of(1)->floor));
  options_.floor = true;
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "match_layers");
  options_.match_layers = "1";
  options_.match_sequences = 0;
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "match_sequences");
  options_.match_sequences = 2;
  options_.validate();
  options_.evicted = false;
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "what left the window");
}

TEST_F(MatchTest, LatentsMayLookForSeveralTokensInARow) {
  options_.position = "conv";
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  const auto& weight = trainer.student().converted[1]->latents()->conv_weight;
  ASSERT_TRUE(weight.defined());
  trainer.match({});
  const auto matched = weight.detach().clone();
  EXPECT_FALSE(matched.select(-1, 0).eq(0).any().item<bool>());  // began as nothing but the key itself
  trainer.step();
  EXPECT_FALSE(weight.equal(matched));

  const std::string path = folder_ / "conv.gguf";
  formats::write_adapter(path, trainer.spec(), formats::GgufFile(options_.model), trainer.adapter_tensors().tensors());
  auto loaded = load_converted(options_.model, path, torch::kFloat32);
  const auto tokens = torch::tensor(some_tokens(60)).unsqueeze(0);
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(close(loaded.model->forward(tokens).logits, trainer.student().model->forward(tokens).logits, 1e-6));
  options_.evicted = false;
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "what left the window");
  options_.from = path;
  options_.position = "none";
  EXPECT_CONTAINS(error_text<OptionError>([&] { ExtendTrainer(options_, text); }), "--latents-read-all");
  options_.evicted = true;
  options_.forget = false;
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "match_layers");
  options_.forget = true;
  options_.position = "conv";
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "match_layers");
  options_.from.clear();
  options_.position = "vapor";
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "one of none, conv");
}

TEST_F(MatchTest, SomeHeadsOfALayerMayBeMadeAnew) {
  run_extend(options_, run());
  const TokenText text = this->text();
  options_.match_layers = "1:0";
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "go with `from`");
  options_.from = run().out;
  options_.floor = true;
  ExtendTrainer trainer(options_, text);
  const auto tensors = [&] { return trainer.student().converted[1]->latents()->named_tensors(); };
  std::map<std::string, at::Tensor> before;
  for (const auto& [name, tensor] : tensors()) before[name] = tensor.detach().clone();
  std::vector<MatchResult> layers;
  trainer.match({.layer = [&](const MatchResult& result) { return layers.push_back(result), true; }});
  ASSERT_EQ(layers.size(), 1U);
  EXPECT_LT(layers[0].error, layers[0].window_error);
  for (const auto& [name, tensor] : tensors()) {
    const auto now = tensor.chunk(2), then = before[name].chunk(2);  // two key-value heads, with their queries
    EXPECT_FALSE(now[0].equal(then[0])) << name;
    EXPECT_TRUE(now[1].equal(then[1])) << name;
  }
  const auto& latents = trainer.student().converted[1]->latents();
  EXPECT_TRUE(latents->decay[0].eq(-1e4).all().item<bool>());  // a floor, and no forgetting
  EXPECT_TRUE(latents->floor[0].gt(-100).all().item<bool>());
  EXPECT_TRUE(latents->floor[1].eq(-1e4).all().item<bool>());
  EXPECT_TRUE(latents->decay[1].gt(-100).all().item<bool>());

  const std::string path = folder_ / "floor.gguf";
  formats::write_adapter(path, trainer.spec(), formats::GgufFile(options_.model), trainer.adapter_tensors().tensors());
  auto loaded = load_converted(options_.model, path, torch::kFloat32);
  const auto tokens = torch::tensor(some_tokens(60)).unsqueeze(0);
  {
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(close(loaded.model->forward(tokens).logits, trainer.student().model->forward(tokens).logits, 1e-6));
  }
  trainer.step();  // what is none stays none
  EXPECT_TRUE(latents->decay[0].eq(-1e4).all().item<bool>());
  EXPECT_TRUE(latents->floor[1].eq(-1e4).all().item<bool>());

  options_.match_layers = "0:1,1:0,0:1";
  EXPECT_EQ(options_.matched_heads(0), std::vector<int64_t>{1});  // once
  options_.match_layers = "1:2";
  EXPECT_CONTAINS(error_text<OptionError>([&] { ExtendTrainer(options_, text); }), "key-value heads in 0 … 1");

  // Anew without a floor: it forgets again, beside one that never had a floor.
  options_.from = path;
  options_.match_layers = "1:0";
  options_.floor = false;
  ExtendTrainer again(options_, text);
  again.match({});
  const auto& forgets = again.student().converted[1]->latents();
  EXPECT_TRUE(forgets->decay[0].gt(-100).all().item<bool>());
  EXPECT_TRUE(forgets->floor[0].eq(formats::kAbsent).all().item<bool>());
  EXPECT_TRUE(forgets->decay[1].equal(loaded.converted[1]->latents()->decay[1]));
  options_.match_layers = "1";
  ExtendTrainer whole(options_, text);
  EXPECT_FALSE(whole.student().converted[1]->latents()->floor.defined());
  whole.match({});
  EXPECT_TRUE(whole.student().converted[1]->latents()->decay.gt(-100).all().item<bool>());
}

TEST_F(MatchTest, ABlockMadeAnewMayHaveMoreLatents) {
  run_extend(options_, run());
  const TokenText text = this->text();
  options_.from = run().out;
  options_.match_layers = "1:0";
  options_.layer_latents = "1:6";  // of 4
  ExtendTrainer trainer(options_, text);
  auto before = load_converted(options_.model, run().out, torch::kFloat32);
  const auto tokens = torch::tensor(some_tokens(60)).unsqueeze(0);
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(close(trainer.student().model->forward(tokens).logits, before.model->forward(tokens).logits, 1e-6));
  {
    const at::AutoGradMode with_grad(true);
    trainer.match({});
  }
  const auto& latents = trainer.student().converted[1]->latents();
  const auto biases = latents->query_bias.chunk(2);  // of the two key-value heads
  EXPECT_TRUE(biases[0].gt(-100).all().item<bool>());
  EXPECT_TRUE(biases[1].slice(1, 4).eq(formats::kAbsent).all().item<bool>());

  options_.layer_latents = "1:3";  // the head that stays has 4
  EXPECT_CONTAINS(error_text<FormatError>([&] { ExtendTrainer(options_, text); }), "block 1 has 4 latents");
  options_.match_layers = "1";
  ExtendTrainer fewer(options_, text);
  EXPECT_EQ(fewer.student().converted[1]->latents()->sizes().latents, 3);
  options_.layer_latents = "0:6";
  EXPECT_CONTAINS(error_text<FormatError>([&] { ExtendTrainer(options_, text); }), "block 0 has 4 latents");
}

TEST_F(MatchTest, MatchingStopsWhereItIsToldTo) {
  const TokenText text = this->text();
  for (const int64_t last : {1, 5}) {  // while it reads, while it fits
    ExtendTrainer trainer(options_, text);
    int64_t calls = 0, layers = 0;
    trainer.match({.layer = [&](const MatchResult&) { return ++layers, true; },
                   .progress = [&](int64_t done, int64_t) { return ++calls, done < last; }});
    EXPECT_EQ(calls, last);
    EXPECT_EQ(layers, 0);
    EXPECT_EQ(trainer.student().converted[0]->far().window, options_.window);
    trainer.step();
  }
}

// Weighed by what they find far, tokens open the gates.
TEST_F(MatchTest, MatchingByShareGivesTheLatentsMore) {
  options_.match_steps = 60;
  const TokenText text = this->text();
  std::vector<double> shares;
  for (const double match_share : {0.0, 0.999}) {
    options_.match_share = match_share;
    ExtendTrainer trainer(options_, text);
    trainer.match({});
    const torch::NoGradGuard no_grad;
    double sum = 0.0;
    for (const auto& attention : trainer.student().converted) attention->record_shares(true);
    trainer.student().model->forward(torch::tensor(some_tokens(60)).unsqueeze(0));
    for (const auto& attention : trainer.student().converted) sum += attention->mean_shares().sum().item<double>();
    shares.push_back(sum);
  }
  EXPECT_GT(shares[1], 1.05 * shares[0]);
  options_.match_share = 1.5;
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "match_share");
}

// Gates are lowered where tokens that read mostly far don't read latents, and never raised.
TEST_F(MatchTest, MatchingOpensGatesOnRequest) {
  options_.match_steps = 0;
  const TokenText text = this->text();
  const auto biases = [&](double match_open) {
    options_.match_open = match_open;
    ExtendTrainer trainer(options_, text);
    trainer.match({});
    std::vector<at::Tensor> all;
    for (const auto& attention : trainer.student().converted) all.push_back(attention->latents()->gate_bias.detach().clone());
    return at::cat(all);
  };
  const auto fitted = biases(0), open = biases(0.5), wide_open = biases(1.0);
  EXPECT_TRUE((open <= fitted).all().item<bool>());
  EXPECT_TRUE((wide_open <= open).all().item<bool>());
  EXPECT_TRUE((wide_open < fitted - 0.1).any().item<bool>());
  options_.match_open = 1.5;
  EXPECT_CONTAINS(error_text<OptionError>([&] { options_.validate(); }), "match_open");
}

TEST_F(MatchTest, MatchesTheLayersThatAreNamed) {
  options_.match_layers = "0";
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  std::vector<int64_t> layers;
  trainer.match({.layer = [&](const MatchResult& result) { return layers.push_back(result.layer), true; }});
  EXPECT_EQ(layers, std::vector<int64_t>{0});
}

}  // namespace
}  // namespace latte::extend
