#include "extend/evaluate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <optional>

#include "extend/converted_model.h"
#include "extend/retrieval.h"
#include "extend/test_extend.h"
#include "extend/variants.h"
#include "formats/error.h"
#include "nn/test_close.h"

namespace latte::extend {
namespace {

using formats::error_text;
using formats::FormatError;
using nn::close;

TEST_F(ExtendTest, AMergedControlIsEvaluatedAsWhatItIs) {
  RunOptions both = run("control.gguf");
  both.merged = folder_ / "merged.gguf";
  options_.attention = "window-sinks";
  run_extend(options_, both);
  VariantSources merged, apart;
  merged.dtype = apart.dtype = torch::kFloat32;
  merged.model = both.merged;
  apart.model = options_.model;
  apart.control = both.out;
  constexpr auto kControl = AttentionKind::kWindowSinksUptrained;
  EXPECT_FALSE(missing_source(kControl, merged, merged_kind(merged.model)));
  auto whole = load_variant(kControl, merged), expected = load_variant(kControl, apart);
  const auto tokens = torch::tensor(some_tokens(60)).unsqueeze(0);
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(close(whole.model.model->forward(tokens).logits, expected.model.model->forward(tokens).logits, 1e-6));
  EXPECT_CONTAINS(missing_source(AttentionKind::kMacchiatoLatentsOff, merged, merged_kind(merged.model)).value_or(""),
                  "has window and sinks alone");
  EXPECT_CONTAINS(missing_source(AttentionKind::kFull, merged, merged_kind(merged.model)).value_or(""),
                  "needs the original model");
  EXPECT_CONTAINS(missing_source(AttentionKind::kFullUptrained, apart, merged_kind(apart.model)).value_or(""),
                  "needs --full-adapter");
}

TEST_F(ExtendTest, AnEvaluationStopsWhileTheOriginalIsRead) {
  TextEvaluator evaluator(some_tokens(257), models::load_decoder(options_.model));
  VariantSources sources;
  sources.model = options_.model;
  sources.dtype = torch::kFloat32;
  Variant variant = load_variant(AttentionKind::kWindowSinks, sources);
  int64_t calls = 0;
  const TextRow stopped = evaluator.evaluate(variant, 64, 3, [&](int64_t tokens) {
    EXPECT_EQ(tokens, calls == 0 ? 0 : 64);
    return ++calls < 3;  // the first stretch's original and its own reading, then the second's original
  });
  EXPECT_EQ(calls, 3);
  EXPECT_EQ(stopped.windows, 1);
  EXPECT_EQ(stopped.stretch_losses.size(), 1U);
  const TextRow whole = evaluator.evaluate(variant, 64, 3);
  EXPECT_EQ(whole.windows, 3);
  EXPECT_TRUE(whole.kl.has_value());
  EXPECT_EQ(whole.stretch_losses[0], stopped.stretch_losses[0]);
}

TEST_F(ExtendTest, DivergenceIsToldAsFarAsTheOriginalReads) {
  VariantSources sources;
  sources.model = options_.model;
  sources.dtype = torch::kFloat32;
  sources.window = 32;
  Variant variant = load_variant(AttentionKind::kWindowSinks, sources);
  TextEvaluator evaluator(some_tokens(2 * 1024 + 1), models::load_decoder(options_.model));  // a context of 256
  const TextRow within = evaluator.evaluate(variant, 256, 1), beyond = evaluator.evaluate(variant, 1024, 2);
  EXPECT_TRUE(within.kl.has_value());
  EXPECT_FALSE(beyond.kl.has_value());
  ASSERT_EQ(beyond.buckets.size(), 4U);  // to 128, 256, 512 and 1,024
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(beyond.buckets[i].kl.has_value(), i < 2) << i;
  EXPECT_NEAR(evaluator.evaluate(variant, 1024, 1).buckets[1].kl.value(), within.buckets[1].kl.value(), 1e-6);
  EXPECT_EQ(beyond.stretch_losses.size(), 2U);
}

TEST_F(ExtendTest, SharesAreOfWholeStretches) {
  run_extend(options_, run());
  VariantSources sources;
  sources.model = options_.model;
  sources.adapter = run().out;
  sources.dtype = torch::kFloat32;
  Variant variant = load_variant(AttentionKind::kMacchiato, sources);
  constexpr int64_t kLength = 2100;  // two pieces
  TextEvaluator evaluator(some_tokens(2 * kLength + 1), models::Decoder(nullptr));
  const TextRow stopped = evaluator.evaluate(variant, kLength, 2, [](int64_t tokens) { return tokens <= kLength; });
  EXPECT_EQ(stopped.windows, 1);
  EXPECT_EQ(stopped.latent_shares, evaluator.evaluate(variant, kLength, 1).latent_shares);
  EXPECT_NE(stopped.latent_shares, evaluator.evaluate(variant, kLength, 2).latent_shares);
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

TEST_F(ExtendTest, AdaptersAreCheckedBeforeAnythingIsMeasured) {
  options_.tokens = 0;
  options_.match_sequences = 0;
  run_extend(options_, run());
  VariantSources sources;
  sources.model = options_.model;
  const auto all = all_attention_kinds();
  check_adapters(sources, all);
  sources.adapter = run().out;
  check_adapters(sources, all);
  sources.full_adapter = run().out;
  EXPECT_CONTAINS(error_text<OptionError>([&] { check_adapters(sources, all); }),
                  "full-uptrained: " + run().out + " has latents");
  check_adapters(sources, {AttentionKind::kWindowSinks});  // which takes its window from either
  sources.full_adapter.clear();
  sources.control = folder_ / "none.gguf";
  EXPECT_THROW(check_adapters(sources, all), formats::FileError);
  sources.control.clear();
  write_tiny_model(folder_ / "other.gguf", 9);
  sources.model = folder_ / "other.gguf";
  EXPECT_CONTAINS(error_text<FormatError>([&] { check_adapters(sources, all); }), "made for \"Tiny\"");
}

// Attention whose scores are capped keeps its own kind.
TEST_F(ExtendTest, WhatCantBeConvertedIsSaidAtOnce) {
  VariantSources sources;
  sources.model = "gemma2.gguf";
  sources.convertible = false;
  for (const AttentionKind kind : {AttentionKind::kWindow, AttentionKind::kWindowSinks}) {
    EXPECT_CONTAINS(missing_source(kind, sources, std::nullopt).value_or(""), "gemma2.gguf caps its attention's scores");
  }
  EXPECT_FALSE(missing_source(AttentionKind::kFullYarn, sources, std::nullopt));
}

TEST(LossDifferences, ArePairedStretchByStretch) {
  TextRow row, other;
  row.length = other.length = 64;
  row.stretch_losses = {2.1, 3.3, 1.2, 9.0};
  other.stretch_losses = {2.0, 3.0, 1.0};  // one that both have not
  const LossDifference difference = loss_difference(row, other);
  EXPECT_EQ(difference.windows, 3);
  EXPECT_NEAR(difference.loss, 0.2, 1e-12);
  ASSERT_TRUE(difference.standard_error.has_value());
  EXPECT_NEAR(*difference.standard_error, 0.1 / std::sqrt(3.0), 1e-12);
  other.stretch_losses.resize(1);
  EXPECT_NEAR(loss_difference(row, other).loss, 0.1, 1e-12);
  EXPECT_FALSE(loss_difference(row, other).standard_error.has_value());
  other.length = 32;
  EXPECT_THROW(loss_difference(row, other), std::invalid_argument);
}

TEST(Retrieval, ACaseIsAsLongAsAskedOrRefused) {
  const formats::Tokenizer tokenizer(tiny_metadata());
  EXPECT_EQ(passkey_case(tokenizer, 400, 0.3, 1).tokens.size(), 400U);
  EXPECT_EQ(recall_case(tokenizer, 400, 3, 1).tokens.size(), 400U);
  EXPECT_CONTAINS(error_text<OptionError>([&] { passkey_case(tokenizer, 10, 0.3, 1); }),
                  "a task's length is 10, expected at least ");
  EXPECT_CONTAINS(error_text<OptionError>([&] { recall_case(tokenizer, 300, 64, 1); }), "the tokens that 64 pairs");
}

}  // namespace
}  // namespace latte::extend
