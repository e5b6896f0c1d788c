#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "extend/converted_model.h"
#include "extend/evaluate.h"
#include "extend/extend_trainer.h"
#include "extend/latent_start.h"
#include "extend/run.h"
#include "extend/tiny_model.h"
#include "formats/error.h"
#include "formats/test_files.h"
#include "nn/test_close.h"

namespace latte::extend {
namespace {

using formats::error_text;
using formats::FormatError;
using nn::close;

std::map<std::string, at::Tensor> copies_of(ExtendTrainer& trainer) {
  std::map<std::string, at::Tensor> copies;
  for (const auto& item : trainer.student().model->named_parameters()) copies[item.key()] = item.value().detach().clone();
  return copies;
}

class ExtendTest : public ::testing::Test {
 protected:
  ExtendTest() {
    write_tiny_model(folder_ / "base.gguf");
    std::string text;
    for (int i = 0; i < 400; ++i)
      text += "line " + std::to_string(i * i % 97) + " of a text with " + std::to_string(i % 7) + "\n";
    formats::write_bytes(folder_ / "text.txt", text);
    options_.model = folder_ / "base.gguf";
    options_.text = {folder_ / "text.txt"};
    options_.held_out_fraction = 0.1;
    options_.window = 8;
    options_.sinks = 2;
    options_.latents = 4;
    options_.match_sequences = 2;
    options_.match_steps = 6;
    options_.context = 64;
    options_.tokens = int64_t{64} * 6;
    options_.least_window = 4;
    options_.dtype = "float32";
    options_.storage = "f32";
  }

  formats::Tokenizer tokenizer() const { return formats::Tokenizer(formats::GgufFile(options_.model).metadata()); }
  TokenText text() const { return TokenText(options_.text, tokenizer(), options_.held_out_fraction, options_.context); }
  RunOptions run(const std::string& out = "out.gguf") const {
    RunOptions run;
    run.out = folder_ / out;
    run.quiet = true;
    return run;
  }
  std::vector<int64_t> some_tokens(int64_t count) const {
    auto tokens = read_tokens(options_.text[0], tokenizer());
    tokens.resize(static_cast<size_t>(count));
    return tokens;
  }

