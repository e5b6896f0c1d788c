#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "extend/converted_model.h"
#include "extend/latent_start.h"
#include "extend/test_extend.h"
#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/test_gguf.h"
#include "nn/test_close.h"

namespace latte::extend {
namespace {

using formats::error_text;
using formats::FormatError;
using nn::close;

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

TEST_F(ExtendTest, TextsThatAreTooShortAreRefused) {
  formats::write_bytes(folder_ / "short.txt", "short");
  options_.text = {folder_ / "short.txt"};
  EXPECT_CONTAINS(error_text<FormatError>([&] { run_extend(options_, run()); }),
                  "none has 65 tokens to train on, a context and one more (" + options_.text[0] + " has 5)");
  EXPECT_EQ(folder_.names(), (std::set<std::string>{"base.gguf", "short.txt", "text.txt"}));
  options_.text = {folder_ / "none.txt"};
  EXPECT_THROW(run_extend(options_, run()), formats::FileError);
}

TEST_F(ExtendTest, WhatIsReadIsNeverWrittenOver) {
  RunOptions over = run();
  over.overwrite = true;
  const auto error = [&](const std::string& out, const std::string& merged) {
    over.out = out;
    over.merged = merged;
    return error_text<OptionError>([&] { run_extend(options_, over); });
  };
  const std::string out = run().out, model = options_.model;
  const std::string before = formats::read_bytes(model);
  EXPECT_CONTAINS(error(model, ""), "which is model too");
  EXPECT_CONTAINS(error(folder_ / "./base.gguf", ""), "which is model too");
  std::filesystem::create_symlink(model, folder_ / "link.gguf");
  EXPECT_CONTAINS(error(folder_ / "link.gguf", ""), "which is model too");
  EXPECT_CONTAINS(error(options_.text[0], ""), "which is text too");
  EXPECT_CONTAINS(error(out, model), "merged is " + model + ", which is model too");
  EXPECT_CONTAINS(error(out, out), "which is out too");
  EXPECT_CONTAINS(error(out, folder_ / "./out.gguf"), "which is out too");
  EXPECT_CONTAINS(error("out.gguf", "./out.gguf"), "which is out too");
  over.config = folder_ / "recipe.json";
  EXPECT_CONTAINS(error(over.config, ""), "which is config too");
  over.config.clear();
  options_.from = folder_ / "start.gguf";
  EXPECT_CONTAINS(error(options_.from, ""), "which is from too");
  EXPECT_EQ(formats::read_bytes(model), before);
}

// A typing error in what follows --overwrite must not cost the run that is there.
TEST_F(ExtendTest, ARunGoesWhenTheNextOneCanBegin) {
  options_.tokens = 0;
  options_.match_sequences = 0;
  run_extend(options_, run());
  const auto checkpoint = [&] { return formats::read_bytes(run().out + ".run/checkpoint.safetensors"); };
  const std::string before = checkpoint();
  RunOptions over = run();
  over.overwrite = true;
  ExtendOptions wrong = options_;
  wrong.text = {folder_ / "none.txt"};
  EXPECT_THROW(run_extend(wrong, over), formats::FileError);
  wrong = options_;
  wrong.layer_latents = "7:8";
  EXPECT_THROW(run_extend(wrong, over), OptionError);
  EXPECT_EQ(checkpoint(), before);
  options_.seed = 2;
  run_extend(options_, over);
  EXPECT_NE(checkpoint(), before);
}

TEST_F(ExtendTest, AResumedRunKeepsWhatItBeganFrom) {
  options_.tokens = 64;
  run_extend(options_, run("start.gguf"));
  options_.seed = 2;
  run_extend(options_, run("other.gguf"));
  options_.from = folder_ / "start.gguf";
  run_extend(options_, run());
  options_.tokens = 128;
  std::filesystem::rename(folder_ / "start.gguf", folder_ / "moved.gguf");
  options_.from = folder_ / "moved.gguf";
  resume_extend(options_, run());
  options_.from = folder_ / "other.gguf";
  EXPECT_CONTAINS(error_text<OptionError>([&] { resume_extend(options_, run()); }), "but the run began with another");
  options_.from = folder_ / "moved.gguf";
  EXPECT_CONTAINS(error_text<OptionError>([&] { resume_extend(options_, run("other.gguf")); }), "but the run began with none");
}

// A run that today's checks would refuse goes on with an option that they don't.
TEST_F(ExtendTest, ARunOfBeforeACheckGoesOn) {
  options_.tokens = 64;
  run_extend(options_, run());
  const std::string path = run().out + ".run/checkpoint.safetensors";
  const formats::CheckpointFile checkpoint(path);
  nlohmann::json record = nlohmann::json::parse(checkpoint.config());
  record["extend"]["context"] = 6;
  record.erase("from_hash");
  formats::write_checkpoint(path, {.config = record.dump(), .step = checkpoint.step()}, checkpoint.file().tensors());
  ExtendOptions found = options_of_run(run().out);
  EXPECT_EQ(found.context, 6);
  EXPECT_CONTAINS(error_text<OptionError>([&] { resume_extend(found, run()); }), "context is 6, expected more than 6");
  found.context = 64;
  found.tokens = 128;
  EXPECT_EQ(resume_extend(found, run()).step, 2);
}

// As ggml's writers leave it: without leading dimensions of 1.
TEST_F(ExtendTest, AnAdapterMayLackLeadingDimensionsOfOne) {
  write_tiny_model(options_.model, 3, /*kv_heads=*/1);
  options_.position = "conv";
  run_extend(options_, run());
  // key.weight, key.bias, decay, conv.weight
  EXPECT_EQ(formats::write_without_leading_ones(run().out, folder_ / "rewritten.gguf"), 2 * 4);
  auto written = load_converted(options_.model, run().out, torch::kFloat32);
  auto rewritten = load_converted(options_.model, folder_ / "rewritten.gguf", torch::kFloat32);
  const auto tokens = torch::tensor(some_tokens(60)).unsqueeze(0);
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(rewritten.model->forward(tokens).logits.equal(written.model->forward(tokens).logits));
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

TEST(ExtendOptions, RefuseWhatWouldTrainNothing) {
  ExtendOptions options;
  options.model = "m.gguf";
  options.text = {"a.txt"};
  options.window = 512;
  options.least_window = 64;
  options.context = 68;
  EXPECT_CONTAINS(error_text<OptionError>([&] { options.validate(); }), "context is 68, expected more than 68");
  options.context = 69;
  options.validate();
  options.context = 138;
  options.first_context = 69;
  options.validate();
  options.context = 128;
  options.first_context = 64;
  EXPECT_CONTAINS(error_text<OptionError>([&] { options.validate(); }), "first_context is 64, expected more than 68");
  options.first_context = 0;
  options.least_window = 512;
  EXPECT_THROW(options.validate(), OptionError);
  options.evicted = false;  // such latents read the window as well
  options.validate();
  options.evicted = true;
  options.tokens = options.match_sequences = 0;  // an adapter for another window
  options.validate();
  options.attention = "full";
  EXPECT_CONTAINS(error_text<OptionError>([&] { options.validate(); }), "loss is kl, expected text, or a text_share");
  options.text_share = 0.1;
  options.validate();
  options.lr = std::numeric_limits<double>::infinity();
  EXPECT_CONTAINS(error_text<OptionError>([&] { options.validate(); }), "lr is inf");
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