  formats::TestFolder folder_;
  ExtendOptions options_;
};

TEST_F(ExtendTest, MatchingLowersTheError) {
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
    EXPECT_LT(layer.error, 0.6 * layer.window_error) << "layer " << layer.layer;
  }
}

TEST_F(ExtendTest, TrainingBringsTheModelCloser) {
  options_.tokens = int64_t{64} * 40;
  options_.lr = 4e-4;
  options_.match_sequences = 0;  // closed latents: the attention weights do it
  const Report report = run_extend(options_, run());
  ASSERT_TRUE(report.window_sinks && report.trained);
  EXPECT_LT(report.trained->kl, 0.95 * report.window_sinks->kl);
  EXPECT_EQ(report.step, 40);
}

TEST_F(ExtendTest, GoesOnBitForBit) {
  options_.train = "lora";
  options_.first_context = 16;
  const TokenText text = this->text();
  const auto matched = [](ExtendTrainer& trainer) { trainer.match({}); };
  ExtendTrainer whole(options_, text), first(options_, text), second(options_, text);
  matched(whole);
  matched(first);
  for (int i = 0; i < 4; ++i) whole.step();
  for (int i = 0; i < 2; ++i) first.step();
  first.save(folder_ / "c.safetensors", "{}");
  second.load(formats::CheckpointFile(folder_ / "c.safetensors"));
  for (int i = 0; i < 2; ++i) second.step();
  EXPECT_EQ(second.steps_done(), 4);
  const auto a = whole.student().model->named_parameters(), b = second.student().model->named_parameters();
  for (const auto& item : a) EXPECT_TRUE(item.value().equal(b[item.key()])) << item.key();
}

TEST_F(ExtendTest, SomeLayersHaveOtherLatents) {
  options_.layer_latents = "1:7";
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  EXPECT_EQ(trainer.spec().latents, (std::vector<int32_t>{4, 7}));
  EXPECT_EQ(trainer.student().converted[1]->latents()->sizes().latents, 7);
  options_.layer_latents = "1-2:7";
  EXPECT_THROW(ExtendTrainer(options_, text), OptionError);  // the model has two
  options_.layer_latents = "15-24:256,3:16";
  EXPECT_EQ(options_.latents_of(3), 16);
  EXPECT_EQ(options_.latents_of(15), 256);
  EXPECT_EQ(options_.latents_of(24), 256);
  EXPECT_EQ(options_.latents_of(25), 4);
  for (const char* bad : {"7", "x:3", "3:", "5-2:8", "1:-4", "1:99999999999999999999", ",", "1-:3"}) {
    options_.layer_latents = bad;
    EXPECT_THROW(options_.validate(), OptionError) << bad;
  }
}

TEST_F(ExtendTest, TheTeachersCacheChangesNothing) {
  options_.text_share = 0.25;
  const TokenText text = this->text();
  ExtendTrainer plain(options_, text);
  options_.teacher_cache = folder_ / "cache";
  ExtendTrainer writes(options_, text), reads(options_, text);
  std::vector<double> losses;
  for (int i = 0; i < 3; ++i) losses.push_back(plain.step().loss);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(writes.step().loss, losses[static_cast<size_t>(i)]);
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(options_.teacher_cache)) files.push_back(entry.path());
  EXPECT_EQ(files.size(), 3U);
  // What is read is what lies there: zeros in place of the original's words give another loss; a damaged file is made again.
  const auto tokens = text.sample(1, options_.context, static_cast<uint64_t>(options_.seed), 0).slice(1, 0, -1);
  const TeacherCache cache(options_.teacher_cache, reads.spec().base_hash, reads.dtype());
  int computed = 0;
  const auto compute = [&] { return ++computed, torch::zeros({options_.context, 32}); };
  EXPECT_GT(cache.get(tokens, compute).abs().sum().item<double>(), 0.0);
  EXPECT_EQ(computed, 0);
  for (const auto& file : files) formats::write_bytes(file.string(), "short");
  EXPECT_EQ(cache.get(tokens, compute).abs().sum().item<double>(), 0.0);
  EXPECT_EQ(computed, 1);
  EXPECT_NE(reads.step().loss, losses[0]);
}

TEST_F(ExtendTest, TheAdapterIsTheStudent) {
  const TokenText text = this->text();
  const auto tokens = torch::tensor(some_tokens(60)).unsqueeze(0);
  for (const auto& [train, changed] : {std::pair{"latents", 0}, {"attention", 8}, {"lora", 8}, {"all", 18}}) {
    options_.train = train;
    ExtendTrainer trainer(options_, text);
    trainer.match({});
    for (int i = 0; i < 2; ++i) trainer.step();
    const StoredTensors stored = trainer.adapter_tensors();
    int pretrained = 0;
    for (const auto& tensor : stored.tensors()) pretrained += !formats::is_added_tensor(tensor.name);
    EXPECT_EQ(pretrained, changed) << train;
    formats::write_adapter(folder_ / "a.gguf", trainer.spec(), formats::GgufFile(options_.model), stored.tensors());
    auto loaded = load_converted(options_.model, folder_ / "a.gguf", torch::kFloat32);
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(close(loaded.model->forward(tokens).logits, trainer.student().model->forward(tokens).logits, 1e-6)) << train;
  }
}

TEST_F(ExtendTest, LoraChangesWeightsByItsRank) {
  options_.train = "lora";
  options_.lora_rank = 2;
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  const auto before = models::load_decoder(options_.model)->named_parameters();
  for (int i = 0; i < 3; ++i) trainer.step();
  const auto after = trainer.student().model->named_parameters();
  for (const char* name : {"blk.0.attn_q.weight", "blk.1.attn_output.weight"}) {
    const auto singular = at::linalg_svdvals((after[name] - before[name]).to(torch::kFloat64));
    EXPECT_GT(singular[1].item<double>(), 1e-5) << name;
    EXPECT_LT(singular[2].item<double>(), 1e-3 * singular[0].item<double>()) << name;
  }
  EXPECT_TRUE(after["blk.0.ffn_up.weight"].equal(before["blk.0.ffn_up.weight"]));
}

TEST_F(ExtendTest, GoesOnFromAnAdapter) {
  run_extend(options_, run());
  options_.from = run().out;
  options_.window = 16;
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  trainer.match({.layer = [](const MatchResult&) { return ADD_FAILURE() << "matched again", true; }});
  auto loaded = load_converted(options_.model, run().out, torch::kFloat32);
  for (const auto& attention : loaded.converted) attention->set_window(16);
  const auto tokens = torch::tensor(some_tokens(60)).unsqueeze(0);
  {
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(close(trainer.student().model->forward(tokens).logits, loaded.model->forward(tokens).logits, 1e-6));
  }
  options_.train = "latents";  // the changed attention weights stay as the adapter has them
  ExtendTrainer latents(options_, text);
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(close(latents.student().model->forward(tokens).logits, loaded.model->forward(tokens).logits, 1e-6));
  EXPECT_EQ(latents.adapter_tensors().tensors().size(), trainer.adapter_tensors().tensors().size());
  options_.evicted = !options_.evicted;
  EXPECT_CONTAINS(error_text<OptionError>([&] { ExtendTrainer(options_, text); }), "--latents-read-all");
  options_.evicted = !options_.evicted;
  options_.latents = 5;
  EXPECT_THROW(ExtendTrainer(options_, text), FormatError);
}

TEST_F(ExtendTest, MatchesSomeLayersOfAnAdapterAnew) {
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

TEST_F(ExtendTest, LayersMadeAnewMayHaveAFloor) {
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

TEST_F(ExtendTest, LatentsMayLookForSeveralTokensInARow) {
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

TEST_F(ExtendTest, SomeHeadsOfALayerMayBeMadeAnew) {
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

TEST_F(ExtendTest, ABlockMadeAnewMayHaveMoreLatents) {
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

TEST_F(ExtendTest, MatchingStopsWhereItIsToldTo) {
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
TEST_F(ExtendTest, MatchingByShareGivesTheLatentsMore) {
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
TEST_F(ExtendTest, MatchingOpensGatesOnRequest) {
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

TEST_F(ExtendTest, GatesBiasesMayHaveARateOfTheirOwn) {
  options_.gate_lr = 0.5;
  options_.warmup = 0;
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  trainer.match({});
  auto before = copies_of(trainer);
  trainer.step();
  int64_t gates = 0;
  for (const auto& item : trainer.student().model->named_parameters()) {
    const double moved = (item.value().detach() - before[item.key()]).abs().max().item<double>();
    if (item.key().ends_with("gate_bias")) {
      ++gates;
      EXPECT_NEAR(moved, 0.5, 0.01) << item.key();  // Adam's first step
    } else {
      EXPECT_LT(moved, 0.1) << item.key();
    }
  }
  EXPECT_EQ(gates, 2);
}

TEST_F(ExtendTest, MatchesTheLayersThatAreNamed) {
  options_.match_layers = "0";
  const TokenText text = this->text();
  ExtendTrainer trainer(options_, text);
  std::vector<int64_t> layers;
  trainer.match({.layer = [&](const MatchResult& result) { return layers.push_back(result.layer), true; }});
  EXPECT_EQ(layers, std::vector<int64_t>{0});
}

TEST_F(ExtendTest, AMergedModelIsTheAdapterOnItsBase) {
  RunOptions both = run();
  both.merged = folder_ / "merged.gguf";
  options_.floor = true;
  options_.position = "conv";
  run_extend(options_, both);
  auto adapted = load_converted(options_.model, both.out, torch::kFloat32);
  auto merged = load_converted(both.merged, "", torch::kFloat32);
  const auto tokens = torch::tensor(some_tokens(60)).unsqueeze(0);
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(close(merged.model->forward(tokens).logits, adapted.model->forward(tokens).logits, 1e-6));
  EXPECT_CONTAINS(error_text<FormatError>([&] { load_converted(options_.model, "", torch::kFloat32); }), "isn't converted");
}

TEST_F(ExtendTest, ARunIsStoppedAndResumed) {
  options_.tokens = int64_t{64} * 3;
  const Report first = run_extend(options_, run());
  EXPECT_EQ(first.step, 3);
  EXPECT_EQ(first.layers.size(), 2U);
  EXPECT_TRUE(first.latents_off.has_value());
  const std::string recipe = formats::AdapterFile(run().out).spec().recipe;
  EXPECT_CONTAINS(recipe, "\"base.gguf\"");
  EXPECT_EQ(recipe.find(folder_ / ""), std::string::npos) << recipe;
  EXPECT_THROW(run_extend(options_, run()), OptionError);  // it is there already
  ExtendOptions more = options_of_run(run().out);
  EXPECT_EQ(more, options_);
  more.tokens = int64_t{64} * 5;
  const Report second = resume_extend(more, run());
  EXPECT_EQ(second.step, 5);
  EXPECT_TRUE(second.layers.empty());
  more.window = 16;
  EXPECT_CONTAINS(error_text<OptionError>([&] { resume_extend(more, run()); }), "window is 16");
  write_tiny_model(folder_ / "other.gguf", 9);
  more.window = 8;
  more.model = folder_ / "other.gguf";
  EXPECT_CONTAINS(error_text<FormatError>([&] { resume_extend(more, run()); }), "another model");
}

TEST_F(ExtendTest, FullAttentionCanBeTheControl) {
  options_.attention = "full";
  options_.loss = "text";
  run_extend(options_, run("full.gguf"));
  const formats::AdapterFile adapter(folder_ / "full.gguf");
  EXPECT_EQ(adapter.spec().converted_blocks(), 0);
  EXPECT_EQ(adapter.file().tensors().size(), 8U);  // q, k, v, o of two layers
}

TEST_F(ExtendTest, EvaluationAgreesWithTheModelAsAWhole) {
  run_extend(options_, run());
  VariantSources sources;
  sources.model = options_.model;
  sources.adapter = run().out;
  sources.dtype = torch::kFloat32;
  const auto tokens = some_tokens(257);
  TextEvaluator evaluator(tokens, models::load_decoder(sources.model));
  EXPECT_EQ(evaluator.windows(64), 4);
  for (AttentionKind kind : {AttentionKind::kFull, AttentionKind::kMacchiato, AttentionKind::kMacchiatoLatentsOff}) {
    Variant variant = load_variant(kind, sources);
    const TextRow row = evaluator.evaluate(variant, 64, 3);
    EXPECT_EQ(row.windows, 3);
    double expected = 0.0;
    const torch::NoGradGuard no_grad;
    for (int64_t i = 0; i < 3; ++i) {
      const auto all = torch::tensor(tokens);
      const auto logits = variant.model.model->forward(all.slice(0, 64 * i, 64 * i + 64).unsqueeze(0)).logits[0];
      expected += torch::nn::functional::cross_entropy(logits, all.slice(0, 64 * i + 1, 64 * i + 65)).item<double>() / 3;
    }
    EXPECT_NEAR(row.loss, expected, 1e-5);
    EXPECT_TRUE(row.standard_error && row.kl);
    if (kind == AttentionKind::kFull) {
      EXPECT_LT(*row.kl, 1e-6);
    } else {
      EXPECT_GT(*row.kl, 1e-4);
    }
    EXPECT_EQ(row.buckets.size(), 1U);
    EXPECT_EQ(row.latent_shares.size(), kind == AttentionKind::kMacchiato ? 2U : 0U);
  }
  // An adapter may be read with another window: one that holds all of the text is full attention with its weights.
  sources.window = 64;
  Variant wide = load_variant(AttentionKind::kMacchiato, sources),
          off = load_variant(AttentionKind::kMacchiatoLatentsOff, sources);
  const TextRow wide_row = evaluator.evaluate(wide, 64, 3);
  EXPECT_EQ(wide_row.window, 64);
  EXPECT_NEAR(wide_row.loss, evaluator.evaluate(off, 64, 3).loss, 1e-6);
  sources.window.reset();
  Variant linear = load_variant(AttentionKind::kMacchiato, sources);
  EXPECT_EQ(evaluator.evaluate(linear, 64, 1).state_bytes, evaluator.evaluate(linear, 256, 1).state_bytes);
  EXPECT_THROW(evaluator.evaluate(linear, 257, 1), std::invalid_argument);
  EXPECT_THROW(load_variant(AttentionKind::kWindowSinksUptrained, sources), OptionError);
  sources.control = run().out;
  EXPECT_CONTAINS(error_text<OptionError>([&] { load_variant(AttentionKind::kWindowSinksUptrained, sources); }), "has latents");
}

TEST_F(ExtendTest, TextsThatAreTooShortAreRefused) {
  formats::write_bytes(folder_ / "short.txt", "short");
  options_.text = {folder_ / "short.txt"};
  EXPECT_CONTAINS(error_text<FormatError>([&] { run_extend(options_, run()); }), "no text has 65 tokens");
  EXPECT_EQ(folder_.names().count("out.gguf"), 0U);
  options_.text = {folder_ / "none.txt"};
  EXPECT_THROW(run_extend(options_, run()), formats::FileError);
}

TEST(ExtendOptions, ComeBackFromJson) {
  ExtendOptions options;
  options.model = "m.gguf";
  options.text = {"a.txt", "b.txt"};
  options.latents = 32;
  options.lr = 1e-4;
  EXPECT_EQ(ExtendOptions::from_json(options.to_json()), options);
  nlohmann::json bad = options.to_json();
  bad["latents"] = 0;
  EXPECT_THROW(ExtendOptions::from_json(bad), OptionError);
  bad = options.to_json();
  bad["nonsense"] = 1;
  EXPECT_THROW(ExtendOptions::from_json(bad), OptionError);
  options.window = 100;
  options.least_window = 32;
  EXPECT_EQ(options.training_windows(), (std::vector<int64_t>{32, 64, 100}));
  options.context = 4096;
  options.first_context = 1024;
  options.tokens = int64_t{4096} * 9;
  for (int64_t step = 0; step < 9; ++step) EXPECT_EQ(options.context_of(step), 1024 << step / 3) << step;
  options.first_context = 1000;
  EXPECT_THROW(options.validate(), OptionError);
  options.least_window = 0;
  EXPECT_EQ(options.training_windows(), (std::vector<int64_t>{100}));
}

TEST(FarShares, EqualTheDefinition) {
  torch::manual_seed(5);
  const auto query = torch::randn({30, 4, 8}), key = torch::randn({30, 2, 8});
  const auto positions = torch::tensor({3, 15, 29});
  const auto shares = far_shares(query, key, positions, 0.4, {.window = 8, .sinks = 2, .far_limit = 100});
  for (int64_t i = 0; i < 3; ++i) {
    const auto t = positions[i].item<int64_t>();
    for (int64_t h = 0; h < 4; ++h) {
      const auto p = (key.select(1, h / 2).slice(0, 0, t + 1).matmul(query[t][h]) * 0.4).softmax(0);
      const double expected = t - 8 >= 2 ? p.slice(0, 2, t - 7).sum().item<double>() : 0.0;
      EXPECT_NEAR(shares[i][h].item<double>(), expected, 1e-5);
    }
  }
}

TEST(KMeans, FindsClusters) {
  torch::manual_seed(6);
  const auto centers = torch::tensor({{0.0, 10.0}, {10.0, 0.0}, {-10.0, -10.0}});
  const auto points = (centers.unsqueeze(1) + torch::randn({3, 50, 2}) * 0.1).flatten(0, 1);
  const Clusters clusters = k_means(points, torch::ones({150}), 3, 1);
  for (int64_t c = 0; c < 3; ++c) {
    EXPECT_TRUE((clusters.member.slice(0, c * 50, c * 50 + 50) == clusters.member[c * 50]).all().item<bool>());
    EXPECT_TRUE(close(clusters.centers[clusters.member[c * 50].item<int64_t>()], centers[c].to(torch::kFloat32), 0.02));
  }
  EXPECT_EQ(k_means(points.slice(0, 0, 2), torch::ones({2}), 4, 1).centers.size(0), 4);  // fewer points than clusters
}

}  // namespace
}  // namespace latte::extend
